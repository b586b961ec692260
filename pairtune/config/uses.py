"""What the component of a key has to be, told before it is called: a class or function of the kind that the key uses.

This finds mistakes, not malice: a config names code that a run imports and calls.
"""

import inspect
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from pairtune.config.checks import component_path, is_component
from pairtune.errors import UserError

METHODS = {  # of what a component makes
    "metric_logger": ("log_dict", "log_config", "close"),
    "tokenizer": ("tokenize_messages",),
    "lr_scheduler": ("step", "state_dict"),
}
OURS = {"tokenizer": "pairtune.tokenizer.hf.HFTokenizer"}  # and what needs none of them
BRIDGE = "pairtune.models.bridge.causal_lm"  # the builder of whatever torchtune lacks
PACKAGES = {  # what a logger of torchtune's imports when it is made
    f"torchtune.training.metric_logging.{logger}": package
    for logger, package in (
        ("WandBLogger", "wandb"),
        ("TensorBoardLogger", "tensorboard"),
        ("CometLogger", "comet_ml"),
        ("MLFlowLogger", "mlflow"),
    )
}


def check_path(key: str, path: str) -> None:
    """Refuses what is Python's own: nothing of it is an optimizer, schedule, loss, logger, tokenizer or model.

    Raises:
        UserError: The path leads into the standard library.
    """
    if path.partition(".")[0] in sys.stdlib_module_names:
        raise _no(key, path, "is of Python's own library")


def check_use(key: str, path: str, component: Callable) -> None:
    """Refuses an imported component of which it is plain that it does not make what its key uses.

    Raises:
        UserError: It is Python's own or built in, or what it makes, by its class or annotation, lacks a method.
    """
    is_defined = inspect.isclass(component) or inspect.isroutine(component)  # else the module is that of its class
    if is_defined and str(component.__module__).partition(".")[0] in sys.stdlib_module_names:
        raise _no(key, path, "is of Python's own library")
    if inspect.isbuiltin(component):
        raise _no(key, path, "is a built-in function")
    made = made_by(component)
    needed = METHODS.get(key, ())
    if made is None:
        if key == "metric_logger":
            raise _no(key, path, "is no class, and no function whose annotation says what class it makes")
        return
    missing = [name for name in needed if not callable(getattr(made, name, None))]
    if missing and OURS.get(key) != f"{made.__module__}.{made.__qualname__}":
        raise _no(key, path, f"has no {', '.join(missing)}" if made is component else f"makes a {made.__name__}")


def made_by(component: Callable) -> type | None:
    """Returns the class of what a component makes, as far as it says so itself."""
    if inspect.isclass(component):
        return component
    annotations = getattr(component, "__annotations__", {})
    if "return" in annotations and annotations["return"] is None:
        return type(None)
    made = annotations.get("return")
    return made if inspect.isclass(made) else None


def is_bridged(component: Mapping | None) -> bool:
    """Returns whether the config's `model` block is built by transformers."""
    return component is not None and component["_component_"] == BRIDGE


def has_bridge() -> bool:
    """Returns whether what transformers builds can be trained: the extra is installed."""
    return find_spec("transformers") is not None


def lacks(key: str, made: Any) -> list[str]:
    """Returns the methods that what a component has made lacks."""
    return [name for name in METHODS[key] if not callable(getattr(made, name, None))]


def check_installed(cfg: dict) -> None:
    """Refuses a logger or a model whose package is not installed: it would be told when the weights are read.

    Raises:
        UserError: With the package to install.
    """
    block = cfg.get("metric_logger")
    path = block["_component_"] if is_component(block) else ""
    package = PACKAGES.get(path)
    if package and find_spec(package) is None:
        raise UserError(
            f"metric_logger._component_={path}: needs the package {package}, which is not installed: "
            f"pip install {package}, or metric_logger=none"
        )
    model = cfg.get("model")
    if is_component(model) and model["_component_"] == BRIDGE and find_spec("transformers") is None:
        raise UserError(
            f"model._component_={BRIDGE}: needs transformers, which is not installed: pip install 'pairtune[models]'"
        )


def _no(key: str, path: str, what: str) -> UserError:
    uses = ", ".join(METHODS.get(key, ()))
    needs = f"must make what has {uses}" if uses else f"makes no {key.rpartition('.')[2]}"
    return UserError(f"{key}._component_={path}: {what}, and {needs}, such as {key}={component_path(key)}")
