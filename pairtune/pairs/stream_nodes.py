"""From rows of sources to steps of pairs, as torchdata's nodes: each says where it is, and goes on from there."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import astuple
from typing import NamedTuple

from torchdata.nodes import BaseNode

from pairtune.errors import UserError
from pairtune.pairs.flow import Flow
from pairtune.pairs.pair import Pair
from pairtune.pairs.streamed_files import Shard


class Given(NamedTuple):
    """A row of a stream: of which source, how often that was gone through before, the row's number in it, and where
    it stands: what it was read from, and its number there."""

    source: int
    times: int
    number: int
    shard: str
    place: int
    row: dict


class Made(NamedTuple):
    """What became of a row: pairs, and what there is to tell of it, see gathering.note_of."""

    given: Given
    pairs: list[Pair]
    note: dict


class Passes(BaseNode[Given]):
    """A source's rows from the first to the last, again and again."""

    START = {"number": 0, "shard": 0, "place": 0, "position": None}

    def __init__(self, index: int, shards: Mapping[str, Shard], limit: int | None, where: str):
        """
        Args:
            index: The source's, of all.
            limit: Rows of a pass, if not all.
            where: The source, for messages.
        """
        super().__init__()
        self._index, self._shards, self._limit, self._where = index, list(shards.items()), limit, where
        self._rows: Iterator | None = None

    def reset(self, initial_state: dict | None = None):
        super().reset(initial_state)
        self.close()
        self._at = dict(initial_state or {"times": 0, **self.START})

    def next(self) -> Given:
        at = self._at
        while (found := self._next_row()) is None:
            self._rows = None
            if self._is_over() or at["shard"] + 1 == len(self._shards):
                if not at["number"]:
                    raise UserError(f"{self._where} has no rows any more.")
                at |= {"times": at["times"] + 1, **self.START}
            else:
                at |= {"shard": at["shard"] + 1, "place": 0, "position": None}
        row, at["position"] = found
        name, _ = self._shards[at["shard"]]
        given = Given(self._index, at["times"], at["number"], name, at["place"], row)
        at |= {"number": at["number"] + 1, "place": at["place"] + 1}
        return given

    def _is_over(self) -> bool:
        return self._limit is not None and self._at["number"] >= self._limit

    def _next_row(self) -> tuple[dict, object] | None:
        if self._is_over():
            return None
        if self._rows is None:
            self._rows = self._shards[self._at["shard"]][1](self._at["position"])
        return next(self._rows, None)

    def get_state(self) -> dict:
        return dict(self._at)

    def close(self) -> None:
        """Closes the file that is being read."""
        rows, self._rows = self._rows, None
        with suppress(ValueError):  # a thread is just reading
            if rows is not None:
                rows.close()


class Blocks(BaseNode[Given]):
    """Blocks of at most so many rows of one pass, each in an order that the seed draws. What is held of it is where a
    block begins, and how far it has come: the block's rows are read again.

    Args:
        seed: None: they stay in their order.
    """

    def __init__(self, source: BaseNode[Given], size: int, seed: str | None):
        super().__init__()
        self._source, self._size, self._seed = source, size, seed

    def reset(self, initial_state: dict | None = None):
        super().reset(initial_state)
        at = initial_state or {"source": None, "block": -1, "at": 0, "digest": ""}
        self._source.reset(at["source"])
        self._block, self._at, self._rows, self._digest = at["block"], 0, [], ""
        self._start = self._source.state_dict()
        if self._block >= 0:
            self._block -= 1
            self._fill()
            self._at = at["at"]
            if self._digest != at["digest"]:
                first = min(self._rows, key=lambda given: given[:3])
                raise UserError(
                    f"resume: the rows of {first.shard} from row {first.place} on are not those that the checkpoint "
                    "was written with; a stream goes on with the files that it began with"
                )

    def _fill(self) -> None:
        self._start, self._at = self._source.state_dict(), 0
        self._rows = []
        while len(self._rows) < self._size:
            before = self._source.state_dict()
            given = next(self._source)
            if self._rows and given.times != self._rows[0].times:
                self._source.reset(before)
                break
            self._rows.append(given)
        self._block += 1
        hashed = hashlib.blake2b(digest_size=8)
        for given in self._rows:
            hashed.update(json.dumps([given.number, given.row], default=repr).encode())
        self._digest = hashed.hexdigest()
        if self._seed is not None:
            random.Random(f"{self._seed} {self._block}").shuffle(self._rows)

    def next(self) -> Given:
        if self._at == len(self._rows):
            self._fill()
        self._at += 1
        return self._rows[self._at - 1]

    def get_state(self) -> dict:
        return {"source": self._start, "block": self._block, "at": self._at, "digest": self._digest}


class Batches(BaseNode[tuple[list[Pair], list[dict]] | UserError]):
    """Steps of so many pairs, each with what has been told of all rows so far; or what is wrong with a row."""

    def __init__(self, source: BaseNode[Made], size: int, checks: Sequence[Callable[[Flow], None]]):
        """
        Args:
            checks: Of each source: raises what is wrong with what became of its rows.
        """
        super().__init__()
        self._source, self._size, self._checks = source, size, checks

    def reset(self, initial_state: dict | None = None):
        super().reset(initial_state)
        at = initial_state or {"source": None, "waiting": [], "flows": [{} for _ in self._checks]}
        self._source.reset(at["source"])
        self._waiting = [Pair(*map(_with_tuples, values)) for values in at["waiting"]]
        self._flows = [Flow.of(told) for told in at["flows"]]

    def next(self) -> tuple[list[Pair], list[dict]] | UserError:
        try:
            while len(self._waiting) < self._size:
                made = next(self._source)
                flow = self._flows[made.given.source]
                flow.add(made.note, len(made.pairs), made.given.times)
                self._checks[made.given.source](flow)
                self._waiting += made.pairs
        except UserError as error:  # a node hands an error over as a traceback
            return error
        step, self._waiting = self._waiting[: self._size], self._waiting[self._size :]
        return step, [flow.told() for flow in self._flows]

    def get_state(self) -> dict:
        return {
            "source": self._source.state_dict(),
            "waiting": [list(astuple(pair)) for pair in self._waiting],
            "flows": [flow.told() for flow in self._flows],
        }


def _with_tuples(value):
    is_spans = isinstance(value, (list, tuple)) and value and isinstance(value[0], (list, tuple))
    return tuple(map(tuple, value)) if is_spans or value == () else value
