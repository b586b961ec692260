"""curves.png: what runs logged, over their steps. No torch; matplotlib takes a second to import: only for a plot."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

from pairtune.files import write_bytes
from pairtune.run.log_file import read_log, set_names

# Panel: keys, and the reference line; None: what step 1 logged, since each loss starts at a value of its own
PANELS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "loss": (("loss",), None),
    "accuracy": (("rewards/accuracies",), 0.5),
    "margin": (("rewards/margins",), 0.0),
    "rewards": (("rewards/chosen", "rewards/rejected"), 0.0),
    "log-probability, nats": (("logps/chosen", "logps/rejected"), None),
    "gradient norm": (("grad_norm",), None),
    "pairs a second": (("pairs_per_second",), None),
}
TRAINING, HELD_OUT, REJECTED = "tab:blue", "tab:orange", "tab:red"
RUNS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
)
MANY = 2000  # points of a line: more than a panel has pixels


def plot_curves(log_path: Path, png_path: Path, title: str = "") -> None:
    """Draws `draw_curves` of a metrics.jsonl into a PNG."""
    save(draw_curves(read_log(log_path), title), png_path)


def save(figure, png_path: Path) -> None:
    """Writes a figure as a PNG."""
    content = BytesIO()
    figure.savefig(content, dpi=110)
    write_bytes(png_path, content.getvalue())  # at once: no half picture where the disk is full


def draw_curves(log: Sequence[Mapping], title: str = ""):
    """Returns a matplotlib Figure of what one run logged, a panel for each of PANELS that it has.

    Lines are training, dots and lines the held-out pairs, and each set of them that has a name. The grey line is where
    an untrained policy stands: at the loss of step 1, which is before the first update (a log without a step 1 has
    none); at chance; at zero. The dotted one of the accuracy is what length alone would rank rightly.
    """
    return _draw({"": log}, title)


def draw_runs(logs: Mapping[str, Sequence[Mapping]], title: str = ""):
    """Returns the same Figure of several runs, by name, over each other: a colour each."""
    return _draw(logs, title)


def points(log: Sequence[Mapping], key: str) -> tuple[list[int], list[float]]:
    """Returns steps and values of a key; NaN where a value was not finite. Long lines are thinned out.

    An accuracy before the first update is left out where the policy is the reference: all rewards are alike then, and
    a tie is not accurate.
    """
    rows = [row for row in log if key in row and not (key.endswith("rewards/accuracies") and _is_tied(row, key))]
    every = -(-len(rows) // MANY) if rows else 1
    rows = [*rows[:-1:every], *rows[-1:]]
    return [row["step"] for row in rows], [math.nan if row[key] is None else row[key] for row in rows]


def start_of(log: Sequence[Mapping], key: str) -> float | None:
    """Returns what step 1 logged, which is before the first update."""
    return next((row[key] for row in log if row["step"] == 1 and row.get(key) is not None), None)


def length_baseline(log: Sequence[Mapping]) -> float | None:
    """Returns the accuracy that length alone would have on the held-out pairs, as last logged."""
    return next((row["eval/length_baseline"] for row in reversed(log) if "eval/length_baseline" in row), None)


def _is_tied(row: Mapping, key: str) -> bool:
    return row["step"] <= 1 and not row.get(key.replace("accuracies", "margins"))


def _draw(logs: Mapping[str, Sequence[Mapping]], title: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import: only when there is a plot
    from matplotlib.figure import Figure

    keys = {key for log in logs.values() for row in log for key in row}
    panels = [name for name, (wanted, _) in PANELS.items() if any(p + k in keys for k in wanted for p in ("", "eval/"))]
    panels = panels or ["loss", "accuracy", "margin"]
    columns = 4 if len(panels) > 3 else max(1, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4.0 * columns, 3.3 * lines + 0.7))
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for axis, name in zip(axes, panels, strict=False):
        _draw_panel(axis, name, logs)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    if len(logs) > 1 and len(panels) < len(axes) and (names := axes[0].get_legend()):
        names.remove()  # the names of many runs would cover a panel
        axes[-1].legend(*axes[0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="center")
    height = 3.3 * lines + 0.7
    figure.subplots_adjust(left=0.05, right=0.99, bottom=0.5 / height, top=1 - 0.95 / height, wspace=0.24, hspace=0.34)
    figure.suptitle(textwrap.fill(title, 150), y=1 - 0.12 / height, va="top", fontsize=11)
    return figure


def _draw_panel(axis, name: str, logs: Mapping[str, Sequence[Mapping]]) -> None:
    from matplotlib import colormaps

    wanted, start = PANELS[name]
    single = len(logs) == 1
    for number, (run, log) in enumerate(logs.items()):
        sets = list(dict.fromkeys(one for row in log for one in set_names(row))) if single else []
        if name == "loss" and single:
            start = start_of(log, "loss")
        for key in wanted:
            kinds = {"": "training", "eval/": "held out", **{f"eval/{one}/": one for one in sets if len(wanted) == 1}}
            for prefix, what in kinds.items():
                steps, values = points(log, prefix + key)
                if not steps:
                    continue
                label = f"{what}, {key.rpartition('/')[2]}" if len(wanted) > 1 else what
                color = RUNS[number] if len(logs) <= len(RUNS) else colormaps["turbo"](number / (len(logs) - 1))
                if single:
                    color = REJECTED if key.endswith("rejected") else HELD_OUT if prefix else TRAINING
                    color = TRAINING if prefix and len(wanted) > 1 and key.endswith("chosen") else color
                    color = RUNS[2 + sets.index(what) % (len(RUNS) - 2)] if what in sets else color
                elif len(wanted) > 1:
                    label = f"{run}, {label}"
                else:
                    label = run if not prefix else f"{run}, held out"
                style = {"marker": "o", "markersize": 3.5, "linewidth": 1.3} if prefix else {"linewidth": 1.0}
                style |= {"alpha": 0.6} if not prefix else {}
                style |= {"linestyle": "--"} if not single and key.endswith("rejected") else {}
                axis.plot(steps, values, label=label, color=color, **style)
    if start is not None:
        axis.axhline(start, color="0.75", linewidth=1, zorder=1)
    if name == "accuracy" and single and (baseline := length_baseline(next(iter(logs.values())))) is not None:
        axis.axhline(baseline, color="0.4", linewidth=1, linestyle=":", zorder=1, label="by length alone")
    if name == "accuracy":
        axis.set_ylim(-0.03, 1.03)
    axis.set_title(name, fontsize=10)
    axis.set_xlabel("step", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.locator_params(nbins=5)
    axis.grid(alpha=0.25)
    if axis.lines and (name in ("loss", "accuracy", "rewards", "log-probability, nats") and single or name == "loss"):
        axis.legend(frameon=False, fontsize=8)
