"""How a config.json says that its folder's weights are in fewer bits, and which of that is read."""

from collections.abc import Mapping

from pairtune.config.rules import show
from pairtune.errors import UserError

MXFP4, FP8 = "mxfp4", "fp8"  # as quant_method has them


def kind_of(config: Mapping) -> str | None:
    """Returns MXFP4 or FP8, which are read; None for a folder whose weights are in neither."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method")
    if method == FP8:
        block = said.get("weight_block_size")
        is_block = isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)
        return FP8 if (block is None or is_block) and said.get("fmt", "e4m3") in ("e4m3", "float8_e4m3fn") else None
    return MXFP4 if method == MXFP4 else None


def check(config: Mapping, where: str) -> None:
    """Refuses a config.json whose weights are in fewer bits in a way that is not read.

    Args:
        where: The file, for messages.

    Raises:
        UserError: As said.
    """
    said = config.get("quantization_config") or config.get("compression_config")
    if said and kind_of(config) is None:
        name = said.get("quant_method") if isinstance(said, Mapping) else None
        raise UserError(
            f"{where}: quantization_config={show(name or said)}: the weights are quantized, which training cannot "
            "undo; take the model that they were made from, with a qlora_ recipe if memory is short"
        )


def reason(config: Mapping) -> str | None:
    """Returns why no builder here reads a folder, in words; None where its weights are whole."""
    kind = kind_of(config)
    if kind is None:
        return None
    return f"quantization_config={kind}: the weights are in fewer bits, which are read for transformers' classes only"


def sentence(config: Mapping, dtype: str) -> str | None:
    """Returns what is to be said of a folder whose weights are in fewer bits; None for another.

    Args:
        dtype: The run's, bf16 or fp32.
    """
    kind = kind_of(config)
    if kind is None:
        return None
    bits = {MXFP4: "4 bits (MXFP4)", FP8: "8 bits (FP8)"}[kind]
    return (
        f"checkpointer.checkpoint_dir: the folder's weights are in {bits}, which training cannot change; they are read "
        f"into {dtype}, trained and exported so"
    )
