"""Optimizer, schedule and loss are tried before weights are read: what they refuse, and signatures cannot tell."""

import inspect
import re
import warnings

import torch

from pairtune.config.components import build, plain
from pairtune.config.rules import one_line, show
from pairtune.errors import UserError
from pairtune.losses.calling import check_convention

GPU_ONLY = ("fused", "capturable")  # arguments of optimizers that say where a step runs, not what it computes


def rehearse(optimizer: dict, lr_scheduler: dict | None, loss: dict, *, num_training_steps: int) -> None:
    """Builds optimizer and schedule for one parameter, makes a step, and calls the loss once, all on the CPU.

    Raises:
        UserError: One of them fails, the optimizer needs a closure, or the loss does not return three vectors.
    """
    parameter = torch.nn.Parameter(torch.zeros(1, 1))
    parameter.grad = torch.ones(1, 1)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        stepped = _rehearse_optimizer(plain(optimizer), parameter)
        if lr_scheduler is not None:
            _rehearse_schedule(plain(lr_scheduler), stepped, num_training_steps)
        _rehearse_loss(plain(loss))


def _rehearse_optimizer(block: dict, parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    try:
        optimizer = build(block, [parameter])
        if _needs_closure(optimizer):
            raise UserError(
                f"optimizer._component_={block['_component_']}: computes the loss again within a step (needs a "
                "closure), which recipes do not do; use another, such as torch.optim.AdamW"
            )
        if type(optimizer).__module__.startswith("torch."):  # others may step on a GPU only
            optimizer = build({k: v for k, v in block.items() if k not in GPU_ONLY}, [parameter])
            optimizer.step()
    except Exception as error:
        raise _refusal("optimizer", block, error) from None
    return optimizer


def _needs_closure(optimizer: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _rehearse_schedule(block: dict, optimizer: torch.optim.Optimizer, num_training_steps: int) -> None:
    try:
        schedule = build(block, optimizer, num_training_steps=num_training_steps, last_epoch=-1)
        for _ in range(num_training_steps):
            trains = optimizer.param_groups[0]["lr"] > 0
            schedule.step()
            if trains:
                return
    except Exception as error:
        raise _refusal("lr_scheduler", block, error) from None
    raise UserError(f"lr_scheduler: the learning rate is 0 in all {num_training_steps} steps; nothing would be trained")


def _rehearse_loss(block: dict) -> None:
    try:
        loss_fn = build(block)
    except Exception as error:
        raise _refusal("loss", block, error) from None
    check_convention(loss_fn, block["_component_"])


def _refusal(key: str, block: dict, error: Exception) -> UserError:
    """Names the arguments that the error speaks of, or else all of them."""
    if isinstance(error, UserError):
        return error
    path, reason = block["_component_"], one_line(error).rstrip(".")
    given = {k: v for k, v in block.items() if v is not None}
    blamed = {k: v for k, v in given.items() if re.search(rf"\b{re.escape(k.removesuffix('s'))}", reason)} or given
    values = " ".join(f"{key}.{name}={show(value)}" for name, value in blamed.items())
    return UserError(f"{values}: {path} refuses: {reason}; give another value, or another component as {key}=...")
