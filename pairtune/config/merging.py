"""How layers of a config come together: what files and the command line give, each over the last, then over DEFAULTS.

Mappings are merged key by key, other values replaced; {} and null at a mapping take back what it was given. Of a
component the last that was named counts, with every argument that was given, wherever it stood; the arguments of the
default one leave with it.
"""

from dataclasses import dataclass
from typing import Any

from pairtune.config.checks import holds_component, is_component, unknown_keys
from pairtune.config.rules import AUTO, REQUIRED
from pairtune.config.short_names import LOGGERS, spelled_out

REMOVED = object()  # ~key at an entry of a mapping of the user's own


@dataclass(frozen=True)
class Layer:
    """Keys that were given in one place: a file, a per_method block of it, one word of the command line."""

    values: dict
    where: str
    method: str | None = None  # None: every method's
    place: str = ""  # where, without the word


def canonical(values: dict, schema: dict, where: str, prefix: str = "") -> dict:
    """Returns what a layer gives, with short forms written out: dataset=FILE, loss=ipo, lora.modules=all-linear.

    Raises:
        UserError: The schema does not have a key, or a block is given one value that it has no key for.
    """
    if unknown := [key for key in values if key not in schema]:
        raise unknown_keys({key: values[key] for key in unknown}, schema, where, prefix)
    written = {}
    for key, value in values.items():
        name, default = f"{prefix}{key}", schema[key]
        value = spelled_out(name, value, default, holds_component=holds_component(name, default))
        if _is_block(name, default) and isinstance(value, dict):
            value = canonical(value, default, where, f"{name}.")
        written[key] = value
    return written


def merge(given: dict, layer: dict, schema: dict, prefix: str = "") -> dict:
    """Returns what earlier layers give with one more on top; both are canonical."""
    merged = dict(given)
    for key, value in layer.items():
        name, default = f"{prefix}{key}", schema[key]
        below = merged.get(key)
        if not isinstance(value, dict):
            merged[key] = value
        elif holds_component(name, default):
            if key == "model" and value.get("_component_") == AUTO:
                merged[key] = _entries({}, value)  # sizes that were given to a builder are none of the folder's
            elif value:
                merged[key] = _entries({"_component_": None} if key in merged and below is None else below, value)
            else:
                merged.pop(key, None)
        elif _is_block(name, default):
            if value:
                merged[key] = merge(below if isinstance(below, dict) else {}, value, default, f"{name}.")
            else:
                merged.pop(key, None)
        else:  # a mapping with keys of the user's own
            merged[key] = _entries(below, value)
    return merged


def over(schema: dict, given: dict, prefix: str = "") -> dict:
    """Returns what is given on top of the defaults."""
    merged = {}
    for key, default in schema.items():
        name = f"{prefix}{key}"
        if key not in given or (given[key] is None and default in ({}, [])):
            merged[key] = _copy(default)
        elif holds_component(name, default):
            merged[key] = _over_component(name, default, given[key])
        elif _is_block(name, default) and isinstance(given[key], dict):
            merged[key] = over(default, given[key], f"{name}.")
        else:
            merged[key] = _copy(given[key])
    return merged


def without_default_warmup(merged: dict, given: dict) -> dict:
    """Where a layer gives num_warmup_steps or warmup_ratio, the other is dropped if it is the recipe's default."""
    schedule, named = merged.get("lr_scheduler"), given.get("lr_scheduler")
    pair = {"num_warmup_steps", "warmup_ratio"}
    own = pair & named.keys() if isinstance(named, dict) else set()
    if is_component(schedule) and any(schedule.get(argument) is not None for argument in own):
        return {**merged, "lr_scheduler": {k: v for k, v in schedule.items() if k not in pair - own}}
    return merged


def _is_block(name: str, default: Any) -> bool:
    """Whether a default is a block of keys that are the recipe's."""
    return isinstance(default, dict) and default != {} and not holds_component(name, default)


def _entries(below: Any, value: dict) -> dict:
    """Entries go on top of those below; {} takes all of them back."""
    if not value:
        return {}
    merged = dict(below) if isinstance(below, dict) else {}
    for key, entry in value.items():
        if entry is REMOVED:
            merged.pop(key, None)
        else:
            merged[key] = _entries(merged.get(key), entry) if isinstance(entry, dict) else entry
    return merged


def _over_component(name: str, default: Any, given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    below = default if is_component(default) else {}
    path = given.get("_component_", below.get("_component_"))
    if path is None:
        return _copy(given)
    if name == "metric_logger" and path in LOGGERS:
        path, below = LOGGERS[path]
    elif path not in (below.get("_component_"), REQUIRED):
        below = {}
    return _copy({"_component_": path, **below, **given, **{"_component_": path}})


def _copy(node: Any) -> Any:
    """A deep copy of nested dicts and lists."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node
