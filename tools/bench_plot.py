"""Time and memory of a step as the work grows: longer rows, more pairs, a larger vocabulary, more processes."""

import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import random_work as work
from side_by_side import WARM_STEPS, Task, in_turn, summary

LENGTHS = (128, 256, 512, 1024)  # tokens of a pair, of which two thirds are its prompt
PAIRS = (1, 2, 4, 8)
VOCABULARIES = (32_000, 128_256, 262_144)
PROCESSES = (1, 2, 4)  # ours only; seconds that pass, on as many cores


def plot(path: Path, systems: list[str], task: Task, steps: int, *, tiny: bool = False) -> list[dict]:
    """Measures and draws; prints a line a point, and returns them."""
    points = []

    def measure(panel: str, size: int, texts: list[str], changed: Task, processes: int = 0) -> None:
        for row in _rows(texts, changed, steps, processes):
            points.append({"panel": panel, "size": size, **row})
            told = f"{row['system']:<28}{row['seconds']:8.3f} s{row['peak_gib']:8.2f} GiB"
            print(f"{panel:<24}{size:>9,}  {told}", flush=True)

    for total in LENGTHS[:2] if tiny else LENGTHS:
        answer = total // 6
        lengths = work.draw_lengths(work.Lengths(total - 2 * answer, answer, answer), len(task.lengths))
        measure("tokens a pair", total, systems, replace(task, lengths=tuple(lengths)))
    for pairs in PAIRS[:2] if tiny else PAIRS:
        lengths = (task.lengths * max(PAIRS))[: pairs * steps]
        measure("pairs a step", pairs, systems, replace(task, pairs_per_step=pairs, lengths=lengths))
    for vocabulary in VOCABULARIES[:1] if tiny else VOCABULARIES:
        measure("vocabulary", vocabulary, systems, replace(task, sizes=task.sizes | {"vocab_size": vocabulary}))
    ours = [text for text in systems if text.startswith("ours")][:1]
    for processes in PROCESSES[:2] if tiny else PROCESSES:
        measure("processes", processes, ours, replace(task, pairs_per_step=max(PROCESSES)), processes)
    _draw(path, points)
    return points


def _rows(texts: list[str], task: Task, steps: int, processes: int) -> list[dict]:
    with tempfile.TemporaryDirectory(dir=task.folder) as name:
        task = replace(task, folder=Path(name))
        task.write()
        found = in_turn(texts, task, steps, processes=processes or 1)
        rows = [summary(made, task, text) for text, made in found.items()]
        if processes:  # what the others compute is not in the first one's CPU seconds
            for row in rows:
                row["seconds"] = statistics.median(step["wall"] for step in found[row["system"]][WARM_STEPS:])
        return rows


def _draw(path: Path, points: list[dict]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(point["panel"] for point in points))
    figure = Figure(figsize=(4 * len(panels), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, panel in enumerate(panels):
        for row, (key, title) in enumerate((("seconds", "seconds a step"), ("peak_gib", "peak GiB"))):
            axis = axes[row][column]
            for system in dict.fromkeys(point["system"] for point in points if point["panel"] == panel):
                line = [(p["size"], p[key]) for p in points if (p["panel"], p["system"]) == (panel, system)]
                axis.plot(*zip(*line, strict=True), "o-", label=system, markersize=4)
            axis.set(xlabel=panel, ylabel=title if column == 0 else "", ylim=(0, None))
            axis.grid(alpha=0.25)
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
