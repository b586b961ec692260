"""Components, `_component_` and its arguments: checked against the signature, and built.

Where a component's source tells its signature, it is checked without being imported: whatever it imports takes seconds.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from pairtune.config.answers import answer
from pairtune.config.checks import component_path, is_component
from pairtune.config.rules import fits, one_line, show, wrong_kind
from pairtune.config.signatures import ancestors, parameters_of
from pairtune.config.source import Definition, Missing, look_up, public_classes, split
from pairtune.config.uses import check_path, check_use, made_by
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
HOMES = {"optimizer": "torch.optim", "lr_scheduler": "pairtune.schedules", "loss": "torchtune.rlhf.loss"}

# What the components of a key are, and those of no other.
CLASSES = {
    "model": ("torchtune.modules.transformer.TransformerDecoder", "pairtune.models.bridge.decoder.BridgedDecoder"),
    "optimizer": ("torch.optim.optimizer.Optimizer",),
}


def check_components(cfg: dict, *, by_source: bool = False) -> None:
    """Refuses a component that cannot be imported, or that has an argument too many or too few, or of a wrong type.

    Args:
        by_source: Nothing is imported. What a source does not tell is not refused then.
    """
    for key, block in _components(cfg):
        (_check_by_source if by_source else check_component)(key, block)


def without_defaults_of_another(cfg: dict, defaults: dict, *, by_source: bool) -> tuple[dict, list[str]]:
    """Returns a config without arguments that another component has no use for and that say no more than DEFAULTS.

    A saved config says everything, so naming another component on top of one would otherwise be refused for what nobody
    has chosen. Of what is left out a sentence tells.
    """
    told, left = [], dict(cfg)
    for key, block in cfg.items():
        default = defaults.get(key)
        if not (is_component(block) and is_component(default)) or block["_component_"] == default["_component_"]:
            continue
        known = _parameters(key, block["_component_"], by_source=by_source)
        if known is None or _takes_any(known):
            continue
        same = [n for n, v in block.items() if n not in known and n in default and v == default[n] and n[0] != "_"]
        left[key] = {name: value for name, value in block.items() if name not in same}
        name = str(block["_component_"]).rpartition(".")[2]
        told += [f"{key}.{n}={show(block[n])}, as by default, has no effect: {name} has no such argument" for n in same]
    return left, told


def _parameters(key: str, path: Any, *, by_source: bool) -> dict[str, inspect.Parameter] | None:
    """What a component takes; None where that is not known, or there is no such component."""
    try:
        if not by_source:
            return _signature(import_component(key, path))
        _add_own_folder()
        found = look_up(path)
    except (Missing, ValueError, AttributeError):
        return None
    return parameters_of(found) if isinstance(found, Definition) else None


def check_component(key: str, block: dict) -> None:
    """As check_components, for the one that a config has at `key`; an element of a list is KEY[0].

    Raises:
        UserError: One of these does not hold.
    """
    check_path(key, block["_component_"])
    component = import_component(key, block["_component_"])
    made = made_by(component)
    classes = [f"{c.__module__}.{c.__qualname__}" for c in made.__mro__] if made else None
    check_use(key, block["_component_"], component)
    _check(key, block, classes, _signature(component))


def _check_by_source(key: str, block: dict) -> None:
    path = block["_component_"]
    check_path(key, path)
    _add_own_folder()
    try:
        found = look_up(path)
    except Missing as reason:
        raise UserError(f"{key}._component_={path}: cannot be imported: {reason}{_meant(key, path)}") from None
    if isinstance(found, Definition):
        _check(key, block, ancestors(found), parameters_of(found))
    elif found is not None:
        raise _not_callable(key, path)


def _check(key: str, block: dict, classes: list[str] | None, parameters: dict[str, inspect.Parameter] | None) -> None:
    """Args are None where they are not known: classes are what it makes, and all that this inherits from."""
    if classes is not None:
        _check_made(key, block["_component_"], classes)
    if parameters is not None:
        parameters = _without_first(key, parameters)
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
    """Returns what is at an import path; the user's own folder is on the path.

    Raises:
        UserError: It cannot be imported or cannot be called.
    """
    _add_own_folder()
    try:
        component = _imported(path)
    except Exception as error:  # Missing, or whatever a user's own module raises
        raise UserError(f"{key}._component_={path}: cannot be imported: {one_line(error)}{_meant(key, path)}") from None
    if not callable(component):
        raise _not_callable(key, path)
    return component


def _add_own_folder() -> None:
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _imported(path: str) -> Any:
    """An attribute comes before a submodule of its name."""
    first, *rest = split(path)
    found, name = _import_module(first, f"there is no module {first}"), first
    for part in rest:
        if hasattr(found, part):
            found = getattr(found, part)
        elif isinstance(found, ModuleType):
            found = _import_module(f"{name}.{part}", f"{found.__name__} has no {part}")
        else:
            raise Missing(f"{name} has no {part}")
        name += f".{part}"
    return found


def _import_module(name: str, otherwise: str) -> ModuleType:
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise Missing(otherwise) from None
        raise  # it is there, and imports something that is not


def _not_callable(key: str, path: str) -> UserError:
    return UserError(f"{key}._component_={path}: is not a class or function{_meant(key, path)}")


def _meant(key: str, path: str) -> str:
    """A way out: the component that a short or misspelled path may mean, or what there is."""
    home = HOMES.get("loss" if key.startswith("loss.terms[") else key)
    if home is None:
        return f"; give the full import path, such as {key}={component_path(key)}"
    paths = {name.lower(): f"{home}.{name}" for name in _components_in(home)}
    close = get_close_matches(path.rpartition(".")[2].lower(), paths, n=1)
    if close:
        return f"; nearest: {key}={paths[close[0]]}"
    return f"; {home} has {', '.join(_components_in(home))}"


def _components_in(home: str) -> list[str]:
    return [name for name in public_classes(home) if f"torch.optim.{name}" != "torch.optim.Optimizer"]


def _signature(component: Callable) -> dict[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(component, eval_str=True).parameters
    except (NameError, AttributeError, TypeError, SyntaxError):  # an annotation for type checkers only
        parameters = inspect.signature(component).parameters
    except ValueError:  # written in C
        parameters = {"kwargs": inspect.Parameter("kwargs", inspect.Parameter.VAR_KEYWORD)}
    return dict(parameters)


def _without_first(key: str, parameters: dict[str, inspect.Parameter]) -> dict[str, inspect.Parameter]:
    """What a config can pass, by name."""
    first = next(iter(parameters.values()), None)
    if key in FIRST_FROM_RECIPE and first and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
        return {name: parameter for name, parameter in parameters.items() if name != first.name}
    return parameters


def _check_made(key: str, path: str, classes: list[str]) -> None:
    """What a component makes, as far as its class or annotation tells, is what its key is for."""
    name = key.rpartition(".")[2]  # model, also of reference.model
    for its_key, kinds in CLASSES.items():
        if bool({*kinds} & {*classes}) != (name == its_key):
            made = classes[0].rpartition(".")[2]
            what = f"makes a {made}, which is for {its_key}" if name != its_key else f"makes no {its_key}"
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
        if value is not None and name not in (*parameters, "_component_") and not _takes_any(parameters):
            way_out = "" if key.endswith("]") else f"; remove it with ~{key}.{name}"  # ~ does not reach into a list
            elsewhere = answer(name, value) if not nearest(name, known) else ""
            raise UserError(
                f"{key}.{name}: {component} has no such argument; it takes {', '.join(known) or 'none'}"
                f"{nearest(name, known)}{f'; {elsewhere}' if f' {key}.' in elsewhere else ''}{way_out}"
            )


def _check_needed(key: str, block: dict, parameters: dict[str, inspect.Parameter]) -> None:
    from_recipe, component = FROM_RECIPE.get(key, ()), block["_component_"].rpartition(".")[2]
    if key == "lr_scheduler" and not _takes_any(parameters):
        for name in from_recipe:
            if name not in parameters:
                raise UserError(
                    f"{key}._component_={block['_component_']}: takes no {name}, which recipes pass to a schedule; "
                    f"use {' or '.join('pairtune.schedules.' + name for name in _components_in('pairtune.schedules'))}"
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
    return _imported(block["_component_"])(*args, **arguments | kwargs)


def plain(node: Any) -> dict:
    """Returns a component's block as a dict whose references are resolved."""
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node)
