"""The config.json of a model whose folder has none: what the built model is, compared with Meta's params.json."""

from pathlib import Path

from torchtune.modules import TransformerDecoder

from pairtune.config.architectures import ARCHITECTURES, check_kind
from pairtune.config.config_json import LLAMA3_ROPE, OF_FEW, SETTINGS, config_key
from pairtune.config.rules import show
from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.folders.check_model import describe, refuse_differences

# What Meta's files call the settings that they have; Mistral's have the last three, too.
PARAMS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "head_dim": "head_dim",
    "intermediate_size": "hidden_dim",
    "sliding_window": "sliding_window",
}
NEEDED = ("dim", "n_layers", "n_heads")


def make_config(model: TransformerDecoder, model_type: str, params: dict | None = None) -> dict:
    """Returns the config.json of which transformers makes this model.

    Args:
        model: From models.full, not prepared; may be on the meta device.
        model_type: config.json's, such as llama.
        params: From `read_params`, of which it has what models do not tell: a sliding window.

    Raises:
        UserError: The architecture has a setting that this builder's models lack: they are no models of it.
    """
    config, built = {"architectures": [ARCHITECTURES[model_type].causal], "model_type": model_type}, describe(model)
    if lacking := [name for name in OF_FEW if model_type in SETTINGS[name].defaults and name not in built]:
        raise UserError(
            f"model: has no {', '.join(lacking)}, which belongs to model_type={model_type}; take pairtune's builder of "
            "this family, such as pairtune.gemma2.gemma2_2b"
        )
    factor = built.pop("rope_scaling.factor", 1.0)
    for name, value in built.items():
        if name not in OF_FEW or model_type in SETTINGS[name].defaults:
            config[config_key(name, config)] = value or None if SETTINGS[name].null else value  # null: no cap
    if "query_pre_attn_scalar" in config:  # transformers takes whole numbers only
        config["query_pre_attn_scalar"] = round(config["query_pre_attn_scalar"])
    config |= {key: values[0] for key, values in ARCHITECTURES[model_type].only.items()}
    config["max_position_embeddings"] = model.max_seq_len
    if factor != 1.0:
        scaling = {key: float(value) for key, value in LLAMA3_ROPE.items() if key.endswith("_factor")}
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE, **scaling}
    if model_type in ("mistral", "phi3"):  # others have none by default, or, as Gemma 2, always the same
        config["sliding_window"] = (params or {}).get("sliding_window")
    return config | dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))  # the tokenizer's, not a default


def read_params(path: Path) -> dict:
    """Returns what a params.json says, by Llama's names in config.json; without what it leaves to the weights.

    Raises:
        UserError: It cannot be read, lacks a size, or a value is of the wrong kind.
    """
    content = read_object(path)
    for key in NEEDED:
        if content.get(key) is None:
            raise UserError(f"{path}: {key}: is missing; download the file again")
    content = {key: value for key, value in content.items() if value is not None and value != -1}  # -1: not told
    for name, key in PARAMS.items():
        if key in content:
            check_kind(path, key, content[key], SETTINGS[name].kind)
    heads, width = content["n_heads"], content["dim"]
    defaults = {"n_kv_heads": heads, "head_dim": width // heads, "rope_theta": 1e4}
    if "multiple_of" in content:
        defaults["hidden_dim"] = _width_of_mlp(content, path)
    content = defaults | content
    said = {name: content[key] for name, key in PARAMS.items() if key in content}
    return said | {"is_scaled": bool(content.get("use_scaled_rope"))}


def _width_of_mlp(params: dict, path: Path) -> int:
    """As Meta's code has it: two thirds of four times the width, times a factor, rounded up."""
    check_kind(path, "multiple_of", params["multiple_of"], int)
    check_kind(path, "ffn_dim_multiplier", params.get("ffn_dim_multiplier", 1.0), float)
    width = int(params.get("ffn_dim_multiplier", 1.0) * int(2 * 4 * params["dim"] / 3))
    return -(-width // params["multiple_of"]) * params["multiple_of"]


def check_params(model: TransformerDecoder, params: dict, path: Path) -> None:
    """Compares a built model with a params.json.

    Raises:
        UserError: They differ, and the message names every difference.
    """
    built = describe(model)
    different = [
        f"{PARAMS[name]} is {built[name]} in `model` and {value} in {path.name}"
        for name, value in params.items()
        if name in built and built[name] != value
    ]
    is_scaled = built.get("rope_scaling.factor", 1.0) != 1.0  # by how much, the file does not say
    if is_scaled != params["is_scaled"]:
        different.append(f"use_scaled_rope is {show(is_scaled)} in `model` and {show(not is_scaled)} in {path.name}")
    refuse_differences(different)
