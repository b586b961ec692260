"""Whether the model that a config builds is the one whose weights it names, as far as the folder's config.json tells.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same.
"""

import math
from pathlib import Path

from torchtune.modules import RMSNorm, TiedLinear, TransformerDecoder

from pairtune.errors import UserError
from pairtune.experts import MixtureOfExperts
from pairtune.families import config_types, of_config_type
from pairtune.rules import fits, kind_words, show

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
    "num_local_experts": int,
    "num_experts_per_tok": int,
}


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
    rope = attention.pos_embeddings
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
    }
    if isinstance(model.norm, RMSNorm):
        description["rms_norm_eps"] = model.norm.eps
    mixture = model.layers[0].mlp
    if isinstance(mixture, MixtureOfExperts):
        description["num_local_experts"] = len(mixture.experts)
        description["num_experts_per_tok"] = mixture.experts_per_token
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
        "num_local_experts": config.get("num_local_experts"),
        "num_experts_per_tok": config.get("num_experts_per_tok"),
    }
