"""Questions with several answers that were scored, of any source: what pairs are made from. No torch.

UltraFeedback's ratings and HelpSteer's attributes are read here, by aspect; whatever else has scores or ranks is read
by the forms that training knows (pairs/recognise.py).
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from pairtune.errors import UserError
from pairtune.pairs.example import Answer, BadRow, Skip
from pairtune.pairs.ranked import Ranked
from pairtune.pairs.readers import user
from pairtune.pairs.recognise import recognise
from pairtune.pairs.rows import Rows

ULTRAFEEDBACK = ("helpfulness", "honesty", "instruction_following", "truthfulness")
HELPSTEER = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
OVERALL = "overall"  # the one score of sources that have one


@dataclass(frozen=True)
class Rated:
    """A question and its answers.

    Attributes:
        row: Number of its first row in the source.
        prompt: A text, or messages.
        answers: Texts, or the turns of answers that are more.
        scores: By aspect, a score for each answer: higher is better; NaN where there is none.
        models: Who wrote each, where the source says so.
        source: What the row says of where the question comes from.
    """

    row: int
    prompt: str | list[dict]
    answers: list[Answer]
    scores: dict[str, list[float]]
    models: list[str | None] = field(default_factory=list)
    source: str | None = None

    def score(self, aspects: Sequence[str]) -> list[float]:
        """Returns each answer's mean over those of the aspects that it has; NaN where it has none.

        UltraFeedback says "N/A" where an aspect has no place, such as honesty in a poem; older rows lack some.
        """
        found = []
        for n in range(len(self.answers)):
            known = [self.scores[a][n] for a in aspects if a in self.scores and not math.isnan(self.scores[a][n])]
            found.append(sum(known) / len(known) if known else math.nan)
        return found


def read_rated(rows: Rows, key: str = "source") -> tuple[Iterator[Rated | str], list[str]]:
    """Returns the questions of rows, or why one cannot be used, and the aspects that their answers are scored by.

    Raises:
        UserError: Nothing in the rows scores or ranks answers.
    """
    if not len(rows):
        raise UserError(f"{rows.source}: has no rows")
    first = rows[0]
    if "instruction" in first and _holds(first.get("completions"), "response", "annotations"):
        return _each(rows, _of_ultrafeedback), [OVERALL, *ULTRAFEEDBACK]
    if {"prompt", "response", "helpfulness", "correctness"} <= first.keys():
        return _of_helpsteer(rows), list(HELPSTEER)
    if {"answers", "scores"} <= first.keys():  # prompts that were taken from pairs may bring these along
        of_pairs = first.keys() & {"chosen", "rejected"}
        rows = rows.under({**rows.columns, **dict.fromkeys(of_pairs)}) if of_pairs else rows
    form, renamed = recognise(rows, key)
    sample = next((found for row in renamed.first(10) if (found := _ranked(form, row))), None)
    if not isinstance(sample, list):
        raise UserError(
            f"{rows.source}: its rows ({form.name}) say which answer is better, and hold no scores or ranks of "
            "several: there is nothing to make pairs of; train on it as it is, or name the columns: "
            "columns='{prompt: question, answers: replies, scores: ratings}'"
        )
    return _each(renamed, partial(_of_form, form=form)), [OVERALL]


def _each(rows: Rows, read) -> Iterator[Rated | str]:
    for index, row in enumerate(rows):
        number = rows.numbers[index]
        try:
            found = read(row, number)
            yield from found if isinstance(found, list) else [found]
        except Skip as skip:
            yield str(skip)
        except BadRow as error:
            yield f"{error.reason} (first: {rows.place(index)})"


def _holds(cell, *names: str) -> bool:
    return isinstance(cell, list) and any(isinstance(one, Mapping) and set(names) <= one.keys() for one in cell)


def _number(value) -> float:
    """Returns a rating as a number: it may be a text; NaN for N/A and whatever else is none."""
    if isinstance(value, bool) or value is None:
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


# UltraFeedback (arXiv 2310.01377), as published: a row a question


def _of_ultrafeedback(row: Mapping, number: int) -> Rated:
    completions = row.get("completions") or []
    if not isinstance(row.get("instruction"), str):
        raise BadRow("instruction holds no text", "instruction holds no text")
    kept = [one for one in completions if isinstance(one.get("response"), str)]
    scores = {OVERALL: [_number(one.get("overall_score")) for one in kept]}
    for aspect in ULTRAFEEDBACK:
        scores[aspect] = [_number(((one.get("annotations") or {}).get(aspect) or {}).get("Rating")) for one in kept]
    answers, models = [one["response"] for one in kept], [one.get("model") for one in kept]
    return Rated(number, row["instruction"], answers, scores, models, _text(row.get("source")))


# HelpSteer (arXiv 2311.09528, 2406.08673), as published: a row an answer


def _of_helpsteer(rows: Rows) -> Iterator[Rated | str]:
    questions: dict[str, list[tuple[int, Mapping]]] = {}
    for index, row in enumerate(rows):
        questions.setdefault(json.dumps(row["prompt"], sort_keys=True), []).append((rows.numbers[index], row))
    for answered in questions.values():
        (number, first), given = answered[0], [row for _, row in answered if isinstance(row.get("response"), str)]
        scores = {aspect: [_number(row.get(aspect)) for row in given] for aspect in HELPSTEER}
        yield Rated(number, first["prompt"], [row["response"] for row in given], scores, [], _text(first.get("source")))


# What training reads, too


def _ranked(form, row: Mapping) -> list[Ranked]:
    """Returns what a row ranks, [] where it is no such row."""
    try:
        found = form.example(row)
    except (Skip, BadRow):
        return []
    listed = found if isinstance(found, list) else [found]
    return listed if all(isinstance(one, Ranked) for one in listed) else []


def _of_form(row: Mapping, number: int, form) -> list[Rated]:
    found = form.example(row)
    listed = found if isinstance(found, list) else [found]
    rated = []
    for one in listed:
        if not isinstance(one, Ranked):
            raise BadRow("holds no scores", "holds no scores")
        prompt = one.written if one.written is not None and one.prompt == user(one.written) else one.prompt
        rated.append(Rated(number, prompt, one.answers, {OVERALL: one.scores}, [], _text(row.get("source"))))
    return rated


def _text(value) -> str | None:
    return value if isinstance(value, str) else None
