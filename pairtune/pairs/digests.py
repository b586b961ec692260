"""Digests of pairs, by which runs and caches tell whether they have the same ones. A file that was written holds them:
another digest would make strangers of the same pairs."""

import hashlib
from array import array
from collections.abc import Iterator, Sequence

import numpy as np

from pairtune.pairs.packed import PARTS, PackedPairs
from pairtune.pairs.pair import Pair

NUMBERS = {"weight": 1.0, "margin": 0.0}  # of a pair that has none of its own
UNSCORED = ("chosen_unscored", "rejected_unscored")


def digest_pair(pair: Pair) -> bytes:
    """Returns 16 bytes that stand for the pair's tokens; its row does not matter."""
    return digest_each([pair])[0]


def digest_each(pairs: Sequence[Pair]) -> list[bytes]:
    """Returns each pair's `digest_pair`."""
    return [hashlib.blake2b(content, digest_size=16).digest() for content in _contents(pairs)]


def digest_questions(pairs: Sequence[Pair]) -> Iterator[bytes]:
    """Yields 16 bytes a pair that stand for its prompt and its chosen, or only, answer."""
    for content in _contents(pairs):
        tokens = np.frombuffer(content, np.int64)
        answer = tokens[0] + 1  # where the chosen one's length is
        if not tokens[answer]:
            answer += 1
        hashed = hashlib.blake2b(tokens[: tokens[0] + 1], digest_size=16)
        hashed.update(tokens[answer + 1 : answer + 1 + tokens[answer]])
        yield hashed.digest()


def short_digest(pair: Pair) -> int:
    """Returns the first four of these bytes, as a number: with its row it tells a pair from the others of a run."""
    return int.from_bytes(digest_pair(pair)[:4], "little")


def digest_in_order(pairs: Sequence[Pair]) -> str:
    """Returns 16 hexadecimal digits that stand for the pairs' tokens, rows and order, and weights and margins."""
    hashed = hashlib.sha256()
    rows = pairs.rows.tolist() if isinstance(pairs, PackedPairs) else [pair.row for pair in pairs]
    for row, content in zip(rows, _contents(pairs), strict=True):
        hashed.update(_numbers([row]))
        hashed.update(content)
    numbers = np.stack([numbers_of(pairs, name) for name in ("weight", "margin")])
    if (numbers[0] != 1).any() or numbers[1].any():
        hashed.update(numbers.tobytes())
    return hashed.hexdigest()[:16]


def numbers_of(pairs: Sequence[Pair], name: str) -> np.ndarray:
    """Returns each pair's weight or margin, [N] float64."""
    default = NUMBERS[name]
    if isinstance(pairs, PackedPairs):
        return pairs.numbers(name, default)
    return np.array([getattr(pair, name, default) for pair in pairs], np.float64)


def _contents(pairs: Sequence[Pair]) -> Iterator[memoryview | bytes]:
    """Yields each pair's tokens; and, where there are such, what of its answers is not scored."""
    if isinstance(pairs, PackedPairs):
        for tokens, rest in pairs.written():
            yield tokens.data if not rest else tokens.tobytes() + _unscored(rest)
    else:
        for pair in pairs:
            tokens = b"".join(_numbers(getattr(pair, part)) for part in PARTS)
            yield tokens + _unscored({name: getattr(pair, name, ()) for name in UNSCORED})


def _unscored(found: dict) -> bytes:
    spans = [[i for span in found.get(name, ()) for i in span] for name in UNSCORED]
    return b"".join(map(_numbers, spans)) if any(spans) else b""


def _numbers(values: Sequence[int]) -> bytes:
    return array("q", [len(values), *values]).tobytes()
