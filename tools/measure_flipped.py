"""How many wrong labels `tune pairs` finds: some of a file's pairs are turned round, a run made, its list counted.

    python tools/measure_flipped.py --source work/reviewer2/train.jsonl --config configs/reviewer2.yaml

What follows these options is passed to `tune run` as it is. The pairs that are turned round are drawn by the seed, the
run's, too.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

AMONG = 0.15  # of the list, from its top
TUNE = [sys.executable, "-m", "pairtune.cli"]


def read_rows(path: Path) -> list[dict]:
    """Returns the rows of a JSON or JSONL file that have `chosen` and `rejected`."""
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]


def turn(rows: list[dict], share: float, seed: int) -> tuple[list[dict], set[int]]:
    """Returns the rows with so many of them turned round, and which."""
    turned = set(random.Random(seed).sample(range(len(rows)), round(share * len(rows))))
    return [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if n in turned else row
        for n, row in enumerate(rows)
    ], turned


def found_by_a_run(args, seed: int) -> tuple[int, int, int]:
    """Returns how many turned pairs a run lists among its first, how many it saw, and how many lines those are."""
    rows, turned = turn(read_rows(args.source), args.share, seed)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        data, run, listed = (Path(folder) / name for name in ("pairs.jsonl", "run", "listed.jsonl"))
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = ["--config", args.config] if args.config else []
        words = [f"dataset={data}", f"output_dir={run}", f"seed={seed}", "samples.num_prompts=0", "keep_last_n=0"]
        subprocess.run([*TUNE, "run", args.recipe, *config, *words, *args.settings], check=True)
        subprocess.run([*TUNE, "pairs", str(run), "--output", str(listed)], check=True, stdout=subprocess.DEVNULL)
        pairs = [json.loads(line)["row"] for line in listed.read_text(encoding="utf-8").splitlines()]
    first = pairs[: round(AMONG * len(pairs))]
    return len(turned & set(first)), len(turned & set(pairs)), len(first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="rows with chosen and rejected, JSON or JSONL")
    parser.add_argument("--recipe", default="lora_dpo_single_device")
    parser.add_argument("--config")
    parser.add_argument("--share", type=float, default=0.1, help="of the pairs that is turned round; default: 0.1")
    parser.add_argument("--seeds", default="1,2", help="a run of each; default: 1,2")
    parser.add_argument("--folder", type=Path, help="where runs are made, and removed; default: the system's")
    args, args.settings = parser.parse_known_args()
    told = []
    for seed in map(int, args.seeds.split(",")):
        found, given, lines = found_by_a_run(args, seed)
        share = f"{found} of {given} turned pairs ({found / given:.0%})"
        told.append(f"seed {seed}: {share} are among the first {lines} listed")
    print("\n" + "\n".join(told))


if __name__ == "__main__":
    main()
