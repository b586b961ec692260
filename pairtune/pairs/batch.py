"""PairBatch: the one layout that preference pairs have on their way through a model.

A row holds documents one behind the other; a document is `prefix | chosen tail | rejected tail`. The prefix is what
the two conversations share: the prompt, and the answers' common beginning if they have one. So the prompt runs through
the model once, and no token is padding unless a row length is asked for. An unpaired row's document has one tail. How
attention respects this is attention.py.

B rows, S row length, P pairs, N scored tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor

ROW_MULTIPLE = 128  # rows of one length are a multiple of this: FlexAttention's blocks, and tiles of matrix products


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
    with_chosen: Tensor  # [<= P] int64, which pairs have a chosen answer: all of them, but for unpaired rows
    with_rejected: Tensor
    with_both: Tensor
    num_pairs: int
    num_tokens: int  # without padding
    rows: tuple[tuple[Document, ...], ...]  # the same layout in Python numbers: lengths without a device sync
    pairs: Sequence  # the pairs themselves, in their order

    def to(self, device: torch.device) -> "PairBatch":
        """Returns the batch with every tensor on `device`."""
        return replace(self, **{k: to_device(v, device) for k, v in vars(self).items() if isinstance(v, Tensor)})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Returns the tensor on `device`; a GPU goes on meanwhile, as it would not from memory that may be paged out."""
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def lay_out(pairs, row_length: int | None = None, *, score_end: bool = True) -> PairBatch:
    """Returns the pairs' batch, in their order: one row without padding, or rows of `row_length` filled first-fit.

    Args:
        pairs: Objects with `prompt`, `chosen` and `rejected`, lists of token ids; of these the prompt is not empty,
            nor are both answers. `chosen_unscored` and `rejected_unscored`, if they have them, are spans of answers
            that are read only. No pair at all is a batch of padding, for a process that has nothing to add but has
            to run along.
        row_length: Tokens a row, for kernels that are compiled for a shape. None: as long as it needs to be.
        score_end: Whether an answer's last token, its end, is scored. Llama 3 leaves it out of both answers, since one
            token cannot be made likelier and less likely at once (arXiv 2407.21783, 4.1.4).

    Raises:
        ValueError: A pair longer than `row_length`, an empty prompt, no answer.
    """
    pieces = [_lay_out_pair(pair) for pair in pairs]
    lengths = [piece["tokens"].numel() for piece in pieces]
    members_of_rows = _fill_rows(lengths, row_length)
    shape = (len(members_of_rows), row_length or max(1, sum(lengths)))
    columns = {name: torch.zeros(shape, dtype=torch.long) for name in ("tokens", "input_pos", "segment")}
    document, first, rows = torch.full(shape, -1), [0] * len(pieces), []
    for r, members in enumerate(members_of_rows):
        start, documents = 0, []
        for i in members:
            span = slice(start, start + lengths[i])
            for name, column in columns.items():
                column[r, span] = pieces[i][name]
            document[r, span] = i
            first[i] = r * shape[1] + start
            documents.append(Document(start, *pieces[i]["sizes"]))
            start = span.stop
        rows.append(tuple(documents))
    nothing = [torch.zeros(0, dtype=torch.long)]
    chosen_then_rejected = [(i, answer) for answer in ("chosen", "rejected") for i in range(len(pieces))]
    scored = {key: _scored(pairs[key[0]], key[1], score_end) for key in chosen_then_rejected}
    targets = [torch.tensor(getattr(pairs[i], a), dtype=torch.long)[scored[i, a]] for i, a in chosen_then_rejected]
    answer_lengths = tuple(map(len, targets))
    has_chosen, has_rejected = (torch.tensor([bool(getattr(p, a)) for p in pairs]) for a in ("chosen", "rejected"))
    return PairBatch(
        **columns,
        document=document,
        source=torch.cat(
            nothing + [first[i] + pieces[i][answer][scored[i, answer]] for i, answer in chosen_then_rejected]
        ),
        target=torch.cat(nothing + targets),
        sequence=torch.repeat_interleave(torch.arange(2 * len(pieces)), torch.tensor(answer_lengths, dtype=torch.long)),
        answer_lengths=answer_lengths,
        with_chosen=has_chosen.nonzero()[:, 0],
        with_rejected=has_rejected.nonzero()[:, 0],
        with_both=(has_chosen * has_rejected).nonzero()[:, 0],
        num_pairs=len(pieces),
        num_tokens=sum(lengths),
        rows=tuple(rows),
        pairs=pairs,
    )


def _scored(pair, answer: str, score_end: bool) -> slice | Tensor:
    """Returns which of an answer's tokens are scored: all, or all but its end and what is not the assistant's."""
    length, spans = len(getattr(pair, answer)), getattr(pair, f"{answer}_unscored", ())
    last = length if score_end else length - 1
    if not spans:
        return slice(None) if score_end else slice(-1)
    return torch.tensor([i for i in range(last) if not any(start <= i < stop for start, stop in spans)])


def apart(batch: PairBatch, multiple: int = 1) -> PairBatch:
    """Returns a batch's answers each behind a prompt of its own, in a row of its own, padded on the right.

    For models that cannot be told whom a token sees. What is scored is the same, in the same order.

    Args:
        multiple: Of the rows' length.
    """
    answers = [(i, p.prompt + a) for name in ("chosen", "rejected") for i, p in enumerate(batch.pairs)
               if (a := getattr(p, name))]  # fmt: skip
    length = -(-max((len(tokens) for _, tokens in answers), default=1) // multiple) * multiple
    shape = (max(1, len(answers)), length)
    tokens, document = torch.zeros(shape, dtype=torch.long), torch.full(shape, -1)
    for row, (i, conversation) in enumerate(answers):
        tokens[row, : len(conversation)] = torch.tensor(conversation)
        document[row, : len(conversation)] = i
    has_answer = [bool(getattr(p, name)) for name in ("chosen", "rejected") for p in batch.pairs]
    row_of = torch.tensor(has_answer, dtype=torch.long).cumsum(0) - 1  # [2 P]
    device = batch.tokens.device
    position = batch.input_pos.flatten()[batch.source]
    laid_out = replace(
        batch,
        tokens=tokens,
        input_pos=torch.arange(length).expand(shape).contiguous(),
        document=document,
        segment=torch.zeros(shape, dtype=torch.long),
        source=to_device(row_of, device)[batch.sequence] * length + position,
        num_tokens=sum(len(conversation) for _, conversation in answers),
        rows=tuple((Document(0, len(conversation), (0,)),) for _, conversation in answers) or ((),),
    )
    return laid_out.to(device)


def _lay_out_pair(pair) -> dict:
    """Returns a document's columns, its sizes, and for each answer the positions that predict its tokens."""
    if not (pair.prompt and (pair.chosen or pair.rejected)):
        raise ValueError("a pair needs at least one token in its prompt and in its answers")
    shared = _common_prefix_length(pair.chosen, pair.rejected)
    prompt, prefix = len(pair.prompt), len(pair.prompt) + shared
    chosen, rejected = len(pair.chosen) - shared, len(pair.rejected) - shared  # the tails
    # The hidden state at position t of a conversation predicts its token t + 1.
    predicts_chosen = torch.arange(prompt - 1, prefix + chosen - 1)
    predicts_rejected = torch.arange(prompt - 1, prefix + rejected - 1)
    return {
        "tokens": torch.tensor(pair.prompt + pair.chosen + pair.rejected[shared:]),
        "input_pos": torch.cat([torch.arange(prefix + chosen), torch.arange(prefix, prefix + rejected)]),
        "segment": torch.tensor([0] * prefix + [1] * chosen + [2] * rejected),
        "sizes": (prefix, (chosen, rejected) if pair.chosen and pair.rejected else (chosen or rejected,)),
        "chosen": predicts_chosen,
        "rejected": predicts_rejected + (predicts_rejected >= prefix) * chosen,  # its tail lies behind the chosen one
    }


def document_length(pair) -> int:
    """Returns the tokens that a pair takes in its row: what its two conversations share is there once."""
    answers = len(pair.chosen) + len(pair.rejected) - _common_prefix_length(pair.chosen, pair.rejected)
    return len(pair.prompt) + answers


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
    return rows or [[]]
