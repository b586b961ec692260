"""Attention over a PairBatch: a token sees its own document, the prefix and its own tail, nothing behind itself.

Two back ends compute the same thing: `mask` gives torchtune's attention a dense boolean mask (simple, compilable, the
one that defines the truth); `segments` calls scaled_dot_product_attention once a prefix with its first tail and once a
further tail, so that nothing is computed between documents and the first call needs no mask at all.

A layer may have a sliding window (Mistral, Phi 3, Qwen 2, Gemma 2): of what a token would see, it sees keys whose
position is less than `window` before its own. Positions are a conversation's: a rejected tail follows its prefix.

B rows, S row length, H heads, K head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import MultiHeadAttention

from pairtune.errors import UserError
from pairtune.pairs.batch import Document, PairBatch


@dataclass(frozen=True)
class Segments:
    """What the `segments` back end needs to know; torchtune's layers hand it through as their `mask`."""

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
    return {window: dense_mask(batch, window) for window in {None, *windows} if (window or 0) < batch.tokens.shape[1]}


def install(model: nn.Module, windows: Sequence[int | None] | None = None) -> None:
    """Lets the model's attention layers take Segments or dense_masks as a mask.

    Args:
        windows: Each layer's, None for a layer without. None: no layer has one.

    Raises:
        UserError: A layer has a forward of its own, such as that of torchtune's Gemma 2, whose windows count rows.
    """
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, MultiHeadAttention):
            layers.append(layer)
        elif hasattr(layer, "q_proj"):
            raise UserError(
                f"model: attention of class {type(layer).__name__} ({name}) cannot see prefix and own tail only"
            )
    for layer, window in zip(layers, windows or [None] * len(layers), strict=True):
        call = layer._attention_call
        layer._attention_call = replace(call if isinstance(call, Attention) else Attention(), window=window)


@dataclass(frozen=True)
class Attention:
    """What a layer computes of queries, keys and values; torchtune's MultiHeadAttention calls it."""

    window: int | None = None
    softcap: float | None = None  # Gemma 2: scores s become softcap * tanh(s / softcap) before the mask
    scale: float | None = None  # of scores; None: K ** -0.5

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | dict[int | None, Tensor] | Segments | None,
        dropout_p: float,
        is_causal: bool,
    ) -> Tensor:
        """Returns [B, H, S, K] for q, k, v of that shape.

        Args:
            mask: Of a PairBatch, or torchtune's own [B, S, columns] as generation makes it, or none.
        """
        if isinstance(mask, Segments):
            rows = [
                self._attend_row(q[b : b + 1], k[b : b + 1], v[b : b + 1], row, mask, dropout_p)
                for b, row in enumerate(mask.rows)
            ]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if isinstance(mask, dict):
            mask = mask.get(self.window, mask[None])
        elif self.window and k.shape[2] > self.window:
            mask = torch.ones(1, *q.shape[2:3] * 2, dtype=torch.bool, device=q.device).tril() if mask is None else mask
            mask = mask & _newest(mask, self.window)
        mask = None if mask is None else mask[:, None]
        return self._attend(q, k, v, dropout_p, mask=mask, is_causal=is_causal and mask is None)

    def _attend_row(self, q, k, v, documents: tuple[Document, ...], segments: Segments, dropout_p: float) -> Tensor:
        # One split a tensor: slicing document by document would make backward add up as many row-sized gradients.
        sizes = [size for d in documents for size in (d.prefix, *d.tails)]
        padding = q.shape[2] - sum(sizes)
        parts = [iter(x.split([*sizes, padding], dim=2)) for x in (q, k, v)]
        out = []
        for document in documents:
            prefix_q, prefix_k, prefix_v = map(next, parts)
            for n in range(len(document.tails)):
                tail_q, tail_k, tail_v = map(next, parts)
                queries = tail_q if n else torch.cat([prefix_q, tail_q], dim=2)
                keys, values = torch.cat([prefix_k, tail_k], dim=2), torch.cat([prefix_v, tail_v], dim=2)
                if queries.shape[2]:
                    out.append(self._attend_segment(queries, keys, values, segments, dropout_p))
        if padding:  # attends to itself, as in the dense mask: a batch of nothing else still has gradients for q, k, v
            out.append(self._attend(*map(next, parts), dropout_p, is_causal=True))
        return torch.cat(out, dim=2)

    def _attend_segment(self, q, k, v, segments: Segments, dropout_p: float) -> Tensor:
        """q [1, H, queries, K] are of the last positions of k and v [1, H, keys, K]."""
        queries, keys = q.shape[2], k.shape[2]
        window = self.window if self.window and self.window < keys else None
        if queries == keys and not window:
            return self._attend(q, k, v, dropout_p, is_causal=True)
        keys = min(keys, queries + window - 1) if window else keys  # those before are in nobody's window
        mask = segments.mask(queries, keys, window)
        return self._attend(q, k[:, :, -keys:], v[:, :, -keys:], dropout_p, mask=mask)

    def _attend(self, q, k, v, dropout_p: float, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if self.softcap is None:
            how = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": dropout_p, "scale": self.scale}
            return F.scaled_dot_product_attention(q, k, v, **how)
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scale = self.scale or q.shape[-1] ** -0.5
        # Backward computes the scores again: kept, a layer's would take more memory than all else of it.
        how = {"use_reentrant": False, "preserve_rng_state": dropout_p > 0}
        return checkpoint(softcapped_attention, q, k, v, mask, scale, self.softcap, dropout_p, **how)


def softcapped_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float, dropout_p: float = 0.0
) -> Tensor:
    """Returns softmax(softcap * tanh(scale * q k^T / softcap)) v, where `mask` is True, [B, H, queries, K].

    No fused kernel caps scores. They are as many as queries times keys, in float32.
    """
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = softcap * torch.tanh(scores * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.dropout(scores.softmax(-1).to(v.dtype), dropout_p) @ v


def _newest(mask: Tensor, window: int) -> Tensor:
    """Returns [B, queries, columns] bool: the last `window` columns up to a query's own, the last one that it sees.

    Queries are of columns one behind the other, so that the last query's column tells all of them.
    """
    queries, columns = mask.shape[1:]
    column = torch.arange(columns, device=mask.device)
    last = (mask[:, -1] * column).amax(-1)  # [B]
    own = last[:, None] + column[:queries] - queries + 1  # [B, queries]
    return column > own[:, :, None] - window
