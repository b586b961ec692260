"""What a sweep tries: key=value with several values, every combination of them, and a readable name for each.

A comma outside brackets, braces and quotes parts alternatives: `lora.rank=8,16` is two runs, and
`lora.modules=[q_proj,v_proj]` one value.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from pairtune.config.reading import read_value
from pairtune.errors import UserError

PAIRS = {"[": "]", "{": "}", "(": ")"}
BEFORE_QUOTE = "[{(,: "  # elsewhere it is an apostrophe
LONGEST, LONGEST_VALUE = 160, 40  # signs of a name, of a value in it
IMPORTABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
BY_THE_SWEEP = {"output_dir": "each run has a folder of its own in it", "resume": "each run goes on where it was"}


@dataclass(frozen=True)
class Combination:
    """One run of a sweep.

    Attributes:
        name: Of its folder.
        differs: What it has of the keys with alternatives, as it was written.
        words: All key=value and ~key, in the order that they were given.
    """

    name: str
    differs: dict[str, str]
    words: list[str]


def combinations(overrides: Sequence[str]) -> list[Combination]:
    """Returns every combination of alternatives, the last key's varying fastest.

    Raises:
        UserError: No key has alternatives, or one has a value twice or none, or one stands twice, or may not have them.
    """
    keys = Counter(word.partition("=")[0].lstrip("~") for word in overrides)
    values = {}  # by the place of the word
    for place, word in enumerate(overrides):
        key, _, written = word.partition("=")
        if key in BY_THE_SWEEP and (key == "resume" or len(split(written)) > 1):
            raise UserError(f"{word}: is not for a sweep to vary: {BY_THE_SWEEP[key]}; leave it out")
        if len(found := split(written)) > 1:
            _check(word, key, found)
            if keys[key] > 1:
                raise UserError(f"{word}: {key} stands twice; of a key with alternatives give all of them at once")
            values[place] = found
    if not values:
        raise UserError(
            "sweep: no key has alternatives, such as loss.beta=0.05,0.1; [a,b] is one value; `tune run` does one run"
        )
    named = _names([(overrides[place].partition("=")[0], found) for place, found in values.items()])
    result = []
    for choice in product(*(range(len(found)) for found in values.values())):
        words, differs = list(overrides), {}
        for (place, found), number in zip(values.items(), choice, strict=True):
            key = overrides[place].partition("=")[0]
            differs[key] = found[number]
            words[place] = f"{key}={found[number]}"
        name = ",".join(of_key[number] for of_key, number in zip(named, choice, strict=True))
        if len(name) > LONGEST:
            name = f"{name[:LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        result.append(Combination(name, differs, words))
    return result


def split(written: str) -> list[str]:
    """Returns the alternatives that a value holds; what is not closed again is one value, for others to refuse."""
    found, open_, quote = [""], [], ""
    for sign in written:
        before = found[-1][-1:]
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"" and (not before or before in BEFORE_QUOTE):
            quote = sign
        elif sign in PAIRS:
            open_.append(PAIRS[sign])
        elif open_ and sign == open_[-1]:
            open_.pop()
        elif sign == "," and not open_:
            found.append("")
            continue
        found[-1] += sign
    return [written] if quote or open_ else [one.strip() for one in found]


def _check(word: str, key: str, found: list[str]) -> None:
    if "" in found:
        raise UserError(f"{word}: one of its alternatives is empty; take out a comma, or write it as null or ''")
    read = [read_value(key, one, word) for one in found]
    for number, value in enumerate(read):
        if any(type(value) is type(other) and value == other for other in read[:number]):
            raise UserError(f"{word}: {found[number]} is there twice; each alternative is one run")


def _names(swept: list[tuple[str, list[str]]]) -> list[list[str]]:
    """Returns key=value of each alternative of each key, short, fit for a folder's name, and distinct."""
    keys = [key for key, _ in swept]
    return [[f"{_short(key, keys)}={value}" for value in _distinct(found)] for key, found in swept]


def _short(key: str, keys: list[str]) -> str:
    """The last parts of a key that no other has: beta of loss.beta."""
    parts = key.split(".")
    ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
    others = [other for other in keys if other != key]
    return next((end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)), key)


def _distinct(values: list[str]) -> list[str]:
    for shorten in (_last_part, str):
        found = [re.sub(r"[^\w.+-]+", "-", shorten(value)).strip(".")[:LONGEST_VALUE] for value in values]
        if len({one.lower() for one in found}) == len(found) and all(found):
            return found
    return [f"{one}.{number}" for number, one in enumerate(found, 1)]


def _last_part(value: str) -> str:
    if IMPORTABLE.fullmatch(value):
        return value.rpartition(".")[2]
    return value.rstrip("/").rpartition("/")[2]
