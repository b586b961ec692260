"""Whether the model that a config builds is the one whose weights it names, as far as the folder's config.json tells.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder

from pairtune.errors import UserError
from pairtune.experts import MixtureOfExperts
from pairtune.families import config_key, config_types, of_config_type
from pairtune.rules import fits, kind_words, show

# Architectures whose layers may have a sliding window, and the one that they have where config.json has no such key.
DEFAULT_WINDOWS = {"mistral": 4096, "mixtral": None, "phi3": None, "qwen2": 4096, "qwen3": 4096, "gemma2": 4096}

# What is read of config.json, here and in the conversion of weights, under Llama's names: see families.CONFIG_KEYS.
NEEDED = {"model_type": str, "hidden_size": int, "num_attention_heads": int, "num_key_value_heads": int}
READ = NEEDED | {
    "num_hidden_layers": int,
    "vocab_size": int,
    "head_dim": int,
    "rope_theta": float,
    "max_position_embeddings": int,
    "rms_norm_eps": float,
    "partial_rotary_factor": float,
    "use_parallel_residual": bool,
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
    "num_local_experts": int,
    "num_experts_per_tok": int,
}
MAY_BE_ZERO = ("max_window_layers",)
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
# How positions may be scaled: what torchtune computes, with these settings of it.
ROPE_TYPES = {"llama": ("default", "llama3")}
LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
# Settings of which only these values are what the builders compute, by config.json's model_type.
ONLY = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3"), {"hidden_act": ("silu", "swish")}),
    "gemma2": {"hidden_activation": ("gelu_pytorch_tanh",)},
    "gpt2": {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    "gpt_neox": {"hidden_act": ("gelu",), "attention_bias": (True,)},
}


def check_config(config, path: Path) -> None:
    """Checks the kinds of what is read of a config.json.

    Raises:
        UserError: It is no object, lacks a key, has one of the wrong kind, is of a quantized model, or of a variant
            that no builder computes.
    """
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold keys and values, holds {show(config)}")
    for name, kind in READ.items():
        key = config_key(name, config)
        if config.get(key) is not None:
            _check_kind(path, key, config[key], kind)
        elif name in NEEDED:
            raise UserError(f"{path}: {key}: is missing; download the file again, or set it as the model's authors say")
    for block in ("rope_scaling", "rope_parameters"):
        for key in ("factor", "rope_theta", "partial_rotary_factor"):
            if (config.get(block) or {}).get(key) is not None:
                _check_kind(path, f"{block}.{key}", config[block][key], float)
        _check_rope(path, block, config)
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


def _check_kind(path: Path, key: str, value, kind: type) -> None:
    if not fits(value, kind):
        raise UserError(f"{path}: {key}={value!r}: must be {kind_words(kind)}")
    if kind in (int, float) and not 0 < value < math.inf and not (value == 0 and key in MAY_BE_ZERO):
        raise UserError(f"{path}: {key}={value}: must be above 0 and finite")


def _check_rope(path: Path, block: str, config: dict) -> None:
    rope = config.get(block) or {}
    name = "rope_type" if rope.get("rope_type") is not None else "type"
    kind, known = rope.get(name) or "default", ROPE_TYPES.get(config["model_type"], ("default",))
    fixed = LLAMA3_ROPE if kind == "llama3" else {}
    different = [f"{block}.{key}={show(rope[key])}" for key, value in fixed.items() if rope.get(key, value) != value]
    if kind not in known and rope.get("factor") != 1:
        different = [f"{block}.{name}={show(kind)}"]
    if different:
        wanted = ", ".join(f"{key} {value}" for key, value in fixed.items()) or " or ".join(known)
        raise UserError(
            f"{path}: {different[0]}: must be {wanted}; models of model_type={config['model_type']} whose positions "
            "are scaled in another way are not available"
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
    window = config.get("sliding_window", DEFAULT_WINDOWS.get(architecture))
    switched_on = config.get("use_sliding_window") or architecture not in ("qwen2", "qwen3")
    if architecture not in DEFAULT_WINDOWS or window is None or not switched_on:
        return [None] * num_layers
    return [window if sliding else None for sliding in _sliding_layers(config, num_layers)]


def _sliding_layers(config: dict, num_layers: int) -> Sequence[bool]:
    """Returns whether each layer has the model's window."""
    architecture, kinds = config["model_type"], config.get("layer_types")
    if architecture in ("mistral", "mixtral", "phi3"):  # they read no layer_types
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
        f"{config_key(name, config)} is {built[name]} in `model` and {value} in config.json"
        for name, value in expected.items()
        if value is not None and name in built and built[name] != value
    ]
    if different:
        raise UserError(
            f"model: {'; '.join(different)}. `model` and `checkpointer.checkpoint_dir` do not belong together: choose "
            "the builder and the arguments that fit the folder"
        )


def describe(model: TransformerDecoder) -> dict:
    """Returns what a model is, under the names that READ has."""
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
        "query_pre_attn_scalar": round(scale**-2, 6) if scale else float(attention.head_dim),
        "attn_logit_softcapping": float(getattr(attention._attention_call, "softcap", None) or 0),
        "final_logit_softcapping": float(getattr(model.output, "softcap", None) or 0),
        "use_parallel_residual": getattr(model.layers[0], "use_parallel_residual", False),
    }
    if rope is not None:
        description["rope_theta"] = float(rope.base)
        description["rope_scaling.factor"] = float(getattr(rope, "scale_factor", 1.0))
        description["partial_rotary_factor"] = rope.dim / attention.head_dim
    if hasattr(model, "pos_embeddings"):
        description["max_position_embeddings"] = model.pos_embeddings.num_embeddings
    if isinstance(model.norm, (RMSNorm, nn.LayerNorm)):
        description["rms_norm_eps"] = model.norm.eps
    mixture = model.layers[0].mlp
    if isinstance(mixture, MixtureOfExperts):
        description["num_local_experts"] = len(mixture.experts)
        description["num_experts_per_tok"] = mixture.experts_per_token
    return description


def describe_config(config: dict) -> dict:
    """Returns the same from a config.json of transformers 4 or 5; None where it does not say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    said = {name: config.get(config_key(name, config)) for name in READ}
    heads, width = said["num_attention_heads"], said["hidden_size"]
    theta = rope.get("rope_theta", said["rope_theta"])
    named = ("num_hidden_layers", "vocab_size", "num_key_value_heads", "tie_word_embeddings", "use_parallel_residual")
    return {name: said[name] for name in (*named, "max_position_embeddings", "rms_norm_eps")} | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": said["head_dim"] or (width // heads if heads and width else None),
        "rope_theta": float(theta) if theta is not None else None,
        "rope_scaling.factor": float(rope.get("factor", 1.0)) if theta is not None else None,
        "partial_rotary_factor": rope.get("partial_rotary_factor", said["partial_rotary_factor"]),
        **{key: float(config[key] or 0) for key in SOFTCAPS if key in config},  # null: no cap
        "query_pre_attn_scalar": config.get("query_pre_attn_scalar"),
        "num_local_experts": said["num_local_experts"],
        "num_experts_per_tok": said["num_experts_per_tok"],
    }
