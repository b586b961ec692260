"""What the runs of a sweep came to: a table, the best with its interval, and what cannot be told from it. No torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairtune.config.rules import HIGHER_IS_BETTER
from pairtune.errors import UserError
from pairtune.run.evaluations import Held, Z, held_of
from pairtune.run.finished import Finished, open_run

SAME_LOSS = ("loss", "reference", "score_end")  # keys under these change what a held-out loss is a number of


@dataclass(frozen=True)
class Row:
    """A run of a sweep: `run` is None where nothing was logged.

    Attributes:
        differs: What it has of the keys with alternatives.
        status: ended, failed, stopped, or not started.
    """

    name: str
    differs: Mapping[str, str]
    status: str
    run: Finished | None

    @property
    def held(self) -> Held | None:
        """The held-out pairs under the weights that it has exported: the last, or with export_best the best ones."""
        found = [held_of(row) for row in self.run.log if "eval/loss" in row] if self.run else []
        found = [one for one in found if math.isfinite(one.loss)]
        if not found:
            return None
        metric = self.run.config.get("keep_best") or "loss"
        if not self.run.config.get("export_best"):
            return max(found, key=lambda one: one.step)
        of = [one for one in found if one.get(metric) is not None] or found
        sign = 1 if HIGHER_IS_BETTER.get(metric) else -1
        return max(of, key=lambda one: sign * (one.get(metric) or 0.0))

    @property
    def is_comparable(self) -> bool:
        return self.status == "ended" and self.held is not None and self.run.verdict.name != "diverged"

    @property
    def accuracy(self) -> float | None:
        """Of the held-out pairs; None where there are none, or all rewards are alike."""
        held = self.held
        return held.accuracy if held and held.count and held.is_ranking else None

    def numbers(self) -> dict:
        """Returns what sweep.jsonl has of it."""
        held, verdict = self.held, self.run and self.run.verdict
        low, high = held.interval if self.accuracy is not None else (None, None)
        return {
            "status": self.status,
            "held_out_loss": held and held.loss,
            "accuracy": self.accuracy,
            "interval": None if low is None else [low, high],
            "pairs": held and held.count,
            "step": held and held.step,
            "best_step": verdict.best["step"] if verdict and verdict.best else None,
            "verdict": verdict and verdict.name,
        }


def row_of(name: str, differs: Mapping[str, str], status: str, folder: Path) -> Row:
    """Returns the row of a run by its folder."""
    try:
        run = open_run(folder)
    except UserError:  # nothing is there, or nothing was logged
        run = None
    return Row(name, differs, status, run)


def table(rows: Sequence[Row]) -> str:
    """Returns a line a run, in the order that they were run."""
    lines = [("run", "held-out loss", "accuracy (95 % interval)", "best step", "verdict")]
    for row in rows:
        said, held = row.numbers(), row.held
        loss = f"{held.loss:.4f} ± {Z * held.stderr:.4f}" if held else "-"
        ranked = f"{row.accuracy:.1%} of {held.count:,} {_interval(held)}" if row.accuracy is not None else "-"
        best = "-" if said["best_step"] is None else str(said["best_step"])
        verdict = said["verdict"] or "-"
        lines.append((row.name, loss, ranked, best, verdict if row.status == "ended" else f"{verdict}; {row.status}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def best(rows: Sequence[Row]) -> str:
    """Returns which run is best, in sentences: by accuracy, or by held-out loss where no pair is ranked.

    Runs whose intervals overlap with the best one's are not told apart from it. A held-out loss is a number of another
    kind where loss, beta or reference differ.
    """
    of = [row for row in rows if row.is_comparable]
    if not of:
        return "Best: none is named, since no run that ended has held-out pairs"
    if len({_judged_by(row) for row in of}) > 1:
        return "Best: none is named, since runs were judged by different held-out pairs"
    losses_compare = not any(key.partition(".")[0] in SAME_LOSS for row in of for key in row.differs)
    ranked = [row for row in of if row.accuracy is not None]
    if ranked:
        first = max(ranked, key=lambda row: (row.accuracy, -row.held.loss if losses_compare else 0.0))
        words = f"{first.accuracy:.1%} of {first.held.count:,} held-out pairs {_interval(first.held)}"
        spans = {row.name: row.held.interval for row in ranked}
        apart = [row.name for row in ranked if spans[row.name][1] < spans[first.name][0]]
        others = [row for row in ranked if row is not first]
    elif losses_compare:
        first = min(of, key=lambda row: row.held.loss)
        spans = {row.name: (row.held.loss - Z * row.held.stderr, row.held.loss + Z * row.held.stderr) for row in of}
        low, high = spans[first.name]
        words = f"held-out loss {first.held.loss:.4f} (interval {low:.4f} to {high:.4f})"
        apart = [row.name for row in of if spans[row.name][0] > high]
        others = [row for row in of if row is not first]
    else:
        return "Best: none is named, since no pair is ranked, and held-out losses of different losses do not compare"
    same = [row.name for row in others if row.name not in apart]
    if not others:
        return f"Best: {first.name}, {words}; no other is comparable"
    if not same:
        return f"Best: {first.name}, {words}, which no other run's interval reaches"
    what = "any other" if len(same) == len(of) - 1 > 3 else ", ".join(same)
    return f"Best: {first.name}, {words}; not told apart from {what}: their intervals overlap"


def _judged_by(row: Row) -> tuple:
    """What its held-out pairs are told by."""
    train, held_out = (row.run.config.get(key) or {} for key in ("dataset", "eval_dataset"))
    return row.held.count, str(held_out if held_out.get("source") else train)


def _interval(held: Held) -> str:
    low, high = held.interval
    return f"({low:.1%} to {high:.1%})"
