"""Which folder a run may write to: whose it is, what it holds, what the run reads. Nothing is changed here; no torch.

A run's folder is known by its mark, or by its config.yaml together with its log or a checkpoint. Only such a folder,
with nothing in it that no run writes, is ever moved aside.
"""

import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import yaml

from pairtune.errors import UserError
from pairtune.run.signed import is_unedited

LOCK = ".pairtune.lock"
MARK = b"A run of pairtune writes to this folder, or has written to it.\n"
CONFIG, LOG, CHECKPOINTS, EXPORT = "config.yaml", "metrics.jsonl", "checkpoints", "export"
CARD = "README.md"  # of an export, unless a user has edited it
WRITTEN = (
    *(CONFIG, LOG, "pairs.bin", "samples.jsonl", "curves.png", "verdict.json", "report.html", "console.log"),
    *(CHECKPOINTS, EXPORT),
)  # by a run
HALF = re.compile(rf"\.export-\w+|\.({'|'.join(map(re.escape, WRITTEN))})\.[0-9a-f]{{8}}")  # what a kill leaves
LOGGED = ("wandb", "events.out.tfevents.*", "log_*.txt")  # by loggers, wherever they are told to write
NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".keep", ".nfs*")
EXPORTED = (
    *("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "config.json", "adapter"),
    *("generation_config.json", "LICENSE*", "tokenizer*", "*chat_template*", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "*.model", "*.tiktoken"),
)
ANOTHER = "name another output_dir"


@dataclass(frozen=True)
class Place:
    """A run folder as it is before the run: `real` is its path without links.

    Attributes:
        entries: Names in it; empty where it is not there.
        is_run: Whether it is recognisably the folder of a run.
    """

    run_dir: Path
    real: Path
    entries: frozenset[str] = frozenset()
    is_run: bool = False

    @property
    def written(self) -> list[str]:
        """What has a name that a run writes to."""
        return sorted(name for name in self.entries if name in WRITTEN)

    @property
    def foreign(self) -> list[str]:
        """What no run writes: a user's."""
        known = (*WRITTEN, LOCK, *NOBODYS, *_logged(self.real)) if self.is_run else (*WRITTEN, LOCK, *NOBODYS)
        return sorted(
            name for name in self.entries if not (HALF.fullmatch(name) or any(fnmatch(name, one) for one in known))
        )


def look(run_dir: Path) -> Place:
    """Returns what is at a run folder's path.

    Raises:
        UserError: No run may write there, or it cannot be read.
    """
    check_path(run_dir)
    real = Path(os.path.realpath(run_dir))
    if not real.exists():
        return Place(run_dir, real)
    try:
        entries = frozenset(os.listdir(real))
    except OSError as error:
        raise unwritable(run_dir, error) from None
    return Place(run_dir, real, entries, _is_run(real))


def unwritable(run_dir: Path, error: OSError) -> UserError:
    """Returns the error of a folder that the disk refuses."""
    return UserError(f"output_dir={run_dir}: cannot be written: {error.strerror or error}; {ANOTHER}")


# Whether a run may write there at all


def check_path(run_dir: Path) -> None:
    """Refuses a path that is no folder and cannot become one, and folders that are more than a run's.

    Raises:
        UserError: One sentence, with the way out.
    """
    told = f"output_dir={run_dir}"
    if any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in str(run_dir)):
        raise UserError(f"output_dir={str(run_dir)!r}: holds a character that no name should hold; {ANOTHER}")
    try:
        run_dir.stat()
    except FileNotFoundError:
        _check_can_be_made(run_dir)
    except OSError as error:
        raise UserError(f"{told}: cannot be a folder: {error.strerror}; {ANOTHER}") from None
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"{told}: is a file, and must be a folder; {ANOTHER}")
    real = Path(os.path.realpath(run_dir))
    for folder, what in ((Path.cwd(), "the folder that the command runs in"), (_home(), "your home folder")):
        if real == folder or real in folder.parents:
            holds = "is" if real == folder else "holds"
            raise UserError(
                f"{told}: {holds} {what}; a run has a folder of its own, such as output_dir={run_dir / 'runs' / 'dpo'}"
            )
    there = next(path for path in (real, *real.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{told}: {there} cannot be written: {_why_not(there)}; {ANOTHER}")


def _why_not(folder: Path) -> str:
    return os.strerror(errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES)


def _check_can_be_made(run_dir: Path) -> None:
    """Refuses a path through a link that leads nowhere."""
    for path in (run_dir, *run_dir.parents):
        if path.is_symlink() and not path.exists():
            real = Path(os.path.realpath(path))
            beside = real.parent.iterdir() if real.parent.is_dir() else ()
            if path == run_dir and any(kept.name.startswith(f"{real.name}.") and _is_run(kept) for kept in beside):
                return  # a kill has come after an earlier run was moved aside, and before there was a new folder
            raise UserError(
                f"output_dir={run_dir}: {path} is a symbolic link to {os.readlink(path)}, which is not there; make "
                f"that folder, or {ANOTHER}"
            )
        if path.exists():
            return


def _home() -> Path:
    try:
        return Path(os.path.realpath(Path.home()))
    except RuntimeError:  # nobody's
        return Path("/")


# Whose it is, and what the run reads


def check(place: Place, *, continues: bool, reads: Sequence[tuple[str, Path]]) -> None:
    """Refuses a folder where something of a user's, of another run or of this run's inputs would be moved or replaced.

    Args:
        continues: The run goes on from a checkpoint of this folder, which stays where it is.
        reads: Files and folders that the run reads, with their keys, from config.paths.

    Raises:
        UserError: One sentence: what is in the way, and the way out.
    """
    told = f"output_dir={place.run_dir}"
    _check_not_within(place)
    if continues:
        _check_replaced(place)
    elif place.written and not place.is_run:
        raise UserError(
            f"{told}: holds {', '.join(place.written)}, and a run would write there, but it is not the folder of a "
            f"run; {ANOTHER}, such as {place.run_dir / 'run'}"
        )
    elif moves(place):
        if place.foreign:
            raise UserError(
                f"{told}: holds an earlier run and also {_some(place.foreign)}, which no run writes, and so is not "
                f"moved aside; {ANOTHER}, or go on with that run: resume=true"
            )
        _check_movable(place)
    _check_reads(place, continues=continues, reads=reads)


def is_saved_config(path: Path, place: Place) -> bool:
    """Returns whether a file is the config.yaml that the run in a folder has saved: `--config` it repeats that run.

    Nothing is lost then: it has been read before the folder is moved, and what the new run saves is the same.
    """
    return _same(path, place.real / CONFIG)


def moves(place: Place) -> bool:
    """Returns whether a new run in this place would move aside what is there."""
    return place.is_run and bool(place.written)


def _check_not_within(place: Place) -> None:
    """Refuses what lies in folders that another run replaces or prunes."""
    for inner in place.real.parents:
        if inner.name in (CHECKPOINTS, EXPORT) and _is_run(inner.parent):
            raise UserError(f"output_dir={place.run_dir}: lies in {inner}, which is a run's own; {ANOTHER}")


def _check_replaced(place: Place) -> None:
    """Of a run that goes on, config and export are written anew: they must be a run's."""
    way_out = "put it elsewhere"
    if CONFIG in place.entries and not _is_saved(place.real / CONFIG):
        raise UserError(f"output_dir={place.run_dir}: {CONFIG} there is not what a run has written; {way_out}")
    exported = place.real / EXPORT
    if EXPORT in place.entries and not exported.is_dir():
        raise UserError(f"output_dir={place.run_dir}: {EXPORT} there is not a folder; {way_out}")
    inside = os.listdir(exported) if EXPORT in place.entries else []
    foreign = sorted(name for name in inside if not any(fnmatch(name, one) for one in (*EXPORTED, *NOBODYS)))
    foreign = [name for name in foreign if name != CARD or not is_unedited(exported / name)]
    if foreign:
        raise UserError(
            f"output_dir={place.run_dir}: {EXPORT}/ there is written anew, and holds {_some(foreign)}, which no run "
            f"writes; {way_out}"
        )


def _check_movable(place: Place) -> None:
    real, way_out = place.real, f"{ANOTHER}, such as {place.run_dir / 'run'}, or go on with that run: resume=true"
    if os.path.ismount(real):
        raise UserError(
            f"output_dir={place.run_dir}: holds an earlier run, and cannot be moved aside, being a disk's own folder "
            f"(a mount point); {way_out}"
        )
    if not os.access(real.parent, os.W_OK | os.X_OK):
        raise UserError(
            f"output_dir={place.run_dir}: holds an earlier run, and cannot be moved aside: {real.parent} cannot be "
            f"written: {_why_not(real.parent)}; {ANOTHER}, or go on with that run: resume=true"
        )


def _check_reads(place: Place, *, continues: bool, reads: Sequence[tuple[str, Path]]) -> None:
    for key, path in reads:
        told = f"{key}={path}"
        if key.endswith(".source") and path.is_dir() and _lies_in(place.real, path):
            raise UserError(
                f"output_dir={place.run_dir}: lies in {told}, all of whose files are read; name one outside of it"
            )
        if not place.entries or (key == "resume" and continues):
            continue
        if _same(path, place.real):
            raise UserError(f"{told}: is output_dir, too, and would be written to while it is read; {ANOTHER}")
        found = _found_in(path, place.real) if continues or moves(place) else None
        if found and not continues:
            raise UserError(
                f"{told}: {_leads(path, found)} output_dir={place.run_dir}, whose earlier run would be moved aside, "
                f"and this with it; {ANOTHER}"
            )
        if found and found.relative_to(place.real).parts[0] in WRITTEN:
            raise UserError(f"{told}: {_leads(path, found)} what this run writes; {ANOTHER}, or put it elsewhere")


def _leads(path: Path, found: Path) -> str:
    direct = found in (path.absolute(), *path.absolute().parents)
    return "lies in" if direct else f"leads to {found}, which lies in"


def _same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _lies_in(real: Path, folder: Path) -> bool:
    return any(_same(path, folder) for path in (real, *real.parents) if path.exists())


def _found_in(path: Path, real: Path) -> Path | None:
    """Returns where, inside of a folder, something lies that reading `path` comes to; None: nowhere.

    Links on the way to it are followed, and, of a folder, those in it, such as a snapshot's to its blobs.
    """
    for place in (*_trail(path), *(step for link in _links(path, set()) for step in _trail(link))):
        for above in place.parents:
            if _same(above, real):
                return real / place.relative_to(above)
    return None


def _trail(path: Path, depth: int = 40) -> Iterator[Path]:
    """Yields each name that is looked up on the way to a file, in a folder that is written without links."""
    path = path.absolute()
    for part in (*reversed(path.parents), path):
        if part.name in ("", ".."):
            continue
        place = Path(os.path.realpath(part.parent)) / part.name
        yield place
        if place.is_symlink() and depth:
            yield from _trail(place.parent / os.readlink(place), depth - 1)


def _links(folder: Path, seen: set) -> Iterator[Path]:
    """Yields the links in a folder and in those that it holds or links to."""
    try:
        found = folder.stat()
        if (found.st_dev, found.st_ino) in seen or not folder.is_dir():
            return
        seen.add((found.st_dev, found.st_ino))
        inside = list(os.scandir(folder))
    except OSError:  # whoever reads it tells
        return
    for entry in inside:
        if entry.is_symlink():
            yield Path(entry.path)
        if entry.is_dir():
            yield from _links(Path(entry.path), seen)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# How a run's folder is known


def _is_run(real: Path) -> bool:
    try:
        if (real / LOCK).is_file() and (real / LOCK).read_bytes()[: len(MARK)] == MARK:
            return True
        return _is_saved(real / CONFIG) and (_is_log(real / LOG) or any(real.glob(f"{CHECKPOINTS}/step_*/COMPLETE")))
    except OSError:
        return False


def _is_saved(path: Path) -> bool:
    """Whether a config.yaml is one that a run has saved: the command that repeats it comes first."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(4096).startswith(b"# tune run ")


def _is_log(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        line = file.readline(2**20)
    try:
        return not line or isinstance(json.loads(line)["step"], int)
    except (ValueError, KeyError, TypeError):
        return False


def _logged(real: Path) -> Iterator[str]:
    """Yields what a run's logger has written, by its config.yaml: entries of the folder, as patterns."""
    try:
        block = yaml.safe_load((real / CONFIG).read_text(encoding="utf-8"))["metric_logger"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return
    if not isinstance(block, dict):
        return
    yield from LOGGED
    for value in block.values():
        path = Path(os.path.realpath(value)) if isinstance(value, str) and "\0" not in value else real
        if real in path.parents:
            yield path.relative_to(real).parts[0]
