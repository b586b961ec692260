"""The settings that are read of a Hugging Face config.json: one table of what each is called, there and here.

Names are Llama's. What to make of the values is said in check_model.py, and of rows and ties in families.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from pairtune.models.experts import MixtureOfExperts
from pairtune.models.frozen_base import shape_of


@dataclass(frozen=True)
class Setting:
    """One setting of config.json.

    Attributes:
        kind: Its type.
        of_model: Returns what it is in a built model; None where that has no such thing.
        default: What transformers takes where config.json leaves it out.
        defaults: The same for the model_types where it is something else.
        keys: By model_type, what other architectures call it. Where every head of queries has keys and values of its
            own, one key tells the number of both.
        argument: What builders call it.
        null: Whether null says something else than leaving it out.
        needed: Whether a config.json without it is broken.
    """

    kind: type
    of_model: Callable[[TransformerDecoder], Any] | None = None
    default: Any = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    argument: str | None = None
    null: bool = False
    needed: bool = False


def _attention(model: TransformerDecoder) -> MultiHeadAttention:
    return model.layers[0].attn


def _width_of_mlp(model: TransformerDecoder) -> int:
    mlp = model.layers[0].mlp
    return shape_of((mlp.experts[0] if isinstance(mlp, MixtureOfExperts) else mlp).w1)[0]


def _query_scalar(model: TransformerDecoder) -> float | None:
    scale = getattr(_attention(model)._attention_call, "scale", None)
    return round(scale**-2, 6) if scale else None


def _rotary(read: Callable[[MultiHeadAttention], float]) -> Callable[[TransformerDecoder], float | None]:
    """Returns a reader of attention for models that may have no rotary embeddings."""
    return lambda model: None if _attention(model).pos_embeddings is None else float(read(_attention(model)))


def _mixture(read: Callable[[MixtureOfExperts], int]) -> Callable[[TransformerDecoder], int | None]:
    """Returns a reader of a mixture of experts for models that may have none."""
    return lambda model: read(model.layers[0].mlp) if isinstance(model.layers[0].mlp, MixtureOfExperts) else None


SETTINGS = {
    "model_type": Setting(str, needed=True),
    "hidden_size": Setting(
        int, lambda m: m.tok_embeddings.embedding_dim, keys={"gpt2": "n_embd"}, argument="embed_dim", needed=True
    ),
    "num_hidden_layers": Setting(
        int, lambda m: len(m.layers), keys={"gpt2": "n_layer"}, argument="num_layers", needed=True
    ),
    "num_attention_heads": Setting(
        int, lambda m: _attention(m).num_heads, keys={"gpt2": "n_head"}, argument="num_heads", needed=True
    ),
    "num_key_value_heads": Setting(  # null: as many as there are heads of queries
        int,
        lambda m: _attention(m).num_kv_heads,
        defaults={"mistral": 8, "mixtral": 8, "gemma": 16, "gemma2": 4, "qwen2": 32, "qwen3": 32},
        keys={"gpt2": "n_head", "gpt_neox": "num_attention_heads"},
        argument="num_kv_heads",
        null=True,
    ),
    "head_dim": Setting(
        int, lambda m: _attention(m).head_dim, defaults={"gemma": 256, "gemma2": 256, "qwen3": 128}, argument="head_dim"
    ),
    "vocab_size": Setting(int, lambda m: m.tok_embeddings.num_embeddings, argument="vocab_size"),
    "intermediate_size": Setting(int, _width_of_mlp, keys={"gpt2": "n_inner"}, argument="intermediate_dim"),
    "max_position_embeddings": Setting(
        int,
        lambda m: m.pos_embeddings.num_embeddings if hasattr(m, "pos_embeddings") else None,  # where they are learned
        defaults={"gpt2": 1024},
        keys={"gpt2": "n_positions"},
        argument="max_seq_len",
    ),
    "rms_norm_eps": Setting(
        float,
        lambda m: getattr(m.norm, "eps", None),
        default=1e-6,
        defaults=dict.fromkeys(("mixtral", "phi3", "gpt2", "gpt_neox"), 1e-5),
        keys={"gpt2": "layer_norm_epsilon", "gpt_neox": "layer_norm_eps"},
        argument="norm_eps",
    ),
    "rope_theta": Setting(
        float,
        _rotary(lambda attention: attention.pos_embeddings.base),
        default=1e4,
        defaults={"mixtral": 1e6},
        keys={"gpt_neox": "rotary_emb_base"},
        argument="rope_base",
    ),
    "rope_scaling.factor": Setting(
        float, _rotary(lambda attention: getattr(attention.pos_embeddings, "scale_factor", 1)), default=1.0
    ),
    "partial_rotary_factor": Setting(
        float,
        _rotary(lambda attention: attention.pos_embeddings.dim / attention.head_dim),
        default=1.0,
        defaults={"gpt_neox": 0.25},
        keys={"gpt_neox": "rotary_pct"},
        argument="rotary_pct",
    ),
    "rope_scaling": Setting(dict),
    "rope_parameters": Setting(dict),
    "tie_word_embeddings": Setting(
        bool,
        lambda m: isinstance(m.output, TiedLinear),
        default=False,
        defaults=dict.fromkeys(("gemma", "gemma2", "gpt2"), True),
        argument="tie_word_embeddings",
    ),
    "use_parallel_residual": Setting(
        bool,
        lambda m: getattr(m.layers[0], "use_parallel_residual", False),
        default=False,
        defaults={"gpt_neox": True},
        argument="use_parallel_residual",
    ),
    "attn_logit_softcapping": Setting(  # null: no cap
        float,
        lambda m: float(getattr(_attention(m)._attention_call, "softcap", None) or 0),
        defaults={"gemma2": 50.0},
        argument="attn_logit_softcapping",
        null=True,
    ),
    "final_logit_softcapping": Setting(
        float,
        lambda m: float(getattr(m.output, "softcap", None) or 0),
        defaults={"gemma2": 30.0},
        argument="final_logit_softcapping",
        null=True,
    ),
    "query_pre_attn_scalar": Setting(
        float, _query_scalar, defaults={"gemma2": 256.0}, argument="query_pre_attn_scalar"
    ),
    "num_local_experts": Setting(
        int, _mixture(lambda mlp: len(mlp.experts)), defaults={"mixtral": 8}, argument="num_experts"
    ),
    "num_experts_per_tok": Setting(
        int, _mixture(lambda mlp: mlp.experts_per_token), defaults={"mixtral": 2}, argument="experts_per_token"
    ),
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
# Settings of which only these values are what the builders compute, by config.json's model_type.
ONLY = {
    **dict.fromkeys(("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3"), {"hidden_act": ("silu", "swish")}),
    # transformers takes gelu for the approximation, too, which Google's first files mean by it.
    "gemma": dict.fromkeys(("hidden_act", "hidden_activation"), ("gelu_pytorch_tanh", "gelu")),
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


def config_key(name: str, config: Mapping) -> str:
    """Returns what this config.json calls a setting that Llama's calls `name`."""
    return SETTINGS[name].keys.get(str(config.get("model_type")), name)


def setting(config: Mapping, name: str) -> Any:
    """Returns what transformers takes for a setting of this config.json; None where it has no default for it."""
    known = SETTINGS[name]
    default = known.defaults.get(str(config.get("model_type")), known.default)
    value = config.get(config_key(name, config), default)
    return default if value is None and not known.null else value
