"""Pairs of sources that are read as a stream: mixed, shuffled within a buffer, tokenized ahead, and never held whole.

On torchdata's nodes, which say where they are and go on from there: a checkpoint holds what they say. Every process
reads the whole stream, which takes little beside a step: so steps have the same pairs on any number of processes.
"""

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path

import torch
from torchdata.nodes import Mapper, MultiNodeWeightedSampler, Prefetcher, StopCriteria

from pairtune.errors import UserError
from pairtune.pairs.already_rendered import AlreadyRendered
from pairtune.pairs.batch import document_length
from pairtune.pairs.columns import Renaming, as_plain, unpacked
from pairtune.pairs.context import DOUBTFUL, NUMBERS, OTHER_NAMES, SIDES
from pairtune.pairs.flow import Flow
from pairtune.pairs.formats import OUR_COLUMNS, Format
from pairtune.pairs.gathering import ReadRow, note_of
from pairtune.pairs.limits import Limits, worst_pair
from pairtune.pairs.names import GRADES
from pairtune.pairs.one_row import row_reader
from pairtune.pairs.pair import Pair
from pairtune.pairs.report import Report
from pairtune.pairs.rows import MESSAGES_OF_TREES, Rows
from pairtune.pairs.stream_nodes import Batches, Blocks, Given, Made, Passes
from pairtune.pairs.streamed_files import Shard, first_rows, shards_of

BUFFER = 10_000  # rows that are shuffled among each other
IN_ORDER = 256  # rows that are read at a time where they are not
LOOKED_AT = 1000  # of a source's first rows, before a run
AHEAD = 2  # steps
UNSEEN = (
    "a stream: no more of it is looked at before training. Not looked for: duplicates, contradictions, held-out pairs "
    "among its pairs, longer pairs than these (memory is tried with the longest that max_length allows); each row is "
    "checked as it comes\n"
)


class GivenRows:
    """What a row reader takes a row from that it is given, under our names of columns."""

    def __init__(self, columns: dict, found: Sequence[str]):
        self.columns, self._under_our_names = columns, Renaming(columns, found)

    def __getitem__(self, given: Given) -> dict:
        return self._under_our_names(unpacked(given.row))

    def place(self, given: Given) -> str:
        """Returns where it stands, in words."""
        return f"{given.shard}, row {given.place} (from 0)"


@dataclass(frozen=True)
class StreamedSource:
    """One source of a stream.

    Attributes:
        name: As the config has it.
        key: The config's block of it.
        rate: Its share of the rows that are read.
        shards: From streamed_files.
        limit: The first so many rows of it.
        read_row: Reads one that is given.
        report: Of the first rows.
        rendered: What read_row looks at prompts with.
        columns: That the first rows have, or that are read where others have them.
    """

    name: str
    key: str
    rate: float
    shards: Mapping[str, Shard]
    limit: int | None
    read_row: ReadRow
    report: Report
    rendered: AlreadyRendered
    columns: frozenset[str]

    def passes(self, index: int) -> Passes:
        """Returns its rows, over and over, as those of the source of this index."""
        return Passes(index, self.shards, self.limit, f"{self.key}: {self.name}")

    def check(self, flow: Flow) -> None:
        """Refuses what became of its rows so far: see Flow.check."""
        flow.check(self, at_least=LOOKED_AT)

    def made(self, given: Given) -> Made:
        """Returns what becomes of a row."""
        alone = Report(self.name, self.report.format, self.report.style, 1)
        pairs = self.read_row(given, given.number, alone)
        return Made(given, pairs, note_of(alone) | {"columns": sorted(given.row.keys() - self.columns)})


def read_first(block: Mapping, key: str, count: int | None = None) -> Rows:
    """Returns the first rows of a source that is streamed, under our names of columns.

    Args:
        block: The config's; key: its name.
        count: None: as many as a run looks at.

    Raises:
        UserError: As shards_of and Rows; a row is part of a conversation.
    """
    count = count or LOOKED_AT
    rows = first_rows(shards_of_block(block, key), min(count, block["limit"] or count))
    rows = Rows(rows, source=block["source"], columns=as_plain(block["columns"]), key=key)
    if set(rows.found) >= MESSAGES_OF_TREES:
        raise UserError(
            f"{key}: {rows.source} holds a message a row, and which belong together shows when all are read; "
            "dataset.streaming=false reads them"
        )
    return rows


def shards_of_block(block: Mapping, key: str) -> dict[str, Shard]:
    """Returns what a source is read from: see shards_of."""
    return shards_of(block["source"], **{name: block[name] for name in ("split", "name", "revision")}, key=key)


def streamed_source(
    block: Mapping,
    first: Rows,
    form: Format,
    tokenizer,
    limits: Limits,
    report: Report,
    *,
    rate: float,
    key: str,
) -> StreamedSource:
    """Returns a source of this block of a config.

    Args:
        first: Its first rows, under our names; report: on them.
    """
    rendered = AlreadyRendered(tokenizer)
    known = {*first.found, *form.columns, *form.optional, *form.read_beside([*OUR_COLUMNS, *OTHER_NAMES])}
    return StreamedSource(
        name=block["source"],
        key=key,
        rate=rate,
        shards=shards_of_block(block, key),
        limit=block["limit"],
        read_row=row_reader(
            GivenRows(first.columns, first.found),
            form,
            tokenizer,
            limits,
            rendered,
            block["on_bad_row"],
            report.unused,
            worse=block["rejected"],
            columns=first.columns,
            numbers=[name for name in NUMBERS if first.columns.get(name)],
            doubtful=form.unused([*DOUBTFUL, *SIDES, *GRADES]),  # also those that the first rows do not have
            key=key,
        ),
        report=report,
        rendered=rendered,
        columns=frozenset(known),
    )


@dataclass(frozen=True)
class Stream:
    """What more pairs come from than were looked at.

    Attributes:
        buffer: Rows that are shuffled among each other.
        limits: Of a pair.
        example: A pair that was looked at, with two answers where pairs have them.
        numbers: Columns of weights and margins.
        checks: Called with each step's pairs; what is wrong is raised.
    """

    sources: Sequence[StreamedSource]
    buffer: int
    limits: Limits
    example: Pair
    numbers: Sequence[str]
    checks: list[Callable[[list[Pair]], None]] = field(default_factory=list)

    @property
    def longest(self) -> Pair:
        """The longest pair that may come: the example, its answers repeated until no more is allowed."""
        return _stretched(self.example, self.limits)

    @property
    def identity(self) -> dict:
        """What another stream differs in, as JSON can hold it: sizes of files, not their names."""
        sizes = [[_size(shard) for shard in source.shards] for source in self.sources]
        rates = [source.rate for source in self.sources]
        limits = [source.limit for source in self.sources]
        return {"sizes": sizes, "rates": rates, "limits": limits, "buffer": self.buffer}

    def in_steps(self, pairs_per_step: int, *, seed: int, shuffle: bool) -> "StreamedSteps":
        """Returns the stream cut into steps."""
        return StreamedSteps(self, pairs_per_step, seed=seed, shuffle=shuffle)


def _size(shard: str) -> int | str:
    path = Path(shard)
    return path.stat().st_size if path.is_file() else shard


def _stretched(pair: Pair, limits: Limits) -> Pair:
    prompt, answer = worst_pair(limits.max_length, limits.max_prompt_length, limits.max_completion_length)
    shared = len(pair.prompt) + len(pair.chosen) + len(pair.rejected) - document_length(pair)

    def repeated(tokens: list[int]) -> list[int]:
        if not tokens:
            return []
        body = tokens[shared:-1] or tokens[:-1] or tokens
        return [*islice(cycle(body), answer - 1), tokens[-1]]

    return Pair([*islice(cycle(pair.prompt), prompt)], repeated(pair.chosen), repeated(pair.rejected), pair.row)


class StreamedSteps:
    """A stream's pairs, step by step, in their order; a thread is some steps ahead."""

    def __init__(self, stream: Stream, pairs_per_step: int, *, seed: int, shuffle: bool):
        self._stream, self._next, self._pairs = stream, 0, []
        self._flows: list[Flow] = [Flow() for _ in stream.sources]
        passes = [source.passes(n) for n, source in enumerate(stream.sources)]
        rates = {str(n): source.rate for n, source in enumerate(stream.sources)}
        blocks = {}
        for n, node in enumerate(passes):
            size = max(1, round(stream.buffer * rates[str(n)])) if shuffle else IN_ORDER
            blocks[str(n)] = Blocks(node, size, f"{seed} {n}" if shuffle else None)
        rows = blocks["0"]
        if len(passes) > 1:
            rows = MultiNodeWeightedSampler(
                blocks, rates, stop_criteria=StopCriteria.CYCLE_FOREVER, rank=0, world_size=1, seed=seed
            )
        made = Mapper(rows, lambda given: stream.sources[given.source].made(given))
        self._ahead = Prefetcher(Batches(made, pairs_per_step, [source.check for source in stream.sources]), AHEAD)
        weakref.finalize(self, _close, self._ahead, passes)

    def pairs(self, step: int) -> list[Pair]:
        """Returns a step's pairs: the next one's, or again those of the last one.

        Raises:
            UserError: A row cannot be read, or too many are broken.
        """
        if step != self._next - 1:
            assert step == self._next, "a stream's steps are asked for in their order"
            found = next(self._ahead)
            if isinstance(found, UserError):
                raise found
            self._pairs, self._flows = found[0], [Flow.of(told) for told in found[1]]
            self._next += 1
            for check in self._stream.checks:
                check(self._pairs)
        return self._pairs

    @property
    def epoch(self) -> int:
        """How many times all sources have been gone through."""
        return min(flow.times for flow in self._flows)

    def seen(self) -> dict[str, int]:
        """Returns how many rows were read so far, and how many of them dropped, as metrics.jsonl names it."""
        return {f"rows/{n}": sum(getattr(flow, n) for flow in self._flows) for n in ("read", "dropped")}

    def account(self) -> list[str]:
        """Returns a table for each source: what became of its rows."""
        return [flow.table(source.name) for flow, source in zip(self._flows, self._stream.sources, strict=True)]

    def state(self) -> dict:
        """Returns where the stream is, as JSON can hold it."""
        return {"step": self._next, "node": _as_json(self._ahead.state_dict())}

    def load(self, state: dict) -> None:
        """Goes on from there.

        Raises:
            UserError: The sources are not as they were.
        """
        self._next, self._pairs = state["step"], []
        self._ahead.reset(_from_json(state["node"]))
        self._flows = [Flow.of(told) for told in self._ahead.state_dict()["snapshot"]["flows"]]


def _close(ahead: Prefetcher, passes: Sequence[Passes]) -> None:
    """Ends the thread, and closes files: what still reads while Python shuts down may abort it."""
    if ahead._it is not None:
        ahead._it._shutdown()
    for node in passes:
        node.close()


def _as_json(state):
    if isinstance(state, torch.Tensor):
        return {"bytes": bytes(state.tolist()).hex()}
    if isinstance(state, dict):
        return {name: _as_json(value) for name, value in state.items()}
    return [_as_json(value) for value in state] if isinstance(state, list | tuple) else copy.copy(state)


def _from_json(state):
    if isinstance(state, dict):
        if state.keys() == {"bytes"}:
            return torch.tensor(list(bytes.fromhex(state["bytes"])), dtype=torch.uint8)
        return {name: _from_json(value) for name, value in state.items()}
    return [_from_json(value) for value in state] if isinstance(state, list) else state
