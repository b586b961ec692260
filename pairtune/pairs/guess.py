"""A guess at the line of `dataset.columns` that describes a file that nobody knows: shown to who is to say so, and read
by itself only where the columns' names and values say which answer is better.

What nobody can know is in capitals, to be filled in: FIRST and SECOND, SCORES_OR_RANKS, MIDDLE.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile

from pairtune.pairs.cells import as_word, kind_of
from pairtune.pairs.names import (
    ANSWERS,
    CHOICES,
    GRADES,
    NAMES,
    OF_WHOM,
    QUESTIONS,
    TO_BE_NAMED,
    TO_BE_ORDERED,
    asked_by,
    better_and_worse,
    in_turn,
    is_order,
    is_preference,
    names_of,
    numbers_as,
    says_which,
    says_worse,
    stem_and_suffix,
    stem_of,
    suffixes_of,
)
from pairtune.pairs.ranked import TIE_WORDS

_VOTERS = ("annotator", "rater", "judge", "vote", "label", "annotation", "evaluator", "reviewer", "labeler", "grader")
_VOTES = re.compile(rf"({'|'.join(_VOTERS)})_?\d+")
_RATES = r"(score|rating|reward|rank)s?$"
_ENTRY = re.compile(r"(?:^|\.)\d+(?=\.|$)")
_PLACES = ["FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH", "SIXTH"]  # of an answer among several
TO_BE_FILLED_IN, TO_BE_FOUND, MIDDLE = _PLACES[:2], "PROMPT", "MIDDLE"
_TIMES = ("time", "timestamp", "date", "created", "updated", "createdtime", "utc")
_FEW = 4  # values that a column of choices may have, ties included
_SHORT = 12  # characters of such a value, where nothing else tells it from an answer


def guess(rows: Sequence[dict], values_of: Callable[[str], Iterable]) -> tuple[dict, bool]:
    """Returns a description of rows with a question, two answers and which is better; and whether it is sure.

    Sure is what the columns' names and values say by themselves: output_1 and output_2, and a label of 1 or 2. What is
    not found is left out.

    Args:
        rows: The first ones.
        values_of: Returns a column's cells, of all rows.
    """
    row = _fullest(rows)
    kinds = {name: kind_of(value) for name, value in row.items()}
    rated, is_sure = _of_lists(row, values_of)
    if rated:
        return rated, is_sure
    answers = _answers(kinds)
    if several := _several_rejected(kinds):
        return several, True
    if answers is None:
        return _likely(row, values_of), False
    described: dict = {"answers": answers}
    texts = [name for name in kinds if kinds[name] in ("text", "transcript", "messages") and name not in answers]
    question = next((name for asked in QUESTIONS for name in texts if name.lower() == asked), None)
    whole = all(kinds[name] == "messages" for name in answers)
    if question and not (whole and question not in ("prompt", "question")):
        described = {"prompt": question} | described
    if question == "instruction" and "input" in kinds:
        described["input"] = "input"
    if not question and not whole:
        described = {"prompt": _other_question(row, answers, values_of)} | described
    others = [name for name in kinds if name not in (*answers, question)]
    chosen, is_sure = _chosen(row, others, described, values_of, is_plain=bool(question or whole))
    graded = {} if is_sure or len(answers) > 2 else _graded(row, others, answers)
    return (described | graded, False) if graded else (chosen, is_sure)


def _several_rejected(kinds: dict[str, str]) -> dict:
    """Returns the description of a row with chosen and rejected_1, rejected_2; {} where it is no such row."""
    worse = [name for name in kinds if re.fullmatch(r"rejected_?\d+", name)]
    question = next((name for name in QUESTIONS if name in kinds), None)
    if (
        len(worse) < 2
        or "chosen" not in kinds
        or not question
        or [*filter(lambda n: n.startswith("rejected"), kinds)] != worse
    ):
        return {}
    return {"prompt": question, "chosen": "chosen", "rejected": "rejected*"}


def _chosen(
    row: dict, others: list[str], described: dict, values_of: Callable[[str], Iterable], *, is_plain: bool
) -> tuple[dict, bool]:
    """Returns a description with the column that chooses among its answers, and whether that is sure.

    Args:
        is_plain: The question is known.
    """
    answers = described["answers"]
    votes = _votes(row, others)
    alone = [name for name in others if not any(vote[-1] == "*" and name.startswith(vote[:-1]) for vote in votes)]
    alone = [name for name in alone if not set(stem_of(name)) & set(NAMES) or name in CHOICES]
    likely = [
        *(name for name in CHOICES if name in alone),
        *filter(says_which, alone),
        *filter(says_worse, alone),
        *votes,
    ]
    naming = [name for name in alone if names_of(answers, votes_in(values_of(name)) or set())]
    for column in dict.fromkeys([*likely, *naming, *alone]):
        values = votes_in(values_of(column))
        if values is None:
            continue
        names = names_of(answers, values)
        if names and says_worse(column):  # what stands for an answer is the other's name
            words = [next((word for word in known if word in values), known[1]) for known in names.names]
            words = words[::-1] if len(words) == 2 else _PLACES[: len(words)]
            return described | {"choice": {column: words}}, False
        if names and column in likely:
            return described | {"choice": column}, is_plain and column in CHOICES
        words = sides_of(column, values, suffixes_of(answers))
        words = TO_BE_FILLED_IN if words and (says_worse(column) or column not in likely) else words
        alike = [
            name for name in others if name != column and values & (values_in(values_of(name)) or set()) - {*TIE_WORDS}
        ]
        if len(alike) > 1 and column not in votes:
            continue  # names of models, say, which stand now for the one answer and now for the other
        if words and (column in (*likely, *naming) or column == others[-1]):
            return described | {"choice": {column: words if len(answers) == 2 else _PLACES[: len(answers)]}}, False
    numbers = (name for name in others if _is_number(row[name]) and is_preference(name))
    column = next(numbers, None)
    words = column and values_in(values_of(column))
    if len(answers) == 2 and column and not (words and all(re.fullmatch(r"-?\d", word) for word in words)):
        return described | {"preference": {column: MIDDLE}}, False
    return described | {"choice": {"COLUMN": _PLACES[: len(answers)]}}, False


def _graded(row: dict, others: Sequence[str], answers: Sequence[str]) -> dict:
    """Returns the columns of two numbers, or of true and false, that grade an answer each, by what differs in their
    names; {} where there are none."""
    ends = suffixes_of(answers)
    for name in others:
        for place in re.finditer(rf"(?<![a-z0-9]){ends[0]}(?![a-z0-9])", name, re.IGNORECASE):
            other = name[: place.start()] + ends[1] + name[place.end() :]
            pair = [name, next((one for one in others if one.lower() == other.lower()), None)]
            if pair[1] and all(isinstance(row[one], bool) or _is_number_or_text_of_one(row[one]) for one in pair):
                return {numbers_as(name): pair}
    return {}


def _other_question(row: dict, answers: Sequence[str], values_of: Callable[[str], Iterable]) -> str:
    """Returns the column that asks, by what it holds: the longest sentences, and not the same few."""
    texts = [
        name for name, cell in row.items() if name not in answers and isinstance(cell, str) and " " in cell.strip()
    ]
    varied = [name for name in texts if values_in(values_of(name)) is None]
    return max(varied or texts, key=lambda name: len(row[name]), default=TO_BE_FOUND)


def _votes(row: dict, names: Sequence[str]) -> list[str]:
    """Returns what votes may be found by: a name with a star for those of several columns, a dotted one for those
    within a list or an object."""
    found = []
    for name in names:
        stem, cell = name.rstrip("0123456789"), row[name]
        of_voters = [other for other in row if other.startswith(stem)]
        if _VOTES.fullmatch(name) and len(of_voters) > 1 and all(map(_VOTES.fullmatch, of_voters)):
            found.append(f"{stem}*")
        elif isinstance(cell, dict):
            found.append(f"{name}.*")
        elif isinstance(cell, list) and isinstance(next(iter(cell), None), dict):
            found += [f"{name}.*.{key}" for key in cell[0] if key not in (*NAMES, *OF_WHOM, "user")]
    return [
        name for name in found if set(re.findall(r"[a-z]+", name.lower().replace("s.", "."))) & {*CHOICES, *_VOTERS}
    ]


def _of_lists(row: dict, values_of: Callable[[str], Iterable]) -> tuple[dict, bool]:
    """Returns the description of a row with a list of answers and a list of as many numbers, or with a list of answers
    that have one each, or with the best one's place; {} where it is no such row. Sure are scores and ranks by name."""
    found = {}
    for name, value in row.items():
        if isinstance(value, dict) and not any(isinstance(cell, dict | list) for cell in value.values()):
            name, value = f"{name}.*", [*value.values()]
        elif isinstance(value, dict) and len({len(cell) for cell in value.values() if isinstance(cell, list)}) == 1:
            found |= {f"{name}.{key}": cell for key, cell in value.items() if isinstance(cell, list) and len(cell) > 1}
        if not isinstance(value, list) or len(value) < 2 or name in QUESTIONS:
            continue
        if all(isinstance(entry, dict) for entry in value):
            found |= {f"{name}.*.{key}": [entry.get(key) for entry in value] for key in value[0]}
        else:
            found[name] = value
    texts = [n for n, cells in found.items() if kind_of(cells) in ("texts", "conversations")]
    answers = next((n for n in texts if n.removesuffix(".*").rpartition(".")[2].strip("s") in ANSWERS), None)
    question = next((n for n in QUESTIONS if kind_of(row.get(n)) in ("text", "transcript", "messages")), None)
    if not (answers and question):
        return {}, False
    described, count = {"prompt": question, "answers": answers}, len(found[answers])
    heads = {n: n.removesuffix(".*").rpartition(".")[0] for n in found}
    is_object = answers.endswith(".*")  # whose entries are found by their keys, and not by their places
    beside = [
        n for n in found if heads[n] == heads[answers] and n.endswith(".*") == is_object and len(found[n]) == count
    ]
    known = {n: [cell for cell in found[n] if cell is not None] for n in beside}
    numbers = [n for n in beside if known[n] and all(map(_is_number_or_text_of_one, known[n]))]
    for name in numbers if not is_object else ():
        ours = "ranks" if "rank" in name.rpartition(".")[2] else "scores"
        if re.search(_RATES, name) and numbers_as(name) == ours:
            return described | {ours: name}, True
    places = _of_places(row, count, values_of) if not is_object else {}
    if places and all(numbers_as(name) == TO_BE_NAMED for name in numbers):
        return described | places, False
    if numbers:
        name = next((name for name in numbers if numbers_as(name) != TO_BE_NAMED), numbers[0])
        ours = TO_BE_ORDERED if "." not in name and is_order(name, known[name]) else numbers_as(name)
        return described | {ours: name}, False
    return (described | places, False) if places else ({}, False)


def _of_places(row: dict, count: int, values_of: Callable[[str], Iterable]) -> dict:
    """Returns the column that says by its place which answer of a list is best; {} where there is none."""
    for column in dict.fromkeys([*(name for name in CHOICES if name in row), *filter(says_which, row)]):
        places = values_in(values_of(column)) or set()
        first = 0 if "0" in places else 1
        if places & {"0", str(count)} and places <= {str(first + i) for i in range(count)}:
            return {"choice": {column: [first + i for i in range(count)]}}
    return {}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_text_of_one(value) -> bool:
    return (
        _is_number(value) or isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+(\.\d*)?\s*%?\s*", value) is not None
    )


def _likely(row: dict, values_of: Callable[[str], Iterable]) -> dict:
    """Returns the likeliest description of columns whose names say nothing: the question, two answers, a choice."""
    leaves = {name: value for name, value in _leaves(row) if value not in (None, "")}
    texts = [name for name, value in leaves.items() if kind_of(value) in ("text", "transcript", "message", "messages")]
    texts = [name for name in texts if not set(stem_of(name.rpartition(".")[2])) & {*OF_WHOM, *_TIMES}]
    texts = [name for name in texts if not (_is_number_or_text_of_one(leaves[name]) or _is_date(leaves[name]))]
    asked = {*QUESTIONS, "user", "human"}
    said = better_and_worse(name for name in texts if not asked_by(name) & set(QUESTIONS[:4]))
    better, worse = said or (None, None)
    few = [name for name in leaves if name not in QUESTIONS and _is_label(values_of(name))]
    deciding = [
        name for name in few if not _of_an_entry(name) and not set(stem_of(name.rpartition(".")[2])) & set(NAMES)
    ]
    choice = next((name for name in deciding if name.rpartition(".")[2] in CHOICES), None)
    choice = choice or next(filter(says_which, deciding), next(reversed(deciding), None))
    rest = [name for name in texts if name not in (better, worse, choice)]
    rest = [name for name in rest if not name.lower().startswith("system")]
    long = [name for name in rest if name not in few and " " in str(leaves[name]).strip()]
    rest = long if len(long) >= (1 if better and worse else 3) else rest
    siblings = _siblings(rest)
    beside = siblings[0].partition(".0")[0] if siblings else None
    if choice and beside and choice.startswith(f"{beside}."):  # which is said of one of them
        choice = None
    asking = [name for name in rest if name not in siblings and not _ENTRY.search(name)]  # of a list, one is not all
    named = (name for name in asking if asked_by(name) & asked)
    written = [name for name in asking if kind_of(leaves[name]) in ("messages", "transcript")]
    question = next(named, next(iter(written or asking), None))
    if question and better and worse:
        return {"prompt": question, "chosen": better, "rejected": worse}
    answers = siblings or [name for name in rest if name != question][:2]
    if len(answers) < 2 or question is None:
        return _one_answer(
            question, answers, [*few, *(name for name, cell in leaves.items() if isinstance(cell, bool))]
        )
    if choice is None:
        return {"prompt": question, "chosen": "CHOSEN", "rejected": "REJECTED"}  # no name says which
    words = values_in(values_of(choice)) or set()
    values = sides_of(choice, words, None) if says_which(choice.rpartition(".")[2]) and not says_worse(choice) else []
    if any(as_word(value) in map(as_word, answers) for value in leaves.values()):  # who was shown first, say
        values = []
    return {"prompt": question, "answers": answers, "choice": {choice: values or TO_BE_FILLED_IN}}


def _one_answer(question: str | None, answers: list[str], marks: list[str]) -> dict:
    """Returns the description of a question with one answer, and what marks it as good or bad; {} where it is no such
    row."""
    if not question or not answers or answers[0].rpartition(".")[2].lower().strip("s") not in ANSWERS or not marks:
        return {}
    label = next((name for name in marks if name.rpartition(".")[2] in GRADES), marks[0])
    return {"prompt": question, "completion": answers[0], "label": label}


def _is_date(value) -> bool:
    return (
        isinstance(value, str)
        and re.match(r"\d{4}-\d\d-\d\d|\d{1,2}[./]\d{1,2}[./]\d{2,4}\b", value.strip()) is not None
    )


def _of_an_entry(name: str) -> bool:
    """Says whether a dotted name is of one entry of a list itself, or of something in the list's second entry: what it
    says is said of that one."""
    return re.search(r"\.\d+$", name) is not None or re.search(r"\.1(\.|$)", name) is not None


def _siblings(names: Sequence[str]) -> list[str]:
    """Returns the first two entries' texts of a list of answers, such as summaries.0.text and summaries.1.text."""
    for name in names:
        other = _ENTRY.sub(lambda match: match[0].replace("0", "1"), name, count=1)
        if other != name and other in names and not set(re.split(r"[^a-z]+", name.lower())) & set(NAMES):
            return [name, other]
    return []


def sides_of(name: str, values: set[str], suffixes: Sequence[str] | None) -> list[str]:
    """Returns the words that stand for the first answer and for the second; what is to be filled in where it may be
    either, as of 0 and 1, or of good and bad; none where these are numbers, and no choice.

    Args:
        name: Of the column.
        suffixes: How the answers' columns end, if they begin alike.
    """
    words = sorted(values - set(TIE_WORDS))
    if all(re.fullmatch(r"-?\d*[.,]?\d+", word) for word in words):
        if set(words) <= {"0", "1", "2"} and len(words) == 3:
            return [*TO_BE_FILLED_IN, "TIE"]
        if set(words) not in ({"0", "1"}, {"-1", "1"}, {"1", "2"}):
            return []
    return in_turn(name, words, suffixes) or TO_BE_FILLED_IN if len(words) > 1 else []


def _is_label(cells: Iterable) -> bool:
    """Says whether a column holds a few short words, over and over."""
    cells = list(cells)
    values = values_in(cells) or set()
    words = values - set(TIE_WORDS)
    if len(words) < 2 or max(map(len, words)) > _SHORT:
        return False
    if all(re.fullmatch(r"-?\d*[.,]?\d+", word) for word in words) and not words <= {"-1", "0", "1", "2"}:
        return False
    return len(cells) > len(values) or not any(" " in word for word in words)


def _leaves(value, name: str = "") -> Iterable[tuple[str, object]]:
    """Yields the dotted names of what a row holds, and their cells: messages whole, of other lists the first two."""
    items = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        items = enumerate(value[:2])
    if kind_of(value) in ("message", "messages") or not isinstance(value, dict | list):
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _answers(kinds: dict[str, str]) -> list[str] | None:
    """Returns two or more columns of texts or conversations whose names differ in their suffix alone; none where
    several such groups may be the answers."""
    texts = [name for name, kind in kinds.items() if kind in ("text", "messages", "message")]
    orders = ("0123456789", "123456789", "abcdefgh", ("first", "second", "third", "fourth"), ("left", "right"))
    groups: dict[tuple[str, str], dict[str, str]] = {}  # of one stem and kind: suffix to name
    for name in texts:
        stem, suffix = stem_and_suffix(name)
        groups.setdefault((stem, kinds[name]), {})[suffix] = name
    found = []
    for group in groups.values():
        rows = [list(takewhile(group.__contains__, order)) for order in orders]
        found += [[group[suffix] for suffix in max(rows, key=len)]] if max(map(len, rows)) > 1 else []
    found = [group for group in found if not _VOTES.fullmatch(group[0])]
    found = [group for group in found if not set(stem_of(group[0])) & set(NAMES)]  # who has answered, and not what
    if len(found) > 1:
        found = [group for group in found if kinds[group[0]] != "text" or set(stem_of(group[0])) & set(ANSWERS)]
    return found[0] if len(found) == 1 else None


def values_in(cells: Iterable) -> set[str] | None:
    """Returns the words that a column holds; None where they are many, or no words."""
    found: set[str] = set()
    for cell in cells:
        if not isinstance(cell, str | int | float | bool | None):
            return None
        found.add(as_word(cell))
        if len(found) > _FEW:
            return None
    return found


def votes_in(cells: Iterable) -> set[str] | None:
    """Returns the words that a column holds, or its lists of votes; None as values_in."""
    return values_in(value for cell in cells for value in (cell if isinstance(cell, list) else [cell]))


def _fullest(rows: Sequence[dict]) -> dict:
    """Returns the columns with the first value that is not null."""
    filled: dict = {}
    for row in rows:
        filled |= {name: value for name, value in row.items() if filled.get(name) is None}
    return filled
