"""`model: auto`: what builds a folder's model, with which arguments, as the folder's config.json says.

torchtune's builder, or one of ours, where it computes all that config.json says; else the bridge to transformers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any

from pairtune.config.architectures import (
    ARCHITECTURES,
    Architecture,
    beyond,
    check_length,
    check_readable,
    needed,
    of_config_type,
    why_not,
)
from pairtune.config.checks import is_component
from pairtune.config.config_json import SETTINGS, config_key, describe_config, setting
from pairtune.config.layout import META_FILE, MODEL_FILES, find_config
from pairtune.config.rules import AUTO, REQUIRED, show
from pairtune.config.signatures import parameters_of
from pairtune.config.source import look_up
from pairtune.config.uses import BRIDGE, has_bridge, is_bridged
from pairtune.errors import UserError
from pairtune.files import read_object

HF, META = "torchtune.training.FullModelHFCheckpointer", "torchtune.training.FullModelMetaCheckpointer"
ARGUMENTS = {known.argument: name for name, known in SETTINGS.items() if known.argument}
# What a builder computes that has no argument for a setting.
WITHOUT_ARGUMENT = {
    **dict.fromkeys(("tie_word_embeddings", "use_parallel_residual"), False),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), 0.0),
    "partial_rotary_factor": 1.0,
}
# Builders whose module's name, in capitals, is not the family's.
FAMILY_OF = {"llama3_1": "LLAMA3", "llama3_3": "LLAMA3", "qwen2_5": "QWEN2", "phi3": "PHI3_MINI"}


@dataclass(frozen=True)
class Choice:
    """What a config's `model` and `checkpointer.model_type` are for a folder."""

    component: dict[str, Any]
    family: str


def settle(cfg: dict) -> tuple[dict, list[str]]:
    """Returns a resolved config with what the folder tells in place of every auto, and that in sentences.

    Raises:
        UserError: The folder does not tell: it is not there, or no model that anything here builds.
    """
    checkpointer, model = cfg.get("checkpointer"), cfg.get("model")
    if not (is_component(checkpointer) and is_component(model)):
        return cfg, []  # of a recipe with keys of its own
    folder = checkpointer.get("checkpoint_dir")
    if not isinstance(folder, str) or folder == REQUIRED:
        raise UserError("checkpointer.checkpoint_dir: has no default: set it in the YAML or as checkpointer=FOLDER")
    settled, told = dict(cfg), []
    if model["_component_"] == AUTO:
        choice = choose(folder)
        settled["model"] = choice.component | {key: value for key, value in model.items() if key != "_component_"}
        told.append(f"model=auto is {choice.component['_component_']}, as {Path(folder) / 'config.json'} says")
    else:
        choice = Choice(model, _family(folder, str(model["_component_"]), checkpointer))
    settled["reference"] = _reference(cfg.get("reference"), choice, is_auto=model["_component_"] == AUTO)
    made = {"_component_": _layout(folder)} if checkpointer["_component_"] == AUTO else {}
    is_given = str(checkpointer.get("model_type") or AUTO).lower() != AUTO
    made |= {} if is_given else {"model_type": choice.family}
    settled["checkpointer"] = checkpointer | made
    path = Path(folder) / "config.json"
    if is_bridged(settled["model"]) and path.is_file() and isinstance(cfg.get("max_length"), int):
        check_length(read_object(path), cfg["max_length"])
    return {key: settled[key] for key in cfg}, told


def choose(folder: str, *, key: str = "checkpointer.checkpoint_dir") -> Choice:
    """Returns what builds the model of a folder.

    Args:
        key: The config's name for `folder`, for messages.

    Raises:
        UserError: As check_readable; or nothing that is installed builds it.
    """
    path = find_config(folder, key=key)
    return choose_for(read_object(path), path)


def choose_for(config: dict, path: Path) -> Choice:
    """Returns the same for a config.json's content; `path` is for messages, and its folder the bridge's."""
    check_readable(config, path)
    reason = why_not(config)
    if reason is None:
        chosen = _builder(config, path)
        if isinstance(chosen, Choice):
            return chosen
        reason = chosen
    if has_bridge():
        return Choice({"_component_": BRIDGE, "path": str(path.parent)}, str(config.get("model_type")).upper())
    raise beyond(path, config, reason)


# torchtune's builders, and ours


def _builder(config: dict, path: Path) -> Choice | str:
    """What builds a config.json that `why_not` has nothing against; or why none does."""
    known, said = ARCHITECTURES[config["model_type"]], describe_config(config)
    _check_heads(path, config, said)
    builder, scale, more = known.builder, said["rope_scaling.factor"], {}
    if config["model_type"] == "llama" and (said["tie_word_embeddings"] or scale != 1):
        name = "llama3_2" if said["tie_word_embeddings"] else "llama3_1"
        builder, more = f"torchtune.models.{name}.{name}", {"scale_factor": scale}
    takes, values = parameters_of(look_up(builder)), {}
    for argument, name in ARGUMENTS.items():
        key = config_key(name, config)
        if argument not in takes:
            if reason := _differs(known, said, name, key):
                return reason
            continue
        values[argument] = needed(path, config, key) if said[name] is None else said[name]
    values |= more
    for name, value in values.items():
        if _is_cut(value, takes[name]):
            key = config_key(ARGUMENTS.get(name, "rope_scaling.factor"), config)
            return f"{key}={show(value)}: {builder} takes whole numbers only"
        values[name] = int(value) if isinstance(value, float) and takes[name].annotation is int else value
    return Choice({"_component_": builder, **values}, _family_of(builder))


def _check_heads(path: Path, config: dict, said: dict) -> None:
    heads, keys, width = said["num_attention_heads"], said["num_key_value_heads"], said["hidden_size"]
    names = {name: config_key(name, config) for name in ("num_attention_heads", "num_key_value_heads", "hidden_size")}
    if heads % keys:
        raise UserError(
            f"{path}: {names['num_key_value_heads']}={keys}: must divide {names['num_attention_heads']}={heads}"
        )
    if setting(config, "head_dim") is None and width % heads:
        raise UserError(
            f"{path}: {names['num_attention_heads']}={heads}: must divide {names['hidden_size']}={width}, where no "
            "head_dim is said"
        )


def _is_cut(value: Any, parameter: Parameter) -> bool:
    return parameter.annotation is int and isinstance(value, float) and not value.is_integer()


def _differs(known: Architecture, said: dict, name: str, key: str) -> str | None:
    """Why a builder that has no argument for a setting does not compute it, or None."""
    if known.builder.endswith(".gpt2") and name in ("rope_theta", "partial_rotary_factor"):
        return None  # its positions are learned
    heads, width, size = said["num_attention_heads"], said["hidden_size"], said["head_dim"]
    sizes = {"head_dim": width // heads, "num_key_value_heads": heads}
    fixed = sizes | WITHOUT_ARGUMENT | known.fixed
    value, computed = said[name], fixed.get(name)
    if value == computed or (name == "query_pre_attn_scalar" and value == size):
        return None
    return f"{key}={show(value)}: {known.builder} computes {key}={show(computed)} only"


def _reference(block: Any, policy: Choice, *, is_auto: bool) -> Any:
    """The config's `reference` with the builder of its own folder's model, where that is to be found out."""
    if not isinstance(block, dict) or not isinstance(block.get("checkpoint_dir"), str):
        return block
    model = block.get("model")
    if not (is_component(model) and model["_component_"] == AUTO or (model is None and is_auto)):
        return block
    other = choose(block["checkpoint_dir"], key="reference.checkpoint_dir").component
    return block | {"model": None if other == policy.component else other}


# The folder


def _layout(folder: str) -> str:
    """Who reads the folder's weights."""
    has_own = any((Path(folder) / name).is_file() for name in MODEL_FILES)
    return META if (Path(folder) / META_FILE).is_file() and not has_own else HF


def _family_of(builder: str) -> str:
    """What the family of a builder of torchtune's or ours is called; of another one it may be anything."""
    *_, home, _ = ("", "", *builder.split("."))
    return FAMILY_OF.get(home, home.upper())


def _family(folder: str, builder: str, checkpointer: Mapping) -> str:
    """What `checkpointer.model_type` is for a builder that is named: the folder's, which may have several names."""
    own = _family_of(builder)
    path = Path(folder) / "config.json"
    here = of_config_type(read_object(path).get("model_type")) if path.is_file() else []
    known = [family for architecture in ARCHITECTURES.values() for family in architecture.families]
    if is_bridged({"_component_": builder}):
        return "AUTO"  # config.json's, whatever it is
    if here:
        return own if own in here else here[0]
    if own in known:
        return own
    given = checkpointer.get("model_type")
    if given in (None, AUTO):
        raise UserError(
            f"checkpointer.model_type: neither {folder} nor model={builder} tells it; set it to one of "
            f"{', '.join(known)}"
        )
    return given
