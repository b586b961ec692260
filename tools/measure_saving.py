"""How long a step waits for a checkpoint, against the steps between two of them.

    python tools/measure_saving.py [--pairs-per-step 64]

Full DPO on a random model (hidden 256, 4 layers, vocabulary 32,000: 20 million parameters, 0.23 GiB of weights and Adam
state), random pairs of about 300 prompt and 85 answer tokens, float32, CPU. Training waits while the state is copied;
the copy is written in the background, where it slows steps down: both are measured, wall-clock, in one run. Training
state grows with a model as its steps do, so the share is about the same for larger ones; a slow disk keeps
only the background busy for longer.
"""

import argparse
import random
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from pairtune.process import torchao_names  # before torchtune, which may want names that torchao no longer has

# isort: split

import torch
from torchtune.models.llama3 import llama3
from tqdm import tqdm

from pairtune import models
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World
from pairtune.run.checkpoints import Checkpoints
from pairtune.run.metrics import Meter
from pairtune.run.state import TrainState

SIZES = {
    "vocab_size": 32_000, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8, "embed_dim": 256, "max_seq_len": 2048,
    "intermediate_dim": 688,
}  # fmt: skip
EVERY = 100  # steps between two checkpoints


def random_pair(rng: random.Random) -> SimpleNamespace:
    lengths = {"prompt": rng.randint(280, 320), "chosen": rng.randint(70, 100), "rejected": rng.randint(70, 100)}
    return SimpleNamespace(**{k: [rng.randrange(32_000) for _ in range(n)] for k, n in lengths.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs-per-step", type=int, default=8, help="TRL's default; ours is 64")
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    torchao_names.quiet()
    world, rng = World(torch.device("cpu")), random.Random(0)
    model = llama3(**SIZES)
    models.prepare(model, max_length=2048)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    state = TrainState(model, optimizer, None, Meter(), world=world, fingerprint={})
    seconds, waits = [], {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = Checkpoints(Path(folder), world, keep_last_n=1)
        for step in tqdm(range(1, args.steps + 1)):
            began = time.perf_counter()
            for pair in [random_pair(rng) for _ in range(args.pairs_per_step)]:
                chosen, rejected = answer_logps(model, lay_out([pair]))
                (-torch.nn.functional.logsigmoid(0.1 * (chosen - rejected)).sum() / args.pairs_per_step).backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - began)
            state.step = step
            if step % 6 == 0:
                began = time.perf_counter()
                checkpoints.save(state)
                waits[step] = time.perf_counter() - began
        checkpoints.close()
        size = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    after = [seconds[step] for step in waits if step < args.steps]  # the step that runs beside the writing
    usual = statistics.median(s for i, s in enumerate(seconds) if i not in waits and i > 1)
    wait, slower = statistics.median(waits.values()), max(0.0, statistics.median(after) - usual)
    print(f"a checkpoint of {size / 2**30:.2f} GiB, a step of {args.pairs_per_step} pairs in {usual:.2f} s")
    print(f"training waits {wait:.3f} s, and the step beside the writing takes {slower:.3f} s longer")
    print(f"one in {EVERY} steps: {100 * wait / (EVERY * usual):.2f} % waiting, "
          f"{100 * (wait + slower) / (EVERY * usual):.2f} % with the slower step")  # fmt: skip


if __name__ == "__main__":
    main()
