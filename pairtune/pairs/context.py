"""What a row holds beside its question and answers: what comes before the question, tools, arguments of the template;
and columns that may be part of the question, which nobody may leave out in silence."""

import math
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace

from pairtune.errors import UserError
from pairtune.pairs.cells import as_word, either, is_empty, kind_of, read_literal, says_nothing, shown
from pairtune.pairs.example import BadRow, Example, Skip
from pairtune.pairs.messages import MEDIA, read_message, strings_in, text_of
from pairtune.pairs.names import BAD_GRADES, CHOICES, GRADES
from pairtune.pairs.ranked import TIE_WORDS
from pairtune.pairs.readers import as_label, system, transcript_turns, user

TEXT = "text|transcript"
# Columns that any form may have: system message, earlier turns, a text before the question and one behind it
CONTEXT = {"system": TEXT, "history": "pairs|messages", "context": f"{TEXT}|texts", "input": f"{TEXT}|texts"}
_OF_SYSTEM = ("system_prompt", "system_message", "system_instruction", "sys", "sys_prompt")
OTHER_NAMES = dict.fromkeys(_OF_SYSTEM, "system")
TOOLS = ("tools", "functions")
ARGUMENTS = "chat_template_kwargs"
NUMBERS = ("weight", "margin")  # which are read where `columns` says what they are, and only then
_MEDIA = (*MEDIA, "img", "photo", "picture")
_MEDIA += tuple(f"{kind}_{what}" for kind in MEDIA for what in ("path", "paths", "url", "urls"))
# Which may be part of the question, and do not say how: told, unless the prompt holds what they hold
_OF_A_QUESTION = ("prompt", "query", "question", "instruction", "instructions", "question_detail", "options", "context")
_OF_A_QUESTION += (
    "input",
    "input_text",
    "passage",
    "passages",
    "paragraph",
    "paragraphs",
    "excerpt",
    "abstract",
    "body",
)
_OF_A_QUESTION += (
    "document",
    "documents",
    "article",
    "articles",
    "source_text",
    "source_document",
    "story",
    "selftext",
)
_OF_A_QUESTION += ("background", "knowledge", "facts", "evidence", "premise", "persona", "additional_info")
_OF_A_QUESTION += ("additional_context", "code", "snippet", "table", "schema", "sql_schema", "email", "ticket")
_OF_A_QUESTION += ("transcript", "conversation", "conversations", "messages", "dialogue", "dialog", "turns")
DOUBTFUL = (*_MEDIA, *_OF_A_QUESTION)
_NUMBERED = re.compile(r"_?\d+$")
# Which say of a pair "chosen" or "rejected" for its better answer, and no review's verdict on the row
WINNERS = ("winner", "preferred", "preference", "better", "best", "human_preference", "preferred_response")
WINNERS += ("preferred_answer", "better_response_id", "choice")
# Which may say that a row's better answer is another one than its columns say
SWAPS = ("swapped", "swap", "is_swapped", "flipped", "flip", "is_flipped", "reversed", "is_reversed", "inverted")
SIDES = (*CHOICES, *SWAPS)
_NO_CHANCE = 4  # characters
_A_WORD = 40  # characters: longer ones are a text about it
_SIDES = re.compile(
    r"-1|[012ab]|true|false|yes|no|first|second|left|right|(model|response|answer|output|option)[_ ]?[012ab]"
)


def in_context(example: Example, row: dict, columns: set[str]) -> Example:
    """Returns the example with what these columns of its row hold: see CONTEXT.

    A system message that the prompt brings already, and a text that it holds, are not written twice.
    """
    row = {column: row[column] for column in columns if not is_empty(row.get(column))}
    example = _with_texts(example, row)
    context, prompt = system(row), example.prompt
    if prompt[:1] == context:
        prompt = prompt[1:]
    history = row.get("history", [])
    if kind_of(history) == "messages":
        turns = [read_message(raw) for raw in history]
    else:
        turns = [turn for asked, said in history for turn in (*user(asked), {"role": "assistant", "content": said})]
    start = sum(turn["role"] == "system" for turn in prompt)  # where the prompt holds its earlier turns already
    if turns != prompt[start : start + len(turns)] and turns != prompt[: len(turns)]:
        context += turns
    return replace(example, prompt=context + prompt, written=None) if context else example


def _with_texts(example: Example, row: dict) -> Example:
    """Returns the example with `context` before its last question, and `input` behind it."""
    if not (row.keys() & {"context", "input"}) or not example.prompt or example.prompt[-1]["role"] != "user":
        return example
    last = example.prompt[-1]
    asked = text_of(last)
    parts = ["\n\n".join(cell) if isinstance(cell, list) else cell for cell in map(row.get, ("context", "input"))]
    before, behind = ("" if not part or _is_held(part, asked) else part for part in parts)
    text = (f"{before}\n\n" if before else "") + asked + (f"\n{behind}" if behind else "")
    if text == asked:
        return example
    written = example.written
    written = (text, *written[1:]) if written and written[0] == asked else None
    return replace(example, prompt=[*example.prompt[:-1], {**last, "content": text}], written=written)


def _is_held(part: str, asked: str) -> bool:
    """Says whether a question holds a text as a whole, and not by chance, as one about 10 does a 1."""
    part = part.strip()
    if len(part) < _NO_CHANCE and not any(map(str.isalpha, part)):
        return part in map(str.strip, asked.splitlines())
    return re.search(rf"(?<!\w){re.escape(part)}(?!\w)", asked) is not None


def tools_of(row: dict) -> list | None:
    """Returns a row's tools as templates take them: as they are; bare functions as OpenAI's API wraps them."""
    for name in TOOLS:
        cell = row.get(name)
        if is_empty(cell):
            continue
        tools = read_literal(cell) if isinstance(cell, str) else cell
        tools = [tools] if isinstance(tools, dict) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise BadRow(
                f"column {name!r} holds {shown(cell)}, expected a list of tools. Mend or remove the row.",
                f"column {name!r} is no list of tools",
            )
        bare = name == "functions"
        return [{"type": "function", "function": tool} if bare and "function" not in tool else tool for tool in tools]
    return None


def arguments_of(row: dict) -> dict | None:
    """Returns what a row gives to its chat template, such as {"enable_thinking": False}."""
    cell = row.get(ARGUMENTS)
    if is_empty(cell):
        return None
    arguments = read_literal(cell) if isinstance(cell, str) else cell
    if not isinstance(arguments, dict):
        raise BadRow(
            f"column {ARGUMENTS!r} holds {shown(cell)}, expected an object. Mend or remove the row.",
            f"column {ARGUMENTS!r} is no object",
        )
    return {name: value for name, value in arguments.items() if value is not None}


def number_of(row: dict, name: str) -> float:
    """Returns a row's weight or margin, which CSV has as text.

    Raises:
        BadRow: It is no finite number, or a weight below 0.
        Skip: A weight of 0.
    """
    cell, found = row.get(name), None
    if isinstance(cell, int | float | str) and not isinstance(cell, bool):
        with suppress(ValueError, OverflowError):
            found = float(cell)
    if found is None or not math.isfinite(found) or (name == "weight" and found < 0):
        least = ", at least 0" if name == "weight" else ""
        raise BadRow(
            f"{name}: holds {shown(cell)}, expected a finite number{least}. Mend or remove the row.",
            f"{name}: no finite number{least}",
        )
    if name == "weight" and not found:
        raise Skip("weight of 0")
    return found


def is_doubtful(name: str) -> bool:
    """Says whether a column that is not used may be part of a question: document_2 and Context are, too."""
    return _plain(name) in DOUBTFUL


def _plain(name: str) -> str:
    return _NUMBERED.sub("", name.lower())


def check_doubtful(example: Example, row: dict, columns: list[str], key: str) -> None:
    """Refuses a row of which part of the question may be in a column that nobody reads.

    Args:
        columns: That are not used; those that are `is_doubtful` are looked at.
        key: Where the config describes the rows.

    Raises:
        BadRow: It has images, or the like.
        UserError: A text beside the prompt, which the prompt does not hold. `columns` says what to do with it.
    """
    asked = None
    for name in columns:
        cell = row.get(name)
        if is_empty(cell) or says_nothing(cell) or not is_doubtful(name):
            continue
        if _plain(name) in _MEDIA:
            raise BadRow(
                f"column {name!r} holds {kind_of(cell)}: rows with {name} are not read, pairs are text. "
                f"Remove the row, or leave the column out: {key}.columns={{{name}: null}}.",
                f"column {name!r}: pairs are text",
            )
        asked = " ".join(text for m in example.prompt for text in strings_in(m)) if asked is None else asked
        if not _is_in(cell, asked):
            before = f"{key}.columns={{input: {name}}} writes it behind the prompt, {{context: {name}}} before it"
            if kind_of(cell) in ("messages", "pairs"):
                before = f"{key}.columns={{history: {name}}} writes it before the prompt, as earlier turns"
            raise UserError(
                f"column {name!r} holds {shown(cell)}, which the prompt does not hold, and may be part of the "
                f"question. Say what it is: {before}, {{{name}: null}} leaves it out."
            )


def check_grades(row: dict, columns: list[str], key: str, theirs: dict) -> None:
    """Refuses a row of one answer and no label, of which a column that nobody reads may say how good it is.

    Args:
        columns: That are not used; those of GRADES are looked at.
        key: Where the config describes the rows.

    Raises:
        UserError: `columns` says what to do with it.
    """
    beside = [(name, name, row.get(name)) for name in columns]
    for path, name, cell in [*beside, *_of_the_last_message(row, theirs)]:
        is_word = isinstance(cell, str) and len(cell) <= _A_WORD
        if name in GRADES and not is_empty(cell) and (is_word or not isinstance(cell, str)):
            is_bad = name in BAD_GRADES
            if is_bad or isinstance(cell, list | dict):
                way_out = "Add a column label, true for a good answer and false for a bad one"
            elif is_word and as_label(cell) is None:
                line = f"{key}.columns={{{_with_its_column(path, theirs)}label: {{{path}: [GOOD, BAD]}}}}"
                way_out = (
                    f"Say what it is: {line}, with what it holds for a good answer and for a bad one in their place"
                )
            else:
                line = f"{key}.columns={{{_with_its_column(path, theirs)}label: {path}}}"
                way_out = (
                    f"Say what it is: {line} where true, 1 or thumbs_up is a good answer, and false, 0 or thumbs_down "
                    "a bad one"
                )
            without = f"{key}.columns={{{name}: null}} leaves it out" if path == name else "a file without it"
            said = "that the answer is a bad one" if is_bad else "how good the answer is"
            raise UserError(
                f"column {path!r} holds {shown(cell)}, and may say {said}, which no label does. {way_out}; or "
                f"{without}, and takes each answer for a good one."
            )


def _of_the_last_message(row: dict, theirs: dict) -> Iterator[tuple[str, str, object]]:
    """Yields what a conversation's last message says of itself: a dotted name, its last part, and what it holds. That
    it is not bad says nothing."""
    for column in ("messages", "conversations"):
        last = row[column][-1] if kind_of(row.get(column)) == "messages" else {}
        for name, value in last.items():
            inner = value.items() if isinstance(value, dict) else ()
            for path, key, cell in [(name, name, value), *((f"{name}.{key}", key, cell) for key, cell in inner)]:
                if not (key in BAD_GRADES and as_word(cell) in ("false", "0", "0.0", "no")):
                    yield f"{theirs.get(column, column)}.-1.{path}", key, cell


def _with_its_column(path: str, theirs: dict) -> str:
    """Returns what keeps a column under our name where a part of it has another, too."""
    column, dot, _ = path.partition(".")
    ours = next((name for name, their in theirs.items() if their == column), column)
    return f"{ours}: {column}, " if dot else ""


def as_chosen(example: Example, row: dict, columns: list[str], key: str) -> Example:
    """Returns a pair with its answers where a column that nobody else reads says that they belong: chosen or rejected.

    Args:
        columns: Those of SIDES that are not used.
        key: Where the config describes the rows.

    Raises:
        Skip: It says that neither is better.
        UserError: It says which is better in other words, which may be otherwise than the pair's columns do.
    """
    for name in columns:
        cell = row.get(name)
        if is_empty(cell) or not isinstance(cell, str | int | float):
            continue
        word = as_word(cell)
        if word == "chosen" or word == "rejected" and name in WINNERS:
            example = example if word == "chosen" else _turned(example)
        elif word in TIE_WORDS and name not in SWAPS:
            raise Skip("a tie")
        elif (_SIDES.fullmatch(word) or word == "rejected") and not (name in SWAPS and word in ("false", "no", "0")):
            raise UserError(
                f"column {name!r} holds {shown(cell)}, and may say which answer is better, beside columns that say so. "
                f"Say what it is: {key}.columns={{answers: [FIRST, SECOND], choice: {{{name}: [VALUE, VALUE]}}}}, with "
                "the answers' columns and what stands for each, and your own names in place of these words; or "
                f"{key}.columns={{{name}: null}} leaves it out."
            )
    return example


def turning_columns(names: Sequence[str], rows: Iterable[dict]) -> list[str]:
    """Returns the columns, of those that nobody else reads, that turn a pair in some of the rows."""
    names = [name for name in names if name in WINNERS]
    rows = list(rows) if names else []
    return [name for name in names if any(as_word(row.get(name)) == "rejected" for row in rows)]


def turned_by(row: dict, columns: Collection[str]) -> list[str]:
    """Returns the columns by which `as_chosen` turns a pair; `columns` are those that its form reads."""
    return [name for name in WINNERS if name not in columns and as_word(row.get(name)) == "rejected"]


def _turned(example: Example) -> Example:
    written = example.written and (example.written[0], example.written[2], example.written[1])
    return replace(example, chosen=example.rejected, rejected=example.chosen, written=written)


def _texts_in(content) -> list[str]:
    """Returns a message's texts; of what is no text and no list of parts, how it is written."""
    if isinstance(content, list):
        return [part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return [content if isinstance(content, str) else str(content or "")]


def _is_in(cell, asked: str) -> bool:
    """Says whether a prompt holds what a cell says, an assistant's turns aside."""
    if kind_of(cell) == "messages":
        turns = [message for message in cell if either(message, "role", "from") in ("user", "human")]
        texts = [text for turn in turns for text in _texts_in(either(turn, "content", "value"))]
        return all(text.strip() in asked for text in texts)
    if isinstance(cell, str):
        turns = transcript_turns(cell) if kind_of(cell) == "transcript" else user(cell.strip())
        return all(turn["content"] in asked for turn in turns)
    return not any(text.strip() not in asked for text in strings_in(cell))
