"""What must hold before the first update and at every one, so that no run trains on nonsense.

Each failure names its cause and a way out.
"""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.losses.calling import loss_at_start, needs, unchanged
from pairtune.models.experts import mixtures_of
from pairtune.pairs.tokenize import Pair

TOLERANCE = 0.01  # of losses and margins that are exact but for rounding, bf16 included


def check_pairs(pairs: list[Pair], tokenizer, *, score_end: bool = True, key: str = "dataset") -> None:
    """Refuses pairs that a model would learn nonsense from.

    Args:
        tokenizer: From tokenizer.adapt: knows `bos_id` and `end_ids`.
        score_end: As for batch.lay_out.

    Raises:
        UserError: A BOS that is doubled or that some prompts lack; no answer, or one that does not end in exactly one
            end token. Rows are named.
    """
    begun = [pair.prompt[:1] == [tokenizer.bos_id] for pair in pairs]
    for pair, has_bos in zip(pairs, begun, strict=True):
        if pair.prompt[:2] == [tokenizer.bos_id] * 2:
            raise UserError(
                f"{key}, row {pair.row}: begins with two BOS tokens; take one out of the text or the template"
            )
        if has_bos != begun[0]:
            some, other = (pairs[begun.index(value)].row for value in (True, False))
            raise UserError(
                f"{key}: row {some} begins with BOS, row {other} does not; a template that writes it for every "
                "conversation goes into tokenizer.chat_template"
            )
        if not (pair.chosen or pair.rejected):
            raise UserError(f"{key}, row {pair.row}: has no token of an answer; remove the row")
        for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            if not answer:  # of an unpaired row
                continue
            if len(answer) == 1 and not score_end:
                raise UserError(
                    f"{key}, row {pair.row}: {name} is its end token alone, which score_end=false does not score; "
                    "remove the row"
                )
            ends = [token in tokenizer.end_ids for token in answer[-2:]]
            if not ends[-1] or ends[:-1] == [True]:
                raise UserError(
                    f"{key}, row {pair.row}: {name} must end in exactly one end token, which is trained; its last "
                    f"tokens are {answer[-2:]}, end tokens are {sorted(tokenizer.end_ids)}. Look at the chat template"
                )


def check_loss(
    loss_fn: Callable, train: list[Pair], held_out: list[Pair], *, pairs_per_step: int, keep_best: str | None
) -> None:
    """Refuses a step or pairs that lack what the loss or the choice of the best checkpoint is computed from.

    Raises:
        UserError: KTO with one pair a step, or one prompt in all; a best accuracy or margin that unpaired rows do not
            have.
    """
    if "kl" in needs(loss_fn).inputs and pairs_per_step < 2:
        raise UserError(
            f"pairs_per_step={pairs_per_step}: KTO's baseline comes from the answers to a step's other prompts; "
            "nearest valid: pairs_per_step=2"
        )
    if "kl" in needs(loss_fn).inputs and all(pair.prompt == train[0].prompt for pair in train):
        raise UserError(
            "dataset: all rows have the same prompt, and KTO's baseline comes from the answers to other prompts; "
            "loss=sigmoid, on pairs, needs none"
        )
    has_pairs = any(pair.chosen and pair.rejected for pair in held_out)
    has_margin = has_pairs or (any(pair.chosen for pair in held_out) and any(pair.rejected for pair in held_out))
    if keep_best == "rewards/accuracies" and not has_pairs:
        raise UserError(
            "keep_best=rewards/accuracies: the held-out rows are unpaired, and accuracy compares the answers of a "
            f"pair; nearest valid: keep_best={'rewards/margins' if has_margin else 'loss'}"
        )
    if keep_best == "rewards/margins" and not has_margin:
        raise UserError(
            "keep_best=rewards/margins: the held-out rows have one label only, and a margin takes desirable and "
            "undesirable answers; nearest valid: keep_best=loss"
        )


def check_router(model: nn.Module, router_aux_loss_coef: float) -> None:
    """Refuses a router's loss for a model that has no router.

    Raises:
        UserError: As said.
    """
    if router_aux_loss_coef and not mixtures_of(model):
        raise UserError(
            f"router_aux_loss_coef={router_aux_loss_coef}: the model is no mixture of experts and has no router; "
            "nearest valid: router_aux_loss_coef=0"
        )


def check_trained(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuses a run that trains nothing.

    Raises:
        UserError: No trainable parameter, or one that the optimizer does not have.
    """
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    if not trained:
        raise UserError("model: has no trainable parameter; in a LoRA recipe, lora.modules says where adapters go")
    missing = trained - {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing:
        raise UserError(f"optimizer: does not have {len(missing)} of {len(trained)} trainable parameters")


def longest(pairs: list[Pair], count: int) -> list[Pair]:
    """Returns the `count` pairs with most tokens, longest first."""
    return sorted(pairs, key=_length, reverse=True)[:count]


def _length(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.chosen) + len(pair.rejected)


@contextmanager
def rehearsal(
    model: nn.Module, optimizer: Optimizer, loss_fn: Callable, pairs: list[Pair], world: World
) -> Iterator[None]:
    """Around a forward and backward that update nothing: optimizer, loss, gradients and generators are as before.

    The optimizer's state is there meanwhile, as it is in every later step, so that memory is, too.

    Raises:
        UserError: Out of memory; the pairs' rows and lengths are named.
    """
    made, groups = not optimizer.state, [_without_params(group) for group in optimizer.param_groups]
    generators = [world.device] if world.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=generators), unchanged(loss_fn):
            if made:
                _make_state(optimizer)
            yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        lengths = ", ".join(f"{_length(p):,}" for p in pairs)
        raise UserError(
            f"out of memory with the longest pairs (rows {', '.join(str(p.row) for p in pairs)}; tokens {lengths}). "
            f"Lower batch_size (it changes no result), set enable_activation_checkpointing=true, lower max_length, or "
            f"use a lora_ or qlora_ recipe; `tune plan` computes what fits. {str(error).splitlines()[0]}"
        ) from None
    finally:
        optimizer.zero_grad()
        if made:
            optimizer.state.clear()
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            group.update(before)  # some optimizers count steps there


def _make_state(optimizer: Optimizer) -> None:
    """A step of no gradient at no learning rate: it moves nothing and allocates what steps need."""
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()


def _without_params(group: dict) -> dict:
    return {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}


def check_start(
    losses: Tensor,
    means: dict[str, float],
    grad_norm: Tensor,
    *,
    pairs: list[Pair],
    loss_fn: Callable,
    is_reference: bool,
) -> None:
    """Refuses a first forward and backward that cannot be right.

    Args:
        losses: [P], of this process's pairs, before any update.
        means: Metrics over all processes, from metrics.Meter.
        grad_norm: Scalar, over all processes.
        pairs: The losses'.
        loss_fn: In torchtune's calling convention.
        is_reference: There is a reference, and it computes what the policy does now: before the first update, but for
            dropout.

    Raises:
        UserError: Policy and reference differ; the loss is not that of zero margins, which for DPO is ln 2; a gradient
            that is zero or not finite.
    """
    if not math.isfinite(float(grad_norm)):
        raise UserError(
            f"before the first update the gradient's norm is {float(grad_norm)}; weights that are not numbers, or a "
            "dtype that is too narrow: look at the checkpoint, and use dtype=fp32"
        )
    if is_reference:
        _check_is_reference(losses, means.get("rewards/margins", 0.0), pairs, loss_fn)
    if float(grad_norm) == 0 and (is_reference or means["loss"]):  # a loss that is 0 has reached what it is for
        raise UserError(
            "before the first update the gradient is zero: nothing would be learned. A loss that does not depend on "
            "the policy, or trained parameters that the answers do not depend on: look at loss and lora.modules"
        )


def _check_is_reference(losses: Tensor, margin: float, pairs: list[Pair], loss_fn: Callable) -> None:
    same = "since the policy is the reference. They are not one model: look at how they are built and loaded, and for "
    same += "dropout that is on"
    for pair, loss in zip(pairs, losses.tolist(), strict=True):
        expected = loss_at_start(loss_fn, has_chosen=bool(pair.chosen), has_rejected=bool(pair.rejected))
        if expected is not None and not abs(loss - expected) <= TOLERANCE * max(1.0, abs(expected)):
            raise UserError(
                f"before the first update the loss of row {pair.row} is {loss:.4f}; it must be {expected:.4f}, {same}"
            )
    if not abs(margin) <= TOLERANCE:
        raise UserError(f"before the first update the mean margin is {margin:+.4f}; it must be 0, {same}")


def check_step(step: int, losses: Tensor, grad_norm: Tensor, rows: list[int], world: World) -> None:
    """Refuses to update from numbers that are not finite. Every process has to call it.

    Args:
        losses: [P], this process's in this step.
        rows: Theirs.

    Raises:
        UserError: A loss or the gradient's norm is NaN or infinite; the step's rows are named, those that are to blame
            if it can be told.
    """
    total = world.sum(losses.detach().sum())
    if math.isfinite(float(total)) and math.isfinite(float(grad_norm)):
        return
    bad = [row for row, loss in zip(rows, losses.tolist(), strict=True) if not math.isfinite(loss)]
    bad, rows = sorted(world.gather(bad)), sorted(world.gather(rows))
    what = f"the loss of rows {bad}" if bad else f"the gradient's norm (rows of this step: {rows})"
    raise UserError(
        f"step {step}: {what} is not a finite number; no update was made, and the last checkpoint is as it was. Look "
        "at these rows, lower optimizer.lr, or use dtype=fp32; resume=true goes on from the last checkpoint"
    )
