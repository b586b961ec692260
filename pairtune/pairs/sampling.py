"""A few rows of a large file, the first ones and some that are spread over it by its bytes: not all are read as rows.

JSON Lines are gone through line by line, and so counted; of a parquet file some row groups are opened; of CSV only the
first rows are read, and their number is estimated. A list of JSON, which is one value, is no such file.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import datasets
import pyarrow as pa
import pyarrow.parquet

from pairtune.errors import UserError
from pairtune.pairs.files import check_cells, check_commas, check_names, opened, parse_line

LARGE = 2**25  # bytes of a source: fewer are read in a moment


@dataclass(frozen=True)
class Sample:
    """Rows of a file.

    Attributes:
        runs: Rows that follow each other, and the number of the first of them in the file.
        total: Rows of the file.
        is_counted: Else `total` is an estimate.
    """

    runs: list[tuple[list[dict] | datasets.Dataset, int]]
    total: int
    is_counted: bool = True


def is_large(path: Path) -> bool:
    """Says whether a file or a folder's files are worth a sample."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files) > LARGE


def sample_file(path: Path, key: str, count: int) -> Sample | None:
    """Returns the first `count` rows and as many that are spread over the rest; None where all have to be read.

    Raises:
        UserError: A row of these cannot be read: file and line are named.
    """
    kind = Path(path.name.removesuffix(".gz")).suffix
    try:
        if kind == ".parquet":
            return _of_parquet(path, count)
        with opened(path) as file:
            if kind == ".csv":
                return _of_csv(file, path, count)
            first = file.readline().lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if first != b"{":  # a list, or blank lines first
                return None
            file.seek(0)
            return _of_lines(file, path, count)
    except UserError:
        raise
    except (OSError, EOFError, ValueError, csv.Error) as error:  # arrow's are of these types, too
        raise UserError(f"{key}.source={path} cannot be read: {error}") from error


def _of_lines(file: IO[bytes], path: Path, count: int) -> Sample:
    """Goes through all lines; only those of the sample are parsed."""
    every = -(-_bytes(path) // count)
    runs, number, at, due = [([], 0)], 0, 0, every
    for line_number, line in enumerate(file, 1):
        if not line.isspace():
            if number < count or at >= due:
                row = parse_line(line.decode("utf-8-sig"), path, line_number)
                if number < count:
                    runs[0][0].append(row)
                else:
                    runs.append(([row], number))
                due = max(due, at + every - at % every)
            number += 1
        at += len(line)
    return Sample(runs, number)


def _bytes(path: Path) -> int:
    """Returns a file's bytes; of one that is packed, what its last four bytes say, which is modulo 2 ** 32."""
    size = path.stat().st_size
    if path.suffix != ".gz":
        return size
    with path.open("rb") as file:
        file.seek(-4, io.SEEK_END)
        return max(size, int.from_bytes(file.read(), "little"))


def _of_csv(file: IO[bytes], path: Path, count: int) -> Sample:
    csv.field_size_limit(2**31 - 1)
    read = 0

    def lines() -> Iterator[str]:
        nonlocal read
        for line in file:
            read += len(line)
            yield line.decode("utf-8-sig" if read == len(line) else "utf-8")

    reader = csv.DictReader(lines(), strict=True)
    check_names(reader.fieldnames or [], f"{path}, line 1")
    check_commas(reader.fieldnames or [], f"{path}, line 1")
    rows = []
    for row in islice(reader, 2 * count):
        check_cells(row, f"{path}, line {reader.line_num}")
        rows.append(row)
    is_all = next(reader, None) is None
    total = len(rows) if is_all else max(len(rows), round(_bytes(path) / read * len(rows)))
    return Sample([(rows, 0)], total, is_all)


def _of_parquet(path: Path, count: int) -> Sample:
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
        check_names(file.schema_arrow.names, str(path))
        num_groups, firsts, total = file.num_row_groups, [0], file.metadata.num_rows
        for group in range(num_groups):
            firsts.append(firsts[-1] + file.metadata.row_group(group).num_rows)
        some = range(0, num_groups, -(-num_groups // 10))
        runs = [(_first_rows(file, 0, count), 0)] if num_groups else []
        runs += [(_first_rows(file, group, -(-count // len(some))), firsts[group]) for group in some[1:]]
    return Sample(runs, total)


def _first_rows(file: pyarrow.parquet.ParquetFile, group: int, count: int) -> datasets.Dataset:
    batch = next(file.iter_batches(count, row_groups=[group]))
    batch.validate(full=True)
    return datasets.Dataset(pa.Table.from_batches([batch]))
