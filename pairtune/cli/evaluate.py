"""`tune eval`: what a folder's model gives to pairs, against a reference, without training.

Every function is the one that runs call, so that a run's export gives the run's own numbers.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from omegaconf import DictConfig

from pairtune import config, models
from pairtune.cli.recipe import read_recipe
from pairtune.config import saved as saved_config
from pairtune.errors import UserError
from pairtune.files import telling, write_text
from pairtune.folders import weights
from pairtune.folders.opening import make_ready
from pairtune.losses.calling import policy_scores, takes_unpaired
from pairtune.losses.whole_step import WholeStep
from pairtune.pairs.batch import lay_out
from pairtune.pairs.pair import Pair
from pairtune.pairs.steps import Steps
from pairtune.pairs.tokenize import read_train_and_held_out
from pairtune.process import dist
from pairtune.reference import KL_PAIRS, Reference
from pairtune.run import choosing, contract, metrics, pair_log, places
from pairtune.run.evaluations import interval
from pairtune.run.pair_texts import read_cells
from pairtune.tokenizer import adapt

RECIPE = "full_dpo_single_device"  # whose defaults an evaluation has
COLUMNS = ("source", "language", "lang")  # by which accuracy is told where rows have them


@dataclass(frozen=True)
class Asked:
    """What is evaluated.

    Attributes:
        folder: A model's folder, or a run's: then its export, with the run's own config.
        dataset: Rows; None: a run's held-out pairs.
        reference: A model's folder; None: what a run was compared with, or nothing.
        overrides: key=value of a config.
    """

    folder: Path
    dataset: str | None
    reference: Path | None
    overrides: Sequence[str]


def settle(asked: Asked):
    """Returns the config that says all this, and in words what the reference is.

    Raises:
        UserError: There is nothing to evaluate, or the config is wrong.
    """
    folder, saved = asked.folder.expanduser(), asked.folder.expanduser() / places.CONFIG
    is_run = saved.is_file() and not (folder / "config.json").is_file()
    paths, words, more, reference, is_other = [], [], [], asked.reference, ""
    if is_run:
        exported = folder / places.EXPORT
        if not exported.is_dir():
            raise UserError(f"{folder}: has no {places.EXPORT}: the run has not ended; `resume=true` goes on with it")
        paths, folder = [saved], exported
        of_run = yaml.safe_load(saved.read_text(encoding="utf-8"))
        base = of_run["checkpointer"]
        words += ["model=auto", "checkpointer._component_=torchtune.training.FullModelHFCheckpointer"]
        words += ["enable_activation_offloading=false", "enable_fp8_training=false"]  # weights as they are; no backward
        words += ["~checkpointer.checkpoint_files"] if "checkpoint_files" in base else []
        if reference is None:
            reference, is_other = saved_config.reference_of(of_run)
            more = ["reference.quantize=true"] if _is_quantized(of_run) else []
    words += [f"checkpointer.checkpoint_dir={folder}", f"tokenizer.path={folder}"]
    words += [f"reference={'none' if reference is None else 'model'}"]
    words += [] if reference is None else [f"reference.checkpoint_dir={reference}", *more]
    if asked.dataset:
        words += [f"dataset={asked.dataset}", "eval_dataset=null", "dataset.val_fraction=null"]
        words += ["dataset.streaming=false", "dataset.shuffle_buffer=null"]
    elif not is_run:
        raise UserError(f"{folder}: which pairs? --dataset FILE; of a run's folder, its held-out pairs are taken")
    method, defaults = read_recipe(RECIPE)
    cfg = config.load(method, defaults, paths, [*words, *asked.overrides])
    if reference is None:
        return cfg, "no reference (--reference FOLDER): rewards are log-probs"
    return cfg, f"reference {reference}" + (f" ({is_other}; --reference FOLDER names another)" if is_other else "")


def _is_quantized(of_run: dict) -> bool:
    """Returns whether a run's reference was in 4 bits though its `reference.quantize` is silent."""
    reference = of_run.get("reference") or {}
    if "merge_into" not in of_run or reference.get("quantize") is not None:  # no QLoRA; as it says
        return False
    if reference.get("checkpoint_dir"):
        return True
    return of_run["merge_into"] == "dequantized" and of_run["base_dtype"] == "nf4"  # as the export's base is


@dataclass(frozen=True)
class Opened:
    """A policy and its reference, of which no weight is read yet: what is evaluated is not known before."""

    cfg: DictConfig
    world: dist.World
    loss_fn: Callable
    files: weights.ModelFolder
    tokenizer: Any
    model: Any
    reference: Reference

    def load(self, pairs: Sequence[Pair]) -> choosing.Chosen:
        """Reads all weights, and returns how these pairs are computed."""
        cfg, world = self.cfg, self.world
        asked = {key: cfg[key] for key in choosing.KEYS}
        work = choosing.work(pairs, self.loss_fn, cfg.max_length, len(pairs), 1)
        how = choosing.choose_and_execute(asked, work, self.model, self.reference, cfg.optimizer, world)
        self.reference.open_cache(self.model, pairs, score_end=cfg.score_end)
        models.load(self.model, weights.Weights(self.files), world=world)
        models.settle(self.model, pairs, world)
        self.reference.attach(self.model)
        self.model.eval()
        return how


def open_models(cfg: DictConfig, world: dist.World, loss_fn: Callable) -> Opened:
    """Returns the policy and the reference of a config from `settle`.

    Raises:
        UserError: They cannot be built, or do not belong together.
    """
    reference = Reference(cfg.reference, "full", loss_fn, dtype=cfg.dtype, world=world)
    files = weights.open_weights(cfg.checkpointer, cfg.model)
    tokenizer = adapt(config.instantiate(cfg.tokenizer), cfg.tokenizer)
    model = models.full(cfg.model, dtype=cfg.dtype)
    make_ready(model, files.config, cfg.max_length, tokenizer.vocab_size)
    reference.build(cfg.model, files, tokenizer, cfg.max_length)
    return Opened(cfg, world, loss_fn, files, tokenizer, model, reference)


def evaluate(cfg: DictConfig) -> tuple[dict[str, float], np.ndarray]:
    """Returns what the pairs come to, as metrics.jsonl names it, and a pair_log.RECORD each.

    Args:
        cfg: From `settle`.
    """
    world, loss_fn = dist.start(cfg.device), config.instantiate(cfg.loss)
    opened = open_models(cfg, world, loss_fn)
    tokenizer, model, reference = opened.tokenizer, opened.model, opened.reference
    budget = cfg.max_length, cfg.max_prompt_length, takes_unpaired(loss_fn), cfg.max_completion_length
    train, held_out = read_train_and_held_out(cfg.dataset, cfg.eval_dataset, tokenizer, world, *budget, seed=cfg.seed)
    pairs, sets = held_out or train, metrics.identities(held_out)
    contract.check_pairs(pairs, tokenizer, score_end=cfg.score_end)
    how = opened.load(pairs)
    steps, meter = Steps(pairs, len(pairs), how.batch_size, world, seed=0, rows=how.rows), metrics.Meter()
    batch_of = partial(lay_out, row_length=how.row_length, score_end=cfg.score_end)
    with torch.no_grad():
        micro = steps.share(pairs)
        whole = WholeStep(loss_fn, pairs, micro, steps, max_length=cfg.max_length, score_end=cfg.score_end)
        for some in whole.first_pass:
            batch = batch_of(some).to(world.device)
            whole.add(batch, policy_scores(model, batch, loss_fn), reference.logps(batch))
        whole.end(world)
        for some in world.progress(micro, "evaluation"):
            batch = batch_of(some).to(world.device)
            scores = policy_scores(model, batch, loss_fn)
            given = scores.chosen_logps, scores.rejected_logps, *reference.logps(batch)
            meter.add_pairs(batch, scores, *loss_fn(*given, **whole.inputs(batch, scores)), kl=whole.kl)
        for some in steps.share(pairs[:KL_PAIRS]):
            meter.add(kl_per_token=reference.divergence(model, batch_of(some).to(world.device)))
    (seen,) = metrics.seen_by_all([meter.take_pairs()], world)
    table = pair_log.records(0, seen, is_held_out=True)
    numbers = pair_log.held_out_numbers(table, table[:0]) | pair_log.set_numbers(table, table[:0], sets)
    return meter.read(world, "eval/") | numbers, table


def report(cfg, results: dict[str, float], table: np.ndarray) -> str:
    """Returns the numbers in lines: of all pairs, by length, and by the rows' own columns."""
    lines = [metrics.summary(results, "eval/")]
    lines += [f"  {name:<38} {value:.6g}" for name, value in results.items()]
    both = table[(table["chosen_length"] > 0) & (table["rejected_length"] > 0)]
    if not len(both):
        return "\n".join(lines)
    longer = np.maximum(both["chosen_length"], both["rejected_length"])
    edges = np.unique(np.quantile(longer, (0.25, 0.5, 0.75), method="lower"))
    named = [f"up to {edge:,} tokens" for edge in edges] + [f"over {edges[-1]:,} tokens"]
    groups = {"longer answer": [named[i] for i in np.searchsorted(edges, longer)]}
    key = "eval_dataset" if cfg.eval_dataset.source else "dataset"
    for column, cells in read_cells(cfg[key], COLUMNS, key).items():
        groups[column] = [str(cells.get(int(row), "")) for row in both["row"]]
    for title, names in groups.items():
        lines.append(f"accuracy by {title}")
        for name in dict.fromkeys(sorted(names, key=named.index) if names[0] in named else sorted(names)):
            right = pair_log.margins(both)[[other == name for other in names]] > 0
            low, high = interval(right.mean(), len(right))
            lines.append(f"  {name:<38} {right.mean():.1%} of {len(right):,} ({low:.1%} to {high:.1%})")
    return "\n".join(lines)


def save(path: Path, table: np.ndarray) -> None:
    """Writes an object a pair, a line each."""
    names = [name for name in pair_log.RECORD.names if name not in ("step", "is_held_out", "digest")]
    rows = [{name: None if record[name] != record[name] else record[name].item() for name in names} for record in table]
    for row, margin in zip(rows, pair_log.margins(table).tolist(), strict=True):
        row["margin"] = None if margin != margin else margin
    with telling(path, "name another file: --output"):
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
