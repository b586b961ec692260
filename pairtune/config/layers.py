"""A run's config: the recipe's DEFAULTS, then YAML files, then key=value, checked before anything is loaded.

DEFAULTS is the schema: its keys are the keys, the type of a default is the key's type; keys.py adds what a type
cannot say. A block with `_component_` is anything importable; its other keys are that callable's arguments, and null
there means "not passed".
"""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pairtune.config import auto, keys
from pairtune.config.answers import check_dashes
from pairtune.config.checks import check_together, check_values, is_component, unknown_keys
from pairtune.config.components import check_components, without_defaults_of_another
from pairtune.config.from_torchtune import translate
from pairtune.config.giving_way import give_way, said_twice
from pairtune.config.merging import REMOVED, Layer, canonical, merge, over, without_default_warmup
from pairtune.config.reading import read_file, read_value
from pairtune.config.rules import REQUIRED, show
from pairtune.config.secrets import check_secrets
from pairtune.config.uses import check_installed
from pairtune.errors import UserError
from pairtune.process import console

METHODS = ("full", "lora", "qlora")
COMMAND_LINE = "command line"


def parse(method: str, defaults: dict, argv: list[str] | None = None) -> DictConfig:
    """Returns the run's config from the command line (`--config FILE ... key=value ... ~key`), checked and resolved."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    words = sys.argv[1:] if argv is None else argv
    check_dashes(words, parser._option_string_actions)
    args = parser.parse_intermixed_args(words)
    cfg, told = _loaded(method, defaults, args.config, args.overrides)
    check_installed(cfg)
    console.begin()
    for note in told if os.environ.get("RANK", "0") == "0" else []:  # one process speaks
        print(f"config: {note}")
    return cfg


def load(method: str, defaults: dict, config_paths: list[Path], overrides: list[str]) -> DictConfig:
    """Returns the resolved config; later wins: defaults < each file, then its per_method block < overrides.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type, a secret, an impossible value or combination.
    """
    return _loaded(method, defaults, config_paths, overrides)[0]


def notes(method: str, defaults: dict, config_paths: list[Path], overrides: list[str]) -> list[str]:
    """Returns what `parse` prints of a config: what of it gave way to what stands above, a sentence each.

    Raises:
        UserError: As load.
    """
    return _loaded(method, defaults, config_paths, overrides)[1]


def _loaded(
    method: str, defaults: dict, config_paths: list[Path], overrides: list[str]
) -> tuple[DictConfig, list[str]]:
    cfg, told = _checked(method, defaults, config_paths, overrides, by_source=False)
    return OmegaConf.create(_escaped(_spelled_out(keys.with_published(cfg), defaults))), told


def check(method: str, defaults: dict, config_paths: list[Path], overrides: list[str]) -> dict:
    """Returns the resolved config, checked as `load` does as far as that goes without importing a component.

    Raises:
        UserError: As load.
    """
    return _checked(method, defaults, config_paths, overrides, by_source=True)[0]


def _checked(
    method: str, defaults: dict, config_paths: list[Path], overrides: list[str], *, by_source: bool
) -> tuple[dict, list[str]]:
    given = {override.partition("=")[0] for override in overrides}
    layers = [layer for path in config_paths for layer in _read_layers(path, defaults, given)]
    for override in overrides:  # first of all: other messages show what was written
        key, _, written = override.partition("=")
        check_secrets({key: written}, COMMAND_LINE)
    merged, given = _stack(method, layers, overrides, defaults)
    check_values(_without_references(merged), defaults)  # a wrong value is told at its own key, not where it is used
    _check_required(merged)
    cfg, found = auto.settle(_resolve(merged))
    cfg, left_out = without_defaults_of_another(cfg, defaults, by_source=by_source)
    cfg, gave_way = give_way(cfg, defaults, given)
    check_values(cfg, defaults)
    check_components(cfg, by_source=by_source)
    check_together(cfg)
    _check_other_methods(method, layers, defaults)
    return cfg, [*said_twice(given), *found, *left_out, *gave_way]


# Layers


def _read_layers(path: Path, schema: dict, given: set[str]) -> list[Layer]:
    """The file's keys, then its per_method blocks, without the keys that only other recipes have."""
    content = read_file(path)
    check_secrets(content, str(path))
    content = translate(content, str(path), given=given, distributed="data_parallel_replicate_dim" in schema)
    blocks = content.pop("per_method", None) or {}
    if "adapter" not in schema:
        for block in (content, blocks.get("full") if isinstance(blocks, dict) else None):
            _check_no_adapter(block, str(path))
    if not isinstance(blocks, dict):
        raise UserError(f"{path}: per_method={show(blocks)}: must hold a block of keys a method: {', '.join(METHODS)}")
    layers = [_layer(content, schema, str(path))]
    for method, block in blocks.items():
        if method not in METHODS:
            raise UserError(f"{path}: per_method.{method}: must be one of {', '.join(METHODS)}")
        if block and not isinstance(block, dict):
            raise UserError(f"{path}: per_method.{method}: must be a block of keys, not {show(block)}")
        layers.append(_layer(block or {}, schema, f"{path}, per_method.{method}", method))
    return layers


def _layer(values: dict, schema: dict, where: str, method: str | None = None) -> Layer:
    """A file's block, without the keys that only other recipes have."""
    known = {key: value for key, value in values.items() if key in schema or not keys.recipes_with(key)}
    return Layer(canonical(known, schema, where), where, method, where)


def _check_no_adapter(block: Any, where: str) -> None:
    """What a run starts from is not passed over as other recipes' keys are."""
    if isinstance(block, dict) and block.get("adapter") is not None:
        raise UserError(
            f"{where}: adapter={show(block['adapter'])}: full_ recipes start from whole weights: merge it first (the "
            "export/ of the run that made it is merged) and set checkpointer.checkpoint_dir to that, or put adapter "
            "into per_method.lora and per_method.qlora"
        )


def _stack(method: str, layers: list[Layer], overrides: list[str], schema: dict) -> tuple[dict, list[Layer]]:
    """Returns DEFAULTS under the method's layers under the overrides, and these layers."""
    given = [layer for layer in layers if layer.method in (None, method)]
    tree: dict = {}
    for layer in given:
        tree = merge(tree, layer.values, schema)
    _check_strangers(overrides, schema)
    for override in overrides:
        layer = _override(override, over(schema, tree), schema)
        check_secrets(layer.values, COMMAND_LINE)
        tree = merge(tree, layer.values, schema)
        given.append(layer)
    return without_default_warmup(over(schema, tree), tree), given


# The command line


def _check_strangers(overrides: list[str], schema: dict) -> None:
    """Answers several keys that are none at once: a command line of another system has many."""
    given = (override.partition("=") for override in overrides if "=" in override and override[0] != "~")
    known = {key: written for key, _, written in given if key}
    strangers = [
        key for key in known if (first := key.partition(".")[0]) not in schema and not keys.recipes_with(first)
    ]
    if len(strangers) > 1:
        values = {key: read_value(key, known[key], f"{COMMAND_LINE}, {key}={known[key]}") for key in strangers}
        raise unknown_keys(values, schema, COMMAND_LINE, "")


def _override(override: str, merged: dict, schema: dict) -> Layer:
    """The layer that is one `key=value` or `~key`."""
    where = f"{COMMAND_LINE}, {override}"
    if override.startswith("~"):
        key, value = override[1:], None
        if _is_entry(key, merged, schema, where):
            value = REMOVED
    else:
        key, equals, written = override.partition("=")
        if not equals or not key:
            raise UserError(f"{where}: must be key=value or ~key")
        value = read_value(key, written, where)
    parts = key.split(".")
    others = keys.recipes_with(parts[0])
    if others and parts[0] not in schema:
        raise UserError(f"{where}: this recipe has no {parts[0]}; it is a key of {others}")
    for part in reversed(parts):
        value = {part: value}
    return Layer(canonical(value, schema, where), where, place=COMMAND_LINE)


def _is_entry(key: str, merged: dict, schema: dict, where: str) -> bool:
    """Whether `~key` takes an entry out of a mapping; else the key becomes null, and an argument is not passed.

    Raises:
        UserError: There is no such key, or it has to have a value.
    """
    *parents, last = key.split(".")
    node, default, is_own = merged, schema, False
    for part in parents:
        is_own = is_own or is_component(node)  # below an argument
        node = node.get(part) if isinstance(node, dict) else None
        default = default.get(part) if isinstance(default, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise UserError(f"{where}: there is no such key to remove")
    if is_component(node) and last != "_component_":
        return False
    if is_own or (parents and default == {}):
        return True
    default = default.get(last, REQUIRED) if isinstance(default, dict) else REQUIRED
    if not keys.may_be_null(key, default):
        raise UserError(f"{where}: {key} cannot be removed; give it another value")
    return False


# The whole


def _check_required(cfg: dict) -> None:
    first, *more = _required(cfg) or [None]
    if first:
        nor = f"; nor have {', '.join(more)}" if more else ""
        raise UserError(f"{first}: has no default: set it in the YAML or as {first}=...{nor}")


def _required(cfg: dict, prefix: str = "") -> list[str]:
    """The keys that have no value yet."""
    found = []
    for key, value in cfg.items():
        if isinstance(value, dict):
            found += _required(value, f"{prefix}{key}.")
        elif value == REQUIRED:
            found.append(f"{prefix}{key}")
    return found


def _check_other_methods(method: str, layers: list[Layer], defaults: dict) -> None:
    """The file is good for the other methods too, as far as it can be told here: no mistake waits for its recipe."""
    for other in dict.fromkeys(layer.method for layer in layers if layer.method not in (None, method)):
        try:
            check_values(_without_references(_stack(other, layers, [], defaults)[0]), defaults)
        except UserError as error:
            raise UserError(f"with per_method.{other}: {error}") from None


def _resolve(merged: dict) -> dict:
    """Fills in ${...} references."""
    try:
        return OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None


def _without_references(node: dict) -> dict:
    """Leaves out what has no value yet: ${...} and what a config must still give."""
    return {
        key: _without_references(value) if isinstance(value, dict) else value
        for key, value in node.items()
        if key == "_component_" or not (value == REQUIRED or "${" in str(value) and not isinstance(value, dict))
    }


def _spelled_out(cfg: dict, defaults: dict) -> dict:
    """Keeps null only for an argument that DEFAULTS passes and this run does not.

    The saved file then is the run when it is read again, on top of DEFAULTS.
    """
    spelled = dict(cfg)
    for key, block in cfg.items():
        default = defaults.get(key)
        if is_component(block):
            default = default if is_component(default) else {}
            by_default = default if default.get("_component_") == block["_component_"] else {}
            unpassed = {argument: None for argument in by_default if block.get(argument) is None}
            spelled[key] = {k: v for k, v in block.items() if v is not None} | unpassed
        elif isinstance(block, dict) and isinstance(default, dict):
            spelled[key] = _spelled_out(block, default)
    return spelled


def _escaped(node: Any) -> Any:
    r"""A deep copy in which ${ is text: it was, as \${, before references were resolved."""
    if isinstance(node, dict):
        return {key: _escaped(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_escaped(value) for value in node]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node
