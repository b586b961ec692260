"""A model's folder, opened to be asked: for `tune generate` and `tune chat`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pairtune import config, models
from pairtune.cli.alone import overrides_of, without_pairs
from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.folders import peft, weights
from pairtune.folders.opening import make_ready
from pairtune.folders.peft_config import lora_of
from pairtune.models import decoding, execution
from pairtune.models.generation import Sampling, stream
from pairtune.process import dist
from pairtune.run import places
from pairtune.tokenizer import adapt


@dataclass(frozen=True)
class Asked:
    """Which model, and how it is held.

    Attributes:
        folder: A model's, a run's (its export is taken), or an adapter's in PEFT's layout, which names its base.
        adapter: A folder of an adapter that is laid on it; None for none.
        base_dtype: nf4, int8 or fp8 for the base's linear layers; None: as dtype says.
        overrides: key=value of a config.
    """

    folder: Path
    adapter: Path | None = None
    base_dtype: str | None = None
    overrides: Sequence[str] = ()


class Model:
    """A model with its tokenizer, on one device."""

    def __init__(self, asked: Asked, *, max_length: int = 1):
        """
        Args:
            max_length: Tokens of the longest conversation, if it is known: LongRoPE has another scale for long ones.

        Raises:
            UserError: The folder holds no model, or not one that can be built here.
        """
        self.folder, adapter = _settle(asked.folder.expanduser(), asked.adapter)
        name = "qlora" if asked.base_dtype else "lora" if adapter else "full"
        method, defaults = without_pairs(f"{name}_dpo_single_device")
        words = [f"base_dtype={asked.base_dtype}"] if asked.base_dtype else []
        cfg = config.load(method, defaults, [], [*overrides_of(self.folder), *words, *asked.overrides])
        self.world = dist.alone(cfg.device)
        files = weights.open_weights(cfg.checkpointer, cfg.model)
        self.tokenizer = adapt(config.instantiate(cfg.tokenizer), cfg.tokenizer)
        adapters = {**cfg.lora} if name != "full" else None
        if adapter:
            adapters |= lora_of(adapter, files.family, f"adapter={adapter}")
        how = {"dtype": cfg.dtype} | ({"base_dtype": asked.base_dtype} if asked.base_dtype else {})
        self._model = models.policy(name, cfg.model, adapters, **how)
        make_ready(self._model, files.config, max_length, self.tokenizer.vocab_size)
        start = peft.read_adapter(adapter, self._model, files) if adapter else None
        models.load(self._model, weights.Weights(files), world=self.world, adapter=start)
        models.disable_dropout(self._model)
        self._is_compiled = cfg.compile is True  # auto does not pay for a few answers
        if self._is_compiled:
            decoding.check(self._model)
            execution.execute(self._model, execution.Execution("mask", compile=True))

    def prompt(self, question: str | list[Mapping], system: str | None = None) -> list[int]:
        """Returns the tokens that ask: by the chat template, with its generation prompt."""
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else [*question]
        if system:
            messages = [{"role": "system", "content": system}, *messages]
        return self.tokenizer.render(messages, add_generation_prompt=True)

    def check_room(self, prompts: Sequence[list[int]]) -> None:
        """Refuses prompts that leave no room for an answer, before the first is answered.

        Raises:
            UserError: There is one; the message counts prompts from 1.
        """
        positions = self._model.pairtune.num_positions
        if found := [n for n, tokens in enumerate(prompts, 1) if len(tokens) >= positions]:
            told = f"prompt {found[0]:,} of {len(prompts):,}, of {len(prompts[found[0] - 1]):,} tokens, "
            more = f"; neither do {len(found) - 1:,} further ones" if len(found) > 1 else ""
            raise UserError(f"{told}leaves no room in the model's {positions:,} positions{more}; take it out")

    @torch.inference_mode()
    def answers(
        self, prompts: list[list[int]], *, max_new_tokens: int, sampling: Sampling, rng: torch.Generator
    ) -> Iterator[list[str]]:
        """Yields what has been added to each answer's text, after each token; text that is not whole yet waits."""
        tokens: list[list[int]] = [[] for _ in prompts]
        shown = [0] * len(prompts)
        how = {"world": self.world, "stop_ids": self.tokenizer.stop_ids, "max_new_tokens": max_new_tokens}
        how |= {"sampling": sampling, "rng": rng, "fixed_shapes": self._is_compiled}
        for step in stream(self._model, prompts, **how):
            added = []
            for n, token in enumerate(step):
                tokens[n] += [] if token is None else [token]
                text = self.tokenizer.decode(tokens[n]) if token is not None else ""
                added.append(text[shown[n] :] if not text.endswith("\ufffd") else "")  # a part of a character
                shown[n] += len(added[-1])
            yield added
        ends = [self.tokenizer.decode(answer)[n:] for answer, n in zip(tokens, shown, strict=True)]
        if any(ends):
            yield ends

    def generator(self, seed: int) -> torch.Generator:
        """Returns what draws are made by."""
        return torch.Generator(device=self.world.device).manual_seed(seed)


def _settle(folder: Path, adapter: Path | None) -> tuple[Path, Path | None]:
    """Returns the folders of the model and of the adapter.

    Raises:
        UserError: There is no model, or an adapter's base is not on this machine.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give a model's, a run's or an adapter's folder")
    adapter = adapter and adapter.expanduser()
    if (folder / "config.json").is_file():
        return folder, adapter
    if (folder / places.CONFIG).is_file():
        if not (folder / places.EXPORT).is_dir():
            raise UserError(f"{folder}: has no {places.EXPORT}: the run has not ended; `resume=true` goes on with it")
        return folder / places.EXPORT, adapter
    if (folder / "adapter_config.json").is_file() and adapter is None:
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        if isinstance(base, str) and Path(base).expanduser().is_dir():
            return Path(base).expanduser(), folder
        raise UserError(
            f"{folder}: is an adapter of {base}, which is no folder here: fetch it with `tune download`, and give its "
            f"folder: FOLDER --adapter {folder}"
        )
    raise UserError(f"{folder}: holds no config.json: it is no model's folder, nor a run's")
