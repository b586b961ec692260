"""What a value may be: conditions, types and annotations, and the words of a mistake.

One line with key, value, rule and way out. Which key has which condition is in keys.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pairtune.errors import UserError, close_to, nearest

REQUIRED = "???"  # OmegaConf's mark for a value that a config must give
AUTO = "auto"  # a value that the model's folder tells, see auto.py


@dataclass(frozen=True)
class Rule:
    """What a key's value must be, beyond its default's type: `kind` where the default is None, and a condition."""

    holds: Callable[[Any], bool]
    says: str  # completes "must be ..."
    nearest: Callable[[Any], Any] | None = None  # a wrong value -> the closest right one; else the default is shown
    kind: Any = None  # the type or annotation when the default, being None, does not tell


def of_kind(kind: type) -> Rule:
    return Rule(lambda v: True, "", kind=kind)


def some_text() -> Rule:
    return Rule(lambda v: v.strip(), "text, and not empty", None, str)


def one_of(*choices: str) -> Rule:
    return Rule(lambda v: v in choices, "one of " + ", ".join(choices), lambda v: close_to(v, choices), str)


def switch_or(*choices: str) -> Rule:
    """true, false, or one of these words; the last one is what others are answered with."""
    says = ", ".join(("true", "false", *choices[:-1])) + f" or {choices[-1]}"
    meant = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}

    def nearest_to(value: Any) -> Any:
        text = str(value).lower()
        return meant.get(text, close_to(text, choices) or choices[-1])

    return Rule(lambda v: isinstance(v, bool) or v in choices, says, nearest_to, object)


def at_least(bound: int | float, says: str = "") -> Rule:
    return Rule(lambda v: v >= bound, says or f"at least {bound}", lambda v: bound, type(bound))


def above(bound: int) -> Rule:
    return Rule(lambda v: v > bound, f"greater than {bound}", None, float)


def between(low: float, high: float, kind: type = float) -> Rule:
    """low <= value < high."""
    return Rule(lambda v: low <= v < high, f"at least {low} and below {high}", None, kind)


def from_to(low: int, high: int) -> Rule:
    return Rule(lambda v: low <= v <= high, f"at least {low} and at most {high:,}", None, int)


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


def set_and_metric(name: str) -> tuple[str | None, str]:
    """Returns what keep_best names: of held-out pairs that have a name, SET/METRIC, that name; and the metric."""
    found = next((metric for metric in HIGHER_IS_BETTER if name.endswith(f"/{metric}")), None)
    return (name.removesuffix(f"/{found}"), found) if found else (None, name)


KIND_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "a block of keys",
}


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


def wrong_kind(name: str, value: Any, kind: Any) -> UserError:
    """Returns the error of a value that is not of its key's type."""
    expected, given = kind_words(kind), KIND_NAMES.get(type(value), type(value).__name__)
    choices = [show(c) for option in _options(kind) if get_origin(option) is Literal for c in get_args(option)]
    is_given = "" if choices or expected.startswith(given) else f", is {given}"
    quotable = expected == "text" and isinstance(value, (bool, int, float))
    quote = f"; quote it for YAML: {name}='\"{show(value)}\"'" if quotable else ""
    return UserError(
        f"{name}={show(value)}: must be {expected}{is_given}{quote}{nearest(value, choices, prefix=f'{name}=')}"
    )
