"""A run's config.yaml: resolved, with the command that repeats the run, and above each value that is not the
recipe's default, what that is."""

import os
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pairtune.config.checks import is_component
from pairtune.config.rules import REQUIRED, show
from pairtune.errors import UserError
from pairtune.files import write_text

MARK = "# default: "
NONE = "none"  # what is shown where there is no default
OTHERS = object()


def save(cfg: DictConfig, path: Path, recipe: str, defaults: Mapping | None = None) -> str:
    """Writes the resolved config, returns it; the command on its first line repeats the run.

    Args:
        recipe: Its path.
        defaults: The recipe's. What is not as they have it is marked with what they have.

    Raises:
        UserError: The folder cannot be made or written.
    """
    relative = os.path.relpath(recipe)
    recipe = Path(recipe).stem if relative.startswith("..") else relative
    command = shlex.join(["tune", "run", recipe, "--config", str(path)])
    text = f"# {command}\n{OmegaConf.to_yaml(cfg)}"
    text = marked(text, defaults) if defaults else text
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise UserError(f"output_dir={path.parent}: cannot be written: {error.strerror}; name another folder") from None
    return text


def marked(text: str, defaults: Mapping) -> str:
    """Returns a config's YAML with the default above each value that is another one, in a line of its own."""
    lines, cfg = text.splitlines(), yaml.safe_load(text)
    for key, value, line in _leaves(yaml.compose(text)):
        default = _default(key, defaults, cfg)
        if default is not OTHERS and default != value:
            told = NONE if default in (REQUIRED, NONE) else show(default)
            indent = lines[line][: len(lines[line]) - len(lines[line].lstrip())]
            lines[line] = f"{indent}{MARK}{textwrap.shorten(told, 60, placeholder=' ...')}\n{lines[line]}"
    return "\n".join(lines) + "\n"


def changes(text: str) -> list[tuple[str, str, str]]:
    """Returns key, value and default of what `marked` has marked, as one writes them in key=value."""
    lines = text.splitlines()
    found = ((key, value, lines[line - 1].strip()) for key, value, line in _leaves(yaml.compose(text)))
    return [(".".join(k), show(value), above.removeprefix(MARK)) for k, value, above in found if above.startswith(MARK)]


def _leaves(node: yaml.Node | None, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any, int]]:
    """Yields key, value, and the line where the key is, of what is no block of keys."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else []:
        name = (*above, str(key.value))
        if isinstance(value, yaml.MappingNode) and value.value:
            yield from _leaves(value, name)
        else:
            yield name, _value(value), key.start_mark.line


def _value(node: yaml.Node) -> Any:
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _default(key: tuple[str, ...], defaults: Mapping, cfg: Mapping) -> Any:
    """Returns a key's default, NONE without one; OTHERS where it is an argument of another component than the default.

    A default that refers to another key is what this one is.
    """
    found, node = defaults, cfg
    for part in key:
        if is_component(node) and part != "_component_":
            its = found.get("_component_") if isinstance(found, Mapping) else None
            if its != node["_component_"]:
                return OTHERS
        found, node = found.get(part, NONE) if isinstance(found, Mapping) else NONE, node[part]
    if not isinstance(found, str) or "${" not in found:
        return found
    try:
        return OmegaConf.to_container(OmegaConf.create({**cfg, "default": found}), resolve=True)["default"]
    except OmegaConfBaseException:
        return OTHERS


def reference_of(of_run: Mapping) -> tuple[Path, str]:
    """Returns the folder of what a run was compared with, and "", or else of its base, and why it is not that.

    Args:
        of_run: The run's config.
    """
    compared = of_run.get("reference") or {}
    name, other = compared.get("name"), compared.get("checkpoint_dir")
    why = ""
    if name == "none":
        why = "the run had no reference"
    elif name == "sync":
        why = "the run's reference moved, and is in no folder"
    elif of_run.get("adapter") and name != "adapter_off" and other is None:
        why = "the run began from an adapter, and was compared with it"
    return Path(other or of_run["checkpointer"]["checkpoint_dir"]).expanduser(), why
