"""Our names for the columns of rows: what `dataset.columns` says, applied to a row. layouts.py says what it may say."""

import difflib
from collections.abc import Sequence

from omegaconf import OmegaConf

from pairtune.errors import UserError
from pairtune.pairs.cells import read_literal, read_messages

OF_VALUES = ("choice", "preference", "label")  # which may say what a column's values stand for
MANY = ("answers", "scores", "ranks", "order", "choice")  # which may be made of several columns


def as_plain(columns) -> dict:
    """Returns a config's `columns` as a dict of names, lists and dicts."""
    return OmegaConf.to_container(columns, resolve=True) if OmegaConf.is_config(columns) else dict(columns or {})


class Renaming:
    """Gives rows our column names.

    Args:
        columns: Ours to theirs; None leaves a column out.
        found: The columns that rows have.
    """

    def __init__(self, columns: dict, found: Sequence[str]):
        self.columns = columns
        self._theirs = {ours: _paths(theirs) for ours, theirs in columns.items() if theirs is not None}
        self.paths = [path for theirs in self._theirs.values() for path in _listed(theirs)]
        self.taken = {*columns, *(head for path in self.paths for head in _heads(path, found))}
        self.names = [*self._theirs, *(name for name in found if name not in self.taken)]

    def __call__(self, row: dict) -> dict:
        if not self.taken:
            return row
        ours = {
            ours: [look_up(row, path) for path in paths] if isinstance(paths, list) else look_up(row, paths)
            for ours, paths in self._theirs.items()
        }
        for name in ("scores", "ranks"):
            if found := _by_key(row, self._theirs.get("answers"), self._theirs.get(name)):
                ours[name] = found
        return ours | {name: value for name, value in row.items() if name not in self.taken}


def unpacked(row: dict) -> dict:
    """Returns the row with messages in place of the text that they were written as: JSON, or as Python prints them."""
    found = {}
    for name, cell in row.items():
        if isinstance(cell, str):
            try:
                messages = read_messages(cell)
            except ValueError:  # stays text, which no list of messages is
                continue
            if messages is not None:
                found[name] = messages
    return row | found if found else row


def look_up(row: dict, path: str):
    """Returns what a dotted name means in a row, None where it means nothing.

    A star is every entry of a list or an object.
    """
    if path in row:
        return row[path]
    if path.endswith("*") and "." not in path:
        return [value for name, value in row.items() if name.startswith(path[:-1])]
    return _walk(row, path.split("."))


def _by_key(row: dict, answers, numbers) -> list | None:
    """Returns an object's numbers in the order of another one's answers, null where there is none; None where these are
    no paths to all that two objects hold."""
    if not all(isinstance(path, str) and path.endswith(".*") for path in (answers, numbers)):
        return None
    answered, numbered = look_up(row, answers.removesuffix(".*")), look_up(row, numbers.removesuffix(".*"))
    if not (isinstance(answered, dict) and isinstance(numbered, dict)):
        return None
    return [numbered.get(key) for key in answered]


def _walk(value, steps: list[str]):
    for i, step in enumerate(steps):
        value = read_literal(value) if isinstance(value, str) else value
        if step == "*":
            entries = [*value.values()] if isinstance(value, dict) else value
            return [_walk(entry, steps[i + 1 :]) for entry in entries] if isinstance(entries, list) else None
        if isinstance(value, dict):
            value = value.get(step)
        elif isinstance(value, list) and step.removeprefix("-").isdigit() and -len(value) <= int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def check_columns(columns: dict, found: Sequence[str], ours: Sequence[str], source: str, key: str) -> None:
    """Refuses names that are not ours, and columns that the rows do not have.

    Raises:
        UserError: With the nearest that there is.
    """
    for name, theirs in columns.items():
        if name not in ours and not (theirs is None and name in found):
            known = ", ".join(ours)
            raise UserError(f"{key}.columns.{name}: no column of ours. {_nearest(name, ours)} Known: {known}.")
        if isinstance(theirs, list) and name not in MANY or isinstance(theirs, dict) and name not in OF_VALUES:
            raise _no_such(key, f"{name}={theirs}", theirs, found, source)
        for path in _listed(_paths(name if theirs is None else theirs)):
            if not isinstance(path, str) or not set(_heads(path, found)) <= set(found):
                raise _no_such(key, f"{name}={theirs if theirs is not None else name}", path, found, source)


def _no_such(key: str, setting: str, path, found: Sequence[str], source: str) -> UserError:
    word = path.partition(".")[0] if isinstance(path, str) else path
    taken_back = f" ~{key}.columns takes the mapping back." if key in ("dataset", "eval_dataset") else ""
    return UserError(
        f"{key}.columns.{setting}: {source} has no such column. {_nearest(word, found)} Columns found: "
        f"{', '.join(found)}.{taken_back}"
    )


def _paths(theirs):
    """Returns the name or names of a column, without what its values stand for."""
    if isinstance(theirs, dict):
        names = [str(name) for name in theirs]
        return names[0] if len(names) == 1 else names
    return theirs


def _listed(paths) -> list:
    return paths if isinstance(paths, list) else [paths]


def _heads(path, found: Sequence[str]) -> list:
    """Returns the columns that a dotted name begins in: one, or with a star at its end all that begin so."""
    if path in found or not isinstance(path, str):
        return [path]
    if path.endswith("*") and "." not in path:
        return [name for name in found if name.startswith(path[:-1])] or [path]
    return [path.partition(".")[0]]


def _nearest(word, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(word), known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else "No name is near it."
