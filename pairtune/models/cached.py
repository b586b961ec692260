"""What layers keep and share while a model answers: keys and values, angles, who sees whom.

B rows, S tokens of a call, T of all calls so far, H heads of queries, G of keys and values, K head width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchtune.models.llama3_1 import Llama3ScaledRoPE
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import RotaryPositionalEmbeddings, TransformerDecoder

from pairtune.models.attention import GroupedAttention


class Kept:
    """A layer's keys and values [B, G, T, K], in memory that is taken once.

    torchtune's own cache asks the device at each update how far it is filled.

    Attributes:
        at: [1], where the next token's are put, for a step whose shapes and addresses stay (decoding.py): all of the
            memory is returned then. None: behind what is there, and what is filled is returned.
    """

    def __init__(self, shape: tuple[int, int, int, int], **how):
        # Zeros: what is not filled is given no weight where all is returned, and NaN times nothing would be NaN.
        self._keys, self._values = torch.zeros(shape, **how), torch.zeros(shape, **how)
        self._filled = 0
        self.at: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds [B, G, S, K] of each; returns all of them."""
        if self.at is not None:
            return self._keys.index_copy_(2, self.at, k), self._values.index_copy_(2, self.at, v)
        start, self._filled = self._filled, self._filled + k.shape[2]
        self._keys[:, :, start : self._filled], self._values[:, :, start : self._filled] = k, v
        return self._keys[:, :, : self._filled], self._values[:, :, : self._filled]


@contextmanager
def cached(
    model: TransformerDecoder, num_rows: int, num_tokens: int, *, fixed_shapes: bool = False, **how
) -> Iterator[list[Kept]]:
    """While it lasts, layers keep keys and values, which it gives, and angles are looked up once a call.

    Args:
        fixed_shapes: For decoding.py, whose layers look up angles by themselves: compiled, that is in their kernels.
        how: device and dtype of what is kept.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, GroupedAttention)]
    turning = {layer.pos_embeddings for layer in layers} - {None}
    try:
        for layer in layers:
            layer.kv_cache = Kept((num_rows, layer.num_kv_heads, num_tokens, layer.head_dim), **how)
            layer.cache_enabled = True
        for rope in turning if not fixed_shapes else ():
            if (turned := TURNS.get(type(rope))) is not None:
                rope.forward = _once_a_call(rope, turned)
        yield [layer.kv_cache for layer in layers]
    finally:
        for layer in layers:
            layer.kv_cache, layer.cache_enabled = None, False
        for rope in turning:
            vars(rope).pop("forward", None)


def seen_by_the_newest(there: Tensor, windows: set[int | None], *, padded: bool) -> dict[int | None, Tensor | None]:
    """Returns what layers take as a mask for the last of T tokens, by their window: [B, 1, T], None where it sees all.

    Args:
        there: [B, T] bool, false for padding.
        padded: There is some; to ask the device would take longer.
    """
    found: dict[int | None, Tensor | None] = {None: there[:, None] if padded else None}
    for window in windows - {None}:
        if window < there.shape[1]:
            near = there.clone()
            near[:, :-window] = False
            found[window] = near[:, None]
    return found


# Angles of one call are the same in every layer.


def _once_a_call(rope: nn.Module, turned: Callable) -> Callable:
    """Returns the forward of `rope`, which computes what depends on positions alone when they are new."""
    known: list = [None, None]

    def forward(x: Tensor, *, input_pos: Tensor) -> Tensor:
        if known[0] is not input_pos:
            known[:] = input_pos, turned.angles(rope.cache[input_pos], x.dtype)
        return turned(x, known[1])

    return forward


class Pairs:
    """Of torchtune's Llama: neighbours are turned, as complex numbers in float32."""

    @staticmethod
    def angles(of_positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns [B, S, 1, K / 2] complex of cosines and sines [B, S, K / 2, 2]."""
        return torch.view_as_complex(of_positions.float().contiguous())[:, :, None]

    def __call__(self, x: Tensor, angles: Tensor) -> Tensor:
        turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * angles
        return torch.view_as_real(turned).flatten(-2).type_as(x)


class Halves:
    """Of torchtune's Qwen 2: a head's first half with its second one, in the model's dtype."""

    @staticmethod
    def angles(of_positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns cosines, and sines with the sign of what they are multiplied with, [B, S, 1, K] each."""
        cos, sin = of_positions.to(dtype)[:, :, None].chunk(2, dim=-1)
        first, second = sin.chunk(2, dim=-1)
        return cos, torch.cat([-first, second], dim=-1)

    def __call__(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        cos, sin = angles
        return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


TURNS = {
    RotaryPositionalEmbeddings: Pairs(),
    Llama3ScaledRoPE: Pairs(),
    Qwen2RotaryPositionalEmbeddings: Halves(),
}
