"""The run folder: one run's at a time, from the moment that the run chooses it.

`claim` locks it, and makes it where it is missing; `Claim.check` refuses what would lose something; `Claim.make_room`,
when all other checks are done, moves an earlier run aside. Whatever a kill leaves on the way, nothing is lost or mixed,
and the next run works: a folder is moved whole, and a new one is marked before anything else is in it.
"""

import fcntl
import json
import os
import shutil
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from pairtune.errors import UserError
from pairtune.process import console
from pairtune.run import places
from pairtune.run.places import ANOTHER, EXPORT, LOCK, MARK

AGAIN = "PAIRTUNE_FOLDERS"  # environment: what a try before this one has claimed, see starting_again.py
_claims: "weakref.WeakValueDictionary[tuple[int, int], Claim]" = weakref.WeakValueDictionary()  # of this process


def claim(run_dir: Path, reads: Sequence[tuple[str, Path]] = ()) -> "Claim":
    """Returns the hold on a run folder, which lasts until it is let go of, or the process ends.

    A folder that is missing is made; if the run is refused before `make_room`, it is taken away again.

    Args:
        reads: Files and folders that the run reads, with their keys, from config.paths.

    Raises:
        UserError: No run may write there, or another one does.
    """
    place = places.look(run_dir)
    again = str(place.real) in json.loads(os.environ.pop(AGAIN, "[]"))
    for _ in range(100):  # whoever had the folder before may take it away meanwhile
        made = _make(place.real, run_dir)
        try:
            file = os.open(place.real / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue
        except OSError as error:
            _take_away(made)
            raise places.unwritable(run_dir, error) from None
        held = _claims.get(_identity(file))
        if held is not None and held.is_open:  # by this process: a second run in a notebook, after the first
            os.close(file)
            held.hand_over()
            return Claim(run_dir, place.real, held.file, held.made, reads, again=again)
        if not _lock_patiently(file):
            os.close(file)
            raise _busy(run_dir)
        if _is_there(place.real / LOCK, file):
            return Claim(run_dir, place.real, file, made, reads, again=again)
        os.close(file)
    raise UserError(f"output_dir={run_dir}: another run takes it away again and again; {ANOTHER}")


def held() -> dict[str, str]:
    """Returns what tells the process that replaces this one that these folders are its own: for its environment."""
    return {AGAIN: json.dumps([str(claim.real) for claim in _claims.values() if claim.is_open])}


def check_free(place: places.Place) -> None:
    """Refuses a folder that a run is writing to, without making or locking anything.

    Raises:
        UserError: One is.
    """
    try:
        with (place.real / LOCK).open("rb") as file:
            is_free = _try_lock(file.fileno(), fcntl.LOCK_SH)
    except OSError:  # it is not there
        return
    if not is_free:
        raise _busy(place.run_dir)


def _busy(run_dir: Path) -> UserError:
    return UserError(f"output_dir={run_dir}: another run is writing there; wait until it has ended, or {ANOTHER}")


class Claim:
    """This process's hold on a run folder."""

    def __init__(
        self,
        run_dir: Path,
        real: Path,
        file: int,
        made: list[Path],
        reads: Sequence[tuple[str, Path]] = (),
        *,
        again: bool = False,
    ):
        """
        Args:
            real: The folder's path without links.
            file: Its lock, open and locked.
            made: Folders that were made for it, the innermost first.
            again: What is there, this run itself has written, in a try that ran out of memory.
        """
        self._run_dir, self.real, self.file, self.made = run_dir, real, file, made
        self._reads, self._again = reads, again
        self._end = weakref.finalize(self, _let_go, file, real, made, os.getpid())  # also when the process ends
        _claims[_identity(file)] = self

    @property
    def is_open(self) -> bool:
        return self._end.alive

    def hand_over(self) -> None:
        """Gives the lock to another claim of this process."""
        self._end.detach()

    def check(self, resumed: Path | None) -> Path | None:
        """Returns the checkpoint that the run goes on from, if nothing that others keep or this run reads is lost.

        Raises:
            UserError: See places.check.
        """
        places.check(places.look(self._run_dir), continues=self._continues(resumed), reads=self._reads)
        return resumed

    def make_room(self, resumed: Path | None) -> None:
        """Makes the folder this run's; an earlier run that it holds is kept beside it, as NAME.1, NAME.2, ...

        It keeps what is printed from here on, and what was printed before: see process/console.py.

        Args:
            resumed: The checkpoint that the run goes on from. If it is of this folder, the folder stays; if of another
                one, what that run has logged and answered is copied.

        Raises:
            UserError: As `check`, or the disk refuses it, or another run took the name.
        """
        continues = self._continues(resumed)
        self.check(resumed)
        place = places.look(self._run_dir)
        try:
            if place.is_run:
                _clean(self.real)
            if places.moves(place) and not continues:
                self._move_aside()
            os.pwrite(self.file, MARK, 0)
            console.keep(self.real / console.FILE)
            for name in ("metrics.jsonl", "pairs.bin", "samples.jsonl") if resumed and not continues else ():
                source = resumed.parent.parent / name
                if source.exists():
                    shutil.copyfile(source, self.real / name)
        except OSError as error:
            raise places.unwritable(self._run_dir, error) from None

    def _continues(self, resumed: Path | None) -> bool:
        return self._again or resumed is not None and resumed.resolve().parent.parent == self.real

    def _move_aside(self) -> None:
        """The folder goes whole, with the lock; whoever makes the next one of its name first, has it."""
        for number in count(1):
            kept = self.real.with_name(f"{self.real.name}.{number}")
            if os.path.lexists(kept):
                continue
            try:
                self.real.rename(kept)
                break
            except OSError:
                if not os.path.lexists(kept):  # else somebody has made it this very moment
                    raise
        taken = f"output_dir={self._run_dir}: another run took the name; the earlier run is now {kept}; {ANOTHER}"
        try:
            self.real.mkdir()
            new = os.open(self.real / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except (FileExistsError, FileNotFoundError):
            raise UserError(taken) from None
        if not _lock_patiently(new) or not _is_there(self.real / LOCK, new):
            os.close(new)
            raise UserError(taken)
        self.hand_over()
        os.close(self.file)
        self.file, self.made = new, []
        self._end = weakref.finalize(self, _let_go, new, self.real, self.made, os.getpid())
        _claims[_identity(new)] = self
        print(f"{self._run_dir} held an earlier run, which is now {kept}\n")


def _make(real: Path, run_dir: Path) -> list[Path]:
    """Makes a folder and those that it is in; returns those that it made, the innermost first."""
    missing = [path for path in (real, *real.parents) if not path.exists()]
    made = []
    for path in reversed(missing):
        try:
            path.mkdir()
            made.insert(0, path)
        except FileExistsError:  # another run, at the same moment
            pass
        except OSError as error:
            _take_away(made)
            raise places.unwritable(run_dir, error) from None
    return made


def _take_away(folders: list[Path]) -> None:
    for path in folders:
        with suppress(OSError):  # something is in it
            path.rmdir()


def _let_go(file: int, real: Path, made: list[Path], owner: int) -> None:
    """Unlocks a folder; of one that no run has begun to write to, the lock goes, and the folder if made for it."""
    with suppress(OSError):
        if os.getpid() == owner and not os.fstat(file).st_size and _is_there(real / LOCK, file):
            (real / LOCK).unlink()
            _take_away(made)
    os.close(file)


def _clean(real: Path) -> None:
    """Removes what a kill has left of an export; one that was about to take its place takes it."""
    for left in real.glob(".export-*"):
        if (left / "earlier").exists() and not os.path.lexists(real / EXPORT):
            (left / EXPORT).rename(real / EXPORT)
        shutil.rmtree(left, ignore_errors=True)


def _identity(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _is_there(path: Path, file: int) -> bool:
    """Whether an open file is still what its path names: it may have been moved or removed meanwhile."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == _identity(file)


def _lock_patiently(file: int) -> bool:
    """A command that only looks (`check_free`) has the lock for a moment, a run for as long as it lasts."""
    for _ in range(5):
        if _try_lock(file, fcntl.LOCK_EX):
            return True
        time.sleep(0.02)
    return False


def _try_lock(file: int, kind: int) -> bool:
    """Locks an open file until it is closed; False if another process has it. Where a disk has no locks: True."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
