"""What a model of transformers has for images and sound beside its text model: pairs of texts do not pass through it.

It is not trained, has no adapters, stays as it is in fewer bits, and is exported as it was.
"""

import re

from torch import nn

_CROSS = re.compile("CrossAttention", re.IGNORECASE)  # of text layers that attend to an image, and to nothing else


def is_shell(config) -> bool:
    """Returns whether a configuration is of a text model with something around it."""
    return config.get_text_config() is not config


def text_modules(lm: nn.Module) -> set[nn.Module]:
    """Returns the modules that texts pass through: all, of a model of texts alone."""
    if not is_shell(lm.config):
        return set(lm.modules())
    parts = (lm.get_decoder(), lm.get_input_embeddings(), lm.get_output_embeddings())
    text = {module for part in parts if part is not None for module in part.modules()}
    for module in lm.modules():
        if _CROSS.search(type(module).__name__):
            text -= {*module.modules()}
    return text


def outermost(lm: nn.Module) -> list[str]:
    """Returns the names of the largest modules with parameters and a forward that texts do not pass through."""
    text, found = text_modules(lm), []
    _collect(lm, "", text, found)
    return found


def _collect(module: nn.Module, path: str, text: set[nn.Module], found: list[str]) -> None:
    for leaf, child in module.named_children():
        name = f"{path}.{leaf}".lstrip(".")
        is_beside = not any(inner in text for inner in child.modules())
        if is_beside and type(child).forward is not nn.Module.forward:
            found += [name] * any(True for _ in child.parameters())
        else:
            _collect(child, name, text, found)


def towers_of(model: nn.Module) -> list[nn.Module]:
    """Returns what a model has for images and sound; none of torchtune's has any.

    Args:
        model: A BridgedDecoder or another decoder.
    """
    return [model.get_submodule(name) for name in getattr(model, "towers", ())]
