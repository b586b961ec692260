"""A source's rows one after the other, from any place in it: nothing is held but the row. files.py reads whole files.

A position is what JSON can hold, and is handed over with each row: from there the next one is read.
"""

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import datasets
import pyarrow.parquet

from pairtune.errors import UserError
from pairtune.pairs.cells import without_nulls
from pairtune.pairs.files import MEND, as_row, check_cells, check_commas, check_names, kind_of_file, opened, parse_line
from pairtune.pairs.folders import cause, files_of_splits, open_hub, open_other
from pairtune.pairs.sources import check_source

CHUNK = 2**20  # characters of a list of JSON that are read at a time
AT_ONCE = 64  # rows of a parquet file
_BEFORE_ENTRY = re.compile(r"\s*\[\s*(?P<end>\])?"), re.compile(r"\s*(?:,|(?P<end>\]))")  # the first, any other
_BLANK = re.compile(r"\s*")
Shard = Callable[[object], Iterator[tuple[dict, object]]]  # from a position, None for its beginning, to rows and theirs


def shards_of(source: str, *, split: str, name: str | None, revision: str | None, key: str) -> dict[str, Shard]:
    """Returns what a file, a folder or a Hub data set is read from, in order, by what it is called in messages.

    Raises:
        UserError: There is no such source or split, or the split is a part that only a count of rows could tell.
    """
    check_source(source, key)
    path = Path(source).expanduser()
    if any(mark in split for mark in "[+"):
        raise UserError(
            f"{key}.split={split!r}: a part of a split is told by the number of its rows, and a stream is not counted; "
            "name a whole split, and the first rows of it by limit"
        )
    splits = {"train": [path]} if path.is_file() else None
    splits = files_of_splits(path, name, key) if path.is_dir() else splits
    if splits is None:
        rows = open_other(path, name, key) if path.is_dir() else open_hub(source, name, revision, key)
        return {source: _of_dataset(_of_split(rows, split, source, key), f"{key}.source={source}")}
    return {str(file): _of_file(file, key) for file in _of_split(splits, split, source, key)}


def first_rows(shards: Mapping[str, Shard], count: int) -> list[dict]:
    """Returns a source's first rows."""
    return list(islice((row for shard in shards.values() for row, _ in shard(None)), count))


def _of_split(splits, split: str, source: str, key: str):
    if split not in splits:
        raise UserError(f"{key}.split={split!r}: {source} has {', '.join(map(str, splits))}")
    return splits[split]


def _of_file(path: Path, key: str) -> Shard:
    kind = kind_of_file(path, key)

    def read(position) -> Iterator[tuple[dict, object]]:
        try:
            if kind == ".parquet":
                yield from _parquet(path, position or 0)
            elif kind == ".csv":
                yield from _csv(path, position or [0, 0])
            elif kind == ".json" and _begins_with(path) == "[":
                yield from _json_list(path, position or 0)
            else:
                yield from _lines(path, position or [0, 0])
        except UserError:
            raise
        except (OSError, EOFError, ValueError, csv.Error) as error:  # arrow's are of these types, too
            raise UserError(f"{key}.source={path} cannot be read: {error}") from error

    return read


def _of_dataset(rows, where: str) -> Shard:
    """What `datasets` reads: a folder that it has written, or a data set of the Hub; `where` names it in messages."""

    def indexed(position) -> Iterator[tuple[dict, object]]:
        for index in range(position or 0, len(rows)):
            yield _plain(rows[index]), index + 1

    def streamed(position) -> Iterator[tuple[dict, object]]:
        first = rows.skip(0)  # another one of its own state
        if position is not None:
            first.load_state_dict(position)
        try:
            for row in first:
                yield _plain(row), first.state_dict()
        except Exception as error:  # boundary: errors of network, permission and readers have no common type
            raise UserError(
                f"{where}: the rows cannot be read on: {cause(error)}. If the network failed, start the same run "
                "again: it goes on from its last checkpoint. Else mend the file, or take it out"
            ) from error

    return indexed if isinstance(rows, datasets.Dataset) else streamed


def _plain(row: dict) -> dict:
    return {name: without_nulls(cell) for name, cell in row.items()}


def _begins_with(path: Path) -> str:
    with opened(path) as file:
        while line := file.readline(CHUNK):
            if text := line.decode("utf-8-sig", errors="replace").strip():
                return text[0]
    return ""


def _lines(path: Path, position: list[int]) -> Iterator[tuple[dict, list[int]]]:
    """Positions: bytes and lines."""
    at, number = position
    with opened(path) as file:
        file.seek(at)
        for line in file:
            at, number = at + len(line), number + 1
            if not line.isspace():
                yield parse_line(line.decode("utf-8-sig" if number == 1 else "utf-8"), path, number), [at, number]


def _csv(path: Path, position: list[int]) -> Iterator[tuple[dict, list[int]]]:
    """Positions: bytes and lines; the header is read each time."""
    csv.field_size_limit(2**31 - 1)
    read = [0, 0]
    with opened(path) as file:

        def lines() -> Iterator[str]:
            while line := file.readline():
                read[:] = read[0] + len(line), read[1] + 1
                yield line.decode("utf-8-sig" if read[1] == 1 else "utf-8")

        names = next(csv.reader(lines(), strict=True), [])
        check_names(names, f"{path}, line 1")
        check_commas(names, f"{path}, line 1")
        if position[0]:
            file.seek(position[0])
            read[:] = position
        for row in csv.DictReader(lines(), names, strict=True):
            check_cells(row, f"{path}, line {read[1]}")
            yield row, list(read)


def _json_list(path: Path, position: int) -> Iterator[tuple[dict, int]]:
    """Positions: rows; those before are read again."""
    for number, row in enumerate(_entries(path)):
        if number >= position:
            yield as_row(row, f"{path}, row {number} (from 0)"), number + 1


def _entries(path: Path) -> Iterator:
    """Yields what a list of JSON holds; of the text no more is held than is needed for the next entry."""
    decoder, number, held, at, size = json.JSONDecoder(object_pairs_hook=_once), 0, "", 0, CHUNK
    with opened(path) as file, io.TextIOWrapper(file, "utf-8-sig") as text:
        while True:
            try:
                begun = _BEFORE_ENTRY[number > 0].match(held, at)
                if begun is None:
                    raise json.JSONDecodeError("expected '[', ',' or ']'", held, _BLANK.match(held, at).end())
                if begun["end"]:
                    return
                entry, end = decoder.raw_decode(held, _BLANK.match(held, begun.end()).end())
            except UserError as error:
                raise UserError(f"{path}, row {number} (from 0): invalid JSON, {error}. {MEND}") from error
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(held) - 16 or error.msg.startswith("Unterminated")
                more = text.read(size) if is_cut else ""
                if not more:
                    raise UserError(f"{path}, row {number} (from 0): invalid JSON, {error.msg}. {MEND}") from error
                held, at, size = held[at:] + more, 0, 2 * size
                continue
            yield entry
            number, size = number + 1, CHUNK
            held, at = (held[end:], 0) if end > CHUNK else (held, end)


def _once(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise UserError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return row


def _parquet(path: Path, position: int) -> Iterator[tuple[dict, int]]:
    """Positions: rows. Of a row group, pages are read one after the other."""
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as file:
        check_names(file.schema_arrow.names, str(path))
        number = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if number + count <= position:
                number += count
                continue
            for batch in file.iter_batches(AT_ONCE, row_groups=[group], use_threads=False):
                first = max(0, position - number)
                if first < len(batch):
                    batch.validate(full=True)  # text that is not UTF-8
                    for offset, row in enumerate(batch.slice(first).to_pylist(), number + first + 1):
                        yield _plain(row), offset
                number += len(batch)
