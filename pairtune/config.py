"""A run's config: the recipe's DEFAULTS, then YAML files, then key=value, checked before anything is loaded.

DEFAULTS is the schema: its keys are the keys, the type of a default is the key's type. RULES below add what a type
cannot say. A block with `_component_` is anything importable; its other keys are that callable's arguments.
"""

import argparse
import difflib
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torchtune.config import instantiate  # noqa: F401  (recipes build components with config.instantiate)
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from yaml import YAMLError

from pairtune.errors import UserError

REQUIRED = "???"  # OmegaConf's mark for a value that a config must give
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Rule:
    """What a key's value must be, beyond its default's type: `kind` where the default is None, and a condition."""

    holds: Callable[[Any], bool]
    says: str  # completes "must be ..."
    nearest: Callable[[Any], Any] | None = None  # a wrong value -> the closest right one
    kind: type | None = None  # the type when the default, being None, does not tell
    nullable: bool = False


def at_least(bound, kind=int, nullable=False):
    return Rule(lambda v: v >= bound, f"at least {bound}", lambda v: bound, kind, nullable)


def above(bound, kind=float, nullable=False):
    return Rule(lambda v: v > bound, f"greater than {bound}", None, kind, nullable)


def between(low, high):
    """low <= value < high."""
    return Rule(
        lambda v: low <= v < high, f"at least {low} and below {high}", lambda v: low if v < low else None, float
    )


def one_of(*choices):
    def nearest(value):
        return next(iter(difflib.get_close_matches(str(value), choices, n=1, cutoff=0.0)), choices[0])

    return Rule(lambda v: v in choices, "one of " + ", ".join(choices), nearest, str)


def text(nullable=True):
    return Rule(lambda v: True, "text", None, str, nullable)


LORA_MODULES = ("q_proj", "k_proj", "v_proj", "output_proj", "mlp", "output")

RULES = {
    "seed": at_least(0),
    "device": Rule(
        lambda v: v in ("auto", "cpu", "cuda") or v.startswith("cuda:") and v[5:].isdigit(),
        "auto, cpu, cuda or cuda:N",
        lambda v: "auto",
    ),
    "dtype": one_of("bf16", "fp32"),
    "attention": one_of("auto", "segments", "mask"),
    "max_length": at_least(2),
    "max_prompt_length": at_least(1, nullable=True),
    "dataset.name": text(),
    "dataset.limit": at_least(1, nullable=True),
    "dataset.val_fraction": Rule(lambda v: 0 < v < 1, "above 0 and below 1", lambda v: 0.1, float, nullable=True),
    "dataset.overlong": one_of("drop", "trim_prompt", "error"),
    "eval_dataset.source": text(),
    "eval_dataset.name": text(),
    "eval_dataset.limit": at_least(1, nullable=True),
    "eval_dataset.overlong": one_of("drop", "trim_prompt", "error"),
    "loss.beta": above(0),
    "loss.gamma": above(0),
    "loss.label_smoothing": between(0, 0.5),
    "optimizer.lr": above(0),
    "lora.rank": at_least(1),
    "lora.alpha": above(0),
    "lora.dropout": between(0, 1),
    "lora.modules": Rule(
        lambda v: len(v) > 0 and set(v) <= set(LORA_MODULES) and any(m in LORA_MODULES[:4] for m in v),
        f"a list from {', '.join(LORA_MODULES)} with at least one of the first four",
        lambda v: [m for m in v if m in LORA_MODULES] or ["q_proj", "v_proj"],
    ),
    "clip_grad_norm": above(0, nullable=True),
    "data_parallel_replicate_dim": at_least(1),
    "collective_timeout_s": above(0),
    "pairs_per_step": at_least(1),
    "batch_size": at_least(1),
    "epochs": at_least(1),
    "max_steps": at_least(1, nullable=True),
    "log_every_n_steps": at_least(1),
    "eval_every_n_steps": at_least(1, nullable=True),
    "samples.num_prompts": at_least(0),
    "samples.max_new_tokens": at_least(1),
    "samples.temperature": Rule(lambda v: v >= 0, "at least 0 (0 is greedy)", lambda v: 0.0),
}

# Keys that some of the six recipes have. One file serves all of them: in a file, the others pass over these.
SOME_RECIPES = {
    "lora": "lora_ and qlora_ recipes",
    "data_parallel_replicate_dim": "distributed recipes",
    "fsdp_cpu_offload": "distributed recipes",
    "collective_timeout_s": "distributed recipes",
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
    "bf16": "dtype",
}


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
        UserError: an unreadable file, an unknown key, a wrong type, an impossible value or combination.
    """
    merged = _plain(defaults)
    for path in config_paths:
        layer = _read(path)
        blocks = layer.pop("per_method", None) or {}
        unknown = [name for name in blocks if name not in METHODS]
        if unknown:
            raise UserError(f"{path}: per_method.{unknown[0]}: must be one of {', '.join(METHODS)}")
        for name, block in [(None, layer), *blocks.items()]:
            if block and not isinstance(block, dict):
                raise UserError(f"{path}: per_method.{name}: must be a block of keys, not {_show(block)}")
            block = {k: v for k, v in (block or {}).items() if k in defaults or k not in SOME_RECIPES}
            where = str(path) if name is None else f"{path}, per_method.{name}"
            if name in (None, method):
                merged = _merge(merged, block, defaults, where)
            else:
                _merge(_plain(defaults), block, defaults, where)  # for its errors: none waits unseen
    for override in overrides:
        merged = _override(merged, override, defaults)
    _check_required(merged)
    cfg = _resolve(merged)
    _check_values(cfg, defaults)
    _check_components(cfg)
    _check_together(cfg)
    return OmegaConf.create(cfg)


def save(cfg: DictConfig, path: Path, recipe: str) -> str:
    """Writes the resolved config, returns it; the command on its first line repeats the run. `recipe` is a path."""
    relative = os.path.relpath(recipe)
    recipe = Path(recipe).stem if relative.startswith("..") else relative
    text = f"# tune run {recipe} --config {path}\n{OmegaConf.to_yaml(cfg)}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return text


# Layers


def _plain(node: Any) -> Any:
    """A deep copy of nested dicts and lists."""
    if isinstance(node, dict):
        return {k: _plain(v) for k, v in node.items()}
    return [_plain(v) for v in node] if isinstance(node, list) else node


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"--config {path}: no such file")
    try:
        layer = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML: {_one_line(error)}") from None
    if not isinstance(layer, dict):
        raise UserError(f"{path}: must hold keys and values, holds {_show(layer)}")
    return layer


def _merge(base: dict, layer: dict, schema: dict, where: str, prefix: str = "") -> dict:
    """Returns `base` with `layer` on top. A block that names another `_component_` replaces the one below it whole."""
    merged = dict(base)
    for key, value in layer.items():
        name = f"{prefix}{key}"
        if key not in schema:
            raise _unknown_key(name, schema, where, prefix)
        below, default = merged.get(key), schema[key]
        if _is_component(below) and isinstance(value, str) and value != REQUIRED:
            value = {"_component_": value}  # loss=torchtune.rlhf.loss.RSOLoss
        if _is_component(value) or (_is_component(below) and isinstance(value, dict)):
            same = value.get("_component_", below and below["_component_"]) == (below or {}).get("_component_")
            merged[key] = {**below, **value} if same and below else dict(value)
        elif isinstance(default, dict) and default and isinstance(value, dict):
            merged[key] = _merge(below or {}, value, default, where, f"{name}.")
        else:
            merged[key] = value
    return merged


def _override(merged: dict, override: str, schema: dict) -> dict:
    """Applies one `key=value` or `~key`."""
    where = f"command line, {override}"
    if override.startswith("~"):
        return _remove(merged, override[1:], schema, where)
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"{where}: must be key=value or ~key")
    parts = key.split(".")
    if parts[0] in SOME_RECIPES and parts[0] not in schema:
        raise UserError(f"{where}: this recipe has no {parts[0]}; it is a key of {SOME_RECIPES[parts[0]]}")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{where}: the value is not valid YAML: {_one_line(error)}") from None
    layer = None if parsed == "None" else parsed
    for part in reversed(parts):
        layer = {part: layer}
    return _merge(merged, layer, schema, where)


def _remove(merged: dict, key: str, schema: dict, where: str) -> dict:
    """`~key`: an optional key becomes null; an argument of a component is no longer passed."""
    *parents, last = key.split(".")
    merged = _plain(merged)
    node = merged
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    if not isinstance(node, dict) or last not in node:
        raise UserError(f"{where}: there is no such key to remove")
    if _is_component(node) and last != "_component_":
        del node[last]
    elif _may_be_null(key, schema):
        node[last] = None
    else:
        raise UserError(f"{where}: {key} cannot be removed; give it another value")
    return merged


def _resolve(merged: dict) -> dict:
    """Fills in ${...} references."""
    try:
        return OmegaConf.to_container(OmegaConf.create(merged), resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"config: {str(error).splitlines()[0]}") from None


# Checks


def _check_required(cfg: dict, prefix: str = "") -> None:
    for key, value in cfg.items():
        if isinstance(value, dict):
            _check_required(value, f"{prefix}{key}.")
        elif value == REQUIRED:
            raise UserError(f"{prefix}{key}: has no default: set it in the YAML or as {prefix}{key}=...")


def _check_values(cfg: dict, defaults: dict, prefix: str = "") -> None:
    """Types from the defaults, conditions from RULES."""
    for key, value in cfg.items():
        name = f"{prefix}{key}"
        default, rule = (defaults or {}).get(key), RULES.get(name)
        if isinstance(value, dict) and (isinstance(default, dict) or default is None):
            same = not _is_component(value) or (default or {}).get("_component_") in (value["_component_"], REQUIRED)
            _check_values(value, default if same else {}, f"{name}.")
            continue
        if value is None:
            if not _may_be_null(name, {key: default} if not prefix else {}, default):
                raise UserError(f"{name}=null: must be {_kind_name(default, rule)}")
            continue
        if not _has_kind(value, default, rule):
            raise UserError(f"{name}={_show(value)}: must be {_kind_name(default, rule)}, is {_type_name(value)}")
        if rule and not rule.holds(value):
            nearest = rule.nearest(value) if rule.nearest else None
            nearest = default if nearest is None and default != REQUIRED else nearest
            hint = f"; nearest valid: {name}={_show(nearest)}" if nearest is not None else ""
            raise UserError(f"{name}={_show(value)}: must be {rule.says}{hint}")


def _check_components(cfg: dict) -> None:
    """Every component can be imported and takes the arguments it is given."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # a component may live in the user's folder
    for key, block in cfg.items():
        if not _is_component(block):
            continue
        path = block["_component_"]
        try:
            component = _get_component_from_path(path)
        except (InstantiationError, ValueError, TypeError, AttributeError) as error:
            reason = str(error).splitlines()[-1]
            raise UserError(f"{key}._component_={path}: cannot be imported: {reason}") from None
        arguments = inspect.signature(component).parameters
        if any(a.kind is a.VAR_KEYWORD for a in arguments.values()):
            continue
        for name in block:
            if name != "_component_" and name not in arguments:
                raise UserError(
                    f"{key}.{name}: {path.rsplit('.', 1)[-1]} has no such argument; it takes "
                    f"{', '.join(arguments)}{_nearest(name, arguments)}; remove it with ~{key}.{name}"
                )
        for name, argument in arguments.items():
            value, typed = block.get(name), isinstance(argument.default, (bool, int, float, str))
            if value is not None and typed and not _has_kind(value, argument.default, None):
                expected = _kind_name(argument.default, None)
                raise UserError(f"{key}.{name}={_show(value)}: must be {expected}, is {_type_name(value)}")


def _check_together(cfg: dict) -> None:
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
    schedule = cfg.get("lr_scheduler") or {}
    warmup = [schedule.get("num_warmup_steps"), schedule.get("warmup_ratio")]
    if None not in warmup:
        raise UserError(
            f"lr_scheduler.num_warmup_steps={warmup[0]}: warmup_ratio={warmup[1]} says the same in another way; "
            "remove it with ~lr_scheduler.warmup_ratio"
        )
    if "optimizer" in cfg and "lr" not in cfg["optimizer"]:
        raise UserError(f"optimizer.lr: {cfg['optimizer']['_component_']} needs a learning rate: set optimizer.lr=...")


# Words


def _is_component(node: Any) -> bool:
    return isinstance(node, dict) and "_component_" in node


def _may_be_null(name: str, schema: dict, default: Any = REQUIRED) -> bool:
    """Whether null is a value of this key: its default is null or a component, or its rule says so."""
    if default == REQUIRED:
        for part in name.split("."):
            schema = schema.get(part, {}) if isinstance(schema, dict) else {}
        default = schema if schema != {} else REQUIRED
    rule = RULES.get(name)
    return default is None or (rule is not None and rule.nullable) or name in ("lr_scheduler", "metric_logger")


def _has_kind(value: Any, default: Any, rule: Rule | None) -> bool:
    kind = rule.kind if rule and rule.kind else None if default in (None, REQUIRED) else type(default)
    if kind is None:
        return True
    if isinstance(value, bool) or kind is bool:
        return kind is bool and isinstance(value, bool)
    return isinstance(value, (int, float)) if kind is float else isinstance(value, kind)


def _kind_name(default: Any, rule: Rule | None) -> str:
    kind = rule.kind if rule and rule.kind else type(default)
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list"}
    return names.get(kind, "a block of keys" if kind is dict else "a value")


def _type_name(value: Any) -> str:
    names = {bool: "true/false", int: "a whole number", float: "a number", str: "text", list: "a list", dict: "a block"}
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return "[" + ",".join(map(str, value)) + "]" if isinstance(value, list) else str(value)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; nearest: {close[0]}" if close else ""


def _unknown_key(name: str, schema: dict, where: str, prefix: str) -> UserError:
    key = name[len(prefix) :]
    if key in ELSEWHERE:
        hint = f"; here it is called {ELSEWHERE[key]}"
    else:
        hint = _nearest(key, schema).replace("nearest: ", f"nearest: {prefix}")
    hint = hint or "; known: " + ", ".join(prefix + known for known in schema)
    return UserError(f"{where}: unknown key {name}{hint}")
