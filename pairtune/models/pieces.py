"""Feed-forward networks that take a long row in pieces, where backward computes layers again.

What such a layer holds in backward is mostly the network's inner activations [tokens, F]. In pieces they are there for
some tokens at a time, and none but the network's last product is computed more often than in a row at once.

D width, F inner width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torchtune.modules import FeedForward, TransformerSelfAttentionLayer

PIECE = 8192  # tokens; with more, matrix products are no faster


def install(model: nn.Module, piece: int = PIECE) -> list[FeedForward]:
    """Makes torchtune's feed-forward networks take rows of more tokens than that in pieces; returns which do.

    Those with dropout do not, which would draw other numbers in backward, nor do mixtures of experts.
    """
    layers = (m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer))
    found = [layer.mlp for layer in layers if isinstance(layer.mlp, FeedForward)]
    found = [mlp for mlp in found if not any(isinstance(m, nn.Dropout) and m.p for m in mlp.modules())]
    for mlp in found:
        mlp.forward = partial(_in_pieces, mlp.forward, mlp, piece)
    return found


@contextmanager
def installed(model: nn.Module) -> Iterator[None]:
    """While it lasts, does as `install`."""
    found = install(model)
    try:
        yield
    finally:
        for mlp in found:
            del mlp.forward


def _in_pieces(whole: Callable, mlp: FeedForward, piece: int, x: Tensor) -> Tensor:
    """Returns [..., D] for x [..., D], as `whole` does."""
    if x.numel() <= piece * x.shape[-1]:
        return whole(x)
    trained = [p for p in mlp.parameters() if p.requires_grad]
    out = _Room.apply(whole, piece, x, *trained)
    with torch.no_grad():
        for some, into in zip(_cut(x, piece), _cut(out.detach(), piece), strict=True):
            into.copy_(whole(some))
    return out


def _cut(x: Tensor, piece: int) -> tuple[Tensor, ...]:
    return x.view(-1, x.shape[-1]).split(piece)


class _Room(torch.autograd.Function):
    """Room for the network's output, which its caller fills: so the input is saved before anything is computed.

    A checkpoint that runs a layer again stops at the last tensor that was saved: here, and computes no output.
    """

    @staticmethod
    def forward(ctx, whole: Callable, piece: int, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.whole, ctx.piece = whole, piece
        ctx.save_for_backward(x, *trained)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *trained = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[2]
        grad_x = torch.empty_like(x) if needs_x else None
        # In bf16, adding up pieces would round once a piece.
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in trained]
        into = _cut(grad_x if needs_x else x, ctx.piece)
        for some, of_out, of_x in zip(_cut(x, ctx.piece), _cut(grad.contiguous(), ctx.piece), into, strict=True):
            with torch.enable_grad():
                some = some.detach().requires_grad_(needs_x)
                out = ctx.whole(some)
            found = torch.autograd.grad(out, [some] * needs_x + trained, of_out)
            if needs_x:
                of_x.copy_(found[0])
            for total, one in zip(sums, found[needs_x:], strict=True):
                total += one
            del out, found
        return None, None, grad_x, *(s.to(p.dtype) for s, p in zip(sums, trained, strict=True))
