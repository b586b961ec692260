"""Which form the rows of a source have: one that is known by its columns' names, a published layout of other names, or
a question with two answers whose names say themselves which is better."""

import json
import re
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pairtune.errors import UserError
from pairtune.pairs.example import Skip
from pairtune.pairs.formats import SINGLE, Format, detect_format, fitting_format
from pairtune.pairs.layouts import guess, known_layouts, names_of, values_in
from pairtune.pairs.ranked import TIE_WORDS, Choice, as_word, from_choice, trees_of
from pairtune.pairs.readers import (
    from_completion,
    from_one_answer,
    from_texts,
    repeats_question,
    without_question,
)
from pairtune.pairs.rows import MESSAGES_OF_TREES, Rows

FIRST = 10  # rows that are looked at
ENOUGH = 3  # of them


def recognise(rows: Rows, key: str, *, single: bool = False) -> tuple[Format, Rows]:
    """Returns the form of rows, and the rows under our names of columns.

    Args:
        single: One answer a row will do, without a label.

    Raises:
        UserError: It is unknown. The message shows the columns found, and a line that may describe them.
    """
    form, rows = _recognise(rows, key, single=single)
    return _without_questions(form, rows), rows


def _without_questions(form: Format, rows: Rows) -> Format:
    """Returns a form of texts whose answers begin with their question in all of the first rows as one that takes it
    off: a model would learn to say every question again."""
    if form.example not in (from_texts, from_completion, from_one_answer):
        return form
    examples = []
    for row in rows.first(FIRST):
        with suppress(Skip, UserError, KeyError):  # which are told when rows are read
            examples.append(form.example(row))
    if len(examples) < ENOUGH or not all(map(repeats_question, examples)):
        return form
    return replace(form, name=f"{form.name} that begin with it", example=partial(without_question, form.example))


def _recognise(rows: Rows, key: str, *, single: bool) -> tuple[Format, Rows]:
    if set(rows.found) >= MESSAGES_OF_TREES and not rows.columns:
        rows = _as_trees(rows)
    form = _fits(rows)
    if form:
        return _with_choice(form, rows, key), rows
    if not rows.columns:
        for layout in known_layouts(rows.found):
            renamed = rows.under(layout.columns)
            form = _fits(renamed)
            if form:
                return replace(_with_choice(form, renamed, key), name=layout.name), renamed
    described, is_sure = guess(list(rows.first(FIRST)), rows.cells)
    if is_sure:
        renamed = rows.under({**rows.columns, **described})
        form = _fits(renamed)
        if form:
            return _with_choice(form, renamed, key), renamed
    form = fitting_format(list(rows.first(FIRST)), SINGLE) if single else None
    if form:
        return form, rows
    line = f"{key}.columns={_written(described)}" if described else ""
    return detect_format(rows.column_names, list(rows.first(FIRST)), source=rows.source, key=key, line=line), rows


def _fits(rows: Rows) -> Format | None:
    return fitting_format(list(rows.first(FIRST)))


def _as_trees(rows: Rows) -> Rows:
    trees, numbers = trees_of(rows)
    return Rows(trees, source=rows.source, numbers=[rows.numbers[number] for number in numbers])


def _with_choice(form: Format, rows: Rows, key: str) -> Format:
    """Returns a form of answers and a choice that knows what the choice's values mean."""
    if form.example is not from_choice:
        return form
    answers, said = rows.columns.get("answers", []), rows.columns.get("choice", "choice")
    if isinstance(said, dict):
        (column, values), *others = said.items()
        if others or not isinstance(values, list) or len(values) < 2:
            raise UserError(
                f"{key}.columns.choice={_written(said)}: must be a column and the values that stand for the answers, "
                "in their order, such as {winner: [a, b]}."
            )
        words = tuple((as_word(value),) for value in values)
        ties = tuple(word for word in (*TIE_WORDS, "0") if (word,) not in words)
        return replace(form, example=partial(from_choice, choice=Choice(words, ties)))
    found: set[str] = set()
    for column in [said] if isinstance(said, str) else said:
        found |= values_in(rows.cells(column)) or set()
    choice = names_of(answers if isinstance(answers, list) else [], found)
    if choice is None:
        values = sorted(found - set(TIE_WORDS))[:2]
        line = {**rows.columns, "choice": {said if isinstance(said, str) else said[0]: values}}
        raise UserError(
            f"{key}.columns.choice={_written(said)}: its values, {', '.join(sorted(found)) or 'none'}, do not say "
            f"which answer they stand for. Give them in the answers' order: {key}.columns={_written(line)}"
        )
    return replace(form, example=partial(from_choice, choice=choice))


def _written(described) -> str:
    """Returns a description as it is written on a command line."""
    if isinstance(described, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(value)}" for key, value in described.items()) + "}"
    if isinstance(described, list):
        return "[" + ", ".join(map(_written, described)) + "]"
    is_word = re.fullmatch(r"[\w.*][\w.* -]*", str(described))
    return str(described) if is_word else json.dumps(described, ensure_ascii=False)
