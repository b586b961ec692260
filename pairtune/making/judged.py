"""Answers to a prompt, scored by a judge: one that scores tells how good each is, one that compares has all meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from pairtune.making.judge import Judge, scores, verdicts


@dataclass(frozen=True)
class Judged:
    """Rows with `scores`, and how many answers or meetings were not decided, with the last reason."""

    rows: list[dict]
    asked: int
    undecided: int
    turned: int
    why: str = ""


def score_rows(judge: Judge, rows: Sequence[Mapping]) -> Judged:
    """Returns rows with `scores`, one for each of their `answers`: higher is better, None where there is none.

    Of a judge that compares, a score is how many other answers it beats, less those that beat it; each two meet both
    ways round, and a verdict that turns with them is a tie. Equal answers have one score.
    """
    return _by_meetings(judge, rows) if judge.compares else _by_scores(judge, rows)


def _by_scores(judge: Judge, rows: Sequence[Mapping]) -> Judged:
    said = scores(judge, [(row, text) for row in rows for text in row["answers"]])
    values = iter([one.value for one in said])
    found = [{**row, "scores": [next(values) for _ in row["answers"]], "judge": judge.name} for row in rows]
    missing = [one.why for one in said if one.value is None]
    return Judged(found, len(said), len(missing), 0, missing[-1] if missing else "")


def _by_meetings(judge: Judge, rows: Sequence[Mapping]) -> Judged:
    different = [list(dict.fromkeys(row["answers"])) for row in rows]
    met = [(n, pair) for n, texts in enumerate(different) for pair in combinations(texts, 2)]
    said = verdicts(judge, [(rows[n], *pair) for n, pair in met])
    points = [dict.fromkeys(texts, 0) for texts in different]
    decided = [dict.fromkeys(texts, 0) for texts in different]
    for (n, (first, second)), verdict in zip(met, said, strict=True):
        if verdict.value is None:
            continue
        points[n][first] += verdict.value
        points[n][second] -= verdict.value
        for text in (first, second):
            decided[n][text] += 1
    found = []
    for row, won, meetings in zip(rows, points, decided, strict=True):
        known = [won[text] if meetings[text] or len(won) == 1 else None for text in row["answers"]]
        found.append({**row, "scores": known, "judge": judge.name})
    missing = [verdict.why for verdict in said if verdict.value is None]
    turned = sum(verdict.turned for verdict in said)
    return Judged(found, len(said), len(missing), turned, missing[-1] if missing else "")
