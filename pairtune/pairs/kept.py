"""Tokens of rows, kept on the disk: rendered and tokenized once for all runs, processes and machines that share it.

Found by content, never by names. An entry belongs to all that makes tokens of a row: the tokenizer with its template
and options, the limits, and the code that reads rows and writes tokens. In it a row is found by a digest of what it
holds: one that was changed is tokenized again, alone. A reading of a whole source is kept, too, so that the next start
need not read its rows: it belongs to the bytes of the source's files, its split and columns.

An entry is a folder. entry.json tells people what it is of. The other files are Arrow's, mapped and not read, each
whole from its first moment: a name holds the digest of the bytes. One that is not as its name says is damaged: it is
removed, said, and its rows are tokenized again. Of several processes that lack the same rows, one fills the entry and
the others wait.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyarrow as pa

from pairtune.errors import UserError
from pairtune.files import entries, remove_entries, write_bytes, write_text
from pairtune.pairs.packed import PackedPairs, Table

ENTRY, LOCK = "entry.json", "lock"
PREFIX = "tokens-"
KEY = re.compile(rf"{PREFIX}[0-9a-f]{{16}}")
ROWS, READING = "rows", "reading"  # kinds of files
ANY = -1  # the number of a row whose number does not matter: nothing else that a report counts is negative
LIBRARIES = ("tokenizers", "jinja2", "torchtune", "datasets", "pyarrow")


def find_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns where entries are: `cache_dir`, or ~/.cache/pairtune/tokens, below XDG_CACHE_HOME if that is set."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pairtune" / "tokens"


@dataclass(frozen=True)
class Reading:
    """What became of a whole source."""

    pairs: PackedPairs
    told: dict  # as it was given to `keep_reading`


class KeptTokens:
    """An entry. Where the disk fails it, it says so and keeps no more, unless its folder was asked for by name.

    Attributes:
        tables: What is kept, and what was added.
        known: A row's digest to its table, by index, and its place there.
    """

    def __init__(self, folder: Path, content: dict, *, made_of: str, key: str | None = None):
        """
        Args:
            folder: From find_folder.
            content: All that tokens of a row depend on, but for the row and how it is read, as JSON can hold it.
            made_of: For people.
            key: The config's key that names the folder, if it does: what it cannot do is an error then.
        """
        self._content = content | {"code": _digest_code()}
        digest = hashlib.sha256(json.dumps(self._content, sort_keys=True).encode()).hexdigest()
        self.path = folder / f"{PREFIX}{digest[:16]}"
        self._made_of, self._key, self._salt, self._is_off = made_of, key, b"", False
        self.tables: list[Table] = []
        self.known: dict[bytes, tuple[int, int]] = {}

    @contextmanager
    def filling(self, waits: Callable[[], None]) -> Iterator[None]:
        """Enters when no other process fills the entry, and reads what it holds then.

        Args:
            waits: Called now and then before.
        """
        lock = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / ENTRY).exists():
                write_text(self.path / ENTRY, json.dumps({"made_of": self._made_of, **self._content}, indent=1))
            lock = (self.path / LOCK).open("a")
            while not _try_lock(lock):
                waits()
                time.sleep(0.1)
            self._open()
        except OSError as error:
            self._failed(error)
        try:
            yield
        finally:
            if lock:
                lock.close()  # which unlocks

    def _open(self) -> None:
        self.tables, self.known = [], {}
        for path in sorted(self.path.glob(f"{ROWS}-*.arrow")):
            if (found := _read(path)) is not None:
                self._take(path.name, found)

    def _take(self, name: str, batch: pa.RecordBatch) -> Table:
        table = Table(batch, name)
        for place, (digest, note) in enumerate(
            zip(*(batch.column(i).to_pylist() for i in ("digest", "note")), strict=False)
        ):
            if is_shared(note):
                self.known.setdefault(digest, (len(self.tables), place))
        self.tables.append(table)
        return table

    def read_by(self, how: Sequence) -> None:
        """Says what rows are read by from here on, besides their own words: their form, and what it is told."""
        self._salt = json.dumps(how, default=repr).encode()

    def digest(self, row: dict) -> bytes:
        """Returns 16 bytes that stand for a row as it is read."""
        return hashlib.blake2b(self._salt + json.dumps(row, default=repr).encode(), digest_size=16).digest()

    def add(self, digests: Sequence[bytes], batch: pa.RecordBatch) -> Table:
        """Keeps the tokens of rows, by their digests, and returns their table; it is on the disk if it has a name."""
        columns = [pa.array(digests, pa.binary(16)), *batch.columns]
        batch = pa.RecordBatch.from_arrays(columns, names=["digest", *batch.schema.names])
        try:
            if not self._is_off:
                path = _write(self.path, ROWS, batch)
                return self._take(path.name, _read(path, trusted=True))
        except OSError as error:
            self._failed(error)
        return self._take("", batch)

    def reading(self, source: str) -> Reading | None:
        """Returns what an earlier run has kept of a whole source.

        Args:
            source: See digest_source.
        """
        for path in self.path.glob(f"{READING}-{source}-*.arrow"):
            try:
                if (found := _read(path)) is not None and (reading := self._reading(found)) is not None:
                    return reading
            except OSError as error:
                self._failed(error)
        return None

    def _reading(self, found: pa.RecordBatch) -> Reading | None:
        told = json.loads(found.schema.metadata[b"told"])
        tables = []
        for name in told.pop("tables"):
            batch = _read(self.path / name) if (self.path / name).exists() else None
            if batch is None:
                return None
            tables.append(Table(batch, name))
        return Reading(PackedPairs(tables, *(column.to_numpy() for column in found.columns)), told)

    def keep_reading(self, source: str, pairs: PackedPairs, told: dict) -> None:
        """Keeps what became of a whole source, if all of its tokens are on the disk.

        Args:
            told: What `reading` has to give back, as JSON can hold it.
        """
        used = sorted(set(pairs.of_table.tolist()))
        names = [pairs.tables[i].name for i in used]
        if self._is_off or not all(names):
            return
        order = np.zeros(len(pairs.tables), np.int32)
        order[used] = range(len(used))
        schema = pa.schema([("of_table", pa.int32()), ("place", pa.int64()), ("row", pa.int64())])
        schema = schema.with_metadata({"told": json.dumps(told | {"tables": names})})
        columns = [pa.array(column) for column in (order[pairs.of_table], pairs.places, pairs.rows)]
        try:
            _write(self.path, f"{READING}-{source}", pa.RecordBatch.from_arrays(columns, schema=schema))
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        why = f"{self.path.parent}: {error.strerror or error}"
        if self._key:
            raise UserError(
                f"{self._key}: {why}; name a folder with room on a disk that can be written and locked, or false"
            ) from None
        if not self._is_off:
            print(f"tokens are not kept for other runs: {why}")
        self._is_off = True


def is_shared(note: str) -> bool:
    """Says whether a row like this one adds the same to a report: a sentence that names the row does not."""
    return f'"{ANY}": ' not in note


def digest_source(path: Path, how: Sequence) -> str | None:
    """Returns 16 digits that stand for the bytes of a file or of a folder's files, and how they are read.

    Returns:
        None where there is no such file, as of a data set of the Hub.
    """
    if not path.exists():
        return None
    hashed = hashlib.blake2b(json.dumps(how, default=repr).encode(), digest_size=8)
    for file in _files(path):
        content = hashlib.blake2b(digest_size=32)
        with file.open("rb") as opened:
            while part := opened.read(2**22):
                content.update(part)
        hashed.update(f"\0{file.relative_to(path)}\0".encode() + content.digest())
    return hashed.hexdigest()


def state_of(path: Path) -> list[tuple]:
    """Returns what changes when a file of a source does; of one that is not on this disk, nothing."""
    found = [file.stat() for file in _files(path)] if path.exists() else []
    return [(f.st_mtime_ns, f.st_ctime_ns, f.st_size, f.st_ino) for f in found]


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


@cache
def _digest_code() -> str:
    """Returns what stands for the code that reads rows and writes tokens, and for the libraries that it calls."""
    room = Path(__file__).parents[1]
    files = sorted(file for name in ("pairs", "tokenizer") for file in (room / name).glob("*.py"))
    hashed = hashlib.sha256(" ".join(map(version, LIBRARIES)).encode())
    for file in files:
        hashed.update(file.read_bytes())
    return hashed.hexdigest()[:16]


# The disk


def _try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(folder: Path, kind: str, batch: pa.RecordBatch) -> Path:
    """Writes a batch under its kind and the digest of its bytes, at once; on the disk when it returns."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content = sink.getvalue()
    folder.mkdir(parents=True, exist_ok=True)  # `tune cache rm` may have come in between
    path = folder / f"{kind}-{_digest(content)}.arrow"
    write_bytes(path, content, durable=True)
    return path


def _read(path: Path, *, trusted: bool = False) -> pa.RecordBatch | None:
    """Returns a file's batch, mapped. One whose bytes are not those of its name is removed, and said: None."""
    try:
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
        if trusted or _digest(content) == path.stem.rpartition("-")[2]:
            return pa.ipc.open_file(content).get_batch(0)
    except FileNotFoundError:  # another process has removed it
        return None
    except (pa.ArrowInvalid, OSError) as error:  # an empty file cannot be mapped
        if isinstance(error, PermissionError):
            raise
    print(f"{path}: is damaged; it is removed, and its rows are tokenized again")
    path.unlink(missing_ok=True)
    return None


def _digest(content) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# `tune cache`


def table(folder: Path) -> str:
    """Returns what `tune cache ls` prints of tokens: a line an entry, the one that was written last on top."""
    lines = [_line(entry) for entry in sorted(entries(folder, KEY), key=_written, reverse=True)]
    if not lines:
        return f"{folder} holds no tokens"
    return "\n".join([f"{folder}", f"{'KEY':23} {'ROWS':>9} {'MiB':>9}  {'WRITTEN':16}  TOKENIZER", *lines])


def remove(folder: Path, keys: Sequence[str]) -> list[str]:
    """Removes entries, all of them if no key is named: files.remove_entries."""
    return remove_entries(folder, KEY, keys)


def _written(entry: Path) -> float:
    return max([path.stat().st_mtime for path in entry.glob("*.arrow")], default=entry.stat().st_mtime)


def _line(entry: Path) -> str:
    size = sum(path.stat().st_size for path in entry.iterdir()) / 2**20
    written = time.strftime("%Y-%m-%d %H:%M", time.localtime(_written(entry)))
    digests: set[bytes] = set()
    for path in entry.glob(f"{ROWS}-*.arrow"):
        with pa.memory_map(str(path)) as file:
            digests.update(pa.ipc.open_file(file).get_batch(0).column("digest").to_pylist())
    try:
        content = json.loads((entry / ENTRY).read_text())
        made_of = f"{content['made_of']} (max_length={content['limits']['max_length']})"
    except (OSError, ValueError, KeyError):
        made_of = f"{ENTRY} is missing or damaged"
    return f"{entry.name:23} {len(digests):9,} {size:9,.1f}  {written:16}  {made_of}"
