"""Kills the commands that make pairs at random moments, gives them again, and compares what they end with.

    python tests/kill_making.py --kills 20

SIGKILL, of a command and all that it started; one time in five SIGTERM before it. Each command is given again until it
ends; then the same files as of one that was left alone, byte for byte, but for the order of a judge's replies; of runs,
the same metrics and weights. An endpoint on this machine draws and judges: what is answered a second time was under
way in a kill.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from helpers import ROOT, SIZES, run_config, save_llama
from kill_runs import _ends_within, kill, result, same

sys.path.append(str(ROOT / "tests" / "judge"))
from judge_server import serving  # noqa: E402

AT_ONCE = 4  # requests under way at a time, which a kill may lose
DEVICE = ("dtype=fp32", "device=cpu")
DRAW = ("--max-new-tokens", "12", *DEVICE)


def later(first: str, second: str) -> str:
    """The judge's rule: by the alphabet."""
    return "first" if first > second else "second"


def stages(address: str) -> dict[str, list[str]]:
    """The commands by name, in the order in which they need each other."""
    prompts, judge = ["--prompts", "../prompts.jsonl"], ["--judge", address, "--judge-model", "tiny"]
    recipe = ["lora_dpo_single_device", "--config", "../config.yaml"]
    sides = ["--template", "{word} w5 {item}", "--chosen", "w8", "--rejected", "w9", "--items", "../items.txt"]
    rounds = [*prompts, "--output-dir", "rounds", "--held-out", "0.3", "--rounds", "2", "--max-new-tokens", "6"]
    return {
        "draw": ["data", "sample", address, "--model", "tiny", *prompts, "--output", "drawn.jsonl"],
        "judge": ["data", "judge", "drawn.jsonl", *judge, "--output", "scored.jsonl"],
        "binarise": ["data", "binarise", "scored.jsonl", "--output", "pairs.jsonl", "--held-out", "0.3"],
        "train": ["run", *recipe, "dataset=pairs.jsonl", "eval_dataset=pairs.held_out.jsonl", "output_dir=run"],
        "sample": ["data", "sample", "../base", *prompts, "--output", "answers.jsonl", *DRAW, "--batch-size", "8"],
        "contrast": ["data", "contrast", "../base", *sides, "--output", "contrast.jsonl", *DRAW, "--batch-size", "8"],
        "iterate": ["iterate", *recipe, *rounds, *judge],
    }


def write_inputs(folder: Path) -> None:
    """A random model, prompts, items, and a config with a checkpoint a step."""
    save_llama(folder / "base", sizes=SIZES)
    rows = [{"prompt": f"w{n} w{n + 1} w7", "note": "a\u2028b"} for n in range(24)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "items.txt").write_text("".join(f"w{n} w{n + 2}\n" for n in range(20, 60)))
    cfg = run_config(folder, sizes=SIZES, pairs_per_step=4, log_every_n_steps=1, samples={"num_prompts": 0})
    cfg |= {"save_every_n_steps": 1, "keep_last_n": 2, "resume": "auto", "epochs": 4}
    for name in ("output_dir", "dataset", "eval_dataset"):
        del cfg[name]
    (folder / "config.yaml").write_text(json.dumps(cfg))


def start(folder: Path, words: list[str]) -> subprocess.Popen:
    """Starts a command in a folder."""
    with (folder / "output.txt").open("a") as output:
        command = [sys.executable, "-m", "pairtune.cli", *words]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


def found(folder: Path) -> tuple[dict, dict]:
    """What commands have left: files by their names, and runs by theirs."""
    runs = {path.parent.relative_to(folder): result(path.parent) for path in folder.rglob("metrics.jsonl")}
    files = {}
    for path in folder.rglob("*.jsonl"):
        name = path.relative_to(folder)
        if any(run in name.parents for run in runs):
            continue
        content = path.read_bytes()
        if name.stem.endswith(("verdicts", "replies")):
            rows = [json.loads(line) for line in content.split(b"\n")[:-1]]
            content = {row["key"]: row["value"] for row in rows if row["value"] is not None}
        files[name] = content
    return files, runs


def differences(one: tuple[dict, dict], other: tuple[dict, dict]) -> list[str]:
    """Returns the names of files and runs that are not the same."""
    (files, runs), (others, other_runs) = one, other
    names = [str(name) for name in files | others if files.get(name) != others.get(name)]
    both = runs.keys() & other_runs.keys()
    names += [str(name) for name in runs.keys() ^ other_runs.keys()]
    return names + [str(name) for name in both if not same(runs[name], other_runs[name])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default="", help="of them, in their order, with commas; default: all")
    args = parser.parse_args()
    rng, kills, losses, passes = random.Random(args.seed), Counter(), 0, 0
    root = Path(tempfile.mkdtemp(prefix="kill_making_"))
    write_inputs(root)
    with serving(later) as server:
        commands = stages(server.address)
        commands = {name: commands[name] for name in args.stages.split(",")} if args.stages else commands
        seconds, most = {}, math.ceil(args.kills / len(commands))
        (root / "straight").mkdir()
        for name, words in commands.items():
            since = time.monotonic()
            status = start(root / "straight", words).wait()
            assert status == 0, (root / "straight" / "output.txt").read_text()[-3000:]
            seconds[name] = time.monotonic() - since
        expected, asked = found(root / "straight"), len(server.asked)
        while kills.total() < args.kills:
            passes, before = passes + 1, kills.total()
            folder = root / f"killed_{passes}"
            folder.mkdir()
            server.asked.clear()
            for name, words in commands.items():
                status, killed = None, 0
                while status is None:
                    run = start(folder, words)
                    is_killed = killed < most and kills.total() < args.kills
                    if is_killed and not _ends_within(run, rng.uniform(0.1, 0.8 * seconds[name])):
                        kill(run, rng)
                        kills[name] += 1
                        killed += 1
                        continue
                    status = run.wait()
                if status:
                    losses += 1
                    print(f"{name} cannot go on:\n{(folder / 'output.txt').read_text()[-2000:]}")
            names = differences(found(folder), expected)
            losses += bool(names)
            again, killed = len(server.asked) - asked, kills.total() - before
            losses += again > AT_ONCE * killed
            print(f"{killed} kills: {again} requests more than without; other: {names or 'nothing'}", flush=True)
    told = ", ".join(f"{count} in {name}" for name, count in kills.items())
    print(f"{kills.total()} kills ({told}), {passes} passes, {losses} losses")
    shutil.rmtree(root)
    return 1 if losses else 0


if __name__ == "__main__":
    sys.exit(main())
