"""What a run writes down: exact means, metrics.jsonl, torchtune's loggers, curves.png."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from pairtune.config import instantiate
from pairtune.config.uses import lacks
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.files import telling, write_bytes, write_text
from pairtune.models.logps import AnswerScores
from pairtune.pairs.batch import PairBatch

WAY_ON = "resume=true goes on"
_SLASHED = {
    f"{kind}_{which}": f"{kind}/{which}"
    for kind in ("rewards", "logps")
    for which in ("chosen", "rejected", "margins", "accuracies")
}


class Meter:
    """Means over everything added since the last read, over all processes. Sums stay on the device until then."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self.restart_clock()

    def add(self, **values: Tensor) -> None:
        """Adds vectors of one value a pair. `rewards_chosen` is called rewards/chosen where it is read.

        Unpaired rows have values of one answer: vectors may differ in length, and be empty.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().sum(dtype=torch.float64)
            self._counts[name] = self._counts.get(name, 0) + value.numel()

    def add_pairs(
        self,
        batch: PairBatch,
        scores: AnswerScores,
        losses: Tensor,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
        *,
        kl: Tensor | None = None,
    ) -> None:
        """Adds what every run logs of a micro-batch, and counts its pairs and tokens for `read_speed`.

        Args:
            scores: Of the policy.
            losses, chosen_rewards, rejected_rewards: [P], of the loss.
            kl: KTO's baseline, a scalar of the whole step.
        """
        self.add(
            loss=losses,
            rewards_chosen=chosen_rewards[batch.with_chosen],
            rewards_rejected=rejected_rewards[batch.with_rejected],
            rewards_accuracies=(chosen_rewards > rejected_rewards)[batch.with_both].float(),  # a tie is not accurate
            logps_chosen=scores.chosen_logps[batch.with_chosen],
            logps_rejected=scores.rejected_logps[batch.with_rejected],
        )
        if kl is not None:
            self.add(kl=kl.expand(batch.num_pairs))
        if scores.router_loss is not None:  # of this micro-batch, the same for each of its pairs
            self.add(router_loss=scores.router_loss.expand(batch.num_pairs))
        self._num_pairs += batch.num_pairs
        self._num_tokens += batch.num_tokens

    def restart_clock(self) -> None:
        """Begins anew to measure speed: what lies behind, such as an evaluation, is no training."""
        self._num_pairs, self._num_tokens, self._since = 0, 0, time.perf_counter()

    def read_speed(self, world: World) -> dict[str, float]:
        """Returns pairs and tokens per second of all processes since the clock was started, and starts it anew.

        peak_memory_gib is this process's, see `peak_memory_gib`. Every process has to call it.
        """
        seconds = time.perf_counter() - self._since
        speed = {
            "pairs_per_second": world.sum_number(self._num_pairs) / seconds,
            "tokens_per_second": world.sum_number(self._num_tokens) / seconds,
            "peak_memory_gib": peak_memory_gib(world.device),
        }
        self.restart_clock()
        return speed

    def state(self) -> tuple[list[str], Tensor]:
        """Returns the metrics' names, and their sums and counts so far, [2, names] on the CPU."""
        names = list(self._sums)
        table = [[float(self._sums[n]) for n in names], [float(self._counts[n]) for n in names]]
        return names, torch.tensor(table, dtype=torch.float64)

    def load_state(self, names: list[str], sums: Tensor, device: torch.device) -> None:
        """Takes up sums and counts as `state` returned them."""
        for name, total, count in zip(names, *sums, strict=True):
            self._sums[name], self._counts[name] = total.to(device), int(count)

    def read(self, world: World, prefix: str = "") -> dict[str, float]:
        """Returns the mean of every metric, the same in each process, and starts anew. Every process has to call it.

        rewards/margins is the difference of the means of rewards/chosen and rewards/rejected; over pairs that is the
        mean of their differences. A metric of which there is no value at all is left out.
        """
        if not self._sums:  # an edited loop that adds nothing
            return {}
        sums = torch.stack([*self._sums.values()])
        counts = torch.tensor([*self._counts.values()], dtype=torch.float64, device=sums.device)
        sums, counts = world.sum(sums).tolist(), world.sum(counts).tolist()
        names = [_SLASHED.get(name, name) for name in self._sums]
        means = {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        self._sums.clear()
        self._counts.clear()
        return {prefix + name: value for name, value in means.items()}


class RunLog:
    """Appends to metrics.jsonl, one object a logged step, and passes the same to a torchtune logger if there is one.

    Only the main process writes. A run that goes on from `step` keeps what was logged up to there, and held-out
    results up to `evaluated`.
    """

    def __init__(
        self, run_dir: Path, world: World, logger: Mapping | None, cfg: Mapping, *, step: int = 0, evaluated: int = 0
    ):
        """
        Args:
            logger: The config's `metric_logger`.
            cfg: The whole config, which a logger notes.
        """
        self.path = run_dir / "metrics.jsonl"
        self._file = None
        if world.is_main:
            with telling(self.path, WAY_ON):
                _keep_lines(self.path, step, evaluated)
                self._file = self.path.open("a")
        self._logger = instantiate(logger) if world.is_main else None
        if self._logger is not None and (missing := lacks("metric_logger", self._logger)):
            raise UserError(f"metric_logger: what {logger['_component_']} makes has no {', '.join(missing)}")
        if self._logger is not None:
            self._logger.log_config(cfg)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._file:
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
            with telling(self.path, WAY_ON):
                self._file.write(json.dumps({"step": step, **finite}) + "\n")
                self._file.flush()
        if self._logger is not None:
            self._logger.log_dict(metrics, step)

    def sync(self) -> None:
        """Returns when all that was logged is on the disk."""
        if self._file:
            with telling(self.path, WAY_ON):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file:
            with telling(self.path, WAY_ON):
                self._file.close()
        if self._logger is not None:
            self._logger.close()


def _keep_lines(path: Path, step: int, evaluated: int) -> None:
    """Leaves what was logged up to a step; a line that a kill has cut is behind it."""
    kept = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            break
        row = json.loads(line)
        if row["step"] <= (evaluated if "eval/loss" in row else step):
            kept.append(line)
    write_text(path, "".join(kept))


def read_log(path: Path) -> list[dict]:
    """Returns the objects of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(results: dict[str, float], prefix: str = "") -> str:
    """Returns loss, accuracy and margin in words, as far as there are any."""
    shown = {"loss": "loss {:.4f}", "rewards/accuracies": "accuracy {:.3f}", "rewards/margins": "margin {:+.3f}"}
    return ", ".join(words.format(results[prefix + key]) for key, words in shown.items() if prefix + key in results)


def peak_memory_gib(device: torch.device) -> float:
    """Returns the most memory held so far: allocated on a GPU; resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20


CURVES = (  # panel, key, reference line; None: what step 1 logged, since each loss starts at a value of its own
    ("loss", "loss", None),
    ("accuracy", "rewards/accuracies", 0.5),
    ("margin", "rewards/margins", 0.0),
)


def plot_curves(log_path: Path, png_path: Path) -> None:
    """Draws `draw_curves` of a metrics.jsonl into a PNG."""
    content = BytesIO()
    draw_curves(read_log(log_path)).savefig(content, dpi=110)
    write_bytes(png_path, content.getvalue())  # at once: no half picture where the disk is full


def draw_curves(log: list[dict]):
    """Returns a matplotlib Figure of loss, accuracy and margin of training and evaluation over steps, a panel each.

    The grey line is where an untrained policy stands: at the loss of step 1, which is before the first update; at
    chance; at zero. A log without a step 1 has none for the loss.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import: only when there is a plot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    first = next((row for row in log if row["step"] == 1 and "loss" in row), {})
    curves = [curve for curve in CURVES if not log or any(p + curve[1] in row for row in log for p in ("", "eval/"))]
    for axis, (title, key, start) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        start = first.get(key) if start is None else start
        if start is not None:
            axis.axhline(start, color="0.75", linewidth=1)
        for prefix, label, style in (("", "training", "-"), ("eval/", "held out", "o-")):
            points = [(row["step"], row[prefix + key]) for row in log if prefix + key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=3.5, linewidth=1.3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
    if log:
        figure.axes[0].legend(frameon=False)
    return figure
