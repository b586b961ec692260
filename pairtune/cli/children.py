"""Commands in processes of their own, one after the other: nothing of one is left in the next."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Sequence

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Children:
    """While it is entered, a signal to stop goes to the command that runs, once, and no other one is started.

    Attributes:
        heard: The signal, 0 for none.
    """

    def __init__(self):
        self.heard, self._child = 0, None

    def run(self, command: Sequence[str]) -> int:
        """Returns a command's exit status; nothing is run after a signal."""
        if self.heard:
            return 128 + self.heard
        # In a group of its own: a terminal's Ctrl-C reaches it once, by `_pass_on`
        self._child = subprocess.Popen(command, process_group=0, preexec_fn=_end_with_parent)
        if self.heard:  # while it was started
            self._child.send_signal(self.heard)
        status = self._child.wait()
        if -status in STOPPING or status - 128 in STOPPING:
            self.heard = self.heard or abs(status) % 128
        return status

    def _pass_on(self, number: int, frame) -> None:
        self.heard = self.heard or number
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def __enter__(self) -> "Children":
        listened = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]  # as under nohup
        self._before = {number: signal.signal(number, self._pass_on) for number in listened}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Has Linux tell a run to stop and save, as SIGTERM does, if this process is killed: no run is left on its own."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
