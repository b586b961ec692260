"""The processes of a run: who they are, what they add up, and what is said when one of them does not come back.

PyTorch's own engine does the work: torchrun starts the processes, torch.distributed connects them, FSDP2 shards.
"""

import atexit
import gc
import os
import signal
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from pairtune.errors import UserError
from pairtune.process import console

# What asks a run to stop: a scheduler, a person, a terminal or a connection that has gone.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_runs = count()  # of these processes, in one try
TRY = "PAIRTUNE_TRY"  # environment: how often the processes have started again, see run/starting_again.py


@dataclass(frozen=True)
class World:
    """All processes of a run, seen from one of them. Every collective does nothing in a world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # (shard,) or (replicate, shard); None in a run that is not distributed
    cpu_offload: bool = False  # shards live in host memory and visit the device when they are needed
    watchdog: "Watchdog | None" = None

    def with_cpu_offload(self, cpu_offload: bool) -> "World":
        """Returns this world with its shards in host memory, or not."""
        return replace(self, cpu_offload=cpu_offload)

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def print(self, *text) -> None:
        """Prints, once."""
        if self.is_main:
            tqdm.write(" ".join(map(str, text)))  # above a progress bar, where there is one
            sys.stdout.flush()

    def progress(self, items: Sequence, doing: str) -> Iterator:
        """Yields the items; the main process shows how many there were, see console.Progress."""
        return console.progress(items, doing, shown=self.is_main)

    @property
    def shards(self) -> bool:
        """Whether models are sharded (FSDP2): over several processes, or for the sake of offloading."""
        return self.mesh is not None and (self.size > 1 or self.cpu_offload)

    @property
    def num_shards(self) -> int:
        """Processes that a model is sharded over."""
        return self.mesh["shard"].size() if self.mesh is not None else 1

    def __str__(self) -> str:
        return str(self.device) if self.size == 1 else f"{self.size} processes, {self.device.type}"

    def beat(self, doing: str, *, patient: bool = False) -> None:
        """Says that this process got on, and what it does next; see Watchdog."""
        if self.watchdog:
            self.watchdog.beat(doing, patient=patient)

    def from_main(self, values: Tensor) -> Tensor:
        """Returns the main process's tensor, in each process."""
        if self.size > 1:
            values = values.contiguous()
            torch_dist.broadcast(values, src=0)
        return values

    def gather(self, items: list) -> list:
        """Returns every process's items in one list, in each process."""
        if self.size == 1:
            return items
        parts = [None] * self.size
        torch_dist.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def agree(self, value):
        """Returns the main process's value, in each process."""
        if self.size == 1:
            return value
        values = [value]
        torch_dist.broadcast_object_list(values, src=0)
        return values[0]

    def sum(self, values: Tensor) -> Tensor:
        """Returns the elementwise sum of every process's tensor, in each process."""
        if self.size > 1:
            torch_dist.all_reduce(values)
        return values

    def sum_number(self, number: float) -> float:
        """Returns the sum of every process's number, in each process."""
        return float(self.sum(torch.tensor(float(number), dtype=torch.float64, device=self.device)))

    def max_number(self, number: int) -> int:
        """Returns the largest of every process's number, in each process; on the CPU: no GPU waits for it."""
        if self.size == 1:
            return number
        largest = torch.tensor(number)
        torch_dist.all_reduce(largest, op=torch_dist.ReduceOp.MAX)
        return int(largest)

    def barrier(self) -> None:
        """Returns when every process has come here."""
        if self.size > 1:
            torch_dist.barrier()


def start(device: str) -> World:
    """Returns `alone(device)`; what the process prints from here on is kept, see console.py.

    Raises:
        UserError: As alone.
    """
    console.start()
    return alone(device)


def alone(device: str) -> World:
    """Returns a world of one process on `device`: cpu, cuda, cuda:N, or auto (a GPU where there is one).

    Raises:
        UserError: A GPU that this machine or this build of PyTorch does not have.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        device = "cuda" if found else "cpu"
    index = int(device[5:]) if device.startswith("cuda:") else 0
    if device.startswith("cuda") and index >= found:
        build = "" if torch.version.cuda else f" and PyTorch {torch.__version__} is built without CUDA"
        raise UserError(f"device={device}: {found} GPUs are visible{build}; nearest valid: device=cpu")
    if index:  # streams and kernels that are told of no device take the current one
        torch.cuda.set_device(index)
    return World(torch.device(f"cuda:{index}" if device.startswith("cuda") else "cpu"))


def connect(world: World, replicate: int = 1, timeout_s: float = 600.0) -> World:
    """Returns the world of all processes that torchrun started; without torchrun, that is this one.

    NCCL connects GPUs, gloo connects CPUs and what is offloaded to them.

    Args:
        world: This process, as `start` made it; on GPUs, it moves to the one of its local rank.
        replicate: Copies of the model, each sharded over a group of processes of its own (hybrid sharding). Its usual
            value is the number of machines: gathering weights then stays within each of them.
        timeout_s: See `Watchdog`.

    Raises:
        UserError: More processes on this machine than GPUs, or a `replicate` that does not divide the processes.
    """
    rank, size, local = (
        int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    device = world.device
    if device.index:
        raise UserError(f"device={device}: each process takes a GPU of its own; nearest valid: device=cuda")
    if device.type == "cuda":
        device = start(f"cuda:{local}").device
        torch.cuda.set_device(device)
    if size % replicate:
        nearest = min((d for d in range(1, size + 1) if size % d == 0), key=lambda d: abs(d - replicate))
        raise UserError(
            f"data_parallel_replicate_dim={replicate}: must divide the {size} processes; "
            f"nearest valid: data_parallel_replicate_dim={nearest}"
        )
    # The watchdog speaks first; the back end's own timeout is for a process whose watchdog cannot.
    timeout = timedelta(seconds=2 * timeout_s + 60)
    torch_dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        store=_store(rank, size, timeout),
        rank=rank,
        world_size=size,
        **({"device_id": device} if device.type == "cuda" else {}),
    )
    shape, names = ((size,), ("shard",)) if replicate == 1 else ((replicate, size // replicate), ("replicate", "shard"))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    # What is in a circle with the world goes while Python still runs: a back end's thread that asks for the
    # interpreter as it shuts down aborts the process.
    atexit.register(gc.collect)
    return World(device, rank, size, mesh, watchdog=Watchdog(rank, size, timeout_s))


def _store(rank: int, size: int, timeout: timedelta) -> torch_dist.Store:
    """Returns where processes find each other, which torchrun names; each of their runs and tries has its own keys."""
    if "RANK" not in os.environ:
        return torch_dist.HashStore()
    store, *_ = next(torch_dist.rendezvous("env://", rank, size, timeout=timeout))
    return torch_dist.PrefixStore(f"try {os.environ.get(TRY, '0')}, run {next(_runs)}", store)


def stop(world: World) -> None:
    """Disconnects this process, when all have come here: nobody's last collective loses its peer."""
    if world.mesh is not None:
        world.beat("waiting for the others at the end", patient=True)
        world.barrier()
        world.watchdog.end()
        torch_dist.destroy_process_group()


class Interruption:
    """SIGTERM, SIGINT and SIGHUP as a question between steps, in place of an end within one.

    The first signal is noted, and `requested` tells every process of it. A second Ctrl-C ends this one at once. SIGHUP
    stays ignored where it was, under nohup.
    """

    def __init__(self, world: World):
        self._world, self._signal, self._since = world, 0, 0.0
        heard = [number for number in STOPPING if not ignores_hangup() or number != signal.SIGHUP]
        self._before = {number: signal.signal(number, self._note) for number in heard}

    def _note(self, number: int, frame) -> None:
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
            if self._world.is_main:
                console.tell_at_once(f"\n{signal.Signals(number).name}: this step is finished and saved first")
        elif number == signal.SIGINT and time.monotonic() - self._since > 1.0:  # torchrun sends a Ctrl-C on
            raise KeyboardInterrupt

    def requested(self) -> bool:
        """Returns whether any process was asked to stop. Every process has to call it."""
        agreed = self._world.max_number(self._signal)
        self._signal = self._signal or agreed  # a signal that came meanwhile is for the next call
        return agreed != 0

    def unless_stopped(self, items: Iterable) -> Iterator:
        """Yields the items until any process was asked to stop. Every process has to have as many."""
        for item in items:
            if self.requested():
                return
            yield item

    @property
    def status(self) -> int:
        """The exit status by which shells and schedulers know the signal."""
        return 128 + self._signal

    def end(self) -> None:
        """Lets signals do what they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def ignores_hangup() -> bool:
    """Returns whether this process was started to outlive its terminal, as by nohup."""
    return signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


class Watchdog:
    """Ends the run when this process makes no progress, after telling where every process stands.

    A collective that one process never enters holds all the others for ever, in silence. `beat` says that this process
    got on; when there was none for `timeout_s` seconds, a thread writes the line at which the main thread stands to
    the run's store, reads what the others wrote, prints the table and ends the process; torchrun ends the rest.

    It also ends a process that was told to stop and cannot hear it, because it waits for another one that is no more.
    """

    def __init__(self, rank: int, size: int, timeout_s: float):
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._main = threading.get_ident()
        self._doing, self._last, self._longest = "starting", time.monotonic(), 0.0
        self._ended = threading.Event()
        self._patient, self._told_by = False, None
        if size > 1:
            # A byte a signal, written even while the main thread is not in Python.
            self._heard, written = os.pipe()
            os.set_blocking(self._heard, False)
            os.set_blocking(written, False)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            # A connection of its own: the other may be held by the very call that does not come back.
            self._store = torch_dist.distributed_c10d._get_default_store().clone()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()

    def beat(self, doing: str, *, patient: bool = False) -> None:
        """Says what the main thread does from now on, such as "step 17"; `patient` if a signal may not cut it short."""
        self._patient = patient
        now = time.monotonic()
        self._longest = max(self._longest, now - self._last)
        self._doing, self._last = doing, now

    def end(self) -> None:
        """Stops watching: from here on processes no longer wait for each other.

        The thread is over when it returns: one that lets go of its connection while Python shuts down aborts it.
        """
        self._ended.set()
        if self._size > 1:
            self._thread.join()
            self._store = None  # and its connection, now: one that is let go of while Python shuts down may abort it
            os.close(signal.set_wakeup_fd(-1))
            os.close(self._heard)

    def _watch(self) -> None:
        told_to_stop = None
        while (silent := time.monotonic() - self._last) < self._timeout_s:
            if self._ended.wait(min(1.0, self._timeout_s / 10)):
                return
            if told_to_stop is None and self._heard_signal():
                told_to_stop = time.monotonic()
            # A step in flight gets on within this.
            patience = self._timeout_s if self._patient else max(10.0, 2 * self._longest)
            if told_to_stop and time.monotonic() - max(told_to_stop, self._last) > patience:
                os._exit(128 + self._told_by)
        self._store.set(f"stands/{self._rank}", f"{self._doing}, {silent:.0f} s: {self._line()}")
        time.sleep(2.0 + self._timeout_s / 10)  # the others' watchdogs wake within this
        if self._store.add("teller", 1) == 1:  # one tells, and the others wait until it has: who exits ends them all
            print("no progress; each process stands at\n" + "\n".join(map(self._told, range(self._size))),
                  file=sys.stderr, flush=True)  # fmt: skip
            self._store.set("told", "yes")
        for _ in range(100):
            if self._store.check(["told"]):
                break
            time.sleep(0.1)
        os._exit(1)

    def _heard_signal(self) -> bool:
        try:
            told = [number for number in os.read(self._heard, 64) if number in STOPPING]
        except BlockingIOError:
            return False
        self._told_by = told[0] if told else None
        return bool(told)

    def _told(self, rank: int) -> str:
        key = f"stands/{rank}"
        return f"  rank {rank}: {self._store.get(key).decode() if self._store.check([key]) else 'did not say'}"

    def _line(self) -> str:
        """The innermost line of the main thread that is this project's or its user's, and what it called."""
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        library = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
        package = str(Path(__file__).parent)
        ours = [f for f in frames if f.filename.startswith(package) or not f.filename.startswith(library)] or frames
        line = f"{ours[-1].filename}:{ours[-1].lineno} in {ours[-1].name}: {ours[-1].line}"
        return line if ours[-1] is frames[-1] else f"{line} (in {frames[-1].name})"
