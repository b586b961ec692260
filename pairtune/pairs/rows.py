"""Rows of a preference dataset: read from a file, a folder or the Hugging Face Hub, under our column names.

JSON and CSV are read here and not by `datasets`, which guesses types from the values, so that an answer "NA" becomes
null, "12" a number and "2024-01-01" a date, keeps a copy in a cache, and does not say which line is broken.
"""

import csv
import difflib
import gzip
import io
import json
import os
import re
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from pathlib import Path

import datasets
import pyarrow.parquet
from huggingface_hub import utils as hub_utils

from pairtune.errors import UserError
from pairtune.pairs.formats import CONTEXT, FORMATS, TOOLS
from pairtune.pairs.sources import FILE_TYPES, check_source

MEND = "Mend or remove it."
OUR_COLUMNS = [*dict.fromkeys(name for form in FORMATS for name in [*form.columns, *form.optional]), *CONTEXT, TOOLS]


class Rows(Sequence):
    """Rows of a source, in its order, as dicts under our column names.

    Args:
        data: A datasets.Dataset or a list of dicts.
        columns: Our names to theirs, for columns that have another name; None leaves a column out.
        numbers: Index in the source of each row, where it is not its index in `data`.
        key: Where the config describes the rows, for messages.
    """

    def __init__(self, data, *, source: str = "rows", columns: dict | None = None, numbers=None, key: str = "dataset"):
        self.source = source
        self.numbers = range(len(data)) if numbers is None else numbers
        self._data = data
        found = getattr(data, "column_names", None) or list(dict.fromkeys(chain.from_iterable(data)))
        _check_columns(columns or {}, found, source, key)
        self._theirs = {ours: theirs for ours, theirs in (columns or {}).items() if theirs is not None}
        self._taken = {*(columns or {}), *self._theirs.values()}
        self.column_names = [*self._theirs, *(name for name in found if name not in self._taken)]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict:
        return self._renamed(self._data[index])

    def __iter__(self) -> Iterator[dict]:
        return map(self._renamed, self._data)

    def _renamed(self, row: dict) -> dict:
        if not self._taken:
            return row
        ours = {ours: row.get(theirs) for ours, theirs in self._theirs.items()}
        return ours | {name: value for name, value in row.items() if name not in self._taken}


def read_rows(
    source: str,
    *,
    split: str = "train",
    name: str | None = None,
    limit: int | None = None,
    columns: dict[str, str | None] | None = None,
    revision: str | None = None,
    key: str = "dataset",
) -> Rows:
    """Returns the rows of a file, a folder or a Hub dataset. Nothing of a local source is cached.

    Args:
        source: A .json, .jsonl or .csv file (each also .gz), a .parquet file, a folder of such files or one written by
            save_to_disk; anything else is a Hub id, ORG/NAME.
        split: As in `datasets`, slices included: train[:90%]. A single file is all "train".
        name, revision: Configuration and version of a Hub dataset.
        limit: The first so many rows, after the split.
        columns: Our names to theirs, such as {"prompt": "question"}; None leaves a column out.
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
    if path.is_file():
        splits = {"train": _read_file(path, key)}
    else:
        splits = _read_folder(path, name, key) if path.is_dir() else _read_hub(source, name, revision, key)
    data, numbers = _slice(splits, split, source, key)
    if limit is not None:
        data, numbers = _part(data, 0, min(limit, len(data))), numbers[:limit]
    return Rows(data, source=source, columns=columns, numbers=numbers, key=key)


def _check_columns(columns: dict[str, str | None], found: list[str], source: str, key: str) -> None:
    for ours, theirs in columns.items():
        if ours not in OUR_COLUMNS:
            known = ", ".join(OUR_COLUMNS)
            raise UserError(f"{key}.columns.{ours}: no column of ours. {_nearest(ours, OUR_COLUMNS)} Known: {known}.")
        theirs = ours if theirs is None else theirs
        if theirs not in found:
            raise UserError(
                f"{key}.columns.{ours}={theirs}: {source} has no such column. {_nearest(theirs, found)} "
                f"Columns found: {', '.join(found)}."
            )


def _nearest(word, known: list[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else "No name is near it."


def _slice(splits: dict[str, Sequence], split: str, source: str, key: str) -> tuple[Sequence, list[int]]:
    """Returns a split's rows and their numbers in the source."""
    try:
        spec = datasets.ReadInstruction.from_spec(split)
        parts = spec.to_absolute({name: len(data) for name, data in splits.items()})
    except (ValueError, AssertionError) as error:
        sizes = ", ".join(f"{name} ({len(data):,} rows)" for name, data in splits.items())
        raise UserError(f"{key}.split={split!r} does not fit {source}, which has {sizes}: {error}") from error
    pieces = [_part(splits[part.splitname], part.from_, part.to) for part in parts]
    numbers = [number for part in parts for number in range(part.from_, part.to)]
    if isinstance(pieces[0], list):
        return list(chain.from_iterable(pieces)), numbers
    return datasets.concatenate_datasets(pieces), numbers


def _part(data, start: int, stop: int):
    return data[start:stop] if isinstance(data, list) else data.select(range(start, stop))


def _read_file(path: Path, key: str):
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in FILE_TYPES or path.name.endswith(".parquet.gz"):
        types = ", ".join(FILE_TYPES)
        raise UserError(f"{key}.source={path}: of files, {types} are read, all but the last also as .gz.")
    try:
        if kind == ".parquet":
            _check_names(pyarrow.parquet.read_schema(path).names, str(path))
            table = pyarrow.parquet.read_table(path, partitioning=None)
            table.validate(full=True)  # text that is not UTF-8 would show row by row
            return datasets.Dataset(table)
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{key}.source={path} cannot be read: {error}. Mend that, or save it as UTF-8.") from error
    except UserError:
        raise
    except (OSError, EOFError, ValueError, zlib.error) as error:  # arrow's errors are of these types, too
        raise UserError(f"{key}.source={path} cannot be read: {error}") from error
    if kind == ".csv":
        return _csv_rows(text, path)
    return _json_lines(text, path) if kind == ".jsonl" or _is_lines(text) else _json_list(text, path)


def _is_lines(text: str) -> bool:
    """Says whether a text is several lines that start with an object: many a .json file is JSON Lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str, path: Path) -> list[dict]:
    if text.lstrip()[:1] == "[":  # perhaps over many lines
        _object([], f"{path}, line 1")
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [_object(_parse(line, path, number), f"{path}, line {number}") for number, line in lines]


def _json_list(text: str, path: Path) -> list[dict]:
    content = _parse(text, path, 1)
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        raise UserError(
            f"{path} is one object, not a list of rows; its keys that hold a list: {', '.join(lists) or 'none'}. "
            "Keep just the list of rows in the file."
        )
    if not isinstance(content, list):
        raise UserError(
            f"{path} holds {type(content).__name__}, expected a list of objects. Put all rows into one list."
        )
    return [_object(row, f"{path}, row {number} (from 0)") for number, row in enumerate(content)]


def _parse(text: str, path: Path, first_line: int):
    try:
        return json.loads(text, object_pairs_hook=_unique_keys(text))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}: invalid JSON, {error.msg} (column {error.colno}). {MEND}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists nested 1,000 deep
        raise UserError(f"{path}, line {first_line}: invalid JSON, {error}. {MEND}") from error


def _unique_keys(text: str):
    """Returns a hook that makes dicts of a text's objects and refuses one with a key twice: a dict keeps the last."""
    order = count()  # objects are handed over in the order in which they end

    def to_dict(pairs: list[tuple]) -> dict:
        number, row = next(order), dict(pairs)
        if len(row) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            ends = (match.start() for match in re.finditer(r'"(?:[^"\\]|\\.)*"|}', text) if match[0] == "}")
            raise json.JSONDecodeError(
                f"the key {twice!r} stands twice in one object", text, next(islice(ends, number, None))
            )
        return row

    return to_dict


def _object(row, where: str) -> dict:
    if not isinstance(row, dict):
        way_out = "One list of all rows belongs in a .json file." if isinstance(row, list) else MEND
        raise UserError(f"{where}: holds {type(row).__name__}, expected an object with columns. {way_out}")
    return row


def _csv_rows(text: str, path: Path) -> list[dict]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        _check_names(reader.fieldnames or [], f"{path}, line 1")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}, line {reader.line_num}: not as many cells as the first line has columns. {MEND}"
                )
            rows.append(row)
    except csv.Error as error:  # the row begins behind the last one that was whole
        raise UserError(f"{path}, line {reader.line_num + 1}: invalid CSV, {error}. {MEND}") from error
    return rows


def _check_names(names: Sequence[str], where: str) -> None:
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{where}: columns of one name, {', '.join(twice)}. Rename or remove one of each.")


def _read_folder(path: Path, name: str | None, key: str) -> dict[str, datasets.Dataset]:
    for file in path.rglob("*.csv"):  # pandas would rename the second column
        try:
            with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
                _check_names(next(csv.reader(text), []), f"{file}, line 1")
        except (OSError, csv.Error) as error:
            raise UserError(f"{key}.source={path}: {file} cannot be read: {error}. Mend it, or take it out.") from error
    try:
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            data = datasets.load_from_disk(str(path))
            return data if isinstance(data, dict) else {"train": data}
        with tempfile.TemporaryDirectory() as cache, _without_bars():  # the usual cache would keep every version
            return datasets.load_dataset(str(path), name, cache_dir=cache, keep_in_memory=True)
    except Exception as error:  # boundary: builders raise whatever their readers raise
        raise UserError(
            f"{key}.source={path}: the folder cannot be read as a dataset: {_cause(error)}. "
            f"It should hold {', '.join(FILE_TYPES)} files of one form; or name one file."
        ) from error


def _read_hub(source: str, name: str | None, revision: str | None, key: str) -> dict[str, datasets.Dataset]:
    if os.environ.get("RANK", "0") == "0":  # one process speaks
        print(f"{key}.source={source}: read from the Hugging Face Hub, or from its cache on this disk", flush=True)
    try:
        with _without_bars():
            return datasets.load_dataset(source, name, revision=revision)
    except Exception as error:  # boundary: errors of network, permission and builders have no common type
        raise UserError(
            f"{key}.source={source}, name={name}, revision={revision}: not on this disk, and the Hugging Face Hub "
            f"does not give it: {_cause(error)}\n"
            "Check the spelling of id and name on huggingface.co/datasets. If the dataset is gated, accept its terms "
            "there and run `hf auth login`. Without network, download it elsewhere and give its folder."
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keeps datasets from drawing a bar for each split and file, in each process; the table tells what was read."""
    shown = {datasets: datasets.is_progress_bar_enabled(), hub_utils: not hub_utils.are_progress_bars_disabled()}
    for module in shown:
        module.disable_progress_bars()
    try:
        yield
    finally:
        for module, were_shown in shown.items():
            if were_shown:
                module.enable_progress_bars()


def _cause(error: Exception) -> str:
    root = error.__cause__ or error
    return f"{type(root).__name__}: {(str(root).strip() or repr(root)).splitlines()[0]}"
