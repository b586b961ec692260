"""What a cell of a row holds: its kind, in words; and messages that were written into a cell as text."""

import ast
import json
import re

_TRANSCRIPT = re.compile(r"\n\nHuman:|Human:.*\n\nAssistant:", re.DOTALL)
_MESSAGES_AS_TEXT = re.compile(r"""\s*\[?\s*\{\s*(["'])(role|from|content|value)\1\s*:""")
# As other tools write an empty cell in a text
_NOTHING = (
    "nan",
    "none",
    "null",
    "n/a",
    "n.a.",
    "<na>",
    "\\n",
    "-",
    "--",
    "—",
    "noinput",
    "nooutput",
    "no input",
    "keine",
)
_NOTHING += ("aucun", "ninguno", "nessuno", "nenhum", "无")
_BETWEEN_MESSAGES = re.compile(r"\}\s*\n\s*\{")  # as numpy writes them, without a comma; no text of theirs has a line


def kind_of(value) -> str:
    """Returns what a cell holds: transcript, text, texts, message, messages, conversations, pairs of texts, or the name
    of a Python type."""
    if isinstance(value, str):
        return "transcript" if _TRANSCRIPT.match(value) else "text"
    if is_message(value):
        return "message"
    if isinstance(value, list) and value:
        kinds = {"messages": is_message, "pairs": is_pair, "texts": is_text, "conversations": is_conversation}
        for kind, belongs in kinds.items():
            if all(map(belongs, value)):
                return kind
    return type(value).__name__


def is_message(value) -> bool:
    if not isinstance(value, dict) or not either(value, "role", "from"):
        return False
    return calls_tools(value) or either(value, "content", "value") is not None


def is_text(value) -> bool:
    return isinstance(value, str)


def is_conversation(value) -> bool:
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_pair(value) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(map(is_text, value))


def calls_tools(message: dict) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def is_empty(value) -> bool:
    return value in (None, "", "[]", "{}", [], {})  # JSON in a text, too


def says_nothing(value) -> bool:
    """Says whether a cell is a word for nothing, such as nan, which pandas makes of an empty one."""
    if not isinstance(value, str) or len(value) > 20:
        return False
    word = value.strip().lower()
    return word in _NOTHING or word[:1] in "(<[" and word[1:-1] in _NOTHING


def as_word(value) -> str:
    """Returns a choice's value as a word to compare: 1, 1.0 and "1" are one; null is none."""
    if value is None:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def either(message: dict, name: str, other_name: str):
    """Arrow fills the keys that a message lacks with None."""
    return message[name] if message.get(name) is not None else message.get(other_name)


def in_words(kinds: str) -> str:
    words = {
        "transcript": r"text that starts with \n\nHuman:",
        "messages": "list of messages",
        "texts": "list of texts",
    }
    words |= {"pairs": "list of [question, answer]", "conversations": "list of conversations"}
    return " or ".join(words.get(kind, kind) for kind in kinds.replace("text|transcript", "text").split("|"))


def shown(value, most: int = 60) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{kind_of(value)}, {text if len(text) <= most else text[: most - 3] + '...'}"


def read_messages(text: str):
    """Returns the messages that are written in a text as JSON or as Python prints them; None where there are none.

    Raises:
        ValueError: They begin as messages do, and cannot be read.
    """
    if not _MESSAGES_AS_TEXT.match(text):
        return None
    value = read_literal(text)
    if value is None:
        raise ValueError("begins as messages do and is no whole JSON or Python")
    return value if kind_of(value) in ("message", "messages") else None


def read_literal(text: str):
    """Returns the list or object that a text is, written as JSON or as Python prints it; None where it is neither."""
    if text.strip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval, _read_numpy):
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return value if isinstance(value, list | dict) else None
    return None


def _read_numpy(text: str):
    return ast.literal_eval(_BETWEEN_MESSAGES.sub("}, {", text))


def without_nulls(value):
    """Returns what Arrow made of lists and objects without the nulls by which it fills keys that an object lacks."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value
