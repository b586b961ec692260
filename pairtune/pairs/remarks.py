"""What a careful reader would ask about a row that can be read. It is told, with the rows' numbers, and nothing else is
done: a row may be meant so."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence

from pairtune.pairs.already_rendered import BEGINS, OPENINGS
from pairtune.pairs.cells import as_word, is_empty, read_literal, says_nothing
from pairtune.pairs.context import OTHER_NAMES, turned_by
from pairtune.pairs.example import Example
from pairtune.pairs.formats import Format
from pairtune.pairs.guess import values_in
from pairtune.pairs.messages import strings_in, text_of
from pairtune.pairs.names import numbers_as
from pairtune.pairs.readers import begins_with
from pairtune.pairs.speakers import begins_with_speaker, holds_users_turn, speakers_in

_ENDINGS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "[/INST]")
_ENDINGS += ("<|END_OF_TURN_TOKEN|>", "<｜end▁of▁sentence｜>", "<eos>")
_OF_TEMPLATES = [token for token in (*OPENINGS, *BEGINS, *_ENDINGS) if token not in ("<s>", "<role>")]  # HTML's
_TOKEN = re.compile("|".join(map(re.escape, _OF_TEMPLATES)) + r"|</s>\s*\Z")
# What a failed generation, an annotation tool or a spreadsheet leaves in place of an answer
_NO_ANSWER = re.compile(
    r"[\s\-–—.·•*_/\\|,;:?!\"'()\[\]{}<>\u200b-\u200f\ufeff]+|undefined|nil|na|todo|tbd"
    r"|[\[(<{](?:empty|removed|deleted|redacted|no (?:response|answer|output)|todo|tbd|insert\b[^\])>}]*)[\])>}]"
    r"|no (?:response|answer|output)\.?|#(?:REF!|N/A|VALUE!|NAME\?|DIV/0!|NUM!|NULL!)|=[A-Z]+\([A-Z]+\d.*\)"
    r"|\{\"error\".*|.{0,60}\brate limit\b.{0,60}|(?:[a-z]+ ){0,2}error\b.{0,40}\b[45]\d\d\b.{0,120}",
    re.IGNORECASE | re.DOTALL,
)
_LONGEST_ERROR = 300  # characters
_DAMAGED = re.compile(
    r"&(?:amp|quot|lt|gt|nbsp|apos|#\d{2,4}|#x[0-9a-f]{2,4});|Ã[\x80-\xbf©¼¶¤Ÿ€]|â€[™œ\x9d“”˜¦]|\ufffd|_x000[dD]_"
)
_MARKS_OF_DAMAGE = ("&", "Ã", "â€", "\ufffd", "_x000")  # one of which it has
_TO_BE_FILLED = re.compile(r"\{\{ *\w+ *\}\}|(?<![\w\\'\"$])\{[a-z_]{3,20}\}(?!['\"])")
_NEW_LINES = re.compile(r"\\n(?![a-z]).*\\n(?![a-z])|(?:\\n){2}")
_OBJECT = re.compile(r"\s*(?:b?['\"]|array\(|[\[{]).*['\"\])}]\s*", re.DOTALL)
_A_PASSAGE = 40  # characters
_A_WORD, _A_LOOK = 16, 32  # characters
_MEDIUM = r"<\|?(?:image|audio|video)(?:_\d+|_pad)?\|?>"
_PLACEHOLDER = re.compile(rf"^[ \t]*{_MEDIUM}|{_MEDIUM}[ \t]*$", re.MULTILINE)  # not within a sentence about the tag


def grades_of(names: Sequence[str]) -> list[tuple[str, str]]:
    """Returns columns of numbers that grade the two answers, by their names: chosen_score and rejected_score, the one
    that has to be higher first."""
    found, by_word = [], {name.lower(): name for name in names}
    for name in names:
        other = by_word.get(name.lower().replace("chosen", "rejected")) if "chosen" in name.lower() else None
        kind = numbers_as(name) if other else ""
        found += [(name, other)] if kind == "scores" else [(other, name)] if kind == "ranks" else []
    return found


def held_by(names: Sequence[str], rows: Iterable[dict]) -> dict[str, str]:
    """Returns what columns hold, in words, where it shows what they are for: a few values, or a sentence."""
    rows, held = list(rows) if names else [], {}
    for name in names:
        cells = [cell for row in rows if not is_empty(cell := row.get(name))]
        few = cells if values_in(cells) else []
        values = {" ".join(cell.split()) if isinstance(cell, str) else as_word(cell) for cell in few} - {""}
        if values and max(map(len, values)) <= _A_WORD and len(cells) >= 3 * len(values):
            held[name] = ", ".join(value if value.isprintable() else repr(value) for value in sorted(values))
        elif cells and isinstance(cells[0], str) and " " in cells[0].strip():
            text = " ".join(cells[0].split())
            held[name] = repr(text if len(text) <= _A_LOOK else f"{text[: _A_LOOK - 3]}...")
        elif cells and isinstance(cells[0], list | dict):
            text = " ".join(repr(cells[0]).split())
            held[name] = text if len(text) <= _A_LOOK else f"{text[: _A_LOOK - 3]}..."
    return held


def of_row(row: dict, form: Format, grades: Sequence[tuple[str, str]]) -> Iterator[str]:
    """Yields what is to be asked about a row's columns.

    Args:
        form: That the row is read by.
        grades: From grades_of, of columns that nobody reads.
    """
    for name in turned_by(row, form.columns) if form.is_paired else ():
        yield f"turned round, as {name} says"
    for better, worse in grades:
        numbers = [_number(row.get(name)) for name in (better, worse)]
        if None not in numbers and numbers[0] < numbers[1]:
            yield f"{better} below {worse}"
    for name in {"scores", "ranks"} & form.columns.keys():
        known = {number for cell in row[name] if (number := _number(cell)) is not None}
        if name == "scores" and -1 in known and max(known) > 1 and min(known - {-1}) >= 0:
            yield "a score of -1, read as the lowest"
        if name == "ranks" and 0 in known:
            yield "a rank of 0, read as the best"
    for name in form.says_nothing_in(row):
        yield f"{name} is none, nan or so: left out"
    systems = [name for name in ("system", *OTHER_NAMES) if not is_empty(row.get(name)) and not says_nothing(row[name])]
    for name in systems[1:]:
        if row[name] != row[systems[0]]:
            yield f"{name} beside {systems[0]}: not read"


def of_example(example: Example, tokenizer=None) -> Iterator[str]:
    """Yields what is to be asked about what a question and its answers say.

    Args:
        tokenizer: What writes them, if that is known: what is a special token in a text is asked of it.
    """
    asked = text_of(example.prompt[-1]) if example.prompt else ""
    answers = [text_of(turns[-1]) for turns in example.answers]
    if _is_none(asked):
        yield "a prompt that is none, an error or so"
    if any(map(_is_none, answers)):
        yield "an answer that is none, an error or so"
    elif any(map(_is_object, answers)):
        yield "an answer that is a list or object as text"
    if any("<think>" in answer and "</think>" not in answer for answer in answers):
        yield "a thought without an end"
    if any(len(answer) >= _A_PASSAGE and answer.strip() in asked for answer in answers):
        yield "a prompt that holds its answer"
    if sum(turn["role"] == "system" for turn in example.prompt) > 1:
        yield "several system messages"
    if any(map(_is_damaged, (asked, *answers))):
        yield "text that looks damaged, as by &amp; or Ã©"
    is_first = all(turn["role"] == "system" for turn in example.prompt[:-1])
    if is_first and len({begins_with(answer, asked) for answer in answers}) == 2:
        yield "one answer repeats the question"
    if not (tokenizer and tokenizer.is_plain) and speakers_in(asked):
        yield "speakers within one message"
    if any(map(holds_users_turn, answers)):
        yield "a user's turn within an answer"
    if any(map(begins_with_speaker, answers)):
        yield "an answer begins with Assistant:"
    prompts = [
        text for text in strings_in([turn.get("content") for turn in example.prompt]) if "<" in text or "[" in text
    ]
    marked = [*prompts, *(text for text in answers if "<" in text or "[" in text)]
    special = {match[0].strip() for text in marked for match in _TOKEN.finditer(text)}
    if tokenizer and not all(map(tokenizer.holds_special, special)):
        yield "another model's special tokens"
    if any(map(_PLACEHOLDER.search, prompts)) or len(asked) < _LONGEST_ERROR and _TO_BE_FILLED.search(asked):
        yield "a placeholder such as <image> or {question}"


def _is_none(text: str) -> bool:
    return says_nothing(text) or len(text) < _LONGEST_ERROR and _NO_ANSWER.fullmatch(text.strip()) is not None


def _is_object(text: str) -> bool:
    """Says whether a text is what JSON or Python writes of a list, an object or bytes."""
    if not text.lstrip().startswith(("[", "{", "b'", 'b"', "array(")) or not _OBJECT.fullmatch(text):
        return False
    return read_literal(text) is not None or text.lstrip()[0] in "ba"


def _is_damaged(text: str) -> bool:
    """Says whether a text has entities, UTF-8 read as Latin-1, lost characters, or line ends as two characters."""
    if any(mark in text for mark in _MARKS_OF_DAMAGE) and _DAMAGED.search(text):
        return True
    return "\\n" in text and "\n" not in text and _NEW_LINES.search(text) is not None


def _number(cell) -> float | None:
    if isinstance(cell, bool) or not isinstance(cell, int | float | str):
        return None
    try:
        number = float(cell)
    except (ValueError, OverflowError):  # of 400 digits
        return None
    return None if math.isnan(number) else number
