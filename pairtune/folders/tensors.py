"""A file of tensors by name, memory-mapped, with what can be said of it before a value is read."""

from pathlib import Path
from zipfile import is_zipfile

import torch
from torch import Tensor
from torchtune.training.checkpointing._utils import safe_torch_load

from pairtune.config.rules import one_line
from pairtune.errors import UserError
from pairtune.files import check_there

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # others are quantized: they need their scales


def read_shard(path: Path, *, ignored: tuple[str, ...] = (), also: tuple[torch.dtype, ...] = ()) -> dict[str, Tensor]:
    """Returns a file's tensors by name, memory-mapped where it is no pickle of torch before 1.6, which is read whole.

    A pickle may hold tensors only: none of its code is run.

    Args:
        ignored: Endings of names that are left out, whatever is behind them: masks may be of any type.
        also: Types of tensors in fewer bits that are read, see models/bridge/packed.py.

    Raises:
        UserError: It cannot be read, or as `check_tensors`.
    """
    check_there(path)
    try:
        shard = safe_torch_load(path, mmap=is_zipfile(path))
    except ValueError as error:
        reason = one_line(error.__cause__).partition(". ")[0]
        more = "" if path.suffix == ".safetensors" else ", or a pickle that holds more than weights, which nothing runs"
        raise UserError(
            f"{path}: cannot be read: {reason}; it is damaged{more}; download it again, as safetensors if there are any"
        ) from error
    return check_tensors(shard, path, ignored=ignored, also=also)


def check_tensors(
    shard, path: Path, *, ignored: tuple[str, ...] = (), also: tuple[torch.dtype, ...] = ()
) -> dict[str, Tensor]:
    """Returns what a file holds, without what is ignored, if that is weights by name.

    Raises:
        UserError: It is something else, or a weight is quantized.
    """
    if not isinstance(shard, dict):
        raise UserError(f"{path}: holds a {type(shard).__name__}, not weights by name; save the model's state_dict")
    shard = {key: value for key, value in shard.items() if not str(key).endswith(ignored)}
    for key, value in shard.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key} is a {type(value).__name__}: not weights by name; save the state_dict")
        if value.dtype not in (*FLOATS, *also):
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {key} is {dtype}: quantized; take the model that it was made from")
    return shard
