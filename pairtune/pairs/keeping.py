"""When tokens are kept for other runs, and when a whole source need not be read again."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from pairtune.pairs.kept import KeptTokens, digest_source, find_folder, state_of
from pairtune.pairs.packed import PackedPairs
from pairtune.pairs.pair import Pair
from pairtune.pairs.report import Report

BY_ROW = "by row"
FEW_BYTES = 2**18  # of a source: fewer are tokenized in a moment
READ_BY = ("source", "name", "revision", "split", "limit")  # of a block: which rows
# What does not change what becomes of a row; `overlong` is among the limits
PLACES = (*READ_BY, "overlong", "val_fraction", "cache_dir", "weight", "share")
Read = Callable[[KeptTokens], tuple[Sequence[Pair], Report]]


def read_once(
    kept: KeptTokens, block: Mapping, read: Read, beat: Callable[[str], None] | None
) -> tuple[Sequence[Pair], Report]:
    """Returns what an earlier run has kept of a whole source, or what `read` returns, which is kept then.

    Args:
        block: The config's.
        beat: As of tokenize_pairs.
    """
    path = Path(block["source"]).expanduser()
    before, source = state_of(path), digest_source(path, [block[name] for name in READ_BY])
    if found := _kept_reading(kept, source):
        return found

    def waits() -> None:
        if beat:
            beat("waiting for the process that tokenizes these rows")

    with kept.filling(waits):
        if found := _kept_reading(kept, source):
            return found
        pairs, report = read(kept)
        if source and isinstance(pairs, PackedPairs) and state_of(path) == before:
            kept.keep_reading(source, pairs, {"report": _without_numbers(asdict(report))})
    return pairs, report


def _kept_reading(kept: KeptTokens, source: str | None) -> tuple[Sequence[Pair], Report] | None:
    found = kept.reading(source) if source else None
    return found and (found.pairs, Report(**_with_numbers(found.told["report"])))


def entry_of(block: Mapping, limits: dict, tokenizer, cache_dir: str | bool | None) -> KeptTokens | None:
    """Returns where tokens of these rows are kept; None where they are not: few rows, or a tokenizer of torchtune's."""
    path = Path(block["source"]).expanduser()
    is_small = 0 < sum(num_bytes for _, _, num_bytes, _ in state_of(path)) < FEW_BYTES
    if cache_dir is False or is_small or not hasattr(tokenizer, "digest"):
        return None
    settings = {name: value for name, value in block.items() if name not in PLACES}
    content = {
        "tokenizer": tokenizer.digest(),
        "limits": limits,
        "settings": json.loads(json.dumps(settings, default=dict)),
    }
    named = "dataset.cache_dir" if cache_dir else None
    return KeptTokens(find_folder(cache_dir), content, made_of=str(tokenizer.folder), key=named)


def _without_numbers(told: dict) -> dict:
    """Returns a report's fields as JSON can hold them: a dict whose keys are rows' numbers becomes pairs."""

    def plain(value):
        by_row = isinstance(value, dict) and any(isinstance(key, int) for key in value)
        return {BY_ROW: list(value.items())} if by_row else value

    return {name: plain(value) for name, value in told.items()}


def _with_numbers(told: dict) -> dict:
    return {
        name: dict(value[BY_ROW]) if isinstance(value, dict) and isinstance(value.get(BY_ROW), list) else value
        for name, value in told.items()
    }
