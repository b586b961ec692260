"""Which config is for a downloaded model that no config names: by architecture and sizes, as in its config.json."""

import inspect
import math
from dataclasses import dataclass
from pathlib import Path

from omegaconf import OmegaConf

from pairtune import models
from pairtune.config.components import import_component
from pairtune.errors import UserError
from pairtune.folders.check_model import check_config, describe, describe_config
from pairtune.folders.config_json import SETTINGS, config_key
from pairtune.folders.families import config_types, of_config_type

# Builders of an architecture in any size, and what they call config.json's values. Llama's: see _choose_builder.
BUILDERS = {
    **{name: f"torchtune.models.{name}.{name}" for name in ("mistral", "gemma", "qwen2", "phi3")},
    **{name: f"pairtune.{name}.{name}" for name in ("gemma2", "qwen3", "mixtral", "gpt2", "gpt_neox")},
}
ARGUMENTS = {known.argument: name for name, known in SETTINGS.items() if known.argument}


@dataclass(frozen=True)
class Fit:
    """The nearest config: what differs, in words, and what to set so that nothing does; both empty if it fits."""

    config: str
    different: list[str]
    overrides: list[str]


def nearest(config: dict, configs: dict[str, Path]) -> Fit:
    """Returns the config whose model is nearest to a config.json's: fewest differences, then nearest in size.

    Args:
        config: A config.json's content.
        configs: Name to file.

    Raises:
        UserError: There is no such architecture here, or its weights cannot be trained; or no config has it.
    """
    check_config(config, Path("config.json"))
    kinds = of_config_type(config["model_type"])
    if not kinds:
        raise UserError(f"config.json: model_type={config['model_type']}: must be one of {', '.join(config_types())}")
    wanted = {name: value for name, value in describe_config(config).items() if value is not None}
    candidates = []
    for name, path in configs.items():
        own = OmegaConf.load(path)
        kind = OmegaConf.select(own, "checkpointer.model_type")
        if kind in kinds and OmegaConf.select(own, "model._component_"):
            candidates.append((name, kind, _describe(own.model)))
    if not candidates:
        raise UserError(f"no config here is for model_type={config['model_type']}, which is {' or '.join(kinds)} here")
    name, kind, found = min(candidates, key=lambda candidate: _distance(candidate[2], wanted))
    different = _differences(found, wanted)
    if not different:
        return Fit(name, [], [])
    builder = _choose_builder(config["model_type"], wanted, kind)
    arguments = _arguments(config, wanted, builder)
    if left := _differences(_describe({"_component_": builder.path, **arguments}), wanted):
        raise UserError(f"no builder here can build it: {'; '.join(left)}")
    overrides = [f"model._component_={builder.path}", *(f"model.{key}={value}" for key, value in arguments.items())]
    overrides += [f"checkpointer.model_type={builder.kind}"] if builder.kind != kind else []
    return Fit(name, different, overrides)


def _describe(component: dict) -> dict:
    return describe(models.full(component, dtype="bf16"))  # on the meta device


def _distance(found: dict, wanted: dict) -> tuple[int, float]:
    size = [values["num_hidden_layers"] * values["hidden_size"] ** 2 for values in (found, wanted)]
    return len(_differences(found, wanted)), abs(math.log(size[0] / size[1]))


def _differences(found: dict, wanted: dict) -> list[str]:
    return [
        f"{name} is {value} and there {found[name]}"
        for name, value in wanted.items()
        if name in found and found[name] != value
    ]


@dataclass(frozen=True)
class Builder:
    """What builds an architecture: its path, the checkpointer's model_type for it, and arguments beyond ARGUMENTS."""

    path: str
    kind: str
    more: dict[str, int]


def _choose_builder(model_type: str, wanted: dict, kind: str) -> Builder:
    """Returns the builder for a config.json's model_type; `kind` is the nearest config's."""
    if model_type != "llama":
        return Builder(BUILDERS[model_type], kind, {})
    scale = int(wanted.get("rope_scaling.factor", 1))
    if wanted.get("tie_word_embeddings"):
        return Builder("torchtune.models.llama3_2.llama3_2", "LLAMA3_2", {"scale_factor": scale})
    if scale != 1:
        return Builder("torchtune.models.llama3_1.llama3_1", "LLAMA3", {"scale_factor": scale})
    family = "llama2" if kind == "LLAMA2" else "llama3"
    return Builder(f"torchtune.models.{family}.{family}", kind, {})


def _arguments(config: dict, wanted: dict, builder: Builder) -> dict:
    takes = inspect.signature(import_component("model", builder.path)).parameters
    values = {name: config.get(config_key(name, config)) for name in ARGUMENTS.values()} | wanted
    arguments = {ours: values[theirs] for ours, theirs in ARGUMENTS.items() if ours in takes}
    # No value is the builder's default; so is a cap of 0, which says that there is none.
    arguments = {ours: value for ours, value in arguments.items() if value or value is False}
    if "rope_base" in arguments:
        arguments["rope_base"] = int(arguments["rope_base"])
    return arguments | builder.more
