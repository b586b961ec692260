"""Many rows to pairs, by several processes and with what earlier runs have kept; pairs and report are those that one
process makes row by row."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields

import numpy as np
import pyarrow as pa

from pairtune.pairs.kept import ANY, KeptTokens
from pairtune.pairs.packed import PackedPairs, Table, pack
from pairtune.pairs.pair import Pair
from pairtune.pairs.report import Report
from pairtune.pairs.spread import spread

TOGETHER = 16_384  # rows of a table: what a kill costs of them
ReadRow = Callable[
    [int, int, Report], list[Pair]
]  # of a row's index; what is to be told of it goes into the report, under a number


def gather(
    read_row: ReadRow,
    rows: Sequence[dict],
    report: Report,
    *,
    processes: int,
    kept: KeptTokens | None = None,
    update: Callable[[int], None] = lambda count: None,
) -> PackedPairs:
    """Returns the rows' pairs in order, and enters in the report what `read_row` would, row by row.

    Args:
        kept: Where tokens of rows are looked up, and added.
        update: Called with the number of rows that were just read.

    Raises:
        UserError: What the first row raises that raises anything.
    """
    tables, known = (kept.tables, kept.known) if kept else ([], {})
    digests: list[bytes] = []
    of_row: list[tuple[int, int] | None] = [None] * len(rows)

    def missing() -> Iterator[int]:
        """The rows to be read, of those that are alike the first: looked up as they are asked for."""
        new = set()
        for index, row in enumerate(rows):
            digests.append(kept.digest(row))
            of_row[index] = known.get(digests[index])
            if of_row[index] is None and digests[index] not in new:
                new.add(digests[index])
                yield index
            else:
                update(1)

    lacking = missing() if kept else range(len(rows))
    for indices, batch in _combined(_work(read_row, report), lacking, processes, update):
        for place, index in enumerate(indices):
            of_row[index] = len(tables), place
        if kept:
            kept.add([digests[index] for index in indices], batch)
        else:
            tables.append(Table(batch))
    shared = [known.get(digest) for digest in digests] or of_row
    return _in_order(read_row, report, rows.numbers, tables, of_row, shared)


def _work(read_row: ReadRow, report: Report) -> Callable[[Sequence[int]], pa.RecordBatch]:
    def work(indices: Sequence[int]) -> pa.RecordBatch:
        pairs, notes = [], []
        for index in indices:
            alone = Report(report.source, report.format, report.style, report.num_rows)
            pairs.append(read_row(index, ANY, alone))
            notes.append(json.dumps(note_of(alone)))
        return pack(pairs, notes)

    return work


def _combined(
    work: Callable, indices: Iterable[int], processes: int, update: Callable[[int], None]
) -> Iterator[tuple[list[int], pa.RecordBatch]]:
    """Yields what became of some thousand rows at a time; of those before a row that raises, too."""
    parts, batches = [], []

    def together() -> tuple[list[int], pa.RecordBatch]:
        (batch,) = pa.Table.from_batches(batches).combine_chunks().to_batches()
        return [index for part in parts for index in part], batch

    error = None
    found = spread(work, indices, processes=processes)
    while True:
        try:
            part, batch = next(found)
        except StopIteration:
            break
        except BaseException as raised:
            error = raised
            break
        parts.append(part)
        batches.append(batch)
        update(len(part))
        if sum(map(len, parts)) >= TOGETHER:
            yield together()
            parts, batches = [], []
    if parts:
        yield together()
    if error:
        raise error


def _in_order(read_row, report: Report, numbers, tables: list[Table], of_row: list, shared: list) -> PackedPairs:
    """Returns the pairs of the rows' places in the tables; `shared`, of rows that are like another one."""
    columns = array("i"), array("q"), array("q")
    notes = [table.notes.to_pylist() for table in tables]
    for index, number in enumerate(numbers):
        if of_row[index] is None and shared[index] is None:  # like one whose note speaks of itself
            tables.append(Table(_work(read_row, report)([index])))
            notes.append(tables[-1].notes.to_pylist())
            of_row[index] = len(tables) - 1, 0
        table, place = of_row[index] or shared[index]
        add_note(report, json.loads(notes[table][place]), number)
        for pair in range(tables[table].first[place], tables[table].first[place + 1]):
            for column, value in zip(columns, (table, pair, number), strict=True):
                column.append(value)
    return PackedPairs(tables, *(np.frombuffer(column, column.typecode) for column in columns))


# What a row adds to a report, without its number


def note_of(report: Report) -> dict:
    """Returns what `read_row` has entered in a new report of a row that it took for number ANY, as JSON can hold it."""
    found = {field.name: getattr(report, field.name) for field in fields(report) if field.name != "num_rows"}
    return {name: value for name, value in found.items() if value and isinstance(value, (list, dict, int))}


def add_note(report: Report, note: dict, number: int) -> None:
    """Enters in a report what `note_of` found of a row, as of this number."""
    for name, value in note.items():
        before = getattr(report, name)
        if isinstance(value, list):
            before += _numbered(value, number)
        elif isinstance(value, dict):
            for key, item in value.items():
                if isinstance(item, list):
                    before.setdefault(key, []).extend(_numbered(item, number))
                else:
                    before[number if key == str(ANY) else key] = item
        else:
            setattr(report, name, before + value)


def _numbered(values: list, number: int) -> list:
    return [number if value == ANY else value for value in values]
