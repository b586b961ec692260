"""Whether the model that a config builds is the one whose weights it names, as far as the folder's config.json tells.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder

from pairtune.errors import UserError
from pairtune.families import config_types, of_config_type
from pairtune.rules import fits, kind_words, show

# Architectures whose layers may have a sliding window, and the one that they have where config.json has no such key.
DEFAULT_WINDOWS = {"mistral": 4096, "phi3": None, "qwen2": 4096, "qwen3": 4096, "gemma2": 4096}

# What is read of config.json, here and in the conversion of weights.
NEEDED = {"model_type": str, "hidden_size": int, "num_attention_heads": int, "num_key_value_heads": int}
READ = NEEDED | {
    "num_hidden_layers": int,
    "vocab_size": int,
    "head_dim": int,
    "rope_theta": float,
    "rms_norm_eps": float,
    "tie_word_embeddings": bool,
    "rope_scaling": dict,
    "rope_parameters": dict,
    "sliding_window": int,
    "use_sliding_window": bool,
    "max_window_layers": int,
    "layer_types": list[str],
    "attn_logit_softcapping": float,
    "final_logit_softcapping": float,
    "query_pre_attn_scalar": float,
}
MAY_BE_ZERO = ("max_window_layers",)
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def check_config(config, path: Path) -> None:
    """Checks the kinds of what is read of a config.json.

    Raises:
        UserError: It is no object, lacks a key, has one of the wrong kind, or is of a quantized model.
    """
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold keys and values, holds {show(config)}")
    for key, kind in READ.items():
        if config.get(key) is not None:
            _check_kind(path, key, config[key], kind)
        elif key in NEEDED:
            raise UserError(f"{path}: {key}: is missing; download the file again, or set it as the model's authors say")
    for block in ("rope_scaling", "rope_parameters"):
        for key in ("factor", "rope_theta"):
            if (config.get(block) or {}).get(key) is not None:
                _check_kind(path, f"{block}.{key}", config[block][key], float)
    if config.get("quantization_config"):
        raise UserError(
            f"{path}: quantization_config={show(config['quantization_config'])}: the weights are quantized, which "
            "training cannot undo; take the model that they were made from, with a qlora_ recipe if memory is short"
        )


def _check_kind(path: Path, key: str, value, kind: type) -> None:
    if not fits(value, kind):
        raise UserError(f"{path}: {key}={value!r}: must be {kind_words(kind)}")
    if kind in (int, float) and not 0 < value < math.inf and not (value == 0 and key in MAY_BE_ZERO):
        raise UserError(f"{path}: {key}={value}: must be above 0 and finite")


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
    window = config.get("sliding_window", DEFAULT_WINDOWS.get(architecture))
    switched_on = config.get("use_sliding_window") or architecture not in ("qwen2", "qwen3")
    if architecture not in DEFAULT_WINDOWS or window is None or not switched_on:
        return [None] * num_layers
    return [window if sliding else None for sliding in _sliding_layers(config, num_layers)]


def _sliding_layers(config: dict, num_layers: int) -> Sequence[bool]:
    """Returns whether each layer has the model's window."""
    architecture, kinds = config["model_type"], config.get("layer_types")
    if architecture in ("mistral", "phi3"):  # they read no layer_types
        return [True] * num_layers
    if kinds is None and architecture == "gemma2":
        return [n % 2 == 0 for n in range(num_layers)]
    if kinds is None:
        first = config.get("max_window_layers")
        return [n >= (28 if first is None else first) for n in range(num_layers)]
    unknown = [kind for kind in kinds if kind not in ("sliding_attention", "full_attention")]
    if unknown or len(kinds) != num_layers:
        wrong = f"holds {show(unknown[0])}" if unknown else f"has {len(kinds)} entries"
        raise UserError(
            f"config.json: layer_types: {wrong}; must have sliding_attention or full_attention for each of the "
            f"model's {num_layers} layers"
        )
    return [kind == "sliding_attention" for kind in kinds]


def check_model(model: TransformerDecoder, config: dict) -> None:
    """Compares a built model with the folder's config.json; what config.json does not say is not compared.

    Raises:
        UserError: They differ. The message names every difference.
    """
    built, expected = describe(model), describe_config(config)
    different = [
        f"{name} is {built[name]} in `model` and {value} in config.json"
        for name, value in expected.items()
        if value is not None and name in built and built[name] != value
    ]
    if different:
        raise UserError(
            f"model: {'; '.join(different)}. `model` and `checkpointer.checkpoint_dir` do not belong together: choose "
            "the builder and the arguments that fit the folder"
        )


def describe(model: TransformerDecoder) -> dict:
    """Returns what a model is, under config.json's names."""
    attention = model.layers[0].attn
    rope, scale = attention.pos_embeddings, getattr(attention._attention_call, "scale", None)
    description = {
        "num_hidden_layers": len(model.layers),
        "vocab_size": model.tok_embeddings.num_embeddings,
        "hidden_size": model.tok_embeddings.embedding_dim,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
        "rope_theta": float(rope.base),
        "rope_scaling.factor": float(getattr(rope, "scale_factor", 1.0)),
        "query_pre_attn_scalar": round(scale**-2, 6) if scale else float(attention.head_dim),
        "attn_logit_softcapping": float(getattr(attention._attention_call, "softcap", None) or 0),
        "final_logit_softcapping": float(getattr(model.output, "softcap", None) or 0),
    }
    if isinstance(model.norm, RMSNorm):
        description["rms_norm_eps"] = model.norm.eps
    return description


def describe_config(config: dict) -> dict:
    """Returns the same from a config.json of transformers 4 or 5; None where it does not say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    heads, width = config.get("num_attention_heads"), config.get("hidden_size")
    theta = rope.get("rope_theta", config.get("rope_theta"))
    llama = config.get("model_type") == "llama"  # where scaling is known to mean what torchtune's scale_factor does
    return {
        "num_hidden_layers": config.get("num_hidden_layers"),
        "vocab_size": config.get("vocab_size"),
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim") or (width // heads if heads and width else None),
        "tie_word_embeddings": config.get("tie_word_embeddings"),
        "rope_theta": float(theta) if theta is not None else None,
        "rope_scaling.factor": float(rope.get("factor", 1.0)) if llama and theta is not None else None,
        "rms_norm_eps": config.get("rms_norm_eps"),
        **{key: float(config[key] or 0) for key in SOFTCAPS if key in config},  # null: no cap
        "query_pre_attn_scalar": config.get("query_pre_attn_scalar"),
    }
