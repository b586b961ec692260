"""Messages as people write them to messages as chat templates read them: a role, a content, and what a turn holds
besides: tool calls, what a tool returned, thoughts."""

import re
from collections.abc import Iterator

from pairtune.pairs.cells import calls_tools, either, read_literal
from pairtune.pairs.example import BadRow, Example, Skip
from pairtune.tokenizer.template import THOUGHTS, joined

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
    "developer": "system",
}
# What templates read of a message besides role and content. Others, such as a score, are the data set's own.
_READ_BY_TEMPLATES = ("name", "tool_calls", "tool_call_id", "tool_responses", "tools", "recipient", *THOUGHTS)
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_TEXT_PARTS = ("text", "input_text", "output_text")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write "\ud83d", half of an emoji; UTF-8 cannot


def read_message(raw: dict) -> dict:
    """Returns a message under the names that templates know.

    Raises:
        BadRow: Its role is unknown, or its content is no text.
    """
    role, content = either(raw, "role", "from"), either(raw, "content", "value")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise BadRow(
            f"a message has the role {role!r}; known are {known}. Rename it, or remove the row.",
            "a message of an unknown role",
        )
    media = next((key for key in MEDIA if raw.get(key) not in (None, "", [])), None)
    if media:
        raise BadRow(
            f"a message holds {media}, and pairs are text. Remove the row, or its {media}.", f"a message holds {media}"
        )
    read = {key: raw[key] for key in _READ_BY_TEMPLATES if raw.get(key) not in (None, "", [])}
    if calls_tools(raw):
        read["tool_calls"] = _tool_calls(raw)
        content = "" if content is None else content
    return {"role": ROLES[role], "content": _content(content), **read}


def _tool_calls(raw: dict) -> list:
    calls = raw.get("tool_calls") or [{"type": "function", "function": raw["function_call"]}]
    calls = read_literal(calls) if isinstance(calls, str) else calls
    if isinstance(calls, list) and calls and all(isinstance(call, dict) and call for call in calls):
        return calls
    raise BadRow(
        "a message's tool_calls are no list of calls. Mend or remove the row.", "tool_calls that are no list of calls"
    )


def _content(content) -> str | list[dict]:
    """Returns a text, or text parts as `{"type": "text", "text"}`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        kind = type(content).__name__
        raise BadRow(
            f"a message's content is {kind}, expected text. Mend or remove the row.", f"a message's content is {kind}"
        )
    for part in content:
        if part.get("type", "text") not in _TEXT_PARTS or not isinstance(part.get("text"), str):
            what = str(part.get("type") or "part without text").removesuffix("_url")
            raise BadRow(
                f"a message holds an {what}, and pairs are text. Remove the row, or its {what}s.",
                f"a message holds an {what}" if what in ("image", "audio") else f"a message holds a part: {what}",
            )
    return [{"type": "text", "text": part["text"]} for part in content]


def text_of(message: dict) -> str:
    """Returns a message's content as one text."""
    return joined(message["content"])


def thoughts_of(message: dict) -> str:
    """Returns what a message holds as its thoughts, outside its content."""
    return next((message[key] for key in THOUGHTS if isinstance(message.get(key), str)), "")


def is_text_alone(message: dict) -> bool:
    """Says whether a message is a role and a text, which every tokenizer can write."""
    return message.keys() <= {"role", "content"} and isinstance(message["content"], str)


def strings_in(value) -> Iterator[str]:
    """Yields every text in what JSON can hold."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.items():
            yield from strings_in(list(item))
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def check_characters(example: Example) -> Example:
    """Returns the example. Raises Skip where a text holds what tokenizers cannot take, or what ends texts in C."""
    parts = {"prompt": [example.prompt, example.tools], "chosen": example.chosen, "rejected": example.rejected}
    for name, part in parts.items():
        for text in strings_in(part):
            if "\0" in text:
                raise Skip(f"{name} holds a NUL character")
            if not text.isascii() and _SURROGATE.search(text):
                raise Skip(f"{name} holds half a surrogate pair")
    return example
