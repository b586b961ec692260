"""Attention over a PairBatch: who sees whom is told by visibility.py, here it is computed, in one of four ways.

- mask: scaled_dot_product_attention with a dense boolean mask. Simple, compilable; the one that defines the truth.
- segments: a call a prefix with its first tail, and one a further tail. Nothing is computed between documents, and the
  first call needs no mask at all. The fastest on a CPU.
- flex: FlexAttention, one call a layer, which blocks of 128 by 128 tokens that see nothing of each other take no time
  in. A kernel of its own only in a layer that is compiled, the fastest on a GPU.
- varlen: flash attention over sequences of any length, one call a layer. For GPUs without a compiler, in bf16.

B rows, S row length, H heads of queries, G of keys and values, K head width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import MultiHeadAttention

from pairtune.errors import UserError
from pairtune.models import visibility
from pairtune.models.visibility import Segments, Varlen
from pairtune.pairs.batch import Document, PairBatch

BACK_ENDS = ("segments", "mask", "flex", "varlen")

# Newer versions of torch ask whether fewer heads of keys than of queries are meant.
_GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

Told = dict[int | None, Tensor] | dict[int | None, BlockMask] | Segments | Varlen  # by visibility.py


def told(batch: PairBatch, back_end: str, windows: Sequence[int | None]) -> Told:
    """Returns what the layers are to be given as their `mask`.

    Args:
        back_end: One of BACK_ENDS.
        windows: Of the layers.
    """
    if back_end == "mask":
        return visibility.dense_masks(batch, windows)
    if back_end == "flex":
        return visibility.block_masks(batch, windows)
    return visibility.varlen(batch) if back_end == "varlen" else Segments(batch.rows, batch.tokens.device)


def install(model: nn.Module, windows: Sequence[int | None] | None = None) -> None:
    """Lets the model's attention layers take as a mask what `told` returns.

    Args:
        windows: Each layer's, None for a layer without. None: no layer has one.

    Raises:
        UserError: A layer has a forward of its own, such as that of torchtune's Gemma 2, whose windows count rows.
    """
    layers = []
    for name, layer in model.named_modules():
        if isinstance(layer, MultiHeadAttention):
            layers.append(layer)
            if type(layer) is MultiHeadAttention:
                layer.__class__ = GroupedAttention
        elif hasattr(layer, "q_proj"):
            raise UserError(
                f"model: attention of class {type(layer).__name__} ({name}) cannot see prefix and own tail only"
            )
    for layer, window in zip(layers, windows or [None] * len(layers), strict=True):
        call = layer._attention_call
        call = call if isinstance(call, Attention) else Attention()
        layer._attention_call = replace(call, window=window)


class GroupedAttention(MultiHeadAttention):
    """torchtune's, with H heads of queries and G of keys and values, which it does not repeat H / G times.

    Attributes:
        normalises_first: Queries and keys are normalised before they are rotated, not after, which scales other
            coordinates.
    """

    normalises_first = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._attention_call = Attention()  # torchtune's would take as many heads of keys as of queries

    def forward(self, x: Tensor, y: Tensor, *, mask=None, input_pos: Tensor | None = None) -> Tensor:
        """Returns [B, S, D]; x gives queries, y keys and values, both [B, S, D]: torchtune's layers pass the same."""
        q = self._heads(self.q_proj(x), self.q_norm, input_pos)
        k = self._heads(self.k_proj(y), self.k_norm, input_pos)
        v = self.v_proj(y).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if self.kv_cache is not None and self.cache_enabled:
            k, v = self.kv_cache.update(k, v)
        dropout_p = self.attn_dropout if self.training else 0.0
        is_causal = self.kv_cache is None and mask is None and self.is_causal
        is_next = self.kv_cache is not None and q.shape[2] == 1 and self._attention_call.sinks is None
        # Of one token's queries those that share keys stand one behind the other, so that no keys are repeated.
        asked = q.reshape(q.shape[0], k.shape[1], -1, self.head_dim) if is_next else q
        output = self._attention_call(asked, k, v, mask=mask, dropout_p=dropout_p, is_causal=is_causal)
        output = output.reshape(q.shape) if is_next else output
        return self.output_proj(output.transpose(1, 2).flatten(2))

    def _heads(self, projected: Tensor, norm: nn.Module | None, input_pos: Tensor | None) -> Tensor:
        """Returns [B, heads, S, K] of [B, S, heads * K], normalised and rotated."""
        heads = projected.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.normalises_first:
            heads = norm(heads)
        if self.pos_embeddings is not None:
            heads = self.pos_embeddings(heads, input_pos=input_pos)
        heads = heads.transpose(1, 2)
        return heads if norm is None or self.normalises_first else norm(heads)


@dataclass(frozen=True)
class Attention:
    """What a layer computes of queries, keys and values; torchtune's MultiHeadAttention calls it."""

    window: int | None = None
    softcap: float | None = None  # Gemma 2: scores s become softcap * tanh(s / softcap) before the mask
    scale: float | None = None  # of scores; None: K ** -0.5
    sinks: Tensor | None = None  # gpt-oss: [H], a score beside those of keys, which takes its share and gives no value

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | Told | None,
        dropout_p: float,
        is_causal: bool,
    ) -> Tensor:
        """Returns [B, H, S, K] for q of that shape, and k and v [B, G, S, K] or, repeated, of that shape.

        Args:
            mask: Of a PairBatch, or torchtune's own [B, S, columns] as generation makes it, or none.
        """
        if isinstance(mask, Segments):
            rows = [
                self._attend_row(q[b : b + 1], k[b : b + 1], v[b : b + 1], row, mask, dropout_p)
                for b, row in enumerate(mask.rows)
            ]
            return rows[0] if len(rows) == 1 else torch.cat(rows)
        if isinstance(mask, Varlen):
            return self._attend_varlen(q, k, v, mask)
        has_window = isinstance(mask, dict)
        if has_window:
            mask = mask.get(self.window, mask[None])
        if isinstance(mask, BlockMask):
            return self._attend_blocks(q, k, v, mask)
        if not has_window and self.window and k.shape[2] > self.window:
            mask = torch.ones(1, *q.shape[2:3] * 2, dtype=torch.bool, device=q.device).tril() if mask is None else mask
            mask = mask & _newest(mask, self.window)
        mask = None if mask is None else mask[:, None]
        return self._attend(q, k, v, dropout_p, mask=mask, is_causal=is_causal and mask is None)

    def _attend_blocks(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        softcap = self.softcap

        def capped(score, b, h, i, j):
            return softcap * torch.tanh(score / softcap)

        how = {"score_mod": capped if softcap else None, "block_mask": mask, "scale": self.scale}
        how["enable_gqa"] = q.shape[1] != k.shape[1]
        if self.sinks is None:
            return flex_attention(q, k, v, **how)
        out, log_sum = flex_attention(q, k, v, **how, return_lse=True)
        return out * torch.sigmoid(log_sum - self.sinks[:, None])[..., None].to(out.dtype)

    def _attend_varlen(self, q: Tensor, k: Tensor, v: Tensor, of: Varlen) -> Tensor:
        queries, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        keys, values = (_WithRepetitions.apply(x, of.token, of.own, of.again, of.repeated) for x in (keys, values))
        window = self.window - 1 if self.window else -1
        out = varlen_attn(
            *(queries, keys, values, of.query_ends, of.key_ends, of.most_queries, of.most_keys),
            scale=self.scale,
            window_size=(window, 0),
            **_GROUPED,
        )
        return out.unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)

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
        group = q.shape[1] // k.shape[1]
        is_written_out = self.softcap is not None or self.sinks is not None
        if group > 1 and (is_written_out or not takes_groups(q.device.type, q.dtype, mask)):
            k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        if not is_written_out:
            how = {"attn_mask": mask, "is_causal": is_causal, "dropout_p": dropout_p, "scale": self.scale}
            return F.scaled_dot_product_attention(q, k, v, **how, enable_gqa=q.shape[1] != k.shape[1])
        if is_causal:
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scale = self.scale or q.shape[-1] ** -0.5
        if not torch.is_grad_enabled():
            return written_out(q, k, v, mask, scale, self.softcap, dropout_p, self.sinks)
        # Backward computes the scores again: kept, a layer's would take more memory than all else of it.
        how = {"use_reentrant": False, "preserve_rng_state": dropout_p > 0}
        return checkpoint(written_out, q, k, v, mask, scale, self.softcap, dropout_p, self.sinks, **how)


def takes_groups(device: str, dtype: torch.dtype, mask: Tensor | None) -> bool:
    """Returns whether torch has a fused kernel in which several heads of queries share one of keys and values."""
    return device != "cuda" or (mask is None and dtype != torch.float32)


def written_out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Returns softmax(softcap * tanh(scale * q k^T / softcap)) v, where `mask` is True, [B, H, queries, K].

    No fused kernel caps scores, or has a sink among them. They are as many as queries times keys, in float32.

    Args:
        softcap: None: scores are not capped.
        sinks: [H], scores that take their share of the softmax and give nothing.
    """
    scores = q @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = scores * scale if softcap is None else softcap * torch.tanh(scores * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        beside = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, beside], dim=-1).softmax(-1)[..., :-1]
    return F.dropout(weights.to(v.dtype), dropout_p) @ v


class _WithRepetitions(torch.autograd.Function):
    """Keys or values [T, G, K] of tokens, as the sequences of a Varlen have them: [keys, G, K].

    Backward of plain indexing would sort the index and add up one by one. Here a token's gradient is its key's, and a
    prefix's has that of its repetition added.
    """

    @staticmethod
    def forward(ctx, of_tokens, token, own, again, repeated):
        ctx.save_for_backward(own, again, repeated)
        return of_tokens.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        own, again, repeated = ctx.saved_tensors
        of_tokens = grad.index_select(0, own)
        return of_tokens.index_add_(0, repeated, grad.index_select(0, again)), None, None, None, None


def _newest(mask: Tensor, window: int) -> Tensor:
    """Returns [B, queries, columns] bool: the last `window` columns up to a query's own, the last one that it sees.

    Queries are of columns one behind the other, so that the last query's column tells all of them.
    """
    queries, columns = mask.shape[1:]
    column = torch.arange(columns, device=mask.device)
    last = (mask[:, -1] * column).amax(-1)  # [B]
    own = last[:, None] + column[:queries] - queries + 1  # [B, queries]
    return column > own[:, :, None] - window
