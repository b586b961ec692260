"""Matrix products of a model's layers in fp8 (e4m3), by torchao: for full fine-tuning, where a GPU has them.

Weights, gradients and optimizer stay in the run's dtype. Each token, and each row of a weight, has a scale of its own,
made anew for each product: what a pair comes to does not depend on the pairs beside it, and there is no state to keep.
Gradients of weights are products in the run's dtype (torchao's recipe rowwise_with_gw_hp): rows of any length do.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import torch
from torch import nn
from torchao.float8 import Float8LinearConfig
from torchao.float8.float8_linear import Float8Linear

from pairtune.errors import UserError
from pairtune.models.additions import additions
from pairtune.models.build import UNQUANTIZED, dtype_of, parts_of
from pairtune.models.execution import layers_of, plainly

RECIPE = "rowwise_with_gw_hp"
MULTIPLE = 16  # of both sizes of a weight, for the kernels
NEEDED = (8, 9)  # a GPU's compute capability


def convert(model: nn.Module, device: torch.device) -> str:
    """Makes the linear layers within a model's layers multiply in fp8; returns which share of it, in words.

    Not the output layer, routers, experts' matrices, nor a layer whose sizes the kernels do not take.

    Args:
        model: From models.full and models.fit, before it is executed; bf16.
        device: A CPU emulates it: the same rounding, and slower.

    Raises:
        UserError: A GPU without fp8, another dtype, adapters, or no layer that it could be.
    """
    check(model, device)
    how = replace(Float8LinearConfig.from_recipe_name(RECIPE), emulate=device.type == "cpu")
    parts, inside = parts_of(model), {id(m) for layer in layers_of(model) for m in layer.modules()}
    linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and id(m) in inside}
    fits = {n for n, m in linear.items() if not any(size % MULTIPLE for size in m.weight.shape)}
    chosen = {n: m for n, m in linear.items() if n in fits and not UNQUANTIZED & parts[n]}
    if not chosen:
        raise UserError(
            f"enable_fp8_training=true: no linear layer here has sizes that are multiples of {MULTIPLE}; nearest "
            "valid: enable_fp8_training=false"
        )
    for name, layer in chosen.items():
        model.set_submodule(name, Float8Linear.from_float(layer, config=how))
    additions(model).fp8 = RECIPE
    share = sum(m.weight.numel() for m in chosen.values()) / sum(p.numel() for p in model.parameters())
    left = f", {len(linear) - len(chosen)} linear layers left out" if len(chosen) < len(linear) else ""
    emulated = ", emulated: no faster" if how.emulate else ""
    return f"enable_fp8_training: products of {share:.0%} of the parameters in fp8{left}{emulated}\n"


def convert_like(policy: nn.Module, reference: nn.Module, device: torch.device) -> None:
    """Makes a reference that the policy starts from compute as the policy does."""
    if additions(policy).fp8:
        convert(reference, device)


def check(model: nn.Module, device: torch.device) -> None:
    """Refuses what has no fp8 products.

    Raises:
        UserError: See `convert`.
    """
    if additions(model).lora is not None:
        raise UserError(
            "enable_fp8_training=true: is of full recipes, where products of trained weights are; base_dtype=fp8 in "
            "qlora_ recipes holds a frozen base so; nearest valid: enable_fp8_training=false"
        )
    if dtype_of(model) != "bf16":
        raise UserError("enable_fp8_training=true: fp8 products give bf16; nearest valid: dtype=bf16")
    if device.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(device)
        if capability < NEEDED:
            raise UserError(
                f"enable_fp8_training=true: this GPU's compute capability is {capability[0]}.{capability[1]}, and fp8 "
                f"wants {NEEDED[0]}.{NEEDED[1]} (Ada, Hopper) or above; nearest valid: enable_fp8_training=false"
            )


@contextmanager
def off(model: nn.Module) -> Iterator[None]:
    """While it lasts, products are of the model's dtype: what its weights come to anywhere else."""
    layers = [m for m in model.modules() if isinstance(m, Float8Linear)]
    for layer in layers:
        layer.forward = partial(nn.Linear.forward, layer)
    try:
        with plainly(model) if layers else nullcontext():
            yield
    finally:
        for layer in layers:
            del layer.forward
