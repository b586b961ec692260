"""Many pairs in few arrays: of 4 bytes a token in place of 36, and readable where they lie, such as in a mapped file.

N pairs, R rows, T tokens.
"""

import json
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Any

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
    parts = [_lists([getattr(pair, name) for pair in flat]) for name in PARTS]
    rest = pa.array([_rest(pair) for pair in flat], pa.string())
    structs = pa.StructArray.from_arrays([*parts, rest], fields=list(_PAIR))
    of_rows = pa.ListArray.from_arrays(_offsets(pairs), structs)
    return pa.RecordBatch.from_arrays([pa.array(notes, pa.string()), of_rows], schema=SCHEMA)


def _lists(lists: list[list[int]]) -> pa.ListArray:
    values = array("i")
    for tokens in lists:
        values.fromlist(tokens)
    return pa.ListArray.from_arrays(
        _offsets(lists), pa.Array.from_buffers(pa.int32(), len(values), [None, pa.py_buffer(values)])
    )


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

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected answer, [3, N]."""
        return np.array([np.diff(offsets) for offsets in self.offsets], np.int64)

    @cached_property
    def shared(self) -> np.ndarray:
        """Tokens that both answers begin with, [N]."""
        (_, chosen, rejected), (_, of_chosen, of_rejected) = self.values, self.offsets
        count, some = np.zeros(len(of_chosen) - 1, np.int64), np.flatnonzero(self.lengths[1:].min(0))
        shorter = self.lengths[1:].min(0)
        while len(some):
            at = count[some]
            some = some[chosen[of_chosen[some] + at] == rejected[of_rejected[some] + at]]
            count[some] += 1
            some = some[count[some] < shorter[some]]
        return count

    def tokens_at(self, part: int, index: int) -> np.ndarray:
        """Returns the token of this index, as of a list, in that part of each pair, [N]; -1 where there is none."""
        length, found = self.lengths[part], np.full(len(self.offsets[part]) - 1, -1, np.int64)
        has_it = np.flatnonzero(length >= (-index if index < 0 else index + 1))
        start = self.offsets[part][:-1] if index >= 0 else self.offsets[part][1:]
        found[has_it] = self.values[part][start[has_it] + index]
        return found

    @property
    def has_rest(self) -> bool:
        """Whether any of its pairs has more than tokens."""
        return self._rest is not None

    def rest(self, index: int) -> dict:
        """Returns what a pair has besides tokens and row."""
        rest = None if self._rest is None else self._rest[index].as_py()
        return {} if rest is None else _tuples(json.loads(rest))

    def pair(self, index: int, row: int) -> Pair:
        """Returns a pair by its place in the table, as that of a row of the source."""
        parts = [
            values[offsets[index] : offsets[index + 1]].tolist()
            for values, offsets in zip(self.values, self.offsets, strict=True)
        ]
        return Pair(*parts, row, **self.rest(index))


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
        sets: Parts of them that have names, which are evaluated apart.
        stream: What more pairs come from, where these are the first ones of a stream: streaming.Stream.
    """

    tables: list[Table]
    of_table: np.ndarray
    places: np.ndarray
    rows: np.ndarray
    sets: Mapping[str, slice] = field(default_factory=dict)
    stream: Any = None

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

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> "PackedPairs":
        """Returns a list's pairs."""
        count = len(pairs)
        rows = np.array([pair.row for pair in pairs], np.int64)
        return cls(
            [Table(pack([[pair] for pair in pairs], [""] * count))], np.zeros(count, np.int32), np.arange(count), rows
        )

    def __add__(self, other: Sequence[Pair]) -> "PackedPairs":
        if not isinstance(other, PackedPairs):
            return self + PackedPairs.of(other) if len(other) else self
        of_table = np.concatenate([self.of_table, other.of_table + len(self.tables)])
        places, rows = np.concatenate([self.places, other.places]), np.concatenate([self.rows, other.rows])
        return PackedPairs([*self.tables, *other.tables], of_table, places, rows, stream=self.stream)

    def __radd__(self, other: Sequence[Pair]) -> "PackedPairs":
        return PackedPairs.of(other) + self if len(other) else self

    @classmethod
    def named(cls, parts: Mapping[str, Sequence[Pair]]) -> "PackedPairs":
        """Returns the pairs of all parts, one behind the other, which know the parts' names."""
        whole, sets = cls.of([]), {}
        for name, pairs in parts.items():
            sets[name] = slice(len(whole), len(whole) + len(pairs))
            whole = whole + pairs
        return replace(whole, sets=sets)

    def of_each(self, read: Callable[[Table], np.ndarray]) -> np.ndarray:
        """Returns numbers of these pairs, [..., N], where `read` returns those of all pairs of a table."""
        found = None
        for n, table in enumerate(self.tables):
            mine = np.flatnonzero(self.of_table == n)
            if len(mine) or found is None:
                numbers = read(table)
                found = np.zeros((*numbers.shape[:-1], len(self)), np.int64) if found is None else found
                found[..., mine] = numbers[..., self.places[mine]]
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt, chosen and rejected answer, [3, N]."""
        return self.of_each(lambda table: table.lengths)

    def numbers(self, name: str, default: float) -> np.ndarray:
        """Returns what each pair has under this name besides tokens, [N] float64."""
        found = np.full(len(self), default)
        for n in np.flatnonzero([table.has_rest for table in self.tables]):
            mine = np.flatnonzero(self.of_table == n)
            found[mine] = [self.tables[n].rest(int(place)).get(name, default) for place in self.places[mine]]
        return found

    def written(self) -> Iterator[tuple[np.ndarray, dict]]:
        """Yields each pair's three parts as int64, each behind its length, and what else it has but its row."""
        lengths = self.lengths
        starts = np.concatenate([np.zeros((1, len(self)), np.int64), (lengths + 1).cumsum(0)])
        columns = (self.of_table.tolist(), self.places.tolist(), lengths.T.tolist())
        for (number, place, sizes), at in zip(zip(*columns, strict=True), starts.T.tolist(), strict=True):
            table, content = self.tables[number], np.empty(at[-1], np.int64)
            for values, offsets, size, start in zip(table.values, table.offsets, sizes, at, strict=False):
                first = offsets[place]
                content[start] = size
                content[start + 1 : start + 1 + size] = values[first : first + size]
            yield content, table.rest(place)
