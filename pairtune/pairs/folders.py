"""Rows of a folder, file by file, and of the Hugging Face Hub: by split."""

import csv
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate, chain
from pathlib import Path

import datasets
from huggingface_hub import utils as hub_utils

from pairtune.errors import UserError
from pairtune.files import ROW_FILES
from pairtune.pairs.files import check_names, read_file


class Shards(Sequence):
    """Rows of several files, one file behind the other, each row as its own file has it.

    Args:
        parts: Of each file, its path, its rows, and the number that the first of these has in the file.
    """

    def __init__(self, parts: list[tuple[Path, Sequence, int]]):
        self.parts = parts
        self._stops = list(accumulate(len(rows) for _, rows, _ in parts))
        names = (getattr(rows, "column_names", None) or chain.from_iterable(rows) for _, rows, _ in parts)
        self.column_names = list(dict.fromkeys(chain.from_iterable(names)))

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getitem__(self, index: int) -> dict:
        part, number = self._find(range(len(self))[index])
        return self.parts[part][1][number]

    def __iter__(self) -> Iterator[dict]:
        return chain.from_iterable(rows for _, rows, _ in self.parts)

    def select(self, indices: range) -> "Shards":
        """Returns the rows from a first to a last one."""
        parts, start = [], 0
        for (file, rows, first), stop in zip(self.parts, self._stops, strict=True):
            low, high = max(indices.start, start) - start, min(indices.stop, stop) - start
            if low < high:
                part = rows[low:high] if isinstance(rows, list) else rows.select(range(low, high))
                parts.append((file, part, first + low))
            start = stop
        return Shards(parts)

    def place(self, index: int) -> str:
        """Returns a row's file, and its number there."""
        part, number = self._find(index)
        file, _, first = self.parts[part]
        return f"{file}, row {first + number} (from 0)"

    def _find(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._stops, index)
        return part, index - (self._stops[part - 1] if part else 0)


def read_folder(path: Path, name: str | None, key: str) -> dict[str, Sequence]:
    """Returns a folder's rows by split, as `datasets` finds its files and splits.

    Raises:
        UserError: There are none, or a file cannot be read.
    """
    found = files_of_splits(path, name, key)
    if found is None:
        with _told(path, key), tempfile.TemporaryDirectory() as cache, _without_bars():
            if _is_saved(path):
                return _saved(path)
            return datasets.load_dataset(str(path), name, cache_dir=cache, keep_in_memory=True)
    return {split: Shards([(file, read_file(file, key), 0) for file in files]) for split, files in found.items()}


def open_other(path: Path, name: str | None, key: str) -> Mapping[str, datasets.Dataset | datasets.IterableDataset]:
    """Returns the rows by split, to be read one by one, of a folder for which files_of_splits returns None.

    Raises:
        UserError: There are none.
    """
    with _told(path, key), _without_bars():
        return _saved(path) if _is_saved(path) else datasets.load_dataset(str(path), name, streaming=True)


def _saved(path: Path) -> Mapping[str, datasets.Dataset]:
    data = datasets.load_from_disk(str(path))
    return data if isinstance(data, dict) else {"train": data}


def files_of_splits(path: Path, name: str | None, key: str) -> dict[str, list[Path]] | None:
    """Returns a folder's files by split; None where `datasets` has to read them.

    Raises:
        UserError: There are none, or a file cannot be read.
    """
    for file in path.rglob("*.csv"):  # pandas would rename the second column
        try:
            with file.open(newline="", encoding="utf-8-sig", errors="replace") as text:
                check_names(next(csv.reader(text), []), f"{file}, line 1")
        except (OSError, csv.Error) as error:
            raise UserError(f"{key}.source={path}: {file} cannot be read: {error}. Mend it, or take it out.") from error
    if _is_saved(path):
        return None
    # The usual cache would keep every version
    with _told(path, key), tempfile.TemporaryDirectory() as cache, _without_bars():
        builder = datasets.load_dataset_builder(str(path), name, cache_dir=cache)
    found = {str(split): [Path(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    return found if found and all(_is_read(file) for files in found.values() for file in files) else None


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


@contextmanager
def _told(path: Path, key: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # boundary: builders raise whatever their readers raise
        raise UserError(
            f"{key}.source={path}: the folder cannot be read as a dataset: {cause(error)}. "
            f"It should hold {', '.join(ROW_FILES)} files of one form; or name one file."
        ) from error


def _is_read(file: Path) -> bool:
    return Path(file.name.removesuffix(".gz")).suffix in ROW_FILES and not file.name.endswith(".parquet.gz")


def read_hub(source: str, name: str | None, revision: str | None, key: str) -> dict[str, datasets.Dataset]:
    """Returns the rows of a data set of the Hub by split, from its cache on this disk if they are there."""
    return _from_hub(source, name, revision, key)


def open_hub(source: str, name: str | None, revision: str | None, key: str) -> dict[str, datasets.IterableDataset]:
    """Returns the rows of a data set of the Hub by split, to be read one by one: nothing is kept on this disk."""
    return _from_hub(source, name, revision, key, streaming=True)


def _from_hub(source: str, name: str | None, revision: str | None, key: str, **how):
    if os.environ.get("RANK", "0") == "0":  # one process speaks
        print(f"{key}.source={source}: read from the Hugging Face Hub, or from its cache on this disk", flush=True)
    try:
        with _without_bars():
            return datasets.load_dataset(source, name, revision=revision, **how)
    except Exception as error:  # boundary: errors of network, permission and builders have no common type
        raise UserError(
            f"{key}.source={source}, name={name}, revision={revision}: not on this disk, and the Hugging Face Hub "
            f"does not give it: {cause(error)}\n"
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


def cause(error: Exception) -> str:
    """Returns what has first gone wrong, in a line."""
    root = error.__cause__ or error
    return f"{type(root).__name__}: {(str(root).strip() or repr(root)).splitlines()[0]}"
