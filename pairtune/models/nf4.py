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
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.utils._triton import has_triton_package
from torchao.dtypes.nf4tensor import NF4Tensor, SubclassTensorArgs, to_nf4

BLOCK = 64  # values that share a scale
SCALES = 256  # scales that are quantized together
ROW = BLOCK * SCALES
_PARTS = ("quantized_data", "nf4", "quantized_scalers", "quantization_factor", "scaler_mean")
FUSED = {"cuda"} if has_triton_package() else set()  # devices where one compiled kernel makes a weight's values


def empty(shape: torch.Size, dtype: torch.dtype, num_shards: int = 1) -> NF4Tensor:
    """Returns room for a weight [out, in]: a tensor of that shape where NF4 takes it, else [R, ROW], filled up.

    Args:
        num_shards: Into as many equal parts FSDP2 can cut it.
    """
    if len(shape) != 2 or shape.numel() % (ROW * num_shards) or shape[0] % num_shards:
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
    return dense_of(parts(weight), shape)


def parts(weight: NF4Tensor) -> list[Tensor]:
    """Returns the plain tensors that a weight is made of."""
    return [getattr(weight, name) for name in _PARTS]


def dense_of(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Returns `dense` of a weight with these `parts`."""
    data, table, scales, factors, mean = parts
    scales = (scales.view(len(factors), -1) / factors[:, None]).flatten().to(table.dtype) + mean  # [blocks]
    make = _fused if data.device.type in FUSED else _looked_up
    return make(data, table, scales)[: shape.numel()].view(shape)


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
