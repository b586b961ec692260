"""Adapters to start from: PEFT's layout, as PEFT, TRL and our own export write it, or torchtune's names.

What is written is in checkpoint.py.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torchtune import training
from torchtune.models.convert_weights import _FROM_HF, _TO_PEFT_TARGET_MODULES

from pairtune import models
from pairtune.checkpoint import Weights, pairs_together, read_shard
from pairtune.errors import UserError

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
MLP = ("w1", "w2", "w3")
_PEFT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>[AB])\.weight")
_BASE_OUTPUT = "base_model.model.lm_head.base_layer.weight"
_HF_LAYERS = {hf.removesuffix(".weight"): tune.removesuffix(".weight") for hf, tune in _FROM_HF.items() if tune}

# Of adapter_config.json: what changes the adapted model in a way that ours cannot follow. Absent, null, false or empty
# is as it should be, and so is what stands here.
CANNOT = {
    "use_rslora": "scales by alpha / sqrt(rank)",
    "use_dora": "DoRA, with a magnitude",
    "lora_bias": "biases of adapters",
    "bias": "trained biases",
    "modules_to_save": "whole layers that were trained",
    "trainable_token_indices": "trained embeddings",
    "target_parameters": "adapters of parameters that are no layers",
    "rank_pattern": "ranks that differ between layers",
    "alpha_pattern": "alphas that differ between layers",
    "layers_to_transform": "adapters in some layers only",
    "layer_replication": "layers used twice",
    "fan_in_fan_out": "transposed weights",
    "use_qalora": "QA-LoRA, with pooled inputs",
    "alora_invocation_tokens": "adapters that are on for a part of the tokens",
    "arrow_config": "a mixture of adapters",
    "megatron_config": "Megatron's layers",
}
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # other init_lora_weights change the base weights


def read_adapter(folder: str | Path, model: nn.Module, checkpointer, *, key: str = "adapter") -> dict[str, Tensor]:
    """Returns an adapter's matrices under torchtune's names and in its rotary order: what models.load starts from.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors (or .bin) in PEFT's layout, or adapter_model.pt
            or .safetensors under torchtune's names; the latter say nothing about alpha, which is taken as it is.
        model: From models.lora; may be on the meta device. It tells rank, alpha, adapted layers and shapes.
        checkpointer: From checkpoint.open_weights, of the base.
        key: The config's name for `folder`, for messages.

    Raises:
        UserError: No adapter there, a damaged file, another rank, alpha or choice of layers than the model's, something
            that LoRA as it is here cannot do, or matrices that are missing, too many, misshapen or not finite.
    """
    folder = Path(folder)
    key = f"{key}={folder}"
    path = find_weights(folder, key=key)
    found = read_shard(path)
    if any(name.startswith("base_model.") for name in found):
        _check_config(_read_config(folder, key), model, key)
        if checkpointer._model_type in (training.ModelType.PHI3_MINI, training.ModelType.PHI4):
            raise UserError(
                f"{key}: PEFT adapts Phi's fused qkv_proj and gate_up_proj, which are separate layers here; take an "
                "adapter that was exported here (adapter_model.pt), or merge it into the base and start from that"
            )
        found = _from_peft(found, checkpointer, path)
    elif (folder / "adapter_config.json").is_file():
        _check_config(_read_config(folder, key), model, key)
    _check_tensors(found, models.adapter_shapes(model), path)
    return found


def find_weights(folder: str | Path, *, key: str = "adapter") -> Path:
    """Returns the file of an adapter's matrices.

    Raises:
        UserError: There is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; `tune download REPO_ID --output-dir {folder}` fetches one")
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    inside = [file.parent for name in WEIGHT_FILES for file in folder.glob(f"*/{name}")]
    hint = f"; nearest valid: {key.partition('=')[0]}={inside[0]}" if inside else ""
    raise UserError(f"{key}: holds no adapter; looked for {', '.join(WEIGHT_FILES)}{hint}")


def _read_config(folder: Path, key: str) -> dict:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{key}: lacks adapter_config.json, which says how its matrices are scaled")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; write or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an adapter's settings")
    return content


def _check_config(config: dict, model: nn.Module, key: str) -> None:
    _check_kind(config, key)
    layers = models.adapted_modules(model)
    for _, layer in layers[:1]:  # all have the same
        for setting, ours, value in (("r", "rank", layer.rank), ("lora_alpha", "alpha", layer.alpha)):
            if config.get(setting) != value:
                raise UserError(
                    f"{key}: {setting} is {config.get(setting)} in its adapter_config.json, lora.{ours} is {value}; "
                    f"nearest valid: lora.{ours}={config.get(setting)}"
                )
    _check_layers(config.get("target_modules"), {name.rpartition(".")[2] for name, _ in layers}, key)


def _check_kind(config: dict, key: str) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{key}: peft_type is {config['peft_type']}; recipes train LORA adapters only")
    way_out = "merge it into the base model (PEFT's merge_and_unload) and start from that"
    for setting, what in CANNOT.items():
        if config.get(setting) and config[setting] != "none":
            raise UserError(f"{key}: {setting}={config[setting]} ({what}) is not available here; {way_out}")
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UserError(
            f"{key}: init_lora_weights={start} changes the base weights, too; convert it to plain LoRA (PEFT's "
            f"save_pretrained with path_initial_model_for_weight_conversion), or {way_out}"
        )


def _check_layers(targets, adapted: set[str], key: str) -> None:
    """`targets` may be paths of layers, of which the last part counts; a pattern is left to the matrices' names."""
    if not isinstance(targets, list):
        return
    ours = {theirs: name for name, theirs in _TO_PEFT_TARGET_MODULES.items()}
    last = sorted({str(target).rpartition(".")[2] for target in targets})
    strange = [target for target in last if target not in ours]
    if strange:
        raise UserError(
            f"{key}: target_modules has {', '.join(strange)}; layers that can be adapted here are "
            f"{', '.join(_TO_PEFT_TARGET_MODULES.values())}"
        )
    wanted = {ours[target] for target in last}
    if wanted == adapted:
        return
    if wanted & set(MLP) and not wanted.issuperset(MLP):
        raise UserError(
            f"{key}: target_modules is {', '.join(last)}; of gate_proj, up_proj and down_proj all are adapted here "
            "(lora.modules: mlp), or none"
        )
    raise UserError(
        f"{key}: target_modules is {', '.join(last)}, lora.modules is {_as_modules(adapted)}; "
        f"nearest valid: lora.modules={_as_modules(wanted)}"
    )


def _as_modules(layers: set[str]) -> str:
    names = [name for name in _TO_PEFT_TARGET_MODULES if name in layers and name not in (*MLP, "output")]
    names += ["mlp"] * layers.issuperset(MLP) + ["output"] * ("output" in layers)
    return f"[{', '.join(names)}]"


def _from_peft(found: dict[str, Tensor], checkpointer, path: Path) -> dict[str, Tensor]:
    config, kind = checkpointer._config, checkpointer._model_type
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    converted = {}
    for name, value in found.items():
        if name == _BASE_OUTPUT:
            _check_base_output(value, checkpointer, path)
            continue
        layer, part = _tune_layer(name, path)
        last = layer.rpartition(".")[2]
        if part == "b" and last in heads and kind is not training.ModelType.QWEN2:  # its rotary order is PEFT's
            value = _rotary_order(value, heads[last], name, path)
        converted[f"{layer}.lora_{part}.weight"] = value
    return converted


def _check_base_output(value: Tensor, checkpointer, path: Path) -> None:
    """PEFT saves the base weights of an output layer that it adapts: they tell whether the base is this one."""
    base = Weights(checkpointer).get("output.weight")
    # One of them may have been rounded to the other's dtype.
    if base is None or not (torch.equal(value, base.to(value.dtype)) or torch.equal(value.to(base.dtype), base)):
        raise UserError(
            f"{path}: {_BASE_OUTPUT} is not the base model's output layer; the adapter is of another base, or trained "
            "that layer, too: merge it into its base (PEFT's merge_and_unload) and start from that"
        )


def _tune_layer(name: str, path: Path) -> tuple[str, str]:
    """layers.0.attn.q_proj and a, for base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight."""
    match = _PEFT_NAME.fullmatch(name)
    number = re.search(r"\.(\d+)\.", match["layer"]) if match else None
    layer = _HF_LAYERS.get(match["layer"].replace(number[0], ".{}.") if number else match["layer"]) if match else None
    if layer is None:
        raise UserError(f"{path}: {name} is no matrix of a LoRA adapter of a causal language model's linear layers")
    return (layer.format(number[1]) if number else layer), match["part"].lower()


def _rotary_order(matrix: Tensor, heads: int, name: str, path: Path) -> Tensor:
    """Returns a projection's B, [rows, rank], from Hugging Face's rotary order in torchtune's."""
    if matrix.dim() != 2 or matrix.shape[0] % (2 * heads):
        raise UserError(f"{path}: {name} is {list(matrix.shape)}, not rows of {heads} heads: of another base model")
    return pairs_together(matrix, heads)


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
