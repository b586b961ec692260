"""Learning-rate schedules whose warm-up starts above zero: no step is spent without an update.

Each is called as torchtune's are, `schedule(optimizer, num_training_steps=..., last_epoch=...)`, and either can be
named as `lr_scheduler._component_`; so can torchtune's own get_cosine_schedule_with_warmup.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pairtune.errors import UserError
from pairtune.pairs.steps import exactly


def cosine(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Returns a schedule that warms up linearly to lr and falls on a half cosine to `min_ratio` * lr.

    Step s (from 0) of W warm-up steps runs at lr * (s + 1) / (W + 1); step W is the first at the full lr.

    Args:
        num_training_steps: Steps of the whole run.
        num_warmup_steps: W, in steps; or give `warmup_ratio`, a share of `num_training_steps` (rounded up).
        min_ratio: What is left of lr after the last step, as a share.

    Raises:
        UserError: Both warm-up arguments, or one out of range.
    """
    return _with_warmup(
        optimizer,
        lambda t: 0.5 * (1 + math.cos(math.pi * t)),
        num_training_steps,
        num_warmup_steps,
        warmup_ratio,
        min_ratio,
        last_epoch,
    )


def linear(
    optimizer: Optimizer,
    *,
    num_training_steps: int,
    num_warmup_steps: int | None = None,
    warmup_ratio: float | None = None,
    min_ratio: float = 0.0,
    last_epoch: int = -1,
) -> LambdaLR:
    """Returns the same with a straight line down. Arguments and errors as in `cosine`."""
    return _with_warmup(
        optimizer, lambda t: 1 - t, num_training_steps, num_warmup_steps, warmup_ratio, min_ratio, last_epoch
    )


def _with_warmup(
    optimizer, decay: Callable[[float], float], total, num_warmup_steps, warmup_ratio, min_ratio, last_epoch
):
    if num_warmup_steps is not None and warmup_ratio is not None:
        raise UserError("lr_scheduler: num_warmup_steps and warmup_ratio say the same thing; keep one of them")
    if warmup_ratio is not None and not 0 <= warmup_ratio < 1:
        raise UserError(f"lr_scheduler.warmup_ratio={warmup_ratio}: must be at least 0 and below 1, such as 0.1")
    warmup = num_warmup_steps
    if warmup is None:
        warmup = min(math.ceil(exactly(warmup_ratio or 0.0) * total), total - 1)
    if not 0 <= warmup < total:
        raise UserError(
            f"lr_scheduler.num_warmup_steps={warmup}: must be at least 0 and below the run's {total} steps; "
            f"nearest valid: lr_scheduler.num_warmup_steps={max(0, min(warmup, total - 1))}"
        )
    if not 0 <= min_ratio <= 1:
        raise UserError(
            f"lr_scheduler.min_ratio={min_ratio}: must be between 0 and 1; "
            f"nearest valid: lr_scheduler.min_ratio={0 if min_ratio < 0 else 1}"
        )

    def share_of_lr(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / (total - warmup))
        return min_ratio + (1 - min_ratio) * decay(progress)

    return LambdaLR(optimizer, share_of_lr, last_epoch)
