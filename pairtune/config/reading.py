"""YAML as a config holds it, read from a file or behind key=: no key stands twice, and mistakes are one line."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from pairtune.config.rules import one_line, show
from pairtune.errors import UserError

DUPLICATE = "found duplicate key"  # so OmegaConf's loader says it, of the second place only


def read_file(path: Path) -> dict:
    """Returns the keys and values of a file, references unresolved.

    Raises:
        UserError: It is not there, or not YAML, or holds something else, or a key stands twice.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        if DUPLICATE in str(error) and (twice := _first_twice(yaml.compose(path.read_text()))):
            key, first, second = twice
            lines = f"in line {first}" if first == second else f"in lines {first} and {second}"
            raise UserError(f"{path}: {key} stands twice, {lines}; keep one of the two") from None
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold keys and values, holds {show(content)}")
    return content


def read_value(key: str, written: str, where: str) -> Any:
    """Returns what is written behind key=.

    Raises:
        UserError: It is not YAML, or a key stands twice in it. `where` names the word.
    """
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={written}"]), resolve=False)["value"]
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        if DUPLICATE in str(error) and (twice := _first_twice(yaml.compose(written))):
            raise UserError(f"{where}: {key}.{twice[0]} stands twice; keep one of the two") from None
        file = ", or name a .jinja file" if key.endswith("chat_template") else ""
        raise UserError(
            f"{where}: the value is not valid YAML: {one_line(error)}; text with signs like {{ [ % : needs quotes for "
            f"YAML within the shell's, {key}='\"...\"'{file}"
        ) from None
    return None if value == "None" else value


def _first_twice(node: yaml.Node | None, prefix: str = "") -> tuple[str, int, int] | None:
    """The first key that stands twice, with its lines from 1."""
    lines: dict[str, int] = {}
    entries = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
    for i, entry in enumerate(entries):
        if isinstance(node, yaml.SequenceNode):
            name, inner = f"{prefix.removesuffix('.')}[{i}]", entry
        else:
            key, inner = entry
            name, line = f"{prefix}{key.value}", key.start_mark.line + 1
            if name in lines:
                return name, lines[name], line
            lines[name] = line
        if found := _first_twice(inner, f"{name}."):
            return found
    return None
