"""What a run takes, before anything is downloaded: memory a device, steps, disk, whether it fits, and what to change.

How a step's memory is counted is in memory.py; here is what a config and devices make of it.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
from omegaconf import DictConfig, OmegaConf

from pairtune import models
from pairtune.config.components import instantiate
from pairtune.config.layers import load
from pairtune.errors import UserError
from pairtune.folders.opening import windows_of
from pairtune.folders.weights import read_config
from pairtune.losses.calling import needs
from pairtune.models import fp8
from pairtune.pairs.batch import ROW_MULTIPLE
from pairtune.pairs.columns import as_plain
from pairtune.pairs.limits import worst_pair
from pairtune.pairs.mixture import counts_of, sources_of
from pairtune.pairs.rows import read_rows
from pairtune.pairs.steps import count_steps
from pairtune.reference.cache import BATCHES
from pairtune.reference.sources import KNOWN, check_reference, frozen_model, has_second_model, is_own
from pairtune.run import choosing
from pairtune.run.choosing import GIB, USABLE, Chosen
from pairtune.run.memory import (
    PARTS,
    Setting,
    StepMemory,
    pass_memory,
    step_memory,
    uniform_batch,
    uniform_pair,
)

ASSUMED = f"""\
Counted, not measured: what tensors hold at the fullest moment of a step, in the worst case, a batch of pairs with a
prompt of one token and two answers that fill max_length, or are of max_completion_length. Not counted: answers to
samples.prompts, and what CUDA, NCCL and an allocator's gaps take: {1 - USABLE:.0%} of a GPU is
left to them."""


@dataclass(frozen=True)
class Run:
    """A recipe, a config and devices. `recipe` is a name, read by whatever is passed as `read_recipe`."""

    recipe: str
    config_paths: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    gpus: int = 1
    gpu_memory: float | None = None  # GiB each; None: not known


@dataclass(frozen=True)
class Plan:
    """What a run takes; sizes in bytes. str() is a table."""

    run: Run
    chosen: Chosen
    memory: StepMemory
    device: str
    dtype: str
    model: str  # what builds it
    num_parameters: int
    num_trained: int
    pairs_per_step: int
    batch_size: int
    micro_batches: int  # a step, of at most batch_size pairs a device
    max_tokens: int  # of a pair
    num_rows: int | None  # of the data set, where it is here
    num_steps: int | None
    streams: bool  # its data set
    export: int
    num_checkpoints: int  # that lie on the disk at a time
    reference_pass: int = 0  # bytes a device at its fullest moment; 0 without a second model that fills a cache

    @property
    def checkpoint(self) -> int:
        """Bytes of one: the trained weights and the optimizer's state."""
        return self.memory.trained + self.memory.optimizer

    @property
    def peak(self) -> int:
        """Bytes a device, of a training step or of what comes before."""
        return max(self.memory.total, self.reference_pass)

    @property
    def fits(self) -> bool | None:
        """Whether a device holds it; None where its memory is not known."""
        return None if self.run.gpu_memory is None else self.peak <= USABLE * self.run.gpu_memory * GIB

    def __str__(self) -> str:
        unit, size_of_unit = ("GiB", GIB) if self.memory.total >= GIB else ("MiB", GIB / 1024)

        def amount(size: float) -> str:
            return f"{size / size_of_unit:10,.2f}"

        lines = [
            f"{self.run.recipe} on {self.devices()}",
            "",
            _line("parameters", f"{self.num_parameters:,}, {self.num_trained:,} trained, {self.dtype}"),
            _line("a step", f"{self.pairs_per_step:,} pairs, at most {self.pairs_per_step * self.max_tokens:,} tokens"),
            _line("a device at a time", f"{self.batch_size:,} pairs; micro-batches a step: {self.micro_batches:,}"),
            _line("steps", self._steps()),
            _line("computes with", " ".join(f"{k}={str(v).lower()}" for k, v in self.chosen.keys.items())),
            "",
            f"{unit} a device",
            *(_line(f"  {part}", amount(size), PARTS[part]) for part, size in self.memory.parts.items()),
            _line("  together", amount(self.memory.total)),
        ]
        if self.reference_pass:
            note = "the second model alone, before training; none where the cache has every value"
            lines.append(_line("reference's pass", amount(self.reference_pass), note))
        if self.memory.host:
            lines += [f"{unit} a process in host memory", _line("  shards", amount(self.memory.host))]
        if self.memory.pinned:
            lines += [f"{unit} a process in pinned host memory", _line("  layers' inputs", amount(self.memory.pinned))]
        lines.append(f"{unit} on the disk")
        if self.num_checkpoints:
            each = f"{self.num_checkpoints} of {amount(self.checkpoint).strip()}"
            lines.append(_line("  checkpoints", amount(self.num_checkpoints * self.checkpoint), each))
        lines += [_line("  export", amount(self.export)), "", ASSUMED]
        if self.fits is not None:
            lines += ["", f"It {'fits' if self.fits else 'does not fit'}: {self.of_memory()}."]
        return "\n".join(lines)

    def of_memory(self) -> str:
        """Returns how much of a device's memory it takes, in words."""
        return f"{self.peak / GIB:.2f} of {self.run.gpu_memory:.4g} GiB a device"

    def size(self) -> str:
        """Returns how much a device holds at its fullest, with the unit."""
        return f"{self.peak / GIB:,.2f} GiB" if self.peak >= GIB else f"{self.peak / GIB * 1024:,.2f} MiB"

    def devices(self) -> str:
        """Returns what it runs on, in words."""
        kind = "GPU" if self.device == "cuda" else "CPU"
        memory = f" of {self.run.gpu_memory:.4g} GiB" if self.run.gpu_memory else ""
        return f"{self.run.gpus} {kind}{'s' * (self.run.gpus > 1)}{memory}"

    def _steps(self) -> str:
        if self.streams:
            return f"{self.num_steps:,}, of a stream"
        if self.num_rows is None:
            known = "" if self.num_steps is None else f"at most {self.num_steps:,}; "
            return f"{known}unknown: the data set is not here"
        return f"{self.num_steps:,}, if all {self.num_rows:,} rows become pairs"


def _line(title: str, text: str, note: str = "") -> str:
    return f"{title:<24}{text}{'   ' * bool(note)}{note}"


ReadRecipe = Callable[[str], tuple[str, dict]]  # a recipe's name -> its METHOD and DEFAULTS


def plan(run: Run, read_recipe: ReadRecipe) -> Plan:
    """Returns what the run takes.

    Raises:
        UserError: The config is refused, or devices that this recipe cannot use.
    """
    method, defaults = read_recipe(run.recipe)
    cfg = load(method, defaults, list(run.config_paths), list(run.overrides))
    if run.gpus > 1 and not is_distributed(defaults):
        raise UserError(f"--gpus {run.gpus}: {run.recipe} runs on one device; nearest valid: a distributed recipe")
    return plan_config(cfg, method, run)


def is_distributed(defaults: dict) -> bool:
    """Returns whether a recipe with these DEFAULTS runs on several devices."""
    return "data_parallel_replicate_dim" in defaults


def on_devices(run: Run, read_recipe: ReadRecipe, *, gpus: int | None, gpu_memory: float | None) -> Run:
    """Returns the run on these GPUs, or, where they are not told, on those that are visible; on one if none is."""
    method, defaults = read_recipe(run.recipe)
    on_cpu = load(method, defaults, list(run.config_paths), list(run.overrides)).device == "cpu"
    visible = torch.cuda.device_count() if torch.cuda.is_available() and not on_cpu else 0
    if gpus is None:
        gpus = max(1, visible) if is_distributed(defaults) else 1
    if gpu_memory is None and visible:
        gpu_memory = torch.cuda.get_device_properties(0).total_memory / GIB
    return replace(run, gpus=gpus, gpu_memory=gpu_memory)


def plan_config(cfg: DictConfig, method: str, run: Run) -> Plan:
    """Returns what a run with this resolved config takes."""
    num_shards = _num_shards(run.gpus, cfg.get("data_parallel_replicate_dim", 1))
    setting = Setting(
        device="cpu" if cfg.device == "cpu" else "cuda",
        num_shards=num_shards,
        cpu_offload=cfg.get("fsdp_cpu_offload", False),
        processes=run.gpus,
    )
    loss_fn, reference = instantiate(cfg.loss), cfg.get("reference") or {"name": KNOWN[method][0]}
    check_reference(reference, loss_fn, method, dtype=cfg.dtype, has_adapter=cfg.get("adapter") is not None)
    policy, second = build(
        method,
        cfg.model,
        reference=reference if needs(loss_fn).reference else {"name": "none"},
        lora=cfg.get("lora"),
        dtype=cfg.dtype,
        base_dtype=cfg.get("base_dtype", "nf4"),
        max_length=cfg.max_length,
        dropout=not cfg.disable_dropout,
        setting=setting,
        num_processes=run.gpus,
        base_config=_config_of(cfg.checkpointer.checkpoint_dir, cfg.model),
        in_fp8=cfg.get("enable_fp8_training", False),
    )
    prompt, answer = worst_pair(cfg.max_length, cfg.max_prompt_length, cfg.get("max_completion_length"))
    max_tokens = prompt + 2 * answer
    live, passing = (None, second) if reference["name"] == "cached" else (second, None)
    num_parameters, num_trained = models.num_parameters(policy)
    num_rows, num_steps = _rows_and_steps(cfg)
    optimizer = OmegaConf.to_container(cfg.optimizer)
    row_length = math.ceil(max_tokens / ROW_MULTIPLE) * ROW_MULTIPLE
    work = choosing.Work(uniform_pair(prompt, answer), row_length, cfg.pairs_per_step, num_steps=num_steps)
    memory = None if run.gpu_memory is None else round(run.gpu_memory * GIB)
    chosen = choosing.choose({key: cfg[key] for key in choosing.KEYS}, work, policy, live, optimizer, setting, memory)
    batch_size = min(chosen.batch_size, math.ceil(cfg.pairs_per_step / run.gpus))
    micro_batches = math.ceil(cfg.pairs_per_step / (batch_size * run.gpus))
    setting = replace(setting, micro_batches=micro_batches, execution=chosen.execution)
    times = 1 if chosen.is_packed else BATCHES
    batch, larger = (uniform_batch(n * batch_size, prompt, answer, chosen.row_length) for n in (1, times))
    return Plan(
        run=run,
        chosen=chosen,
        memory=step_memory(policy, live, batch, optimizer, setting),
        reference_pass=pass_memory(passing, larger, setting) if passing else 0,
        device=setting.device,
        dtype=cfg.dtype,
        model=cfg.model._component_,
        num_parameters=num_parameters,
        num_trained=num_trained,
        pairs_per_step=cfg.pairs_per_step,
        batch_size=batch_size,
        micro_batches=micro_batches,
        max_tokens=max_tokens,
        num_rows=num_rows,
        num_steps=num_steps,
        streams=bool(cfg.dataset.get("streaming")),
        export=num_parameters * policy.tok_embeddings.weight.element_size(),  # NF4 weights are exported in full
        num_checkpoints=_num_checkpoints(cfg.get("keep_last_n", 0), cfg.get("keep_best")),
    )


def build(
    method: str,
    component: dict,
    *,
    dtype: str,
    base_dtype: str = "nf4",
    max_length: int,
    lora: dict | None = None,
    dropout: bool = False,
    setting: Setting,
    num_processes: int = 1,
    reference: Mapping | None = None,
    base_config: dict | None = None,
    in_fp8: bool = False,
):
    """Returns a recipe's policy and its second model or None, on the meta device.

    Args:
        reference: The config's block; None: the method's default.
        base_config: The base folder's config.json, where it is here: it tells of sliding windows, which take masks.
        in_fp8: The config's enable_fp8_training.
    """
    reference, second = reference or {"name": KNOWN[method][0]}, None
    processes = SimpleNamespace(num_shards=setting.num_shards, shards=setting.shards, size=num_processes)
    frozen_copy = reference["name"] in ("start", "sync")
    settings = {"dtype": dtype, "base_dtype": base_dtype, "frozen_copy": frozen_copy, "world": processes}
    policy = models.policy(method, component, lora, **settings)
    if has_second_model(reference, method, dtype):
        second = frozen_model(reference, method, component=component, dtype=dtype, world=processes)
    if not dropout:
        models.disable_dropout(policy)
    _fit(policy, base_config or {}, max_length)
    if in_fp8:
        models.convert_to_fp8(policy, torch.device(setting.device))
    if second is not None:
        folder, builder = reference.get("checkpoint_dir"), reference.get("model") or component
        _fit(second, _config_of(folder, builder) if folder else base_config or {}, max_length)
        if is_own(reference, method, dtype):
            fp8.convert_like(policy, second, torch.device(setting.device))
    return policy, second


def _fit(model, base_config: dict, max_length: int) -> None:
    models.fit(model, max_length=max_length, windows=windows_of(model, base_config))


def _config_of(folder: str, component: Mapping) -> dict:
    """Returns a folder's config.json; empty where it is not here."""
    return read_config(folder, component) if (Path(folder) / "config.json").is_file() else {}


def _num_shards(gpus: int, copies: int) -> int:
    if gpus % copies:
        raise UserError(f"data_parallel_replicate_dim={copies}: must divide the {gpus} processes")
    return gpus // copies


def _rows_and_steps(cfg: DictConfig) -> tuple[int | None, int | None]:
    num_rows = _num_rows(cfg.dataset)
    num_steps = count_steps(num_rows, cfg.pairs_per_step, cfg.epochs, cfg.max_steps) if num_rows else cfg.max_steps
    return num_rows, num_steps


def _num_rows(dataset: DictConfig) -> int | None:
    """Rows to train on in an epoch, of data sets that are here, and that are no stream."""
    is_known = dataset.source and not dataset.get("streaming")
    blocks = [block for _, block in sources_of(as_plain(dataset), "dataset")] if is_known else []
    if not blocks or not all(Path(block["source"]).expanduser().exists() for block in blocks):
        return None
    sizes = []
    for block in blocks:
        where = {name: block[name] for name in ("split", "name", "revision", "limit")}
        num_rows = len(read_rows(block["source"], **where, columns=block["columns"]))
        sizes.append(num_rows - round((dataset.val_fraction or 0) * num_rows))
    return sum(counts_of(sizes, blocks))


def _num_checkpoints(keep_last_n: int, keep_best: str | None) -> int:
    """Those that are kept, and one while it is written."""
    return keep_last_n + 1 + (keep_best is not None) if keep_last_n else 0


# What to change


@dataclass(frozen=True)
class Change:
    """One thing to do differently: another recipe, more GPUs, or other values."""

    words: str
    recipe: str | None = None
    gpus: int | None = None
    overrides: tuple[str, ...] = ()

    def of(self, run: Run) -> Run:
        """Returns the run with this change."""
        return replace(
            run,
            recipe=self.recipe or run.recipe,
            gpus=self.gpus or run.gpus,
            overrides=(*run.overrides, *self.overrides),
        )


def smallest_change(run: Run, read_recipe: ReadRecipe) -> tuple[list[Change], Plan] | None:
    """Returns what makes a run fit that does not, and the plan with it; None where nothing here does.

    Tried alone, in this order, each as little as is enough: fewer pairs at a time, a second model's values from a
    cache, activation checkpointing and offloading, all of a device's pairs at a time (then FSDP2 keeps no whole
    gradients), more GPUs, CPU offload, a second model in 4 bits, LoRA, QLoRA, shorter pairs. Where none is enough,
    several: what lowers the total is put together in the same order until it fits, and what turns out not to be needed
    is left out again.
    """
    knobs = _knobs(run, read_recipe)
    trials = _Trials(run, read_recipe)
    for knob in knobs:
        if change := _least(knob, lambda change: trials.fits([change])):
            return [change], trials.plan([change])
    chosen: dict[int, Change] = {}  # by the number of the knob
    for number, knob in enumerate(knobs):
        more = chosen | {number: knob[-1]}
        if trials.total(more.values()) < trials.total(chosen.values()):
            chosen = more
        if trials.fits(chosen.values()):
            break
    else:
        return None
    for number in reversed([*chosen]):  # the most harmful ones first
        others = {n: change for n, change in chosen.items() if n != number}
        chosen = others if trials.fits(others.values()) else chosen
    for number in reversed([*chosen]):
        chosen[number] = _least(knobs[number], lambda change, n=number: trials.fits((chosen | {n: change}).values()))
    return [*chosen.values()], trials.plan(chosen.values())


def advice(found: tuple[list[Change], Plan] | None) -> str:
    """Returns smallest_change's answer in words."""
    if found is None:
        return "Nothing that this command knows makes it fit: a smaller model does."
    changes, changed = found
    return f"It fits with {' '.join(change.words for change in changes)}: {changed.of_memory()}."


class _Trials:
    """Plans of a run with changes, each made once."""

    def __init__(self, run: Run, read_recipe: ReadRecipe):
        self._run, self._read_recipe = run, read_recipe
        self._plans: dict[tuple[Change, ...], Plan | None] = {}

    def plan(self, changes: Iterable[Change]) -> Plan | None:
        """Returns the plan of the run with these changes, None for a config that is refused."""
        key, run = tuple(changes), self._run
        if key not in self._plans:
            for change in key:
                run = change.of(run)
            try:
                self._plans[key] = plan(run, self._read_recipe)
            except UserError:
                self._plans[key] = None
        return self._plans[key]

    def fits(self, changes: Iterable[Change]) -> bool:
        found = self.plan(changes)
        return found is not None and found.fits

    def total(self, changes: Iterable[Change]) -> float:
        """Returns the bytes a device."""
        found = self.plan(changes)
        return math.inf if found is None else found.peak


def _least(knob: list[Change], fits: Callable[[Change], bool]) -> Change | None:
    """Returns the first change that fits; the last one, which changes most, is tried first."""
    if not fits(knob[-1]):
        return None
    return next(change for change in knob if fits(change))


def _knobs(run: Run, read_recipe: ReadRecipe) -> list[list[Change]]:
    """Each thing that can be changed, from a little to a lot; the least harmful thing first."""
    method, defaults = read_recipe(run.recipe)
    cfg = load(method, defaults, list(run.config_paths), list(run.overrides))
    distributed, pairs = is_distributed(defaults), cfg.pairs_per_step
    batch_size = pairs if cfg.batch_size == "auto" else cfg.batch_size
    fewer = [] if cfg.batch_size == "auto" else [n for n in range(batch_size - 1, 0, -1) if pairs % n == 0]
    knobs = [[_override(f"batch_size={n}") for n in fewer]]
    reference = cfg.get("reference") or {"name": KNOWN[method][0]}
    if reference["name"] == "model":
        knobs.append([_override("reference=cached")])
    again = ["enable_activation_checkpointing=true"] * (cfg.enable_activation_checkpointing in (False, "selective"))
    away = [] if cfg.enable_activation_offloading or cfg.device == "cpu" else ["enable_activation_offloading=true"]
    knobs.append([_override(*again)] * bool(again) + [_override(*again, *away)] * bool(away))
    if distributed:
        if pairs % run.gpus == 0 and pairs // run.gpus > batch_size:
            knobs.append([_override(f"batch_size={pairs // run.gpus}")])
        knobs.append([Change(f"--gpus {run.gpus * n}", gpus=run.gpus * n) for n in (2, 4, 8)])
        if not cfg.fsdp_cpu_offload:
            knobs.append([_override("fsdp_cpu_offload=true")])
    if reference["name"] != "sync" and has_second_model(reference, method, cfg.dtype):
        knobs.append([_override("reference.quantize=true")])
    for other in {"full": ("lora", "qlora"), "lora": ("qlora",), "qlora": ()}[method]:
        name = f"{other}_dpo_{'distributed' if distributed else 'single_device'}"
        knobs.append([Change(f"--recipe {name}", recipe=name)])
    lengths = {key: cfg.get(key) for key in ("max_length", "max_prompt_length", "max_completion_length")}
    knobs.append([_shorter(lengths, n) for n in (2, 4)])
    return [knob for knob in knobs if knob]


def _override(*overrides: str) -> Change:
    return Change(" ".join(overrides), overrides=overrides)


def _shorter(lengths: dict[str, int | None], times: int) -> Change:
    return _override(*(f"{key}={max(1, length // times)}" for key, length in lengths.items() if length))
