"""The run folder: made for a run, and marked as its own while it is written to."""

import fcntl
import shutil
from itertools import count
from pathlib import Path

from pairtune import console
from pairtune.errors import UserError


def make_room(run_dir: Path, resumed: Path | None = None) -> None:
    """Makes the run folder; an earlier run that it holds is kept beside it, as run_dir.1, run_dir.2, ...

    It keeps what is printed from here on, and what was printed before: see console.py.

    Args:
        resumed: The checkpoint that the run goes on from. If it is of this folder, the folder stays; if of another one,
            what that run has logged and answered is copied.
    """
    continues = resumed is not None and resumed.resolve().parent.parent == run_dir.resolve()
    log = run_dir / "metrics.jsonl"
    if log.exists():
        with log.open("a") as file:
            if not lock(file):
                raise UserError(
                    f"output_dir={run_dir}: another run is writing there; wait for it, or name another folder"
                )
    if (log.exists() or (run_dir / "checkpoints").exists()) and not continues:
        kept = next(p for n in count(1) if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
        run_dir.rename(kept)
        print(f"{run_dir} held an earlier run, which is now {kept}\n")
    run_dir.mkdir(parents=True, exist_ok=True)
    for left in run_dir.glob(".export-*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    console.keep(run_dir / console.FILE)
    for name in ("metrics.jsonl", "samples.jsonl") if resumed and not continues else ():
        source = resumed.parent.parent / name
        if source.exists():
            shutil.copy(source, run_dir / name)


def lock(file) -> bool:
    """Marks an open file as this process's until it is closed; False if another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True
