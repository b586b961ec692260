"""What `tune validate` tells: whether config, model, tokenizer, weights and pairs are right, and fit each other.

The answers are those of the functions that recipes call, on the meta device: no model is loaded, nothing is computed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from pairtune import config, models
from pairtune.errors import UserError
from pairtune.folders.check_model import positions
from pairtune.folders.opening import make_ready
from pairtune.folders.peft import read_adapter
from pairtune.folders.weights import Weights, base_config, open_weights
from pairtune.losses.calling import check_takes, takes_unpaired
from pairtune.pairs.columns import as_plain
from pairtune.pairs.context import NUMBERS
from pairtune.pairs.mixture import counts_of, rates_of, sources_of, told_of_stream
from pairtune.pairs.recognise import recognise
from pairtune.pairs.sources import looks_like_path
from pairtune.pairs.steps import count_steps
from pairtune.pairs.streaming import read_first
from pairtune.pairs.tokenize import Report, read_rows, split_pairs, tokenize_pairs
from pairtune.reference import Reference
from pairtune.reference.sources import KNOWN, is_own
from pairtune.run import choosing, contract, rehearsal
from pairtune.tokenizer.hf import adapt

QUESTION = [{"role": "user", "content": "Hello?"}]
ANSWER = {"role": "assistant", "content": "Hello."}
KEYS = ("model", "tokenizer", "checkpointer", "dataset", "eval_dataset", "optimizer", "lr_scheduler", "loss")
UNKNOWN_STEPS = 1_000_000  # of a run whose pairs are not here


class NotHere(Exception):
    """What is to be checked is not on this machine."""


@dataclass(frozen=True)
class Answer:
    """What one check found: a sentence, and what the checks after it need."""

    text: str
    value: Any = None

    @property
    def refused(self) -> bool:
        return self.text.startswith("refused")


@dataclass
class Validation:
    """One config, checked recipe by recipe; what recipes have in common is checked once.

    Attributes:
        paths, overrides: The config.
        num_rows: Rows of each source that are tokenized, of a large one twice as many; None: all.
        may_be_absent: Whether the sources and folders that the file itself names need not be on this machine.
    """

    paths: list[Path]
    overrides: list[str]
    num_rows: int | None
    may_be_absent: bool
    _answers: dict[tuple, Answer] = field(default_factory=dict)

    def check(self, method: str, defaults: dict) -> dict[str, Answer]:
        """Returns the answers for a recipe, by what was asked."""
        what = (method, defaults, self.paths, self.overrides)
        loaded = _answer(lambda: ("; ".join(config.notes(*what)), config.load(*what)))
        answers, cfg = {"config": loaded}, loaded.value
        if cfg is None or not set(KEYS) <= cfg.keys():  # refused, or for a recipe with keys of its own
            return answers

        def ask(title: str, question: Callable, *keys: str) -> Answer:
            """Asks each question once about these keys' values."""
            about = title, OmegaConf.to_yaml(OmegaConf.masked_copy(cfg, keys))
            if about not in self._answers:
                self._answers[about] = _answer(question)
            return self._answers[about]

        files = ("checkpointer", "tokenizer")
        answers["tokenizer"] = found = ask("tokenizer", lambda: self._tokenizer(cfg), *files)
        sizes = ("model", "lora", "dtype", "enable_fp8_training", "max_length")
        sizes += ("attention", "compile", "enable_activation_checkpointing")
        answers["model"] = ask(f"{method} model", lambda: _model(method, cfg, found.value), *files, *sizes)
        answers["weights"] = ask("weights", lambda: self._weights(cfg), "checkpointer", "model")
        if cfg.get("adapter"):
            answers["adapter"] = ask("adapter", lambda: self._adapter(cfg), "checkpointer", "model", "lora", "adapter")
        reference = cfg.get("reference") or {"name": KNOWN[method][0]}
        if reference["name"] != KNOWN[method][0] or not is_own(reference, method, cfg.dtype):
            about = (*files, "model", "dtype", "max_length", "reference", "adapter", "loss")
            answers["reference"] = ask(f"{method} reference", lambda: self._reference(method, cfg, found.value), *about)
        for key in ("dataset", "eval_dataset"):
            if cfg[key].source:
                budget = ("max_length", "max_prompt_length", "max_completion_length")
                answers[key] = ask(key, lambda key=key: self._pairs(key, cfg, found.value), key, *files, *budget)
            elif key == "dataset":  # of a folder alone
                answers[key] = Answer("not checked: no pairs are named; dataset.source=... names them")
        answers["steps"] = _answer(lambda: _steps(cfg, answers["dataset"].value))
        return answers

    def _must_be_here(self, path: str, *keys: str) -> None:
        """Raises NotHere for an absent path that may be absent: not one that the command line has given."""
        names = {name for key in keys for name in (key, key.partition(".")[0])}
        given = any(override.partition("=")[0] in names for override in self.overrides)
        if self.may_be_absent and not given and not Path(path).expanduser().exists():
            raise NotHere(path)

    def _tokenizer(self, cfg: DictConfig) -> tuple[str, Any]:
        block = cfg.tokenizer
        if isinstance(block.get("path"), str):
            self._must_be_here(block.path, "tokenizer.path", "checkpointer.checkpoint_dir")
        tokenizer = adapt(config.instantiate(block))
        tokenizer.render(QUESTION, add_generation_prompt=True)
        tokenizer.render([*QUESTION, ANSWER])
        return f"{tokenizer.vocab_size:,} ids, {tokenizer.style}", tokenizer

    def _weights(self, cfg: DictConfig) -> tuple[str, Any]:
        self._must_be_here(cfg.checkpointer.checkpoint_dir, "checkpointer.checkpoint_dir")
        found = Weights(open_weights(cfg.checkpointer, cfg.model))
        base = models.full(cfg.model, dtype=cfg.dtype)  # adapters and NF4 change no name or shape of the base
        models.check_weights(base, found)
        return f"{len(found):,} tensors, names and shapes as in the model", None

    def _adapter(self, cfg: DictConfig) -> tuple[str, Any]:
        self._must_be_here(cfg.adapter, "adapter")
        self._must_be_here(cfg.checkpointer.checkpoint_dir, "checkpointer.checkpoint_dir")
        model = models.lora(cfg.model, **cfg.lora, dtype=cfg.dtype)  # NF4 changes no name or shape of an adapter
        found = read_adapter(cfg.adapter, model, open_weights(cfg.checkpointer, cfg.model))
        return f"{len(found):,} matrices, as in the model", None

    def _reference(self, method: str, cfg: DictConfig, tokenizer) -> tuple[str, Any]:
        block, loss_fn = cfg.reference, config.instantiate(cfg.loss)
        reference = Reference(block, method, loss_fn, dtype=cfg.dtype, adapter=cfg.get("adapter"))
        if is_own(block, method, cfg.dtype):
            return block.name, None
        if block.checkpoint_dir:
            self._must_be_here(block.checkpoint_dir, "reference.checkpoint_dir")
        self._must_be_here(cfg.checkpointer.checkpoint_dir, "checkpointer.checkpoint_dir")
        files = open_weights(cfg.checkpointer, cfg.model)
        reference.build(cfg.model, files, tokenizer, cfg.max_length)
        return f"{block.name}, {reference.num_parameters:,} parameters of its own", None

    def _pairs(self, key: str, cfg: DictConfig, tokenizer) -> tuple[str, Any]:
        blocks = sources_of(as_plain(cfg[key]), key)
        found = [self._source(where, block, cfg, tokenizer) for where, block in blocks]
        if len(found) == 1:
            return found[0][:2]
        texts, sizes, num_rows = zip(*found, strict=True)
        if cfg[key].get("streaming"):
            parts = told_of_stream([block["source"] for _, block in blocks], rates_of([block for _, block in blocks]))
            return "; ".join([parts, *texts]), None
        if cfg[key].get("val_fraction"):
            sizes = [len(split_pairs(range(size), cfg[key].val_fraction)[0]) for size in sizes]
        counts = counts_of(sizes, [block for _, block in blocks])
        told_each = [f"{block['source']}: {text}" for (_, block), text in zip(blocks, texts, strict=True)]
        of_all = f"{sum(num_rows):,} rows of {len(blocks)} sources"
        of_all += f", {sum(counts):,} pairs in an epoch" if key == "dataset" else ""
        return "; ".join([of_all, *told_each]), sum(counts)

    def _source(self, key: str, block: dict, cfg: DictConfig, tokenizer) -> tuple[str, int, int]:
        """Returns what is told of one source, its pairs (to train on, where it is the only one) and its rows."""
        source = OmegaConf.create(block)
        if not Path(source.source).expanduser().exists() and not looks_like_path(source.source):
            raise NotHere(f"{source.source} is a data set of the Hugging Face Hub")
        self._must_be_here(source.source, f"{key.partition('[')[0].removesuffix('.source')}.source")
        where = {name: source[name] for name in ("split", "name", "revision", "limit")}
        numbers, loss_fn = [n for n in NUMBERS if (source.columns or {}).get(n)], config.instantiate(cfg.loss)
        check_takes(loss_fn, numbers, key)
        is_stream = cfg.dataset.get("streaming") and key.startswith("dataset")
        if is_stream:
            rows = read_first(block, key, self.num_rows)
        else:
            rows = read_rows(source.source, **where, columns=as_plain(source.columns), sample=self.num_rows, key=key)
        is_sample, total = len(rows) < rows.total, rows.total
        of_all = f"{'' if rows.is_counted else 'about '}{total:,}"
        if tokenizer is None:
            form, _ = recognise(rows, key)
            return f"{of_all} rows, {form.name}; not tokenized, for want of a tokenizer", total, total
        first = rows if self.num_rows is None or is_sample else rows.first(self.num_rows)
        pairs, report = tokenize_pairs(
            first, tokenizer, max_length=cfg.max_length, max_prompt_length=cfg.max_prompt_length,
            max_completion_length=cfg.get("max_completion_length"),
            overlong=source.overlong, on_bad_row=source.on_bad_row, rejected=source.rejected,
            unpaired=takes_unpaired(loss_fn),
            progress=False, key=key,
        )  # fmt: skip
        num_pairs = len(pairs) if len(first) == total else total
        read = f"{len(first):,} rows" if len(first) == total else f"the first {len(first):,} of {of_all} rows"
        read = f"the first {len(first):,} rows of a stream" if is_stream else read
        if is_sample and rows.numbers[-1] >= len(rows):
            read = f"{len(first):,} of {of_all} rows (the first, and some of all parts)"
        if source.get("val_fraction"):
            train, _ = split_pairs(range(num_pairs), source.val_fraction)
            num_pairs = len(train)
        return "; ".join([_told(report, read), *report.columns(), *report.notes]), num_pairs, total


def _answer(question: Callable[[], tuple[str, Any]]) -> Answer:
    try:
        text, value = question()
    except NotHere as error:
        return Answer(f"not here, not checked: {error}")
    except UserError as error:
        return Answer(f"refused: {error}")
    return Answer(f"ok: {text}" if text else "ok", value)


def _model(method: str, cfg: DictConfig, tokenizer) -> tuple[str, Any]:
    model = models.policy(method, cfg.model, cfg.get("lora"), dtype=cfg.dtype)
    here = Path(cfg.checkpointer.checkpoint_dir).is_dir()
    known = base_config(cfg.checkpointer, cfg.model) if here else {}
    make_ready(model, known, cfg.max_length, tokenizer.vocab_size if tokenizer else 0)
    if cfg.get("enable_fp8_training"):
        models.convert_to_fp8(model, torch.device("cpu"))  # of the GPU, the run tells
    choosing.check(cfg.attention, cfg.compile, cfg.enable_activation_checkpointing)
    contract.check_router(model, cfg.get("router_aux_loss_coef", 0))
    compared = "as in config.json" if here else "not compared with config.json, which is not here"
    advice = positions(known, cfg.max_length) if known else []
    return "; ".join([f"{models.sizes(model)}, {compared}", *advice]), None


def _told(report: Report, read: str) -> str:
    dropped = [f"{len(rows):,} dropped ({reason}; row {rows[0]})" for reason, rows in report.dropped.items()]
    return ", ".join([f"{read}, {report.format}: {report.num_kept:,} kept", *dropped])


def _steps(cfg: DictConfig, num_pairs: int | None) -> tuple[str, Any]:
    total, is_stream = cfg.max_steps or UNKNOWN_STEPS, cfg.dataset.get("streaming")
    if num_pairs and not is_stream:
        total = count_steps(num_pairs, cfg.pairs_per_step, cfg.epochs, cfg.max_steps)
    rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=total)
    if is_stream:
        return f"{total:,}", None
    return f"{total:,}, at most" if num_pairs else "optimizer, schedule and loss work together", None


def alike(answers: dict[str, dict[str, Answer]]) -> list[list[str]]:
    """Returns the recipes' names, those with the same answers together."""
    groups: dict[tuple, list[str]] = {}
    for recipe, found in answers.items():
        groups.setdefault(tuple(answer.text for answer in found.values()), []).append(recipe)
    return list(groups.values())


def table(names: list[str], answers: dict[str, Answer]) -> str:
    """Returns the answers of recipes that share them, a line each."""
    refused = any(answer.refused for answer in answers.values())
    lines = [f"{', '.join(names)}: {'refused' if refused else 'ok'}"]
    for name, answer in answers.items():
        lines.append(f"  {name:<15} " + answer.text.replace("\n", "\n" + " " * 18))
    return "\n".join(lines)
