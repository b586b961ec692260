"""A model of transformers, built from a folder's config.json on whatever device is the default one."""

import json
import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from pairtune.config import fewer_bits
from pairtune.config.rules import one_line, show
from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.models.bridge import experts, visible
from pairtune.models.bridge.decoder import BridgedDecoder

NOT_OF_MODELS = ("auto_map", "quantization_config")  # of a config.json: code that is never run, and how it is stored
# What a config.json may say without another model being meant: where it came from, and how it was stored.
BESIDE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "auto_map", "architectures", "use_cache")


def causal_lm(path: str) -> BridgedDecoder:
    """Returns the causal language model that transformers has for a folder's config.json, without weights.

    Classes of transformers only: code that lies in the folder (auto_map) is never run.

    Args:
        path: The folder.

    Raises:
        UserError: transformers is not installed, or too old; it has no causal language model of this model_type, or
            does not take what config.json says; the weights are quantized.
    """
    transformers = import_transformers()
    config = read_config(path)
    kind = class_of(config)
    if kind is None:
        raise UserError(
            f"{Path(path) / 'config.json'}: model_type={config.model_type}: is a text model with one of images around "
            "it, of which transformers builds the text model alone; take a folder of the text model"
        )
    try:
        lm = kind._from_config(
            config,
            attn_implementation=visible.NAME if kind._supports_attention_backend else visible.DENSE,
            experts_implementation=experts.NAME,
            dtype=torch.get_default_dtype(),
        )
    except Exception as error:
        raise UserError(
            f"{Path(path) / 'config.json'}: transformers {transformers.__version__} cannot make its "
            f"{type(config).__name__.removesuffix('Config')}: {one_line(error)}; see whether a newer version does"
        ) from error
    experts.install(lm)
    for module in lm.modules():
        if hasattr(module, "_rescale_layers"):  # RWKV halves weights in place while it is not trained
            module._rescale_layers = lambda: None
    _onto(torch.get_default_device(), lm)
    return BridgedDecoder(lm)


def _onto(device: torch.device, lm: nn.Module) -> None:
    """Moves parameters there that some constructors make elsewhere: what has its memory already would not be loaded."""
    for module in lm.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type != device.type:
                setattr(module, leaf, nn.Parameter(parameter.to(device), requires_grad=parameter.requires_grad))
    lm.tie_weights()


def class_of(config) -> type | None:
    """Returns the class of transformers that continues texts, with all that a folder of this configuration holds.

    Args:
        config: transformers' configuration.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
    )

    for mapping in (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        classes = mapping.get(type(config), ())
        for kind in classes if isinstance(classes, tuple) else (classes,):
            if kind.config_class is not type(config).sub_configs.get("text_config"):  # the text model's alone
                return kind
    return None


def known_types() -> Collection[str]:
    """Returns every model_type for which transformers has a class that may continue texts."""
    from transformers.models.auto import modeling_auto as auto

    return {**auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES}


def import_transformers() -> ModuleType:
    """Returns transformers, with our attention registered there.

    Raises:
        UserError: It is not installed, or an old one.
    """
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            "model: this architecture is computed by transformers, which is not installed: pip install "
            "'pairtune[models]'"
        ) from error
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UserError(
            f"model: this architecture is computed by transformers 5 or later, and {transformers.__version__} is "
            "installed: pip install -U 'pairtune[models]'"
        )
    _quiet()
    visible.register()
    experts.register()
    return transformers


def _quiet() -> None:
    """Keeps from the console what transformers warns of that is decided here: token ids, masks, caches.

    That a kernel is not installed is worth its line on a GPU, where it costs time.
    """
    if "TRANSFORMERS_VERBOSITY" in os.environ:
        return
    for handler in logging.getLogger("transformers").handlers:
        if _concerns_a_user not in handler.filters:
            handler.addFilter(_concerns_a_user)


def _concerns_a_user(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR or ("falling back" in record.getMessage() and torch.cuda.is_available())


def read_config(path: str):
    """Returns transformers' configuration of a folder, its defaults filled in; see `causal_lm`."""
    file = Path(path).expanduser() / "config.json"
    return parse(read_object(file), str(file))


def parse(content: Mapping, where: str = "config.json"):
    """Returns transformers' configuration of what a config.json says.

    Args:
        where: The file, for messages.

    Raises:
        UserError: See `causal_lm`.
    """
    import_transformers()
    from transformers import CONFIG_MAPPING

    kind = content.get("model_type")
    if kind not in CONFIG_MAPPING or kind not in known_types():
        code = "; the folder brings code of its own (auto_map), which is never run" if content.get("auto_map") else ""
        raise UserError(
            f"{where}: model_type={show(kind)}: transformers has no causal language model of this type{code}; see "
            "whether a newer transformers has one, or take another model"
        )
    fewer_bits.check(content, where)
    try:
        said = CONFIG_MAPPING[kind]._decode_special_floats(dict(content))  # JSON has no infinity
        return CONFIG_MAPPING[kind].from_dict({k: value for k, value in said.items() if k not in NOT_OF_MODELS})
    except Exception as error:
        raise UserError(f"{where}: {one_line(error)}; download the file again, or correct it") from error


def settings(config) -> dict:
    """Returns what a configuration of transformers says of what its model computes, as JSON can hold it."""
    return _computed(json.loads(config.to_json_string(use_diff=False)))


def _computed(said):
    """Returns it without what may differ, in blocks of it, too."""
    if not isinstance(said, dict):
        return said
    names = [name for name in said if name not in BESIDE and name[0] != "_" and not name.endswith("_token_id")]
    return {name: _computed(said[name]) for name in names}


def check_same(model: BridgedDecoder, content: Mapping) -> None:
    """Compares what a model was built from with the config.json of the folder that its weights are in.

    Raises:
        UserError: A setting differs that is more than where the model came from.
    """
    built, there = settings(model.lm.config), settings(parse(content))
    different = [
        f"{key} is {show(built.get(key))} in `model` and {show(there.get(key))} in config.json"
        for key in {**built, **there}
        if built.get(key) != there.get(key)
    ]
    if different:
        raise UserError(
            f"model: {'; '.join(different)}. `model` and `checkpointer.checkpoint_dir` do not belong together: name "
            "the same folder as model.path"
        )
