"""Whether the model that a config builds is the one whose weights it names, as far as the folder's config.json tells.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from torchtune.modules import TransformerDecoder

from pairtune.config.rules import fits, kind_words, show
from pairtune.errors import UserError
from pairtune.folders.config_json import LLAMA3_ROPE, ONLY, SETTINGS, config_key, setting
from pairtune.folders.families import FAMILIES, config_types, of_config_type
from pairtune.models.additions import additions

WINDOWED = ("mistral", "mixtral", "phi3", "qwen2", "qwen3", "gemma2")  # layers may have a sliding window
MAY_BE_ZERO = ("max_window_layers",)
ROPE_BLOCKS = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
# How positions may be scaled: what torchtune computes, with these settings of it.
ROPE_TYPES = {"llama": ("default", "llama3")}


def check_config(config, path: Path) -> None:
    """Checks the kinds of what is read of a config.json.

    Raises:
        UserError: It is no object, lacks a key, has one of the wrong kind, is of a quantized model, or of a variant
            that no builder computes.
    """
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold keys and values, holds {show(config)}")
    for name, known in SETTINGS.items():
        key = config_key(name, config)
        if config.get(key) is not None:
            check_kind(path, key, config[key], known.kind)
        elif known.needed:
            raise UserError(f"{path}: {key}: is missing; download the file again, or set it as the model's authors say")
    _check_rope(path, config)
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config={show(config['quantization_config'])}: the weights are quantized, which "
            "training cannot undo; take the model that they were made from, with a qlora_ recipe if memory is short"
        )
    for key, values in ONLY.get(config["model_type"], {}).items():
        if config.get(key) not in (None, *values):
            raise UserError(
                f"{path}: {key}={show(config[key])}: must be {' or '.join(map(show, values))}; models of "
                f"model_type={config['model_type']} that compute something else are not available"
            )


def check_kind(path: Path, key: str, value, kind: type) -> None:
    """Checks one value that a file says of a model.

    Raises:
        UserError: It is not of this kind, or a number that is not above 0 and finite.
    """
    if not fits(value, kind):
        raise UserError(f"{path}: {key}={value!r}: must be {kind_words(kind)}")
    if kind in (int, float) and not 0 < value < math.inf and not (value == 0 and key in MAY_BE_ZERO):
        raise UserError(f"{path}: {key}={value}: must be above 0 and finite")


def _check_rope(path: Path, config: dict) -> None:
    blocks = {block: config[block] for block in ROPE_BLOCKS if config.get(block)}
    if len(blocks) == 2 and blocks["rope_scaling"] != blocks["rope_parameters"]:
        raise UserError(
            f"{path}: rope_scaling and rope_parameters differ, and are two names of one thing; remove the one that is "
            "not as the model's authors say"
        )
    for block, rope in blocks.items():
        for key in ("factor", "rope_theta", "partial_rotary_factor"):
            if rope.get(key) is not None:
                check_kind(path, f"{block}.{key}", rope[key], float)
        _check_kind_of_rope(path, block, config)
        if _kind_of_rope(rope) == "llama3":
            _check_llama3(path, block, rope)


def _kind_of_rope(rope: dict) -> str | None:
    """Returns how a block scales positions; None where it does not say."""
    return rope.get("rope_type") or rope.get("type")


def _check_kind_of_rope(path: Path, block: str, config: dict) -> None:
    rope, known = config[block], ROPE_TYPES.get(config["model_type"], ("default",))
    kind, factor = _kind_of_rope(rope), rope.get("factor")
    if kind in known or (kind is None and factor in (None, 1)):
        return
    if kind in ("linear", "dynamic") and factor == 1:  # others have more settings, which count at any factor
        return
    name = "rope_type" if rope.get("rope_type") or kind is None else "type"
    raise UserError(
        f"{path}: {block}.{name}={show(kind)}: must be {' or '.join(known)}; models of model_type="
        f"{config['model_type']} whose positions are scaled in another way are not available"
    )


def _check_llama3(path: Path, block: str, rope: dict) -> None:
    different = [f"{block}.{key}={show(rope.get(key))}" for key, v in LLAMA3_ROPE.items() if rope.get(key) != v]
    if different:
        wanted = ", ".join(f"{key} {value}" for key, value in LLAMA3_ROPE.items())
        raise UserError(
            f"{path}: {different[0]}: must be {wanted}; models whose positions are scaled in another way are not "
            "available"
        )


def check_model_type(model_type: str, config: dict) -> None:
    """Refuses a `checkpointer.model_type` that converts another architecture's weights.

    Raises:
        UserError: As said; `config` is the folder's config.json.
    """
    theirs = config.get("model_type")
    expected = of_config_type(theirs)
    if theirs is not None and not expected:
        raise UserError(
            f"config.json: model_type={theirs}: is none of {', '.join(config_types())}; another architecture may have "
            "the same weights and compute something else with them"
        )
    if expected and model_type not in expected:
        raise UserError(
            f"checkpointer.model_type={model_type}: the folder's config.json says model_type={theirs}, "
            f"which is {' or '.join(expected)} here"
        )


def model_type_of(config: dict, *, like: str) -> str:
    """Returns the `checkpointer.model_type` of a folder's config.json: `like` if that is one of its names.

    Raises:
        UserError: There is none.
    """
    known = of_config_type(config.get("model_type"))
    model_type = like if like in known or not known else known[0]
    check_model_type(model_type, config)
    return model_type


def windows(config: dict, num_layers: int) -> list[int | None]:
    """Returns each layer's sliding window as transformers has it, None for a layer that looks back all the way.

    A window of w shows a token the w newest positions, its own among them. What a config.json leaves out is as in the
    architecture's configuration class.

    Args:
        config: The folder's config.json, checked by check_config.
        num_layers: Of the model.

    Raises:
        UserError: layer_types has not one entry a layer, or names a kind of attention that is neither full nor sliding.
    """
    architecture = config.get("model_type")
    if architecture not in WINDOWED:
        return [None] * num_layers
    window = setting(config, "sliding_window")
    switched_on = architecture not in ("qwen2", "qwen3") or setting(config, "use_sliding_window")
    if window is None or not switched_on:
        return [None] * num_layers
    return [window if sliding else None for sliding in _sliding_layers(config, num_layers)]


def _sliding_layers(config: dict, num_layers: int) -> Sequence[bool]:
    """Returns whether each layer has the model's window."""
    architecture, kinds = config["model_type"], config.get("layer_types")
    if architecture in ("mixtral", "phi3") or (kinds is None and architecture == "mistral"):
        return [True] * num_layers  # with layer_types, Mistral is what transformers calls Ministral
    if kinds is None and architecture == "gemma2":
        return [n % 2 == 0 for n in range(num_layers)]
    if kinds is None:
        return [n >= setting(config, "max_window_layers") for n in range(num_layers)]
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown or len(kinds) != num_layers:
        wrong = f"holds {show(unknown[0])}" if unknown else f"has {len(kinds)} entries"
        raise UserError(
            f"config.json: layer_types: {wrong}; must have sliding_attention or full_attention for each of the "
            f"model's {num_layers} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


def check_model(model: TransformerDecoder, config: dict) -> None:
    """Compares a built model with what transformers makes of the folder's config.json.

    Raises:
        UserError: They differ, and the message names every difference; or lora.modules has another architecture's name.
    """
    if lora := additions(model).lora:
        _check_lora_modules(lora["modules"], config)
    built, expected = describe(model), describe_config(config)
    different = [
        f"{config_key(name, config)} is {built[name]} in `model` and {value} {_place(name, config)}"
        for name, value in expected.items()
        if value is not None and name in built and built[name] != value
    ]
    refuse_differences(different)


def refuse_differences(different: list[str]) -> None:
    """Raises a UserError with all of them, if there are any."""
    if different:
        raise UserError(
            f"model: {'; '.join(different)}. `model` and `checkpointer.checkpoint_dir` do not belong together: choose "
            "the builder and the arguments that fit the folder"
        )


def _check_lora_modules(modules: Sequence[str], config: dict) -> None:
    """Another architecture's name may mean layers of this one, but seldom those that its user has in mind."""
    known = FAMILIES[of_config_type(config["model_type"])[0]].lora_names
    if strange := [name for name in modules if name not in known]:
        raise UserError(
            f"lora.modules: {', '.join(strange)}: is of another architecture than model_type={config['model_type']}; "
            f"here it may hold {', '.join(known)}"
        )


def _place(name: str, config: dict) -> str:
    said = config.get(config_key(name, config)) is not None or name in _rope(config) or name.startswith("rope_scaling")
    return "in config.json" if said else "by default, which config.json leaves it to"


def positions(config: dict, max_length: int) -> list[str]:
    """Returns a sentence where conversations may be longer than a config.json says that its model was made for."""
    most, rope = setting(config, "max_position_embeddings"), _rope(config)
    factor = rope.get("factor") or 1.0
    if not most or "model_type" not in config:
        return []
    # Llama 3.1's says the scaled number; others scale what is written there.
    reach = int(max(most, factor * rope.get("original_max_position_embeddings", most if factor > 1 else 0)))
    if max_length <= reach:
        return []
    scaled = f", scaled by {factor:g}" if reach != most else ""
    return [
        f"max_length={max_length}: the model was made for {reach:,} positions (max_position_embeddings={most}{scaled}) "
        f"and what it says beyond them was never trained; nearest valid: max_length={reach}"
    ]


def describe(model: TransformerDecoder) -> dict:
    """Returns what a model is, by names of settings; without those that have no meaning for it."""
    found = {name: known.of_model(model) for name, known in SETTINGS.items() if known.of_model}
    return {name: value for name, value in found.items() if value is not None}


def describe_config(config: dict) -> dict:
    """Returns the same from a config.json of transformers 4 or 5; None for sizes that it does not say."""
    said = {name: setting(config, name) for name, known in SETTINGS.items() if known.of_model}
    said |= {key: value for key, value in _rope(config).items() if key in said and value is not None}
    heads, width, rope = said["num_attention_heads"], said["hidden_size"], _rope(config)
    if _kind_of_rope(rope) not in (None, "default"):
        said["rope_scaling.factor"] = rope.get("factor") or 1.0
    said["num_key_value_heads"] = said["num_key_value_heads"] or heads
    said["head_dim"] = said["head_dim"] or width // heads
    if config.get("model_type") == "gpt2":
        said["intermediate_size"] = said["intermediate_size"] or 4 * width
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        said[cap] = said[cap] or 0.0
    is_float = {name for name, known in SETTINGS.items() if known.kind is float}
    return {name: float(v) if name in is_float and v is not None else v for name, v in said.items()}


def _rope(config: dict) -> dict:
    return next((config[block] for block in ROPE_BLOCKS if config.get(block)), {})
