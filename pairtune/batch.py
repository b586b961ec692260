"""PairBatch: the one layout that preference pairs have on their way through a model.

A row holds documents one behind the other; a document is `prefix | chosen tail | rejected tail`. The prefix is what
the two conversations share: the prompt, and the answers' common beginning if they have one. So the prompt runs through
the model once, and no token is padding unless a row length is asked for. How attention respects this is attention.py.

B rows, S row length, P pairs, N scored tokens.
"""

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor


class Document(NamedTuple):
    """Where a pair lies in its row: first position, prefix length, and one tail length an answer."""

    start: int
    prefix: int
    tails: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.prefix + sum(self.tails)


@dataclass(frozen=True)
class PairBatch:
    """Pairs laid out in rows, and which tokens are scored.

    The three scored-token vectors say for each of N tokens: the position (flat, row * S + column) whose hidden state
    predicts it, its id, and whose answer it belongs to: chosen answers are 0..P-1, rejected ones P..2P-1. Tokens of a
    common beginning appear twice, once an answer; so does the prompt's last position.
    """

    tokens: Tensor  # [B, S] int64
    input_pos: Tensor  # [B, S] int64; the rejected tail restarts where the prefix ends
    document: Tensor  # [B, S] int64; -1 where padding
    segment: Tensor  # [B, S] int64; 0 prefix, 1 chosen tail, 2 rejected tail
    source: Tensor  # [N] int64
    target: Tensor  # [N] int64
    sequence: Tensor  # [N] int64
    answer_lengths: tuple[int, ...]  # tokens an answer, in the order of `sequence`; they add up to N
    num_pairs: int
    num_tokens: int  # without padding
    rows: tuple[tuple[Document, ...], ...]  # the same layout in Python numbers: lengths without a device sync

    def to(self, device: torch.device) -> "PairBatch":
        """Returns the batch with every tensor on `device`."""
        tensors = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **tensors)


def lay_out(pairs, row_length: int | None = None) -> PairBatch:
    """Returns the pairs' batch, in their order: one row without padding, or rows of `row_length` filled first-fit.

    Args:
        pairs: Objects with `prompt`, `chosen` and `rejected`, lists of token ids; the prompt is not empty.
        row_length: Tokens a row, for kernels that are compiled for a shape. None: as long as it needs to be.

    Raises:
        ValueError: A pair longer than `row_length`, an empty prompt or answer.
    """
    for pair in pairs:
        if not (pair.prompt and pair.chosen and pair.rejected):
            raise ValueError("a pair needs at least one token in its prompt and in each of its answers")
    num_shared = [_common_prefix_length(pair.chosen, pair.rejected) for pair in pairs]
    lengths = [len(p.prompt) + len(p.chosen) + len(p.rejected) - k for p, k in zip(pairs, num_shared, strict=True)]
    rows_of_pairs = _fill_rows(lengths, row_length)
    width = row_length or sum(lengths)
    shape = (len(rows_of_pairs), width)
    tokens, input_pos = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    document, segment = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    rows, sources, targets = [], {}, {}  # sources and targets by (pair, 0 chosen or 1 rejected)
    for r, members in enumerate(rows_of_pairs):
        start, documents = 0, []
        for i in members:
            pair, prompt, shared = pairs[i], len(pairs[i].prompt), num_shared[i]
            prefix, tails = prompt + shared, (len(pair.chosen) - shared, len(pair.rejected) - shared)
            row = Document(start, prefix, tails)
            documents.append(row)
            span = slice(start, start + row.length)
            tokens[r, span] = torch.tensor(pair.prompt + pair.chosen + pair.rejected[shared:])
            input_pos[r, span] = torch.cat([torch.arange(prefix + tails[0]), torch.arange(prefix, prefix + tails[1])])
            document[r, span] = i
            segment[r, start + prefix : start + prefix + tails[0]] = 1
            segment[r, start + prefix + tails[0] : span.stop] = 2
            # The hidden state at position t predicts token t + 1; the rejected tail lies behind the chosen one.
            first = r * width + start
            position = torch.arange(prompt - 1, prompt + len(pair.chosen) - 1)
            sources[i, 0] = first + position
            position = torch.arange(prompt - 1, prompt + len(pair.rejected) - 1)
            sources[i, 1] = first + position + (position >= prefix) * tails[0]
            targets[i, 0], targets[i, 1] = torch.tensor(pair.chosen), torch.tensor(pair.rejected)
            start = span.stop
        rows.append(tuple(documents))
    scored = [(i, answer) for answer in (0, 1) for i in range(len(pairs))]
    answer_lengths = tuple(len(targets[key]) for key in scored)
    return PairBatch(
        tokens=tokens,
        input_pos=input_pos,
        document=document,
        segment=segment,
        source=torch.cat([sources[key] for key in scored]),
        target=torch.cat([targets[key] for key in scored]),
        sequence=torch.repeat_interleave(torch.arange(2 * len(pairs)), torch.tensor(answer_lengths)),
        answer_lengths=answer_lengths,
        num_pairs=len(pairs),
        num_tokens=sum(lengths),
        rows=tuple(rows),
    )


def longest_row(pairs, multiple: int = 128) -> int:
    """Returns the row length that each of these pairs fits in: the longest's, rounded up to a multiple.

    Rows of one length, several short pairs in one: few shapes for a compiler, little padding for a dense mask.
    """
    longest = max(
        len(p.prompt) + len(p.chosen) + len(p.rejected) - _common_prefix_length(p.chosen, p.rejected) for p in pairs
    )
    return -(-longest // multiple) * multiple


def _common_prefix_length(a: list[int], b: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _fill_rows(lengths: list[int], row_length: int | None) -> list[list[int]]:
    """Returns indices of pairs row by row: each pair goes to the first row with room for it."""
    if row_length is None:
        return [list(range(len(lengths)))]
    rows, room = [], []
    for i, length in enumerate(lengths):
        if length > row_length:
            raise ValueError(f"a pair of {length} tokens does not fit a row of {row_length}")
        r = next((r for r, free in enumerate(room) if free >= length), len(rows))
        if r == len(rows):
            rows.append([])
            room.append(row_length)
        rows[r].append(i)
        room[r] -= length
    return rows
