"""Digests of weight files: of samples, which takes a moment, and of every byte, remembered for files as they were."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

from pairtune.errors import UserError
from pairtune.files import write_text
from pairtune.process.console import Progress

SAMPLES, SAMPLE_BYTES = 64, 2**16  # of a weight file
MEMO = "weights.json"
BLOCK_BYTES = 2**27  # of a weight file, hashed by one thread
SETTLED_NS = 2 * 10**9  # a file that changed just now may change again within the clock's step


def digest_samples(paths: Sequence[Path]) -> dict[str, str]:
    """Returns a digest a file, by name: of its size and 64 samples of 64 KiB, the first and last bytes included."""
    return {Path(path).name: _digest_samples_of(Path(path)) for path in paths}


def _digest_samples_of(path: Path) -> str:
    size = path.stat().st_size
    hashed = hashlib.sha256(str(size).encode())
    last = max(0, size - SAMPLE_BYTES)
    with path.open("rb") as file:
        for start in sorted({last * i // (SAMPLES - 1) for i in range(SAMPLES)}):
            file.seek(start)
            hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()[:16]


def digest_files(folder: Path, files: Sequence[Path]) -> list[str]:
    """Returns a digest of each file's whole content; `folder` remembers those of files that are as they were.

    Raises:
        UserError: A file changes while it is read.
    """
    paths = [str(Path(file).resolve()) for file in files]
    states, memo = {path: _state(path) for path in paths}, _read_memo(folder)
    known = {path: memo[path][-1] for path in states if path in memo and memo[path][:-1] == states[path]}
    new = _digest_contents([path for path in states if path not in known])
    for path in new:
        if _state(path) != states[path]:
            raise UserError(f"{path}: changed while it was read; start again when it is complete")
    _remember(folder, {path: [*states[path], digest] for path, digest in new.items()})
    return [(known | new)[path] for path in paths]


def _state(path: str) -> list[int]:
    """What changes when a file does. ctime cannot be set back, as mtime can."""
    found = os.stat(path)
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino]


def _remember(folder: Path, found: dict[str, list]) -> None:
    now = time.time_ns()
    settled = {path: state for path, state in found.items() if now - max(state[:2]) > SETTLED_NS}
    if settled:
        with suppress(OSError):  # only a memo: another run reads the files again
            folder.mkdir(parents=True, exist_ok=True)
            write_text(folder / MEMO, json.dumps(_read_memo(folder) | settled, indent=1), durable=True)


def _read_memo(folder: Path) -> dict[str, list]:
    try:
        memo = json.loads((folder / MEMO).read_text())
        return {path: list(state) for path, state in memo.items() if len(state) == 5}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _digest_contents(paths: list[str]) -> dict[str, str]:
    """Returns SHA-256 of a file's size and its blocks' SHA-256, by path."""
    sizes = {path: os.stat(path).st_size for path in paths}
    total, digests = sum(sizes.values()), {}
    with (
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,  # reading and hashing release the GIL
        Progress("reading weights", total, in_bytes=True, shown=total >= 2**30) as progress,
    ):
        for path, size in sizes.items():
            whole = hashlib.sha256(str(size).encode())
            for digest, num_bytes in pool.map(partial(_digest_block, path), range(0, size, BLOCK_BYTES)):
                whole.update(digest)
                progress.update(num_bytes)
            digests[path] = whole.hexdigest()
    return digests


def _digest_block(path: str, start: int) -> tuple[bytes, int]:
    """Returns SHA-256 of one block, and its length."""
    hashed, buffer, left = hashlib.sha256(), memoryview(bytearray(2**20)), BLOCK_BYTES
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[:left])):
            hashed.update(buffer[:count])
            left -= count
    return hashed.digest(), BLOCK_BYTES - left
