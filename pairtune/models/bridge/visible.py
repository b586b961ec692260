"""Prompt sharing in transformers' models: whom a token sees, and attention that respects it.

A model asks for a mask by a function that its config names, and hands it on to each layer's attention, which another
function of that name computes. Both are registered here. While a batch is scored, the mask is no tensor but says which
of the batch's documents and windows a layer sees (models/visibility.py), and attention is that of models/attention.py.

What a model's own mask function says (causal, a sliding window, chunks) is asked at positions, not at places in a row,
so that it means in a row of several documents what it means in a conversation alone.

B rows, S row length, H heads of queries, G of keys and values, K head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pairtune.models import visibility
from pairtune.models.attention import Attention, Told, told
from pairtune.pairs.batch import PairBatch

NAME = "pairtune"  # without "sdpa" or "flash" in it, by which transformers tells back ends that some models refuse
DENSE = "eager"  # transformers' plain attention, which every model has; it adds a mask of numbers to scores

_scored: ContextVar["Scored | None"] = ContextVar("scored", default=None)


@dataclass(frozen=True)
class Seen:
    """What a layer sees of a batch: travels through a model in the place of its mask."""

    told: Told
    window: int | None

    def __getitem__(self, part) -> "Seen":
        """Some models cut a mask to the keys that there are: here they are all there."""
        return self


@dataclass
class Scored:
    """A batch while a model scores it.

    Attributes:
        reach: Longer than any of its conversations, in tokens.
        masks: What layers see, by the model's mask functions.
    """

    batch: PairBatch
    back_end: str
    reach: int
    masks: dict = field(default_factory=dict)

    def seen(self, function: Callable) -> Seen:
        """Returns what a layer sees whose mask is this function of a batch's number, a head, query and key."""
        pattern = pattern_of(function, self.reach)
        if isinstance(pattern, Tensor):
            return Seen({None: self.dense(function)}, None)
        if pattern not in self.masks:
            self.masks[pattern] = told(self.batch, self.back_end, [] if pattern is None else [pattern])
        return Seen(self.masks[pattern], pattern)

    def dense(self, function: Callable) -> Tensor:
        """Returns the same as [B, S, S] bool, True = attend."""
        pattern = pattern_of(function, self.reach)
        if not isinstance(pattern, Tensor):
            return visibility.dense_mask(self.batch, pattern)
        mask, position = visibility.dense_mask(self.batch), self.batch.input_pos
        return mask & pattern.to(mask.device)[position[:, :, None], position[:, None, :]]


@contextmanager
def scoring(batch: PairBatch, back_end: str) -> Iterator[None]:
    """While it lasts, models see a batch's documents.

    Args:
        back_end: One of attention.BACK_ENDS.
    """
    longest = max((d.prefix + max(d.tails) for row in batch.rows for d in row), default=1)
    token = _scored.set(Scored(batch, back_end, max(longest, batch.tokens.shape[1] - batch.num_tokens)))
    try:
        yield
    finally:
        _scored.reset(token)


# What a mask function says

_patterns: dict[tuple, tuple[int, "int | None | Tensor"]] = {}  # and up to how many tokens that was looked at


def pattern_of(function: Callable, reach: int) -> int | None | Tensor:
    """Returns what a mask function says of `reach` positions: None, causal; a window; or who sees whom, [R, R] bool.

    Every pair of positions is asked, once for each function that has the same code and numbers.
    """
    identity = _identity(function)
    known, pattern = _patterns.get(identity, (0, None))
    if known < reach:
        reach = max(reach, 2 * known)
        pattern = _look(function, reach)
        if identity is not None:
            _patterns[identity] = reach, pattern
    return pattern


def _look(function: Callable, reach: int) -> int | None | Tensor:
    query, key = torch.arange(reach)[:, None], torch.arange(reach)[None]
    nothing = torch.zeros(1, 1, dtype=torch.long)
    with _NothingPadded():
        seen = function(nothing, nothing, query, key).expand(reach, reach)
    window = int(seen[-1].sum())
    if torch.equal(seen, key <= query):
        return None
    return window if torch.equal(seen, (key <= query) & (key > query - window)) else seen


class _NothingPadded(TorchDispatchMode):
    """Takes zeros for tensors without numbers: where a model is only counted, padding is counted by one on meta."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        there = (torch.zeros_like(x, device="cpu") if isinstance(x, Tensor) and x.is_meta else x for x in args)
        return operation(*there, **(kwargs or {}))


def _identity(function: Callable) -> tuple | None:
    """Returns what a function's answer depends on, if that is its code, numbers and such functions; else None."""
    if not isinstance(function, FunctionType):
        return None
    held = [cell.cell_contents for cell in function.__closure__ or ()]
    parts = []
    for value in (v for h in held for v in (h if isinstance(h, tuple) else (h,))):
        part = value if isinstance(value, (int, float, type(None))) else _identity(value)
        if part is None and value is not None:
            return None
        parts.append(part)
    return function.__code__, *parts


# What is registered


def register() -> None:
    """Makes transformers know these functions by their names."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionMaskInterface.register(NAME, mask)
    AttentionMaskInterface.register(DENSE, dense_mask)  # without a batch it is transformers'
    AttentionInterface.register(NAME, attention)


def mask(*args, mask_function: Callable, **settings) -> Seen | Tensor | None:
    """Returns what transformers hands to its layers as attention_mask; without a batch, its own boolean mask."""
    scored = _scored.get()
    if scored is not None:
        return scored.seen(mask_function)
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, mask_function=mask_function, **settings | {"allow_is_causal_skip": False})


def dense_mask(*args, mask_function: Callable, dtype: torch.dtype = torch.float32, **settings) -> Tensor | None:
    """Returns what is added to scores, [B, 1, S, S]; without a batch, what transformers adds."""
    scored = _scored.get()
    if scored is not None:
        seen = scored.dense(mask_function)[:, None]
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
    from transformers.masking_utils import eager_mask

    return eager_mask(*args, mask_function=mask_function, dtype=dtype, **settings)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Seen | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **settings,
) -> tuple[Tensor, None]:
    """Returns [B, S, H, K] for queries [B, H, S, K], keys and values [B, G, S, K], and no attention weights.

    Args:
        attention_mask: From `mask`.
        dropout: Of attention weights, while the model is trained.
        softcap, scaling: As attention.Attention has them.
        position_bias: Added to scores, in some families.
        s_aux: Sinks [H]: a score more a head, that of no key.
        settings: The model's own, such as the window that the mask has, too.
    """
    if position_bias is not None:
        raise NotImplementedError("attention with a learned bias of positions")
    seen = attention_mask if isinstance(attention_mask, Seen) else Seen(_without_heads(attention_mask), None)
    attend = Attention(window=seen.window, softcap=softcap, scale=scaling, sinks=s_aux)
    out = attend(query, key, value, seen.told, dropout, is_causal=False)
    return out.transpose(1, 2).contiguous(), None


def _without_heads(mask: Tensor | None) -> Tensor | None:
    """Returns [B, queries, keys] of [B, 1, queries, keys]."""
    return None if mask is None else mask[:, 0]
