"""The memory of a process that trains on a stream, at several numbers of rows.

    python tools/measure_streaming.py [--rows 10000 1000000] [--tokens 600] [--read 100000]

The rows are read, mixed, shuffled, tokenized and cut into steps as a run does it, all of them once or the first of
them, in a process of its own that holds no model: what it takes above what it has imported is told, when the first
10,000 rows have come through and at the end, and how many rows a second do.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from measure_tokenizing import make_rows, make_tokenizer

READ = """
import json, resource, sys, time
from pairtune.process import dist
from pairtune.config.keys import ROWS, STREAM
from pairtune.pairs.steps import Steps
from pairtune.pairs.tokenize import read_train_and_held_out
from pairtune.tokenizer.hf import hf_tokenizer

source, model, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
world = dist.start("cpu")

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

before, began = peak(), time.monotonic()
block = {**ROWS, **STREAM, "source": source, "val_fraction": None, "streaming": True}
train, _ = read_train_and_held_out(block, {**ROWS, "source": None}, hf_tokenizer(model), world, 4096, None)
steps = Steps(train, 64, 4, world, seed=0)
for step in range(rows // 64):
    steps[step]
    if step == min(10_000, rows) // 64 - 1:
        first = peak()
seconds = time.monotonic() - began
told = {"before": before, "first": first, "after": peak(), "seconds": seconds}
print(json.dumps({**told, **steps.seen(rows // 64)}))
"""


def read(source: Path, model: Path, rows: int) -> dict:
    """Returns what came of so many pairs: MiB at the peak, before, after 10,000 and after all; seconds, rows."""
    command = [sys.executable, "-P", "-c", READ, source, model, str(rows)]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    parser.add_argument("--tokens", type=int, default=600, help="of a pair, on the average")
    parser.add_argument("--read", type=int, help="so many of a file's rows; default: all")
    args = parser.parse_args()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(errors="ignore") for path in sources]
    titles = f"{'rows':>10} {'GiB of file':>12} {'read':>10} {'MiB before':>11} {'of 10,000':>10} {'at the end':>11}"
    print(f"{titles} {'rows/s':>8} {'load':>6}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, model = folder / "pairs.jsonl", folder / "model"
        make_tokenizer(model, texts, 32_000)
        for rows in args.rows:
            make_rows(source, texts, rows, args.tokens, model)
            load, found = os.getloadavg()[0], read(source, model, min(rows, args.read or rows))
            size, num_read = source.stat().st_size / 2**30, found["rows/read"]
            peaks = f"{found['before']:11,.0f} {found['first']:10,.0f} {found['after']:11,.0f}"
            speed = num_read / found["seconds"]
            print(f"{rows:10,} {size:12.2f} {num_read:10,} {peaks} {speed:8,.0f} {load:6.1f}", flush=True)


if __name__ == "__main__":
    main()
