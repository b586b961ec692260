"""A model that was built from a config, made ready for the folder that its weights are in."""

from collections.abc import Mapping

from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.folders.check_model import check_model, windows


def make_ready(model: TransformerDecoder, base_config: Mapping, max_length: int, vocab_size: int = 0) -> None:
    """Makes a built model compute answers' log-probabilities, and compares it with its folder's config.json.

    Args:
        model: From models.full or models.lora, on the meta device.
        base_config: Of the folder, which tells of sliding windows, too; empty where it is not known.
        max_length, vocab_size: As for models.fit.

    Raises:
        UserError: The model is not the one of the folder, or cannot compute that way.
    """
    models.fit(model, max_length=max_length, vocab_size=vocab_size, windows=windows(base_config, len(model.layers)))
    if base_config:
        check_model(model, base_config)
