"""Room on the disk for what a run writes, checkpoints and at the end the export; and what a disk's errors say."""

import errno
import shutil
from pathlib import Path

from torch import Tensor


def at_the_fullest(
    checkpoint: int, export: int, *, kept: int, there: int, steps_left: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Returns the bytes that are still to come, by entry of the run folder: while it trains, and when it exports.

    While it trains there is one checkpoint more than are kept. One that is there counts: another takes its place.

    Args:
        checkpoint, export: Bytes of one.
        kept: How many checkpoints stay; 0: none is written.
        there: How many there are already.
        steps_left: How many there may still be.
    """
    new = max(0, min(steps_left, kept - there))
    written = min(steps_left, max(1, kept + 1 - there)) if kept else 0
    return {"checkpoints": written * checkpoint}, {"checkpoints": new * checkpoint, "export": export}


def missing(run_dir: Path, sizes: dict[str, int]) -> tuple[int, Path]:
    """Returns the bytes that a disk lacks for these entries of a run folder, which may be links, and where."""
    needed: dict[int, int] = {}
    folders: dict[int, Path] = {}
    for name, size in sizes.items():
        folder = run_dir / name
        there = next(path for path in (folder, *folder.parents) if path.exists())
        disk = there.stat().st_dev
        needed[disk], folders[disk] = needed.get(disk, 0) + size, there
    return max((max(0, size - shutil.disk_usage(folders[disk]).free), folders[disk]) for disk, size in needed.items())


def num_bytes(tensors: dict[str, Tensor], num_shards: int = 1) -> int:
    """Returns the bytes of a checkpoint's tensors: a DTensor counts whole; of pieces, one process's stand for all."""
    sizes = {name: t.numel() * t.element_size() for name, t in tensors.items()}
    pieces = sum(size for name, size in sizes.items() if name.startswith("local."))
    return sum(sizes.values()) + pieces * (num_shards - 1)


def shown(size: int) -> str:
    """Returns a number of bytes in words."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def is_full(error: BaseException) -> bool:
    """Returns whether an error says that a disk is full."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or f"os error {errno.ENOSPC}" in str(error)  # safetensors has an error of its own


def reason(error: BaseException) -> str:
    """Returns what went wrong, of an error that DCP may have wrapped, one of each process."""
    failures = getattr(error, "failures", None) or {}
    inner = next((e[0] if isinstance(e, tuple) else e for e in failures.values()), error)
    if is_full(inner):
        return "the disk is full"
    return f"{type(inner).__name__}: {' '.join(str(inner).split())}"
