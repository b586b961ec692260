"""Preference pairs: rows tokenized, limited and counted. No shuffling, no batches: see steps.py and batch.py.

Where rows come from is in rows.py, what a row may look like in formats.py, how a conversation becomes tokens in
tokenizer/, how many rows are shared out and kept in gathering.py and keeping.py.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial, reduce
from operator import add

from pairtune.errors import UserError
from pairtune.pairs import mixture
from pairtune.pairs.already_rendered import AlreadyRendered
from pairtune.pairs.at_once import lengths_of
from pairtune.pairs.columns import as_plain
from pairtune.pairs.context import NUMBERS, turning_columns
from pairtune.pairs.formats import Format, doubtful
from pairtune.pairs.gathering import ReadRow, gather
from pairtune.pairs.glance import glance
from pairtune.pairs.keeping import entry_of, read_once
from pairtune.pairs.kept import KeptTokens
from pairtune.pairs.limits import Limits
from pairtune.pairs.one_row import row_reader
from pairtune.pairs.packed import PackedPairs
from pairtune.pairs.pair import Pair
from pairtune.pairs.ranked import check_worse
from pairtune.pairs.recognise import recognise
from pairtune.pairs.remarks import held_by
from pairtune.pairs.report import Report, count_overlap, notes_of
from pairtune.pairs.rows import Rows, read_rows
from pairtune.pairs.sources import check_source
from pairtune.pairs.spread import num_cores
from pairtune.pairs.streaming import BUFFER, UNSEEN, Stream, read_first, streamed_source
from pairtune.process import console
from pairtune.process.dist import World
from pairtune.tokenizer.hf import adapt

__all__ = [
    "Pair",
    "Report",
    "Rows",
    "count_overlap",
    "read_pairs",
    "read_rows",
    "read_train_and_held_out",
    "split_pairs",
    "tokenize_pairs",
]

FEW = 500  # rows: fewer are read in a moment, by this process alone
LOOKED_AT = 1_000  # for what columns hold that nobody reads


def read_pairs(
    block: Mapping,
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    unpaired: bool = False,
    progress: bool = True,
    beat: Callable[[str], None] | None = None,
    cache_dir: str | bool | None = False,
    key: str = "dataset",
) -> tuple[Sequence[Pair], Report]:
    """Returns read_rows and then tokenize_pairs of a config's `dataset` or `eval_dataset` block, all but its split.

    Args:
        unpaired, beat: See `tokenize_pairs`.
        cache_dir: Where tokens are kept for other runs; None: where they usually are, False: nowhere.
        key: The block's name, for messages.
    """
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": block["overlong"]}
    limits["max_completion_length"] = max_completion_length
    tokenizer = adapt(tokenizer)

    def read(kept: KeptTokens | None) -> tuple[Sequence[Pair], Report]:
        where = {name: block[name] for name in ("split", "name", "revision", "limit")}
        rows = read_rows(block["source"], **where, columns=as_plain(block["columns"]), key=key)
        how = {"on_bad_row": block["on_bad_row"], "rejected": block["rejected"], "unpaired": unpaired}
        how |= {"progress": progress, "beat": beat, "kept": kept, "key": key}
        return tokenize_pairs(rows, tokenizer, **limits, **how)

    check_source(block["source"], key)
    kept = entry_of(block, limits, tokenizer, cache_dir)
    if kept is None:
        return read(None)
    pairs, report = read_once(kept, block, read, beat)
    return (pairs, report) if report.num_desirable is None or unpaired else read(None)  # which refuses them


def read_train_and_held_out(
    dataset: dict,
    eval_dataset: dict,
    tokenizer,
    world: World,
    max_length: int,
    max_prompt_length: int | None,
    unpaired: bool = False,
    max_completion_length: int | None = None,
    *,
    seed: int = 0,
) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Returns the pairs to train on and the held-out ones, and prints the table of what became of the rows.

    Held out are those of `eval_dataset`, or the last `val_fraction` of each source of `dataset`, or none. Sets of them
    that have names can be had by at_once.sets_of.

    Args:
        dataset, eval_dataset: The config's blocks.
        world: The main process prints and shows progress.
        max_length, max_prompt_length, unpaired, max_completion_length: See `tokenize_pairs`.
        seed: Of what is drawn from a source that is not taken whole.
    """
    read = partial(
        read_pairs,
        tokenizer=tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        unpaired=unpaired,
        progress=world.is_main,
        beat=world.beat,
        cache_dir=dataset.get("cache_dir", False),
    )
    held_out: Sequence[Pair] = []
    if dataset.get("streaming"):
        train = _stream(dataset, tokenizer, (max_length, max_prompt_length, max_completion_length), unpaired, world)
    else:
        train, held_out = _train(dataset, read, seed, world)
    evaluated = as_plain(eval_dataset)
    names, sets = mixture.names_of(evaluated), {}
    for key, block in mixture.sources_of(evaluated, "eval_dataset") if evaluated["source"] else ():
        pairs, report = read(block, key=key)
        name = f"{names[len(sets)]}, " if names else ""
        report = report if dataset.get("streaming") else report.with_split(train, pairs)
        world.print(f"Held-out pairs: {name}{block['source']}\n{report}\n")
        held_out = held_out + pairs
        if names:
            sets[names[len(sets)]] = pairs
    return train, PackedPairs.named(sets) if sets else held_out


def _train(dataset: Mapping, read: Callable, seed: int, world: World) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Returns the pairs of an epoch, and what val_fraction holds out of each source."""
    parts, held_out, blocks = [], [], []
    for key, block in mixture.sources_of(as_plain(dataset), "dataset"):
        pairs, report = read(block, key=key)
        if dataset["val_fraction"]:
            pairs, rest = split_pairs(pairs, dataset["val_fraction"])
            report, held_out = report.with_split(pairs, rest), held_out + rest
        facts = f"\n{glance(pairs)}" if world.is_main else ""
        world.print(f"Training pairs: {block['source']}\n{report}{facts}\n")
        parts.append(pairs)
        blocks.append(block)
    return _mixed(parts, blocks, seed, world), held_out


def _mixed(parts: list[Sequence[Pair]], blocks: list[dict], seed: int, world: World) -> Sequence[Pair]:
    """Returns the pairs of an epoch, source behind source."""
    if len(parts) == 1:
        return parts[0]
    sizes = [len(pairs) for pairs in parts]
    counts = mixture.counts_of(sizes, blocks)
    drawn = [mixture.drawn(pairs, counts[n], f"{seed} {n}") for n, pairs in enumerate(parts)]
    world.print(f"{mixture.told([block['source'] for block in blocks], sizes, counts)}\n")
    return reduce(add, drawn)


def _stream(
    dataset: Mapping, tokenizer, budget: tuple[int, int | None, int | None], unpaired: bool, world: World
) -> PackedPairs:
    """Returns the first pairs of a stream, which they know.

    Args:
        budget: max_length, max_prompt_length, max_completion_length.
    """
    named = mixture.sources_of(as_plain(dataset), "dataset")
    blocks = [block for _, block in named]
    rates, sources, looked_at, numbers = mixture.rates_of(blocks), [], PackedPairs.of([]), set()
    tokenizer = adapt(tokenizer)
    for (key, block), rate in zip(named, rates, strict=True):
        limits = Limits(*budget, block["overlong"], key)
        rows = read_first(block, key)
        pairs, report = tokenize_pairs(
            rows, tokenizer, max_length=budget[0], max_prompt_length=budget[1], max_completion_length=budget[2],
            overlong=block["overlong"], on_bad_row=block["on_bad_row"], rejected=block["rejected"], unpaired=unpaired,
            progress=world.is_main, beat=world.beat, key=key,
        )  # fmt: skip
        world.print(f"Pairs of a stream: {block['source']}, its first {len(rows):,} rows\n{report}\n")
        form, rows = _format_of(rows, key, unpaired=unpaired)
        sources.append(streamed_source(block, rows, form, tokenizer, limits, report, rate=rate, key=key))
        looked_at, numbers = looked_at + pairs, numbers | {name for name in NUMBERS if rows.columns.get(name)}
    if len(blocks) > 1:
        world.print(f"{mixture.told_of_stream([block['source'] for block in blocks], rates)}\n")
    world.print(UNSEEN)
    example = next((pair for pair in looked_at if pair.chosen and pair.rejected), looked_at[0])
    stream = Stream(sources, dataset.get("shuffle_buffer") or BUFFER, limits, example, sorted(numbers))
    return replace(looked_at, stream=stream)


def tokenize_pairs(
    rows: Sequence[dict],
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    overlong: str = "drop",
    on_bad_row: str = "drop",
    rejected: str = "all",
    columns: dict | None = None,
    unpaired: bool = False,
    any_may_go: bool = False,
    progress: bool = True,
    beat: Callable[[str], None] | None = None,
    kept: KeptTokens | None = None,
    key: str = "dataset",
) -> tuple[Sequence[Pair], Report]:
    """Returns the rows' pairs in order, and a report of what was dropped, why, and how long the pairs are.

    Each of the two conversations is rendered once, whole. The prompt is what they share with each other and with the
    prompt rendered alone, generation prompt included: a token that spans the prompt's end belongs to the answers.
    An end token's text is taken off an answer's end.

    Args:
        rows: From `read_rows`, or a list of dicts.
        tokenizer: From tokenizer.hf_tokenizer, or one of torchtune's.
        max_length: Most tokens of prompt + longer answer.
        max_prompt_length, max_completion_length: Of the prompt, and of the longer answer; None leaves it to max_length.
        overlong: What becomes of a pair over one of them: drop, trim_prompt (from the left, BOS stays), error.
        on_bad_row: Broken, or an answer that the template cuts: drop, if at most one in twenty rows is, or error.
        rejected: Of several worse answers, which make a pair: all, the best or the worst.
        columns: Our names to theirs, for rows that `read_rows` has not renamed.
        unpaired: The loss takes rows of one answer and a label, too: needs(loss_fn).takes_unpaired.
        any_may_go: However many rows are dropped, the report says so, and no error.
        beat: Called with a word now and then, as dist.World.beat: a long data set is no standstill.
        kept: Where tokens of many rows are looked up, and added.
        key: Where the config describes the rows, for messages.

    Raises:
        UserError: Too many rows are broken (source, row and column are named), of an unknown format or of none that the
            loss takes, part of a question may be in a column that is not read, or nothing is left.
    """
    limits = Limits(max_length, max_prompt_length, max_completion_length, overlong, key)
    _check_policies(on_bad_row, rejected, key)
    tokenizer, (form, rows) = adapt(tokenizer), _format_of(_as_rows(rows, columns, key), key, unpaired=unpaired)
    numbers = [name for name in NUMBERS if rows.columns.get(name)]
    report, rendered = _report_of(rows, form, tokenizer, numbers), AlreadyRendered(tokenizer)
    asked = {"worse": rejected, "numbers": numbers, "columns": rows.columns, "key": key}
    asked["doubtful"] = doubtful(form.unused(rows.column_names))
    read_row = row_reader(rows, form, tokenizer, limits, rendered, on_bad_row, report.unused, **asked)
    if kept:
        kept.read_by([form.name, rows.columns, sorted(asked["doubtful"]), getattr(form.example, "keywords", None)])
    pairs = _read_all(read_row, rows, report, kept, beat, progress=progress)
    report.num_kept, report.num_desirable = len(pairs), None if form.is_paired else _num_desirable(pairs)
    report.notes += notes_of(report, tokenizer, max_length, max_prompt_length)
    rendered.check(report)
    if not any_may_go:
        report.check(key)
    return pairs, report


def _read_all(
    read_row: ReadRow, rows: Rows, report: Report, kept: KeptTokens | None, beat: Callable | None, *, progress: bool
) -> Sequence[Pair]:
    """Returns all rows' pairs: of a few, one by one."""
    is_much = len(rows) >= FEW
    with console.Progress("tokenizing", len(rows), shown=progress and is_much, unit="rows") as told:

        def update(count: int) -> None:
            told.update(count)
            if beat:
                beat("tokenizing")

        if is_much:
            processes = min(num_cores(), len(rows) // FEW)
            return gather(read_row, rows, report, processes=processes, kept=kept, update=update)
        pairs = []
        for index, number in enumerate(rows.numbers):
            pairs += read_row(index, number, report)
            update(1)
        return pairs


def _num_desirable(pairs: Sequence[Pair]) -> int:
    return int((lengths_of(pairs)[1] > 0).sum())


def _as_rows(rows: Sequence[dict], columns: dict | None, key: str) -> Rows:
    if columns or not isinstance(rows, Rows):
        source, numbers = getattr(rows, "source", "rows"), getattr(rows, "numbers", None)
        rows = Rows(rows, source=source, columns=columns, numbers=numbers, key=key)
    if not len(rows):
        raise UserError(f"{key}: {rows.source} has no rows in this split.")
    return rows


def _check_policies(on_bad_row: str, rejected: str, key: str) -> None:
    if on_bad_row not in ("drop", "error"):
        raise UserError(f"{key}.on_bad_row={on_bad_row!r}: must be drop or error.")
    check_worse(rejected, key)


def _format_of(rows: Rows, key: str, *, unpaired: bool) -> tuple[Format, Rows]:
    form, rows = recognise(rows, key, single=unpaired)
    if not (form.is_paired or unpaired):
        raise UserError(
            f"{key}: {rows.source} holds answers with a label ({', '.join(form.columns)}), and this loss compares the "
            "two answers of a pair; loss=kto takes each answer for itself"
        )
    return form, rows


def _report_of(rows: Rows, form: Format, tokenizer, numbers: list[str]) -> Report:
    report = Report(rows.source, form.name, tokenizer.style, len(rows), special_as=tokenizer.special_tokens_in_text)
    report.unused = [name for name in form.unused(rows.column_names) if name not in numbers]
    report.holds = held_by(report.unused, rows.first(LOOKED_AT))
    parts = rows.beside_parts()
    report.holds |= held_by(list(parts), [{name: cell} for name, cells in parts.items() for cell in cells])
    report.unused += sorted(parts)
    if written := [name for name in rows.written_as_text() if name not in report.unused]:
        report.notes.append(f"messages that are written as text are read as messages: {', '.join(written)}")
    report.beside = [*form.read_beside(rows.column_names), *numbers]
    turning = turning_columns(report.unused, rows.first(LOOKED_AT)) if form.is_paired else []
    report.unused = [name for name in report.unused if name not in turning]
    report.beside += turning
    return report


def split_pairs(pairs: Sequence[Pair], val_fraction: float) -> tuple[Sequence[Pair], Sequence[Pair]]:
    """Returns training and held-out pairs: held out are the last round(val_fraction * len(pairs)), in order.

    Raises:
        UserError: `val_fraction` is not between 0 and 1, or leaves either part empty.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"dataset.val_fraction={val_fraction}: must be between 0 and 1, such as 0.1, or null.")
    num_train = len(pairs) - round(val_fraction * len(pairs))
    train, held_out = pairs[:num_train], pairs[num_train:]
    if not train or not held_out:
        raise UserError(
            f"dataset.val_fraction={val_fraction} of {len(pairs)} pairs leaves {len(train)} to train on and "
            f"{len(held_out)} held out; both need one at least."
        )
    return train, held_out
