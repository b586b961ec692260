"""What the rows of a metrics.jsonl say of a run, read for judging: verdict.py. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from pairtune.run.pair_log import TIED

Z = 1.96  # a 95 % interval
SAME = 0.01  # of a loss at the start: less is no change
DIVERGED = 0.2  # of a loss at the start: training ends above it by more
TAIL = 0.1  # of a run's logged steps: its end


def interval(share: float, count: int) -> tuple[float, float]:
    """Returns the 95 % interval of a share of so many: E. B. Wilson's with continuity correction.

    Newcombe 1998, Statistics in Medicine 17, method 4. It holds where a share is 0 or 1, and for a handful, too: 5 of
    5 may be chance.
    """
    if not count:
        return 0.0, 1.0
    middle, scale = 2 * count * share + Z**2, 2 * (count + Z**2)
    spread, tilt = Z**2 - 1 / count + 4 * count * share * (1 - share), 4 * share - 2
    low = (middle - Z * math.sqrt(spread + tilt) - 1) / scale if share > 0 else 0.0
    high = (middle + Z * math.sqrt(spread - tilt) + 1) / scale if share < 1 else 1.0
    return max(0.0, low), min(1.0, high)


@dataclass(frozen=True)
class Held:
    """One evaluation of held-out pairs."""

    step: int
    loss: float
    stderr: float
    accuracy: float | None  # None: unpaired rows of one label
    count: int
    row: Mapping = field(repr=False)

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.accuracy, self.count) if self.accuracy is not None else (0.0, 1.0)

    @property
    def is_ranking(self) -> bool:
        """Whether rewards differ at all: where the policy is the reference, all are 0, but for rounding."""
        return abs(self.row.get("eval/rewards/margins") or 0.0) > TIED

    def get(self, name: str) -> float | None:
        return self.row.get(f"eval/{name}")


def held_of(row: Mapping) -> Held:
    accuracy, count = row.get("eval/rewards/accuracies"), row.get("eval/pairs", 0)
    if accuracy is None:
        accuracy, count = row.get("eval/auc"), row.get("eval/auc/answers", 0)
    loss = row["eval/loss"]
    loss = math.nan if loss is None else loss
    return Held(row["step"], loss, row.get("eval/loss_stderr") or 0.0, accuracy, count, row)


@dataclass(frozen=True)
class Run:
    """A run's rows, read for judging."""

    losses: list[float]  # of training, NaN where one was not finite
    steps: list[int]
    held: list[Held]
    exports_best: bool = False

    @property
    def start(self) -> float:
        """The training loss before any update, or that of the first row that there is."""
        return self.losses[0] if self.losses else math.nan

    @property
    def tail(self) -> list[float]:
        return self.losses[-max(3, math.ceil(TAIL * len(self.losses))) :]

    @property
    def end(self) -> float:
        return sum(self.tail) / len(self.tail) if self.losses else math.nan

    @property
    def before(self) -> float:
        """The held-out loss before training; where nothing was evaluated then, the training loss is what it was."""
        return self.held[0].loss if self.held[0].step == 0 else self.start

    @property
    def noise(self) -> float:
        """Of the mean at the end: two standard errors."""
        if len(self.tail) < 2:
            return 0.0
        spread = sum((loss - self.end) ** 2 for loss in self.tail) / (len(self.tail) - 1)
        return 2 * math.sqrt(spread / len(self.tail))

    @property
    def fell(self) -> bool:
        return self.start - self.end > max(self.noise, SAME * abs(self.start))

    @property
    def diverged(self) -> bool:
        if any(not math.isfinite(loss) for loss in self.losses) or any(not math.isfinite(h.loss) for h in self.held):
            return True
        return len(self.losses) > 2 and self.end - self.start > max(self.noise, DIVERGED * abs(self.start))
