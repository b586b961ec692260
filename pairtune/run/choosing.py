"""What a config leaves to `auto`: attention, compiler, what backward computes again, and how many pairs at a time.

None of them changes a result. They are chosen by what memory.py counts for this device, for the fastest step that fits,
the same in every process.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torchtune.modules import MultiHeadAttention

from pairtune import models
from pairtune.config.checks import offloading_on_cpu
from pairtune.config.components import plain
from pairtune.errors import UserError
from pairtune.losses.calling import row_length
from pairtune.models import execution, fp8
from pairtune.models.bridge import BridgedDecoder
from pairtune.models.dora import DoRALinear
from pairtune.models.execution import SELECTIVE, Execution
from pairtune.models.experts import mixtures_of
from pairtune.models.frozen_base import is_held
from pairtune.pairs import packing
from pairtune.pairs.at_once import document_lengths, longest_row
from pairtune.pairs.batch import ROW_MULTIPLE, document_length, lay_out
from pairtune.process.dist import World
from pairtune.reference import Reference
from pairtune.run import starting_again
from pairtune.run.memory import Setting, step_memory

GIB = 2**30
USABLE = 0.9  # of a GPU; the rest is left to CUDA, NCCL and what the allocator cannot use
CHOSEN = ("attention", "compile", "enable_activation_checkpointing", "batch_size")
KEYS = (*CHOSEN, "enable_activation_offloading")  # and what choices go by

# Tokens that matrix products take at a time: with fewer than ENOUGH of them they are slower, with more than PLENTY no
# faster (docs/performance.md).
ENOUGH, PLENTY = 4096, 8192
# FLOPs of a run that are worth a minute of compiling: about two minutes of an H100 without.
WORTH_COMPILING = 2e16
ON_A_CPU = 4  # pairs at a time, where memory does not limit them


@dataclass(frozen=True)
class Work:
    """What a device has to do.

    Attributes:
        longest: The pair with most tokens.
        row_length: A multiple of 128 tokens that the longest pair fits in, see losses.calling.row_length.
        lengths: Tokens of each pair, in any order; empty: all are as long as the longest.
        pairs_per_step: Over all devices.
        num_steps: None: not known.
    """

    longest: Any
    row_length: int
    pairs_per_step: int
    lengths: Sequence[int] = ()
    num_steps: int | None = None


@dataclass(frozen=True)
class Chosen:
    """How a run computes.

    Attributes:
        execution: For models.execute.
        batch_size: Pairs at a time, of the longest.
        row_length: Of batch.lay_out: None, a row is as long as its pairs.
        is_packed: Whether a micro-batch is a row of this length, with as many pairs as it takes.
        reason: A sentence.
        has_smaller: Whether `auto` leaves a choice that holds less.
    """

    execution: Execution
    batch_size: int
    row_length: int | None
    is_packed: bool
    reason: str = ""
    has_smaller: bool = False

    @property
    def rows(self) -> int | None:
        """Of pairs.steps.share."""
        return self.row_length if self.is_packed else None

    @property
    def keys(self) -> dict[str, Any]:
        """The values of CHOSEN; and, where layers' inputs are offloaded, that they are."""
        how = self.execution
        values = how.attention, how.compile, how.checkpointing, self.batch_size
        return dict(zip(CHOSEN, values, strict=True)) | dict.fromkeys(KEYS[len(CHOSEN) :] * how.offloading, True)

    @property
    def told(self) -> str:
        """As on a command line."""
        return " ".join(f"{key}={str(value).lower()}" for key, value in self.keys.items())

    @property
    def note(self) -> dict[str, Any]:
        """What `choose` needs of this choice when it has run out of memory."""
        how = self.execution.checkpointing
        return {"checkpointing": how, "pairs": self.batch_size, "row": self.row_length, "told": self.told}


def check(attention: str, compiled: bool | str, checkpointing: bool | str) -> None:
    """Refuses what models.execute would, where it is not left to auto.

    Raises:
        UserError: See models.execution.check.
    """
    if compiled != "auto":
        execution.check(attention, compiled, checkpointing)


def choose(
    asked: dict[str, Any],
    work: Work,
    policy: nn.Module,
    second: nn.Module | None,
    optimizer: dict,
    setting: Setting,
    memory: int | None,
    ran_out: dict[str, Any] | None = None,
) -> Chosen:
    """Returns what was asked for, with a value in the place of each `auto`.

    Args:
        asked: By KEYS.
        policy, second: On the meta device, from models.fit.
        optimizer: The config's block.
        setting: The devices.
        memory: Bytes of each; None: not known, as on a CPU.
        ran_out: A choice that did not fit, as Chosen.note, and its `way_out`: one that holds less is wanted.

    Raises:
        UserError: Two of the values do not go together; nothing holds less than what ran out of memory.
    """
    compiled, on_gpu = asked["compile"], setting.device == "cuda"
    if compiled == "auto":
        compiled = on_gpu and asked["attention"] not in ("segments", "varlen") and _is_worth_compiling(policy, work)
    offloads = asked["enable_activation_offloading"] is True
    how = Execution(_attention(asked["attention"], compiled, on_gpu, policy), compiled, offloading=offloads)
    fixed, level = asked["batch_size"], asked["enable_activation_checkpointing"]
    if offloads and not on_gpu:
        raise offloading_on_cpu()
    level = True if offloads else level
    execution.check(how.attention, how.compile, level)
    levels = (False, *[SELECTIVE] * how.compile, True) if level == "auto" else (level,)
    trial = _Trial(work, policy, second, optimizer, setting, memory)
    if ran_out:
        how, rows = _smaller(ran_out, how, levels, fixed, trial)
    elif not on_gpu or memory is None:
        how = replace(how, checkpointing=on_gpu if level == "auto" else level)
        rows, trial = ON_A_CPU if fixed == "auto" else fixed, None
    else:
        for level in levels:
            how = replace(how, checkpointing=level)
            rows = trial.most_rows(how) if fixed == "auto" else fixed
            if trial.fits(how, rows) if fixed != "auto" else rows and trial.is_enough(rows):
                break
    chosen = _of(how, work, max(1, rows), setting, trial)
    has_smaller = fixed == "auto" and chosen.batch_size > 1 or how.checkpointing != levels[-1]
    reason = f"{chosen.reason}; {ran_out['told']} ran out of memory" if ran_out else chosen.reason
    return replace(chosen, has_smaller=has_smaller, reason=reason)


def _smaller(
    ran_out: dict[str, Any], how: Execution, levels: Sequence[bool | str], fixed: int | str, trial: "_Trial"
) -> tuple[Execution, int]:
    """Returns the next smaller choice, and its pairs at a time.

    Half as many pairs, as long as matrix products have enough tokens; then more is computed again in backward.
    """
    at, pairs = ran_out["checkpointing"], ran_out["pairs"]
    trial.must_be_below(replace(how, checkpointing=at), pairs, ran_out["row"])
    for level in levels[levels.index(at) :]:
        how = replace(how, checkpointing=level)
        if fixed != "auto":
            if level != at and trial.fits(how, fixed):
                return how, fixed
            continue
        most = trial.most_rows(how)
        rows = min(most, pairs // 2) if level == at else most
        if rows and (level == levels[-1] or trial.is_enough(rows)):
            return how, rows
    raise UserError(ran_out["way_out"])


def _is_worth_compiling(policy: nn.Module, work: Work) -> bool:
    # How many tokens an expert gets changes with every batch; a compiled DoRA layer would keep its base's values.
    if isinstance(policy, BridgedDecoder):
        return False
    if mixtures_of(policy) or any(isinstance(m, DoRALinear) and is_held(m.weight) for m in policy.modules()):
        return False
    if work.num_steps is None:
        return True
    tokens = work.num_steps * work.pairs_per_step * _mean(work)
    return 6 * models.num_parameters(policy)[0] * tokens > WORTH_COMPILING


def _mean(work: Work) -> float:
    return sum(work.lengths) / len(work.lengths) if work.lengths else work.row_length


def _attention(asked: str, compiled: bool, on_gpu: bool, policy: nn.Module) -> str:
    if asked != "auto":
        return asked
    if isinstance(policy, BridgedDecoder):
        return "mask" if compiled else "segments"
    layers = [m for m in policy.modules() if isinstance(m, MultiHeadAttention)]
    if compiled:
        has_kernel = all(layer.head_dim >= 16 and not layer.attn_dropout for layer in layers)
        return "flex" if on_gpu and has_kernel else "mask"
    plain = all(m._attention_call.softcap is None and m.head_dim <= 256 and not m.attn_dropout for m in layers)
    return "varlen" if on_gpu and plain and models.dtype_of(policy) == "bf16" else "segments"


def _of(how: Execution, work: Work, batch_size: int, setting: Setting, trial: "_Trial | None" = None) -> Chosen:
    per_device = -(-work.pairs_per_step // setting.processes)
    if how.attention == "flex":
        length = _least_padding(min(batch_size, per_device) * work.row_length, work, setting.processes)
        batch_size = length // work.row_length
        return Chosen(how, batch_size, length, True, trial.told(how, batch_size, length) if trial else "")
    batch_size = next(n for n in range(min(batch_size, per_device), 0, -1) if work.pairs_per_step % n == 0)
    length = work.row_length if how.attention == "mask" else None
    return Chosen(how, batch_size, length, False, trial.told(how, batch_size, None) if trial else "")


def _least_padding(most: int, work: Work, processes: int) -> int:
    """Returns the length of rows, at most `most`, by which steps are padded least: whole steps fill whole rows."""
    if not work.lengths:
        return most
    size = work.pairs_per_step
    steps = [work.lengths[i : i + size] for i in range(0, min(len(work.lengths), 32 * size), size)]
    shortest = max(work.row_length, most // 2)
    candidates = range(-(-shortest // ROW_MULTIPLE) * ROW_MULTIPLE, most + 1, ROW_MULTIPLE * max(1, most // 4096))

    def computed(length: int) -> int:  # a row costs some time besides its tokens', as much as a few of them
        rows = sum(len(packing.pack(step, length, processes)) for step in steps)
        return rows * (length + ROW_MULTIPLE)

    return min([*candidates, most], key=computed)


class _Trial:
    """What steps with more or fewer pairs take of a device's memory."""

    def __init__(self, work: Work, policy, second, optimizer: dict, setting: Setting, memory: int | None):
        self._work, self._models, self._optimizer = work, (policy, second), optimizer
        self._setting, self._total = setting, memory
        self._memory = USABLE * memory if memory else math.inf
        tokens = _mean(work) * work.pairs_per_step / setting.processes  # of a step
        on_cpu = setting.device == "cpu"
        self._enough = 0 if on_cpu else min(ENOUGH, tokens)
        plenty = ON_A_CPU if on_cpu else PLENTY // work.row_length
        self._most = max(1, min(plenty, -(-int(tokens) // work.row_length)))
        self._known: dict[tuple[Execution, int, int | None], int] = {}

    def bytes(self, how: Execution, pairs: int, length: int | None = None) -> int:
        """Of a step with so many of the longest pairs at a time, in rows of this length, where rows have one."""
        length = length or {"flex": pairs * self._work.row_length, "mask": self._work.row_length}.get(how.attention)
        if (how, pairs, length) not in self._known:
            batch = lay_out([self._work.longest] * pairs, length)
            times = -(-self._work.pairs_per_step // (pairs * self._setting.processes))
            setting = replace(self._setting, execution=how, micro_batches=times)
            self._known[how, pairs, length] = step_memory(*self._models, batch, self._optimizer, setting).total
        return self._known[how, pairs, length]

    def fits(self, how: Execution, pairs: int) -> bool:
        return self.bytes(how, pairs) <= self._memory

    def is_enough(self, pairs: int) -> bool:
        """Whether so many of the longest pairs keep matrix products busy."""
        return pairs * self._work.row_length >= self._enough

    def must_be_below(self, how: Execution, pairs: int, length: int | None) -> None:
        """Lets nothing fit any more that holds as much as this."""
        self._memory = min(self._memory, self.bytes(how, pairs, length) - 1)

    def most_rows(self, how: Execution) -> int:
        """Returns the most pairs that fit and are of use; 0 if not even one fits."""
        if self._most == 1 or not self.fits(how, 1):
            return int(self.fits(how, 1))
        one, two = self.bytes(how, 1), self.bytes(how, 2)
        pairs = min(self._most, 1 + int((self._memory - one) / max(1, two - one)))
        while pairs > 1 and not self.fits(how, pairs):
            pairs -= 1
        return pairs

    def told(self, how: Execution, pairs: int, length: int | None) -> str:
        rows = f" in rows of {length:,} tokens" if length else ""
        takes = f"{self.bytes(how, pairs, length) / GIB:.1f}"
        if self._total:
            takes += f" of {self._total / GIB:.1f}"
        fits = not self._total or self.bytes(how, pairs) <= USABLE * self._total
        return f"{takes} GiB{rows}" if fits else f"{takes} GiB, more than fits: `tune plan` says what to change"


def work(pairs: list, loss_fn: Callable, max_length: int, pairs_per_step: int, num_steps: int) -> Work:
    """Returns what a run has to do.

    Args:
        pairs: All that it looks at; of a stream, some.
        loss_fn, max_length: As for losses.calling.row_length.
    """
    lengths, length = document_lengths(pairs), row_length(loss_fn, pairs, max_length)
    longest = pairs[int(lengths.argmax())]
    if stream := getattr(pairs, "stream", None):  # whatever it may bring
        longest = max(longest, stream.longest, key=document_length)
        length = max(length, longest_row([longest]))
    return Work(longest, length, pairs_per_step, lengths.tolist(), num_steps)


def choose_and_execute(
    asked: dict[str, Any], work: Work, policy: nn.Module, reference: Reference, optimizer: dict, world: World
) -> Chosen:
    """Returns what `choose` does for this run's device, says it, and makes the models compute so.

    Raises:
        UserError: As `choose`.
    """
    setting, memory, ran_out = Setting.of(world), None, starting_again.take_note()
    if reference.second is not None and reference.is_start:
        fp8.convert_like(policy, reference.second, world.device)
    if setting.device == "cuda":
        memory = torch.cuda.get_device_properties(world.device).total_memory
    beside = reference.second if reference.second_stays else None
    chosen = world.agree(choose(asked, work, policy, beside, plain(optimizer), setting, memory, ran_out))
    for model in filter(None, (policy, reference.second)):
        models.execute(model, chosen.execution)
    if "auto" in asked.values() and chosen.reason:
        world.print(f"auto: {chosen.told}: {chosen.reason}\n")
    return chosen
