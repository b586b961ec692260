"""Linear layers whose frozen weight is held in fewer bits: NF4, int8 or fp8, and multiplied as what that stands for.

NF4 is torchao's tensor (nf4.py). int8 and fp8 (e4m3) are numbers of 8 bits and a scale a row, in plain tensors that
FSDP2 cuts as any other: the weight, int8 or the bits of fp8 as uint8, and `weight_scale` beside it.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import register_flop_formula
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import LoRALinear

from pairtune.models import nf4

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.uint8}  # and what holds their bits
LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}  # e4m3's largest number


def hold(layer: nn.Module, base_dtype: str, num_shards: int) -> nn.Module:
    """Returns a linear layer, with adapters or without, with room for its weight in fewer bits; its base is frozen.

    Args:
        base_dtype: nf4, int8 or fp8.
        num_shards: Processes that share it.
    """
    dtype, shape = layer.weight.dtype, layer.weight.shape
    if base_dtype == "nf4":
        weight = nf4.empty(shape, dtype, num_shards)
    else:
        weight = torch.empty(shape, dtype=EIGHT_BITS[base_dtype])
        layer.weight_scale = nn.Parameter(torch.empty(shape[:-1], dtype=dtype), requires_grad=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    return layer


def fill(layer: nn.Module, dense: Tensor) -> None:
    """Gives a layer that `hold` has its weight's memory, from its values [out, in] in the run's dtype."""
    if isinstance(layer.weight, NF4Tensor):
        weight = nf4.pack(dense, layer.weight)
    else:
        weight, scale = to_8_bits(dense, layer.weight.dtype, layer.weight_scale.dtype)
        layer.weight_scale = nn.Parameter(scale, requires_grad=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)


def dtype_of(layer: nn.Module) -> torch.dtype:
    """Returns the dtype that a held layer computes in."""
    return layer.weight.dtype if isinstance(layer.weight, NF4Tensor) else layer.weight_scale.dtype


def is_held(weight: Tensor) -> bool:
    """Returns whether a weight, or this process's part of it, is in fewer bits."""
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return isinstance(local, NF4Tensor) or local.dtype in LARGEST


def to_8_bits(dense: Tensor, bits: torch.dtype, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns a weight's values [.., out, in] in 8 bits, and the scales [.., out] of its rows in the run's dtype.

    A row's largest number becomes the largest that there is. Numbers are rounded for the scale as it is stored.

    Args:
        bits: int8, or uint8 for fp8.
    """
    largest, dense = LARGEST[bits], dense.float()
    scale = (dense.abs().amax(-1) / largest).to(dtype)
    scale = torch.where(scale > 0, scale, 1)  # a row of zeros
    numbers = (dense / scale.float()[..., None]).clamp(-largest, largest)
    if bits == torch.int8:
        return numbers.round().to(torch.int8), scale
    return numbers.to(torch.float8_e4m3fn).view(torch.uint8), scale


def values(weight: Tensor, scale: Tensor | None, shape: torch.Size) -> Tensor:
    """Returns the values [out, in] that a weight stands for, in the run's dtype."""
    if isinstance(weight, NF4Tensor):
        return nf4.dense(weight, shape)
    if weight.dtype not in LARGEST:
        return weight
    if weight.dtype == torch.int8:
        return weight * scale[..., None]
    return weight.view(torch.float8_e4m3fn).to(scale.dtype).mul_(scale[..., None])


def values_of(layer: nn.Module) -> Tensor:
    """Returns `values` of a linear layer."""
    return values(layer.weight, getattr(layer, "weight_scale", None), shape_of(layer))


def product(x: Tensor, layer: nn.Module, dense: Tensor | None = None) -> Tensor:
    """Returns x W^T [..., out] for x [..., in] and a layer's W in fewer bits.

    Backward goes to x only, and makes W's values anew.

    Args:
        dense: `values_of` the layer, where the caller needs them, too.
    """
    weight, scale, shape = layer.weight, getattr(layer, "weight_scale", None), shape_of(layer)
    if torch.compiler.is_compiling():
        parts = nf4.parts(weight) if isinstance(weight, NF4Tensor) else [weight, scale]
        return _one_product(x, parts, *shape)
    return _Product.apply(x, weight, scale, shape, dense)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, scale: Tensor | None, shape: torch.Size, dense: Tensor | None):
        ctx.save_for_backward(weight, scale)
        ctx.shape = shape
        return F.linear(x, (values(weight, scale, shape) if dense is None else dense).to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad @ values(*ctx.saved_tensors, ctx.shape).to(grad.dtype), None, None, None, None


# In a compiled layer, forward and backward are one graph, in which a weight's values would be made once and kept: the
# whole model in 16 bits. So the product is one operation there, and its backward another, closed to the compiler.


def _values_of_parts(parts: list[Tensor], rows: int, columns: int) -> Tensor:
    shape = torch.Size((rows, columns))
    return values(*parts, shape) if len(parts) == 2 else nf4.dense_of(parts, shape)


@torch.library.custom_op("pairtune::frozen_product", mutates_args=())
def _one_product(x: Tensor, parts: list[Tensor], rows: int, columns: int) -> Tensor:
    return F.linear(x, _values_of_parts(parts, rows, columns).to(x.dtype))


@_one_product.register_fake
def _(x: Tensor, parts: list[Tensor], rows: int, columns: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


@torch.library.custom_op("pairtune::frozen_product_backward", mutates_args=())
def _one_backward(grad: Tensor, parts: list[Tensor], rows: int, columns: int) -> Tensor:
    return grad @ _values_of_parts(parts, rows, columns).to(grad.dtype)


@_one_backward.register_fake
def _(grad: Tensor, parts: list[Tensor], rows: int, columns: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], columns)


def _keep(ctx, inputs, output) -> None:
    _, parts, *ctx.shape = inputs
    ctx.save_for_backward(*parts)


def _to_x(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _one_backward(grad, list(ctx.saved_tensors), *ctx.shape), [None] * len(ctx.saved_tensors), None, None


_one_product.register_autograd(_to_x, setup_context=_keep)


@register_flop_formula([torch.ops.pairtune.frozen_product, torch.ops.pairtune.frozen_product_backward])
def _flops(x_shape, *_, out_shape=None, **__) -> int:
    """Of the product, so that the compiler knows what it costs to make it twice."""
    return 2 * math.prod(x_shape) * out_shape[-1]


class FrozenLinear(nn.Linear):
    """A frozen linear layer that `hold` has: torchtune's FrozenNF4Linear for weights of any size, and in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for x [..., in]."""
        out = product(x, self)
        return out if self.bias is None else out + self.bias


class FrozenLoRALinear(LoRALinear):
    """torchtune's LoRALinear whose base `hold` has: in NF4 of any size, or in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for x [..., in]."""
        out = product(x, self)
        if self.bias is not None:
            out = out + self.bias
        if self.disabled:
            return out
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


def shape_of(layer: nn.Module) -> torch.Size:
    """Returns the shape [out, in] of a linear layer's weight, however it is held; of experts' one of three numbers."""
    if hasattr(layer, "shape"):
        return layer.shape
    if isinstance(layer, nn.Linear):
        return torch.Size((layer.out_features, layer.in_features))
    return torch.Size((layer.out_dim, layer.in_dim))


def summary(model: nn.Module) -> str:
    """Returns in words what of a model is in fewer bits, and what is filled up; nothing for a model that has none."""
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor) and is_held(m.weight)]
    if not layers:
        return ""
    kind = next((name for name, dtype in EIGHT_BITS.items() if layers[0].weight.dtype == dtype), "NF4")
    filled = [m for m in layers if m.weight.numel() != shape_of(m).numel()]
    values, stored = (sum(of(m).numel() for m in layers) for of in (shape_of, lambda m: m.weight))
    more = f", {len(filled)} of {len(layers)} weights filled up to whole blocks: {stored / values - 1:.2%} more"
    return f"{values:,} in {kind}{more if filled else ''}"
