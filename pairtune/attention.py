"""Attention over a PairBatch: a token sees its own document, the prefix and its own tail, nothing behind itself.

Two back ends compute the same thing: `mask` gives torchtune's attention a dense boolean mask (simple, compilable, the
one that defines the truth); `segments` calls scaled_dot_product_attention once a prefix with its first tail and once a
further tail, so that nothing is computed between documents and the first call needs no mask at all.

B rows, S row length, H heads, K head width.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import MultiHeadAttention

from pairtune.batch import Document, PairBatch
from pairtune.errors import UserError


@dataclass(frozen=True)
class Segments:
    """What the `segments` back end needs to know; torchtune's layers hand it through as their `mask`."""

    rows: tuple[tuple[Document, ...], ...]
    tail_masks: dict[tuple[int, int], Tensor]  # (tail, prefix) -> [tail, prefix + tail] bool, True = attend


def dense_mask(batch: PairBatch) -> Tensor:
    """Returns the [B, S, S] boolean mask (True = attend). Padding attends to padding, so no row is empty."""
    document, segment = batch.document, batch.segment
    same_document = document[:, :, None] == document[:, None, :]
    visible = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
    size = document.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=document.device).tril()
    return same_document & visible & causal


def segments(batch: PairBatch) -> Segments:
    """Returns the batch's segments, with the masks of the tails that follow a first one."""
    masks = {}
    for document in (d for row in batch.rows for d in row):
        for tail in document.tails[1:]:
            ones = torch.ones(tail, document.prefix + tail, dtype=torch.bool, device=batch.tokens.device)
            masks[tail, document.prefix] = ones.tril(document.prefix)
    return Segments(batch.rows, masks)


def install(model: nn.Module) -> None:
    """Lets the model's attention layers take Segments as a mask.

    Raises:
        UserError: A layer has a forward of its own (Gemma 2's sliding windows count rows, not positions).
    """
    for name, layer in model.named_modules():
        if isinstance(layer, MultiHeadAttention):
            layer._attention_call = attend
        elif hasattr(layer, "q_proj"):
            raise UserError(
                f"model: attention of class {type(layer).__name__} ({name}) cannot see prefix and own tail only"
            )


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, dropout_p: float, is_causal: bool
) -> Tensor:
    """Returns attention's output [B, H, S, K]; called by torchtune's MultiHeadAttention with [B, H, S, K] q, k, v."""
    if isinstance(mask, Segments):
        rows = [
            _attend_row(q[b : b + 1], k[b : b + 1], v[b : b + 1], row, mask, dropout_p)
            for b, row in enumerate(mask.rows)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)
    mask = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal)


def _attend_row(q, k, v, documents: tuple[Document, ...], segments: Segments, dropout_p: float) -> Tensor:
    # One split a tensor: slicing document by document would make backward add up as many row-sized gradients.
    sizes = [size for d in documents for size in (d.prefix, *d.tails)]
    padding = q.shape[2] - sum(sizes)
    parts = [iter(x.split([*sizes, padding], dim=2)) for x in (q, k, v)]
    out = []
    for document in documents:
        prefix_q, prefix_k, prefix_v = map(next, parts)
        for n, tail in enumerate(document.tails):
            tail_q, tail_k, tail_v = map(next, parts)
            keys, values = torch.cat([prefix_k, tail_k], dim=2), torch.cat([prefix_v, tail_v], dim=2)
            if n == 0:
                queries, how = torch.cat([prefix_q, tail_q], dim=2), {"is_causal": True}
            else:
                queries, how = tail_q, {"attn_mask": segments.tail_masks[tail, document.prefix]}
            if queries.shape[2]:
                out.append(F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout_p, **how))
    if padding:  # attends to itself, as in the dense mask: a batch of nothing else still has gradients for q, k and v
        out.append(F.scaled_dot_product_attention(*map(next, parts), is_causal=True))
    return torch.cat(out, dim=2)
