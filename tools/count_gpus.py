"""Keeps what configs say of GPUs true: how many a recipe takes, and the GiB that `tune plan` counts on each.

    python tools/count_gpus.py --check [llama3_8b ...]     # exits 1 and names the lines that are not true
    python tools/count_gpus.py --write [llama3_8b ...]     # all configs take about ten minutes

Such a line is `full 8 (59.6), LoRA 1 (17.4), QLoRA 1 (8.3)`, for GPUs of 80 GB where it does not say otherwise. The
GiB are counted at the least: one pair at a time where the config does not say more, and whole layers computed again in
backward. The number of GPUs is chosen by hand, and has to be one on which the recipe fits.
"""

import argparse
import re
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from pairtune.cli import plan
from pairtune.cli.recipe import read_recipe
from pairtune.config.layers import load
from pairtune.process import torchao_names

AT_LEAST = ("enable_activation_checkpointing=true", "attention=segments", "compile=false")
CONFIGS = Path(__file__).parents[1] / "configs"
LINE = re.compile(r"^# .*`tune plan` counts on each: .*$", re.MULTILINE)
ENTRY = re.compile(r"(full|LoRA|QLoRA) (\d+)(?: with (\d+) GB)? \(([\d.]+)\)")


def counted(path: Path, method: str, gpus: int, gpu_memory: float) -> plan.Plan:
    """Returns what the recipe of this method takes on so many GPUs of so many GB."""
    recipe = f"{method.lower()}_dpo_{'single_device' if gpus == 1 else 'distributed'}"
    run = plan.Run(recipe, (path,), AT_LEAST, gpus=gpus, gpu_memory=gpu_memory)
    _, defaults = read_recipe(recipe)
    if load(method.lower(), defaults, [path], []).batch_size == "auto":
        run = replace(run, overrides=(*AT_LEAST, "batch_size=1"))
    return plan.plan(run, read_recipe)


def true_line(path: Path, line: str) -> str:
    """Returns the line with the GiB that are counted now.

    Raises:
        SystemExit: A recipe does not fit on the GPUs that the line gives it.
    """

    def entry(match: re.Match) -> str:
        method, gpus, memory, _ = match.groups()
        found = counted(path, method, int(gpus), float(memory or 80))
        if not found.fits:
            raise SystemExit(f"{path.name}: {match[0]}: does not fit, {found.of_memory()}; choose another number")
        return match[0][: match.start(4) - match.start()] + f"{found.peak / plan.GIB:.1f})"

    return ENTRY.sub(entry, line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="exit 1 where a line is not true")
    action.add_argument("--write", action="store_true", help="write the lines")
    parser.add_argument("configs", nargs="*", help="names; none: all that have such a line")
    args = parser.parse_args()
    torchao_names.quiet()
    paths = [CONFIGS / f"{name}.yaml" for name in args.configs] or sorted(CONFIGS.glob("*.yaml"))
    untrue = 0
    for path in tqdm([p for p in paths if LINE.search(p.read_text())], unit="config"):
        text = path.read_text()
        line = LINE.search(text)[0]
        now = true_line(path, line)
        if now != line:
            untrue += 1
            tqdm.write(f"{path.name}\n- {line}\n+ {now}")
            if args.write:
                path.write_text(text.replace(line, now))
    if args.check and untrue:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
