"""Components, `_component_` and its arguments: checked against the signature, and built."""

import inspect
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchtune.rlhf.loss
from omegaconf import OmegaConf
from torchtune.config._errors import InstantiationError
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import TransformerDecoder

from pairtune import schedules
from pairtune.config.checks import component_path, is_component
from pairtune.config.rules import fits, one_line, show, wrong_kind
from pairtune.errors import UserError, nearest

# What recipes pass to a component themselves; a config cannot. So is the first argument of an optimizer or schedule.
FROM_RECIPE = {
    "lr_scheduler": ("num_training_steps", "last_epoch"),
    "checkpointer": (
        *("output_dir", "adapter_checkpoint", "recipe_checkpoint", "resume_from_checkpoint"),
        *("safe_serialization", "should_load_recipe_state"),
    ),
}
FIRST_FROM_RECIPE = ("optimizer", "lr_scheduler")
FOUND = ("checkpointer.checkpoint_files",)  # the component needs them; where a config does not say, the recipe looks

# Where a component named by a wrong or short path may be meant to be.
HOMES: dict[str, ModuleType] = {
    "optimizer": torch.optim,
    "lr_scheduler": schedules,
    "loss": torchtune.rlhf.loss,
}


def check_components(cfg: dict) -> None:
    """Every component can be imported, takes the arguments that it is given and is given those that it needs."""
    for key, block in _components(cfg):
        check_component(key, block)


def check_component(key: str, block: dict) -> None:
    """As check_components, for the one that a config has at `key`; an element of a list is KEY[0].

    Raises:
        UserError: One of these does not hold.
    """
    component = import_component(key, block["_component_"])
    parameters = _parameters(key, component)
    _check_made(key, block["_component_"], component)
    _check_names(key, block, parameters)
    _check_needed(key, block, parameters)
    _check_kinds(key, block, parameters)


def _components(cfg: dict, prefix: str = "") -> Iterator[tuple[str, dict]]:
    for key, block in cfg.items():
        if is_component(block):
            yield f"{prefix}{key}", block
        elif isinstance(block, dict):
            yield from _components(block, f"{prefix}{key}.")


def import_component(key: str, path: str) -> Callable:
    """Returns what `path` names: torchtune's import, and the user's own folder is on the path.

    Raises:
        UserError: It cannot be imported or cannot be called.
    """
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        component = _get_component_from_path(path)
    except InstantiationError as error:
        reason = str(error).splitlines()[-1]
        raise UserError(f"{key}._component_={path}: cannot be imported: {reason}{_meant(key, path)}") from None
    except Exception as error:  # whatever a user's own module raises
        raise UserError(f"{key}._component_={path}: cannot be imported: {one_line(error)}{_meant(key, path)}") from None
    if not callable(component):
        raise UserError(f"{key}._component_={path}: is not a class or function{_meant(key, path)}")
    return component


def _meant(key: str, path: str) -> str:
    """A way out: the component that a short or misspelled path may mean, or what there is."""
    home = HOMES.get("loss" if key.startswith("loss.terms[") else key)
    if home is None:
        return f"; give the full import path, such as {key}={component_path(key)}"
    paths = {name.lower(): f"{home.__name__}.{name}" for name in _components_in(home)}
    close = get_close_matches(path.rpartition(".")[2].lower(), paths, n=1)
    if close:
        return f"; nearest: {key}={paths[close[0]]}"
    return f"; {home.__name__} has {', '.join(_components_in(home))}"


def _components_in(module: ModuleType) -> list[str]:
    """The public classes that the module or its submodules define; in a module of functions, those."""
    mine = {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and str(getattr(value, "__module__", "")).startswith(module.__name__)
    }
    classes = [name for name, value in mine.items() if inspect.isclass(value) and value is not torch.optim.Optimizer]
    return classes or [name for name, value in mine.items() if inspect.isfunction(value)]


def _parameters(key: str, component: Callable) -> dict[str, inspect.Parameter]:
    """What a config can pass, by name."""
    try:
        parameters = inspect.signature(component, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, SyntaxError):  # an annotation for type checkers only
        parameters = inspect.signature(component).parameters
    except ValueError:  # written in C
        parameters = {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    parameters = dict(parameters)
    first = next(iter(parameters.values()), None)
    if key in FIRST_FROM_RECIPE and first and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        del parameters[first.name]
    return parameters


def _check_made(key: str, path: str, component: Callable) -> None:
    """What the component makes, as far as its class or annotation tells, is what its key is for."""
    made = component if inspect.isclass(component) else getattr(component, "__annotations__", {}).get("return")
    name = key.rpartition(".")[2]  # model, also of reference.model
    for kind, its_key in ((TransformerDecoder, "model"), (torch.optim.Optimizer, "optimizer")):
        if inspect.isclass(made) and issubclass(made, kind) != (name == its_key):
            what = f"makes a {made.__name__}, which is for {its_key}" if name != its_key else f"makes no {its_key}"
            raise UserError(f"{key}._component_={path}: {what}{_meant(key, path)}")


def _takes_any(parameters: dict[str, inspect.Parameter]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_names(key: str, block: dict, parameters: dict[str, inspect.Parameter]) -> None:
    from_recipe = FROM_RECIPE.get(key, ())
    known = [name for name, p in parameters.items() if name not in from_recipe and p.kind is not p.VAR_POSITIONAL]
    component = block["_component_"].rpartition(".")[2]
    for name, value in block.items():
        if name in from_recipe and value is not None:
            raise UserError(
                f"{key}.{name}={show(value)}: is not for a config to set, the recipe decides it; "
                f"{component} takes {', '.join(known)}; remove it (~{key}.{name})"
            )
        if name not in (*parameters, "_component_") and not _takes_any(parameters):
            way_out = "" if key.endswith("]") else f"; remove it with ~{key}.{name}"  # ~ does not reach into a list
            raise UserError(
                f"{key}.{name}: {component} has no such argument; it takes {', '.join(known) or 'none'}"
                f"{nearest(name, known)}{way_out}"
            )


def _check_needed(key: str, block: dict, parameters: dict[str, inspect.Parameter]) -> None:
    from_recipe, component = FROM_RECIPE.get(key, ()), block["_component_"].rpartition(".")[2]
    if key == "lr_scheduler" and not _takes_any(parameters):
        for name in from_recipe:
            if name not in parameters:
                raise UserError(
                    f"{key}._component_={block['_component_']}: takes no {name}, which recipes pass to a schedule; "
                    f"use {' or '.join('pairtune.schedules.' + name for name in _components_in(schedules))}"
                )
    for name, parameter in parameters.items():
        needed = parameter.default is parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )
        if needed and block.get(name) is None and name not in from_recipe and f"{key}.{name}" not in FOUND:
            raise UserError(f"{key}.{name}: {component} needs it: set {key}.{name}=...")


def _check_kinds(key: str, block: dict, parameters: dict[str, inspect.Parameter]) -> None:
    for name, value in block.items():
        if name in parameters and value is not None:
            expected = _expected(parameters[name])
            if not fits(value, expected):
                raise wrong_kind(f"{key}.{name}", value, expected)


def _expected(parameter: inspect.Parameter) -> Any:
    """The parameter's annotation, or what its default tells; an int default says no more than "a number"."""
    if parameter.annotation is not parameter.empty:
        return parameter.annotation
    return {bool: bool, int: float, float: float, str: str}.get(type(parameter.default))


# Building


def instantiate(node: Any, *args, **kwargs) -> Any:
    """Returns what a component's block builds, None for None. An argument that is null is not passed.

    torchtune's own would pass null, and would resolve an escaped \\${...} a second time.

    Raises:
        UserError: The component raises anything: a file that it does not find, a package that it lacks.
    """
    if node is None:
        return None
    block = plain(node)
    try:
        return build(block, *args, **kwargs)
    except UserError:
        raise
    except Exception as error:
        values = ", ".join(f"{name}={show(value)}" for name, value in block.items() if name != "_component_")
        raise UserError(
            f"{block['_component_']}({values}): cannot be made: {type(error).__name__}: {one_line(error)}"
        ) from error


def build(block: dict, *args, **kwargs) -> Any:
    """Returns what a block makes, as `instantiate` does, and raises what the component raises."""
    arguments = {name: value for name, value in block.items() if name != "_component_" and value is not None}
    return _get_component_from_path(block["_component_"])(*args, **arguments | kwargs)


def plain(node: Any) -> dict:
    """Returns a component's block as a dict whose references are resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)
