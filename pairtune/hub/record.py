"""What was fetched into a folder: so that another revision takes its place, and a user's own files are left alone."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from pairtune.errors import UserError
from pairtune.files import parse_object, write_text
from pairtune.hub.http import File, Source

BOOKKEEPING = ".cache/pairtune"  # in the folder, beside huggingface_hub's; hidden, so that no data set is read from it
RECORD = f"{BOOKKEEPING}/fetched.jsonl"  # what came from where: a row of Record's fields, then one for each File
ANOTHER = "another --revision, or another folder: --output-dir"


@dataclass(frozen=True)
class Record:
    """What this command fetched into a folder; `revision` is a commit."""

    repo_id: str
    repo_type: str
    revision: str | None
    files: list[File]


def read_record(folder: Path) -> Record | None:
    """Returns what was noted of a folder, None where nothing was.

    Raises:
        UserError: It cannot be read, or names a file that is outside of the folder.
    """
    path = folder / RECORD
    if not path.is_file():
        return None
    lines = path.read_bytes().split(b"\n")[:-1]  # without one that broke off
    rows = [parse_object(line, path, way_out=ANOTHER) for line in lines]
    try:
        record = Record(**rows[0], files=[File(**row) for row in rows[1:]])
    except (IndexError, TypeError) as error:
        raise UserError(f"{path}: is no record of a download ({error}); another folder: --output-dir DIR") from None
    if outside := [file.name for file in record.files if not is_inside(file.name)]:
        raise UserError(f"{path}: names {outside[0]}, which is outside of the folder; another folder: --output-dir DIR")
    return record


def write_record(folder: Path, source: Source, files: Iterable[File]) -> None:
    """Notes that these files, and no others, came from there."""
    path = folder / RECORD
    head = {"repo_id": source.repo_id, "repo_type": source.repo_type, "revision": source.revision}
    write_text(path, "".join(json.dumps(row) + "\n" for row in (head, *map(asdict, files))))


def note(folder: Path, file: File) -> None:
    """Notes one file more."""
    with (folder / RECORD).open("a") as record:  # one write: threads do not mix their rows
        record.write(json.dumps(asdict(file)) + "\n")


def is_inside(name: str) -> bool:
    """Says whether a file of this name lies in the folder that it is put in."""
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
