"""What a run writes down: exact means, metrics.jsonl, torchtune's loggers, curves.png."""

import json
import math
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from pairtune.dist import World
from pairtune.errors import UserError

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

    def add(self, **values: Tensor) -> None:
        """Adds vectors of one value a pair. `rewards_chosen` is called rewards/chosen where it is read."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().sum(dtype=torch.float64)
            self._counts[name] = self._counts.get(name, 0) + value.numel()

    def read(self, world: World, prefix: str = "") -> dict[str, float]:
        """Returns the mean of every metric, the same in each process, and starts anew. Every process has to call it."""
        sums = torch.stack([*self._sums.values()])
        counts = torch.tensor([*self._counts.values()], dtype=torch.float64, device=sums.device)
        means = (world.sum(sums) / world.sum(counts)).tolist()
        names = [prefix + _SLASHED.get(name, name) for name in self._sums]
        self._sums.clear()
        self._counts.clear()
        return dict(zip(names, means, strict=True))


class RunLog:
    """Appends to metrics.jsonl, one object a logged step, and passes the same to a torchtune logger if there is one.

    Only the main process writes.
    """

    def __init__(self, run_dir: Path, world: World, logger=None, cfg=None):
        self.path = run_dir / "metrics.jsonl"
        self._file = self.path.open("w") if world.is_main else None
        self._logger = logger if world.is_main else None
        if self._logger:
            self._logger.log_config(cfg)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self._file:
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
            self._file.write(json.dumps({"step": step, **finite}) + "\n")
            self._file.flush()
        if self._logger:
            self._logger.log_dict(metrics, step)

    def close(self) -> None:
        if self._file:
            self._file.close()
        if self._logger:
            self._logger.close()


def read_log(path: Path) -> list[dict]:
    """Returns the objects of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def summary(results: dict[str, float], prefix: str = "") -> str:
    """Returns loss, accuracy and margin in words."""
    loss, accuracy, margin = (results[prefix + key] for key in ("loss", "rewards/accuracies", "rewards/margins"))
    return f"loss {loss:.4f}, accuracy {accuracy:.3f}, margin {margin:+.3f}"


def check(step: int, results: dict[str, float], world: World, *, rows: list[int], same_at_start: bool) -> None:
    """Refuses to go on with numbers that cannot be right.

    Args:
        rows: This process's since the last check, for the message.
        same_at_start: Policy and reference compute the same before the first update: always, but for dropout.

    Raises:
        UserError: A loss or gradient that is not finite; at step 1, a policy that is not the reference.
    """
    broken = [key for key in ("loss", "grad_norm") if not math.isfinite(results[key])]
    if broken:
        rows = sorted(world.gather(rows))
        raise UserError(
            f"step {step}: {broken[0]} is {results[broken[0]]}; rows since the last logged step: {rows}. "
            "Look at these rows, lower optimizer.lr, or use dtype=fp32"
        )
    if same_at_start and step == 1 and abs(results["rewards/margins"]) > 0.01:
        raise UserError(
            f"step 1: the mean margin is {results['rewards/margins']:+.4f} and must be 0: before the first update the "
            "policy is the reference. The two are not the same model"
        )


def peak_memory_gib(device: torch.device) -> float:
    """Returns the most memory held so far: allocated on a GPU; resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20


CURVES = (  # panel, key, reference line
    ("loss", "loss", math.log(2)),
    ("accuracy", "rewards/accuracies", 0.5),
    ("margin", "rewards/margins", 0.0),
)


def plot_curves(log_path: Path, png_path: Path) -> None:
    """Draws loss, accuracy and margin of training and evaluation over steps, from a metrics.jsonl into a PNG.

    The grey line is where an untrained policy stands.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import: only when there is a plot
    from matplotlib.figure import Figure

    log = read_log(log_path)
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, (title, key, start) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
        axis.axhline(start, color="0.75", linewidth=1)
        for prefix, label, style in (("", "training", "-"), ("eval/", "held out", "o-")):
            points = [(row["step"], row[prefix + key]) for row in log if prefix + key in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=3.5, linewidth=1.3)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.25)
    if log:
        figure.axes[0].legend(frameon=False)
    figure.savefig(png_path, dpi=110)
