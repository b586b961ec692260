"""Whether the model that a config builds is the one whose weights it names, as far as the folder's config.json tells.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same.
"""

import math
from pathlib import Path

from torch import nn
from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder

from pairtune.errors import UserError
from pairtune.families import config_key, config_types, of_config_type
from pairtune.rules import fits, kind_words, show

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
}
# Settings of which only these values are what the builders compute, by config.json's model_type.
ONLY = {
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
    if kind in (int, float) and not 0 < value < math.inf:
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
    rope = attention.pos_embeddings
    description = {
        "num_hidden_layers": len(model.layers),
        "vocab_size": model.tok_embeddings.num_embeddings,
        "hidden_size": model.tok_embeddings.embedding_dim,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_dim": attention.head_dim,
        "tie_word_embeddings": isinstance(model.output, TiedLinear),
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
    return description


def describe_config(config: dict) -> dict:
    """Returns the same from a config.json of transformers 4 or 5; None where it does not say."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    said = {name: config.get(config_key(name, config)) for name in READ}
    heads, width = said["num_attention_heads"], said["hidden_size"]
    theta = rope.get("rope_theta", said["rope_theta"])
    # Where scaling is known to mean what torchtune's scale_factor does
    scales = config.get("model_type") in ("llama", "gpt_neox") and theta is not None
    named = ("num_hidden_layers", "vocab_size", "num_key_value_heads", "tie_word_embeddings", "use_parallel_residual")
    return {name: said[name] for name in (*named, "max_position_embeddings", "rms_norm_eps")} | {
        "hidden_size": width,
        "num_attention_heads": heads,
        "head_dim": said["head_dim"] or (width // heads if heads and width else None),
        "rope_theta": float(theta) if theta is not None else None,
        "rope_scaling.factor": float(rope.get("factor", 1.0)) if scales else None,
        "partial_rotary_factor": rope.get("partial_rotary_factor", said["partial_rotary_factor"]),
    }
