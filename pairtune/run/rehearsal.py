"""Optimizer, schedule and loss are tried before weights are read: what they refuse, and signatures cannot tell."""

import inspect
import json
import math
import re
import warnings
from types import SimpleNamespace

import torch
from torch import nn
from torch.optim import Optimizer

from pairtune.config.components import build, plain
from pairtune.config.rules import one_line, show
from pairtune.errors import UserError
from pairtune.losses.calling import check_convention
from pairtune.models.shard import shard
from pairtune.process.dist import World
from pairtune.run import optimizers
from pairtune.run.optimizer_state import OptimizerState, as_before, as_numbers, check_json
from pairtune.run.optimizers import make_state

GPU_ONLY = ("fused", "capturable")  # arguments of optimizers that say where a step runs, not what it computes


def rehearse(
    optimizer: dict,
    lr_scheduler: dict | None,
    loss: dict,
    model: nn.Module | None = None,
    world: World | None = None,
    *,
    num_training_steps: int,
) -> None:
    """Builds optimizer and schedule for a few parameters, makes steps, saves, resumes, and calls the loss once.

    Args:
        model: What is to be trained, without memory: it tells how many dimensions parameters have; None: two.
        world: Where the run is to be; None: elsewhere, so what steps on a GPU only is not refused.

    Raises:
        UserError: One of them fails, the optimizer needs a closure or does not go on from what a checkpoint has as if
            it had not been stopped, or the loss does not return three vectors.
    """
    trained = [p for p in model.parameters() if p.requires_grad] if model else []
    toy = Toy(tuple(sorted({p.ndim for p in trained})) or (2,), next((p.dtype for p in trained), torch.float32), world)
    devices = [world.device] if world and world.device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices=devices), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")
        stepped = _rehearse_optimizer(plain(optimizer), toy)
        if lr_scheduler is not None:
            _rehearse_schedule(plain(lr_scheduler), stepped, num_training_steps)
        _rehearse_loss(plain(loss))


class Toy:
    """Parameters of each number of dimensions that the run's have, of their dtype, and sharded where those are.

    They are large enough for an optimizer to keep them in few bits.
    """

    def __init__(self, dimensions: tuple[int, ...], dtype: torch.dtype, world: World | None):
        self.dimensions, self._dtype = dimensions, dtype
        self.is_where_the_run_is, self.world = world is not None, world or World(torch.device("cpu"))

    def parameters(self) -> list[nn.Parameter]:
        """Returns new ones, of the same values in each call."""
        made = nn.ParameterList()
        for number in self.dimensions:
            shape = (64 * self.world.num_shards, *[64] * (number > 1), *[1] * (number - 2))
            values = torch.linspace(-1, 1, math.prod(shape)).view(shape)
            made.append(nn.Parameter(values.to(self.world.device, self._dtype)))
        if self.world.shards:
            shard(made, self.world, is_root=True)
        return [*made.parameters()]

    def only_matrices(self) -> "Toy":
        """Returns one without those that are no matrices."""
        return Toy((2,), self._dtype, self.world if self.is_where_the_run_is else None)


def _rehearse_optimizer(block: dict, toy: Toy) -> Optimizer:
    try:
        optimizer = optimizers.build(block, toy.parameters())
        if _needs_closure(optimizer):
            raise UserError(
                f"optimizer._component_={block['_component_']}: computes the loss again within a step (needs a "
                "closure), which recipes do not do; use another, such as torch.optim.AdamW"
            )
        if toy.is_where_the_run_is:
            return _rehearse_resuming(block, toy)
        if type(optimizer).__module__.startswith(("torch.", "torchao.")):  # others may step on a GPU only
            return _rehearse_resuming({k: v for k, v in block.items() if k not in GPU_ONLY}, toy)
        return optimizer
    except Exception as error:
        raise _refusal_of_some(block, toy, error) or _refusal("optimizer", block, error) from None


def _refusal_of_some(block: dict, toy: Toy, error: Exception) -> UserError | None:
    """The error of an optimizer that takes matrices, and not all that this run trains."""
    others = [number for number in toy.dimensions if number != 2]
    if isinstance(error, UserError) or not others:
        return None
    try:
        _rehearse_resuming(block, toy.only_matrices())
    except Exception:
        return None
    return UserError(
        f"optimizer._component_={block['_component_']}: takes matrices only ({one_line(error).rstrip('.')}), and "
        f"this run trains parameters of {' and '.join(map(str, others))} dimensions, too, such as norms; use a lora_ "
        "or qlora_ recipe without lora.use_dora, or another optimizer, such as torch.optim.AdamW"
    )


def _rehearse_resuming(block: dict, toy: Toy) -> Optimizer:
    """Three steps, of which the last is made again from what a checkpoint after the second would have."""
    straight, again = toy.parameters(), toy.parameters()
    optimizer = optimizers.build(block, straight)
    _step(optimizer, straight, 1)
    _step(optimizer, straight, 2)
    kept = OptimizerState(optimizer, {str(i): p for i, p in enumerate(straight)}, toy.world)
    kept.check()
    saved = {name: tensor.clone() for name, tensor in kept.tensors().items()}
    values, groups = json.loads(json.dumps([kept.values(), kept.groups()]))
    for parameter, value in zip(again, straight, strict=True):
        parameter.data.copy_(value.data)
    _step(optimizer, straight, 3)

    resumed = optimizers.build(block, again)
    make_state(resumed)
    kept = OptimizerState(resumed, {str(i): p for i, p in enumerate(again)}, toy.world)
    sizes = {n: SimpleNamespace(size=t.shape, properties=SimpleNamespace(dtype=t.dtype)) for n, t in saved.items()}
    read = kept.templates(sizes, toy.world.num_shards if toy.world.shards else 1)
    for name, tensor in read.items():
        tensor.copy_(saved[name])
    kept.load(read, values, groups, sizes)
    _step(resumed, again, 3)
    if not all(torch.equal(_numbers(p), _numbers(q)) for p, q in zip(straight, again, strict=True)):
        raise UserError(
            f"optimizer._component_={block['_component_']}: does not go on from its state and groups as if it had not "
            "been stopped: it keeps something elsewhere, and a run could not be resumed exactly; use another, such as "
            "torch.optim.AdamW"
        )
    return optimizer


def _step(optimizer: Optimizer, parameters: list[nn.Parameter], number: int) -> None:
    torch.manual_seed(number)  # some round by chance
    sum(((1 + 0.1 * number) * p.float().square()).sum() for p in parameters).backward()
    optimizer.step()
    optimizer.zero_grad()


def _numbers(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part; a rate at which a run diverges is not for the rehearsal to refuse."""
    return torch.nan_to_num(tensor.to_local() if hasattr(tensor, "to_local") else tensor)


def _needs_closure(optimizer: Optimizer) -> bool:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    return closure is not None and closure.default is closure.empty


def _rehearse_schedule(block: dict, optimizer: Optimizer, num_training_steps: int) -> None:
    parameters = [*optimizers.parameters_of(optimizer)]
    try:
        schedule = build(block, optimizer, num_training_steps=num_training_steps, last_epoch=-1)
        _check_rate(optimizer, block, 1)
        check_json(as_numbers(schedule.state_dict()), "lr_scheduler", "lr_scheduler")
        state = json.loads(json.dumps(as_numbers(schedule.state_dict())))
        schedule.load_state_dict(as_before(state, schedule.state_dict()))
        for number in range(1, num_training_steps + 1):
            trains = _check_rate(optimizer, block, number) > 0
            schedule.step()
            if trains:
                if any(part.state for part in optimizers.parts(optimizer)):  # with the rate as the schedule leaves it
                    _step(optimizer, parameters, number)
                return
    except Exception as error:
        raise _refusal("lr_scheduler", block, error) from None
    raise UserError(f"lr_scheduler: the learning rate is 0 in all {num_training_steps} steps; nothing would be trained")


def _check_rate(optimizer: Optimizer, block: dict, number: int) -> float:
    rate = float(optimizer.param_groups[0]["lr"])
    if not math.isfinite(rate):
        raise UserError(
            f"lr_scheduler: {block['_component_']} makes the learning rate of step {number} {rate}, which is not a "
            "finite number; give its arguments other values, or use pairtune.schedules.cosine"
        )
    return rate


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
