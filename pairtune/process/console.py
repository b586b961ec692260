"""What a run tells: lines on the console, which its folder keeps as console.log, and how far it is.

Nothing here can end a run: a terminal that has gone, a pipe that nobody reads and a full disk cost the lines only.
"""

import os
import re
import shlex
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

FILE = "console.log"  # in a run folder
MOVES = re.compile(r"\x1b\[\d*[A-Z]")  # of the cursor
BAR = re.compile(r"[^|]*\d%\|[^|]*\|[^\[]*\[[^\]]*\]")  # as tqdm draws one
WHERE = "PAIRTUNE_CONSOLE"  # environment: a file in which a run's main process notes where its console.log is


class _Stream:
    """sys.stdout or sys.stderr, whose lines are kept, and whose end is not the run's."""

    def __init__(self, stream: Any):
        self._stream, self._line, self._is_gone = stream, "", False

    def write(self, text: str) -> int:
        self._keep(text)
        if not self._is_gone:
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:  # a console of another alphabet
                self._write_rest(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
            except (OSError, ValueError):  # a terminal that was closed answers EIO, a pipe EPIPE
                self._is_gone = True
        return len(text)

    def flush(self) -> None:
        if not self._is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._is_gone = True

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def _write_rest(self, text: str) -> None:
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def _keep(self, text: str) -> None:
        """Keeps whole lines, as they stand when they end: what was written over is gone, and bars are no lines."""
        *whole, rest = (self._line + text).split("\n")
        for line in whole:
            *over, last = MOVES.sub("\r", line).removesuffix("\r").split("\r")
            last = BAR.sub("", last, count=1) if over else last
            if last.strip() or not over:
                _kept.add(last)
        *over, last = rest.split("\r")
        self._line = f"\r{last}" if over else last


class _Bars(_Stream):
    """A stream for what is drawn on it, of which nothing is kept; to tqdm.write, which clears bars, it is the same."""

    def __init__(self, stream: _Stream):
        super().__init__(stream._stream)
        self._same = stream

    def _keep(self, text: str) -> None:
        pass

    def __eq__(self, other) -> bool:
        return other is self or other is self._same

    __hash__ = object.__hash__


class _Kept:
    """The lines of this process's run: in memory until there is a file for them."""

    def __init__(self):
        self.lines, self.file = deque(maxlen=10_000), None  # a process that is not the main one never has a file
        self.has_begun = False  # a run whose config is told already

    def add(self, line: str) -> None:
        if self.file is None:
            self.lines.append(line)
        else:
            with suppress(OSError):  # a full disk; one write a line, so that a kill leaves whole ones
                os.write(self.file, f"{line}\n".encode("utf-8", "backslashreplace"))

    def close(self) -> None:
        if self.file is not None:
            os.close(self.file)
        self.__init__()


_kept = _Kept()


def begin() -> None:
    """Begins to keep what this process prints, for a run whose config is about to be told: before `start`."""
    survive()
    _kept.close()
    _kept.has_begun = True


def start() -> None:
    """Begins to keep what this process prints, unless `begin` did; lines of an earlier run in it are let go."""
    survive()
    if not _kept.has_begun:
        _kept.close()
    _kept.has_begun = False


def survive() -> None:
    """Has printing go on, into nothing, when stdout or stderr are no more."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Stream):
            setattr(sys, name, _Stream(stream))


def keep(path: Path) -> None:
    """Appends time, command, what was printed since `start`, and all that is printed from now on, to a file."""
    lines = [f"# {time.strftime('%Y-%m-%d %H:%M:%S %z')}  {shlex.join(sys.argv)}", *_kept.lines]
    _open(path)
    for line in lines:
        _kept.add(line)
    if note := os.environ.pop(WHERE, None):
        with suppress(OSError):
            Path(note).write_text(str(path.absolute()))


def follow(note: Path) -> None:
    """Keeps what this process prints from now on, where the process that wrote `note` (see WHERE) keeps its lines."""
    with suppress(OSError):
        if path := note.read_text():
            _open(Path(path))


def _open(path: Path) -> None:
    _kept.close()
    try:
        _kept.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    except OSError as error:
        print(f"{path}: cannot be written: {error.strerror}; what is printed is not kept")


def tell_at_once(text: str) -> None:
    """Prints a line on stderr from within a signal handler: print may be what was interrupted."""
    for file in (2 if sys.stderr is not None else None, _kept.file):
        if file is not None:
            with suppress(OSError):
                os.write(file, f"{text}\n".encode())


def is_terminal() -> bool:
    """Returns whether bars can be drawn: on stderr, where it is a terminal that has a width."""
    if sys.stderr is None or not sys.stderr.isatty():
        return False
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns > 0
    except (OSError, ValueError):  # it only says that it is one, as a notebook's
        return True


class Progress:
    """How far something is: a bar on a terminal, else a line now and then. `update` may be called by any thread."""

    def __init__(
        self,
        doing: str,
        total: int,
        *,
        initial: int = 0,
        shown: bool = True,
        in_bytes: bool = False,
        unit: str = "",
        stays: bool = False,
        every_s: float = 30.0,
    ):
        """
        Args:
            doing: What, in a word or two.
            total, initial: Of what `update` counts: all, and what there was before.
            shown: False: nothing is told, as in a process that is not the main one.
            in_bytes: It counts bytes.
            unit: What it counts, to tell how many a second.
            stays: The bar stays on the screen when it ends.
            every_s: Without a terminal, a line after so many seconds; nothing if it is over before.
        """
        self._doing, self._total, self._n, self._initial = doing, total, initial, initial
        self._scale, self._every_s, self._lock = in_bytes, every_s, threading.Lock()
        self._unit = unit
        self._began = self._told = time.monotonic()
        self._bar, self._lines, self._last = None, shown and not is_terminal(), None
        if shown and not self._lines:
            how = {"unit": "B", "unit_scale": True} if in_bytes else {"unit": f" {unit}"} if unit else {}
            how["file"] = _Bars(sys.stderr) if isinstance(sys.stderr, _Stream) else None
            self._bar = tqdm(desc=doing, total=total, initial=initial, leave=stays, dynamic_ncols=True, **how)

    def update(self, count: int = 1) -> None:
        """Counts what was done."""
        with self._lock:
            self._n += count
            if self._bar is not None:
                self._bar.update(count)
            elif self._lines and time.monotonic() - self._told >= self._every_s:
                self._told = time.monotonic()
                self._print(f"{self._doing}: {self._so_far()}, {self._left()}")

    def tell(self, text: str) -> None:
        """Says how it goes: behind the bar, and as a line of its own without one; console.log has the line."""
        line = f"{self._doing} {self._n}/{self._total}: {text}, {self._left()}"
        if self._bar is not None:
            self._bar.set_postfix_str(text)
            _kept.add(line)
        elif self._lines:
            self._told = time.monotonic()
            self._print(line)

    def over(self, items: Sequence) -> Iterator:
        """Yields the items, and counts each when the next is asked for."""
        with self:
            for item in items:
                yield item
                self.update()

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
        elif self._last is not None and self._last != self._n:
            self._print(f"{self._doing}: {self._so_far()}, took {_clock(time.monotonic() - self._began)}")
        self._lines = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _print(self, line: str) -> None:
        self._last = self._n
        print(line, flush=True)

    def _so_far(self) -> str:
        if self._scale:
            return f"{self._n / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        rate = ""
        if self._unit:
            passed = max(1e-9, time.monotonic() - self._began)
            rate = f" {self._unit}, {(self._n - self._initial) / passed:,.0f} {self._unit}/s"
        return f"{self._n:,} of {self._total:,}{rate}"

    def _left(self) -> str:
        done = self._n - self._initial
        if done <= 0:
            return "time left unknown"
        return f"{_clock((time.monotonic() - self._began) / done * max(0, self._total - self._n))} left"


def progress(items: Sequence, doing: str, *, shown: bool = True) -> Iterator:
    """Yields the items, and shows how many there were: see Progress."""
    return Progress(doing, len(items), shown=shown).over(items)


def _clock(seconds: float) -> str:
    return tqdm.format_interval(seconds)
