"""Pairs of answers put to a judge: both ways round where it compares, by their scores where it scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pairtune.making.judge.question import Judge, Question, Said

EQUAL = "equal"  # answers that nobody was asked about

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """Of two answers.

    Attributes:
        forward: 1 where the first answer is better, -1 where the second is, 0 where neither, as it was asked with the
            first answer shown first; of a judge that scores, by the scores. None: no verdict.
        backward: The same sides, as it was asked with the second answer shown first; None, too, where a judge scores.
        why: In a few words, where a verdict is missing, or nobody was asked.
        scores: Of a judge that scores: each answer's; None: it compares.
    """

    forward: float | None
    backward: float | None = None
    why: str = ""
    scores: tuple[float | None, float | None] | None = None

    @property
    def value(self) -> int | None:
        """1 where the first answer wins, -1 where the second does, 0 for a tie, None for no verdict.

        A judge that names one answer, and the other one when they are turned, has not decided: a tie.
        """
        ways = [self.forward] if self.scores else [self.forward, self.backward]
        if any(way is None for way in ways):
            return None
        total = sum(ways)
        return (total > 0) - (total < 0)

    @property
    def turned(self) -> bool:
        """Whether the judge named one answer, and the other one when they were shown the other way round."""
        return not self.scores and (self.forward or 0) * (self.backward or 0) < 0


def verdicts(judge: Judge, pairs: Sequence[tuple[Row, str, str]]) -> list[Verdict]:
    """Returns a judge's verdict on each pair: its row, and two answers.

    Nobody is asked which of two equal answers is better: they tie.

    Raises:
        UserError: The judge cannot be asked any more. What it said is kept, where it keeps it.
    """
    return _compared(judge, pairs) if judge.compares else _scored(judge, pairs)


def _compared(judge: Judge, pairs: Sequence[tuple[Row, str, str]]) -> list[Verdict]:
    asked = [n for n, (_, first, second) in enumerate(pairs) if first != second]
    ways = [Question(row, way) for row, a, b in map(pairs.__getitem__, asked) for way in ((a, b), (b, a))]
    said = judge.judge(ways)
    found = [Verdict(0.0, 0.0, EQUAL)] * len(pairs)
    for n, forward, backward in zip(asked, said[::2], said[1::2], strict=True):
        turned = None if backward.value is None else -backward.value
        found[n] = Verdict(forward.value, turned, forward.why or backward.why)
    return found


def _scored(judge: Judge, pairs: Sequence[tuple[Row, str, str]]) -> list[Verdict]:
    said = scores(judge, [(row, text) for row, *both in pairs for text in both])
    found = []
    for first, second in zip(said[::2], said[1::2], strict=True):
        if first.value is None or second.value is None:
            found.append(Verdict(None, why=first.why or second.why, scores=(first.value, second.value)))
        else:
            value = float((first.value > second.value) - (first.value < second.value))
            found.append(Verdict(value, scores=(first.value, second.value)))
    return found


def scores(judge: Judge, answers: Sequence[tuple[Row, str]]) -> list[Said]:
    """Returns a scoring judge's score of each answer: its row, and the answer. The same answer is scored once."""
    asked: dict[tuple[int, str], Question] = {(id(row), text): Question(row, (text,)) for row, text in answers}
    said = dict(zip(asked, judge.judge(list(asked.values())), strict=True))
    return [said[id(row), text] for row, text in answers]
