"""A built model's memory: its weights read, compared, quantized, and sharded layer by layer."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from pairtune.errors import UserError, listed
from pairtune.models import frozen_base
from pairtune.models.adapters import (
    ADAPTED,
    adapter_shapes,
    fill_frozen_copy,
    frozen,
    own_buffers,
    own_shapes,
    plain_name,
)
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.models.bridge.towers import towers_of
from pairtune.models.dora import DoRALinear
from pairtune.models.shard import shard
from pairtune.process.dist import World

_STRANGERS = "`model` and `checkpointer.checkpoint_dir` do not belong together"


def load(
    model: TransformerDecoder,
    state_dict: Mapping[str, Tensor],
    *,
    world: World,
    adapter: Mapping[str, Tensor] | None = None,
) -> None:
    """Fills a model built on the meta device, base weights from `state_dict`, and shards it.

    Weights take the model's dtype; NF4 ones are quantized from the checkpoint's values on the device. Adapters are
    `adapter`'s or, without it, drawn by the CPU's global generator, the same on every device: seed it before, alike in
    every process. In a distributed world each layer is sharded (FSDP2) as soon as it is filled, so that a process never
    holds more than its shards and one layer.

    Args:
        state_dict: The whole checkpoint under torchtune's names, in each process: weights.Weights.
        adapter: What the adapters start from, whole, in each process: peft.read_adapter.

    Raises:
        UserError: The checkpoint lacks a weight, has one too many, or one of another shape.
    """
    home = torch.device("cpu") if world.cpu_offload else world.device
    adapters = adapter_shapes(model).keys()
    assert adapter is None or adapter.keys() == adapters, "peft.read_adapter knows the model's adapters"
    check_weights(model, state_dict)
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    buffers = model.computed_buffers() if isinstance(model, BridgedDecoder) else {}
    for block in world.progress([*towers_of(model), *model.layers, model], "loading weights"):
        world.beat("loading weights")
        for module in block.modules():
            _fill(module, names[id(module)], state_dict, home, world.device)
            if isinstance(module, ADAPTED) and module.lora_a.weight.is_meta:
                _fill_adapter(module, names[id(module)], adapter, home)
        _fill_buffers(block, names, buffers, world.device)
        if block is model and isinstance(model, BridgedDecoder):
            model.retie()
        if world.shards:
            shard(block, world, is_root=block is model)
    if isinstance(model, BridgedDecoder):
        _check_filled(model)


def _check_filled(model: BridgedDecoder) -> None:
    """Refuses an architecture whose constructors make a tensor that neither a file nor transformers gives numbers."""
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if left:
        raise UserError(
            f"model: {len(left)} tensors of transformers' {type(model.lm).__name__} are in no file and are not "
            f"computed: it cannot be trained here\n{listed(left)}"
        )


@contextmanager
def streamed(model: TransformerDecoder, weights: Mapping[str, Tensor], device: torch.device) -> Iterator[nn.Module]:
    """Lets a model on the meta device compute with one layer's weights in memory at a time: slow, for a forward or two.

    Args:
        model: From `full`, prepared without activation checkpointing and compilation.
        weights: As for `load`.

    Raises:
        UserError: As `load`.
    """
    check_weights(model, weights)
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(model, BridgedDecoder):
        _fill_buffers(model, names, model.computed_buffers(), device)

    def fill(block: nn.Module, *_) -> None:
        for module in block.modules():
            _fill(module, names[id(module)], weights, device, device)

    def empty(block: nn.Module, *_) -> None:
        for module in block.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))

    hooks = [layer.register_forward_pre_hook(fill) for layer in model.layers]
    hooks += [layer.register_forward_hook(empty) for layer in model.layers]
    in_layers = {id(module) for block in (*towers_of(model), *model.layers) for module in block.modules()}
    for module in model.modules():
        if id(module) not in in_layers:
            _fill(module, names[id(module)], weights, device, device)
    if isinstance(model, BridgedDecoder):
        model.retie()
    try:
        with frozen(model):
            yield model
    finally:
        for hook in hooks:
            hook.remove()


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Compares names and shapes with a model's, adapters left out; no value is read.

    Raises:
        UserError: They differ. All that does is listed, under the names of both sides.
    """
    adapters = adapter_shapes(model).keys()
    expected = {name: shape for name, shape in own_shapes(model).items() if name not in adapters}
    there = getattr(weights, "empty", weights)
    found = {name: value.shape for name, value in there.items()}
    lines = [f"not in the checkpoint: {_both(name, weights)}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"not in the model: {_both(name, weights)}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            shapes = f"{list(found[name])} in the checkpoint, {list(expected[name])} in the model"
            lines.append(f"{shapes}: {_both(name, weights)}")
    tables = {name for name, buffer in own_buffers(model) if not buffer.is_floating_point()}
    for name in sorted(expected.keys() & found.keys() - tables):
        if not there[name].is_floating_point():
            kind = str(there[name].dtype).removeprefix("torch.")
            lines.append(f"{kind} in the checkpoint, and no table: quantized: {_both(name, weights)}")
    if lines:
        raise UserError(f"checkpointer: {len(lines)} weights do not fit: {_STRANGERS}\n{listed(lines)}")


def _both(name: str, weights: Mapping[str, Tensor]) -> str:
    theirs = weights.name_of(name) if hasattr(weights, "name_of") else name
    return name if theirs == name else f"{name} ({theirs} in the folder)"


def _fill(module: nn.Module, name: str, state_dict: Mapping[str, Tensor], home: torch.device, device: torch.device):
    """Gives one module, not its children, its memory; a module that has it already is left alone."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        full_name = f"{name}.{leaf}" if name else leaf
        value = state_dict.get(full_name) if parameter.is_meta else None
        if value is None:
            continue
        # A transposed matrix is a view of what is on the disk; FSDP2 and NF4 want rows that lie one behind the other.
        dtype = frozen_base.dtype_of(module) if frozen_base.is_held(parameter) else parameter.dtype
        value = value.to(device=home, dtype=dtype, copy=True, memory_format=torch.contiguous_format)
        if frozen_base.is_held(parameter):
            frozen_base.fill(module, value)
        else:
            setattr(module, leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    for leaf, buffer in list(module.named_buffers(recurse=False)):
        if buffer.is_meta and leaf not in module._non_persistent_buffers_set:
            setattr(module, leaf, state_dict[f"{name}.{leaf}"].to(device=device, dtype=buffer.dtype, copy=True))
    # A rope of Llama 3.1 and later leaves its buffers out on the meta device. They stay on the device when offloading.
    if hasattr(module, "rope_init") and all(buffer.is_meta for buffer in module.buffers()):
        with device:
            module.rope_init()


def _fill_buffers(
    block: nn.Module, names: Mapping[int, str], buffers: Mapping[str, Tensor], device: torch.device
) -> None:
    """Gives a block those buffers of BridgedDecoder.computed_buffers that are its own."""
    for module in block.modules():
        for leaf in module._non_persistent_buffers_set:
            name = f"{names[id(module)]}.{leaf}"
            if name in buffers and getattr(module, leaf).is_meta:
                setattr(module, leaf, buffers[name].to(device, copy=True))


@torch.no_grad()
def _fill_adapter(module: nn.Module, name: str, adapter: Mapping[str, Tensor] | None, home: torch.device) -> None:
    # A GPU's generator would draw other adapters, and so make another run of it.
    for part in (module.lora_a, module.lora_b):
        part.to_empty(device="cpu" if adapter is None else home)
    if isinstance(module, DoRALinear):
        module.magnitude = nn.Parameter(torch.empty_like(module.magnitude, device=home))
    if adapter is None:
        module.initialize_parameters()
        module.lora_a.to(home)
        module.lora_b.to(home)
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
    else:
        for leaf in module.adapter_params():
            module.get_parameter(leaf).copy_(adapter[f"{name}.{leaf}"])
    fill_frozen_copy(module, home)
