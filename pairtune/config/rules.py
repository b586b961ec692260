"""What the values of a config must be, and the words of a mistake: one line with key, value, rule and way out.

config.py reads and merges the layers of a config, components.py knows what components take.
"""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pairtune.errors import UserError

REQUIRED = "???"  # OmegaConf's mark for a value that a config must give


@dataclass(frozen=True)
class Rule:
    """What a key's value must be, beyond its default's type: `kind` where the default is None, and a condition."""

    holds: Callable[[Any], bool]
    says: str  # completes "must be ..."
    nearest: Callable[[Any], Any] | None = None  # a wrong value -> the closest right one; else the default is shown
    kind: type | None = None  # the type when the default, being None, does not tell
    nullable: bool = False


def at_least(bound, kind=int, nullable=False):
    return Rule(lambda v: v >= bound, f"at least {bound}", lambda v: bound, kind, nullable)


def above(bound, kind=float, nullable=False):
    return Rule(lambda v: v > bound, f"greater than {bound}", None, kind, nullable)


def between(low, high, kind=float):
    """low <= value < high."""
    return Rule(lambda v: low <= v < high, f"at least {low} and below {high}", None, kind)


def one_of(*choices):
    def nearest(value):
        return next(iter(difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)), choices[0])

    return Rule(lambda v: v in choices, "one of " + ", ".join(choices), nearest, str)


def from_to(low, high):
    return Rule(lambda v: low <= v <= high, f"at least {low} and at most {high:,}", None, int)


def text(nullable=True):
    return Rule(lambda v: nullable or v.strip(), "text, and not empty", None, str, nullable)


# What lora.modules may hold, and which layers that is, without numbers: torchtune's names, then Hugging Face's.
LORA_LAYERS = {
    "q_proj": ("attn.q_proj",),
    "k_proj": ("attn.k_proj",),
    "v_proj": ("attn.v_proj",),
    "output_proj": ("attn.output_proj",),
    "mlp": ("mlp.w1", "mlp.w2", "mlp.w3"),
    "output": ("output",),
    "router": ("mlp.router",),  # of a mixture of experts; mlp is all its experts
    "o_proj": ("attn.output_proj",),
    "gate_proj": ("mlp.w1",),
    "up_proj": ("mlp.w3",),
    "down_proj": ("mlp.w2",),
    "lm_head": ("output",),
    "gate": ("mlp.router",),
    "qkv_proj": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "gate_up_proj": ("mlp.w1", "mlp.w3"),
    "w1": ("mlp.w1",),
    "w2": ("mlp.w2",),
    "w3": ("mlp.w3",),
    "c_attn": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "c_proj": ("attn.output_proj", "mlp.w2"),
    "c_fc": ("mlp.w1",),
    "query_key_value": ("attn.q_proj", "attn.k_proj", "attn.v_proj"),
    "dense": ("attn.output_proj",),
    "dense_h_to_4h": ("mlp.w1",),
    "dense_4h_to_h": ("mlp.w2",),
    "embed_out": ("output",),
    "all-linear": ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w2", "mlp.w3"),
}
# Of these, torchtune's and all-linear: every architecture has them. Of the others it has its own (families.py).
OUR_LAYERS = ("q_proj", "k_proj", "v_proj", "output_proj", "mlp", "output", "router", "all-linear")
HIGHER_IS_BETTER = {"loss": False, "rewards/accuracies": True, "rewards/margins": True}  # what keep_best goes by


def _nearest_lora_modules(modules: list) -> list:
    return [m for m in modules if m in tuple(LORA_LAYERS)] or ["q_proj", "v_proj"]


RULES = {
    "output_dir": text(nullable=False),
    "seed": between(0, 2**32, int),
    "device": Rule(
        lambda v: v in ("auto", "cpu", "cuda") or v.startswith("cuda:") and v[5:].isdecimal(),
        "auto, cpu, cuda or cuda:N",
    ),
    "dtype": one_of("bf16", "fp32"),
    "attention": one_of("auto", "segments", "mask"),
    "merge_into": one_of("original", "dequantized"),
    "checkpointer._component_": Rule(
        lambda v: v.rpartition(".")[2] == "FullModelHFCheckpointer",
        "FullModelHFCheckpointer: no format but Hugging Face folders is supported",
    ),
    "checkpointer.checkpoint_dir": text(),
    "checkpointer.model_type": text(),
    "max_length": at_least(2),
    "max_prompt_length": at_least(1, nullable=True),
    "dataset.source": text(nullable=False),
    "dataset.name": text(),
    "dataset.revision": text(),
    "dataset.limit": at_least(1, nullable=True),
    "dataset.val_fraction": Rule(lambda v: 0 < v < 1, "above 0 and below 1, such as 0.1", None, float, nullable=True),
    "dataset.overlong": one_of("drop", "trim_prompt", "error"),
    "eval_dataset.source": text(),
    "eval_dataset.name": text(),
    "eval_dataset.revision": text(),
    "eval_dataset.limit": at_least(1, nullable=True),
    "eval_dataset.overlong": one_of("drop", "trim_prompt", "error"),
    "loss.beta": above(0),
    "loss.gamma": above(0),
    "loss.label_smoothing": between(0, 0.5),
    "optimizer.lr": above(0),
    "lr_scheduler.warmup_ratio": between(0, 1),
    "reference.name": one_of("adapter_off", "start", "model", "cached", "sync", "none"),
    "reference.checkpoint_dir": text(),
    "reference.dtype": one_of("bf16", "fp32"),
    "reference.quantize": Rule(lambda v: True, "", kind=bool),
    "reference.cache_dir": text(),
    "reference.every_n_steps": at_least(1),
    "reference.alpha": Rule(lambda v: 0 < v <= 1, "above 0 and at most 1", lambda v: 1.0, float),
    "adapter": text(),
    "lora.rank": from_to(1, 65_536),
    "lora.alpha": above(0),
    "lora.dropout": between(0, 1),
    "lora.modules": Rule(
        lambda v: v and all(m in tuple(LORA_LAYERS) for m in v),
        f"a list of at least one of {', '.join(LORA_LAYERS)}",
        _nearest_lora_modules,
    ),
    "clip_grad_norm": above(0, nullable=True),
    "router_aux_loss_coef": at_least(0.0, float),
    "data_parallel_replicate_dim": at_least(1),
    "collective_timeout_s": Rule(lambda v: 0 < v <= 10**6, "above 0 and at most 1000000, 12 days"),
    "pairs_per_step": from_to(1, 1_000_000),
    "batch_size": at_least(1),
    "epochs": at_least(1),
    "max_steps": at_least(1, nullable=True),
    "log_every_n_steps": at_least(1),
    "eval_every_n_steps": at_least(1, nullable=True),
    "save_every_n_steps": at_least(1, nullable=True),
    "keep_last_n": at_least(0),
    "keep_best": Rule(
        lambda v: v in HIGHER_IS_BETTER, f"one of {', '.join(HIGHER_IS_BETTER)}, or null", lambda v: "loss", str, True
    ),
    "on_save_failure": one_of("stop", "continue"),
    "resume": Rule(lambda v: v != "", "true, false, auto, or the path of a checkpoint", None, bool | str),
    "samples.prompts": Rule(
        lambda v: all(isinstance(prompt, str) for prompt in v), 'a list of text, numbers in quotes: ["1","2"]'
    ),
    "samples.num_prompts": at_least(0),
    "samples.max_new_tokens": at_least(1),
    "samples.temperature": Rule(lambda v: v >= 0, "at least 0 (0 is greedy)", lambda v: 0.0),
}

# Components that may be null: then there is none. For what else is a component, see its default.
NULLABLE_COMPONENTS = ("lr_scheduler", "metric_logger", "reference.model")

# Keys of `reference` that only some references have.
OF_REFERENCES = {
    **dict.fromkeys(("checkpoint_dir", "model", "dtype", "quantize"), ("model", "cached")),
    "cache_dir": ("cached",),
    **dict.fromkeys(("every_n_steps", "alpha"), ("sync",)),
}

EXAMPLES = {
    "model": "torchtune.models.llama3.llama3_8b",
    "reference.model": "torchtune.models.llama3.llama3_8b",
    "tokenizer": "pairtune.tokenizer.hf_tokenizer",
    "checkpointer": "torchtune.training.FullModelHFCheckpointer",
    "lr_scheduler": "pairtune.schedules.cosine",
    "metric_logger": "torchtune.training.metric_logging.TensorBoardLogger",
}

# What other systems call these keys, for the message of an unknown one.
ELSEWHERE = {
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "beta": "loss.beta",
    "loss_type": "loss",
    "label_smoothing": "loss.label_smoothing",
    "warmup_ratio": "lr_scheduler.warmup_ratio",
    "warmup_steps": "lr_scheduler.num_warmup_steps",
    "num_warmup_steps": "lr_scheduler.num_warmup_steps",
    "lr_scheduler_type": "lr_scheduler",
    "num_train_epochs": "epochs",
    "max_steps_per_epoch": "max_steps",
    "total_batch_size": "pairs_per_step",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "pairs_per_step",
    "max_seq_len": "max_length",
    "max_grad_norm": "clip_grad_norm",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_attn_modules": "lora.modules",
    "checkpoint_dir": "checkpointer.checkpoint_dir",
    "eval_steps": "eval_every_n_steps",
    "save_steps": "save_every_n_steps",
    "save_total_limit": "keep_last_n",
    "metric_for_best_model": "keep_best",
    "load_best_model_at_end": "export_best",
    "resume_from_checkpoint": "resume",
    "bf16": "dtype",
}

KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a block of keys",
}


# Values


def check_values(cfg: dict, defaults: dict, prefix: str = "") -> None:
    """Types from the defaults, conditions from RULES. Arguments of components have RULES only; see check_components."""
    for key, value in cfg.items():
        name, default = f"{prefix}{key}", defaults.get(key)
        if holds_component(name, default):
            _check_block(name, value, default)
        elif isinstance(default, dict) and isinstance(value, dict):
            check_values(value, default, f"{name}.")
        else:
            _check_value(name, value, default)


def holds_component(name: str, default: Any) -> bool:
    """Returns whether the key's value is a block with `_component_`."""
    return is_component(default) or name in NULLABLE_COMPONENTS


def is_component(node: Any) -> bool:
    return isinstance(node, dict) and "_component_" in node


def component_path(key: str, default: dict | None = None) -> str:
    """Returns the default's path, or an example."""
    path = (default or {}).get("_component_")
    return EXAMPLES.get(key, "...") if path in (None, REQUIRED) else path


def may_be_null(name: str, default: Any) -> bool:
    """Returns whether null is a value of this key, which is not an argument of a component."""
    rule = RULES.get(name)
    return default is None or name in NULLABLE_COMPONENTS or (rule is not None and rule.nullable)


def _check_block(name: str, block: Any, default: dict | None) -> None:
    if block is None and name in NULLABLE_COMPONENTS:
        return
    example = component_path(name, default)
    if isinstance(block, dict) and block and not is_component(block):
        argument = next(iter(block))
        raise UserError(
            f"{name}.{argument}={show(block[argument])}: there is no {name} that could take it; "
            f"name one first: {name}={example}"
        )
    if not is_component(block) or not isinstance(block["_component_"], str):
        raise UserError(f"{name}={show(block)}: must be a component, named by its import path: {name}={example}")
    for argument, value in block.items():
        if value is not None:  # null: not passed
            rule = RULES.get(f"{name}.{argument}")
            _check_finite(f"{name}.{argument}", value)
            _check_rule(f"{name}.{argument}", value, rule.kind if rule else None, (default or {}).get(argument))


def _check_value(name: str, value: Any, default: Any) -> None:
    rule = RULES.get(name)
    kind = rule.kind if rule and rule.kind else None if default in (None, REQUIRED) else type(default)
    if value is None and may_be_null(name, default):
        return
    if value is None:
        raise UserError(f"{name}=null: must be {kind_words(kind)}{_for_example(name, default)}")
    _check_finite(name, value)
    _check_rule(name, value, kind, default)


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        off = f" ({name}=null switches it off)" if name in RULES and RULES[name].nullable else ""
        raise UserError(f"{name}={value}: must be a finite number{off}")


def _check_rule(name: str, value: Any, kind: Any, default: Any) -> None:
    if not fits(value, kind):
        raise wrong_kind(name, value, kind)
    rule = RULES.get(name)
    if rule and not rule.holds(value):
        hint = f"; nearest valid: {name}={show(rule.nearest(value))}" if rule.nearest else _for_example(name, default)
        raise UserError(f"{name}={show(value)}: must be {rule.says}{hint}")


def _for_example(name: str, default: Any) -> str:
    return "" if default in (None, REQUIRED, []) else f"; e.g. {name}={show(default)}"


def check_together(cfg: dict) -> None:
    """Values that are possible alone and impossible together."""
    prompt, total = cfg.get("max_prompt_length"), cfg.get("max_length")
    if prompt and total and prompt >= total:
        raise UserError(
            f"max_prompt_length={prompt}: must be below max_length={total}, which counts prompt and answer: nothing "
            f"would be left for an answer; nearest valid: max_prompt_length={total - 1} or max_length={2 * prompt}"
        )
    pairs, batch = cfg.get("pairs_per_step"), cfg.get("batch_size")
    if pairs and batch and pairs % batch:
        divisor = min((d for d in range(1, pairs + 1) if pairs % d == 0), key=lambda d: (abs(d - batch), d))
        raise UserError(
            f"batch_size={batch}: must divide pairs_per_step={pairs}; nearest valid: batch_size={divisor} "
            f"or pairs_per_step={max(1, round(pairs / batch)) * batch}"
        )
    has_eval = (cfg.get("eval_dataset") or {}).get("source") or (cfg.get("dataset") or {}).get("val_fraction")
    if cfg.get("eval_every_n_steps") and not has_eval:
        raise UserError(
            f"eval_every_n_steps={cfg['eval_every_n_steps']}: there is nothing to evaluate on; "
            "set eval_dataset.source or dataset.val_fraction, or eval_every_n_steps=null"
        )
    if (cfg.get("eval_dataset") or {}).get("source") and (cfg.get("dataset") or {}).get("val_fraction"):
        raise UserError(
            f"dataset.val_fraction={cfg['dataset']['val_fraction']}: eval_dataset.source is set too; keep one of the "
            "two (dataset.val_fraction=null or eval_dataset.source=null)"
        )
    if cfg.get("keep_best") and not has_eval:
        raise UserError(
            f"keep_best={cfg['keep_best']}: there is nothing to evaluate on; "
            "set eval_dataset.source or dataset.val_fraction, or keep_best=null"
        )
    if cfg.get("export_best") and not cfg.get("keep_best"):
        raise UserError("export_best=true: set keep_best, which says by what metric, such as keep_best=loss")
    if cfg.get("keep_last_n") == 0 and (cfg.get("keep_best") or cfg.get("resume")):
        key = "keep_best" if cfg.get("keep_best") else "resume"
        raise UserError(
            f"keep_last_n=0: writes no checkpoint, which {key}={show(cfg[key])} needs; nearest valid: keep_last_n=1"
        )
    schedule = cfg.get("lr_scheduler") or {}
    steps, ratio = schedule.get("num_warmup_steps"), schedule.get("warmup_ratio")
    if steps is not None and ratio is not None:
        raise UserError(
            f"lr_scheduler.num_warmup_steps={steps}: warmup_ratio={ratio} says the same in another way; keep one of "
            "them (lr_scheduler.warmup_ratio=null or lr_scheduler.num_warmup_steps=null)"
        )
    optimizer = cfg.get("optimizer")
    if optimizer and optimizer.get("lr") is None:
        raise UserError(f"optimizer.lr: {optimizer['_component_']} needs a learning rate: set optimizer.lr=...")
    _check_reference(cfg.get("reference") or {})


def _check_reference(reference: dict) -> None:
    for key, names in OF_REFERENCES.items():
        if reference.get(key) is not None and reference.get("name") not in names:
            raise UserError(
                f"reference.{key}={show(reference[key])}: has no effect with reference={reference.get('name')}, only "
                f"with {' or '.join(names)}; nearest valid: reference.{key}=null or reference={names[0]}"
            )
    if reference.get("model") and not reference.get("checkpoint_dir"):
        raise UserError(
            f"reference.model={reference['model']['_component_']}: the run's own weights are those of `model`; name "
            "the folder of this one's: reference.checkpoint_dir=..., or set reference.model=null"
        )


# Types and annotations


def fits(value: Any, kind: Any) -> bool:
    """Returns whether a value read from YAML is of this type or annotation.

    What YAML cannot write, such as a Tensor, is not judged: None, Any and unknown annotations fit all values.
    """
    options = _options(kind)
    return not [o for o in options if o is not NoneType] or any(_is(value, option) for option in options)


def kind_words(kind: Any) -> str:
    """Returns the type or annotation in words: "a whole number"."""
    words = [_option_words(option) for option in _options(kind) if option is not NoneType]
    return " or ".join(dict.fromkeys(words)) or "a value"


def _options(kind: Any) -> list:
    """The members of a union, or the annotation itself, as far as YAML can write them."""
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return [m for m in members if m is NoneType or get_origin(m) is Literal or _plain(m) in KIND_NAMES]


def _plain(kind: Any) -> type | None:
    """list for tuple[int, int], dict for Mapping[str, int], and so on."""
    origin = get_origin(kind) or kind
    if not isinstance(origin, type):
        return None
    if origin in (bool, int, float, str, dict):
        return origin
    if issubclass(origin, Mapping):
        return dict
    return list if issubclass(origin, Sequence) and not issubclass(origin, (str, bytes)) else None


def _is(value: Any, option: Any) -> bool:
    if option is NoneType:
        return value is None
    if get_origin(option) is Literal:
        return value in get_args(option)
    plain = _plain(option)
    if isinstance(value, bool):
        return plain is bool
    if plain is list:
        return isinstance(value, list) and _elements_fit(value, option)
    return isinstance(value, (int, float) if plain is float else plain)


def _elements_fit(values: list, option: Any) -> bool:
    kinds = get_args(option)
    if get_origin(option) is tuple and kinds and Ellipsis not in kinds:
        return len(values) == len(kinds) and all(map(fits, values, kinds))
    return not kinds or all(fits(value, kinds[0]) for value in values)


def _option_words(option: Any) -> str:
    if get_origin(option) is Literal:
        return "one of " + ", ".join(map(show, get_args(option)))
    kinds = [kind for kind in get_args(option) if kind is not Ellipsis]
    if _plain(option) is not list or not kinds:
        return KIND_NAMES[_plain(option)]
    fixed = get_origin(option) is tuple and Ellipsis not in get_args(option)
    return f"a list{f' of {len(kinds)}' if fixed else ''}, each {' or '.join(dict.fromkeys(map(kind_words, kinds)))}"


# Words


def show(value: Any) -> str:
    """Returns a value as one writes it in key=value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {show(v)}" for key, v in value.items()) + "}"
    return "[" + ",".join(map(show, value)) + "]" if isinstance(value, list) else str(value)


def one_line(error: Exception) -> str:
    """Returns the error's message, its lines joined."""
    return " ".join(str(error).split()) or type(error).__name__


def nearest(name: Any, names, prefix: str = "") -> str:
    """Returns "; nearest: NAME", or nothing where none is near."""
    close = difflib.get_close_matches(str(name), list(names), n=1)
    return f"; nearest: {prefix}{close[0]}" if close else ""


def wrong_kind(name: str, value: Any, kind: Any) -> UserError:
    """Returns the error of a value that is not of its key's type."""
    expected, given = kind_words(kind), KIND_NAMES.get(type(value), type(value).__name__)
    choices = [show(c) for option in _options(kind) if get_origin(option) is Literal for c in get_args(option)]
    is_given = "" if choices or expected.startswith(given) else f", is {given}"
    quotable = expected == "text" and isinstance(value, (bool, int, float))
    quote = f"; quote it for YAML: {name}='\"{show(value)}\"'" if quotable else ""
    return UserError(f"{name}={show(value)}: must be {expected}{is_given}{quote}{nearest(value, choices, f'{name}=')}")


def unknown_key(key: Any, schema: dict, where: str, prefix: str) -> UserError:
    """Returns the error of a key that the schema does not have."""
    hint = f"; here it is called {ELSEWHERE[key]}" if key in ELSEWHERE else nearest(key, schema, prefix)
    hint = hint or "; known: " + ", ".join(prefix + known for known in schema)
    return UserError(f"{where}: unknown key {prefix}{key}{hint}")
