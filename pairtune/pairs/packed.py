"""Many pairs in few arrays: of 4 bytes a token in place of 36, and readable where they lie, such as in a mapped file.

N pairs, R rows, T tokens.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate, chain

import numpy as np
import pyarrow as pa

from pairtune.pairs.pair import Pair

PARTS = ("prompt", "chosen", "rejected")
OTHERS = [field for field in fields(Pair) if field.name not in (*PARTS, "row")]  # what few pairs have
_TOKENS = pa.list_(pa.int32())
_PAIR = pa.struct([*((name, _TOKENS) for name in PARTS), ("rest", pa.string())])
SCHEMA = pa.schema([("note", pa.string()), ("pairs", pa.list_(_PAIR))])  # a row of the source each


def pack(pairs: Sequence[Sequence[Pair]], notes: Sequence[str]) -> pa.RecordBatch:
    """Returns the pairs of R rows, none or more each, and a text that belongs to each row; not the rows' numbers."""
    flat = list(chain.from_iterable(pairs))
    parts = [_lists([getattr(pair, name) for pair in flat], pa.int32()) for name in PARTS]
    rest = pa.array([_rest(pair) for pair in flat], pa.string())
    structs = pa.StructArray.from_arrays([*parts, rest], fields=list(_PAIR))
    of_rows = pa.ListArray.from_arrays(_offsets(pairs), structs)
    return pa.RecordBatch.from_arrays([pa.array(notes, pa.string()), of_rows], schema=SCHEMA)


def _lists(lists: list[list[int]], kind: pa.DataType) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(lists), pa.array(np.fromiter(chain.from_iterable(lists), np.int32), kind))


def _offsets(lists: Sequence) -> pa.Array:
    return pa.array(list(accumulate(map(len, lists), initial=0)), pa.int32())


def _rest(pair: Pair) -> str | None:
    found = {field.name: value for field in OTHERS if (value := getattr(pair, field.name)) != field.default}
    return json.dumps(found) if found else None


class Table:
    """What `pack` returns, to be read: each row's note, and where in it its pairs are; `name` is its file's."""

    def __init__(self, batch: pa.RecordBatch, name: str = ""):
        self.name = name
        self.notes = batch.column("note")
        of_rows = batch.column("pairs")
        self.first = of_rows.offsets.to_numpy()  # [R + 1], of a row's first pair
        structs = of_rows.values
        lists = [structs.field(name) for name in PARTS]
        self.offsets = [column.offsets.to_numpy() for column in lists]  # of a pair's tokens, [N + 1] each
        self.values = [column.values.to_numpy() for column in lists]  # [T] each
        rest = structs.field("rest")
        self._rest = rest if rest.null_count < len(rest) else None

    def pair(self, index: int, row: int) -> Pair:
        """Returns a pair by its place in the table, as that of a row of the source."""
        parts = [
            values[offsets[index] : offsets[index + 1]].tolist()
            for values, offsets in zip(self.values, self.offsets, strict=True)
        ]
        rest = None if self._rest is None else self._rest[index].as_py()
        return Pair(*parts, row, **({} if rest is None else _tuples(json.loads(rest))))


def _tuples(found: dict) -> dict:
    def frozen(value):
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    return {name: frozen(value) for name, value in found.items()}


@dataclass(frozen=True, eq=False)
class PackedPairs(Sequence):
    """Pairs in an order, made when they are asked for.

    Args:
        tables: Where their tokens are.
        of_table, places, rows: Of each pair, [N]: which table, its place there, and its row in the source.
    """

    tables: list[Table]
    of_table: np.ndarray
    places: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, which):
        if isinstance(which, (slice, np.ndarray)):
            return PackedPairs(self.tables, self.of_table[which], self.places[which], self.rows[which])
        return self.tables[self.of_table[which]].pair(int(self.places[which]), int(self.rows[which]))

    def take(self, indices: Sequence[int]) -> "PackedPairs":
        """Returns the pairs at these indices."""
        return self[np.asarray(indices, np.int64)]

    def __iter__(self) -> Iterator[Pair]:
        columns = (self.of_table.tolist(), self.places.tolist(), self.rows.tolist())
        for table, place, row in zip(*columns, strict=True):
            yield self.tables[table].pair(place, row)

    def __add__(self, other: Sequence[Pair]):
        if not isinstance(other, PackedPairs):
            return [*self, *other] if len(other) else self
        of_table = np.concatenate([self.of_table, other.of_table + len(self.tables)])
        places, rows = np.concatenate([self.places, other.places]), np.concatenate([self.rows, other.rows])
        return PackedPairs([*self.tables, *other.tables], of_table, places, rows)

    def __radd__(self, other: Sequence[Pair]):
        return [*other, *self] if len(other) else self

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected answer, [3, N]."""
        found = np.zeros((len(PARTS), len(self)), np.int64)
        for n, table in enumerate(self.tables):
            mine = self.of_table == n
            found[:, mine] = [np.diff(offsets)[self.places[mine]] for offsets in table.offsets]
        return found
