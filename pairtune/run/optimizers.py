"""What recipes ask of any optimizer, torch's or another library's: how it is made, and where it keeps what it knows.

A parameter has a state: a dict of tensors and numbers. Two kinds keep it elsewhere: torchao's CPUOffloadOptimizer, an
optimizer a parameter, each of a copy in host memory; and what knows no shards, which is given plain ones: OnShards.
"""

import inspect
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torchao.optim import CPUOffloadOptimizer

from pairtune.config import components
from pairtune.config.components import import_component, plain
from pairtune.config.rules import one_line
from pairtune.errors import UserError

OFFLOADING = "torchao.optim.CPUOffloadOptimizer"
# bitsandbytes' kernels take a pointer, which FSDP2's parameters do not have; torchao's four bits do not compile there.
PLAIN_TENSORS_ONLY = ("bitsandbytes.", "torchao.optim.Adam4bit", "torchao.optim.AdamW4bit")


def make(optimizer: dict, parameters: Iterable[nn.Parameter], decay_norms_and_biases: bool = False) -> Optimizer:
    """Returns the optimizer of a config's block; norms, biases and DoRA's magnitudes are not decayed.

    Those are the parameters of one dimension. Hugging Face's Trainer leaves norms and biases out by their names.

    Args:
        decay_norms_and_biases: Decays every parameter alike, as torch's optimizers do unless told.

    Raises:
        UserError: The optimizer refuses its arguments or these parameters.
    """
    block = plain(optimizer)
    try:
        return build(block, parameters, decay_norms_and_biases)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"optimizer._component_={block['_component_']}: cannot be made of this model's parameters "
            f"({type(error).__name__}: {one_line(error)}); use another, such as torch.optim.AdamW"
        ) from error


def build(block: dict, parameters: Iterable[nn.Parameter], decay_norms_and_biases: bool = False) -> Optimizer:
    """Returns what `make` does, and raises what the optimizer raises."""
    parameters = [p for p in parameters if p.requires_grad]
    flat = [p for p in parameters if p.ndim < 2]
    groups = [{"params": parameters}]
    if flat and not decay_norms_and_biases and _weight_decay(block, flat[0].device):
        matrices = [p for p in parameters if p.ndim >= 2]
        groups = [{"params": matrices}] * bool(matrices) + [{"params": flat, "weight_decay": 0.0}]
    if block["_component_"] == OFFLOADING:
        block = block | {"_component_": f"{__name__}.{AfterClipping.__name__}"}
    if takes_fused(block) and all(p.device.type == "cuda" for p in parameters):
        block = block | {"fused": True}
    if block["_component_"].startswith(PLAIN_TENSORS_ONLY) and any(isinstance(p, DTensor) for p in parameters):
        return OnShards(block, groups)
    return components.build(block, groups if len(groups) > 1 else parameters)


def takes_fused(block: dict) -> bool:
    """Whether it has a fused kernel, the fastest there is on a GPU, and the block does not say how it is to compute."""
    if not block["_component_"].startswith("torch.optim.") or {"fused", "foreach", "differentiable"} & block.keys():
        return False
    return "fused" in inspect.signature(import_component("optimizer", block["_component_"])).parameters


def _weight_decay(block: dict, device: torch.device) -> float:
    """The block's, or what the optimizer takes where the block does not say."""
    if block.get("weight_decay") is not None:
        return block["weight_decay"]
    toy = components.build(block, [nn.Parameter(torch.zeros(1, 1, device=device))])
    return toy.param_groups[0].get("weight_decay", 0.0)


class AfterClipping(CPUOffloadOptimizer):
    """torchao's, whose copies of gradients are those that the step finds, which are clipped.

    It takes a gradient to host memory while backward goes on, and would miss what is done to it afterwards.
    """

    def __init__(self, params, optimizer_class: str | type[Optimizer] = torch.optim.AdamW, **arguments):
        groups = list(params)
        parameters = groups[0]["params"] if isinstance(groups[0], dict) else groups
        name = f"optimizer._component_={OFFLOADING}"
        if isinstance(parameters[0], DTensor):
            raise UserError(f"{name}: takes a model that is not sharded; set fsdp_cpu_offload=true in its place")
        if parameters[0].device.type == "cpu":
            raise UserError(
                f"{name}: keeps a GPU's optimizer state in host memory, and this run is on the CPU; name the optimizer "
                "itself: optimizer=torch.optim.AdamW"
            )
        if arguments.get("offload_gradients"):
            raise UserError(
                "optimizer.offload_gradients=true: gradients that leave the GPU in backward can be neither clipped "
                "nor added up over micro-batches; nearest valid: optimizer.offload_gradients=false"
            )
        if isinstance(optimizer_class, str):
            optimizer_class = import_component("optimizer.optimizer_class", optimizer_class)
        super().__init__(groups, optimizer_class, **arguments)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes the gradients as they are now, and updates."""
        for parameter, taken in self.queue.items():
            taken.synchronize()
            self.param_d2h_map[parameter].grad.copy_(parameter.grad)
        return super().step(closure)


class OnShards(Optimizer):
    """An optimizer that takes plain tensors only, on this process's shards of FSDP2's parameters.

    It sees each shard as a parameter of its own: right where an update is elementwise, or in blocks within a shard.

    Attributes:
        inner: The optimizer.
        shards: The model's parameters, and of each the plain one that shares its shard's memory.
    """

    def __init__(self, block: dict, groups: list[dict]):  # as CPUOffloadOptimizer, it has no groups of its own
        self.shards = {p: nn.Parameter(p.to_local().detach()) for group in groups for p in group["params"]}
        own = [{**group, "params": [self.shards[p] for p in group["params"]]} for group in groups]
        self.inner = components.build(block, own)

    @property
    def param_groups(self) -> list[dict]:
        return self.inner.param_groups

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Updates every shard that has a gradient."""
        for parameter, shard in self.shards.items():
            shard.grad = None if parameter.grad is None or not shard.numel() else parameter.grad.to_local()
        self.inner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets all gradients."""
        for parameter, shard in self.shards.items():
            parameter.grad = shard.grad = None


def parts(optimizer: Optimizer) -> list[Optimizer]:
    """Returns the optimizers that one is made of: itself, in most cases."""
    if isinstance(optimizer, OnShards):
        return [optimizer.inner]
    if isinstance(optimizer, CPUOffloadOptimizer):
        return [*optimizer.optim_dict.values(), *([optimizer.d_opt] if optimizer.d_opt else [])]
    return [optimizer]


def copies(optimizer: Optimizer) -> dict[nn.Parameter, nn.Parameter | Tensor]:
    """Returns what an optimizer updates in the place of the model's parameters, by parameter."""
    return getattr(optimizer, "shards", None) or getattr(optimizer, "param_d2h_map", {})


def state_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict:
    """Returns a parameter's state, in place; it is empty before the first step."""
    updated = copies(optimizer).get(parameter, parameter)
    found = (part.state[updated] for part in parts(optimizer) if updated in part.state)
    return next(found, {})


def parameters_of(optimizer: Optimizer) -> Iterator[nn.Parameter]:
    """Yields the model's parameters that an optimizer has."""
    copied = copies(optimizer)
    in_their_place = set(map(id, copied.values()))
    yield from copied
    for part in parts(optimizer):
        yield from (p for group in part.param_groups for p in group["params"] if id(p) not in in_their_place)


def groups_of(optimizer: Optimizer) -> list[dict]:
    """Returns copies of the groups, without parameters: rates, counts and whatever else it keeps there."""
    return [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]


def make_state(optimizer: Optimizer) -> None:
    """Makes the state by a step of no gradient at no learning rate: it moves nothing and allocates what steps need."""
    for part in parts(optimizer):
        for group in part.param_groups:
            group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
            for parameter in group["params"]:
                if parameter.grad is not None:  # memory that CPUOffloadOptimizer keeps
                    parameter.grad.zero_()
                elif parameter.numel():
                    parameter.grad = torch.zeros_like(parameter)
        part.step()
    optimizer.zero_grad()


def forget_state(optimizer: Optimizer) -> None:
    """Leaves an optimizer as it is before its first step, but for what it counts in its groups."""
    for part in parts(optimizer):
        part.state.clear()
        if hasattr(part, "page_mng"):  # bitsandbytes' list of paged tensors, which would keep them
            part.page_mng.paged_tensors.clear()
    getattr(optimizer, "queue", {}).clear()  # of gradients that CPUOffloadOptimizer has taken
