"""A step from one token to the next whose shapes and addresses stay: what a compiler and a CUDA graph can take.

A step of one token a row is short of work and full of launches: about a thousand kernels in a Llama of 32 layers, which
Python launches one by one. Layers are compiled once, all of them to one program, and
on a GPU a whole step is recorded and launched as one.

B rows, T tokens of the longest prompt and what may follow it.
"""

from collections.abc import Callable, Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairtune.errors import UserError
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.models.cached import Kept
from pairtune.models.dora import DoRALinear
from pairtune.models.experts import mixtures_of
from pairtune.models.frozen_base import is_held


def check(model: nn.Module) -> None:
    """Refuses models whose steps are not alike, or not ours.

    Raises:
        UserError: With the reason.
    """
    if isinstance(model, BridgedDecoder):
        reason = "answers by transformers' classes, whose caches grow"
    elif mixtures_of(model):
        reason = "has experts, which get another number of tokens at each step"
    elif any(isinstance(module, DoRALinear) and is_held(module.weight) for module in model.modules()):
        reason = "has DoRA on a base in fewer bits, of which a compiled layer would keep all values"
    else:
        return
    raise UserError(f"compile=true: this model {reason}; leave compile out")


class Step:
    """Gives logits of the next token from the last one, as often as there is room."""

    def __init__(
        self,
        model: Callable,
        kept: list[Kept],
        there: Tensor,
        position: Tensor,
        *,
        room: int,
        windows: Iterable[int | None],
    ):
        """
        Args:
            model: Computes logits [B, 1, V] of tokens [B, 1], given mask and input_pos.
            kept: What its layers keep; prompts are in it.
            there: [B, S] bool of prompts, false for padding.
            position: [B, 1], of each prompt's last token.
            room: Tokens that may follow.
            windows: Of the layers.
        """
        self._model, self._windows = model, [window for window in windows if window]
        self._at = torch.tensor([there.shape[1]], device=there.device)
        self._there, self._position = F.pad(there, (0, room)), position.clone()
        self._column = torch.arange(self._there.shape[1], device=there.device)
        self._token = torch.zeros_like(position)
        for layer in kept:
            layer.at = self._at
        self._graph = self._recorded() if there.is_cuda else None

    def __call__(self, token: Tensor) -> Tensor:
        """Returns logits [B, V], which the next call may write over.

        Args:
            token: [B, 1].
        """
        self._token.copy_(token)
        if self._graph is None:
            return self._next()
        self._graph.replay()
        return self._logits

    def _next(self) -> Tensor:
        self._position += 1
        self._there.index_fill_(1, self._at, True)
        masks = {None: self._there[:, None]}
        masks |= {window: (self._there & (self._column > self._at - window))[:, None] for window in self._windows}
        logits = self._model(self._token, mask=masks, input_pos=self._position)[:, -1]
        self._at += 1
        return logits

    def _recorded(self) -> torch.cuda.CUDAGraph:
        """Records a step, after two that compile and warm up; of these only keys are left, which are replaced."""
        changing = self._position, self._there, self._at
        before = [x.clone() for x in changing]
        stream, ours = _stream(self._there.device), torch.cuda.current_stream(self._there.device)
        stream.wait_stream(ours)
        with torch.cuda.stream(stream):
            for _ in range(min(2, self._there.shape[1] - int(self._at))):
                self._next()
            for x, value in zip(changing, before, strict=True):
                x.copy_(value)
        ours.wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self._logits = self._next()
        return graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """The one on which a device's steps are recorded: cuBLAS keeps memory for each that it has seen."""
    return torch.cuda.Stream(device)
