"""The marker of a complete checkpoint: which files it has, how long each is, and its SHA-256.

Markers of earlier versions have sizes only: of those, checksums are not compared.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from pairtune.errors import UserError, listed
from pairtune.files import write_text
from pairtune.process.dist import World

MARKER = "COMPLETE"
PART_BYTES = 2**22  # of a file, at a time
DAMAGED = "is damaged: its checksum is not that of what was written"


def digest(content: bytes) -> list:
    """Returns what a marker says of a file: its bytes and their SHA-256."""
    return [len(content), hashlib.sha256(content).hexdigest()]


def digest_file(path: Path, update: Callable[[int], None] = lambda num_bytes: None) -> list:
    """Returns `digest` of a file's content.

    Args:
        update: Called with the number of bytes that were just read.
    """
    hashed, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(PART_BYTES):
            hashed.update(part)
            update(len(part))
            size += len(part)
    return [size, hashed.hexdigest()]


def write_marker(folder: Path, files: dict[str, list], coming: dict[str, list] | None = None) -> None:
    """Writes the marker, durably and at once.

    Args:
        files: `digest` of each, by name.
        coming: Of those that are about to be replaced: either content is right.
    """
    said = {"files": files, "coming": coming or {}}
    write_text(folder / MARKER, json.dumps(said | {"sha256": _own(said)}), durable=True)


def read_marker(folder: Path) -> dict[str, list[list]] | None:
    """Returns what each file may be, [bytes, SHA-256 or None] each, by name; None where there is no marker.

    Raises:
        UserError: It is not as it was written.
    """
    try:
        text = (folder / MARKER).read_text(encoding="utf-8")
        said = json.loads(text)
        if said and all(type(size) is int for size in said.values()):  # of an earlier version
            return {name: [[size, None]] for name, size in said.items()}
        if json.dumps(said) == text and said.pop("sha256") == _own(said):
            coming = {name: [other] for name, other in said["coming"].items()}
            return {name: [was, *coming.get(name, [])] for name, was in said["files"].items()}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, AttributeError, KeyError):
        pass
    raise UserError(
        f"resume: {folder / MARKER} is damaged: it is not as it was written; remove {folder} to go on from the "
        "checkpoint before it"
    )


def replace_file(folder: Path, name: str, text: str) -> None:
    """Gives a file of a complete checkpoint another content; a kill at any moment leaves it complete, old or new."""
    may_be = read_marker(folder) or {}
    if all(sha256 is None for _, sha256 in sum(may_be.values(), [])):
        write_text(folder / name, text, durable=True)  # an earlier version's marker does not list it
        return
    files = {other: versions[0] for other, versions in may_be.items()} | {name: digest_file(folder / name)}
    new = digest(text.encode())
    write_marker(folder, files, {name: new})
    write_text(folder / name, text, durable=True)
    write_marker(folder, files | {name: new})


def is_complete(folder: Path) -> bool:
    """Returns whether a checkpoint has its marker and every file that it lists, as long as it was.

    An error of the disk is an error: a checkpoint that cannot be read now is not one that is incomplete.
    """
    try:
        may_be = read_marker(folder)
    except UserError:
        return False
    try:
        return may_be is not None and all(
            (folder / name).stat().st_size in [size for size, _ in versions] for name, versions in may_be.items()
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def lacking(folder: Path) -> str:
    """Returns what keeps a checkpoint from being complete, in words; "" if nothing does."""
    may_be = read_marker(folder)
    if may_be is None:
        return f"it has no {MARKER}"
    for name, versions in may_be.items():
        if not (folder / name).exists():
            return f"{name} is missing: it was moved or removed"
        if (size := (folder / name).stat().st_size) not in [size for size, _ in versions]:
            return f"{name} has {size:,} bytes, {versions[0][0]:,} were written"
    return ""


def check_content(folder: Path, name: str, content: bytes, *, way_out: str) -> None:
    """Raises UserError if a file's content, which has been read, is not what the marker says."""
    versions = (read_marker(folder) or {}).get(name, [])
    if versions and not any(_agrees(digest(content), version) for version in versions):
        raise UserError(f"resume: {folder / name} {DAMAGED}; {way_out}")


def check_files(folder: Path, world: World, *, way_out: str) -> None:
    """Compares each file of a checkpoint with its checksum, every process its share; every process has to call it.

    Raises:
        UserError: In every process: a file, or the marker, is not what was written.
    """
    files = sorted((read_marker(folder) or {}).items())
    wrong = []
    for name, versions in files[world.rank :: world.size]:
        world.beat("comparing checksums", patient=True)
        wrong += _wrong(folder / name, versions)
    if wrong := sorted(world.gather(wrong)):
        if len(wrong) == 1:
            raise UserError(f"resume: {wrong[0]}; {way_out}")
        raise UserError(
            f"resume: {folder}: {len(wrong)} files are not as they were written; {way_out}\n{listed(wrong)}"
        )


def _wrong(path: Path, versions: list[list]) -> list[str]:
    """Returns a sentence if a file is not there, or none of what it may be."""
    if not path.exists():
        return [f"{path} is missing: it was moved or removed"]
    if all(sha256 is None for _, sha256 in versions):
        return []
    try:
        found = digest_file(path)
    except OSError as error:
        return [f"{path} cannot be read: {error.strerror}"]
    return [] if any(_agrees(found, version) for version in versions) else [f"{path} {DAMAGED}"]


def _agrees(found: list, said: list) -> bool:
    return found[0] == said[0] and said[1] in (None, found[1])


def _own(said: dict) -> str:
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
