"""Short names of losses. They are read in the source of their classes, which imports neither these nor torch."""

import ast
from functools import cache
from pathlib import Path
from typing import Any

from pairtune.config.rules import show
from pairtune.errors import UserError, nearest

HOME = "pairtune.losses"
EARLIER = ("pairtune.preference_losses", "pairtune.losses.modules")  # modules that configs of earlier versions name
SOURCE = Path(__file__).parents[1] / "losses" / "modules.py"


def path_of(name: Any, key: str = "loss") -> str:
    """Returns the import path of the loss of this short name, which a config has at `key`.

    Raises:
        UserError: No such loss.
    """
    names, aliases = _classes()
    made = names.get(aliases.get(str(name), str(name)))
    if made is None:
        raise UserError(
            f"{key}.name={show(name)}: no such loss{nearest(name, names)}; there are {', '.join(names)}, or any "
            "module by its import path, such as loss=torchtune.rlhf.loss.DPOLoss"
        )
    return f"{HOME}.{made}"


def current(path: str) -> str:
    """Returns the import path that this version gives a loss of an earlier one; any other path as it is."""
    module, _, name = path.rpartition(".")
    names, _ = _classes() if module in EARLIER else ({}, {})
    return f"{HOME}.{names.get(name, name)}" if name in (*names, *names.values()) else path


@cache
def _classes() -> tuple[dict[str, str], dict[str, str]]:
    """Class by name, and name by alias: of classes with `name = "..."`, and `aliases = ("...", ...)`."""
    names, aliases = {}, {}
    for node in ast.parse(SOURCE.read_text()).body:
        if isinstance(node, ast.ClassDef):
            said = {
                line.targets[0].id: ast.literal_eval(line.value)
                for line in node.body
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) in ("name", "aliases")
            }
            if "name" in said:
                names[said["name"]] = node.name
                aliases |= dict.fromkeys(said.get("aliases", ()), said["name"])
    return names, aliases
