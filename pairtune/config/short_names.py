"""Short forms of values, written out: dataset=FILE, lora.modules=all-linear, metric_logger=wandb, loss=ipo.

Names of losses are read in the source of their classes, which imports neither these nor torch.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any

from pairtune.config.rules import REQUIRED, show
from pairtune.errors import UserError, nearest

HOME = "pairtune.losses"
EARLIER = ("pairtune.preference_losses", "pairtune.losses.modules")  # modules that configs of earlier versions name
SOURCE = Path(__file__).parents[1] / "losses" / "modules.py"

# The key of a block that a single value sets. One that holds a component takes a path so: it has a slash, or begins
# with . or ~, as an import path never does.
MAIN = {
    "dataset": "source",
    "eval_dataset": "source",
    "reference": "name",
    "tokenizer": "path",
    "checkpointer": "checkpoint_dir",
}
_LOGGING = "torchtune.training.metric_logging"
LOGGERS = {  # and the arguments that they have where a config gives none
    "wandb": (f"{_LOGGING}.WandBLogger", {"project": "pairtune", "log_dir": "${output_dir}"}),
    "tensorboard": (f"{_LOGGING}.TensorBoardLogger", {"log_dir": "${output_dir}/tensorboard"}),
    "comet": (f"{_LOGGING}.CometLogger", {"project": "pairtune"}),
    "mlflow": (f"{_LOGGING}.MLFlowLogger", {"experiment_name": "pairtune"}),
    "disk": (f"{_LOGGING}.DiskLogger", {"log_dir": "${output_dir}/log"}),
    "stdout": (f"{_LOGGING}.StdoutLogger", {}),
}


def spelled_out(name: str, value: Any, default: Any, *, holds_component: bool) -> Any:
    """Returns the value of a key as its block, list or component, if it is a short form of one.

    A logger's name stays: its arguments are known when all layers are.
    """
    if holds_component:
        return _component(name, value)
    main = MAIN.get(name)
    if name == "eval_dataset" and isinstance(value, dict) and _names_sets(value, default):
        return {main: value}
    if isinstance(default, dict) and main in default and not isinstance(value, dict):
        is_off = value is None and default[main] is None  # eval_dataset=null
        return {main: value} if value is not None or is_off else value
    if name == "lora.modules" and isinstance(value, str):
        return [module.strip() for module in value.split(",")]
    return [value] if name == "samples.prompts" and isinstance(value, str) else value


def _names_sets(value: dict, keys: dict) -> bool:
    """eval_dataset={math: FILE, code: FILE}: no name is a key, or nearly one."""
    return bool(value) and not any(
        name in keys or nearest(name, keys) or not isinstance(one, str | list | dict) for name, one in value.items()
    )


def _component(name: str, value: Any) -> Any:
    if name == "loss":
        value = _loss(value)
    if isinstance(value, str) and value != REQUIRED:
        if name in MAIN and ("/" in value or value.startswith((".", "~"))):
            return {MAIN[name]: value}
        if name == "metric_logger" and value.lower() in ("none", *LOGGERS):
            return None if value.lower() == "none" else {"_component_": value.lower()}
        value = {"_component_": value}
    path = value.get("_component_") if isinstance(value, dict) else None
    return {**value, "_component_": current(path)} if isinstance(path, str) else value


def _loss(value: Any) -> Any:
    """loss=ipo, loss.name=ipo, loss=[sigmoid, {name: sft, weight: 0.2}]."""
    if isinstance(value, list):
        value = {"name": "mixture", "terms": [{"name": v} if isinstance(v, str) else v for v in value]}
    short = isinstance(value, str) and value not in ("", REQUIRED) and "." not in value
    block = {"name": value} if short else value
    if not isinstance(block, dict) or "name" not in block or "_component_" in block:
        return value
    return {"_component_": path_of(block["name"]), **{k: v for k, v in block.items() if k != "name"}}


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
