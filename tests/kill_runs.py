"""Kills runs at random moments, restarts them with resume=auto, and compares what they end with.

    python tests/kill_runs.py --kills 50 --processes 2

SIGKILL, of all of a run's processes at once: at any time, while it trains, or while it writes a checkpoint; one time in
five SIGTERM before it. A run that was killed so often must end with the metrics and the weights of one that was left
alone, bit for bit.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import datasets
import psutil
import torch
from helpers import ROOT, SHARDED_SIZES, random_pairs, run_config, save_llama, save_pairs
from safetensors.torch import load_file

from pairtune.run import pair_log
from pairtune.run.metrics import read_log

SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
MOMENTS = ("any time", "training", "saving", "saving")


def write_inputs(folder: Path, *, streams: bool) -> None:
    """28 pairs in steps of 8, ten epochs of 4 steps, or 40 steps of a stream, a checkpoint a step, dropout on."""
    save_llama(folder / "base", sizes=SHARDED_SIZES)
    save_pairs(folder / "train.jsonl", random_pairs(28, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(6, seed=2))
    cfg = run_config(
        folder,
        sizes=SHARDED_SIZES,
        batch_size=2,
        epochs=10,
        log_every_n_steps=2,
        eval_every_n_steps=3,
        save_every_n_steps=1,
        keep_last_n=2,
        keep_best="loss",
        samples={"num_prompts": 2, "max_new_tokens": 5},
        lora={"rank": 4, "alpha": 8, "dropout": 0.2},
        disable_dropout=False,
        optimizer={"lr": 2e-3},
        resume="auto",
    )
    if streams:
        cfg |= {"dataset": write_mixture(folder), "max_steps": 40, "shuffle": True}
        del cfg["epochs"]
    (folder / "config.yaml").write_text(json.dumps(cfg))


def write_mixture(folder: Path) -> dict:
    """Three sources: JSON Lines, CSV, and a folder of two parquet files."""
    rows = [[json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]]
    for seed, count in ((3, 11), (4, 50)):
        save_pairs(folder / "some.jsonl", random_pairs(count, seed=seed))
        rows.append([json.loads(line) for line in (folder / "some.jsonl").read_text().splitlines()])
    datasets.Dataset.from_list(rows[1]).to_csv(folder / "b.csv")
    (folder / "c").mkdir()
    for name, part in (("0", rows[2][:20]), ("1", rows[2][20:])):
        datasets.Dataset.from_list(part).to_parquet(folder / "c" / f"{name}.parquet")
    b, c = {"source": str(folder / "b.csv"), "weight": 2}, {"source": str(folder / "c"), "share": 0.4}
    return {"source": [str(folder / "train.jsonl"), b, c], "streaming": True, "shuffle_buffer": 16}


def start(folder: Path, run_dir: Path, method: str, processes: int) -> subprocess.Popen:
    twin, options = ("single_device", []) if processes == 1 else ("distributed", ["--nproc_per_node", str(processes)])
    command = [sys.executable, "-m", "pairtune.cli", "run", *options, str(ROOT / "recipes" / f"{method}_dpo_{twin}.py")]
    command += ["--config", str(folder / "config.yaml"), f"output_dir={run_dir}"]
    output = (folder / "output.txt").open("w")
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=output, stderr=output)


def wait_for(moment: str, run: subprocess.Popen, run_dir: Path, rng: random.Random) -> bool:
    """Returns when the run is to be killed; False if it has ended before."""
    if moment == "any time":
        return not _ends_within(run, rng.uniform(0, 12))
    log = run_dir / "metrics.jsonl"
    before = log.stat().st_mtime_ns if log.exists() else 0
    while run.poll() is None:
        if log.exists() and log.stat().st_mtime_ns != before and log.stat().st_size:
            break
        time.sleep(0.01)
    if moment == "training":
        return not _ends_within(run, rng.uniform(0, 2))
    if _ends_within(run, rng.uniform(0, 2)):
        return False
    while run.poll() is None:
        if any((run_dir / "checkpoints").glob(".step_*")):
            time.sleep(rng.uniform(0, 0.02))
            return run.poll() is None
        time.sleep(0.0005)
    return False


def _ends_within(run: subprocess.Popen, seconds: float) -> bool:
    try:
        run.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def kill(run: subprocess.Popen, rng: random.Random) -> None:
    """All of its processes, none of which can do anything about it; or it is asked first, and given a moment."""
    if rng.random() < 0.2:
        run.terminate()
        if _ends_within(run, rng.uniform(0, 10)):
            return
    parent = psutil.Process(run.pid)
    for process in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    run.wait()


def result(run_dir: Path) -> tuple[list, dict]:
    """What a run ends with, but for how fast it was."""
    log = [{k: v for k, v in row.items() if k not in SPEED} for row in read_log(run_dir / "metrics.jsonl")]
    return log, load_file(run_dir / "export" / "model.safetensors")


def same(one: tuple[list, dict], other: tuple[list, dict]) -> bool:
    return one[0] == other[0] and all(torch.equal(value, other[1][name]) for name, value in one[1].items())


def pairs_of_steps(run_dir: Path) -> list:
    """Which pairs a run has learned from, in which step."""
    seen = pair_log.read(run_dir / pair_log.FILE)
    seen = seen[seen["is_held_out"] == 0]
    return sorted(zip(*(seen[name].tolist() for name in ("step", "row", "digest")), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--method", default="lora", choices=["full", "lora", "qlora"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stream", action="store_true", help="a mixture of three sources, streamed")
    parser.add_argument("--kills-a-run", type=int, default=10)
    args = parser.parse_args()
    rng, kills, losses, number = random.Random(args.seed), Counter(), 0, 0
    folder = Path(tempfile.mkdtemp(prefix="kill_runs_"))
    write_inputs(folder, streams=args.stream)
    assert start(folder, folder / "straight", args.method, args.processes).wait() == 0, (
        folder / "output.txt"
    ).read_text()
    expected = result(folder / "straight")
    if args.stream and args.processes > 1:
        assert start(folder, folder / "alone", args.method, 1).wait() == 0, (folder / "output.txt").read_text()
        assert pairs_of_steps(folder / "alone") == pairs_of_steps(folder / "straight")
        print(f"one process has the same pairs in the same steps as {args.processes}", flush=True)
    while kills.total() < args.kills:
        number, killed = number + 1, 0
        run_dir = folder / f"run_{number}"
        while True:
            run = start(folder, run_dir, args.method, args.processes)
            moment = rng.choice(MOMENTS)
            if kills.total() < args.kills and killed < args.kills_a_run and wait_for(moment, run, run_dir, rng):
                kill(run, rng)
                kills[moment] += 1
                killed += 1
                continue
            if run.wait() != 0:
                losses += 1
                print(f"run {number} cannot go on:\n{(folder / 'output.txt').read_text()[-2000:]}")
                break
            if not same(result(run_dir), expected):
                losses += 1
                print(f"run {number}: killed {killed} times, it ends otherwise than the one that was left alone")
            break
        print(f"{kills.total()} kills so far, {losses} losses", flush=True)
    moments = ", ".join(f"{count} in {moment}" for moment, count in kills.items())
    print(f"{kills.total()} kills ({moments}), {number} runs on {args.processes} processes, {losses} losses")
    shutil.rmtree(folder)
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
