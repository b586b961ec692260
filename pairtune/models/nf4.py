"""Weights in 4 bits (NF4, arXiv 2305.14314): torchao's tensor, for matrices of any size on any number of processes.

torchao quantizes the scales of 256 blocks of 64 values together and cuts a tensor between those only. A weight that is
no multiple of that, or not on each process, is held as rows of 16,384 values, of which the last are filled up; its
layer knows its shape. What is filled up changes no value of the weight.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor
from torch.utils._triton import has_triton_package
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs, to_nf4
from torchtune.modules.peft import LoRALinear

BLOCK = 64  # values that share a scale
SCALES = 256  # scales that are quantized together
ROW = BLOCK * SCALES
FUSED = {"cuda"} if has_triton_package() else set()  # devices where one compiled kernel makes a weight's values


def empty(shape: torch.Size, dtype: torch.dtype, num_shards: int = 1) -> NF4Tensor:
    """Returns room for a weight [out, in]: a tensor of that shape where NF4 takes it, else [R, ROW], filled up.

    Args:
        num_shards: Into as many equal parts FSDP2 can cut it.
    """
    if shape.numel() % (ROW * num_shards) or shape[0] % num_shards:
        rows = math.ceil(shape.numel() / ROW)
        shape = torch.Size((math.ceil(rows / num_shards) * num_shards, ROW))
    num_blocks = shape.numel() // BLOCK
    return _tensor(
        shape,
        data=torch.empty(shape.numel() // 2, dtype=torch.uint8),
        scales=torch.empty(num_blocks, dtype=torch.int8),
        factors=torch.empty(num_blocks // SCALES, dtype=dtype),
        mean=torch.empty((), dtype=dtype),
        table=torch.empty(16, dtype=dtype),
    )


def pack(values: Tensor, like: NF4Tensor) -> NF4Tensor:
    """Returns a weight's values [out, in] in 4 bits, in the shape of `empty`'s."""
    if values.shape == like.shape:
        return to_nf4(values, BLOCK, SCALES)
    return _fill_up(values, like.shape)


def _fill_up(values: Tensor, shape: torch.Size) -> NF4Tensor:
    """torchao's steps with zeros behind the values, which neither the mean of the scales nor a factor hears of."""
    num_blocks = math.ceil(values.numel() / BLOCK)
    values = F.pad(values.flatten(), (0, shape.numel() - values.numel()))
    scales = values.view(-1, BLOCK).abs().amax(1)
    mean = scales[:num_blocks].mean()
    scales = scales - mean
    scales[num_blocks:] = 0
    scales = scales.view(-1, SCALES)
    largest = scales.abs().amax(1)
    factors = torch.where(largest > 0, 256 / (2 * largest), 1)
    table = to_nf4(values.new_zeros(1, ROW), BLOCK, SCALES).nf4
    return _tensor(
        shape,
        data=NF4Tensor.convert_to_norm_float_weight(values, shape.numel() // BLOCK, BLOCK, table),
        scales=(scales * factors[:, None]).round().clamp(-128, 127).flatten().to(torch.int8),
        factors=factors,
        mean=mean,
        table=table,
    )


def _tensor(shape: torch.Size, *, data: Tensor, scales: Tensor, factors: Tensor, mean: Tensor, table: Tensor):
    form = SubclassTensorArgs(shape, (shape[1], 1), 0, table.dtype, table.device, False)
    return NF4Tensor(form, BLOCK, shape.numel() // BLOCK, SCALES, scales, factors, mean, data, table)


@torch.no_grad()
def dense(weight: NF4Tensor, shape: torch.Size) -> Tensor:
    """Returns the values [out, in] that the 4 bits stand for: torchao's bit for bit, in a tenth of its time."""
    if torch.compiler.is_compiling():  # a layer that is compiled makes one kernel of torchao's steps
        return weight.get_original_weight().flatten()[: shape.numel()].view(shape)
    factors = weight.quantization_factor
    scales = (weight.quantized_scalers.view(len(factors), -1) / factors[:, None]).flatten().to(weight.dtype)
    scales = scales + weight.scaler_mean  # [blocks]
    data, table = weight.quantized_data, weight.nf4
    make = _fused if weight.device.type in FUSED else _looked_up
    values = make(data, table, scales)
    return values[: shape.numel()].view(shape)


def _looked_up(data: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    """A byte holds two numbers of the table: one of 256 pairs, each of which is looked up as one integer."""
    pair = torch.int32 if table.itemsize == 2 else torch.int64
    pairs = torch.cartesian_prod(table, table).view(pair).flatten()
    values = pairs.index_select(0, data.int()).view(table.dtype)
    return values.view(-1, BLOCK).mul_(scales[:, None]).flatten()


def _fused(data: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    if data.is_meta:
        return table.new_empty(2 * len(data))
    try:
        return _one_kernel()(data, table, scales)
    except TorchDynamoException as error:  # as where no C compiler is
        FUSED.discard(data.device.type)
        why = str(error).partition("\n")[0]
        warnings.warn(f"NF4 weights are read without a kernel of their own, more slowly: {why}", stacklevel=2)
        return _looked_up(data, table, scales)


def _step_by_step(data: Tensor, table: Tensor, scales: Tensor) -> Tensor:
    values = torch.stack([table[(data >> 4).int()], table[(data & 15).int()]], dim=-1)
    return (values.view(-1, BLOCK) * scales[:, None]).flatten()


@cache
def _one_kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Of fixed sizes, of which a model has a few: no temporary is as large as the values, on an H100 at 2.6 TB/s."""
    return torch.compile(_step_by_step, dynamic=False)


def product(x: Tensor, layer: nn.Module, values: Tensor | None = None) -> Tensor:
    """Returns x W^T [..., out] for x [..., in] and a layer's W in 4 bits.

    Backward goes to x only, and makes W's values anew.

    Args:
        values: `values_of` the layer, where the caller needs them, too.
    """
    return _Product.apply(x, layer.weight, shape_of(layer), values)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: NF4Tensor, shape: torch.Size, values: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape = shape
        return F.linear(x, (dense(weight, shape) if values is None else values).to(x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return grad @ dense(weight, ctx.shape).to(grad.dtype), None, None, None


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight `hold` puts in 4 bits: torchtune's FrozenNF4Linear for weights of any size."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for x [..., in]."""
        out = product(x, self)
        return out if self.bias is None else out + self.bias


class NF4LoRALinear(LoRALinear):
    """torchtune's LoRALinear whose base's weight `hold` puts in 4 bits, of any size."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for x [..., in]."""
        out = product(x, self)
        if self.bias is not None:
            out = out + self.bias
        if self.disabled:
            return out
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(x)))


def hold(layer: nn.Module, num_shards: int) -> nn.Module:
    """Returns a linear layer, with adapters or without, with room for its weight in 4 bits; its base is frozen."""
    weight = empty(layer.weight.shape, layer.weight.dtype, num_shards)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        layer.bias.requires_grad_(False)
    return layer


def values_of(layer: nn.Module) -> Tensor:
    """Returns the values [out, in] of a linear layer's weight, in 4 bits or not."""
    return dense(layer.weight, shape_of(layer)) if isinstance(layer.weight, NF4Tensor) else layer.weight


def shape_of(layer: nn.Module) -> torch.Size:
    """Returns the shape [out, in] of a linear layer's weight, however it is held."""
    if isinstance(layer, nn.Linear):
        return torch.Size((layer.out_features, layer.in_features))
    return torch.Size((layer.out_dim, layer.in_dim))


def summary(model: nn.Module) -> str:
    """Returns in words what of a model is in 4 bits, and what is filled up; nothing for a model that has none."""
    held = [module for module in model.modules() if isinstance(_shard_of(getattr(module, "weight", None)), NF4Tensor)]
    if not held:
        return ""
    filled = [m for m in held if m.weight.shape != shape_of(m)]
    values, stored = (sum(of(m).numel() for m in held) for of in (shape_of, lambda m: m.weight))
    more = f", {len(filled)} of {len(held)} weights filled up to whole blocks: {stored / values - 1:.2%} more"
    return f"{values:,} in NF4{more if filled else ''}"


def _shard_of(weight: Tensor | None) -> Tensor | None:
    return weight.to_local() if isinstance(weight, DTensor) else weight
