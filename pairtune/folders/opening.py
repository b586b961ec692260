"""A model that was built from a config, made ready for the folder that its weights are in."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.folders.check_model import check_model, windows


@dataclass(frozen=True)
class Execution:
    """How the models of a run compute, see models.prepare."""

    max_length: int
    vocab_size: int = 0
    attention: str = "auto"
    checkpoint_activations: bool = False
    compile_layers: bool = False


def prepare(model: TransformerDecoder, base_config: Mapping, execution: Execution) -> None:
    """Makes a built model compute answers' log-probabilities, with the sliding windows that a config.json tells of.

    Args:
        model: From models.full or models.lora, on the meta device.
        base_config: Of the model's folder; empty where it is not known.

    Raises:
        UserError: The model cannot compute that way.
    """
    models.prepare(model, windows=windows(base_config, len(model.layers)), **vars(execution))


def make_ready(model: TransformerDecoder, base_config: Mapping, execution: Execution) -> None:
    """Does the same, and compares the model with the folder's config.json, if that is known.

    Raises:
        UserError: The model is not the one of the folder, or cannot compute that way.
    """
    prepare(model, base_config, execution)
    if base_config:
        check_model(model, base_config)
