"""A run's config: the recipe's DEFAULTS, then YAML files, then key=value, checked before anything is loaded.

DEFAULTS is the schema: its keys are the keys, the type of a default is the key's type; keys.py adds what a type
cannot say. A block with `_component_` is anything importable; its other keys are that callable's arguments, and null
there means "not passed".
"""

import argparse
import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pairtune.config import keys
from pairtune.config.checks import check_together, check_values, holds_component, is_component, unknown_key
from pairtune.config.components import check_components
from pairtune.config.from_torchtune import translate
from pairtune.config.rules import REQUIRED, one_line, show
from pairtune.config.secrets import check_secrets
from pairtune.config.short_names import current, path_of
from pairtune.errors import UserError
from pairtune.files import write_text

METHODS = ("full", "lora", "qlora")


def parse(method: str, defaults: dict, argv: list[str] | None = None) -> DictConfig:
    """Returns the run's config from the command line (`--config FILE ... key=value ... ~key`), checked and resolved."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], type=Path, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_intermixed_args(sys.argv[1:] if argv is None else argv)
    return load(method, defaults, args.config, args.overrides)


def load(method: str, defaults: dict, config_paths: list[Path], overrides: list[str]) -> DictConfig:
    """Returns the resolved config; later wins: defaults < each file, then its per_method block < overrides.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type, a secret, an impossible value or combination.
    """
    cfg = _checked(method, defaults, config_paths, overrides, by_source=False)
    return OmegaConf.create(_escaped(_spelled_out(keys.with_published(cfg), defaults)))


def check(method: str, defaults: dict, config_paths: list[Path], overrides: list[str]) -> dict:
    """Returns the resolved config, checked as `load` does as far as that goes without importing a component.

    Raises:
        UserError: As load.
    """
    return _checked(method, defaults, config_paths, overrides, by_source=True)


def _checked(method: str, defaults: dict, config_paths: list[Path], overrides: list[str], *, by_source: bool) -> dict:
    given = {override.partition("=")[0] for override in overrides}
    layers = [layer for path in config_paths for layer in _read_layers(path, defaults, given)]
    for override in overrides:  # first of all: other messages show what was written
        key, _, written = override.partition("=")
        check_secrets({key: written}, "command line")
    merged = _stack(method, layers, overrides, defaults)
    check_values(_without_references(merged), defaults)  # a wrong value is told at its own key, not where it is used
    _check_required(merged)
    cfg = _resolve(merged)
    check_values(cfg, defaults)
    check_components(cfg, by_source=by_source)
    check_together(cfg)
    _check_other_methods(method, layers, defaults)
    return cfg


def save(cfg: DictConfig, path: Path, recipe: str) -> str:
    """Writes the resolved config, returns it; the command on its first line repeats the run. `recipe` is a path.

    Raises:
        UserError: The folder cannot be made or written.
    """
    relative = os.path.relpath(recipe)
    recipe = Path(recipe).stem if relative.startswith("..") else relative
    command = shlex.join(["tune", "run", recipe, "--config", str(path)])
    text = f"# {command}\n{OmegaConf.to_yaml(cfg)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"output_dir={path.parent}: cannot be written: {error.strerror}; name another folder") from None
    return text


# Layers


@dataclass(frozen=True)
class _Layer:
    values: dict
    where: str
    method: str | None = None  # None: every method's


def _read_layers(path: Path, schema: dict, given: set[str]) -> list[_Layer]:
    """The file's keys, then its per_method blocks, without the keys that only other recipes have."""
    content = _read(path)
    check_secrets(content, str(path))
    content = translate(content, str(path), given=given, distributed="data_parallel_replicate_dim" in schema)
    blocks = content.pop("per_method", None) or {}
    if "adapter" not in schema:
        for block in (content, blocks.get("full") if isinstance(blocks, dict) else None):
            _check_no_adapter(block, str(path))
    if not isinstance(blocks, dict):
        raise UserError(f"{path}: per_method={show(blocks)}: must hold a block of keys a method: {', '.join(METHODS)}")
    layers = [_Layer(_known_here(content, schema), str(path))]
    for method, block in blocks.items():
        if method not in METHODS:
            raise UserError(f"{path}: per_method.{method}: must be one of {', '.join(METHODS)}")
        if block and not isinstance(block, dict):
            raise UserError(f"{path}: per_method.{method}: must be a block of keys, not {show(block)}")
        layers.append(_Layer(_known_here(block or {}, schema), f"{path}, per_method.{method}", method))
    return layers


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values, holds {show(content)}")
    return content


def _check_no_adapter(block: Any, where: str) -> None:
    """What a run starts from is not passed over as other recipes' keys are."""
    if isinstance(block, dict) and block.get("adapter") is not None:
        raise UserError(
            f"{where}: adapter={show(block['adapter'])}: full_ recipes start from whole weights: merge it first (the "
            "export/ of the run that made it is merged) and set checkpointer.checkpoint_dir to that, or put adapter "
            "into per_method.lora and per_method.qlora"
        )


def _known_here(values: dict, schema: dict) -> dict:
    return {key: value for key, value in values.items() if key in schema or not keys.recipes_with(key)}


def _stack(method: str, layers: list[_Layer], overrides: list[str], schema: dict) -> dict:
    """Returns DEFAULTS under the method's layers under the overrides."""
    given = [layer for layer in layers if layer.method in (None, method)]
    merged = _copy(schema)
    for layer in given:
        merged = _merge(merged, layer.values, schema, layer.where)
    for i, override in enumerate(overrides):
        layer = _override(override, overrides[:i], merged, schema)
        check_secrets(layer.values, "command line")
        merged = _merge(merged, layer.values, schema, layer.where)
        given.append(layer)
    return _without_default_warmup(merged, given)


def _merge(base: dict, layer: dict, schema: dict, where: str, prefix: str = "") -> dict:
    """Returns `base` with `layer` on top."""
    merged = dict(base)
    for key, value in layer.items():
        if key not in schema:
            raise unknown_key(key, schema, where, prefix)
        name, below, default = f"{prefix}{key}", merged.get(key), schema[key]
        if holds_component(name, default):
            merged[key] = _merge_component(below, _by_short_name(name, value))
        elif isinstance(default, dict) and "name" in default and isinstance(value, str):
            merged[key] = {**(below if isinstance(below, dict) else default), "name": value}  # reference=start
        elif not (isinstance(default, dict) and isinstance(value, dict)):
            merged[key] = value
        elif default:
            merged[key] = _merge(below if isinstance(below, dict) else default, value, default, where, f"{name}.")
        else:  # a block with keys of the user's own
            merged[key] = {**below, **value} if isinstance(below, dict) else value
    return merged


def _by_short_name(key: str, value: Any) -> Any:
    """A loss of ours goes by its name: loss=ipo, loss.name=ipo, loss=[{name: sigmoid}, {name: sft, weight: 0.2}]."""
    if key != "loss":
        return value
    if isinstance(value, list):
        value = {"name": "mixture", "terms": value}
    short = isinstance(value, str) and value not in ("", REQUIRED) and "." not in value
    block = {"name": value} if short else value
    if not isinstance(block, dict) or "name" not in block or "_component_" in block:
        return value
    name, options = block["name"], {k: v for k, v in block.items() if k != "name"}
    return {"_component_": path_of(name), **options}


def _merge_component(below: Any, value: Any) -> Any:
    """Arguments go on top of those below; another `_component_` starts anew."""
    if isinstance(value, str) and value != REQUIRED:
        value = {"_component_": value}  # loss=torchtune.rlhf.loss.RSOLoss
    if is_component(value) and isinstance(value["_component_"], str):
        value = {**value, "_component_": current(value["_component_"])}
    if not (isinstance(below, dict) and isinstance(value, dict)):
        return value
    is_same = value.get("_component_", below.get("_component_")) == below.get("_component_")
    return {**below, **value} if is_same else value


def _without_default_warmup(merged: dict, given: list[_Layer]) -> dict:
    """Where a layer gives num_warmup_steps or warmup_ratio, the other is dropped if it is the recipe's default."""
    schedule = merged.get("lr_scheduler")
    blocks = [layer.values.get("lr_scheduler") for layer in given]
    named = {argument for block in blocks if isinstance(block, dict) for argument in block}
    pair = {"num_warmup_steps", "warmup_ratio"}
    if is_component(schedule) and any(schedule.get(argument) is not None for argument in pair & named):
        return {**merged, "lr_scheduler": {k: v for k, v in schedule.items() if k not in pair - named}}
    return merged


# The command line


def _override(override: str, earlier: list[str], merged: dict, schema: dict) -> _Layer:
    """The layer that is one `key=value` or `~key`."""
    where = f"command line, {override}"
    if override.startswith("~"):
        key, value = override[1:], None
        _check_removable(key, merged, schema, where)
    else:
        key, equals, written = override.partition("=")
        if not equals or not key:
            raise UserError(f"{where}: must be key=value or ~key")
        value = _parse_value(key, written, where)
    parts = key.split(".")
    others = keys.recipes_with(parts[0])
    if others and parts[0] not in schema:
        raise UserError(f"{where}: this recipe has no {parts[0]}; it is a key of {others}")
    arguments = [text for text in earlier if text.lstrip("~").startswith(f"{key}.")]
    if arguments and holds_component(key, schema.get(key)) and (is_component(value) or not isinstance(value, dict)):
        raise UserError(f"{where}: must stand before {arguments[0]}, an argument of what it names")
    for part in reversed(parts):
        value = {part: value}
    return _Layer(value, where)


def _parse_value(key: str, written: str, where: str) -> Any:
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]), resolve=False)["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        file = ", or name a .jinja file" if key.endswith("chat_template") else ""
        raise UserError(
            f"{where}: the value is not valid YAML: {one_line(error)}; text with signs like {{ [ % : needs quotes for "
            f"YAML within the shell's, {key}='\"...\"'{file}"
        ) from None
    return None if value == "None" else value


def _check_removable(key: str, merged: dict, schema: dict, where: str) -> None:
    """`~key`: an optional key becomes null; so does an argument of a component, which is then not passed."""
    *parents, last = key.split(".")
    node, default = merged, schema
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
        default = default.get(part) if isinstance(default, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise UserError(f"{where}: there is no such key to remove")
    if is_component(node) and last != "_component_":
        return
    default = default.get(last, REQUIRED) if isinstance(default, dict) else REQUIRED
    if not keys.may_be_null(key, default):
        raise UserError(f"{where}: {key} cannot be removed; give it another value")


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


def _check_other_methods(method: str, layers: list[_Layer], defaults: dict) -> None:
    """The file is good for the other methods too, as far as it can be told here: no mistake waits for its recipe."""
    for other in dict.fromkeys(layer.method for layer in layers if layer.method not in (None, method)):
        try:
            check_values(_without_references(_stack(other, layers, [], defaults)), defaults)
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


def _copy(node: Any) -> Any:
    """A deep copy of nested dicts and lists."""
    if isinstance(node, dict):
        return {key: _copy(value) for key, value in node.items()}
    return [_copy(value) for value in node] if isinstance(node, list) else node
