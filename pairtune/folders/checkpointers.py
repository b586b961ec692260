"""Folders that torchtune's own checkpointers read: Meta's consolidated.00.pth, and weights under torchtune's names.

Both classes take one file, rename its tensors at most, and leave them memory-mapped.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from torchtune.training import FullModelMetaCheckpointer, FullModelTorchTuneCheckpointer
from torchtune.training.checkpointing._utils import ModelType, safe_torch_load

from pairtune.config.layout import check_folder
from pairtune.config.rules import one_line
from pairtune.errors import UserError
from pairtune.files import check_there
from pairtune.folders.tensors import check_tensors

META, TORCHTUNE = "FullModelMetaCheckpointer", "FullModelTorchTuneCheckpointer"
CLASSES = {META: FullModelMetaCheckpointer, TORCHTUNE: FullModelTorchTuneCheckpointer}
NAMES_OF_META = ("LLAMA2", "LLAMA3", "LLAMA3_2", "MISTRAL")  # families that are published so
# Of torchtune's own runs: what is no model's weights.
OTHER_STATES = ("adapter_model.*", "recipe_state.pt", "optimizer*", "training_args.bin")


def reader_of(component: str | None) -> str | None:
    """Returns the class of torchtune's that reads a folder of this `checkpointer._component_`; None: we read it."""
    name = (component or "").rpartition(".")[2]
    return name if name in CLASSES else None


def find_file(reader: str, folder: Path, names: list[str], model_type: str) -> str:
    """Returns the name of the one file that holds a model's weights.

    Args:
        names: What `checkpointer.checkpoint_files` says; nothing: it is looked for.

    Raises:
        UserError: There is none, or more than one; or the class does not read this family.
    """
    key = f"checkpointer.checkpoint_dir={folder}"
    known = NAMES_OF_META if reader == META else ModelType.__members__
    if model_type not in known:
        raise UserError(
            f"checkpointer.model_type={model_type}: {reader} does not read it; take a folder in Hugging Face layout, "
            "with torchtune.training.FullModelHFCheckpointer"
        )
    check_folder(str(folder))
    if len(names) > 1:
        raise UserError(f"checkpointer.checkpoint_files: {reader} reads one file, not {len(names)}; {_IN_PARTS}")
    if names:
        return names[0]
    found = _candidates(reader, folder)
    if len(found) == 1:
        return found[0]
    if reader == META and len(found) > 1:
        raise UserError(f"{key}: holds a model in {len(found)} parts, and {reader} reads one file; {_IN_PARTS}")
    if found:
        raise UserError(
            f"{key}: holds {', '.join(found)}; say which one has the weights, as checkpointer.checkpoint_files"
        )
    wanted = "consolidated.00.pth" if reader == META else "a .pt, .bin or .safetensors file"
    below = next(iter(sorted(folder.glob("*/consolidated.00.pth"))), None) if reader == META else None
    hint = f"; nearest valid: checkpointer.checkpoint_dir={below.parent}" if below else ""
    raise UserError(f"{key}: holds no weights; looked for {wanted}{hint}")


_IN_PARTS = "take the same model in Hugging Face layout, whose shards are read together"


def _candidates(reader: str, folder: Path) -> list[str]:
    patterns = ("consolidated.*.pth",) if reader == META else ("*.pt", "*.bin", "*.safetensors")
    found = {path for pattern in patterns for path in folder.glob(pattern)}
    others = {path for pattern in OTHER_STATES for path in folder.glob(pattern)}
    return sorted(path.name for path in found - others)


def read_state_dict(reader: str, path: Path, model_type: str) -> dict[str, Tensor]:
    """Returns a file's weights under torchtune's names, as torchtune's class of this name reads them: memory-mapped.

    Raises:
        UserError: It refuses the file, or as `check_tensors`.
    """
    folder = path.parent.resolve()
    check_there(path)
    try:
        with _quietly():
            # output_dir is made if it is not there, and must not be within checkpoint_dir; nothing is written to it.
            made = CLASSES[reader](str(folder), [path.name], model_type, output_dir=str(folder.parent))
            found = made.load_checkpoint()["model"]
            if reader == META and model_type == "LLAMA3_2":  # dropped unseen: it may not be the embedding
                found["output.weight"] = safe_torch_load(path)["output.weight"]
    except Exception as error:  # whatever it raises: KeyErrors, plain Exceptions, what torch.load says
        reason = _reason(error)
        raise UserError(
            f"{path}: {reader} cannot read it: {reason}; name the checkpointer that wrote it, or, if it is damaged, "
            "fetch or save it again"
        ) from error
    return check_tensors(found, path)


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]}"
    return one_line(error.__cause__ if isinstance(error, ValueError) and error.__cause__ else error)


@contextmanager
def _quietly() -> Iterator[None]:
    """torchtune tells at every reading what model_type makes of it."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(before)
