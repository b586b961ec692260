"""A model that was built from a config, made ready for the folder that its weights are in."""

from collections.abc import Mapping

from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.folders import check_model as torchtunes
from pairtune.models.bridge import BridgedDecoder
from pairtune.models.bridge.build import check_same


def make_ready(
    model: TransformerDecoder | BridgedDecoder, base_config: Mapping, max_length: int, vocab_size: int = 0
) -> None:
    """Makes a built model compute answers' log-probabilities, and compares it with its folder's config.json.

    Args:
        model: From models.full or models.lora, on the meta device.
        base_config: Of the folder, which tells of sliding windows, too; empty where it is not known.
        max_length, vocab_size: As for models.fit.

    Raises:
        UserError: The model is not the one of the folder, or cannot compute that way.
    """
    models.fit(model, max_length=max_length, vocab_size=vocab_size, windows=windows_of(model, base_config))
    if base_config:
        check_model(model, base_config)


def windows_of(model: TransformerDecoder | BridgedDecoder, config: Mapping) -> list[int | None] | None:
    """Returns how far each layer looks back, as models.fit takes it; None for transformers' models, which know it."""
    return None if isinstance(model, BridgedDecoder) else torchtunes.windows(config, len(model.layers))


def check_model(model: TransformerDecoder | BridgedDecoder, config: Mapping) -> None:
    """Compares a built model with a folder's config.json.

    Raises:
        UserError: They differ.
    """
    (check_same if isinstance(model, BridgedDecoder) else torchtunes.check_model)(model, config)
