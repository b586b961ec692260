"""Which form the rows of a source have: one that is known by its columns' names, a published layout of other names, or
a question with two answers whose names say themselves which is better."""

import json
import math
import re
from contextlib import suppress
from dataclasses import replace
from functools import partial

from pairtune.errors import UserError
from pairtune.pairs.cells import as_word
from pairtune.pairs.example import Skip
from pairtune.pairs.formats import FORMATS, SINGLE, Format, fitting_format, no_format
from pairtune.pairs.guess import MIDDLE, TO_BE_FILLED_IN, TO_BE_FOUND, guess, sides_of, values_in, votes_in
from pairtune.pairs.layouts import known_layouts
from pairtune.pairs.names import (
    ANSWERS,
    GRADES,
    NAMES,
    QUESTIONS,
    TO_BE_NAMED,
    TO_BE_ORDERED,
    names_of,
    says_worse,
    suffixes_of,
)
from pairtune.pairs.ranked import TIE_WORDS, Choice, from_choice, from_preference, trees_of
from pairtune.pairs.readers import (
    as_label,
    from_completion,
    from_one_answer,
    from_texts,
    repeats_question,
    with_words,
    without_question,
)
from pairtune.pairs.rows import MESSAGES_OF_TREES, Rows

_NO_WORDS = ("yes", "no", "on", "off", "null")  # of YAML's, unless they are quoted
FIRST = 10  # rows that are looked at
ENOUGH = 3  # of them
GRADED = {"scores", "ranks", "order", "choice", "preference"}  # columns that say which answers are better


def recognise(rows: Rows, key: str, *, single: bool = False) -> tuple[Format, Rows]:
    """Returns the form of rows, and the rows under our names of columns.

    Args:
        single: One answer a row will do, without a label.

    Raises:
        UserError: It is unknown. The message shows the columns found, and a line that may describe them.
    """
    given = rows.columns
    form, rows = _recognise(rows, key, single=single)
    if not {"chosen", "rejected"} & given.keys():
        _check_answers(form, rows, key)
    if not (form.is_paired or "label" in form.columns):
        _check_marks(form, rows, key)
    return _without_questions(form, rows), rows


def _without_questions(form: Format, rows: Rows) -> Format:
    """Returns a form of texts whose answers begin with their question in all of the first rows as one that takes it
    off: a model would learn to say every question again."""
    if form.example not in (from_texts, from_completion, from_one_answer):
        return form
    examples = []
    for row in filter(form.matches, rows.first(FIRST)):
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
        return _with_values(form, rows, key), rows
    unscored = ""
    if not rows.columns:
        for layout in known_layouts(rows.found):
            renamed = rows.under(layout.columns)
            form = _fits(renamed)
            if form and not _has_numbers(renamed):
                unscored = f"; no score found where {layout.name} have one"
            elif form:
                return replace(_with_values(form, renamed, key), name=layout.name), renamed
    described, is_sure = guess(list(rows.first(FIRST)), rows.cells)
    if is_sure:
        renamed = rows.under({**rows.columns, **described})
        form = _fits(renamed)
        if form:
            return _with_values(form, renamed, key), renamed
    form = fitting_format(list(rows.first(FIRST)), SINGLE) if single else None
    if form:
        return form, rows
    line = f"{key}.columns={_written(described)}{_to_do(described)}{unscored}" if described else ""
    said = {"source": rows.source, "key": key, "columns": rows.columns, "line": line}
    raise no_format(rows.column_names, rows[0], **said)


def _check_answers(form: Format, rows: Rows, key: str) -> None:
    """Refuses rows of which the form takes for an answer what names one: chosen: A beside texts A and B.

    Raises:
        UserError: With a line that says so.
    """
    others = {_plain(name): name for name in rows.column_names if name not in form.columns}
    names = set().union(*map(_short_names, others))
    _check_places(form, rows, key)
    for ours in (name for name in ("chosen", "rejected") if name in form.columns):
        cells = [row.get(ours) for row in rows.first(FIRST)]
        said = {_plain(cell): as_word(cell) for cell in cells if isinstance(cell, str)}
        if not said or not said.keys() <= names:
            continue
        named = {name: _short_names(word) & said.keys() for word, name in others.items()}
        named = {name: said[min(words)] for name, words in named.items() if words}
        answers, values = list(named), list(named.values())
        if len(named) != 2 or len(said) != 2:
            answers = values = TO_BE_FILLED_IN
        elif ours == "rejected":  # what stands for an answer is the other's name
            values = values[::-1]
        question = rows.columns.get("prompt") or next((name for name in QUESTIONS if name in rows.found), "prompt")
        line = {"prompt": question, "answers": answers, "choice": {rows.columns.get(ours, ours): values}}
        raise UserError(
            f"{rows.source}: column {ours!r} holds {' or '.join(sorted(said.values()))}, which name other columns, and "
            f"is no answer. Say so: {key}.columns={_written(line)}; or, if it is one, {key}.columns={{{ours}: {ours}}}."
        )


def _short_names(name: str) -> set[str]:
    """Returns what may stand for a column: its name, how it ends, and how it begins if it ends in what an answer is."""
    stem, _, end = name.rpartition("_")
    return {name, end, stem} if end in ANSWERS and stem else {name, end}


def _plain(name: str) -> str:
    """Returns a name by which Response B and response_b are one."""
    return as_word(name).replace(" ", "_")


def _check_places(form: Format, rows: Rows, key: str) -> None:
    """Refuses rows of which chosen and rejected say where in another column an answer is: B beside {A: ..., B: ...}, 1
    beside a list, gpt4 beside what each model has said.

    Raises:
        UserError: With a line that says so, where there can be one.
    """
    first = rows.first(FIRST)
    ours = [name for name in ("chosen", "rejected") if name in form.columns]
    said = [[as_word(row.get(name)) for name in ours if isinstance(row.get(name), str)] for row in first]
    for name in (name for name in rows.column_names if name not in form.columns):
        places = [_places(row.get(name)) for row in first]
        if not all(words and found and found.issuperset(words) for words, found in zip(said, places, strict=True)):
            continue
        cell, theirs = first[0][name], [rows.columns.get(one, one) for one in ours]
        way_out, held = "Write the answers themselves there", {word for words in said for word in words}
        paths = [*cell] if isinstance(cell, dict) else [*range(len(cell))]
        first_place = int(str(len(cell)) in held)  # a place is counted from 1
        values = [*cell] if isinstance(cell, dict) else [str(first_place + path) for path in paths]
        if len(paths) == 2 and held <= set(map(as_word, values)):
            question = rows.columns.get("prompt") or next((name for name in QUESTIONS if name in rows.found), "prompt")
            values = values if ours[0] == "chosen" else values[::-1]
            line = {"prompt": question, "answers": [f"{name}.{path}" for path in paths], "choice": {theirs[0]: values}}
            way_out = f"Say so: {key}.columns={_written(line)}"
        raise UserError(
            f"{rows.source}: {' and '.join(theirs)} hold {' and '.join(said[0])}, which say where in column {name!r} "
            f"an answer is, and are no answers. {way_out}; or, if they are, {key}.columns={{{name}: null}}."
        )


def _places(cell) -> set[str]:
    """Returns the words that say where an answer is in a column's cell: keys, places, and names of who gave it."""
    if isinstance(cell, dict):
        return {as_word(name) for name in cell if cell[name]}
    if not isinstance(cell, list) or len(cell) < 2:
        return set()
    entries = [entry for entry in cell if isinstance(entry, dict)]
    names = {as_word(entry[key]) for entry in entries for key in NAMES if isinstance(entry.get(key), str)}
    return names | {str(place) for place in range(len(cell) + 1)}


def _has_numbers(rows: Rows) -> bool:
    """Says whether any of the first rows' scores or ranks is there, if they are to have some."""
    columns = {"scores", "ranks"} & rows.columns.keys()
    cells = [cell for row in rows.first(FIRST) for name in columns for cell in row.get(name) or []]
    return not columns or any(cell is not None for cell in cells)


def _check_marks(form: Format, rows: Rows, key: str) -> None:
    """Refuses single answers beside one column of true and false, 0 and 1, or two words such as pass and fail, that
    nobody reads: it may be their label, under whatever name.

    Raises:
        UserError: `columns` says what to do with it.
    """
    marks = {}
    for name in form.unused(rows.column_names):
        said = (values_in(rows.cells(name)) or set()) - {""}
        worse = [word for word in said if says_worse(word) or as_label(word) is False]
        if said in ({"0", "1"}, {"true", "false"}) or len(said) == 2 and len(worse) == 1:
            marks[name] = sorted(said, key=worse.__contains__)
    if len(marks) == 1 and not marks.keys() & set(GRADES):
        ((name, words),) = marks.items()
        said = " or ".join(sorted(words))
        named = name if None not in map(as_label, words) else {name: words}
        raise UserError(
            f"{rows.source}: column {name!r} holds {said}, and may say how good the answer is, which no label does. "
            f"Say what it is: {key}.columns={_written({'label': named})} where true, 1 or the first word is a good "
            f"answer; or {key}.columns={{{name}: null}} leaves it out, and takes each answer for a good one."
        )


def _to_do(described: dict) -> str:
    """Returns what is to be filled in, or to be checked, in a description that is shown."""
    if "CHOSEN" in described.values():
        return ", with the better answer's column in place of CHOSEN and the worse one's in place of REJECTED"
    if "completion" in described:
        return ", for losses of single answers, such as loss=kto; the label is true, 1 or good, or the opposite"
    if TO_BE_FOUND in described.values():
        return f", with the question's column in place of {TO_BE_FOUND}"
    if "preference" in described:
        return (
            f", with the number of a tie in place of {MIDDLE}; where more is for the first answer, with the answers "
            "the other way round"
        )
    if TO_BE_NAMED in described:
        return f", with scores in place of {TO_BE_NAMED} where more is better, or ranks where less is"
    if TO_BE_ORDERED in described:
        return (
            f", with ranks in place of {TO_BE_ORDERED} where the first number is the first answer's rank, or order "
            "where it is the place of the best answer"
        )
    if "ranks" in described or "scores" in described:
        return " (scores are better where they are higher, ranks where they are lower)"
    return ""


def _fits(rows: Rows) -> Format | None:
    """Returns the form that fits.

    Where `columns` says what grades the answers, nothing else does. An order may be of anything: it is the answers'
    where `columns` says so.
    """
    named = {name for name, theirs in rows.columns.items() if theirs is not None} & GRADED
    forms = []
    for form in FORMATS:
        grading = form.columns.keys() & GRADED
        if grading and grading <= named if named else "order" not in grading:
            forms.append(form)
    return fitting_format(list(rows.first(FIRST)), forms)


def _as_trees(rows: Rows) -> Rows:
    trees, numbers = trees_of(rows)
    return Rows(trees, source=rows.source, numbers=[rows.numbers[number] for number in numbers])


def _with_values(form: Format, rows: Rows, key: str) -> Format:
    """Returns a form whose choice, preference or label has values that `columns` describes as one that knows them."""
    if form.example is from_preference:
        return replace(form, example=partial(from_preference, middle=_middle(rows, key)))
    if "label" in form.columns and isinstance(rows.columns.get("label"), dict):
        return replace(form, example=partial(with_words, form.example, _words_of_label(rows.columns["label"], key)))
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
        words = [as_word(value) for value in values]
        count = len(answers) if isinstance(answers, list) and answers else len(words)
        if len(words) < count:
            raise UserError(
                f"{key}.columns.choice={_written(said)}: {len(words)} values for {count} answers. Give one for each, "
                "in their order."
            )
        ties = tuple(word for word in (*TIE_WORDS, "0", *words[count:]) if word not in words[:count])
        choice = Choice(tuple((word,) for word in words[:count]), ties)
        return replace(form, example=partial(from_choice, choice=choice))
    if isinstance(said, str) and says_worse(said):
        raise UserError(
            f"{key}.columns.choice={_written(said)}: its name says which answer is the worse one. Give what it holds "
            "where the first answer is better, then where the second is: "
            f"choice: {{{_written(said)}: [FIRST, SECOND]}}."
        )
    found: set[str] = set()
    for column in [said] if isinstance(said, str) else said:
        found |= votes_in(rows.cells(column)) or set()
    choice = names_of(answers if isinstance(answers, list) else [], found)
    if choice is None:
        column = said if isinstance(said, str) else said[0]
        ends = suffixes_of(answers) if isinstance(answers, list) and answers else None
        values = sides_of(column, found, ends) or sorted(found - set(TIE_WORDS))[:2]
        if not isinstance(answers, list) and all(word.isdigit() for word in found):  # places in a list
            values = sorted(map(int, found))
        line = {**rows.columns, "choice": {column: values}}
        raise UserError(
            f"{key}.columns.choice={_written(said)}: its values, {', '.join(sorted(found)) or 'none'}, do not say "
            f"which answer they stand for. Give them in the answers' order: {key}.columns={_written(line)}"
        )
    return replace(form, example=partial(from_choice, choice=choice))


def _words_of_label(said: dict, key: str) -> list[str]:
    """Returns the words of a good answer and of a bad one.

    Raises:
        UserError: These are no two words.
    """
    words = list(said.values())
    if len(words) != 1 or not isinstance(words[0], list) or len(words[0]) != 2:
        raise UserError(
            f"{key}.columns.label={_written(said)}: must be a column with what it holds for a good answer and for a "
            "bad one, such as {review: [ok, needs work]}."
        )
    return [as_word(word) for word in words[0]]


def _middle(rows: Rows, key: str) -> float:
    """Returns what is a tie of a preference: as `columns` says, or 0.

    Raises:
        UserError: `columns` does not say it, and 0 is in the middle of nothing: all prefer one side.
    """
    said = rows.columns.get("preference", "preference")
    if isinstance(said, dict):
        middles = list(said.values())
        if len(middles) == 1 and isinstance(middles[0], int | float) and not isinstance(middles[0], bool):
            return float(middles[0])
        raise UserError(
            f"{key}.columns.preference={_written(said)}: must be a column and its number for a tie, such as "
            "{rating: 4}."
        )
    lowest, highest, count = math.inf, -math.inf, 0
    for cell in rows.cells(said):
        if isinstance(cell, int | float) and cell == cell:  # no NaN
            lowest, highest, count = min(cell, lowest), max(cell, highest), count + 1
        if lowest < 0 < highest:
            return 0.0
    if count < FIRST or lowest == highest == 0:
        return 0.0
    line = {**rows.columns, "preference": {said: MIDDLE}}
    raise UserError(
        f"{rows.source}: column {said!r} holds {lowest} to {highest}; a preference is for the first answer "
        f"below 0, for the second above, and here all would be for one. Say where its middle is: "
        f"{key}.columns={_written(line)}, with its number for a tie in place of {MIDDLE}, such as 4 of 1 to 7; "
        "where more is for the first answer, name the answers the other way round."
    )


def _written(described) -> str:
    """Returns a description as it is written on a command line."""
    if isinstance(described, dict):
        return "{" + ", ".join(f"{_written(key)}: {_written(value)}" for key, value in described.items()) + "}"
    if isinstance(described, list):
        return "[" + ", ".join(map(_written, described)) + "]"
    is_word = re.fullmatch(r"[\w.*][\w.* -]*", str(described)) and str(described).lower() not in _NO_WORDS
    return str(described) if is_word or not isinstance(described, str) else json.dumps(described, ensure_ascii=False)
