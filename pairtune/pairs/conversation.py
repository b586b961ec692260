"""An Example's conversations as tokens, and whether the chat template has written what the row says.

A template may do with an answer what it likes: leave its thoughts out, trim it, open a thought in the prompt that is
served and none in the conversation that is trained. What it wrote is compared with what it was given.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from pairtune.pairs.example import BadRow, Example, Skip
from pairtune.pairs.messages import text_of, thoughts_of
from pairtune.tokenizer.hf import Rendered, common_prefix
from pairtune.tokenizer.template import ANSWER_END

Span = tuple[int, int]
_THOUGHT_TAGS = re.compile(r"</?(?:think|thinking|thought)>")
_FORMS = (  # in which a template writes a text
    lambda text: text,
    lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    lambda text: json.dumps(text)[1:-1],
    lambda text: repr(text)[1:-1],
)
GIVE_ANOTHER = "Give a template that writes it, tokenizer.chat_template=FILE.jinja, or take it out of the rows."


@dataclass
class Written:
    """What the tokenizer made of an Example: tokens, and what the template did on the way.

    Attributes:
        asked: The prompt alone, with the generation prompt: what is served.
        wholes: Prompt and answer, for each answer.
        unscored: For each answer, spans of `wholes` that are no assistant's: what tools return.
        served_apart: What the served prompt goes on with where a conversation does not, in words; "" where it begins
            them.
        opened: What the template writes between the served prompt and an answer.
        respaced: White space of an answer is not as it was given.
        left_out: Whose turn of the prompt the template does not write whole; "" where it does.
    """

    asked: list[int]
    wholes: list[list[int]]
    unscored: list[list[Span]] = field(default_factory=list)
    served_apart: str = ""
    opened: str = ""
    respaced: bool = False
    left_out: str = ""


def write(example: Example, tokenizer) -> Written:
    """Returns an example's conversations.

    Raises:
        BadRow: The template leaves out part of an answer.
        Skip: It does not write tools, or what is called.
        Refusal: It takes no such conversation.
    """
    if tokenizer.is_plain and example.written:
        prompt, *answers = example.written
        texts = [text for text in answers if text is not None]
        wholes = [tokenizer.render_text(prompt, text) for text in texts]
        return Written(tokenizer.render_text(prompt), wholes, [[] for _ in wholes])
    options = {"tools": example.tools, "arguments": example.arguments}
    asked = tokenizer.rendered(example.prompt, add_generation_prompt=True, **options)
    rendered = [tokenizer.rendered([*example.prompt, *turns], **options) for turns in example.answers]
    written = Written(asked.tokens, [whole.tokens for whole in rendered])
    if asked.text is not None:
        _compare_prompt(example, asked.text, written)
    for turns, whole in zip(example.answers, rendered, strict=True):
        if asked.text is not None:
            _compare(example, turns, asked.text, whole.text, written)
        written.unscored.append(_spans_of_tools(example.prompt, turns, whole, tokenizer, options))
    return written


def _compare(example: Example, turns: list[dict], asked: str, whole: str, written: Written) -> None:
    """Compares an answer as it was given with the text of its conversation.

    Raises:
        BadRow: Part of it is not there.
    """
    start = _common_length(asked, whole)
    apart = asked[start:]
    if apart or not _is_all(turns, whole, start):
        _look_for_pieces(turns, whole, start, written, is_apart=bool(apart))
    first = text_of(turns[0]).strip()
    if apart:
        written.served_apart = f"{_short(apart)} where the conversation has {_short(whole[start:])}"
    elif first and not thoughts_of(turns[0]) and first in whole[start:]:
        written.opened = written.opened or whole[start : whole.index(first, start)].strip()


def _is_all(turns: list[dict], whole: str, start: int) -> bool:
    """Says whether one text is all that an answer says, and stands in its conversation as it was given."""
    said = list(_pieces(turns[0])) if len(turns) == 1 else []
    return said == [("content", text_of(turns[0]))] and whole.find(said[0][1], start) >= 0


def _look_for_pieces(turns: list[dict], whole: str, start: int, written: Written, *, is_apart: bool) -> None:
    """Finds all that an answer says in the text of its conversation, whatever the white space.

    Args:
        start: Where the served prompt ends, or no longer is the conversation's: `is_apart`.

    Raises:
        BadRow: Part of it is not there.
    """
    packed, begin = _packed(whole), len(_packed(whole[:start]))
    # what the served prompt goes on with may begin as the answer does: a piece has to end later
    least = begin + 1 if is_apart else 0
    at = 0 if is_apart else begin
    for turn in turns:
        turn_at = at
        for what, piece in _pieces(turn):
            end = _find(packed, piece, turn_at if what == "tool calls" else at, least)
            if what == "tool calls" and end is None:
                raise Skip("the chat template does not write tool calls")
            if end is None:
                raise BadRow(
                    f"the chat template leaves out part of an answer, {_name(turn, what)}: {_short(piece)}. "
                    f"{GIVE_ANOTHER}",
                    f"the chat template leaves out part of an answer, {_name(turn, what)}",
                )
            at = max(at, end) if what != "tool calls" else at
        written.respaced |= text_of(turn) not in whole


def _compare_prompt(example: Example, asked: str, written: Written) -> None:
    """Compares a prompt as it was given with the text that it became. Earlier thoughts may be left out: they are when
    the model is served.

    Raises:
        Skip: The template does not write what is called, or may be called.
    """
    for tool in example.tools or []:
        name = tool.get("name") or (tool.get("function") or {}).get("name")
        if name and _packed(name) not in _packed(asked):
            raise Skip("the chat template does not write tool descriptions")
    for turn in example.prompt:
        for what, piece in _pieces(turn):
            if what == "thoughts" or piece in asked or _find(_packed(asked), piece, 0) is not None:
                continue
            if what == "tool calls":
                raise Skip("the chat template does not write tool calls")
            written.left_out = written.left_out or turn["role"]


def _pieces(turn: dict) -> Iterator[tuple[str, str]]:
    """Yields what a turn says, in pieces that a template may set apart, and what each is."""
    if thoughts := thoughts_of(turn):
        yield "thoughts", thoughts
    content = text_of(turn)
    pieces = _THOUGHT_TAGS.split(content) if turn["role"] == "assistant" else [content]
    for i, piece in enumerate(pieces):
        if piece.strip():
            yield ("content" if i == len(pieces) - 1 else "thoughts"), piece
    for call in turn.get("tool_calls", []):
        function = call.get("function") or call
        if name := function.get("name"):
            yield "tool calls", name
        arguments = function.get("arguments")
        for text in _leaves(arguments):
            yield "tool calls", text


def _leaves(value) -> Iterator[str]:
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str) and value.strip():
        yield value


def _find(packed: str, piece: str, at: int, least: int = 0) -> int | None:
    """Returns where a piece ends, written as it is, as a JSON string, or as Python's; None if it is not there.

    Args:
        at, least: Where it begins, and where it ends, at the earliest.
    """
    for write in _FORMS:
        form = _packed(write(piece))
        place = packed.find(form, max(at, least - len(form)))
        if place >= 0:
            return place + len(form)
    return None


def _name(turn: dict, what: str) -> str:
    if turn["role"] == "tool":
        return "what a tool returns"
    return {"content": "its text", "thoughts": "its thoughts"}[what]


def _spans_of_tools(prompt: list[dict], turns: list[dict], whole: Rendered, tokenizer, options: dict) -> list[Span]:
    """Returns where what tools return stands in a conversation's tokens: from behind the end of an assistant's turn to
    the beginning of the next one's.

    Raises:
        Skip: The template writes a turn in another way once others follow it.
    """
    spans, first = [], 0
    while first < len(turns) - 1:
        results = len(list(takewhile(lambda turn: turn["role"] == "tool", turns[first + 1 :])))
        behind = first + 1 + results
        before = [*prompt, *turns[: first + 1]]
        opened = tokenizer.render([*prompt, *turns[:behind]], add_generation_prompt=True, **options)
        result = {**turns[first + 1], "content": ANSWER_END + text_of(turns[first + 1])}
        changed = tokenizer.render([*before, result, *turns[first + 2 :]], **options)
        content, stop = len(common_prefix(whole.tokens, changed)), len(common_prefix(whole.tokens, opened))
        ends = [i for i in range(content) if whole.tokens[i] in tokenizer.end_ids]
        if not ends or stop < content:
            raise Skip("the chat template writes the turns of an answer in another way once others follow")
        spans.append((ends[-1] + 1, stop))
        first = behind
    return spans


def _packed(text: str) -> str:
    return "".join(text.split())


def _common_length(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _short(text: str) -> str:
    shown = repr(text.strip())
    return shown if len(shown) <= 60 else shown[:57] + "..."
