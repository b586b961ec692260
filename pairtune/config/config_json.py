"""The settings that are read of a Hugging Face config.json: one table of what each is called, there and here.

Names are Llama's. Which values builders compute is said in architectures.py, what a built model has of them in
folders/check_model.py, and of rows and ties in folders/families.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Setting:
    """One setting of config.json.

    Attributes:
        kind: Its type.
        default: What transformers takes where config.json leaves it out.
        defaults: The same for the model_types where it is something else.
        keys: By model_type, what other architectures call it. Where every head of queries has keys and values of its
            own, one key tells the number of both.
        argument: What builders call it.
        null: Whether null says something else than leaving it out.
        needed: Whether a config.json without it is broken.
        most: The largest whole number that a model may have.
    """

    kind: type
    default: Any = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    argument: str | None = None
    null: bool = False
    needed: bool = False
    most: int = 2**31


SETTINGS = {
    "model_type": Setting(str, needed=True),
    "hidden_size": Setting(int, keys={"gpt2": "n_embd"}, argument="embed_dim", needed=True),
    "num_hidden_layers": Setting(int, keys={"gpt2": "n_layer"}, argument="num_layers", needed=True, most=10_000),
    "num_attention_heads": Setting(int, keys={"gpt2": "n_head"}, argument="num_heads", needed=True),
    "num_key_value_heads": Setting(  # null: as many as there are heads of queries
        int,
        defaults={"mistral": 8, "mixtral": 8, "gemma": 16, "gemma2": 4, "qwen2": 32, "qwen3": 32},
        keys={"gpt2": "n_head", "gpt_neox": "num_attention_heads"},
        argument="num_kv_heads",
        null=True,
    ),
    "head_dim": Setting(int, defaults={"gemma": 256, "gemma2": 256, "qwen3": 128}, argument="head_dim"),
    "vocab_size": Setting(int, argument="vocab_size"),
    "intermediate_size": Setting(int, keys={"gpt2": "n_inner"}, argument="intermediate_dim"),
    "max_position_embeddings": Setting(
        int, defaults={"gpt2": 1024}, keys={"gpt2": "n_positions"}, argument="max_seq_len"
    ),
    "rms_norm_eps": Setting(
        float,
        default=1e-6,
        defaults=dict.fromkeys(("mixtral", "phi3", "gpt2", "gpt_neox"), 1e-5),
        keys={"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"},
        argument="norm_eps",
    ),
    "rope_theta": Setting(
        float,
        default=1e4,
        defaults={"mixtral": 1e6},
        keys={"gpt_neox": "rotary_emb_base"},
        argument="rope_base",
    ),
    "rope_scaling.factor": Setting(float, default=1.0),
    "partial_rotary_factor": Setting(
        float,
        default=1.0,
        defaults={"gpt_neox": 0.25},
        keys={"gpt_neox": "rotary_pct"},
        argument="rotary_pct",
    ),
    "rope_scaling": Setting(dict),
    "rope_parameters": Setting(dict),
    "tie_word_embeddings": Setting(
        bool,
        default=False,
        defaults=dict.fromkeys(("gemma", "gemma2", "gpt2"), True),
        argument="tie_word_embeddings",
    ),
    "use_parallel_residual": Setting(
        bool,
        default=False,
        defaults={"gpt_neox": True},
        argument="use_parallel_residual",
    ),
    "attn_logit_softcapping": Setting(  # null: no cap
        float,
        defaults={"gemma2": 50.0},
        argument="attn_logit_softcapping",
        null=True,
    ),
    "final_logit_softcapping": Setting(
        float,
        defaults={"gemma2": 30.0},
        argument="final_logit_softcapping",
        null=True,
    ),
    "query_pre_attn_scalar": Setting(float, defaults={"gemma2": 256.0}, argument="query_pre_attn_scalar"),
    "num_local_experts": Setting(int, defaults={"mixtral": 8}, argument="num_experts"),
    "num_experts_per_tok": Setting(int, defaults={"mixtral": 2}, argument="experts_per_token"),
    "sliding_window": Setting(  # null: none
        int, defaults=dict.fromkeys(("mistral", "qwen2", "qwen3", "gemma2"), 4096), null=True
    ),
    "use_sliding_window": Setting(bool, default=False),
    "max_window_layers": Setting(int, default=28),
    "layer_types": Setting(list[str]),
}

# Settings that most architectures have no word for; those that have one have a default of it.
OF_FEW = (
    *("partial_rotary_factor", "use_parallel_residual", "attn_logit_softcapping", "final_logit_softcapping"),
    *("query_pre_attn_scalar", "num_local_experts", "num_experts_per_tok"),
)
# How Llama 3.1 and later scale positions, whatever the factor.
LLAMA3_ROPE = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}


def config_key(name: str, config: Mapping) -> str:
    """Returns what this config.json calls a setting that Llama's calls `name`."""
    return SETTINGS[name].keys.get(str(config.get("model_type")), name)


def setting(config: Mapping, name: str) -> Any:
    """Returns what transformers takes for a setting of this config.json; None where it has no default for it."""
    known = SETTINGS[name]
    default = known.defaults.get(str(config.get("model_type")), known.default)
    value = config.get(config_key(name, config), default)
    return default if value is None and not known.null else value


ROPE_BLOCKS = ("rope_scaling", "rope_parameters")  # of transformers 4 and 5
# What no value of a built model tells; windows are read by check_model.py.
NOT_DESCRIBED = ("model_type", *ROPE_BLOCKS, "sliding_window", "use_sliding_window", "max_window_layers", "layer_types")


def describe_config(config: Mapping) -> dict[str, Any]:
    """Returns what transformers 4 or 5 makes of a config.json, by names of settings; None for sizes it does not say."""
    said = {name: setting(config, name) for name in SETTINGS if name not in NOT_DESCRIBED}
    rope = rope_of(config)
    said |= {key: value for key, value in rope.items() if key in said and value is not None}
    heads, width = said["num_attention_heads"], said["hidden_size"]
    if kind_of_rope(rope) not in (None, "default"):
        said["rope_scaling.factor"] = rope.get("factor") or 1.0
    said["num_key_value_heads"] = said["num_key_value_heads"] or heads
    said["head_dim"] = said["head_dim"] or width // heads
    if config.get("model_type") == "gpt2":
        said["intermediate_size"] = said["intermediate_size"] or 4 * width
    for cap in ("attn_logit_softcapping", "final_logit_softcapping"):
        said[cap] = said[cap] or 0.0
    is_float = {name for name, known in SETTINGS.items() if known.kind is float}
    return {name: float(v) if name in is_float and v is not None else v for name, v in said.items()}


def rope_of(config: Mapping) -> dict[str, Any]:
    """Returns how a config.json scales positions: the block that says so, {} where none does."""
    return next((config[block] for block in ROPE_BLOCKS if config.get(block)), {})


def kind_of_rope(rope: Mapping) -> str | None:
    """Returns how a block scales positions; None where it does not say."""
    return rope.get("rope_type") or rope.get("type")
