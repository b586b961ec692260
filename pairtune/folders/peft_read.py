"""Adapters in: PEFT's layout, as PEFT, TRL and we write it, or torchtune's names.

PEFT adapts Hugging Face's layers, of which some hold several of ours (families.py): a fused one's adapter is read as
one for each of them.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pairtune import models
from pairtune.config.layout import BASE_FILE, find_adapter, read_record
from pairtune.errors import UserError
from pairtune.folders import peft_experts
from pairtune.folders.digests import digest_samples
from pairtune.folders.peft_config import MERGE, check_kind, check_layers, check_settings, read_config, scale_of
from pairtune.folders.tensors import read_shard
from pairtune.folders.weights import ModelFolder, Weights

# PEFT saves magnitudes with and without ".weight", by its version.
_PEFT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?")
_BASE_WEIGHT = re.compile(r"base_model\.model\.(?P<layer>.+?)(\.base_layer)?\.weight")


def read_adapter(folder: str | Path, model: nn.Module, base: ModelFolder, *, key: str = "adapter") -> dict[str, Tensor]:
    """Returns an adapter's matrices under torchtune's names and in its rotary order: what models.load starts from.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors (or .bin) in PEFT's layout, or adapter_model.pt
            or .safetensors under torchtune's names; the latter say nothing about alpha, which is taken as it is.
        model: From models.lora; may be on the meta device. It tells rank, alpha, adapted layers and shapes.
        base: From weights.open_weights.
        key: The config's name for `folder`, for messages.

    Raises:
        UserError: No adapter there, a damaged file, another base, rank, alpha or choice of layers than the model's,
            something that LoRA as it is here cannot do, or matrices that are missing, too many, misshapen or not
            finite.
    """
    folder, path = Path(folder), find_adapter(folder, key=key)
    key = f"{key}={folder}"
    found = read_shard(path)
    has_peft_names = any(name.startswith("base_model.") for name in found)
    if has_peft_names or (folder / "adapter_config.json").is_file():
        config = read_config(folder, key)
        check_kind(config, key)
        check_layers(config.get("target_modules"), model, base.family, key)
        peft_experts.check_parameters(config.get("target_parameters"), model, base.family, key)
        layers, of_experts = [], {}
        if has_peft_names:
            of_experts, found = peft_experts.to_ours(found, config, model, base.family, path)
            layers = [_cut(*layer, config, model, base, path) for layer in _by_layer(found, base, path)]
        check_settings(config | _shared_scale(layers, config, key), model, key)
        found = _join(layers, config) | of_experts if has_peft_names else found
    _check_tensors(found, models.adapter_shapes(model), path)
    _check_base(folder, base, key)
    return found


def _by_layer(found: dict[str, Tensor], base: ModelFolder, path: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields PEFT's layers with their matrices, A and B, and magnitudes; weights of the base are compared with it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in found.items():
        if match := _PEFT_NAME.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["part"]] = value
        else:
            _check_base_weight(name, value, base, path)
    for layer, matrices in layers.items():
        if base.family.find_theirs(layer) is None:
            raise UserError(f"{path}: {layer} is no layer of {base.family.name}, which the base is")
        yield layer, matrices


@dataclass(frozen=True)
class _Layer:
    """One of PEFT's layers, cut into ours.

    Attributes:
        name: PEFT's.
        parts: Our layers in it that are adapted.
        a: [rank, in].
        rows: Of B, [out, rank], those of each part.
        magnitudes: Of each part, or nothing.
        rank, alpha: What adapter_config.json says of it.
    """

    name: str
    parts: list[str]
    a: Tensor
    rows: list[Tensor]
    magnitudes: list[Tensor]
    rank: int
    alpha: float


def _cut(
    layer: str, matrices: dict[str, Tensor], config: dict, model: nn.Module, base: ModelFolder, path: Path
) -> _Layer:
    """Returns one of PEFT's layers in parts.

    Raises:
        UserError: A matrix is missing or misshapen, or rows are adapted that the model has no adapter for.
    """
    module, ours = base.family.find_theirs(layer)
    rank, alpha = scale_of(layer, config)
    if lacking := {"A", "B"} - matrices.keys():
        raise UserError(
            f"{path}: {layer}.lora_{lacking.pop()} is not in it, and the other matrix is; write or download it again"
        )
    a, b, magnitude = matrices["A"], matrices["B"], matrices.get("magnitude_vector")
    shapes = [list(a.shape), list(b.shape)]
    if [len(shape) for shape in shapes] != [2, 2] or not rank == shapes[0][0] == shapes[1][1]:
        raise UserError(
            f"{path}: {layer}.lora_A is {shapes[0]} and {layer}.lora_B {shapes[1]}, which is not rank {rank}, as "
            "adapter_config.json says; write or download the adapter again"
        )
    try:
        rows = module.split(b, base.config)
        magnitudes = [] if magnitude is None else module.split(magnitude.flatten(), base.config)
    except RuntimeError:
        also = "" if magnitude is None else f", or its magnitude {list(magnitude.shape)}"
        raise UserError(f"{path}: {layer}.lora_B is {shapes[1]}{also}: not rows of this base's heads") from None
    adapted = {name for name, _ in models.adapted_modules(model)}
    kept = [i for i, name in enumerate(ours) if name in adapted] or range(len(ours))  # what none adapts is told later
    if also := [name for i, name in enumerate(ours) if i not in kept and rows[i].any()]:
        raise UserError(f"{path}: {layer} adapts {', '.join(also)}, too; nearest valid: add it to lora.modules")
    return _Layer(
        layer,
        [ours[i] for i in kept],
        a,
        [rows[i] for i in kept],
        [magnitudes[i] for i in kept if magnitudes],
        rank,
        alpha,
    )


def _shared_scale(layers: list[_Layer], config: dict, key: str) -> dict:
    """Returns the `r` and `lora_alpha` that all layers have, which patterns may give to all of them.

    Raises:
        UserError: They differ between layers.
    """
    scales = {_in_blocks(layer, config) or (layer.rank, layer.alpha): layer.name for layer in layers}
    if len(scales) > 1:
        told = [f"{name} has rank {rank} and alpha {alpha:g}" for (rank, alpha), name in scales.items()]
        raise UserError(
            f"{key}: {', '.join(told[:2])} (rank_pattern, alpha_pattern); ranks and scales that differ between layers "
            f"are not available here; {MERGE}"
        )
    return dict(zip(("r", "lora_alpha"), *scales, strict=True)) if scales else {}


def _in_blocks(layer: _Layer, config: dict) -> tuple[int, float] | None:
    """Returns rank and alpha of each of our layers in a fused one where each has a block of its own, as we write it."""
    rank, alpha, power = config["r"], config["lora_alpha"], 0.5 if config.get("use_rslora") else 1
    same_scale = math.isclose(layer.alpha / layer.rank**power, alpha / rank**power, rel_tol=1e-6)
    return (rank, alpha) if layer.rank != rank and same_scale and _take_apart(layer, rank) else None


def _join(layers: list[_Layer], config: dict) -> dict[str, Tensor]:
    """Returns the matrices under our names."""
    converted = {}
    for layer in layers:
        rank, _ = _in_blocks(layer, config) or (layer.rank, layer.alpha)
        for name, (a, b) in zip(layer.parts, _take_apart(layer, rank), strict=True):
            converted |= {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b}
        converted |= {f"{name}.magnitude": m for name, m in zip(layer.parts, layer.magnitudes, strict=False)}
    return converted


def _take_apart(layer: _Layer, rank: int) -> list[tuple[Tensor, Tensor]] | None:
    """Returns A and B of this rank for each part; None if they are of another.

    Of a fused layer all may share A, which each then has a copy of; or each has a block of its own, as we write it.
    """
    a, rows = layer.a, layer.rows
    if len(a) == rank:
        return [(a, r) for r in rows]
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(rows))]
    if len(a) != rank * len(rows):
        return None
    for r, own in zip(rows, blocks, strict=True):
        rest = r.clone()
        rest[:, own] = 0
        if rest.any():  # a part reads another one's A
            return None
    return [(a[own], r[:, own].contiguous()) for r, own in zip(rows, blocks, strict=True)]


def _check_base(folder: Path, base: ModelFolder, key: str) -> None:
    """Compares the base's weights with those that the adapter was trained on, if it is one of ours.

    Only files of the same names: a base that was cut into other shards may be the same one.
    """
    then = read_record(folder / BASE_FILE).get("weights")
    if not isinstance(then, dict):
        return
    now = digest_samples(base.weight_files)
    if then.keys() == now.keys() and then != now:
        raise UserError(
            f"{key}: was trained on other weights than {base.path} holds, though under the same file names "
            f"({BASE_FILE}); name the folder that it was trained on as checkpointer.checkpoint_dir"
        )


def _check_base_weight(name: str, value: Tensor, base: ModelFolder, path: Path) -> None:
    """PEFT saves an output layer that it adapts, and if asked to embedding and output: they tell the base."""
    match = _BASE_WEIGHT.fullmatch(name)
    try:
        saved = base.family.to_ours(f"{match['layer']}.weight", value, base.config) if match else None
    except (KeyError, RuntimeError):
        saved = None
    if saved is None:
        raise UserError(f"{path}: {name} is no matrix of a LoRA adapter, and no weight of its base; {MERGE}")
    own = Weights(base)
    if not all(ours in own and _is_rounded(part, own[ours]) for ours, part in saved.items()):
        raise UserError(
            f"{path}: {match['layer']} is not the base model's layer; the adapter is of another base, or trained that "
            f"layer, too: {MERGE}"
        )


def _is_rounded(one: Tensor, other: Tensor) -> bool:
    """Returns whether they are the same but for one having been rounded to the other's dtype."""
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)


def _check_tensors(found: dict[str, Tensor], expected: dict[str, torch.Size], path: Path) -> None:
    for names, what in (
        (expected.keys() - found.keys(), "of the model's adapters are not in it"),
        (found.keys() - expected.keys(), "of its matrices are not in the model's adapters"),
    ):
        if names:
            raise UserError(
                f"{path}: {len(names)} {what}, such as {min(names)}: `model`, lora.modules and it do not "
                "belong together"
            )
    for name, value in found.items():
        if value.shape != expected[name]:
            raise UserError(
                f"{path}: {name} is {list(value.shape)} there and {list(expected[name])} in the model; lora.rank, or a "
                "base of another size"
            )
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; write or download it again")
