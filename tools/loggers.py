"""Loggers that a recipe's `metric_logger` names, so that a tool can stop it, kill it, or let it make one more step."""

import os
import signal


class _Logger:
    def log_config(self, config) -> None:
        pass

    def log(self, name, data, step) -> None:
        pass

    def close(self) -> None:
        pass


class StopAfter(_Logger):
    """Asks its own run to stop after a step, as a scheduler does: nothing is exported then."""

    def __init__(self, step: int, signal: int = signal.SIGTERM):
        self._step, self._signal = step, signal

    def log_dict(self, payload, step) -> None:
        if step >= self._step:
            os.kill(os.getpid(), self._signal)
