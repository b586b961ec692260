"""Before the first update: the longest pairs go forward and backward, and show what does not fit or cannot be right.

What is checked survives any loss: policy and reference are one model, rewards are zero, gradients are finite and not
zero. The loss itself has a known value (ln 2 for DPO) only where the loop computes the config's loss.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pairtune import models
from pairtune.config.rules import one_line
from pairtune.errors import UserError
from pairtune.losses.calling import loss_at_start, loss_of, needs, unchanged
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import PairBatch, lay_out
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World
from pairtune.reference import Reference
from pairtune.reference.cache import TOLERANCE
from pairtune.run import starting_again
from pairtune.run.choosing import Chosen
from pairtune.run.metrics import Meter
from pairtune.run.optimizer_state import OptimizerState
from pairtune.run.optimizers import forget_state, groups_of, make_state, parts

EXACT = 1e-3  # nats: closer than this, policy and reference leave nothing to rounding
LOSS_TOLERANCE = 0.01  # of losses and rewards that are exact but for rounding
EDITED = "; in an edited copy of a recipe, look at what the loop passes to the loss and to meter.add_pairs"


def _length(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


@contextmanager
def step(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: Callable,
    pairs: list[Pair],
    world: World,
    how: Chosen | None = None,
) -> Iterator["DryStep"]:
    """Around a forward and backward that update nothing: optimizer, loss, gradients and generators are as before.

    The optimizer's state is there meanwhile, as it is in every later step, so that memory is, too. Where they run out
    of it, and `auto` has a smaller choice, the run is started again with that: see starting_again.py.

    Args:
        pairs: This process's.
        how: What the run computes with.

    Raises:
        UserError: Out of memory; the pairs' rows and lengths are named.
    """
    made, groups = not any(part.state for part in parts(optimizer)), copy.deepcopy(groups_of(optimizer))
    generators = [world.device] if world.device.type == "cuda" else []
    dry_step = DryStep(model, loss_fn, pairs, world)
    try:
        with torch.random.fork_rng(devices=generators), unchanged(loss_fn):
            if made:
                _make_state(model, optimizer, world)
            with _starting_again(how, pairs, world):
                yield dry_step
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(_way_out(pairs, error)) from None
    finally:
        dry_step.end()
        optimizer.zero_grad()
        if made:
            forget_state(optimizer)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)  # some optimizers count steps there


@contextmanager
def _starting_again(how: Chosen | None, pairs: list[Pair], world: World) -> Iterator[None]:
    """Around what a smaller choice takes less memory for."""
    if how is None or not how.has_smaller or not starting_again.is_possible():
        yield
        return
    with starting_again.rehearsal(world) as together:
        try:
            yield
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error) or together.is_over():
                raise
            print(f"{_ran_out(pairs)} at {how.told}: starting again with less", flush=True)
            together.start_again(how.note | {"way_out": _way_out(pairs, error)})


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _ran_out(pairs: list[Pair]) -> str:
    rows, lengths = ", ".join(str(p.row) for p in pairs), ", ".join(f"{_length(p):,}" for p in pairs)
    return f"out of memory with the longest pairs (rows {rows}; tokens {lengths})"


def _way_out(pairs: list[Pair], error: RuntimeError) -> str:
    return (
        f"{_ran_out(pairs)}. Lower batch_size (it changes no result), set enable_activation_checkpointing=true, lower "
        f"max_length, or use a lora_ or qlora_ recipe; `tune plan` computes what fits. {str(error).splitlines()[0]}"
    )


def _make_state(model: nn.Module, optimizer: Optimizer, world: World) -> None:
    try:
        make_state(optimizer)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if "can't allocate memory" in str(error):
            raise
        raise UserError(
            f"optimizer: {type(optimizer).__name__} cannot step on this model and device ({one_line(error)}); use "
            "another, such as torch.optim.AdamW"
        ) from error
    trained = {models.plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    OptimizerState(optimizer, trained, world).check()


class DryStep:
    """What the first forward and backward showed.

    Attributes:
        meter: For the loop to add to, as in a step.
    """

    def __init__(self, model: nn.Module, loss_fn: Callable, pairs: list[Pair], world: World):
        self.meter = Meter()
        self._model, self._loss_fn, self._pairs, self._world = model, loss_fn, pairs, world
        self._calls: list[tuple[list, Tensor]] = []  # of the config's loss: the reference's values, losses [P]
        is_module = isinstance(loss_fn, nn.Module)  # of a plain function it cannot be seen that it is called
        self._hook = loss_fn.register_forward_hook(self._note, with_kwargs=True) if is_module else None

    def _note(self, module: nn.Module, arguments: tuple, named: dict, values: tuple) -> None:
        by_name = [named[name] for name in ("reference_chosen_logps", "reference_rejected_logps") if name in named]
        self._calls.append(([*arguments[2:4], *by_name], values[0].detach()))

    def end(self) -> None:
        """Stops looking at the loss."""
        if self._hook:
            self._hook.remove()

    def check(self, losses: Tensor, batch: PairBatch, reference: Reference, *, dropout: bool) -> None:
        """Refuses a start that cannot be right. Every process has to call it, after its backward.

        Args:
            losses: [P], as the loop computed them, before any update.
            batch: The pairs.
            reference: The run's.
            dropout: Whether the policy has some: then it is not the reference.

        Raises:
            UserError: A gradient that is zero or not finite; policy and reference differ; rewards that are not zero; a
                loss that is not that of zero rewards, which for DPO is ln 2, where the loop computes the config's loss.
        """
        grad_norm, means = float(models.clip_gradients(self._model, None)), self.meter.read(self._world)
        _check_finite(grad_norm)
        is_start = reference.is_start and not dropout
        if is_start:
            loop_asks = reference.was_asked
            policy, base = self._logps(batch), reference.logps(batch)
            exact = self._check_one_model(policy, base, reference)
            if self._model.pairtune.is_compiled:
                policy = self._logps(batch, as_in_training=True)
            if loop_asks and exact and self._passes_on(base):
                self._check_rewards(means, policy, base)
                self._check_losses(losses, policy, base)
            elif loop_asks and not exact:
                self._world.print("policy and reference agree to rounding: that rewards start at zero is not checked\n")
            elif not loop_asks:
                self._world.print("the loop does not ask `reference`: that rewards start at zero is not checked\n")
                is_start = False
        if grad_norm == 0 and (is_start or means.get("loss")):  # a loss that is 0 has reached what it is for
            raise UserError(
                "before the first update the gradient is zero: nothing would be learned. A loss that does not depend "
                f"on the policy, or trained parameters that the answers do not depend on: look at loss and lora.modules"
                f"{EDITED}"
            )

    def _logps(self, batch: PairBatch, *, as_in_training: bool = False) -> tuple[Tensor, Tensor]:
        """Those of the policy; as the loop has them, where what is compiled rounds in another way with gradients."""
        ld_alpha = needs(self._loss_fn).ld_alpha
        if as_in_training:
            return tuple(logps.detach() for logps in answer_logps(self._model, batch, ld_alpha))
        with models.frozen(self._model):
            return answer_logps(self._model, batch, ld_alpha)

    def _check_one_model(self, policy: tuple, base: tuple, reference: Reference) -> bool:
        """Compares log-probabilities of policy and reference; returns whether they leave nothing to rounding.

        Where layers are compiled, the two are also compared without a compiler, which would round them differently.
        """
        absolute, relative = TOLERANCE[str(models.DTYPES[models.dtype_of(self._model)])]
        furthest = self._compare(policy, base, absolute, relative)
        if furthest > EXACT and self._model.pairtune.is_compiled and reference.computes:
            some = lay_out(self._pairs[:1]).to(self._world.device)
            with models.plainly(*filter(None, (self._model, reference.second))):
                furthest = self._compare(self._logps(some), reference.logps(some), absolute, relative)
        return furthest <= EXACT

    def _compare(self, policy: tuple, reference: tuple, absolute: float, relative: float) -> float:
        """Returns the largest difference, in nats, of all processes.

        Raises:
            UserError: One is larger than rounding makes it.
        """
        differences = []
        for name, ours, theirs in zip(("chosen", "rejected"), policy, reference, strict=True):
            for pair, logp, base in zip(self._pairs, ours.tolist(), theirs.tolist(), strict=False):
                differences.append(abs(logp - base))
                if not differences[-1] <= absolute + relative * abs(base):
                    raise UserError(
                        f"before the first update the policy gives the {name} answer of row {pair.row} a "
                        f"log-probability of {logp:.3f}, the reference {base:.3f}. They must be one model, and the "
                        "dtype rounds by less: look at how they are built and loaded, and for dropout that is on"
                    )
        return max(self._world.gather(differences), default=0.0)

    def _passes_on(self, ours: tuple[Tensor, Tensor]) -> bool:
        """Whether the loop calls the config's loss, if at all, with the reference's own values, not a user's."""
        given = self._calls[-1][0] if self._calls else ours
        pairs = zip(given, ours, strict=False)
        same = len(given) == 2 and all(
            a is not None and a.shape == b.shape and torch.allclose(a, b, atol=EXACT) for a, b in pairs
        )
        return not self._world.max_number(int(not same))

    def _check_losses(self, losses: Tensor, policy: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> None:
        if not any(torch.equal(values, losses.detach()) for _, values in self._calls):
            return  # an edited loop: its loss is not the config's, and its value here is not known
        for i, (pair, loss) in enumerate(zip(self._pairs, losses.tolist(), strict=True)):
            margin = getattr(pair, "margin", 0.0)
            has = {"has_chosen": bool(pair.chosen), "has_rejected": bool(pair.rejected), "margin": margin}
            expected = loss_at_start(self._loss_fn, **has)
            if expected is None:
                continue
            allowed = LOSS_TOLERANCE * max(1.0, abs(expected))
            if not abs(loss - expected) <= allowed:
                rounded = loss_of(self._loss_fn, *(logps[i : i + 1] for logps in (*policy, *base)), margin=margin)
                allowed += 2 * abs(rounded - expected)
            if not abs(loss - expected) <= allowed:
                raise UserError(
                    f"before the first update the loss of row {pair.row} is {loss:.4f}; it must be {expected:.4f}, "
                    f"since the policy is the reference{EDITED}"
                )

    def _check_rewards(self, means: dict, policy: tuple[Tensor, Tensor], base: tuple[Tensor, Tensor]) -> None:
        apart = max((float((p - b).abs().max()) for p, b in zip(policy, base, strict=True) if len(p)), default=0.0)
        allowed = LOSS_TOLERANCE + max(self._world.gather([apart]))  # of nats, times beta, which is below 1
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
            if not abs(means.get(name, 0.0)) <= allowed:
                raise UserError(
                    f"before the first update the mean of {name} is {means[name]:+.4f}; it must be 0, since the policy "
                    f"is the reference, as their log-probabilities show{EDITED}"
                )


def _check_finite(grad_norm: float) -> None:
    if not math.isfinite(grad_norm):
        raise UserError(
            f"before the first update the gradient's norm is {grad_norm}; weights that are not numbers, or a dtype "
            "that is too narrow: look at the checkpoint, and use dtype=fp32"
        )
