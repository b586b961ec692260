"""samples.jsonl: a few prompts answered before and after training, what the numbers look like in words."""

import json
from collections.abc import Mapping
from pathlib import Path

from torchtune.modules import TransformerDecoder

from pairtune.files import telling, write_text
from pairtune.models.generation import answers
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World


class Samples:
    """The prompts of a run, and what its model answers. Every process calls `before` and `after`."""

    def __init__(self, path: Path, tokenizer, world: World, block: Mapping, pairs: list[Pair], *, seed: int):
        """
        Args:
            path: samples.jsonl.
            tokenizer: The run's, from tokenizer.adapt.
            block: The config's `samples`.
            pairs: Whose prompts are answered where the block names none.
            seed: Of answers that are drawn (temperature above 0).
        """
        asked = [[{"role": "user", "content": text}] for text in block["prompts"]]
        self._prompts = [tokenizer.render(question, add_generation_prompt=True) for question in asked]
        self._prompts = self._prompts or [pair.prompt for pair in pairs[: block["num_prompts"]]]
        self._questions = [tokenizer.decode(prompt) for prompt in self._prompts]
        self._path, self._tokenizer, self._world, self._block, self._seed = path, tokenizer, world, block, seed
        self._before: list[str | None] = []

    def before(self, model: TransformerDecoder, *, resumed: bool) -> None:
        """Asks the model, or, in a run that is resumed, takes what it has answered at the start."""
        self._before = answers_before(self._path, self._questions) if resumed else self._ask(model)
        if self._world.is_main:
            with telling(self._path, "make room, or name another output_dir"):
                write_samples(self._path, self._questions, self._before)

    def after(self, model: TransformerDecoder) -> None:
        """Asks the model again."""
        after = self._ask(model)
        if self._world.is_main:
            write_samples(self._path, self._questions, self._before, after)

    def _ask(self, model: TransformerDecoder) -> list[str]:
        found = answers(
            model,
            self._prompts,
            world=self._world,
            stop_ids=self._tokenizer.stop_ids,
            max_new_tokens=self._block["max_new_tokens"],
            temperature=self._block["temperature"],
            seed=self._seed,
        )
        return [self._tokenizer.decode(answer) for answer in found]

    def show(self) -> None:
        """Prints the first ones of a run that has ended, and how many answers it changed."""
        show_samples(self._path)


def write_samples(path: Path, prompts: list[str], before: list[str | None], after: list[str] | None = None) -> None:
    """Writes one JSON object a prompt: prompt, before, and after, once there is one."""
    columns = {"prompt": prompts, "before": before} | ({} if after is None else {"after": after})
    samples = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def answers_before(path: Path, prompts: list[str]) -> list[str | None]:
    """Returns what a samples.jsonl says of these prompts before training; None where it does not have one."""
    samples = _read_samples(path) if path.exists() else []
    known = {sample["prompt"]: sample["before"] for sample in samples}
    return [known.get(prompt) for prompt in prompts]


def show_samples(path: Path, count: int = 3) -> None:
    """Prints the first samples of a run that has ended, and how many answers it changed."""
    samples = _read_samples(path)
    if not samples:  # none were asked for
        return
    for sample in samples[:count]:
        print("\n" + "\n".join(f"{name + ':':<8}{str(text).strip()}" for name, text in sample.items()))
    known = [sample for sample in samples if sample["before"] is not None]  # a run that was resumed may ask others
    changed = sum(sample["before"] != sample["after"] for sample in known)
    barely = ": the policy barely moved" if known and not changed else ""
    others = f"; {len(samples) - len(known)} were not asked before training" if len(known) < len(samples) else ""
    print(f"\n{changed} of {len(known)} answers changed{barely}{others}")


def _read_samples(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:  # whose lines end in \n only: texts may hold other line separators
        return [json.loads(line) for line in file]
