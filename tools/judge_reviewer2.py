"""Says what a run of the demo came to: how it ranks held-out pairs, and how many papers it pans, before and after.

python tools/judge_reviewer2.py runs/reviewer2
"""

import argparse
import json
from pathlib import Path

from make_reviewer2 import stance, title_of

ACCURACY = "eval/rewards/accuracies"


def read_jsonl(path: Path) -> list[dict]:
    """Returns the objects of a file that has one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def share_negative(reviews: list[str]) -> float:
    """Returns the share of reviews whose stance is negative; those that are neither count as not negative."""
    return sum(stance(review) == "negative" for review in reviews) / len(reviews)


def tree(folder: Path, indent: str = "  ") -> list[str]:
    """Returns a line a file below the folder, with its size, and a line a folder."""
    lines = []
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if path.is_dir():
            lines += [f"{indent}{path.name}/", *tree(path, indent + "  ")]
        else:
            lines.append(f"{indent}{path.name:<{40 - len(indent)}} {size(path.stat().st_size):>10}")
    return lines


def size(num_bytes: int) -> str:
    """Returns a file's size in the unit that suits it."""
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes} B"


def examples(samples: list[dict], num: int = 2) -> list[dict]:
    """Returns the first samples whose review turned negative, then, if those are too few, the first of the others."""
    turned = [stance(row["before"]) != "negative" and stance(row["after"]) == "negative" for row in samples]
    order = sorted(range(len(samples)), key=lambda i: not turned[i])  # a stable sort
    return [samples[i] for i in order[:num]]


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit 1 unless accuracy >= 0.95, negative after >= 0.9 and negative before within 0.3 and 0.7",
    )
    options = parser.parse_args(args)
    for name in ("samples.jsonl", "metrics.jsonl"):
        if not (options.run_dir / name).is_file():
            parser.error(f"{options.run_dir / name} is not there: give the output_dir of a run that has ended")
    samples = read_jsonl(options.run_dir / "samples.jsonl")
    accuracies = [row[ACCURACY] for row in read_jsonl(options.run_dir / "metrics.jsonl") if ACCURACY in row]
    if not samples:
        parser.error(f"{options.run_dir / 'samples.jsonl'} holds no sample: set samples.num_prompts above 0")
    if not accuracies:
        parser.error(f"{options.run_dir / 'metrics.jsonl'} holds no line with {ACCURACY}: set eval_dataset")

    accuracy = accuracies[-1]
    before = share_negative([row["before"] for row in samples])
    after = share_negative([row["after"] for row in samples])
    print(f"held-out pairs ranked rightly   {accuracy:7.1%}")
    print(f"held-out papers panned, before  {before:7.1%}  of {len(samples)}")
    print(f"held-out papers panned, after   {after:7.1%}  of {len(samples)}")
    for row in examples(samples):
        print(f"\n{title_of(row['prompt']) or row['prompt']}")
        print(f"  before  {row['before']}")
        print(f"  after   {row['after']}")
    print(f"\n{options.run_dir}/", *tree(options.run_dir), sep="\n")

    if options.check:
        misses = []
        if accuracy < 0.95:
            misses.append(f"accuracy {accuracy:.3f} is below 0.95")
        if after < 0.9:
            misses.append(f"negative after {after:.2f} is below 0.9")
        if not 0.3 <= before <= 0.7:
            misses.append(f"negative before {before:.2f} is outside 0.3 to 0.7")
        if misses:
            raise SystemExit("check failed: " + "; ".join(misses))
        print("\ncheck passed")


if __name__ == "__main__":
    main()
