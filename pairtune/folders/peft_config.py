"""What an adapter's adapter_config.json says: whether LoRA here can follow it, and how its matrices are scaled."""

import re
from pathlib import Path

from torch import nn
from torchtune.modules import TiedLinear

from pairtune import models
from pairtune.config.rules import LORA_LAYERS, fits, kind_words, show
from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.folders.bridged import BridgedFamily
from pairtune.folders.families import Family, Module
from pairtune.models.grouped import LoRAExpertsLinear

MERGE = "merge it into the base model (PEFT's merge_and_unload) and start from that"

# Of adapter_config.json: what changes the adapted model in a way that ours cannot follow. Absent, null, false or empty
# is as it should be, and so is what stands here.
CANNOT = {
    "lora_bias": "biases of adapters",
    "bias": "trained biases",
    "modules_to_save": "whole layers that were trained",
    "trainable_token_indices": "trained embeddings",
    "layers_to_transform": "adapters in some layers only",
    "layer_replication": "layers used twice",
    "use_qalora": "QA-LoRA, with pooled inputs",
    "alora_invocation_tokens": "adapters that are on for a part of the tokens",
    "arrow_config": "a mixture of adapters",
    "megatron_config": "Megatron's layers",
}
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # other init_lora_weights change the base weights


def read_config(folder: Path, key: str) -> dict:
    """Returns a folder's adapter_config.json.

    Args:
        key: What the config has for `folder`, as KEY=FOLDER, for messages; so for the functions below.

    Raises:
        UserError: There is none, or it is no object.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{key}: lacks adapter_config.json, which says how its matrices are scaled")
    return read_object(path, way_out="write or download it again")


def check_kind(config: dict, key: str) -> None:
    """Checks that it is of a LoRA adapter that changes a model as those here do.

    Raises:
        UserError: It is not, or a setting that is read has not the kind that it must have.
    """
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{key}: peft_type is {config['peft_type']}; recipes train LORA adapters only")
    for setting, what in CANNOT.items():
        if config.get(setting) and config[setting] != "none":
            raise UserError(f"{key}: {setting}={config[setting]} ({what}) is not available here; {MERGE}")
    for setting, kind in (("r", int), ("lora_alpha", float)):
        value = config.get(setting)
        if not fits(value, kind) or value <= 0:
            raise UserError(
                f"{key}: {setting} is {show(value)} in its adapter_config.json, must be {kind_words(kind)} above 0; "
                "write or download it again"
            )
    for setting in ("rank_pattern", "alpha_pattern"):
        if not _are_patterns(config.get(setting) or {}):
            raise UserError(
                f"{key}: {setting}={show(config[setting])} must be numbers by patterns of layers' names; write or "
                "download it again"
            )
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UserError(
            f"{key}: init_lora_weights={start} changes the base weights, too; convert it to plain LoRA (PEFT's "
            f"save_pretrained with path_initial_model_for_weight_conversion), or {MERGE}"
        )


def _are_patterns(values) -> bool:
    try:
        return all(re.compile(pattern) and fits(value, float) and value > 0 for pattern, value in values.items())
    except (AttributeError, re.error):
        return False


def check_layers(targets, model: nn.Module, family: Family, key: str) -> None:
    """Checks that `target_modules` are the model's adapted layers; a pattern is left to the matrices' names.

    Raises:
        UserError: They are others, or none that can be adapted here.
    """
    if not isinstance(targets, list):
        return
    modules = {target: _modules_of(target, family) for target in map(str, targets)}
    strange = sorted(target for target, found in modules.items() if not found)
    if strange:
        known = dict.fromkeys(m.theirs.rpartition(".")[2] for m in family.modules if m.is_adaptable)
        raise UserError(
            f"{key}: target_modules has {', '.join(strange)}; layers that can be adapted here are {', '.join(known)}"
        )
    found = [m for of_target in modules.values() for m in of_target]
    wanted = {models.without_numbers(part.name) for m in found for part in m.parts}
    if "output" in wanted and isinstance(model.output, TiedLinear):
        raise UserError(
            f"{key}: target_modules has the output layer, which is the embedding here (tied) and has no adapter; train "
            "one of other layers"
        )
    layers = [name for name, layer in models.adapted_modules(model) if not isinstance(layer, LoRAExpertsLinear)]
    ours = {models.without_numbers(name) for name in layers}
    # Of a fused layer some parts may have no adapter: rows of zero, which are looked at later.
    untouched = [m for m in found if not ours & {models.without_numbers(part.name) for part in m.parts}]
    if untouched or not ours <= wanted:
        raise UserError(
            f"{key}: target_modules is {', '.join(sorted(modules))}, lora.modules is {_as_modules(ours, family)}; "
            f"nearest valid: lora.modules={_as_modules(wanted, family)}"
        )


def _modules_of(target: str, family: Family) -> list[Module]:
    """Returns the modules that a target, the end of a layer's name or the whole of it, stands for."""
    target = re.sub(r"\.\d+\.", ".{}.", target)
    found = [m for m in family.modules if any(f".{name}".endswith(f".{target}") for name in (m.theirs, m.adapted))]
    return [m for m in found if m.is_adaptable]


def _as_modules(layers: set[str], family: Family) -> str:
    """Returns what lora.modules says for these layers, the shortest way."""
    return f"[{', '.join(_names_of(layers, family))}]"


def _names_of(layers: set[str], family: Family) -> list[str]:
    names, left = [], layers
    for name in family.lora_names:
        ours = set(LORA_LAYERS[name])
        if ours <= layers and ours & left:  # GPT-2's c_proj is attention's and the MLP's
            names.append(name)
            left = left - ours
    return [*names, *sorted(left)]


def lora_of(folder: Path, family: Family, key: str) -> dict:
    """Returns the config's `lora` block for an adapter in PEFT's layout: its layers, rank and scale.

    Args:
        family: Of the base.

    Raises:
        UserError: It is no LoRA adapter that can be read here, or adapts nothing of this family.
    """
    config = read_config(folder, key)
    check_kind(config, key)
    targets = config.get("target_modules") or []
    if targets == "all-linear":
        modules = ["all-linear"]
    else:
        ends = targets if isinstance(targets, list) else [m.theirs for m in family.modules if _is_meant(m, targets)]
        found = [m for target in map(str, ends) for m in _modules_of(target, family)]
        modules = _names_of({models.without_numbers(part.name) for m in found for part in m.parts}, family)
        if isinstance(family, BridgedFamily):
            modules = family.lora_modules({m.theirs for m in found})
    if not modules or not set(modules) <= LORA_LAYERS.keys():
        raise UserError(
            f"{key}: target_modules={show(targets)} are no layers of {family.name} that lora.modules has names for; "
            f"{MERGE}"
        )
    switches = {name: bool(config.get(name)) for name in ("use_dora", "use_rslora")}
    return {"rank": config["r"], "alpha": float(config["lora_alpha"]), "modules": modules, **switches}


def _is_meant(module: Module, pattern: str) -> bool:
    return module.is_adaptable and bool(re.fullmatch(pattern, module.theirs.replace("{}", "0")))


def check_settings(config: dict, model: nn.Module, key: str) -> None:
    """Checks that rank, alpha and the kind of LoRA are the model's.

    Raises:
        UserError: One of them is not.
    """
    for setting, ours in (
        ("use_dora", "use_dora"),
        ("use_rslora", "use_rslora"),
        ("r", "rank"),
        ("lora_alpha", "alpha"),
    ):
        value = config.get(setting) or False
        if value != model.pairtune.lora[ours]:
            raise UserError(
                f"{key}: {setting} is {value} in its adapter_config.json, lora.{ours} is {model.pairtune.lora[ours]}; "
                f"nearest valid: lora.{ours}={show(value)}"
            )


def scale_of(layer: str, config: dict) -> tuple[int, float]:
    """Returns a layer's rank and alpha; PEFT's patterns are ends of its name, as regular expressions."""
    values = []
    for setting, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        special = (v for end, v in (config.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({end})", layer))
        values.append(next(special, config[setting]))
    return values[0], values[1]
