"""Adapters of experts in PEFT's layout: of parameters of three dimensions (`target_parameters`).

PEFT takes a parameter [E, m, n] for E matrices of m inputs and n outputs, whatever it is: A is [r E, m], expert by
expert, B [n, r E], where neighbours are of different experts. A layer's second adapted parameter wraps the first.

E experts, r the rank.
"""

import re
from pathlib import Path

from torch import Tensor, nn

from pairtune import models
from pairtune.config.rules import show
from pairtune.errors import UserError
from pairtune.folders.peft_config import MERGE, scale_of
from pairtune.models.grouped import LoRAExpertsLinear

_NAME = re.compile(r"base_model\.model\.(?P<layer>.+?)(?P<inner>(\.base_layer)*)\.lora_(?P<part>[AB])\.weight")


def to_theirs(adapter: dict[str, Tensor], family) -> tuple[dict[str, Tensor], list[str]]:
    """Returns PEFT's tensors of those of our adapters that are experts', and their parameters' names.

    Args:
        adapter: Under our names.
        family: Of the base; only transformers' own have such parameters.
    """
    tensors, parameters = {}, {}
    for layer, matrices in getattr(family, "experts", {}).items():
        adapted = [matrix for matrix in matrices if f"{matrix.ours}.lora_a.weight" in adapter]
        for depth, matrix in enumerate(reversed(adapted)):
            a, b = (adapter[f"{matrix.ours}.lora_{part}.weight"] for part in "ab")  # [E, r, in], [E, out, r]
            first, second = (a, b) if matrix.transposed else (b.transpose(1, 2), a.transpose(1, 2))
            name = f"base_model.model.{layer}{'.base_layer' * depth}"
            tensors[f"{name}.lora_A.weight"] = first.reshape(-1, first.shape[-1]).contiguous()
            tensors[f"{name}.lora_B.weight"] = second.permute(1, 2, 0).flatten(1).contiguous()
            parameters[f"{_without_blocks(layer)}.{matrix.leaf}"] = None
    return tensors, list(parameters)


def to_ours(
    found: dict[str, Tensor], config: dict, model: nn.Module, family, path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns those of PEFT's tensors that are experts' under our names, and the others as they are.

    Args:
        config: adapter_config.json, after `check_parameters`.
        model: From models.lora.

    Raises:
        UserError: A matrix is missing or misshapen, or has another rank or scale than the others.
    """
    adapted = {name for name, layer in models.adapted_modules(model) if isinstance(layer, LoRAExpertsLinear)}
    others, pairs = {}, {}
    for name, value in found.items():
        match = _NAME.fullmatch(name)
        if match and match["layer"] in getattr(family, "experts", {}):
            depth = match["inner"].count(".")
            pairs.setdefault((match["layer"], depth), {})[match["part"]] = value
        else:
            others[name] = value
    ours = {}
    for (layer, depth), parts in pairs.items():
        matrices = [matrix for matrix in reversed(family.experts[layer]) if matrix.ours in adapted]
        if depth >= len(matrices) or parts.keys() != {"A", "B"}:
            raise UserError(f"{path}: the adapters of {layer} are not complete; write or download it again")
        matrix = matrices[depth]
        rank, alpha = scale_of(f"{layer}.{matrix.leaf}", config)
        if (rank, alpha) != (config["r"], config["lora_alpha"]):
            raise UserError(
                f"{path}: {layer}.{matrix.leaf} has rank {rank} and alpha {alpha:g} (rank_pattern, alpha_pattern); "
                f"ranks and scales that differ between layers are not available here; {MERGE}"
            )
        first, second, num_experts = parts["A"], parts["B"], matrix.num_experts
        if first.dim() != 2 or second.dim() != 2 or not len(first) == second.shape[1] == rank * num_experts:
            raise UserError(
                f"{path}: {layer}.{matrix.leaf}: A is {list(first.shape)} and B {list(second.shape)}, which is not "
                f"rank {rank} for {num_experts} experts; write or download the adapter again"
            )
        a, b = first.view(num_experts, rank, -1), second.view(-1, rank, num_experts).permute(2, 0, 1)
        if not matrix.transposed:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        ours |= {f"{matrix.ours}.lora_a.weight": a.contiguous(), f"{matrix.ours}.lora_b.weight": b.contiguous()}
    return ours, others


def check_parameters(targets, model: nn.Module, family, key: str) -> None:
    """Checks that `target_parameters` are those of the model's adapted experts.

    Args:
        key: What the config has for the adapter's folder, as KEY=FOLDER, for messages.

    Raises:
        UserError: They are others.
    """
    targets = targets if isinstance(targets, list) else [targets] if targets else []
    known = {
        f"{layer}.{matrix.leaf}": matrix.ours for layer, of in getattr(family, "experts", {}).items() for matrix in of
    }
    meant = {target: {o for name, o in known.items() if f".{name}".endswith(f".{target}")} for target in targets}
    if strange := [target for target, ours in meant.items() if not ours]:
        there = sorted({_without_blocks(name) for name in known})
        raise UserError(
            f"{key}: target_parameters has {', '.join(map(show, strange))}; parameters that can be adapted here are "
            f"{', '.join(there) or 'none, for this model'}; {MERGE}"
        )
    wanted = set().union(*meant.values())
    adapted = {name for name, layer in models.adapted_modules(model) if isinstance(layer, LoRAExpertsLinear)}
    if wanted != adapted:
        leaves = [", ".join(sorted({name.rpartition(".")[2] for name in names})) for names in (wanted, adapted)]
        raise UserError(
            f"{key}: target_parameters means experts' {leaves[0] or 'nothing'}, and lora.modules {leaves[1] or 'none'} "
            "of experts; nearest valid: lora.modules with the former"
        )


def _without_blocks(layer: str) -> str:
    """Returns mlp.experts for model.layers.3.mlp.experts."""
    return re.sub(r"^.*\.\d+\.", "", layer)
