"""Adapters in a model: which layers have them, under which names, and how the reference is computed beside them.

A LoRA model is its own reference: with adapters off, or with a second, frozen set of them in the place of the first.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from torch import Tensor, nn
from torchtune.modules.peft import LoRALinear, disable_adapter, get_adapter_params

from pairtune.models import frozen_base
from pairtune.models.bridge.towers import towers_of
from pairtune.models.dora import DoRALinear
from pairtune.models.grouped import ExpertsLinear, LoRAExpertsLinear

COPIES = {  # an adapter's parameters, and where a frozen copy of them is
    "lora_a.weight": "frozen_a.weight",
    "lora_b.weight": "frozen_b.weight",
    "magnitude": "frozen_magnitude",
}
ADAPTED = (LoRALinear, DoRALinear, LoRAExpertsLinear)  # layers that have adapters
MENTIONED = 0.01  # of all parameters: what is told of those that no adapter reaches
_WRAPPED = "_checkpoint_wrapped_module."


def plain_name(name: str) -> str:
    """Returns a module's or parameter's name without what activation checkpointing wraps around it."""
    return name.replace(_WRAPPED, "").removesuffix("." + _WRAPPED[:-1])


def own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their names in torchtune's checkpoints; a frozen copy of adapters and scales are left out."""
    for name, parameter in model.named_parameters():
        if not plain_name(name).endswith((*(f".{copy}" for copy in COPIES.values()), ".weight_scale")):
            yield plain_name(name), parameter


def own_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the buffers that a model's files hold beside its parameters: none of torchtune's has any."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                yield f"{plain_name(path)}.{name}", buffer


def own_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of own_parameters: of weights in fewer bits, those that they stand for; and of own_buffers."""
    shapes = {name: tensor.shape for own in (own_parameters, own_buffers) for name, tensor in own(model)}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, ExpertsLinear, *ADAPTED)) and f"{plain_name(name)}.weight" in shapes:
            shapes[f"{plain_name(name)}.weight"] = frozen_base.shape_of(module)
    return shapes


def sizes(model: nn.Module) -> str:
    """Returns `num_parameters` in words, how many are in fewer bits, in towers, and in matrices without adapters."""
    num_all, num_trained = num_parameters(model)
    packed = frozen_base.summary(model)
    words = f"{num_all:,} parameters, {num_trained:,} trained{', ' * bool(packed)}{packed}"
    if in_towers := sum(p.numel() for tower in towers_of(model) for p in tower.parameters()):
        words += f"; {in_towers:,} of them are for images or sound, which pairs of texts leave as they are"
    out_of_reach = _without_adapters(model) if num_trained < num_all else {}
    share = sum(out_of_reach.values()) / num_all
    if share < MENTIONED:
        return words
    return (
        f"{words}; {share:.0%} of them are in {', '.join(sorted(out_of_reach))}, which this architecture computes by "
        "itself: they have no adapters, and stay in the run's dtype"
    )


def _without_adapters(model: nn.Module) -> Counter[str]:
    """Returns how many numbers are in matrices of layers that no module holds which an adapter could be beside."""
    found: Counter[str] = Counter()
    for layer in model.layers:
        for path, module in layer.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding, ExpertsLinear, *ADAPTED)):
                continue
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.ndim > 1:
                    found[plain_name(f"{path}.{leaf}".lstrip("."))] += parameter.numel()
    return found


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters the model has, a frozen copy of adapters left out, and how many are trained."""
    shapes = own_shapes(model)
    sizes = [(shapes[name].numel(), p.requires_grad) for name, p in own_parameters(model)]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def adapted_modules(model: nn.Module) -> list[tuple[str, LoRALinear | DoRALinear | LoRAExpertsLinear]]:
    """Returns the layers that have adapters, and their names in torchtune's checkpoints."""
    found = ((plain_name(name), module) for name, module in model.named_modules())
    return [(name, module) for name, module in found if isinstance(module, ADAPTED)]


def adapter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of the adapters' parameters, by their names in torchtune's checkpoints."""
    return {plain_name(name): parameter.shape for name, parameter in get_adapter_params(model).items()}


def add_frozen_copy(model: nn.Module) -> None:
    """Makes room for a second set of adapters, beside the trained ones: sharded and offloaded with them."""
    for _, module in adapted_modules(model):
        module.frozen_a, module.frozen_b = deepcopy(module.lora_a), deepcopy(module.lora_b)
        if isinstance(module, DoRALinear):
            module.frozen_magnitude = nn.Parameter(torch.empty_like(module.magnitude))


@torch.no_grad()
def fill_frozen_copy(module: nn.Module, home: torch.device) -> None:
    """Gives a layer's frozen copy, if it has one, its memory and the values of the trained adapter."""
    if not hasattr(module, "frozen_a"):
        return
    module.frozen_a.to_empty(device=home)
    module.frozen_b.to_empty(device=home)
    if isinstance(module, DoRALinear):
        empty = torch.empty_like(module.frozen_magnitude, device=home)
        module.frozen_magnitude = nn.Parameter(empty, requires_grad=False)
    for _, trained, copy in copied_parameters(module):
        copy.copy_(trained)


def copied_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yields a layer's trained parameters by name, each with its frozen copy; nothing where there is no copy."""
    if hasattr(module, "frozen_a"):
        for name in module.adapter_params():
            yield name, module.get_parameter(name), module.get_parameter(COPIES[name])


@contextmanager
def frozen(model: nn.Module):
    """Makes a model one without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


@contextmanager
def reference_of(model: nn.Module):
    """Makes a LoRA model its base: adapters off, no dropout, no gradients."""
    with disable_adapter(model), frozen(model):
        yield model


@contextmanager
def frozen_copy_of(model: nn.Module):
    """Makes a LoRA model with a frozen copy the model of that copy: its adapters, no dropout, no gradients.

    Modules change places, and no number does: what autograd keeps of the policy for its backward stays as it is, and a
    checkpointed layer that is computed again in backward is the policy's. FSDP2 puts gathered parameters where it found
    them, so magnitudes, which have no module of their own, are chosen by the layer.
    """
    adapted = [module for _, module in adapted_modules(model)]
    _swap_copies(adapted)
    try:
        with frozen(model):
            yield model
    finally:
        _swap_copies(adapted)


def _swap_copies(adapted: list[nn.Module]) -> None:
    for module in adapted:
        module.lora_a, module.frozen_a = module.frozen_a, module.lora_a
        module.lora_b, module.frozen_b = module.frozen_b, module.lora_b
        if isinstance(module, DoRALinear):
            module.reads_frozen = not module.reads_frozen
