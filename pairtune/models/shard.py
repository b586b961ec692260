"""A model whose parameters are shards, one of each in a process (FSDP2): cut, added up, clipped."""

import math

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from pairtune.process.dist import World


def shard(block: nn.Module, world: World, *, is_root: bool) -> None:
    """Leaves each process a part of a layer's parameters, or of the whole model's that no layer has."""
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if world.cpu_offload else OffloadPolicy()
    fully_shard(
        block,
        mesh=world.mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        # A layer's weights are gathered again for its backward. The root's, embedding and output, are needed at the end
        # of forward and the beginning of backward: gathering them twice would be for nothing, unless there is none.
        reshard_after_forward=not (is_root and any(p.requires_grad for p in block.parameters())),
        offload_policy=offload,
    )


def forget_gathered(model: nn.Module) -> None:
    """Shows shards again where FSDP2's root still shows the whole weights of the last forward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def sync_gradients(model: nn.Module, sync: bool) -> None:
    """Says whether the next backward adds gradients up over processes; a step's last one has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def clip_gradients(model: nn.Module, max_norm: float | None) -> Tensor:
    """Scales gradients down to a norm of `max_norm` over all parameters and processes; returns what it was before.

    None measures only.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), math.inf if max_norm is None else max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
