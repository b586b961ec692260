"""Small files: JSON that is read with a way out, text that is replaced at once."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import IO, Any

from pairtune.errors import UserError

AGAIN = "download it again"
ROW_FILES = (".json", ".jsonl", ".csv", ".parquet")  # of rows; all but parquet also as .gz


def check_there(path: Path) -> None:
    """Raises UserError for a file that was found and is gone: to say that it is damaged would mislead."""
    if not path.is_file():
        raise UserError(f"{path}: is missing: it was moved or removed since it was found; put it back")


def read_json(path: Path, *, way_out: str = AGAIN) -> Any:
    """Returns what a JSON file holds.

    Raises:
        UserError: It cannot be read, or is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing; put it back, or {way_out}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; {way_out}") from None


def read_object(path: Path, *, way_out: str = AGAIN) -> dict:
    """Returns the keys and values that a JSON file holds, {} where there is none.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    return _checked(read_json(path, way_out=way_out), path, way_out) if path.is_file() else {}


def parse_object(content: bytes, where: str | Path, *, way_out: str = AGAIN) -> dict:
    """Returns the keys and values that JSON holds which has been read already; `where` it stands is for the message.

    Raises:
        UserError: It is no JSON, or holds something else.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read: {error}; {way_out}") from None
    return _checked(found, where, way_out)


def _checked(found: Any, where: str | Path, way_out: str) -> dict:
    if not isinstance(found, dict):
        raise UserError(f"{where}: must hold keys and values, holds a {type(found).__name__}; {way_out}")
    return found


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Replaces a small file at once: whoever reads it, and whatever a kill or a full disk leaves, is old or new.

    Of several processes that do, the last one wins.

    Args:
        durable: It is on the disk when this returns, under its name.
    """
    write_bytes(path, text.encode(), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Replaces a small file at once, as `write_text` does."""
    with replacing(path, "wb", durable=durable) as file:
        file.write(content)


@contextmanager
def replacing(path: Path, mode: str = "w", *, durable: bool = False) -> Iterator[IO]:
    """Gives a file to write, which takes the path's place at once when the context ends, and not after an error.

    Args:
        mode: w for text in UTF-8, wb for bytes.
        durable: As for write_text.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    temporary = path.with_name(f".{path.name}.{token_hex(4)}")  # another process may write the same file
    try:
        # With the mode that the umask gives, unlike tempfile's
        with temporary.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


@contextmanager
def telling(path: Path, way_out: str) -> Iterator[None]:
    """Around what writes to a path.

    Raises:
        UserError: In place of the disk's error.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}; {way_out}") from None


def give_modes(folder: Path) -> None:
    """Gives the files in a new folder the modes that the folder's tells the umask gives; libraries make them 0600."""
    mode = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(mode)


def sync_folder(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def entries(folder: Path, name: re.Pattern) -> list[Path]:
    """Returns what a cache's folder holds under such names; nothing where there is no folder."""
    return [path for path in folder.iterdir() if name.fullmatch(path.name)] if folder.is_dir() else []


def remove_entries(folder: Path, name: re.Pattern, keys: Sequence[str]) -> list[str]:
    """Removes a cache's entries, all of them if no key is named; returns the keys of those it removed.

    Raises:
        UserError: There is no such entry; none is removed then.
    """
    known = {entry.name: entry for entry in entries(folder, name)}
    if unknown := [key for key in keys if key not in known]:
        raise UserError(f"{unknown[0]}: no such entry in {folder}; `tune cache ls` lists them")
    removed = list(dict.fromkeys(keys or known))
    for key in removed:
        shutil.rmtree(known[key].rename(folder / f".{key}.{os.getpid()}"))  # gone at once for whoever looks
    return removed
