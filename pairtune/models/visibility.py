"""Who sees whom in a PairBatch, told as each attention kernel wants to be told it.

A token sees its own document's prefix and its own tail, nothing behind itself. Where a layer has a sliding window
(Mistral, Phi 3, Qwen 2, Gemma 2), it sees of these the keys whose position is less than `window` before its own.
Positions are a conversation's: a rejected tail follows its prefix. All that is said here is made from a batch's
documents; `dense_mask` defines the truth, and the tests compare the others with it.

B rows, S row length, T = B S.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from pairtune.pairs.batch import ROW_MULTIPLE, Document, PairBatch, to_device

# A dense mask


def dense_mask(batch: PairBatch, window: int | None = None) -> Tensor:
    """Returns the [B, S, S] boolean mask (True = attend). Padding attends to padding, so no row is empty."""
    document, segment, position = batch.document, batch.segment, batch.input_pos
    same_document = document[:, :, None] == document[:, None, :]
    visible = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
    size = document.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=document.device).tril()
    mask = same_document & visible & causal
    return mask & (position[:, :, None] - position[:, None, :] < window) if window else mask


def dense_masks(batch: PairBatch, windows: Sequence[int | None]) -> dict[int | None, Tensor]:
    """Returns a mask a window, and under None the one without; a window as long as a row leaves nothing out.

    Args:
        windows: Of the layers.
    """
    return {window: dense_mask(batch, window) for window in _distinct(batch, windows)}


def _distinct(batch: PairBatch, windows: Sequence[int | None]) -> list[int | None]:
    return [window for window in {None: 0, **dict.fromkeys(windows)} if (window or 0) < batch.tokens.shape[1]]


# A call a document


@dataclass(frozen=True)
class Segments:
    """What a call a document needs to know."""

    rows: tuple[tuple[Document, ...], ...]
    device: torch.device
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)  # made when first asked for

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor:
        """Returns [queries, keys] bool, True = attend, for the last `queries` of `keys` positions in a row."""
        wanted = (queries, keys, window)
        if wanted not in self.masks:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=self.device).tril(keys - queries)
            self.masks[wanted] = mask.triu(keys - queries - window + 1) if window else mask
        return self.masks[wanted]


# FlexAttention


class KeyRanges(NamedTuple):
    """The keys j that query i of a row sees: prefix_start <= j < prefix_end, and own_start <= j <= i. [B, S] int32."""

    prefix_start: Tensor
    prefix_end: Tensor
    own_start: Tensor


def key_ranges(batch: PairBatch, window: int | None = None) -> KeyRanges:
    """Returns the keys that each query sees, as two ranges: of its prefix, for one in a tail, and of its own segment.

    Padding sees the padding before it.
    """
    table = []  # of each segment, in the order of tokens: its length, and what KeyRanges has
    for row in batch.rows:
        end = 0
        for d in row:
            table.append((d.prefix, 0, 0, d.start))
            end = d.start + d.prefix
            for tail in d.tails:
                table.append((tail, d.start, d.start + d.prefix, end))
                end += tail
        table.append((batch.tokens.shape[1] - end, 0, 0, end))
    on_device = to_device(torch.tensor(table, dtype=torch.int32), batch.tokens.device)
    by_token = on_device[:, 1:].repeat_interleave(on_device[:, 0], 0, output_size=batch.tokens.numel())
    start, end, own = by_token.view(*batch.tokens.shape, 3).unbind(-1)
    if window:
        column = torch.arange(batch.tokens.shape[1], device=own.device, dtype=torch.int32)
        own = torch.where(batch.document < 0, own, torch.maximum(own, column - window + 1))
        seen = (batch.input_pos - window + 1).clamp_min(0).to(torch.int32)  # the first position in the window
        start = torch.where(end > 0, start + seen, start)
    return KeyRanges(start.contiguous(), end.contiguous(), own.contiguous())


def block_masks(batch: PairBatch, windows: Sequence[int | None]) -> dict[int | None, BlockMask]:
    """Returns FlexAttention's mask a window, and under None the one without; a window as long as a row adds none.

    Args:
        batch: In rows of a multiple of 128 tokens.
        windows: Of the layers.
    """
    return {window: block_mask(key_ranges(batch, window)) for window in _distinct(batch, windows)}


def block_mask(ranges: KeyRanges) -> BlockMask:
    """Returns the mask of these ranges; blocks of 128 by 128 that nobody sees are left out.

    torch's own create_block_mask looks at all S x S pairs, where these tables are S x S / 128 numbers.
    """
    first, end, own = ranges
    rows, length = first.shape
    if length % ROW_MULTIPLE:
        raise ValueError(f"rows of {length} tokens: FlexAttention takes rows of a multiple of {ROW_MULTIPLE}")
    blocks = length // ROW_MULTIPLE
    column = torch.arange(length, device=first.device, dtype=torch.int32)
    starts = column[::ROW_MULTIPLE]

    def overlap(start: Tensor, stop: Tensor) -> Tensor:  # of each query's range with each block of keys, [B, S, blocks]
        stop = torch.minimum(stop[..., None], starts + ROW_MULTIPLE)
        return (stop - torch.maximum(start[..., None], starts)).clamp_min_(0)

    seen = overlap(first, end) + overlap(own, (column + 1).expand_as(own))
    pairs = seen.view(rows, 1, blocks, ROW_MULTIPLE, blocks).sum(3)  # that see each other, of each block
    is_full = pairs == ROW_MULTIPLE**2

    def sees(b, h, i, j):
        return ((j >= first[b, i]) & (j < end[b, i])) | ((j >= own[b, i]) & (j <= i))

    tables = *_ordered((pairs > 0) & ~is_full), *_ordered(is_full)
    return BlockMask.from_kv_blocks(*tables, BLOCK_SIZE=ROW_MULTIPLE, mask_mod=sees, seq_lengths=(length, length))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many blocks of keys each block of queries has, and their numbers, those first."""
    blocks = blocks.to(torch.int8)
    count = blocks.sum(-1, dtype=torch.int32)
    return count, blocks.argsort(dim=-1, descending=True, stable=True).to(torch.int32)


# Variable-length flash attention


@dataclass(frozen=True)
class Varlen:
    """Sequences of queries, and of the keys that they see: a causal mask that ends where both end does the rest.

    Queries lie in the order of tokens: a document's prefix with its first tail, then each further tail, then padding.
    Keys are a copy in which the prefix stands before every further tail again.

    Attributes:
        token: [keys] int64, which token (row * S + column) each key is of.
        own: [T] int64, which key each token is, but for a prefix's repetitions.
        again, repeated: [repetitions] int64, keys that are those, and their tokens.
        query_ends, key_ends: [sequences + 1] int32, cumulative lengths.
        most_queries, most_keys: Of a sequence.
    """

    token: Tensor
    own: Tensor
    again: Tensor
    repeated: Tensor
    query_ends: Tensor
    key_ends: Tensor
    most_queries: int
    most_keys: int


def varlen(batch: PairBatch) -> Varlen:
    """Returns the batch's sequences."""
    size = batch.tokens.shape[1]
    sequences = [pair for r, row in enumerate(batch.rows) for pair in _sequences(row, r * size, (r + 1) * size)]
    queries = [len(own) for _, own in sequences]
    keys = [len(prefix) + len(own) for prefix, own in sequences]
    token = torch.cat([torch.arange(part.start, part.stop) for pair in sequences for part in pair])
    lengths = torch.tensor([len(part) for pair in sequences for part in pair])
    is_own = torch.tensor([False, True]).repeat(len(sequences)).repeat_interleave(lengths)
    again = (~is_own).nonzero()[:, 0]
    index = (token, is_own.nonzero()[:, 0], again, token[again], _ends(queries), _ends(keys))
    return Varlen(*(to_device(t, batch.tokens.device) for t in index), max(queries), max(keys))


def _sequences(row: tuple[Document, ...], at: int, end: int) -> Iterator[tuple[range, range]]:
    """Yields the tokens of each sequence of a row: of a prefix that has been there before, and its own."""
    for document in row:
        prefix = range(at, at + document.prefix)
        for n, tail in enumerate(document.tails):
            at = prefix.stop if n == 0 else at
            seen, own = (range(0), range(prefix.start, at + tail)) if n == 0 else (prefix, range(at, at + tail))
            if own:
                yield seen, own
            at += tail
    if at < end:
        yield range(0), range(at, end)


def _ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
