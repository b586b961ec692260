"""Run by torchrun in test_references.py: DPO with a reference of its own, its numbers written as JSON to argv[1]."""

import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from helpers import SHARDED_SIZES, random_pairs, tiny_llama
from torch.nn.functional import logsigmoid

from pairtune import models
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process import dist
from pairtune.reference.sources import AdapterCopy, SecondModel, frozen_model

COMPONENT = {"_component_": "torchtune.models.llama3.llama3", **SHARDED_SIZES}
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "modules": ["q_proj", "v_proj", "mlp"]}  # 3: shards are uneven
PAIRS = [random_pairs(4, seed=seed) for seed in range(5)]  # by step


def build(method, world, *, output=False, checkpointing=False, second=None):
    """Returns policy and reference; the adapters are away from zero, as those of an SFT run.

    `second` is the config's block of a model with other weights, in the place of one that moves.
    """
    lora = LORA | {"modules": [*LORA["modules"], *(["output"] if output else [])]}
    if method == "full":
        model, adapter = models.full(COMPONENT, dtype="fp32"), None
        frozen = models.full(COMPONENT, dtype="fp32").requires_grad_(False).eval()
    else:
        options = {"dtype": "fp32", "frozen_copy": True, "world": world}
        options |= {"quantize_base": method == "qlora", "use_dora": method == "dora"}
        model, frozen = models.lora(COMPONENT, **lora, **options), None
        generator = torch.Generator().manual_seed(1)
        shapes = sorted(models.adapter_shapes(model).items())
        adapter = {  # DoRA's magnitudes are about 1
            name: torch.randn(shape, generator=generator) * 0.05 + name.endswith("magnitude") for name, shape in shapes
        }
    if second:
        frozen = frozen_model(second, method, component=COMPONENT, dtype="fp32", world=world)
    for policy in filter(None, (model, frozen)):
        seed = 1 if second and policy is frozen else 0
        models.prepare(policy, max_length=128, checkpoint_activations=checkpointing)
        start = adapter if policy is model else None
        models.load(policy, tiny_llama(seed=seed, **SHARDED_SIZES).state_dict(), world=world, adapter=start)
    return model, SecondModel(model, frozen) if frozen else AdapterCopy(model)


def train(method, world, *, alpha=0.6, every=2, reference_first=False, folder=None, second=None, **options):
    """Returns losses by step, answers' log-probabilities under both models at the end, and trained weights' sums."""
    model, reference = build(method, world, second=second, **options)
    lr = {"full": 0.2, "dora": 0.2}.get(method, 2.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)

    def reference_logps(batch):
        with reference.weights() as frozen:
            return answer_logps(frozen, batch)

    losses = []
    for step, pairs in enumerate(PAIRS, start=1):
        batch = lay_out(pairs[world.rank :: world.size])
        if reference_first:
            expected = reference_logps(batch)
            chosen, rejected = answer_logps(model, batch)
        else:
            chosen, rejected = answer_logps(model, batch)
            expected = reference_logps(batch)
        loss = -logsigmoid(0.1 * ((chosen - rejected) - (expected[0] - expected[1]))).sum()
        (loss * world.size / len(pairs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(world.sum(loss.detach().clone())) / len(pairs))
        if step % every == 0:
            with torch.no_grad():
                answer_logps(model, batch)  # as an evaluation does: FSDP2's root stays whole after it
            reference_logps(batch)
            if not second:
                reference.move(alpha)
    batch = lay_out(PAIRS[0])
    result = {"losses": losses, "reference": torch.cat(reference_logps(batch)).tolist()}
    if folder and not second:
        result["restored"] = save_move_restore(reference, reference_logps, batch, folder)
    with torch.no_grad():
        result["policy"] = torch.cat(answer_logps(model, batch)).tolist()
    return result


def save_move_restore(reference, reference_logps, batch, folder):
    """The reference's log-probabilities after it was saved, moved, and loaded in place."""
    dcp.save(reference.tensors(), checkpoint_id=folder)
    reference.move(1.0)
    tensors = reference.tensors()
    dcp.load(tensors, checkpoint_id=folder)
    return torch.cat(reference_logps(batch)).tolist()


def main(path, cases):
    world = dist.connect(dist.start("cpu"))
    results = []
    for case in json.loads(cases):
        replicate, offload = case.pop("replicate", 1), case.pop("cpu_offload", False)
        if replicate > 1:
            mesh = torch.distributed.device_mesh.init_device_mesh(
                "cpu", (replicate, world.size // replicate), mesh_dim_names=("replicate", "shard")
            )
            here = dist.World(world.device, world.rank, world.size, mesh)
        else:
            here = world.with_cpu_offload(offload)
        folder = world.agree(tempfile.mkdtemp(dir=Path(path).parent) if world.is_main else None)
        results.append(train(world=here, folder=folder, **case))
    if world.is_main:
        Path(path).write_text(json.dumps(results))
    dist.stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
