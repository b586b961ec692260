"""Digests of pairs, by which runs and caches tell whether they have the same ones. A file that was written holds them:
another digest would make strangers of the same pairs."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from pairtune.pairs.tokenize import Pair


def digest_pair(pair: Pair) -> bytes:
    """Returns 16 bytes that stand for the pair's tokens; its row does not matter."""
    return _digest(_parts(pair), hashlib.blake2b(digest_size=16))


def short_digest(pair: Pair) -> int:
    """Returns the first four of these bytes, as a number: with its row it tells a pair from the others of a run."""
    return int.from_bytes(digest_pair(pair)[:4], "little")


def digest_in_order(pairs: Sequence[Pair]) -> str:
    """Returns 16 hexadecimal digits that stand for the pairs' tokens, rows and order."""
    parts = (part for p in pairs for part in ([p.row], *_parts(p)))
    return _digest(parts, hashlib.sha256()).hex()[:16]


def _parts(pair: Pair) -> list[Sequence[int]]:
    """Returns a pair's tokens; and, where there are such, what of its answers is not scored."""
    spans = (getattr(pair, name, ()) for name in ("chosen_unscored", "rejected_unscored"))
    unscored = [[i for span in of_one for i in span] for of_one in spans]
    return [pair.prompt, pair.chosen, pair.rejected, *(unscored if any(unscored) else [])]


def _digest(parts: Iterable[Sequence[int]], hashed) -> bytes:
    for tokens in parts:
        hashed.update(array("q", [len(tokens), *tokens]).tobytes())
    return hashed.digest()
