"""Run by torchrun in test_distributed.py: what a rank holds and sends, by method, written as JSON to argv[1]."""

import json
import os
import sys

import torch
from helpers import SHARDED_SIZES, random_pairs, tiny_llama
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import disable_adapter

from pairtune import models
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process import dist


class CountCollectives(TorchDispatchMode):
    """Counts c10d's collectives by name, and the bytes of the whole, gathered or not yet scattered, tensor."""

    NAMES = {"allgather": "all_gather", "reduce_scatter": "reduce_scatter", "allreduce": "all_reduce"}

    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            operation = function._schema.name.removeprefix("c10d::").strip("_")
            name = next((n for prefix, n in self.NAMES.items() if operation.startswith(prefix)), operation)
            tensors = tree_leaves(args[:2])
            whole = max(num_bytes(t) for t in tensors if isinstance(t, torch.Tensor))
            count, size = self.counts.get(name, (0, 0))
            self.counts[name] = (count + 1, size + whole)
        return function(*args, **(kwargs or {}))


def num_bytes(tensor):
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    if isinstance(local, NF4Tensor):
        parts = (local.quantized_scalers, local.quantization_factor, local.quantized_data)
        return sum(t.numel() * t.element_size() for t in parts)
    return local.numel() * local.element_size()


def measure(method, world):
    component = {"_component_": "torchtune.models.llama3.llama3", **SHARDED_SIZES}
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]}
    if method == "full":
        model, reference = (models.full(component, dtype="fp32") for _ in range(2))
        reference.requires_grad_(False)
    else:
        model = reference = models.lora(component, **lora, dtype="fp32", quantize_base=method == "qlora", world=world)
    for policy in {id(m): m for m in (model, reference)}.values():
        models.prepare(policy, max_length=128)
        models.load(policy, tiny_llama(**SHARDED_SIZES).state_dict(), world=world)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    result = {"parameters": sum(map(num_bytes, model.parameters()))}
    batches = [lay_out(random_pairs(1, seed=10 * world.rank + n)) for n in range(2)]

    def step(with_reference, batches):
        for n, batch in enumerate(batches):
            models.sync_gradients(model, n == len(batches) - 1)
            chosen, rejected = answer_logps(model, batch)
            if with_reference and method == "full":
                with torch.no_grad():
                    answer_logps(reference, batch)
            elif with_reference:
                with torch.no_grad(), disable_adapter(model):
                    answer_logps(model, batch)
            (chosen - rejected).sum().backward()

    step(True, batches)  # everything is set up
    optimizer.step()
    result["optimizer"] = sum(num_bytes(v) for s in optimizer.state.values() for v in s.values() if v.dim())
    for name, arguments in {
        "cached": (False, batches[:1]),  # no reference forward, as with a reference cache
        "live": (True, batches[:1]),
        "accumulated": (False, batches),
    }.items():
        optimizer.zero_grad()
        with CountCollectives() as mode:
            step(*arguments)
        result[name] = mode.counts
    return result


def main(path, *methods):
    world = dist.connect(dist.start("cpu"))
    results = {method: measure(method, world) for method in methods}
    if world.is_main:
        with open(path, "w") as file:
            json.dump(results, file)
    dist.stop(world)


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(*sys.argv[1:])
