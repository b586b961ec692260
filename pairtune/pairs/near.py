"""Texts that are nearly alike, by minhash: A. Broder 1997, "On the resemblance and containment of documents"."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

SHINGLE = 8  # bytes
HASHES, BANDS = 64, 16  # of 64 minima, any 4 of a band that are alike make two texts candidates
ALIKE = 0.8  # of the minima: about the share of shingles that two texts have in common
_RANDOM = np.random.default_rng(0)
_FACTORS = _RANDOM.integers(1, 2**63, HASHES, np.uint64) * np.uint64(2) + np.uint64(1)
_POWERS = np.array([pow(0x9E3779B97F4A7C15, k, 2**64) for k in range(SHINGLE)], np.uint64)


def signature(text: str) -> np.ndarray:
    """Returns the least of each hash over all of a text's shingles, [HASHES]."""
    content = np.frombuffer(text.encode("utf-8", "replace").ljust(SHINGLE), np.uint8).astype(np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(content, SHINGLE)
    shingles = np.unique((windows * _POWERS).sum(1, dtype=np.uint64))
    shingles ^= shingles >> np.uint64(29)
    return (shingles[:, None] * _FACTORS).min(0)


def near_duplicates(texts: Sequence[str], others: Sequence[str] = ()) -> list[tuple[int, int]]:
    """Returns (i, j) for each text i that is nearly an earlier one, j; with `others`, nearly one of these."""
    known = np.array([signature(text) for text in others], np.uint64).reshape(-1, HASHES)
    own = np.array([signature(text) for text in texts], np.uint64).reshape(-1, HASHES)
    found: dict[int, int] = {}
    for band in np.split(np.arange(HASHES), BANDS):
        places: dict[bytes, list[int]] = defaultdict(list)
        for j, row in enumerate(known[:, band]):
            places[row.tobytes()][:] = places[row.tobytes()] or [j]
        for i, row in enumerate(own[:, band]):
            first = places[row.tobytes()]
            if first and i not in found and np.mean(own[i] == (known if len(others) else own)[first[0]]) >= ALIKE:
                found[i] = first[0]
            if not first and not len(others):
                first.append(i)
    return sorted(found.items())
