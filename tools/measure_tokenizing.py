"""Rows/s from a file of pairs to tokens: a first run on one core and on all, a second one, and one with a changed row.

    python tools/measure_tokenizing.py [--rows 100000] [--tokens 600] [--cores 1 2]

The tokenizer is trained here, on the sources of Python's own library, from which the rows' texts are cut, too. Each
read is a process of its own on so many cores. Seconds are the clock's, from the model's tokenizer to pairs, and to
the first step's, after all that a run looks at of all pairs before it: CPU seconds beside each are of all its
processes, for a machine that others use. Its load is told. The first line is how fast the tokenizers library alone is
there, on one core: it encodes the rows' texts, and nothing is read, rendered, compared or kept.
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from itertools import islice
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
READ = """
import json, os, sys, time
from pairtune.process import dist
from pairtune.config.keys import ROWS
from pairtune.losses.modules import build
from pairtune.pairs.steps import Steps
from pairtune.pairs.tokenize import read_train_and_held_out
from pairtune.run import choosing, contract
from pairtune.run.fingerprint import digest_pairs
from pairtune.tokenizer.hf import hf_tokenizer

source, model, cache, cores = sys.argv[1:]
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: int(cores)])
world, began, cpu = dist.start("cpu"), time.monotonic(), sum(os.times()[:4])
block, tokenizer = {**ROWS, "source": source, "val_fraction": 0.02, "cache_dir": cache}, hf_tokenizer(model)
train, held_out = read_train_and_held_out(block, {**ROWS, "source": None}, tokenizer, world, 4096, None)
read, cpu_read = time.monotonic() - began, sum(os.times()[:4]) - cpu
loss = build("sigmoid")
choosing.work(train + held_out, loss, 4096, 64, 1000)
contract.check_pairs(train + held_out, tokenizer)
contract.check_loss(loss, train, held_out, pairs_per_step=64, keep_best=None)
digest_pairs(train), digest_pairs(held_out)
steps = Steps(train, 64, 4, world, seed=0)
steps.heaviest(), steps[0]
ready, cpu = time.monotonic() - began, sum(os.times()[:4]) - cpu
count = len(train) + len(held_out)
print(json.dumps({"pairs": count, "read": read, "ready": ready, "cpu_read": cpu_read, "cpu": cpu}))
"""


def make_tokenizer(folder: Path, texts: list[str], size: int) -> None:
    """Writes a byte-level BPE of so many tokens, with a chat template."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    quiet = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=size, **quiet)
    backend.train_from_iterator(texts, trainer)
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "chat_template": TEMPLATE}))


def make_rows(path: Path, texts: list[str], count: int, tokens: int, model: Path) -> None:
    """Writes pairs of `tokens` on the average: half in the prompt, a quarter in each answer."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    sample = "\n".join(texts)[:1_000_000]
    width = tokens * len(sample) / len(backend.encode(sample).ids)  # in characters
    rng, text = random.Random(0), "\n".join(texts)

    def piece(share: float) -> str:
        start = rng.randrange(len(text) - int(width))
        return text[start : start + int(width * share * rng.uniform(0.5, 1.5))].strip() + "."

    with path.open("w") as file:
        for _ in range(count):
            row = {"prompt": piece(0.5), "chosen": piece(0.25), "rejected": piece(0.25)}
            file.write(json.dumps(row) + "\n")


def change_a_row(path: Path) -> None:
    """Gives the row in the middle another answer."""
    lines = path.read_text().splitlines(keepends=True)
    middle = len(lines) // 2
    lines[middle] = json.dumps(json.loads(lines[middle]) | {"chosen": "Changed."}) + "\n"
    path.write_text("".join(lines))


def read(source: Path, model: Path, cache: Path, cores: int) -> dict:
    """Returns what one read took, its peak memory in MiB and the machine's load."""
    command = [sys.executable, "-P", "-c", READ, source, model, cache, str(cores)]
    load = os.getloadavg()[0]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10  # of the largest so far
    return json.loads(done.stdout.splitlines()[-1]) | {"load": load, "peak": peak}


def library_alone(source: Path, model: Path, count: int = 5000) -> float:
    """Returns how many rows' texts a CPU second of the tokenizers library encodes."""
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    with source.open() as file:
        rows = [json.loads(line) for line in islice(file, count)]
    began = time.process_time()
    for row in rows:
        for text in row.values():
            backend.encode_batch_fast([text], add_special_tokens=False)
    return len(rows) / (time.process_time() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=600, help="of a pair, on the average")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--vocabulary", type=int, default=32_000)
    args = parser.parse_args()
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    texts = [path.read_text(errors="ignore") for path in sources]
    print(f"{'':24} {'rows/s':>8} {'seconds':>8} {'CPU s':>8} {'ready s':>8} {'CPU s':>8} {'MiB':>7} {'load':>6}")

    def tell(title: str, found: dict) -> None:
        speed = args.rows / found["read"]
        print(
            f"{title:24} {speed:8,.0f} {found['read']:8.1f} {found['cpu_read']:8.1f} {found['ready']:8.1f} "
            f"{found['cpu']:8.1f} {found['peak']:7,.0f} {found['load']:6.1f}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, model = folder / "pairs.jsonl", folder / "model"
        make_tokenizer(model, texts, args.vocabulary)
        make_rows(source, texts, args.rows, args.tokens, model)
        print(f"{'the library alone':24} {library_alone(source, model):8,.0f}", flush=True)
        for cores in args.cores:
            tell(f"first, {cores} core{'s' * (cores > 1)}", read(source, model, folder / f"cache_{cores}", cores))
        last = folder / f"cache_{args.cores[-1]}"
        tell("second", read(source, model, last, args.cores[-1]))
        change_a_row(source)
        tell("one row changed", read(source, model, last, args.cores[-1]))


if __name__ == "__main__":
    main()
