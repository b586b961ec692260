"""Checkpoints that are published in fewer bits only, read as numbers: MXFP4 (gpt-oss), FP8 (DeepSeek, Qwen, Ministral).

MXFP4, of the OCP Microscaling specification: numbers of four bits, two a byte, 32 of which share a power of two; all of
them are numbers of bf16. FP8: e4m3, and a float32 scale for each block of rows and columns, or one for all.
"""

import math
from collections.abc import Collection, Mapping
from functools import partial

import torch
from torch import Tensor

from pairtune.config.fewer_bits import MXFP4, kind_of
from pairtune.errors import UserError
from pairtune.models.bridge.files import Source

DTYPES = (torch.uint8, torch.float8_e4m3fn, torch.float8_e8m0fnu)  # of tensors that are numbers with their scales only
_SCALES = ("_scale_inv", "_scale")  # behind the name of what they scale
_UNUSED = ("activation_scale", "input_scale", "act_scale")  # of activations in 8 bits, which no training has


def unpacked(tensors: Mapping[str, Tensor], config: Mapping) -> dict[str, Source]:
    """Returns, of a folder's tensors that are in fewer bits, from which of them each weight is made.

    Args:
        tensors: On the meta device, or not.
        config: The folder's config.json.

    Raises:
        UserError: A weight's scales are missing, or of another shape than it needs.
    """
    kind = kind_of(config)
    if kind is None:
        return {}
    found = {}
    for name, value in tensors.items():
        if kind == MXFP4 and name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            found[stem] = Source((name, _there(f"{stem}_scales", tensors, name)), lambda v: from_mxfp4(*v))
        elif value.dtype == torch.float8_e4m3fn:
            scale = next((name + end for end in _SCALES if name + end in tensors), name + _SCALES[0])
            block = config["quantization_config"].get("weight_block_size")
            make = partial(_from_fp8, name, block)
            found[name] = Source((name, _there(scale, tensors, name)), make)
    return found


def spent(tensors: Collection[str], sources: Mapping[str, Source]) -> set[str]:
    """Returns which tensors are no weights but parts of one, or of no use to training."""
    parts = {key for source in sources.values() for key in source.keys} - sources.keys()
    return parts | {name for name in tensors if sources and name.endswith(_UNUSED)}


def _there(scale: str, tensors: Mapping[str, Tensor], name: str) -> str:
    if scale not in tensors:
        raise UserError(f"{name} is in fewer bits, and {scale}, its scales, are not there; download the folder again")
    return scale


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """Returns the numbers [E, in, out] in bf16, for blocks [E, out, in / 32, 16] and exponents [E, out, in / 32]."""
    if blocks.is_meta:
        return blocks.new_empty(len(blocks), 2 * math.prod(blocks.shape[2:]), blocks.shape[1], dtype=torch.bfloat16)
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return convert_moe_packed_tensors(blocks, scales)


def _from_fp8(name: str, block: list[int] | None, parts: list[Tensor]) -> Tensor:
    try:
        return from_fp8(*parts, block)
    except ValueError as error:
        raise UserError(f"{name}: {error}; download the folder again") from error


def from_fp8(weight: Tensor, scale: Tensor, block: list[int] | None) -> Tensor:
    """Returns the numbers [.., out, in] in float32.

    Args:
        weight: [.., out, in], e4m3.
        scale: Of each block, [.., rows of blocks, columns of blocks], the last of which may be smaller; or one number.
        block: Rows and columns of a block.
    """
    scale = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    if scale.numel() == 1:
        return weight.float() * scale.reshape(())
    shape = [math.ceil(size / of) for size, of in zip(weight.shape[-2:], block or weight.shape[-2:], strict=True)]
    if list(scale.shape) != [*weight.shape[:-2], *shape]:
        raise ValueError(f"scales are {list(scale.shape)}, and {[*weight.shape[:-2], *shape]} are its blocks {block}")
    for dim, size in ((-2, block[0]), (-1, block[1])):
        scale = scale.repeat_interleave(size, dim).narrow(dim, 0, weight.shape[dim])
    return weight.float().mul_(scale)
