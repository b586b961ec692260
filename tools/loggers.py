"""Loggers that a recipe's `metric_logger` names, so that a tool can stop it, kill it, or let it make one more step."""

import json
import os
import resource
import signal
import time
from pathlib import Path


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


class Gate(_Logger):
    """Where a trainer waits after a step: tells its loss, time and memory, and goes on when it is told to.

    Seconds are of the process's CPUs, or of a GPU between two events.
    """

    def __init__(self, results: str, commands: str, device: str):
        self._results, self._commands = open(results, "w"), open(commands)  # noqa: SIM115  as long as the process
        self._on_gpu, self._start = device == "cuda", None

    def log_dict(self, payload, step) -> None:
        if "loss" in payload:
            self.wait(float(payload["loss"]))

    def wait(self, loss: float) -> None:
        found = {"loss": loss, "seconds": None, "wall": None, "peak_gib": self._peak()}
        if self._start:
            wall, clock = self._start
            found |= {"seconds": self._clock(clock), "wall": time.perf_counter() - wall}
        else:  # the first step belongs to the start
            self._forget_peak()
        self._results.write(json.dumps(found) + "\n")
        self._results.flush()
        if not self._commands.readline():
            os._exit(0)
        self._start = time.perf_counter(), self._mark()

    def _mark(self):
        if not self._on_gpu:
            return time.process_time()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _clock(self, start) -> float:
        end = self._mark()
        if not self._on_gpu:
            return end - start
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _forget_peak(self) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.reset_peak_memory_stats()
        elif os.access("/proc/self/clear_refs", os.W_OK):
            Path("/proc/self/clear_refs").write_text("5")

    def _peak(self) -> float:
        """Returns the GiB that were held at most since the first step: allocated on a GPU, resident on a CPU."""
        if self._on_gpu:
            import torch

            return torch.cuda.max_memory_allocated() / 2**30
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        kilobytes = next((int(line.split()[1]) for line in lines if line.startswith("VmHWM")), None)
        return (kilobytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) / 2**20
