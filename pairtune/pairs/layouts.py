"""Columns of data sets that are published under names of their own, as `dataset.columns` would describe them; and the
guess at such a line for a file that nobody knows.

A description maps our columns to theirs: a name, a dotted one (`input.messages`, `answers.0.text`), one with a star
for each entry of a list (`completions.*.response`), a list of names, and for `choice` a column with the values that
stand for each answer, in their order.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from pairtune.pairs.cells import kind_of
from pairtune.pairs.names import (
    ANSWERS,
    CHOICES,
    NAMES,
    OF_WHOM,
    QUESTIONS,
    TO_BE_NAMED,
    TO_BE_ORDERED,
    better_and_worse,
    is_order,
    names_of,
    numbers_as,
    says_worse,
    stem_of,
    suffixes_of,
)
from pairtune.pairs.ranked import TIE_WORDS, as_word

_VOTERS = ("annotator", "rater", "judge", "vote", "label", "annotation")
_VOTES = re.compile(rf"({'|'.join(_VOTERS)})_?\d+")
_RATES = r"(score|rating|reward|rank)s?$"
_ENTRY = re.compile(r"(?:^|\.)\d+(?=\.|$)")
TO_BE_FILLED_IN = ["FIRST", "SECOND"]
_FEW = 4  # values that a column of choices may have, ties included
_SHORT = 12  # characters of such a value, where nothing else tells it from an answer


@dataclass(frozen=True)
class Layout:
    """A published data set's columns. It is recognised by having all of `needs`."""

    name: str
    needs: tuple[str, ...]
    columns: dict


def _two(first: str, second: str) -> list[str]:
    return [first, second]


LAYOUTS = (
    Layout(
        "OpenAI's preferences",
        ("input", "preferred_output", "non_preferred_output"),
        {"prompt": "input.messages", "tools": "input.tools", "chosen": "preferred_output",
         "rejected": "non_preferred_output"},
    ),
    Layout(
        "UltraFeedback, rated completions",
        ("instruction", "completions"),
        {"prompt": "instruction", "answers": "completions.*.response", "scores": "completions.*.overall_score"},
    ),
    Layout(
        "NeMo's ranked completions",
        ("context", "completions"),
        {"prompt": "context", "answers": "completions.*.completion", "ranks": "completions.*.rank"},
    ),
    Layout(
        "HelpSteer's preferences",
        ("context", "response1", "response2", "overall_preference"),
        {"prompt": "context", "answers": _two("response1", "response2"), "preference": "overall_preference"},
    ),
    Layout(
        "HelpSteer 2's preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        {"prompt": "prompt", "answers": _two("response_1", "response_2"), "preference": "preference_strength"},
    ),
    Layout("Nectar's ranked answers", ("prompt", "answers"),
           {"prompt": "prompt", "answers": "answers.*.answer", "ranks": "answers.*.rank"}),
    Layout("distilabel's rated generations", ("instruction", "generations", "ratings"),
           {"prompt": "instruction", "answers": "generations", "scores": "ratings"}),
    Layout("messages with chosen and rejected", ("messages", "chosen", "rejected"), {"prompt": "messages"}),
    Layout("messages and rejected", ("messages", "rejected"), {"rejected_response": "rejected"}),
    Layout("conversations and rejected", ("conversations", "rejected"),
           {"messages": "conversations", "rejected_response": "rejected"}),
    Layout("Stack Exchange's rated answers", ("question", "answers"),
           {"prompt": "question", "answers": "answers.*.text", "scores": "answers.*.pm_score"}),
    Layout(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        {"prompt": "history", "answers": _two("human_ref_A", "human_ref_B"), "choice": {"labels": [1, 0]}},
    ),
    Layout(
        "PandaLM",
        ("instruction", "input", "response1", "response2", "annotator1"),
        {"prompt": "instruction", "input": "input", "answers": _two("response1", "response2"),
         "choice": {"annotator*": [1, 2]}},
    ),
    Layout(
        "Arena's battles",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        {"prompt": "prompt", "answers": _two("response_a", "response_b"),
         "scores": _two("winner_model_a", "winner_model_b")},
    ),
    Layout("Arena's conversations", ("conversation_a", "conversation_b", "winner"),
           {"answers": _two("conversation_a", "conversation_b"), "choice": {"winner": ["model_a", "model_b"]}}),
    Layout(
        "WebGPT",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        {"prompt": "question.full_text", "answers": _two("answer_0", "answer_1"), "scores": _two("score_0", "score_1")},
    ),
)  # fmt: skip
# Two answers under other names, of which it is plain which is better; and a question beside them
_BETTER_AND_WORSE = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_answer", "rejected_answer"),
    ("response_chosen", "response_rejected"), ("chosen_messages", "rejected_messages"), ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"), ("preferred_output", "non_preferred_output"),
    ("messages", "rejected_messages"), ("accepted", "rejected"),
)  # fmt: skip
_ASKED = ("prompt", "instruction", "question", "query", "input")
LAYOUTS += tuple(
    Layout(
        f"{question} with {better} and {worse}" if question else f"{better} and {worse}",
        (*((question,) if question else ()), better, worse),
        {"chosen": better, "rejected": worse} | ({"prompt": question} if question in _ASKED[2:] else {}),
    )
    for better, worse in _BETTER_AND_WORSE
    for question in (*_ASKED, "")
)


def known_layouts(column_names: Iterable[str]) -> list[Layout]:
    """Returns the published layouts that have no other columns than these."""
    names = set(column_names)
    return [layout for layout in LAYOUTS if names.issuperset(layout.needs)]


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
    answers = _two_answers(kinds)
    if answers is None:
        return _likely(row, values_of), False
    described: dict = {"answers": list(answers)}
    texts = [name for name in kinds if kinds[name] in ("text", "transcript", "messages") and name not in answers]
    question = next((name for asked in QUESTIONS for name in texts if name.lower() == asked), None)
    whole = all(kinds[name] == "messages" for name in answers)
    if question and not (whole and question not in ("prompt", "question")):
        described = {"prompt": question} | described
    if question == "instruction" and "input" in kinds:
        described["input"] = "input"
    others = [name for name in kinds if name not in (*answers, question)]
    votes = _votes(row, others)
    alone = [name for name in others if not any(vote[-1] == "*" and name.startswith(vote[:-1]) for vote in votes)]
    rated = [name for name in others if _is_number_or_text_of_one(row[name]) and suffixes_of([name])]
    pairs = [pair for pair in combinations(rated, 2) if suffixes_of(pair) == suffixes_of(answers)]
    for column in dict.fromkeys([*(name for name in CHOICES if name in alone), *alone, *votes]):
        values = votes_in(values_of(column))
        if values is None:
            continue
        names = names_of(answers, values)
        if names and says_worse(column):  # what stands for an answer is the other's name
            words = [next((word for word in known if word in values), known[1]) for known in names.names]
            return described | {"choice": {column: words[::-1]}}, False
        if names:
            return described | {"choice": column}, bool(question or whole) and column in CHOICES
        words = _choices(values)
        alike = [name for name in others if name != column and {*words} & (values_in(values_of(name)) or set())]
        if len(alike) > 1 and column not in votes:
            continue  # names of models, say, which stand now for the one answer and now for the other
        if len(words) == 2 and not pairs and (column in (*CHOICES, *votes, others[-1])):
            return described | {"choice": {column: TO_BE_FILLED_IN if says_worse(column) else words}}, False
    if pairs:
        return described | {numbers_as(pairs[0][0]): list(pairs[0])}, False
    return described | {"choice": {"COLUMN": TO_BE_FILLED_IN}}, False


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
        if not isinstance(value, list) or len(value) < 2 or name in QUESTIONS:
            continue
        if all(isinstance(entry, dict) for entry in value):
            found |= {f"{name}.*.{key}": [entry.get(key) for entry in value] for key in value[0]}
        else:
            found[name] = value
    texts = [n for n, cells in found.items() if kind_of(cells) in ("texts", "conversations")]
    answers = next((n for n in texts if n.rpartition(".")[2].strip("s") in ANSWERS), None)
    question = next((n for n in QUESTIONS if kind_of(row.get(n)) in ("text", "transcript", "messages")), None)
    if not (answers and question):
        return {}, False
    described, count = {"prompt": question, "answers": answers}, len(found[answers])
    beside = [n for n in found if n.rpartition(".")[0] == answers.rpartition(".")[0] and len(found[n]) == count]
    numbers = [n for n in beside if all(map(_is_number_or_text_of_one, found[n]))]
    for name in numbers:
        ours = "ranks" if "rank" in name.rpartition(".")[2] else "scores"
        if re.search(_RATES, name) and numbers_as(name) == ours:
            return described | {ours: name}, True
    if numbers:
        name = next((name for name in numbers if numbers_as(name) != TO_BE_NAMED), numbers[0])
        ours = TO_BE_ORDERED if "." not in name and is_order(name, found[name]) else numbers_as(name)
        return described | {ours: name}, False
    for column in (name for name in CHOICES if name in row):
        places = values_in(values_of(column)) or set()
        first = 0 if "0" in places else 1
        if places & {"0", str(count)} and places <= {str(first + i) for i in range(count)}:
            return described | {"choice": {column: [first + i for i in range(count)]}}, False
    return {}, False


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_number_or_text_of_one(value) -> bool:
    return _is_number(value) or isinstance(value, str) and re.fullmatch(r"\s*[-+]?\d+(\.\d*)?\s*", value) is not None


def _likely(row: dict, values_of: Callable[[str], Iterable]) -> dict:
    """Returns the likeliest description of columns whose names say nothing: the question, two answers, a choice."""
    leaves = {name: value for name, value in _leaves(row) if value not in (None, "")}
    texts = [name for name, value in leaves.items() if kind_of(value) in ("text", "transcript", "message", "messages")]
    texts = [name for name in texts if name.rpartition(".")[2] not in OF_WHOM]
    asked = (*QUESTIONS, "user", "human")
    said = better_and_worse(name for name in texts if not any(word in name.lower() for word in asked[:4]))
    better, worse = said or (None, None)
    few = {name: words for name in leaves if name not in QUESTIONS and (words := _labels(values_of(name)))}
    choice = next((name for name in few if name.rpartition(".")[2] in CHOICES), next(reversed(few), None))
    rest = [name for name in texts if name not in (better, worse, choice)]
    long = [name for name in rest if name not in few]
    rest = long if len(long) >= 3 else rest
    siblings = _siblings(rest)
    asking = [name for name in rest if name not in siblings and not _ENTRY.search(name)]  # of a list, one is not all
    asking = [name for name in asking if not name.lower().startswith("system")]
    named = (name for name in asking if any(word in name.lower() for word in asked))
    question = next(named, next(iter(asking), None))
    if question and better and worse:
        return {"prompt": question, "chosen": better, "rejected": worse}
    answers = siblings or [name for name in rest if name != question and not name.lower().startswith("system")][:2]
    if len(answers) < 2 or question is None:
        return {}
    if choice is None:
        return {"prompt": question, "chosen": "CHOSEN", "rejected": "REJECTED"}  # no name says which
    values = few[choice] if len(few[choice]) > 1 and not says_worse(choice) else TO_BE_FILLED_IN
    return {"prompt": question, "answers": answers, "choice": {choice: values}}


def _siblings(names: Sequence[str]) -> list[str]:
    """Returns the first two entries' texts of a list of answers, such as summaries.0.text and summaries.1.text."""
    for name in names:
        other = _ENTRY.sub(lambda match: match[0].replace("0", "1"), name, count=1)
        if other != name and other in names and not set(re.split(r"[^a-z]+", name.lower())) & set(NAMES):
            return [name, other]
    return []


def _choices(values: set[str]) -> list[str]:
    """Returns the first two words that stand for the first answer and for the second, by their order; what is to be
    filled in where it may be either, as of 0 and 1; none where these are numbers, and no choice."""
    words = sorted(values - set(TIE_WORDS), reverse=values <= {"true", "false"})[:2]  # true: the first is better
    if not all(re.fullmatch(r"-?\d*[.,]?\d+", word) for word in words) or words == ["1", "2"]:
        return words
    return TO_BE_FILLED_IN if set(words) in ({"0", "1"}, {"-1", "1"}) else []


def _labels(cells: Iterable) -> list[str]:
    """Returns the first two words that a column of short words holds; none where it holds other things."""
    cells = list(cells)
    values = values_in(cells) or set()
    words = _choices(values)
    repeat = len(cells) > len(values)
    short = words and max(map(len, words)) <= _SHORT and (repeat or not any(" " in word for word in words))
    return words[:2] if short else []


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


def _two_answers(kinds: dict[str, str]) -> tuple[str, str] | None:
    """Returns two columns of texts or conversations whose names differ in their suffix alone; none where several such
    pairs may be the answers."""
    texts = [name for name, kind in kinds.items() if kind in ("text", "messages", "message")]
    orders = (("1", "2"), ("0", "1"), ("a", "b"), ("first", "second"), ("left", "right"))
    found = [
        pair
        for first, second in combinations(texts, 2)
        for pair in ((first, second), (second, first))
        if kinds[first] == kinds[second] and suffixes_of(pair) in orders and not _VOTES.fullmatch(first)
    ]
    found = [pair for pair in found if not set(stem_of(pair[0])) & set(NAMES)]  # who has answered, and not what
    if len(found) > 1:
        found = [pair for pair in found if kinds[pair[0]] != "text" or set(stem_of(pair[0])) & set(ANSWERS)]
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
