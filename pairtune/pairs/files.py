"""A file's rows: JSON and CSV are read here and not by `datasets`, which guesses types from the values, so that an
answer "NA" becomes null, "12" a number and "2024-01-01" a date, keeps a copy in a cache, and does not say which line is
broken.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import IO

import datasets
import pyarrow.parquet

from pairtune.errors import UserError
from pairtune.files import ROW_FILES

MEND = "Mend or remove it."
_GZIP = b"\x1f\x8b"


def read_file(path: Path, key: str) -> list[dict] | datasets.Dataset:
    """Returns the rows of a .json, .jsonl or .csv file, each also .gz, or of a .parquet file.

    Args:
        key: Where the config describes the rows, for messages.

    Raises:
        UserError: It is none of these, or a row cannot be read: file and line are named.
    """
    kind = kind_of_file(path, key)
    try:
        if kind == ".parquet":
            check_names(pyarrow.parquet.read_schema(path).names, str(path))
            table = pyarrow.parquet.read_table(path, partitioning=None)
            table.validate(full=True)  # text that is not UTF-8 would show row by row
            return datasets.Dataset(table)
        data = path.read_bytes()
        if data[:2] == _GZIP and path.suffix != ".gz":
            raise UserError(
                f"{key}.source={path} is compressed, as .gz files are. Name it {path.name}.gz, or unpack it."
            )
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


def kind_of_file(path: Path, key: str) -> str:
    """Returns one of ROW_FILES.

    Raises:
        UserError: It is none of these.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind not in ROW_FILES or path.name.endswith(".parquet.gz"):
        types = ", ".join(ROW_FILES)
        raise UserError(f"{key}.source={path}: of files, {types} are read, all but the last also as .gz.")
    return kind


def opened(path: Path) -> IO[bytes]:
    """Returns a file's bytes, of a .gz file unpacked."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _is_lines(text: str) -> bool:
    """Says whether a text is several lines that start with an object: many a .json file is JSON Lines."""
    first, _, rest = text.lstrip().partition("\n")
    try:
        return bool(rest.strip()) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(text: str, path: Path) -> list[dict]:
    if text.lstrip()[:1] == "[":  # perhaps over many lines
        as_row([], f"{path}, line 1")
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    lines = ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())
    return [parse_line(line, path, number) for number, line in lines]


def parse_line(line: str, path: Path, number: int) -> dict:
    """Returns a row of JSON Lines.

    Args:
        number: The line's, from 1.

    Raises:
        UserError: It is no object. File and line are named.
    """
    return as_row(_parse(line.rstrip("\r\n"), path, number), f"{path}, line {number}")


def _json_list(text: str, path: Path) -> list[dict]:
    content = _parse(text, path, 1)
    if isinstance(content, dict):
        sizes = {len(value) for value in content.values() if isinstance(value, list)}
        if len(content) > 1 and len(sizes) == 1 and all(isinstance(value, list) for value in content.values()):
            raise UserError(
                f"{path} is one object of columns, {', '.join(content)}, not a list of rows. Write its rows, as by "
                f"pandas: pandas.read_json({path.name!r}).to_json('rows.jsonl', orient='records', lines=True)."
            )
        if content and all(isinstance(value, dict) for value in content.values()):
            raise UserError(
                f"{path} is one object of {len(content):,} objects by their keys, not a list of rows. Make a list of "
                "them, with each key in a column of its own, such as prompt."
            )
        lists = [key for key, value in content.items() if isinstance(value, list)]
        raise UserError(
            f"{path} is one object, not a list of rows; its keys that hold a list: {', '.join(lists) or 'none'}. "
            "Keep just the list of rows in the file."
        )
    if not isinstance(content, list):
        raise UserError(
            f"{path} holds {type(content).__name__}, expected a list of objects. Put all rows into one list."
        )
    return [as_row(row, f"{path}, row {number} (from 0)") for number, row in enumerate(content)]


def _parse(text: str, path: Path, first_line: int):
    with suppress(ValueError, RecursionError):  # which are told below
        return _DECODER.decode(text)
    try:
        return json.loads(text, object_pairs_hook=_unique_keys(text))
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise UserError(f"{path}, line {line}: invalid JSON, {error.msg} (column {error.colno}). {MEND}") from error
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, lists nested 1,000 deep
        raise UserError(f"{path}, line {first_line}: invalid JSON, {error}. {MEND}") from error


def _once(pairs: list[tuple]) -> dict:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key twice")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_once)


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


def as_row(row, where: str) -> dict:
    """Returns a row, if it is an object."""
    if not isinstance(row, dict):
        way_out = MEND
        if isinstance(row, list):
            way_out = "One list of all rows belongs in a .json file, and each row is an object that names its columns."
        raise UserError(f"{where}: holds {type(row).__name__}, expected an object with columns. {way_out}")
    return row


def _csv_rows(text: str, path: Path) -> list[dict]:
    csv.field_size_limit(2**31 - 1)  # 131,072 characters by default
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    try:
        check_names(reader.fieldnames or [], f"{path}, line 1")
        check_commas(reader.fieldnames or [], f"{path}, line 1")
        for row in reader:
            check_cells(row, f"{path}, line {reader.line_num}")
            rows.append(row)
    except csv.Error as error:  # the row begins behind the last one that was whole
        raise UserError(f"{path}, line {reader.line_num + 1}: invalid CSV, {error}. {MEND}") from error
    return rows


def check_commas(names: Sequence[str], where: str) -> None:
    """Refuses a header of one name that holds another mark between names."""
    mark = next((mark for mark in (";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if mark:
        raise UserError(f"{where}: columns are separated by {mark!r}, expected commas. Mend that: save it with commas.")


def check_cells(row: dict, where: str) -> None:
    if None in row or None in row.values():
        raise UserError(f"{where}: not as many cells as the first line has columns. {MEND}")


def check_names(names: Sequence[str], where: str) -> None:
    if twice := sorted({name for name in names if name and names.count(name) > 1}):
        raise UserError(f"{where}: columns of one name, {', '.join(twice)}. Rename or remove one of each.")
