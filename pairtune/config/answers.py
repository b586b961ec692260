"""Whoever brings a name of another system, as a key or as an option, is answered with what to set here."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pairtune.config import keys
from pairtune.config.names_elsewhere import ROWS, Elsewhere
from pairtune.config.reading import read_value
from pairtune.errors import UserError

# Keys whose values have other names elsewhere, and the name there of which the values are known
_NAMED_BY = {"optimizer": "optim", "lr_scheduler": "lr_scheduler_type"}
_BY_WORD = {word: row for rows in ROWS.values() for row in rows for word in row.words}


def answer(name: Any, value: Any) -> str:
    """Returns what to set here in place of a name of another system's, or ""."""
    row = _BY_WORD.get(_last_part(name))
    return _in_words(row, value) if row else ""


def answer_within(name: Any, value: Any) -> str:
    """Returns the same for the names of a block that we do not have, by their last parts."""
    if not isinstance(value, dict):
        return ""
    found = [(path, _BY_WORD.get(_last_part(path)), inner) for path, inner in _inner(value, f"{name}.")]
    return "; ".join(f"{path}: {_in_words(row, inner)}" for path, row, inner in found if row)


def check_dashes(words: Sequence[str], options: Iterable[str]) -> None:
    """Refuses keys that are written as options, --learning_rate 1e-4 or --learning-rate=1e-4, with what to write.

    All of them in one sentence, so that a command line of another system is answered at once.

    Args:
        options: Those that there are, of which a word may be the beginning.

    Raises:
        UserError: A key of ours, or another system's name of one.
    """
    options, answered = tuple(options), {}
    for word, following in zip(words, [*words, "-"][1:], strict=True):
        option, equals, value = word.partition("=")
        if not option.startswith("-") or any(known.startswith(option) for known in options):
            continue
        is_alone = not equals and (following.startswith(("-", "~")) or "=" in following)
        if said := _answer_to_option(option, None if is_alone else value or following):
            answered[option] = said
    if answered:
        first, *others = answered
        more = "".join(f"; {option}: {answered[option]}" for option in others)
        raise UserError(f"{first}: a key is set without dashes, as key=value; {answered[first]}{more}")


def _answer_to_option(option: str, value: str | None) -> str:
    """Returns what to write in place of an option, or "" where it is no key. Alone, --load_in_4bit, it is a switch."""
    name = option.lstrip("-").replace("-", "_")
    if name in _NAMED_BY and value and "." not in value:  # no import path, as --optimizer adamw
        return f"set {_BY_WORD[_NAMED_BY[name]].says(read_value(name, value, option))}"
    said = answer(name, "" if value is None else read_value(name, value, option))
    if name in keys.KEYS or said.startswith(f"here it is called {name}:"):
        said = ""
    elif not said and name.partition(".")[0] not in keys.KEYS:
        return ""
    return said or f"set {name}={value or '...'}"


def _in_words(row: Elsewhere, value: Any) -> str:
    text = row.says(value)
    first = text.partition("=")[0]
    if "=" in text and first.replace(".", "").replace("_", "").isalnum():
        return f"here it is called {first}: set {text}"
    return f"here {text}" if text.startswith("run ") else text


def _last_part(name: Any) -> str:
    return str(name).rpartition(".")[2].lower().replace("-", "_")


def _inner(block: dict, prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        if isinstance(value, dict) and _last_part(key) not in _BY_WORD:
            yield from _inner(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
