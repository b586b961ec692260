"""Rated answers to pairs: which two of them, and which share of the questions is held out. No torch.

Zephyr (arXiv 2310.16944, section 3): the answer with the highest score, and a random one with a lower score; the score
is UltraFeedback's overall_score. Notus (Argilla's ultrafeedback-binarized-preferences, 2023): the same with the mean of
the four ratings, since overall_score calls hundreds of bad answers a 10.
"""

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pairtune.making.held_out import is_held_out
from pairtune.making.rated import OVERALL, ULTRAFEEDBACK, Rated
from pairtune.pairs.example import Answer, turns_of


@dataclass(frozen=True)
class Way:
    """How pairs are chosen.

    Attributes:
        aspects: Whose mean is an answer's score.
        other: Which worse answers the best one is paired with: random (one), worst, or all; each: every two answers.
        margin: How far apart two scores must be; 0: not equal.
    """

    aspects: tuple[str, ...] = (OVERALL,)
    other: str = "random"
    margin: float = 0.0

    def pairs(self, rated: Rated, seed: int) -> tuple[list[tuple[int, int]], str]:
        """Returns indices of better and worse answers, and why there are none.

        An answer without a score and an empty one are in no pair, nor are two answers that are the same. Where several
        have the highest score, the first is the best. What is drawn depends on the seed and the row only.
        """
        scores = rated.score(self.aspects)
        known = [n for n, answer in enumerate(rated.answers) if not math.isnan(scores[n]) and not is_empty(answer)]
        if len(known) < 2:
            return [], "fewer than two answers with a score"
        order = sorted(known, key=lambda n: -scores[n])
        better = order if self.other == "each" else order[:1]
        found = [(a, b) for a in better for b in order if self._is_worse(rated, scores, a, b)]
        if not found:
            spread = scores[order[0]] - scores[order[-1]]
            return [], "all scores are equal" if spread == 0 else "no two scores are as far apart as the margin"
        if self.other == "random":
            return [random.Random(f"{seed} {rated.row}").choice(found)], ""
        return found[-1:] if self.other == "worst" else found, ""

    def _is_worse(self, rated: Rated, scores: list[float], a: int, b: int) -> bool:
        apart = scores[a] - scores[b]
        return apart > 0 and apart >= self.margin and rated.answers[a] != rated.answers[b]


WAYS = {
    "zephyr": Way(),
    "notus": Way(ULTRAFEEDBACK),
    "best-worst": Way(other="worst"),
    "best-all": Way(other="all"),
    "each": Way(other="each"),
}


def is_empty(answer: Answer) -> bool:
    """Returns whether an answer says nothing."""
    return not any(str(turn.get("content") or "").strip() or turn.get("tool_calls") for turn in turns_of(answer))


@dataclass
class Counts:
    """What became of a source's questions, and how another way would have chosen."""

    questions: int = 0
    pairs: int = 0
    held_out: int = 0
    left_out: Counter = field(default_factory=Counter)
    unrated: Counter = field(default_factory=Counter)  # answers without a rating, by aspect
    empty: int = 0
    shared_best: int = 0
    compared: int = 0
    other_best: int = 0
    flipped: int = 0

    def __str__(self) -> str:
        lines = [f"{self.pairs:,} pairs of {self.questions:,} questions, {self.held_out:,} of them held out"]
        lines += [f"  left out: {count:,} {why}" for why, count in self.left_out.most_common()]
        lines += [f"  {self.empty:,} empty answers are in no pair"] if self.empty else []
        lines += [
            f"  {count:,} answers have no rating of {aspect}: their mean is that of the others"
            for aspect, count in self.unrated.most_common()
        ]
        if self.shared_best:
            lines.append(f"  in {self.shared_best:,} several answers have the highest score: the first is the best")
        if self.compared:
            best, flipped = self.other_best / self.compared, self.flipped / self.compared
            lines.append(
                f"  the other way ranks the answers of {self.flipped:,} of {self.compared:,} pairs the other way round "
                f"({flipped:.1%}), and has another best answer in {self.other_best:,} ({best:.1%})"
            )
        return "\n".join(lines)


def binarise(
    rated: Iterable[Rated | str],
    way: Way,
    *,
    seed: int = 0,
    held_out: float = 0.0,
    against: Way | None = None,
    counts: Counts | None = None,
) -> Iterator[tuple[dict, bool]]:
    """Yields pairs as rows that training reads, and whether each is held out.

    Args:
        rated: As rated.read_rated gives them.
        seed: Of what is drawn, and of what is held out.
        held_out: The share of questions.
        against: Another way, which is counted and not taken: how often it would turn a pair round.
        counts: Is filled.
    """
    counts = Counts() if counts is None else counts
    for one in rated:
        counts.questions += 1
        if isinstance(one, str):
            counts.left_out[one] += 1
            continue
        chosen, why = way.pairs(one, seed)
        _count(counts, one, way)
        if why:
            counts.left_out[why] += 1
            continue
        away = held_out > 0 and is_held_out(one.prompt, held_out, seed)
        scores = one.score(way.aspects)
        for better, worse in chosen:
            counts.pairs, counts.held_out = counts.pairs + 1, counts.held_out + away
            if against:
                _compare(counts, one.score(against.aspects), better, worse)
            yield _as_row(one, scores, better, worse), away


def _count(counts: Counts, one: Rated, way: Way) -> None:
    scores = one.score(way.aspects)
    counts.empty += sum(map(is_empty, one.answers))
    if len(way.aspects) > 1:
        for aspect in way.aspects:
            missing = [math.isnan(value) for value in one.scores.get(aspect, [math.nan] * len(one.answers))]
            if any(missing):
                counts.unrated[aspect] += sum(missing)
    known = [score for score in scores if not math.isnan(score)]
    counts.shared_best += bool(known) and known.count(max(known)) > 1 and min(known) < max(known)


def _compare(counts: Counts, scores: Sequence[float], better: int, worse: int) -> None:
    known = [score for score in scores if not math.isnan(score)]
    if math.isnan(scores[better]) or math.isnan(scores[worse]):
        return
    counts.compared += 1
    counts.other_best += scores[better] < max(known)
    counts.flipped += scores[better] < scores[worse]


def _as_row(one: Rated, scores: list[float], better: int, worse: int) -> dict:
    row = {"prompt": one.prompt, "chosen": one.answers[better], "rejected": one.answers[worse]}
    row |= {"chosen_score": scores[better], "rejected_score": scores[worse], "row": one.row}
    if one.models:
        row |= {"chosen_model": one.models[better], "rejected_model": one.models[worse]}
    return row | ({"source": one.source} if one.source else {})
