"""Work on many things in several processes of this machine, in order."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice

from pairtune.errors import UserError

PART = 256  # things that a process does at a time: some tenths of a second
AHEAD = 8  # parts a process, done or under way before they are taken
_work: Callable | None = None  # of a child


def num_cores() -> int:
    """Returns the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(work: Callable[[list], object], things: Iterable, *, processes: int) -> Iterator[tuple]:
    """Yields the things' parts, in their order, each with work(part); what a part raises is raised in its turn.

    Things are taken as they are needed, while earlier ones are worked on.

    Processes are forks: they begin in a moment, with all that this one has, and hand over results only. `work` must not
    touch a GPU, nor threads of a library.

    Raises:
        UserError: A process was killed.
    """
    remaining = iter(things)
    parts = iter(lambda: list(islice(remaining, PART)), [])
    if processes < 2:
        for part in parts:
            yield part, work(part)
        return
    with _pool(work, processes) as pool:
        pending: list[tuple[list, Future]] = []
        for part in parts:
            pending.append((part, pool.submit(_do, part)))
            if len(pending) > AHEAD * processes:
                yield _taken(pending)
        while pending:
            yield _taken(pending)


def _taken(pending: list[tuple[list, Future]]) -> tuple:
    part, future = pending.pop(0)
    return part, future.result()


@contextmanager
def _pool(work: Callable, processes: int) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("fork"), _begin, (work,))
    try:
        yield pool
    except BrokenProcessPool:
        raise UserError(
            "tokenizing: one of the processes that share the rows was killed, as by a machine that is out of memory; "
            "free some, or let one core do it: taskset -c 0 tune run ..."
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(work: Callable) -> None:
    """Makes this process one that works: it leaves signals to its parent, and ends when that is gone."""
    global _work
    _work = work
    gc.freeze()  # to look for garbage among what the parent has would copy its pages
    gc.set_threshold(50_000)  # a row makes little of it, and many objects
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _do(part: list) -> object:
    return _work(part)
