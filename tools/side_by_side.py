"""Systems side by side: each a process of its own that makes a step when it is its turn. See bench.py, which tells."""

import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import random_work as work

TOOLS = Path(__file__).resolve().parent
NAMES = ("ours", "torchtune", "trl")
FLAGS = ("cached", "compiled", "checkpointing", "completions", "liger", "bridged")
WARM_STEPS = 2  # left out where time is told


@dataclass(frozen=True)
class Task:
    """What all systems do."""

    folder: Path
    sizes: dict
    lengths: tuple[work.Lengths, ...]
    method: str = "lora"
    device: str = "cpu"
    dtype: str = "fp32"
    rank: int = 8
    pairs_per_step: int = 4
    threads: int = 1
    drawn: bool = False  # weights are drawn by each system, and no file is read
    paths: tuple[tuple[str, str], ...] = ()  # folders that a system has on its PYTHONPATH, by name
    trl_python: str = sys.executable  # TRL's, in an environment of its own
    real: str | None = None  # a model's folder, in the place of a random one of `sizes`
    source: str | None = None  # rows of pairs, in the place of random ones of `lengths`
    lr: float | None = None
    steps: int = 0

    def write(self) -> None:
        """Writes base/, adapter/ and pairs.jsonl into the folder."""
        if self.real:
            (self.folder / "base").symlink_to(Path(self.real).resolve())
            work.write_adapter(self.folder / "adapter", work.shapes_of(self.real), rank=self.rank)
            return work.copy_pairs(self.folder / "pairs.jsonl", self.source, self.pairs_per_step * self.steps)
        if self.drawn:
            work.write_config(self.folder / "base", self.sizes, dtype=self.dtype)
        else:
            work.write_model(self.folder / "base", self.sizes, dtype=self.dtype, device=self.device)
            work.write_adapter(self.folder / "adapter", work.llama_shapes(self.sizes), rank=self.rank)
        work.write_pairs(self.folder / "pairs.jsonl", self.lengths, self.sizes["vocab_size"])

    def spec(self, name: str, flags: list[str], *, processes: int = 1, gate: dict | None = None) -> dict:
        """Returns what a system's process is told, as JSON can hold it."""
        pairs = next((int(flag[6:]) for flag in flags if flag.startswith("pairs=")), self.pairs_per_step)
        return {
            "system": name, "flags": [flag for flag in flags if not flag.startswith("pairs=")], "method": self.method,
            "folder": str(self.folder), "sizes": self.sizes, "device": self.device, "dtype": self.dtype,
            "max_length": max((n.prompt + max(n.chosen, n.rejected) for n in self.lengths), default=1024),
            "rank": self.rank, "real": bool(self.real), "lr": self.lr,
            "pairs_per_step": self.pairs_per_step, "batch_size": pairs, "processes": processes, "drawn": self.drawn,
            "gate": gate,
        }  # fmt: skip


class System:
    """A process that has made its first step and makes another when it is told to."""

    def __init__(self, text: str, task: Task, processes: int = 1):
        self.text, name, flags = text, *parsed(text)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{name}_", dir=task.folder))
        gate = {kind: str(self._folder / kind) for kind in ("results", "commands")}
        for path in gate.values():
            os.mkfifo(path)
        # Held open from both ends: neither waits for the other to open it.
        self._results, self._commands = (os.open(path, os.O_RDWR) for path in gate.values())
        spec = task.spec(name, flags, processes=processes, gate={**gate, "device": task.device})
        command = [task.trl_python if name == "trl" else sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        paths = [str(TOOLS), str(TOOLS.parent), *(path for owner, path in task.paths if owner == name)]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        environment = os.environ | {"OMP_NUM_THREADS": str(task.threads), "PYTHONPATH": os.pathsep.join(paths)}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        with (self._folder / "output.txt").open("w") as output:
            self._process = subprocess.Popen(
                [*command, str(TOOLS / "peers.py"), json.dumps(spec)],
                env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        self._left = b""

    def step(self, limit: float = 900.0, *, is_first: bool = False) -> dict:
        """Returns loss, seconds, wall seconds and GiB of the next step; the first one is made without being told.

        Raises:
            RuntimeError: The process has ended, or takes longer than `limit` seconds.
        """
        if not is_first:
            os.write(self._commands, b"\n")
        deadline = time.monotonic() + limit
        while b"\n" not in self._left:
            if select.select([self._results], [], [], 0.1)[0]:
                self._left += os.read(self._results, 2**16)
            elif self._process.poll() is not None:
                raise RuntimeError(f"{self.text}: {self.said()}")
            elif time.monotonic() > deadline:
                raise RuntimeError(f"{self.text}: took more than {limit:.0f} s; {self.said()}")
        line, _, self._left = self._left.partition(b"\n")
        return json.loads(line)

    def said(self) -> str:
        """Returns the last line that it printed."""
        lines = (self._folder / "output.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:400] if lines else "said nothing"

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for end in (self._results, self._commands):
            os.close(end)


def parsed(text: str) -> tuple[str, list[str]]:
    """Returns a system's name and flags.

    Raises:
        SystemExit: It has none of these.
    """
    name, *flags = text.split(":")
    unknown = [flag for flag in flags if flag not in FLAGS and "=" not in flag]
    if name not in (*NAMES, "matmul", "loaded") or unknown:
        raise SystemExit(f"--systems {text}: of {', '.join(NAMES)}, with {', '.join(FLAGS)}, pairs=N or key=value")
    return name, flags


def one(name: str, task: Task) -> dict:
    """Returns what matmul or loaded tells."""
    system = System(name, task)
    try:
        return system.step(is_first=True)
    finally:
        system.stop()


def in_turn(texts: list[str], task: Task, steps: int, processes: int = 1, say=print) -> dict[str, list[dict]]:
    """Returns each system's steps, made in turn; one that cannot start or fails is told and left out."""
    found: dict[str, list[dict]] = {}
    with ExitStack() as stack:
        systems = []
        for text in texts:
            system = System(text, task, processes)
            stack.callback(system.stop)
            try:
                found[text] = [system.step(is_first=True)]
                systems.append(system)
            except RuntimeError as error:
                say(f"left out: {error}")
        for _ in range(steps - 1):
            for system in list(systems):
                try:
                    found[system.text].append(system.step())
                except RuntimeError as error:
                    say(f"left out: {error}")
                    systems.remove(system)
                    del found[system.text]
    return found


def summary(steps: list[dict], task: Task, text: str) -> dict:
    """Returns a system's pairs a second, its steps' spread, memory, and operations a second."""
    seconds = [step["seconds"] for step in steps[WARM_STEPS:] or steps[-1:]]
    median = statistics.median(seconds)
    is_full, live = task.method == "full", "cached" not in text.split(":")
    flops = [work.flops_of_pair(task.sizes, n, full=is_full, live=live) for n in task.lengths]
    pairs = task.pairs_per_step / median
    return {
        "system": text, "seconds": median, "least": min(seconds), "most": max(seconds), "pairs_per_second": pairs,
        "tokens_per_second": pairs * statistics.mean(n.total for n in task.lengths) if task.lengths else None,
        "peak_gib": max(step["peak_gib"] for step in steps[1:] or steps), "live": live,
        "tflops": statistics.mean(flops) * pairs / 1e12 if flops else None,
        "losses": [step["loss"] for step in steps],
    }  # fmt: skip
