"""What is asked of all pairs of a run before its first step, as arrays: no pair is made of packed ones. N pairs."""

from collections.abc import Sequence

import numpy as np

from pairtune.pairs.batch import ROW_MULTIPLE, document_length
from pairtune.pairs.packed import PARTS, PackedPairs
from pairtune.pairs.pair import Pair


def lengths_of(pairs: Sequence[Pair]) -> np.ndarray:
    """Returns tokens of prompt, chosen and rejected answer, [3, N]."""
    if isinstance(pairs, PackedPairs):
        return pairs.lengths
    return np.array([[len(getattr(pair, part)) for pair in pairs] for part in PARTS], np.int64)


def document_lengths(pairs: Sequence[Pair]) -> np.ndarray:
    """Returns each pair's batch.document_length, [N]."""
    if isinstance(pairs, PackedPairs):
        return pairs.of_each(lambda table: table.lengths.sum(0) - table.shared)
    return np.array([document_length(pair) for pair in pairs], np.int64)


def tokens_at(pairs: Sequence[Pair], part: str, index: int) -> np.ndarray:
    """Returns the token of this index, as of a list, in that part of each pair, [N]; -1 where there is none."""
    if isinstance(pairs, PackedPairs):
        return pairs.of_each(lambda table: table.tokens_at(PARTS.index(part), index))
    nth = slice(index, index + 1 or None)
    return np.array([(getattr(pair, part)[nth] or [-1])[0] for pair in pairs], np.int64)


def sets_of(pairs: Sequence[Pair]) -> dict[str, Sequence[Pair]]:
    """Returns the parts of held-out pairs that have names, by these; none where they have none."""
    return {name: pairs[part] for name, part in getattr(pairs, "sets", {}).items()}


def take(pairs: Sequence[Pair], indices: Sequence[int]) -> Sequence[Pair]:
    """Returns the pairs at these indices."""
    return pairs.take(indices) if isinstance(pairs, PackedPairs) else [pairs[i] for i in indices]


def longest_row(pairs: Sequence[Pair], multiple: int = ROW_MULTIPLE, *, mixed_within: int | None = None) -> int:
    """Returns the row length that each of these pairs fits in: the longest's, rounded up to a multiple.

    Rows of one length, several short pairs in one: few shapes for a compiler, little padding for a dense mask.

    Args:
        mixed_within: Every prompt has to fit with the answers of every other pair, too, where prompt and longer answer
            have no more than so many tokens: see losses/calling.py, mismatched.
    """
    lengths, (prompt, *answers) = document_lengths(pairs), lengths_of(pairs)
    if mixed_within is not None:
        prompts = np.sort(prompt)
        room = mixed_within - np.maximum(*answers)
        other = prompts[np.searchsorted(prompts, room, side="right") - 1]
        lengths = lengths + np.maximum(0, other - prompt)
    return -(-int(lengths.max(initial=0)) // multiple) * multiple
