"""What a careful reader would ask about a row that can be read. It is told, with the rows' numbers, and nothing else is
done: a row may be meant so."""

import re
from collections.abc import Iterable, Iterator, Sequence

from pairtune.pairs.already_rendered import BEGINS, OPENINGS
from pairtune.pairs.cells import is_empty, kind_of, says_nothing
from pairtune.pairs.example import Example
from pairtune.pairs.layouts import values_in
from pairtune.pairs.messages import strings_in, text_of
from pairtune.pairs.names import numbers_as
from pairtune.pairs.readers import begins_with
from pairtune.pairs.speakers import begins_with_speaker, holds_users_turn, speakers_in

_ENDINGS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "[/INST]")
_ENDINGS += ("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<eos>")
_OF_TEMPLATES = [token for token in (*OPENINGS, *BEGINS, *_ENDINGS) if token not in ("<s>", "<role>")]  # HTML's
_TOKEN = re.compile("|".join(map(re.escape, _OF_TEMPLATES)) + r"|</s>\s*\Z")
_A_WORD, _A_LOOK = 16, 32  # characters
_PLACEHOLDER = re.compile(r"<\|?(?:image|audio|video)(?:_\d+|_pad)?\|?>|\[IMG\]")


def grades_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns columns of numbers that grade the two answers, by their names: chosen_score and rejected_score, the one
    that has to be higher first."""
    found, by_word = [], {name.lower(): name for name in names}
    for name in names:
        other = by_word.get(name.lower().replace("chosen", "rejected"), name)
        kind = numbers_as(name) if other != name else ""
        found += [(name, other)] if kind == "scores" else [(other, name)] if kind == "ranks" else []
    return found


def held_by(names: Sequence[str], rows: Iterable[dict]) -> dict[str, str]:
    """Returns what columns hold, in words, where it shows what they are for: a few values, or a sentence."""
    rows, held = list(rows), {}
    for name in names:
        cells = [cell for row in rows if not is_empty(cell := row.get(name))]
        values = values_in(cells)
        if values and max(map(len, values)) <= _A_WORD and len(cells) >= 3 * len(values):
            held[name] = ", ".join(sorted(values))
        elif cells and isinstance(cells[0], str) and " " in cells[0].strip():
            text = " ".join(cells[0].split())
            held[name] = repr(text if len(text) <= _A_LOOK else f"{text[: _A_LOOK - 3]}...")
        elif cells and isinstance(cells[0], list | dict):
            held[name] = kind_of(cells[0])
    return held


def of_row(row: dict, grades: Sequence[tuple[str, str]], beside: Sequence[str]) -> Iterator[str]:
    """Yields what is to be asked about a row's columns.

    Args:
        grades: From grades_of.
        beside: Columns of texts that a row may lack, such as `input`.
    """
    for better, worse in grades:
        numbers = [_number(row.get(name)) for name in (better, worse)]
        if None not in numbers and numbers[0] < numbers[1]:
            yield f"{better} below {worse}"
    for name in ("scores", "ranks"):
        cells = row.get(name)
        numbers = [_number(cell) for cell in cells] if isinstance(cells, list) else []
        known = [number for number in numbers if number is not None]
        if name == "scores" and -1 in known and max(known) > 1 and sorted(set(known))[1] >= 0:
            yield "a score of -1, read as the lowest"
        if name == "ranks" and 0 in known:
            yield "a rank of 0, read as the best"
    for name in beside:
        if says_nothing(row.get(name)):
            yield f"{name} is none, nan or so: left out"


def of_example(example: Example, tokenizer=None) -> Iterator[str]:
    """Yields what is to be asked about what a question and its answers say.

    Args:
        tokenizer: What writes them, if that is known: what is a special token in a text is asked of it.
    """
    asked = text_of(example.prompt[-1])
    answers = [text_of(turns[-1]) for turns in example.answers]
    if says_nothing(asked):
        yield "a prompt that is none, nan or so"
    if any(map(says_nothing, answers)):
        yield "an answer that is none, nan or so"
    if len(example.prompt) == 1 and len({begins_with(answer, asked) for answer in answers}) == 2:
        yield "one answer repeats the question"
    if not (tokenizer and tokenizer.is_plain) and speakers_in(asked):
        yield "speakers within one message"
    if any(map(holds_users_turn, answers)):
        yield "a user's turn within an answer"
    if any(map(begins_with_speaker, answers)):
        yield "an answer begins with Assistant:"
    texts = [*answers, *strings_in([turn.get("content") for turn in example.prompt])]
    texts = [text for text in texts if "<" in text or "[" in text]  # as all of these begin
    special = {match[0].strip() for text in texts for match in _TOKEN.finditer(text)}
    if tokenizer and not all(map(tokenizer.holds_special, special)):
        yield "another model's special tokens"
    if any(map(_PLACEHOLDER.search, texts)):
        yield "a placeholder such as <image>"


def _number(cell) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    try:
        return float(cell)
    except ValueError:
        return None
