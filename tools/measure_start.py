"""CPU seconds until `tune` answers: help, lists, each kind of mistake, validate, plan; and until a run's first step.

    python tools/measure_start.py [--imports 12]

Of the process and all that it starts, on the small random model and pairs of tools/bench.py. Then where the imports of
a run go: seconds by package, largest first, of the time that Python takes to execute their modules.
"""

import argparse
import collections
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

TUNE = [sys.executable, "-P", "-m", "pairtune.cli"]
RUN = ["run", "lora_dpo_single_device", "--config", "ours.yaml"]
MISTAKES = {
    "an unknown key": ["sead=1"],
    "a wrong type": ["seed=one"],
    "impossible together": ["batch_size=3"],
    "an unknown loss": ["loss=ip"],
    "a component that is not there": ["optimizer=torch.optim.AdmW"],
    "an argument that it lacks": ["optimizer.rate=1"],
    "a missing model folder": ["checkpointer.checkpoint_dir=nowhere"],
    "a missing file of pairs": ["dataset.source=nowhere.jsonl"],
}
ANSWERS = {
    "--help": (["--help"], 0),
    "ls": (["ls"], 0),
    "run RECIPE --help": ([*RUN[:2], "--help"], 0),
    "an unknown recipe": (["run", "lora_dpo_one_device", *RUN[2:]], 2),
    **{name: ([*RUN, *words], 2) for name, words in MISTAKES.items()},
    "the same, of a distributed recipe": (["run", "lora_dpo_distributed", *RUN[2:], "sead=1"], 2),
    "plan with an unknown key": (["plan", "ours.yaml", "sead=1"], 2),
    "validate": (["validate", "ours.yaml", "--recipe", "lora_dpo_single_device"], 0),
    "plan": (["plan", "ours.yaml"], 0),
}
FIRST = ["metric_logger=first.Logger", "max_steps=1", "samples.num_prompts=0", "output_dir=run"]
STEPS = {
    "the first step": [*RUN, *FIRST],
    "the first step, distributed": ["run", "lora_dpo_distributed", *RUN[2:], *FIRST],
}
# What is logged first is the first step. The file of weights and pairs that a run writes later is not waited for.
LOGGER = """
import os

class Logger:
    def log_dict(self, payload, step):
        os._exit(0)

    def log(self, name, data, step):
        os._exit(0)

    def log_config(self, config):
        pass

    def close(self):
        pass
"""


def seconds(words: list[str], folder: Path, status: int = 0, python: tuple[str, ...] = ()) -> tuple[float, str]:
    """Returns the CPU seconds of `tune` with these words and of the processes that it waits for, and its stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [TUNE[0], *python, *TUNE[1:], *words]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if result.returncode != status:
        raise SystemExit(f"tune {' '.join(words)}: status {result.returncode}\n{result.stdout}{result.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stderr


def by_package(importtime: str) -> collections.Counter:
    """Returns the seconds of modules' own code by package, as `python -X importtime` prints them."""
    lines = re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+([\w.]+)$", importtime, re.MULTILINE)
    spent = collections.Counter()
    for microseconds, module in lines:
        spent[module.partition(".")[0]] += int(microseconds) / 1e6
    return spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--imports", type=int, default=12, metavar="N", help="how many packages are shown")
    arguments = parser.parse_args()
    import peers
    import random_work
    import side_by_side  # beside this file

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes, lengths = random_work.MODELS["small"], random_work.draw_lengths("~300/85/85", 8)
        task = side_by_side.Task(folder, sizes, tuple(lengths))
        task.write()
        (folder / "ours.yaml").write_text(json.dumps(peers.our_config(task.spec("ours", []))))
        (folder / "first.py").write_text(LOGGER)
        for title, (words, status) in ANSWERS.items():
            print(f"{title:<36}{seconds(words, folder, status)[0]:6.2f} s", flush=True)
        for title, words in STEPS.items():
            print(f"{title:<36}{seconds(words, folder)[0]:6.2f} s", flush=True)
        spent = by_package(seconds(STEPS["the first step"], folder, python=("-X", "importtime"))[1])
        print(f"\nImports until the first step: {sum(spent.values()):.2f} s, of which")
        for package, of_it in spent.most_common(arguments.imports):
            print(f"{package:<36}{of_it:6.2f} s")


if __name__ == "__main__":
    main()
