"""Which architectures have a builder here, and whether a config.json is of one: what else is refused, or the bridge's.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same. So
whatever a config.json says that a builder does not compute is named. No torch here.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pairtune.config import fewer_bits
from pairtune.config.config_json import (
    LLAMA3_ROPE,
    ROPE_BLOCKS,
    SETTINGS,
    config_key,
    kind_of_rope,
    rope_of,
    setting,
)
from pairtune.config.layout import find_config
from pairtune.config.rules import fits, kind_words, show
from pairtune.config.uses import has_bridge
from pairtune.errors import UserError
from pairtune.files import read_json


@dataclass(frozen=True)
class Architecture:
    """What config.json's model_type names, and what builds it.

    Attributes:
        families: What `checkpointer.model_type` calls it.
        causal: transformers' class of it.
        builder: What builds it in any size.
        fixed: Settings that the builder has no argument for, where it computes something else than most do (auto.py).
        only: Settings of which only these values are what it computes; null stands for the first.
    """

    families: tuple[str, ...]
    causal: str
    builder: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple] = field(default_factory=dict)


_SILU = {"hidden_act": ("silu", "swish")}
_NO_BIAS = {"attention_bias": (False,)}
ARCHITECTURES = {
    "llama": Architecture(
        ("LLAMA2", "LLAMA3", "LLAMA3_2"),
        "LlamaForCausalLM",
        "torchtune.models.llama3.llama3",  # and its younger sisters: auto.py
        only=_SILU | _NO_BIAS | {"mlp_bias": (False,)},
    ),
    "mistral": Architecture(("MISTRAL",), "MistralForCausalLM", "torchtune.models.mistral.mistral", only=_SILU),
    "mixtral": Architecture(
        ("MIXTRAL",), "MixtralForCausalLM", "pairtune.mixtral.mixtral", only=_SILU | {"router_jitter_noise": (0.0,)}
    ),
    "gemma": Architecture(
        ("GEMMA",),
        "GemmaForCausalLM",
        "torchtune.models.gemma.gemma",
        {"tie_word_embeddings": True},
        # transformers takes gelu for the approximation, too, which Google's first files mean by it.
        _NO_BIAS | dict.fromkeys(("hidden_act", "hidden_activation"), ("gelu_pytorch_tanh", "gelu")),
    ),
    "gemma2": Architecture(
        ("GEMMA2",),
        "Gemma2ForCausalLM",
        "pairtune.gemma2.gemma2",
        {"tie_word_embeddings": True},
        _NO_BIAS | {"hidden_activation": ("gelu_pytorch_tanh",)},
    ),
    "qwen2": Architecture(("QWEN2",), "Qwen2ForCausalLM", "torchtune.models.qwen2.qwen2", only=_SILU),
    "qwen3": Architecture(("QWEN3",), "Qwen3ForCausalLM", "pairtune.qwen3.qwen3", only=_SILU | _NO_BIAS),
    "phi3": Architecture(("PHI3_MINI", "PHI4"), "Phi3ForCausalLM", "torchtune.models.phi3.phi3", only=_SILU),
    "gpt2": Architecture(
        ("GPT2",),
        "GPT2LMHeadModel",
        "pairtune.gpt2.gpt2",
        only={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "gpt_neox": Architecture(
        ("GPT_NEOX",),
        "GPTNeoXForCausalLM",
        "pairtune.gpt_neox.gpt_neox",
        only={"hidden_act": ("gelu",), "attention_bias": (True,)},
    ),
}
# What makes other architectures compute something else, and the values with which it does not. transformers ignores
# such a key in one that has no such word: then the file is of another model than its model_type says.
FOREIGN = {
    **dict.fromkeys(("attention_bias", "mlp_bias"), (False,)),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm", "alibi", "rope_interleaved"), (False,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "lm_head_multiplier", "embedding_multiplier"), (1,)),
    **dict.fromkeys(("residual_multiplier", "scale_emb", "attn_temperature_tuning"), (1, False)),
    **dict.fromkeys(("attention_multiplier", "rope_local_base_freq", "no_rope_layers", "attention_chunk_size"), ()),
    **dict.fromkeys(("num_experts", "n_routed_experts", "clip_qkv", "kv_lora_rank"), (0,)),
}
_BIASED = ("qwen2", "gpt2")  # always; some of their files say so
WINDOWED = ("mistral", "mixtral", "phi3", "qwen2", "qwen3", "gemma2")  # layers may have a sliding window
MAY_BE_ZERO = ("max_window_layers",)
# How positions may be scaled: what torchtune computes, with these settings of it.
ROPE_TYPES = {"llama": ("default", "llama3")}
ALL_ROPE_TYPES = (
    "default",
    "linear",
    "dynamic",
    "yarn",
    "longrope",
    "su",
    "llama3",
)  # transformers', and Phi's old name
# Classes of transformers that answer with something else than the next token.
_OTHER_TASKS = ("Classification", "QuestionAnswering", "MaskedLM", "RewardModel", "ForReward", "MultipleChoice")
_ANSWERS = "DPO trains a model that has an output layer for the next token: take the folder that it was made from"


def of_config_type(config_type: Any) -> list[str]:
    """Returns the families that a config.json of this model_type may be of."""
    known = ARCHITECTURES.get(config_type) if isinstance(config_type, str) else None
    return list(known.families) if known else []


def config_types() -> Iterable[str]:
    """Returns every model_type of a config.json that has a builder."""
    return ARCHITECTURES.keys()


def config_type_of(family: str) -> str:
    """Returns what config.json calls a family."""
    return next(name for name, known in ARCHITECTURES.items() if family in known.families)


def read_config(checkpoint_dir: str, *, key: str = "checkpointer.checkpoint_dir") -> dict:
    """Returns the folder's config.json; what is read of it is of its kind (check_config).

    Args:
        key: The config's name for `checkpoint_dir`, for messages.

    Raises:
        UserError: As find_config and check_config.
    """
    path = find_config(checkpoint_dir, key=key)
    content = read_json(path)
    check_config(content, path)
    return content


def check_config(config: Any, path: Path) -> None:
    """Checks that a builder here makes what a config.json describes.

    Raises:
        UserError: As check_readable; or it is of an architecture, or a variant of one, that no builder computes.
    """
    check_readable(config, path)
    if reason := why_not(config):
        raise beyond(path, config, reason)


def check_readable(config: Any, path: Path) -> None:
    """Checks that a config.json describes a decoder whose weights can be trained, whoever builds it.

    Raises:
        UserError: It is no object, lacks a key, has one of the wrong kind, is of a quantized model, or of one that does
            not continue text.
    """
    if not isinstance(config, dict):
        raise UserError(f"{path}: must hold keys and values, holds {show(config)}")
    _check_task(path, config)
    fewer_bits.check(config, str(path))
    if isinstance(config.get("text_config"), dict):  # a shell, whose own keys are few
        return
    check_kind(path, "model_type", needed(path, config, "model_type"), str)
    for name, known in SETTINGS.items() if config["model_type"] in ARCHITECTURES else ():
        key = config_key(name, config)
        if known.needed:
            needed(path, config, key)
        if config.get(key) is not None:
            check_kind(path, key, config[key], known.kind, most=known.most)
    layers = config.get("num_hidden_layers")
    if config["model_type"] in ARCHITECTURES:
        _check_rope_kinds(path, config)
    elif isinstance(layers, int):
        check_kind(path, "num_hidden_layers", layers, int, most=SETTINGS["num_hidden_layers"].most)


def _check_task(path: Path, config: dict) -> None:
    classes = config.get("architectures")
    if classes is not None and not fits(classes, list[str]):
        raise UserError(f"{path}: architectures={show(classes)}: must be a list, each text")
    name = (classes or [""])[0]
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"{path}: {name or 'is_encoder_decoder=true'}: is an encoder and a decoder; pairs are learned by decoders "
            "here, models whose class in transformers ends in ForCausalLM"
        )
    if config.get("use_bidirectional_attention"):
        raise UserError(f"{path}: use_bidirectional_attention=true: its tokens see those behind them; {_ANSWERS}")
    is_bare = name.endswith("Model") and not name.endswith("LMHeadModel")
    if any(task in name for task in _OTHER_TASKS):
        raise UserError(f"{path}: architectures=[{name}]: is a classifier or reward model; {_ANSWERS}")
    if is_bare and not setting(config, "tie_word_embeddings"):
        raise UserError(f"{path}: architectures=[{name}]: was saved without its output layer; {_ANSWERS}")


def needed(path: Path, config: Mapping, key: str) -> Any:
    """Returns a value that a config.json has to say.

    Raises:
        UserError: It does not.
    """
    if config.get(key) is None:
        raise UserError(f"{path}: {key}: is missing; download the file again, or set it as the model's authors say")
    return config[key]


def check_kind(path: Path, key: str, value: Any, kind: type, *, most: float = math.inf) -> None:
    """Checks one value that a file says of a model.

    Raises:
        UserError: It is not of this kind, or a number that is not above 0 and finite, or a whole one above `most`.
    """
    if not fits(value, kind):
        raise UserError(f"{path}: {key}={value!r}: must be {kind_words(kind)}")
    if kind in (int, float) and not 0 < value < math.inf and not (value == 0 and key in MAY_BE_ZERO):
        raise UserError(f"{path}: {key}={value}: must be above 0 and finite")
    if kind is int and value > most:
        raise UserError(f"{path}: {key}={value}: must be at most {most}; download the file again")


def _check_rope_kinds(path: Path, config: dict) -> None:
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
        kind = kind_of_rope(rope)
        if kind is not None and kind not in ALL_ROPE_TYPES:
            raise UserError(
                f"{path}: {block}.rope_type={show(kind)}: must be one of {', '.join(ALL_ROPE_TYPES)}; download the "
                "file again, or set it as the model's authors say"
            )


# What no builder computes


def beyond(path: Path, config: Mapping, reason: str) -> UserError:
    """Returns the error of a config.json that is in order and that no builder computes."""
    code = "; the repository's own code, auto_map, is never run" if config.get("auto_map") else ""
    way_out = "model=auto" if has_bridge() else 'pip install "pairtune[models]"'
    return UserError(f"{path}: {reason}; {way_out} trains it if transformers has it{code}")


def why_not(config: Mapping) -> str | None:
    """Returns why no builder here makes what a config.json describes, in words; None where one does.

    Args:
        config: Checked by check_readable.
    """
    name = config.get("model_type")
    if isinstance(config.get("text_config"), dict):
        inner, outer = config["text_config"].get("model_type"), (config.get("architectures") or [name])[0]
        return (
            f"model_type={name}: {outer} is a vision shell around text_config's {inner}, and torchtune builds neither"
        )
    if name not in ARCHITECTURES:
        causal = f" ({config['architectures'][0]})" if config.get("architectures") else ""
        return f"model_type={name}{causal}: torchtune has no builder for it, only for {', '.join(config_types())}"
    if reason := fewer_bits.reason(config):
        return reason
    checks = (_other_code, _other_values, _foreign, _other_rope)
    return next((reason for check in checks if (reason := check(config, ARCHITECTURES[name]))), None)


def _other_code(config: Mapping, known: Architecture) -> str | None:
    """A repository may bring code of its own for a name that transformers has, too."""
    classes, code = config.get("architectures") or [], config.get("auto_map")
    if isinstance(code, dict) and classes and classes[0] != known.causal and "AutoModelForCausalLM" in code:
        return f"architectures=[{classes[0]}]: is the repository's own class, and not {known.causal}"
    return None


def _must_be(key: str, value: Any, values: Iterable, config: Mapping) -> str:
    wanted = " or ".join(map(show, values)) or "left out"
    return (
        f"{key}={show(value)}: must be {wanted}; the builder of model_type={config['model_type']} computes nothing else"
    )


def _other_values(config: Mapping, known: Architecture) -> str | None:
    for key, values in known.only.items():
        if config.get(key) not in (None, *values):
            return _must_be(key, config[key], values, config)
    return None


def _foreign(config: Mapping, known: Architecture) -> str | None:
    for key, values in FOREIGN.items():
        is_known = key in known.only or key in SETTINGS or (key == "attention_bias" and config["model_type"] in _BIASED)
        if not is_known and config.get(key) not in (None, *values):
            return _must_be(key, config[key], values, config)
    kinds = config.get("layer_types") or []
    if config["model_type"] not in WINDOWED and (other := [kind for kind in kinds if kind != "full_attention"]):
        return _must_be("layer_types", other[:1], (["full_attention"],), config)
    return None


def _other_rope(config: Mapping, known: Architecture) -> str | None:
    for block in (block for block in ROPE_BLOCKS if config.get(block)):
        rope, types = config[block], ROPE_TYPES.get(config["model_type"], ("default",))
        nested = next((key for key, value in rope.items() if isinstance(value, dict)), None)
        if nested:
            return f"{block}.{nested}: positions are counted in another way by some layers, which no builder here does"
        kind, factor = kind_of_rope(rope), rope.get("factor")
        is_known = kind in types or (kind is None and factor in (None, 1))
        # others than these have more settings, which count at any factor
        if not is_known and not (kind in ("linear", "dynamic") and factor == 1):
            name = "rope_type" if rope.get("rope_type") or kind is None else "type"
            return _must_be(f"{block}.{name}", kind, types, config)
        if kind == "llama3":
            for key, value in LLAMA3_ROPE.items():
                if rope.get(key) != value:
                    return _must_be(f"{block}.{key}", rope.get(key), (value,), config)
    return None


def check_length(config: Mapping, max_length: int) -> None:
    """Refuses conversations so long that transformers would choose other frequencies for all of a row's positions.

    It goes by the row's last position: a short pair would be computed in another way beside a long one than alone.

    Raises:
        UserError: As said, with the longest one that is computed in one way; or every row has frequencies of its own.
    """
    for block in config.values():
        if isinstance(block, dict) and "model_type" in block:  # the text model's, of one with images around it
            check_length(block, max_length)
    whole = rope_of(config)
    for rope in (whole, *(block for block in whole.values() if isinstance(block, dict))):  # or one a kind of layer
        kind, most = kind_of_rope(rope), [o.get("original_max_position_embeddings") for o in (config, rope)]
        most += [4096] if config.get("model_type") in ("phi3", "phimoe") else []  # of transformers' class
        most = min((n for n in most if isinstance(n, int)), default=None)
        if kind == "dynamic":
            raise UserError(
                "config.json: rope_type=dynamic: counts positions in another way in each row, by its length, and pairs "
                "of several lengths share a row; take a model whose positions are not scaled so"
            )
        if kind in ("longrope", "su") and most and max_length > most:
            raise UserError(
                f"max_length={max_length}: rope_type={kind} counts positions in another way in rows above {most} "
                f"tokens, and pairs of several lengths share a row; nearest valid: max_length={most}"
            )
