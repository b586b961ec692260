"""Whether the model that a config builds is the one whose weights it names, as far as the folder's config.json tells.

Weights of equal shapes load into the wrong architecture without a word, and train: loss starts at ln 2 all the same.
"""

from collections.abc import Callable, Sequence

from torchtune.modules import MultiHeadAttention, TiedLinear, TransformerDecoder

from pairtune.config.architectures import WINDOWED, config_types, of_config_type
from pairtune.config.config_json import config_key, describe_config, rope_of, setting
from pairtune.config.rules import show
from pairtune.errors import UserError
from pairtune.folders.families import FAMILIES
from pairtune.models.additions import additions
from pairtune.models.experts import MixtureOfExperts
from pairtune.models.frozen_base import shape_of


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
    said = (
        config.get(config_key(name, config)) is not None or name in rope_of(config) or name.startswith("rope_scaling")
    )
    return "in config.json" if said else "by default, which config.json leaves it to"


def positions(config: dict, max_length: int) -> list[str]:
    """Returns a sentence where conversations may be longer than a config.json says that its model was made for."""
    most, rope = setting(config, "max_position_embeddings"), rope_of(config)
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


# What a built model is


def describe(model: TransformerDecoder) -> dict:
    """Returns what a model is, by names of settings; without those that have no meaning for it."""
    found = {name: of_model(model) for name, of_model in OF_MODEL.items()}
    return {name: value for name, value in found.items() if value is not None}


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


OF_MODEL = {  # what a setting is in a built model; None where that has no such thing
    "hidden_size": lambda m: m.tok_embeddings.embedding_dim,
    "num_hidden_layers": lambda m: len(m.layers),
    "num_attention_heads": lambda m: _attention(m).num_heads,
    "num_key_value_heads": lambda m: _attention(m).num_kv_heads,
    "head_dim": lambda m: _attention(m).head_dim,
    "vocab_size": lambda m: m.tok_embeddings.num_embeddings,
    "intermediate_size": _width_of_mlp,
    "max_position_embeddings": lambda m: (
        m.pos_embeddings.num_embeddings if hasattr(m, "pos_embeddings") else None  # where they are learned
    ),
    "rms_norm_eps": lambda m: getattr(m.norm, "eps", None),
    "rope_theta": _rotary(lambda attention: attention.pos_embeddings.base),
    "rope_scaling.factor": _rotary(lambda attention: getattr(attention.pos_embeddings, "scale_factor", 1)),
    "partial_rotary_factor": _rotary(lambda attention: attention.pos_embeddings.dim / attention.head_dim),
    "tie_word_embeddings": lambda m: isinstance(m.output, TiedLinear),
    "use_parallel_residual": lambda m: getattr(m.layers[0], "use_parallel_residual", False),
    "attn_logit_softcapping": lambda m: float(getattr(_attention(m)._attention_call, "softcap", None) or 0),
    "final_logit_softcapping": lambda m: float(getattr(m.output, "softcap", None) or 0),
    "query_pre_attn_scalar": _query_scalar,
    "num_local_experts": _mixture(lambda mlp: len(mlp.experts)),
    "num_experts_per_tok": _mixture(lambda mlp: mlp.experts_per_token),
}
