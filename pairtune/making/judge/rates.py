"""How often one model's answers are judged better than another's, with an interval."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pairtune.making.judge.question import Judge
from pairtune.making.judge.verdicts import EQUAL, Verdict, verdicts
from pairtune.run.evaluations import interval


@dataclass(frozen=True)
class WinRate:
    """Of a model's answers against another's to the same prompts.

    Attributes:
        verdicts: One a prompt; the first answer of each is the model's.
    """

    verdicts: Sequence[Verdict]

    @property
    def values(self) -> list[int]:
        """Of the prompts that have a verdict."""
        return [verdict.value for verdict in self.verdicts if verdict.value is not None]

    @property
    def wins(self) -> int:
        return self.values.count(1)

    @property
    def ties(self) -> int:
        return self.values.count(0)

    @property
    def losses(self) -> int:
        return self.values.count(-1)

    @property
    def share(self) -> float | None:
        """Of prompts won, a tie counting half; None without a verdict."""
        count = len(self.values)
        return (self.wins + self.ties / 2) / count if count else None

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `share`: Wilson's, which is the wider for ties, since they vary less than wins."""
        return interval(self.share or 0.0, len(self.values))

    @property
    def both_ways(self) -> list[Verdict]:
        """Those that were asked, and answered, both ways round."""
        return [v for v in self.verdicts if not v.scores and v.value is not None and v.why != EQUAL]

    @property
    def turned(self) -> int:
        """Of `both_ways`: the judge contradicts itself when the order turns."""
        return sum(verdict.turned for verdict in self.both_ways)

    @property
    def shown_first(self) -> tuple[int, int]:
        """How often the answer that was shown first was named, of how often any was: half without a bias."""
        said = [way for v in self.both_ways for way in (v.forward, -v.backward) if way]
        return sum(way > 0 for way in said), len(said)

    @property
    def mean_scores(self) -> tuple[float, float] | None:
        """The means of the model's scores and of the other's, over prompts that have both; None: there are none."""
        both = [verdict.scores for verdict in self.verdicts if verdict.scores and verdict.value is not None]
        return tuple(sum(column) / len(both) for column in zip(*both, strict=True)) if both else None

    @property
    def missing(self) -> Counter[str]:
        """Why verdicts are missing, and how many."""
        return Counter(verdict.why for verdict in self.verdicts if verdict.value is None)


def win_rates(
    judge: Judge, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[str]]
) -> dict[str, WinRate]:
    """Returns the win rate of each column of answers but the first, against the first.

    Args:
        rows: Each with its `prompt`.
        columns: Answers by the model's name, one a row each.
    """
    (_, base), *others = columns.items()
    pairs = [(row, *both) for _, found in others for row, *both in zip(rows, found, base, strict=True)]
    said = verdicts(judge, pairs)
    return {name: WinRate(said[n * len(rows) : (n + 1) * len(rows)]) for n, (name, _) in enumerate(others)}


def table(rates: Mapping[str, WinRate], base: str) -> str:
    """Returns the win rates in lines, what is missing of them, and how far the judge can be trusted."""
    rows = [[f"against {base}", "wins", "ties", "losses", "win rate", "95 % interval"]]
    for name, rate in rates.items():
        low, high = rate.interval
        told = ["", ""] if rate.share is None else [f"{rate.share:.1%}", f"{low:.1%} to {high:.1%}"]
        rows.append([name, *(f"{n:,}" for n in (rate.wins, rate.ties, rate.losses)), *told])
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    lines += [f"{name}: {line}" for name, rate in rates.items() for line in _remarks(rate)]
    return "\n".join(lines)


def _remarks(rate: WinRate) -> list[str]:
    found = []
    if equal := sum(verdict.why == EQUAL for verdict in rate.verdicts):
        found.append(f"{equal:,} of the ties are equal answers, which nobody was asked about")
    if both := len(rate.both_ways):
        first, named = rate.shown_first
        told = f"the judge contradicts itself on {rate.turned:,} of {both:,} pairs when their order turns, a tie each"
        more = f"; of {named:,} answers that it named, {first / named:.0%} were shown first" if named else ""
        found.append(told + more)
    if rate.mean_scores:
        found.append("mean score {:.4g}, against {:.4g}".format(*rate.mean_scores))
    found += [f"{count:,} without a verdict: {why}" for why, count in rate.missing.items()]
    return found
