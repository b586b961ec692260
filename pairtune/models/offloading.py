"""Activation offloading: inputs of layers that backward computes again wait for it in host memory.

They are all that a layer keeps then. torchtune's OffloadActivations copies them beside what the device computes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.hooks import RemovableHandle
from torchtune.training import OffloadActivations


def offload(model: nn.Module, kept: saved_tensors_hooks | None = None) -> None:
    """Makes what a model's layers save, from outside of what checkpoints them, go where `kept` puts it.

    Args:
        kept: None: pinned host memory, on a CUDA device.
    """
    kept = kept or _in_host_memory()
    for layer in model.layers:
        _around(layer, kept)


@contextmanager
def offloaded(model: nn.Module, kept: saved_tensors_hooks) -> Iterator[None]:
    """While it lasts, does as `offload`."""
    hooks = [hook for layer in model.layers for hook in _around(layer, kept)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _around(layer: nn.Module, kept: saved_tensors_hooks) -> list[RemovableHandle]:
    return [
        layer.register_forward_pre_hook(lambda *_: kept.__enter__()),
        layer.register_forward_hook(lambda *_: kept.__exit__(), always_call=True),
    ]


def _in_host_memory() -> saved_tensors_hooks:
    # Of one layer's input a copy is made while the layer computes; more of them would only be held longer.
    kept = OffloadActivations(max_fwd_stash_size=1)
    return saved_tensors_hooks(lambda x: _Ticket(kept, x), lambda ticket: kept.unpack_hook(ticket.number))


class _Ticket:
    """Stands for a tensor in the graph, and lets it go with the graph: there may be no backward."""

    def __init__(self, kept: OffloadActivations, tensor: Tensor):
        self._kept, self.number = kept, kept.pack_hook(tensor)

    def __del__(self):
        self._kept.tracker.pop(self.number, None)
