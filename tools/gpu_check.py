"""One command on a GPU: is what it computes what a CPU computes, is what is counted what it holds, and how fast is it?

    python tools/gpu_check.py --out DIR                      # all parts, in the order of their worth
    python tools/gpu_check.py --out DIR --parts speed,plan --only "lora" --steps 6
    python tools/gpu_check.py --out DIR --device cpu --tiny  # a rehearsal without a GPU

Parts:
  backends   each way to compute attention against the dense mask, forward and gradients
  recipes    ten steps of a tiny model by every recipe and with what changes a step, against the CPU's losses
  answers    greedy answers of a tiny model, compiled and not, against the CPU's
  resume     runs that SIGKILL ends and resume=true continues, against uninterrupted ones
  speed      a recipe's steps at the shape of Llama 3 8B, random bf16 weights: pairs a second, memory, TFLOP/s
  peers      steps of torchtune's recipe and TRL's trainer at that shape, as bench.py makes them
  plan       what `tune plan` counts of the runs of `speed`

Cases run in processes beside this one: one that fails, hangs or takes the GPU's context with it ends nothing else.
Each result is a line here and an object of OUT/results.jsonl as soon as it is there; at the end there is a table, in
OUT/table.md, too. What the cases print is in OUT/output.txt.
"""

import argparse
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import gpu_table
from gpu_parts import LONG, RUNS, logged, names_of

SHAPES = ("tiny", "small", "1b", "8b")  # of random_work.py
TOOLS = Path(__file__).resolve().parent
LIMITS = {
    "backends": 90,
    "recipes": 60,
    "answers": 60,
    "resume": 90,
    "prepare": 60,
    "speed": 150,
    "peers": 120,
    "plan": 60,
}  # s a case
ALONE = ("matmul", "prepare", "speed", "peers")  # one case at a time: what it takes is measured
ORDER = ("backends", "recipes", "answers", "resume", "speed", "peers", "plan")


class Results:
    """What was found, told as it comes."""

    def __init__(self, out: Path):
        self.rows: list[dict] = []
        self._file, self._lock, self._start = (out / "results.jsonl").open("a"), threading.Lock(), time.monotonic()

    def add(self, part: str, name: str, found: dict) -> None:
        row = {"part": part, "name": name, **found, "at": round(time.monotonic() - self._start, 1)}
        with self._lock:
            self.rows.append(row)
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            print(gpu_table.line(row), flush=True)


def run_cases(cases: list[tuple[str, str]], settings: dict, results: Results, ends: float) -> None:
    """Runs cases, each a part and a name, in as many processes as there may be: in one where it is measured."""
    workers = 1 if cases[-1][0] in ALONE else min(settings["workers"], len(cases))
    queue = deque(cases)
    with ThreadPoolExecutor(workers) as pool:
        for done in [pool.submit(_work_through, queue, workers, settings, results, ends) for _ in range(workers)]:
            done.result()


def _work_through(queue: deque, workers: int, settings: dict, results: Results, ends: float) -> None:
    """Has a process run cases until there is none left, and another go on where one has ended it."""
    while queue:
        with _Worker(workers, settings) as worker:
            while worker.is_there:
                try:
                    part, name = queue.popleft()
                except IndexError:
                    return
                now = time.monotonic()
                if now > ends:
                    results.add(part, name, {"left_out": "no time was left"})
                    continue
                limit = min(LIMITS.get(part, 60) * settings["patience"], ends - now + 5)
                found = worker.run(part, name, limit)
                if part == "speed" and not worker.is_there:
                    found["note"] += f"; had logged pairs/s {logged(name, settings)}"
                results.add(part, name, found)


class _Worker:
    """A process that is told cases, a line each, and answers with a line each through a pipe."""

    def __init__(self, workers: int, settings: dict):
        self._read, write = os.pipe()
        self._text, self.is_there = b"", True
        with (Path(settings["out"]) / "output.txt").open("a") as output:
            self._process = subprocess.Popen(
                [sys.executable, str(TOOLS / "gpu_check.py"), "--work", json.dumps(settings), "--to", str(write)],
                pass_fds=(write,), stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, bufsize=1,
                env=_environment(workers), start_new_session=True,
            )  # fmt: skip
        os.close(write)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it has started: a session of its own
        self._process.wait()
        os.close(self._read)

    def run(self, part: str, name: str, limit: float) -> dict:
        """Returns what the case found; a process that fails with its context, or is too slow, is not there any more."""
        deadline = time.monotonic() + limit
        with suppress(OSError):  # it has died already, which shows where its answer is read
            self._process.stdin.write(json.dumps([part, name]) + "\n")
        while b"\n" not in self._text:
            ready = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]
            text = os.read(self._read, 2**16) if ready else b""
            if not text:
                self.is_there = False
                why = f"its process died ({self._process.wait()})" if ready else f"took more than {limit:.0f} s"
                return {"ok": False, "note": why}
            self._text += text
        line, _, self._text = self._text.partition(b"\n")
        found = json.loads(line)
        self.is_there = not found.pop("context_is_lost", False)
        return found


def _environment(workers: int) -> dict:
    paths = [str(TOOLS), str(TOOLS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    shared = {}
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        shared = {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
    shared["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    return os.environ | shared | {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}


def work(settings: dict, to: int) -> None:
    """In the process: runs the cases that it is told."""
    import gpu_cases
    from gpu_runs import free

    for line in sys.stdin:
        part, name = json.loads(line)
        print(f"\n---- {part}: {name}", flush=True)
        start, lost = time.monotonic(), False
        try:
            found = gpu_cases.PARTS[part](name, settings)
        except BaseException as error:
            traceback.print_exc()
            found = {"ok": False, "note": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            lost = gpu_cases.context_is_lost()
        if not lost:
            free()
        found = {**found, "took": round(time.monotonic() - start, 1), "context_is_lost": lost}
        os.write(to, json.dumps(found).encode() + b"\n")
        if lost:
            return


def settings_of(args: argparse.Namespace) -> dict:
    """Returns what cases need to know, as JSON can hold it."""
    tiny, shape = args.tiny, args.shape or ("tiny" if args.tiny else "8b")
    runs = {name: {"recipe": r, "lengths": n, "overrides": o, "shape": shape} for name, (r, n, o) in RUNS.items()}
    runs["lora live, eager, small"] = {**runs["lora live, eager"], "shape": "tiny" if tiny else "small"}
    for text in args.run:
        name, _, words = text.partition("=")
        recipe, lengths, *overrides = words.split(" ")
        runs[name] = {"recipe": recipe, "lengths": lengths, "overrides": overrides, "shape": shape}
    extra: dict[str, list[str]] = {}
    for text in args.extra:
        name, parted, setting = text.rpartition(": ")
        extra.setdefault(name if parted else "", []).append(setting)
    if args.tiny:
        for made in runs.values():
            made["lengths"] = made["lengths"].replace(LONG, "24/8/8")
    return {
        "device": args.device, "shape": shape, "dtype": "fp32" if tiny else "bf16",
        "steps": args.steps, "pairs_per_step": 4 if tiny else args.pairs_per_step,
        "peer_pairs": 4 if tiny else 16, "paths": [text.split("=", 1) for text in args.path],
        "scale": 0.05 if tiny else 1.0,
        "runs": runs, "extra": extra, "workers": args.workers, "patience": args.patience, "out": str(args.out),
        "chosen": names_of("speed", {"runs": runs}, args.only), "folder": str(args.folder), "tiny": tiny,
    }  # fmt: skip


def _folder(out: Path) -> Path:
    """A folder in memory where there is room for 8B weights, else on the disk."""
    shared = Path("/dev/shm")
    in_memory = shared.is_dir() and os.access(shared, os.W_OK) and shutil.disk_usage(shared).free > 40 * 2**30
    return Path(tempfile.mkdtemp(prefix="gpu_check_", dir=shared if in_memory else out))


def rounds(parts: list[str], settings: dict, only: list[str]) -> list[list[tuple[str, str]]]:
    """Returns the cases in the order in which they run; those of a round may run at the same time."""
    made: list[list[tuple[str, str]]] = [[("machine", "machine")]]
    for part in parts:
        cases = [(part, name) for name in names_of(part, settings, only)]
        if cases and part == "speed":
            cases = [("prepare", settings["shape"]), *cases]
        if cases and part in ("speed", "peers"):
            cases = [("matmul", "matmul"), *cases]
        if made[-1][-1][0] == "machine" or (part in ALONE) == (made[-1][-1][0] in ALONE):
            made[-1] += cases
        elif cases:
            made.append(cases)
    return made


def _leave_models(folder: Path) -> None:
    """Removes what an earlier call has left, but the weights: they take time, and are the same."""
    kept = {name for shape in SHAPES for name in (shape, f"{shape}.whole")}
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="where results go")
    parser.add_argument("--folder", type=Path, help="where weights and runs go, and stay; else /dev/shm or OUT")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="speed of a tiny model in float32: a rehearsal")
    parser.add_argument("--shape", choices=SHAPES, help="of the runs of speed")
    parser.add_argument("--parts", default=",".join(ORDER), help="in the order in which they run")
    parser.add_argument("--only", action="append", default=[], metavar="WORDS", help="cases whose name has these words")
    parser.add_argument("--steps", type=int, default=6, help="steps of a speed run; the first 2 are left out")
    parser.add_argument("--pairs-per-step", type=int, default=64)
    parser.add_argument("--extra", action="append", default=[], metavar="[NAME: ]KEY=VALUE", help="for speed runs")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=RECIPE LENGTHS KEY=VALUE ...")
    parser.add_argument("--minutes", type=float, default=7.0, help="nothing starts after these")
    parser.add_argument("--patience", type=float, default=1.0, help="times the cases' limits")
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, min(8, (os.cpu_count() or 1) // 2)),
        help="processes for what is not measured",
    )
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDERS", help="a peer's PYTHONPATH")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    parser.add_argument("--to", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        work(json.loads(args.work), args.to)
        return
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    made, args.folder = args.folder is None, (args.folder or _folder(args.out)).resolve() / "gpu_check"
    args.folder.mkdir(parents=True, exist_ok=True)
    _leave_models(args.folder)
    settings, results, ends = settings_of(args), Results(args.out), time.monotonic() + 60 * args.minutes
    try:
        for cases in rounds(args.parts.split(","), settings, args.only):
            run_cases(cases, settings, results, ends)
    finally:
        table = gpu_table.table(results.rows, settings)
        (args.out / "table.md").write_text(table)
        print(f"\n{table}", flush=True)
        if made:
            shutil.rmtree(args.folder.parent, ignore_errors=True)
    raise SystemExit(any(row.get("ok") is False for row in results.rows))


if __name__ == "__main__":
    main()
