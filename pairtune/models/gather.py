"""Trained weights out of a model: gathered from all processes, on their base, merged."""

from collections.abc import Collection, Iterator, Mapping

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor

from pairtune.models import frozen_base
from pairtune.models.adapters import (
    adapted_modules,
    adapter_shapes,
    own_buffers,
    own_parameters,
    own_shapes,
    plain_name,
)
from pairtune.models.build import DTYPES
from pairtune.models.dora import DoRALinear, row_norms
from pairtune.process.dist import World


@torch.no_grad()
def gather_weights(model: nn.Module, world: World, *, adapters_only: bool = False) -> dict[str, Tensor]:
    """Returns the whole parameters on the CPU, in the main process; elsewhere nothing. Every process has to call it.

    Weights in fewer bits come back dequantized: as what was trained on.
    """
    weights, wanted = {}, adapter_shapes(model).keys() if adapters_only else None
    for name, value in _whole_parameters(model, wanted):
        world.beat("gathering weights")
        if world.is_main:
            value = value.cpu()
            is_part = value.untyped_storage().nbytes() > value.nbytes  # of a padded one: gathered from uneven shards
            weights[name] = value.clone() if is_part else value
    return weights


def _whole_parameters(model: nn.Module, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields own_parameters, or those wanted, gathered from all processes; of those in fewer bits the values."""
    shapes = own_shapes(model)
    scales = {plain_name(n): p for n, p in model.named_parameters() if n.endswith(".weight_scale")}
    for name, parameter in own_parameters(model):
        if wanted is not None and name not in wanted:
            continue
        scale = scales.get(f"{name}_scale")
        yield name, frozen_base.values(_whole(parameter), None if scale is None else _whole(scale), shapes[name])
    if wanted is None:
        yield from own_buffers(model)


def _whole(parameter: nn.Parameter) -> Tensor:
    value = parameter.data
    if not isinstance(value, DTensor):
        return value
    local = value.to_local()
    return _gather_nf4(local, value.device_mesh) if isinstance(local, NF4Tensor) else value.full_tensor()


def _gather_nf4(shard: NF4Tensor, mesh: DeviceMesh) -> NF4Tensor:
    """DTensor cannot gather NF4; the hooks that FSDP2 gathers it with can."""
    group = mesh.get_group("shard")
    pieces, metadata = shard.fsdp_pre_all_gather(mesh)
    whole = []
    for piece in pieces:
        gathered = piece.new_empty(piece.shape[0] * group.size(), *piece.shape[1:])
        torch_dist.all_gather_into_tensor(gathered, piece.contiguous(), group=group)
        whole.append(gathered)
    return shard.fsdp_post_all_gather(tuple(whole), metadata, shard.dtype)[0]


def on_base(adapters: dict[str, Tensor], base: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Returns a base's weights, as they were before they were quantized, and gathered adapters.

    Args:
        base: weights.Weights; what has this dtype stays where it is, on the disk.
    """
    return {name: base[name].to(DTYPES[dtype]) for name in base} | adapters


@torch.no_grad()
def merge_adapters(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns gathered weights with W + (alpha / rank) B A in the place of each adapted W, summed in float32.

    DoRA's rows are scaled to their magnitudes.

    QLoRA: gathered W is what was trained on, so the merged model is the trained policy; of `on_base` it is
    one that the adapters were not trained on, and W without its rounding to 4 bits. `model` tells alpha and rank only.
    """
    weights = dict(weights)
    for name, module in adapted_modules(model):
        a, b = weights.pop(f"{name}.lora_a.weight"), weights.pop(f"{name}.lora_b.weight")
        weight, scaling = weights[f"{name}.weight"], module.alpha / module.rank
        update = scaling * (b.float() @ a.float())
        merged = weight.float() + (update.transpose(1, 2) if getattr(module, "transposed", False) else update)
        if isinstance(module, DoRALinear):
            magnitude = weights.pop(f"{name}.magnitude").float()
            merged *= (magnitude / row_norms(weight, a, b, scaling))[:, None]
        weights[f"{name}.weight"] = merged.to(weight.dtype)
    return weights


def only_adapters(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapters among gathered weights, under torchtune's names; none for a model without."""
    names = adapter_shapes(model)
    return {name: value for name, value in weights.items() if name in names}
