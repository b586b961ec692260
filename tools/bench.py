"""A DPO step of ours against torchtune's and TRL's: the same weights, adapters, pairs and order, step by step in turn.

    python tools/bench.py                                    # LoRA on a CPU: 4 layers, width 256, vocabulary 32,000
    python tools/bench.py --lengths 512/128/128 --method full --systems ours torchtune trl
    python tools/bench.py --device cuda --model 1b --lengths mix --systems ours:compiled ours:cached torchtune:compiled
    python tools/bench.py --trl-env runs/trl                 # TRL's newest, which pip puts there the first time
    python tools/bench.py --plot scaling.png                 # time and memory as the work grows
    python tools/bench.py --folder gemma-3-270m --source pairs.json --pairs 8 --lr 5e-5 --systems ours trl
                                                             # a model and pairs that are there

A system is NAME or NAME:FLAG:FLAG..., of
  ours, torchtune, trl    the recipe, torchtune's recipe, TRL's trainer, each in a process of its own
and, of flags,
  cached                  the reference's values are there before training (not torchtune)
  compiled, checkpointing layers compiled; activation checkpointing
  completions, liger      TRL scores completions only, on a CPU, too; TRL with Liger's kernels
  bridged                 ours by transformers' classes, in the place of torchtune's builder
  pairs=N                 pairs at a time
  key=value               of our config

All systems make their first step, then one step each in turn, so that whatever else the machine does meets all alike.
First it is told whether their losses agree, then a table: medians of the steps after the second, CPU seconds of a
process (on a GPU: between two events), the most memory of a step, operations a second by what a pair takes at least
(random_work.py), and their share of what square matrix products reach in the same run.
"""

import argparse
import json
import statistics
import sys
import tempfile
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import random_work as work
import trl_env
from bench_plot import plot
from side_by_side import Task, in_turn, one, parsed, summary

SYSTEMS = ["ours", "ours:cached", "torchtune", "trl:completions", "trl:completions:cached"]
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05}  # of a loss: how far systems may be apart
PACKAGES = ("torch", "torchtune", "torchao", "trl", "transformers", "peft", "liger-kernel")


def agreement(rows: list[dict], tolerance: float) -> tuple[bool, str]:
    """Returns whether all systems' losses are the first's, and a table of them."""
    lines = [_row(["step", *(row["system"] for row in rows)]), _row(["---"] * (len(rows) + 1))]
    for n, losses in enumerate(zip(*(row["losses"] for row in rows), strict=True), 1):
        lines.append(_row([str(n), *(f"{loss:.6f}" for loss in losses)]))
    apart = [max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True)) for row in rows]
    lines.append(_row(["apart", *(f"{value:.1e}" for value in apart)]))
    agree = max(apart) <= tolerance
    told = "agree" if agree else "DO NOT AGREE"
    lines += ["", f"The losses {told}: {max(apart):.1e} apart at most, {tolerance:.0e} allowed."]
    return agree, "\n".join(lines)


def table(rows: list[dict], peak: float, loaded: float | None, device: str) -> str:
    """Returns a Markdown table: a row a system, each with how many times the first of its kind it takes."""
    unit = "s a step" if device == "cuda" else "CPU s a step"
    counted = all(row["tflops"] for row in rows)
    head = ["", unit, "least to most", "pairs/s", *(["TFLOP/s", "of the peak"] * counted), "peak GiB"]
    head += ["above the loaded model"] * (loaded is not None) + ["times ours"]
    lines = [_row(head), _row(["---"] * len(head))]
    ours = {row["live"]: row["seconds"] for row in reversed(rows) if row["system"].startswith("ours")}
    for row in rows:
        base = ours.get(row["live"])
        cells = [
            row["system"], f"{row['seconds']:.3f}", f"{row['least']:.3f} to {row['most']:.3f}",
            f"{row['pairs_per_second']:.2f}",
            *([f"{row['tflops']:.4g}", f"{row['tflops'] / peak:.0%}"] if counted else []),
            f"{row['peak_gib']:.2f}", *([f"{row['peak_gib'] - loaded:.2f}"] if loaded is not None else []),
            f"{row['seconds'] / base:.2f}" if base else "",
        ]  # fmt: skip
        lines.append(_row(cells))
    return "\n".join(lines)


def versions(device: str) -> str:
    """Returns what was used, in words."""
    words = []
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            words.append(f"{package} {version(package)}")
    card = "GPU"
    if device == "cpu":
        info = Path("/proc/cpuinfo")
        names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
        card = names[0].partition(": ")[2] if names else "CPU"
    return f"{card}; {', '.join(words)}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, metavar="NAME:FLAG")
    parser.add_argument("--method", choices=["full", "lora", "qlora"], default="lora")
    parser.add_argument("--model", choices=list(work.MODELS), default="small")
    parser.add_argument("--vocabulary", type=int, help="of the model, such as 32000, 128256, 262144")
    lengths = "tokens of prompt/chosen/rejected, such as 512/128/128; ~ draws within a tenth; or mix"
    parser.add_argument("--lengths", default="~300/85/85", help=lengths)
    parser.add_argument("--folder", help="a model's, in the place of a random one; float32 or bf16 as --dtype says")
    parser.add_argument(
        "--source", help="rows of prompt (or instruction and input), chosen, rejected: JSON, or a line each"
    )
    parser.add_argument("--lr", type=float, help="of a cosine without warm-up; else a constant one")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA")
    parser.add_argument("--pairs", type=int, default=4, help="a step")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="of a system on a CPU")
    parser.add_argument("--path", action="append", default=[], metavar="NAME=FOLDERS", help="a system's PYTHONPATH")
    parser.add_argument("--trl-env", type=Path, metavar="DIR", help="TRL's newest is there, or put there by pip")
    parser.add_argument("--json", type=Path, help="a file to which the results are appended")
    parser.add_argument("--plot", type=Path, help="a PNG: time and memory as length, pairs, vocabulary, processes grow")
    args = parser.parse_args()
    for text in args.systems:
        parsed(text)
    if bool(args.folder) != bool(args.source) or (args.folder and args.plot):
        parser.error("--folder and --source go together, without --plot")
    sizes = dict(work.MODELS[args.model])
    sizes["vocab_size"] = args.vocabulary or sizes["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="bench_") as name:
        task = Task(
            Path(name), sizes, tuple(() if args.folder else work.draw_lengths(args.lengths, args.pairs * args.steps)),
            args.method,
            args.device, args.dtype or ("bf16" if args.device == "cuda" else "fp32"), args.rank, args.pairs,
            args.threads, paths=tuple(tuple(text.split("=", 1)) for text in args.path), real=args.folder,
            source=args.source, lr=args.lr, steps=args.steps,
            trl_python=trl_env.python_of(args.trl_env) if args.trl_env else sys.executable,
        )  # fmt: skip
        if args.plot:
            plot(args.plot, args.systems, task, args.steps, tiny=args.model == "tiny")
            return
        raise SystemExit(compare(args, task))


def compare(args: argparse.Namespace, task: Task) -> int:
    """Prints the comparison; returns the exit status, 1 where losses do not agree."""
    task.write()
    peak = one("matmul", task)["loss"]
    loaded = one("loaded", task)["peak_gib"] if task.device == "cpu" else None
    steps = in_turn(args.systems, task, args.steps)
    rows = [summary(found, task, text) for text, found in steps.items()]
    if not rows:
        return 1
    agree, told = agreement(rows, TOLERANCE[task.dtype])
    print(f"{told}\n\n{table(rows, peak, loaded, task.device)}\n")
    if task.real:
        told = f"{task.real}, {task.source}: {task.pairs_per_step} pairs a step"
    else:
        tokens = statistics.mean(n.total for n in task.lengths)
        told = f"{args.model}, vocabulary {task.sizes['vocab_size']:,}, {args.lengths}: {task.pairs_per_step} pairs of "
        told += f"{tokens:.0f} tokens a step"
    print(f"{task.method}, {task.dtype}, {told}; matrix products reach {peak:.4g} TFLOP/s.\n{versions(task.device)}")
    if args.trl_env:
        print(f"TRL's environment: {trl_env.versions_of(args.trl_env)}")
    if args.json:
        with args.json.open("a") as file:
            for row in rows:
                row |= {"method": task.method, "lengths": args.lengths, "model": args.model, "peak_tflops": peak}
                file.write(json.dumps(row) + "\n")
    return int(not agree)


if __name__ == "__main__":
    main()
