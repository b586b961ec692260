"""Starting a run again in the same processes, when one of them ran out of memory before the first step.

A process replaces itself by its own command (exec), with a note of what did not fit: nothing of the try before holds
memory, and no collective has to be undone. The others, whose main threads may wait for that process in a collective,
hear of it in a thread of their own; all go at once.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as torch_dist

from pairtune.process.dist import TRY, World
from pairtune.run import folder

NOTE = "PAIRTUNE_RAN_OUT"  # environment: of the try before, as JSON
EVERY_S = 0.2  # the others are asked so often
PATIENCE_S = 60.0  # then a process goes without those that do not answer
_notes: list[str | None] = []  # one for each run that this process has begun


def is_possible() -> bool:
    """Returns whether the command of this process is this run and no more, as of a notebook or a sweep it is not."""
    main = sys.modules["__main__"]
    if len(_notes) != 1 or not hasattr(main, "DEFAULTS") or not hasattr(main, "__file__"):
        return False
    commands = {"tune", "pairtune", "pairtune.cli", Path(main.__file__).name}
    return any(Path(word).name in commands for word in sys.orig_argv[1:])


def take_note() -> dict[str, Any] | None:
    """Returns what `Rehearsal.start_again` was given in the try before, once; None: this is the first."""
    note = os.environ.pop(NOTE, None)
    _notes.append(note)
    return json.loads(note) if note else None


class Rehearsal:
    """What all processes do together, or start again from."""

    def __init__(self, world: World):
        self._world, self._going, self._ended = world, threading.Lock(), threading.Event()
        if world.size > 1:  # a connection of its own: the other may be held by the call that does not come back
            self._store = torch_dist.distributed_c10d._get_default_store().clone()

    def start_again(self, note: dict[str, Any]) -> NoReturn:
        """Ends this try in every process, and begins the next, which finds the note."""
        if self._world.size > 1:
            self._store.set("start again", json.dumps(note))
        self._go(json.dumps(note))

    def is_over(self) -> bool:
        """Returns whether some process has ended this try: what fails then fails for want of it."""
        return self._world.size > 1 and self._store.check(["start again"])

    def follow(self) -> NoReturn:
        """Begins the next try, where `is_over`."""
        self._go(self._store.get("start again").decode())

    def _go(self, note: str) -> NoReturn:
        self._going.acquire()  # for ever: main thread and listener may both have heard of it
        if self._world.size > 1:
            self._store.add("going", 1)
            deadline = time.monotonic() + PATIENCE_S
            while self._store.add("going", 0) < self._world.size and time.monotonic() < deadline:
                time.sleep(EVERY_S)
        if self._world.is_main and self._world.size > 1:
            time.sleep(3 * EVERY_S)  # it may hold the store in which the others read that all go
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for file in map(int, os.listdir("/dev/fd")):  # a GPU's, too: its memory is let go of with it
            with suppress(OSError):
                os.set_inheritable(file, file <= 2)
        tries = {TRY: str(int(os.environ.get(TRY, "0")) + 1)}
        os.execve(
            sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {NOTE: note} | tries | folder.held()
        )

    def listen(self) -> None:
        """Follows whoever ends this try, until `end`."""
        while not self._ended.wait(EVERY_S):
            if self.is_over():
                self.follow()

    def end(self) -> None:
        self._ended.set()


@contextmanager
def rehearsal(world: World) -> Iterator[Rehearsal]:
    """Around what all processes come through, or none: one that runs out of memory calls `start_again`."""
    together = Rehearsal(world)
    listener = threading.Thread(target=together.listen, daemon=True)
    if world.size > 1:
        listener.start()
    try:
        yield together
        world.max_number(0)  # a process that is through waits for those that may still run out
    except Exception:
        if together.is_over():
            together.follow()
        raise
    finally:
        together.end()
        if world.size > 1:
            listener.join()
