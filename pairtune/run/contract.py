"""What must hold before the first update and at every one, so that no run trains on nonsense.

Each failure names its cause and a way out.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pairtune.config.rules import set_and_metric
from pairtune.errors import UserError
from pairtune.losses.calling import check_takes, needs
from pairtune.models.experts import mixtures_of
from pairtune.pairs.at_once import lengths_of, sets_of, tokens_at
from pairtune.pairs.digests import NUMBERS, numbers_of
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World
from pairtune.run.metrics import RunLog
from pairtune.run.optimizers import parameters_of

NONE = -2  # stands for no token
TOLERANCE = 0.01  # of losses and margins that are exact but for rounding, bf16 included


def check_pairs(pairs: list[Pair], tokenizer, *, score_end: bool = True, key: str = "dataset") -> None:
    """Refuses pairs that a model would learn nonsense from; those of a stream as they come, too.

    Args:
        tokenizer: From tokenizer.adapt: knows `bos_id` and `end_ids`.
        score_end: As for batch.lay_out.

    Raises:
        UserError: A BOS that is doubled or that some prompts lack; no answer, or one that does not end in exactly one
            end token. Rows are named.
    """
    first, second = (tokens_at(pairs, "prompt", n) for n in (0, 1))
    has_bos = first == (NONE if tokenizer.bos_id is None else tokenizer.bos_id)
    lengths, doubtful = lengths_of(pairs), has_bos & (second == first) | (has_bos != has_bos[:1])
    doubtful |= (lengths[1:] == 0).all(0)
    for n, name in enumerate(("chosen", "rejected"), 1):
        ends, before = (np.isin(tokens_at(pairs, name, at), list(tokenizer.end_ids)) for at in (-1, -2))
        doubtful |= (lengths[n] > 0) & (~ends | before | ((lengths[n] == 1) & (not score_end)))
    for i in np.flatnonzero(doubtful):
        if has_bos[i] != has_bos[0] and first[i] != second[i]:
            some, other = (pairs[int(np.flatnonzero(has_bos == value)[0])].row for value in (True, False))
            raise UserError(
                f"{key}: row {some} begins with BOS, row {other} does not; a template that writes it for every "
                "conversation goes into tokenizer.chat_template"
            )
        _check_pair(pairs[int(i)], tokenizer, score_end=score_end, key=key)
    if stream := getattr(pairs, "stream", None):
        first = pairs[:1]
        stream.checks.append(lambda step: check_pairs([*first, *step], tokenizer, score_end=score_end, key=key))


def _check_pair(pair: Pair, tokenizer, *, score_end: bool, key: str) -> None:
    where = f"{key}, row {pair.row}"
    if pair.prompt[:2] == [tokenizer.bos_id] * 2:
        raise UserError(f"{where}: begins with two BOS tokens; take one out of the text or the template")
    if not (pair.chosen or pair.rejected):
        raise UserError(f"{where}: has no token of an answer; remove the row")
    for name, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not answer:  # of an unpaired row
            continue
        if len(answer) == 1 and not score_end:
            raise UserError(
                f"{where}: {name} is its end token alone, which score_end=false does not score; remove the row"
            )
        ends = [token in tokenizer.end_ids for token in answer[-2:]]
        if not ends[-1] or ends[:-1] == [True]:
            raise UserError(
                f"{where}: {name} must end in exactly one end token, which is trained; its last tokens are "
                f"{answer[-2:]}, end tokens are {sorted(tokenizer.end_ids)}. Look at the chat template"
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
    for where, pairs in (("dataset", train), ("eval_dataset", held_out)):
        stream = getattr(pairs, "stream", None)  # whose columns say what may come
        has = stream.numbers if stream else [n for n, usual in NUMBERS.items() if (numbers_of(pairs, n) != usual).any()]
        check_takes(loss_fn, has, where)
    name, metric = set_and_metric(keep_best or "")
    has_answers = lengths_of(sets_of(held_out)[name] if name else held_out)[1:] > 0  # [2, N]
    has_pairs, has_margin = has_answers.all(0).any(), has_answers.any(1).all()
    prefix = f"{name}/" if name else ""
    if metric == "rewards/accuracies" and not has_pairs:
        raise UserError(
            f"keep_best={keep_best}: the held-out rows are unpaired, and accuracy compares the answers of a "
            f"pair; nearest valid: keep_best={prefix}{'rewards/margins' if has_margin else 'loss'}"
        )
    if metric == "rewards/margins" and not has_margin:
        raise UserError(
            f"keep_best={keep_best}: the held-out rows have one label only, and a margin takes desirable and "
            f"undesirable answers; nearest valid: keep_best={prefix}loss"
        )


def check_router(model: nn.Module, router_aux_loss_coef: float) -> None:
    """Refuses a router's loss for a model that has no router, or one that is kept even by a bias.

    Raises:
        UserError: As said.
    """
    if router_aux_loss_coef and not mixtures_of(model):
        raise UserError(
            f"router_aux_loss_coef={router_aux_loss_coef}: the model has no router that this loss keeps even; "
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
    missing = trained - {id(p) for p in parameters_of(optimizer)}
    if missing:
        raise UserError(f"optimizer: does not have {len(missing)} of {len(trained)} trainable parameters")


def check_finite(
    step: int,
    losses: list[Tensor],
    grad_norm: Tensor,
    micro: list[list[Pair]],
    world: World,
    log: RunLog | None = None,
) -> None:
    """Refuses to update from numbers that are not finite. Every process has to call it.

    Args:
        losses: [P], one a micro-batch of this process's in this step.
        micro: The micro-batches.
        log: Is told, so that the run's folder says how it ended.

    Raises:
        UserError: A loss or the gradient's norm is NaN or infinite; the step's rows are named, those that are to blame
            if it can be told.
    """
    losses, rows = torch.cat(losses).detach(), [pair.row for pairs in micro for pair in pairs]
    total = world.sum(losses.sum())
    if math.isfinite(float(total)) and math.isfinite(float(grad_norm)):
        return
    bad = [row for row, loss in zip(rows, losses.tolist(), strict=True) if not math.isfinite(loss)]
    bad, rows = sorted(world.gather(bad)), sorted(world.gather(rows))
    if log:
        log.fail(step)
    what = f"the loss of rows {bad}" if bad else f"the gradient's norm (rows of this step: {rows})"
    raise UserError(
        f"step {step}: {what} is not a finite number; no update was made, and the last checkpoint is as it was. Look "
        "at these rows, lower optimizer.lr, or use dtype=fp32; resume=true goes on from the last checkpoint"
    )
