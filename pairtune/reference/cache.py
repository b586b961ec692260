"""What a frozen reference says of pairs, kept on the disk: one pass serves every run with the same reference and pairs.

Found by content, never by names. An entry belongs to what `identify` says: the bytes of the weight files, and of an
adapter with its scale; the builder's arguments, windows, dtypes, quantization and fp8; ld_alpha and score_end. A
value in it belongs to the tokens of a pair. So runs that differ in beta, learning rate, loss or seed share it, full
and LoRA alike, and another template, tokenizer or length limit finds nothing. What changes rounding only (attention,
compile, sharding, which pairs share a batch) is not part of it. A builder's code is not either: a few values are
computed again when an entry is read, see `ReferenceCache.check`; not by a second model that no value needs.

An entry is a folder. entry.json tells people what it is of. values.bin holds records with a checksum each, appended
under a lock: a kill leaves a record whole or invalid, and an invalid one is no value.

P pairs, N distinct pairs.
"""

import fcntl
import hashlib
import json
import math
import mmap
import os
import random
import re
import struct
import time
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from pairtune.errors import UserError
from pairtune.files import entries, remove_entries, write_text
from pairtune.folders.digests import digest_files
from pairtune.models.adapters import adapted_modules, plain_name
from pairtune.models.additions import additions
from pairtune.models.bridge import BridgedDecoder
from pairtune.models.bridge.build import settings
from pairtune.pairs.at_once import lengths_of, take
from pairtune.pairs.digests import digest_each
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World

VERSION = 1  # part of every key: raise it when log-probabilities or records change
ENTRY, VALUES = "entry.json", "values.bin"
KEY = re.compile(r"[0-9a-f]{16}")
RECORD = struct.Struct("<16sff8s")  # a pair's digest, chosen, rejected, checksum
FLUSH_EVERY = 32  # micro-batches: what a kill costs
BATCHES = 4  # of training that are scored at a time: without gradients little is kept
# Absolute and relative, of a sum in nats: how far rounding goes when a batch is put together in another way.
TOLERANCE = {"torch.float32": (0.01, 1e-4), "torch.bfloat16": (0.5, 0.01)}


def find_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns where entries are: `cache_dir`, or ~/.cache/pairtune/reference, below XDG_CACHE_HOME if that is set."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairtune" / "reference"


# Which reference


@dataclass(frozen=True)
class Identity:
    """What a reference is."""

    content: dict  # everything that its log-probabilities depend on, as JSON can hold it
    made_of: str  # for people, and not part of the key

    @property
    def key(self) -> str:
        """The name of its entry."""
        return hashlib.sha256(json.dumps(self.content, sort_keys=True).encode()).hexdigest()[:16]


def identify(
    folder: Path,
    model: nn.Module,
    world: World,
    *,
    component: dict,
    weight_files: Sequence[Path],
    adapter_files: Sequence[Path] = (),
    ld_alpha: float = 1.0,
    score_end: bool = True,
) -> Identity:
    """Returns the identity of a frozen reference. The main process reads every byte of its files, once.

    Args:
        folder: Of the cache; it remembers digests of files that have not changed.
        model: As it is built, before `models.load`: its parameters tell dtypes and what is quantized.
        component: The config's `model` block.
        adapter_files: Of the adapter that the reference has. Without one, a LoRA model is taken for its base.
        ld_alpha: As for logps.answer_logps.
        score_end: As for batch.lay_out.
    """
    files = [*weight_files, *adapter_files]
    digests = _from_main_patiently(world, partial(digest_files, folder, files), "reading weights")
    arguments = OmegaConf.to_container(component, resolve=True) if OmegaConf.is_config(component) else component
    parameters = {plain_name(name): p for name, p in model.named_parameters()}
    scales = {layer.alpha / layer.rank for _, layer in adapted_modules(model)} if adapter_files else set()
    content = {
        "version": VERSION,
        "weights": sorted(digests[: len(weight_files)]),
        "adapter": sorted(digests[len(weight_files) :]),
        "adapter_scales": sorted(scales),
        "model": settings(model.lm.config) if isinstance(model, BridgedDecoder) else dict(arguments),
        "dtypes": sorted({str(p.dtype) for p in parameters.values()}),
        "quantized": sorted(name for name, p in parameters.items() if type(p.data) is not Tensor),
        "ld_alpha": float(ld_alpha),
        "score_end": score_end,
    }
    if additions(model).fp8:
        content["fp8"] = additions(model).fp8
    if any(windows := additions(model).windows):  # they are in config.json, not among weights or arguments
        content["windows"] = windows
    return Identity(content, made_of=str(Path(weight_files[0]).resolve().parent))


def _from_main_patiently(world: World, work, doing: str):
    """Returns what `work()` returns in the main process, in each; no watchdog takes a long wait for a standstill."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(work) if world.is_main else None
        while not world.agree(future is not None and bool(futures.wait([future], timeout=5).done)):
            world.beat(doing)
        return world.agree(future.result() if future else None)


# Values of pairs


class ReferenceCache:
    """Reference log-probabilities of a run's pairs: those on the disk, and those that this run adds.

    Every process has the same pairs and calls every method but `__call__` equally often; all of them have all values,
    the main process alone touches the disk. The pass over what is missing stands in the recipe, which goes through
    `unanswered` of its reference and lets it `keep` what each answer came to.
    """

    def __init__(self, folder: Path, identity: Identity, pairs: Sequence[Pair], world: World):
        """
        Raises:
            UserError: The entry is damaged, or values are missing and it cannot be written.
        """
        self._folder, self._identity, self._world = folder, identity, world
        last = {digest: i for i, digest in enumerate(digest_each(pairs))}  # equal pairs have one value
        self._digests, self._pairs = list(last), take(pairs, list(last.values()))
        self._index = {digest: i for i, digest in enumerate(self._digests)}
        fold = hashlib.sha256(b"".join(self._digests)).digest()
        if world.agree(fold) != fold:
            raise UserError("dataset: processes read different pairs; give each machine the same files")
        self._table = self._read()  # [2, N] float32 on the CPU, chosen and rejected; NaN where there is none
        self._stored = self._known().nonzero()[:, 0].tolist()  # of earlier runs
        self._pending: list[tuple[list[int], Tensor]] = []  # indices, and [2, P] on the device
        self._num_puts = 0
        if world.is_main and not self._known().all():
            append(folder, identity, {})  # a folder that cannot be written shows before the pass

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def missing(self) -> Sequence[Pair]:
        """The distinct pairs without a value, longest first: alike in a batch, and what does not fit shows at once."""
        pairs = take(self._pairs, (~self._known()).nonzero()[:, 0].tolist())
        return take(pairs, np.argsort(-lengths_of(pairs).sum(0), kind="stable"))

    def put(self, pairs: list[Pair], chosen: Tensor, rejected: Tensor) -> None:
        """Takes the values [P] of a micro-batch, which may be empty. From time to time they go to the disk.

        Raises:
            UserError: A value is not finite, or the disk cannot be written.
        """
        self._pending.append((self._indices(pairs), torch.stack([chosen, rejected]).detach().float()))
        self._num_puts += 1
        if self._num_puts % FLUSH_EVERY == 0:
            self._flush()

    def complete(self) -> None:
        """Puts every value on the disk, and takes those that are there: a run that is resumed has the same ones."""
        self._flush()
        stored = self._read()  # a run beside this one may have been first
        self._table = torch.where(stored.isnan(), self._table, stored)
        assert self._known().all(), "complete() comes after a pass over all of `missing`"

    def __call__(self, pairs: list[Pair]) -> tuple[Tensor, Tensor]:
        """Returns log-probabilities of the chosen and of the rejected answers, each [P] float32 on the device."""
        values = self._table[:, torch.tensor(self._indices(pairs), dtype=torch.long)]
        assert not values.isnan().any(), "values are asked for before complete()"
        chosen, rejected = values.to(self._world.device)
        return chosen, rejected

    def samples(self, count: int) -> list[Pair]:
        """Returns at most `count` pairs whose values an earlier run has left, others in each run: for `check`."""
        chance = random.SystemRandom()  # not the run's generators: looking must not change what is trained
        chosen = chance.sample(self._stored, min(count, len(self._stored))) if self._world.is_main else None
        return [self._pairs[i] for i in self._world.agree(chosen)]

    def check(self, pairs: list[Pair], chosen: Tensor, rejected: Tensor) -> None:
        """Compares values [P] that were computed now with those of the cache.

        Raises:
            UserError: One is further off than rounding goes. It names the pair and the way out.
        """
        dtypes = TOLERANCE.keys() & self._identity.content["dtypes"]  # a base in 8 bits has those of its bytes, too
        absolute, relative = max(TOLERANCE[dtype] for dtype in dtypes)
        found = []
        stored = self._table[:, torch.tensor(self._indices(pairs), dtype=torch.long)]
        for name, values, computed in zip(("chosen", "rejected"), stored.tolist(), (chosen, rejected), strict=True):
            for pair, value, now in zip(pairs, values, computed.tolist(), strict=True):
                allowed = absolute + relative * abs(value)
                if not abs(value - now) <= allowed:
                    found.append(f"row {pair.row}: {name} {value:.3f} there, {now:.3f} now, {allowed:.3f} is rounding")
        found = self._world.gather(found)
        if found:
            raise UserError(
                f"reference cache {self._folder / self._identity.key}: is not of this reference: {found[0]}. Its file "
                f"or a builder has changed: {_way_out(self._folder, self._identity.key)}"
            )

    def _indices(self, pairs: list[Pair]) -> list[int]:
        digests = digest_each(pairs)
        assert self._index.keys() >= set(digests), "a pair that the cache was not opened with"
        return [self._index[digest] for digest in digests]

    def _known(self) -> Tensor:
        return ~self._table.isnan().any(0)  # [N]

    def _read(self) -> Tensor:
        """Returns what is on the main process's disk, [2, N]."""
        stored = read(self._folder, self._identity.key) if self._world.is_main else {}
        none = (math.nan, math.nan)
        values = [stored.get(digest, none) for digest in self._digests]
        return self._world.from_main(torch.tensor(values, dtype=torch.float32).reshape(-1, 2).T)

    def _flush(self) -> None:
        indices = [i for micro, _ in self._pending for i in micro]
        values = torch.cat([v for _, v in self._pending], 1).T.tolist() if self._pending else []
        self._pending = []
        found = self._world.gather(list(zip(indices, map(tuple, values), strict=True)))
        for i, answers in found:
            if not all(map(math.isfinite, answers)):
                raise UserError(
                    f"reference: row {self._pairs[i].row} has log-probabilities {answers}, which are not finite; look "
                    "at this row and at the weights, or use dtype=fp32"
                )
        if found:
            self._table[:, [i for i, _ in found]] = torch.tensor([answers for _, answers in found]).T
        if self._world.is_main and found:
            append(self._folder, self._identity, {self._digests[i]: answers for i, answers in found})


# The disk


def append(folder: Path, identity: Identity, values: dict[bytes, tuple[float, float]]) -> None:
    """Adds values of pairs, by digest, to an entry, which it makes if there is none; on the disk when it returns."""
    entry = folder / identity.key
    try:
        entry.mkdir(parents=True, exist_ok=True)
        if not (entry / ENTRY).exists():
            content = json.dumps({"made_of": identity.made_of, **identity.content}, indent=1)
            write_text(entry / ENTRY, content, durable=True)
    except OSError as error:
        raise _unusable(entry, error) from None
    with _locked(entry / VALUES, "a+b", fcntl.LOCK_EX) as file:
        file.truncate(_end(file, identity.key))  # of what a kill has left
        for digest, answers in values.items():
            file.write(_pack(identity.key, digest, *answers))
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path, key: str) -> dict[bytes, tuple[float, float]]:
    """Returns an entry's values by the digests of their pairs; of several values of a pair, the first.

    What is invalid at the end was never finished, and is left out.

    Raises:
        UserError: The file is damaged: an invalid record stands before a valid one.
    """
    path, found, invalid = folder / key / VALUES, {}, None
    if not path.exists():
        return found
    with _locked(path, "rb", fcntl.LOCK_SH) as file:
        num_records = os.fstat(file.fileno()).st_size // RECORD.size
        if not num_records:  # nothing cannot be mapped
            return found
        with mmap.mmap(file.fileno(), num_records * RECORD.size, access=mmap.ACCESS_READ) as mapped:
            for number in range(num_records):
                record = mapped[number * RECORD.size : (number + 1) * RECORD.size]
                if not _is_valid(key, record):
                    invalid = number if invalid is None else invalid
                elif invalid is not None:
                    raise UserError(f"{path}: record {invalid} is damaged: {_way_out(folder, key)}")
                else:
                    digest, chosen, rejected, _ = RECORD.unpack(record)
                    found.setdefault(digest, (chosen, rejected))
    return found


def _pack(key: str, digest: bytes, chosen: float, rejected: float) -> bytes:
    record = RECORD.pack(digest, chosen, rejected, bytes(8))
    return record[:-8] + _checksum(key, record)


def _checksum(key: str, record: bytes) -> bytes:
    return hashlib.blake2b(record[:-8], digest_size=8, key=key.encode()).digest()  # no record fits another entry


def _is_valid(key: str, record: bytes) -> bool:
    return record[-8:] == _checksum(key, record)


def _end(file, key: str) -> int:
    """Returns where the last valid record ends."""
    size = os.fstat(file.fileno()).st_size // RECORD.size * RECORD.size
    while size:
        file.seek(size - RECORD.size)
        if _is_valid(key, file.read(RECORD.size)):
            break
        size -= RECORD.size
    return size


@contextmanager
def _locked(path: Path, mode: str, kind: int) -> Iterator:
    try:
        with path.open(mode) as file:
            fcntl.flock(file, kind)  # closing it unlocks
            yield file
    except OSError as error:
        raise _unusable(path, error) from None


def _unusable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"reference.cache_dir: {path}: {error.strerror or error}; name a folder with room on a disk that can be "
        "written and locked"
    )


def _way_out(folder: Path, key: str) -> str:
    where = "" if folder == find_folder() else f" --cache-dir {folder}"
    return f"`tune cache rm {key}{where}` removes the entry, and the next run computes it anew"


# `tune cache`


def table(folder: Path) -> str:
    """Returns what `tune cache ls` prints: a line an entry, the one that was written last on top."""
    lines = [_line(entry) for entry in sorted(entries(folder, KEY), key=_written, reverse=True)]
    if not lines:
        return f"{folder} holds no entry"
    return "\n".join([f"{folder}", f"{'KEY':16} {'PAIRS':>9} {'KiB':>9}  {'WRITTEN':16}  MODEL", *lines])


def remove(folder: Path, keys: Sequence[str]) -> list[str]:
    """Removes entries, all of them if no key is named: files.remove_entries."""
    return remove_entries(folder, KEY, keys)


def _written(entry: Path) -> float:
    path = entry / VALUES
    return (path if path.exists() else entry).stat().st_mtime


def _line(entry: Path) -> str:
    size = sum(path.stat().st_size for path in entry.iterdir()) / 2**10
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(_written(entry)))
    try:
        pairs = f"{len(read(entry.parent, entry.name)):,}"
        content = json.loads((entry / ENTRY).read_text())
        dtypes = ", ".join(dtype.removeprefix("torch.") for dtype in content["dtypes"])
        model = f"{content['made_of']} ({dtypes}{', quantized' if content['quantized'] else ''})"
    except FileNotFoundError:
        pairs, model = "lacking", f"{ENTRY} is missing: it was moved or removed"
    except (OSError, ValueError, KeyError):  # a UserError is a ValueError
        pairs, model = "damaged", "?"
    return f"{entry.name:16} {pairs:>9} {size:9,.1f}  {written:16}  {model}"
