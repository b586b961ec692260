"""Rows of a preference dataset: read from a file, a folder or the Hugging Face Hub, under our column names."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import datasets

from pairtune.errors import UserError
from pairtune.pairs.cells import read_literal, without_nulls
from pairtune.pairs.columns import Renaming, as_plain, check_columns, look_up, unpacked
from pairtune.pairs.files import read_file
from pairtune.pairs.folders import Shards, files_of_splits, read_folder, read_hub
from pairtune.pairs.formats import OUR_COLUMNS
from pairtune.pairs.sampling import is_large, sample_file
from pairtune.pairs.sources import check_source

_FIRST, _LOOKED_AT = 10, 1_000
MESSAGES_OF_TREES = {"message_id", "parent_id", "text", "role", "rank"}  # Open Assistant's, a message a row


class Rows(Sequence):
    """Rows of a source, in its order, as dicts under our column names.

    Messages that are written as text in a cell, and an optional message key that Arrow fills with null, are read as
    what they were.

    Args:
        data: A datasets.Dataset, folders.Shards or a list of dicts.
        columns: Our names to theirs, for columns that have another name; None leaves a column out. See layouts.py.
        numbers: Index in the source of each row, where it is not its index in `data`.
        key: Where the config describes the rows, for messages.

    Attributes:
        total: Rows of the source, where these are a sample of it; `is_counted`: it is no estimate.
    """

    def __init__(self, data, *, source: str = "rows", columns: dict | None = None, numbers=None, key: str = "dataset"):
        self.source, self.total, self.is_counted = source, len(data), True
        self.numbers = range(len(data)) if numbers is None else numbers
        self._data = data
        self._is_arrow = not isinstance(data, list)
        self.found = getattr(data, "column_names", None) or list(dict.fromkeys(chain.from_iterable(data)))
        self.columns = as_plain(columns)
        check_columns(self.columns, self.found, OUR_COLUMNS, source, key)
        self._renaming = Renaming(self.columns, self.found)
        self.column_names = self._renaming.names

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        return self._read(self._data[index])

    def __iter__(self) -> Iterator[dict]:
        return map(self._read, self._data)

    def _read(self, row: dict) -> dict:
        row = {name: without_nulls(cell) for name, cell in row.items()} if self._is_arrow else row
        return self._renaming(unpacked(row))

    def first(self, count: int) -> "Rows":
        """Returns the first rows."""
        count = min(count, len(self))
        return self._with(_part(self._data, 0, count), self.columns, self.numbers[:count])

    def under(self, columns: dict) -> "Rows":
        """Returns the rows under other names of columns, which have been checked."""
        return self._with(self._data, columns, self.numbers)

    def cells(self, column: str) -> Iterator:
        """Yields what a column of theirs, which may be a dotted name, holds in all rows."""
        if isinstance(self._data, datasets.Dataset) and column in self.found:
            yield from self._data[column]
        else:
            yield from (look_up(row, column) for row in self._data)

    def written_as_text(self) -> list[str]:
        """Returns the columns of theirs that hold messages as text in the first rows."""
        first = _part(self._data, 0, min(_FIRST, len(self)))
        return list(
            dict.fromkeys(name for row in first for name, cell in unpacked(row).items() if cell is not row[name])
        )

    def beside_parts(self) -> dict[str, list]:
        """Returns what objects hold beside the parts that `columns` names: dotted names of theirs, and what is there in
        the first rows."""
        used: dict[str, set[str]] = {}
        for path in self._renaming.paths:
            head, dot, rest = path.partition(".")
            if dot and head in self.found:
                used.setdefault(head, set()).add(rest.partition(".")[0])
        parts: dict[str, list] = {}
        for row in _part(self._data, 0, min(_LOOKED_AT, len(self))) if used else ():
            for head, keys in used.items():
                cell = read_literal(row[head]) if isinstance(row.get(head), str) else row.get(head)
                for key in cell.keys() - keys if isinstance(cell, dict) and "*" not in keys else ():
                    parts.setdefault(f"{head}.{key}", []).append(cell[key])
        return parts

    def place(self, index: int) -> str:
        """Returns where a row of these is, in words: its source, or of a folder its file, and its number there."""
        if isinstance(self._data, Shards):
            return self._data.place(index)
        return f"{self.source}, row {self.numbers[index]} (from 0)"

    def _with(self, data, columns: dict, numbers) -> "Rows":
        other = object.__new__(Rows)
        vars(other).update(vars(self) | {"_data": data, "columns": columns, "numbers": numbers})
        other._renaming = Renaming(columns, self.found)
        other.column_names = other._renaming.names
        return other


def read_rows(
    source: str,
    *,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    columns: dict | None = None,
    revision: str | None = None,
    sample: int | None = None,
    key: str = "dataset",
) -> Rows:
    """Returns the rows of a file, a folder or a Hub dataset. Nothing of a local source is cached.

    Args:
        source: A .json, .jsonl or .csv file (each also .gz), a .parquet file, a folder of such files or one written by
            save_to_disk; anything else is a Hub id, ORG/NAME.
        split: As in `datasets`, slices included: train[:90%]. A single file is all "train".
        name, revision: Configuration and version of a Hub dataset.
        limit: The first so many rows, after the split.
        columns: Our names to theirs, such as {"prompt": "question"}; None leaves a column out. See layouts.py.
        sample: Of a large file or folder, so many of the first rows and as many of the others are enough.
        key: Where the config describes these rows, for messages.

    Raises:
        UserError: There is no such source, split or column, or a row cannot be read: file and line are named.
    """
    path = Path(source).expanduser()
    check_source(source, key)
    if limit is not None and limit < 1:
        raise UserError(f"{key}.limit={limit}: must be at least 1, or null for all rows.")
    if name is not None and path.is_file():
        raise UserError(f"{key}.name={name} has no effect on {source}. Remove it.")
    if revision is not None and path.exists():
        raise UserError(f"{key}.revision={revision} has no effect on {source}. Remove it.")
    if sample and path.exists() and is_large(path):
        rows = _read_sample(path, source, split, name=name, limit=limit, columns=columns, count=sample, key=key)
        if rows is not None:
            return rows
    if path.is_file():
        splits = {"train": read_file(path, key)}
    else:
        splits = read_folder(path, name, key) if path.is_dir() else read_hub(source, name, revision, key)
    data, numbers = _slice(splits, split, source, key)
    if limit is not None:
        data, numbers = _part(data, 0, min(limit, len(data))), numbers[:limit]
    return Rows(data, source=source, columns=columns, numbers=numbers, key=key)


def _read_sample(path: Path, source: str, split: str, *, name, limit, columns, count: int, key: str) -> Rows | None:
    """Returns a sample of a large source's rows; None where all have to be read."""
    files = {"train": [path]} if path.is_file() else files_of_splits(path, name, key)
    if files is None:
        return None
    runs, sizes, is_counted = {}, dict.fromkeys(files, 0), True  # runs of a split: file, rows, first in file, in split
    for part, paths in files.items():
        runs[part] = []
        for file in paths:
            found = sample_file(file, key, -(-count // len(paths)))
            if found is None:
                return None
            runs[part] += [(file, rows, first, sizes[part] + first) for rows, first in found.runs]
            sizes[part], is_counted = sizes[part] + found.total, is_counted and found.is_counted
    parts, numbers, total = [], [], 0
    for wanted in _wanted(split, sizes, source, key):
        stop = wanted.to if limit is None else min(wanted.to, wanted.from_ + limit - total)
        for file, rows, first, number in runs[wanted.splitname]:
            low, high = max(wanted.from_ - number, 0), min(stop - number, len(rows))
            if low < high:
                parts.append((file, _part(rows, low, high), first + low))
                numbers += range(number + low, number + high)
        total += max(0, stop - wanted.from_)
    if not parts:
        return None
    is_plain = path.is_file() and isinstance(parts[0][1], list)
    data = list(chain.from_iterable(rows for _, rows, _ in parts)) if is_plain else Shards(parts)
    found = Rows(data, source=source, columns=columns, numbers=numbers, key=key)
    if set(found.found) >= MESSAGES_OF_TREES:  # a row is part of a conversation
        return None
    found.total, found.is_counted = total, is_counted
    return found


def _wanted(split: str, sizes: dict[str, int], source: str, key: str) -> list:
    """Returns the parts of splits that a `split` asks for, each with `splitname`, `from_` and `to`."""
    try:
        return datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        told = ", ".join(f"{name} ({size:,} rows)" for name, size in sizes.items())
        raise UserError(f"{key}.split={split!r} does not fit {source}, which has {told}: {error}") from error


def _slice(splits: dict[str, Sequence], split: str, source: str, key: str) -> tuple[Sequence, list[int]]:
    """Returns a split's rows and their numbers in the source."""
    parts = _wanted(split, {name: len(data) for name, data in splits.items()}, source, key)
    pieces = [_part(splits[part.splitname], part.from_, part.to) for part in parts]
    numbers = [number for part in parts for number in range(part.from_, part.to)]
    if isinstance(pieces[0], list):
        return list(chain.from_iterable(pieces)), numbers
    if isinstance(pieces[0], Shards):
        return Shards(list(chain.from_iterable(piece.parts for piece in pieces))), numbers
    return datasets.concatenate_datasets(pieces), numbers


def _part(data, start: int, stop: int):
    return data[start:stop] if isinstance(data, list) else data.select(range(start, stop))
