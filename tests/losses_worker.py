"""A step of any loss, as a recipe does it, in one process or, run by torchrun, in several.

As a program it writes every case's loss and gradient norms by method, as JSON, to argv[1].
"""

import json
import os
import sys

import torch
from helpers import SHARDED_SIZES, random_pairs, tiny_llama

from pairtune import dist, losses, models
from pairtune.batch import lay_out
from pairtune.data import Pair
from pairtune.loader import share
from pairtune.logps import answer_logps, answer_scores
from pairtune.loss_needs import loss_inputs, mismatched, needs, step_gradients
from pairtune.preference_losses import build

STEPS = [
    ("sigmoid", {}),
    ("sigmoid", {"wpo": True, "ld_alpha": 0.3}),
    ("ipo", {"ld_alpha": 0.5}),
    ("sft", {}),
    ("aot", {"beta": 0.5}),
    ("aot", {"beta": 0.5, "ld_alpha": 0.5}),
    ("aot_unpaired", {"beta": 0.5}),
    ("kto", {}),
    ("simpo", {}),
    ("rpo", {}),
    ("mixture", {"terms": [{"name": "aot"}, {"name": "sft", "weight": 0.2}, {"name": "ipo"}]}),
    ("mixture", {"terms": [{"name": "aot_unpaired"}, {"name": "sigmoid", "wpo": True}]}),
    ("mixture", {"terms": [{"name": "sigmoid", "ld_alpha": 0.3, "wpo": True}, {"name": "sft"}]}),
]


def as_pairs(count):
    return [Pair(p.prompt, p.chosen, p.rejected, p.row) for p in random_pairs(count)]


def train_step(loss_fn, model, reference, pairs, batch_size, world):
    """Returns the step's mean loss; the gradients are the model's."""
    model.zero_grad()
    needed, step_inputs = needs(loss_fn), {}
    if "mean_chosen_length" in needed.inputs:
        step_inputs["mean_chosen_length"] = sum(len(p.chosen) for p in pairs) / len(pairs)
    if "kl" in needed.inputs:
        step_inputs["kl"] = kl_of(model, reference, pairs, batch_size, world)

    def reference_logps(batch):
        if not needed.reference:
            return None, None
        with torch.no_grad():
            return answer_logps(reference, batch, needed.ld_alpha)

    def gather(values):
        return torch.tensor(world.gather(values.tolist()), dtype=values.dtype)

    def score(batch):
        return answer_scores(model, batch, ld_alpha=needed.ld_alpha, weights=needed.weights)

    batches = [lay_out(m) for m in share(pairs, batch_size, rank=world.rank, size=world.size)]
    if needed.step:  # all of the step's values first, without gradients; then micro-batch by micro-batch with them
        with torch.no_grad():
            scores = [score(b) for b in batches]
            logps = [
                (s.chosen_logps, s.rejected_logps, *reference_logps(b)) for b, s in zip(batches, scores, strict=True)
            ]
        inputs = [loss_inputs(loss_fn, b, s, **step_inputs) for b, s in zip(batches, scores, strict=True)]
        inputs = {
            name: gather(torch.cat([i[name] for i in inputs])) if isinstance(value, torch.Tensor) else value
            for name, value in inputs[0].items()
        }
        step = step_gradients(loss_fn, *[gather(torch.cat(column)) for column in zip(*logps, strict=True)], **inputs)
    first = sum(len(pairs[rank :: world.size]) for rank in range(world.rank))  # where this process's pairs begin
    total = torch.zeros((), dtype=torch.float64)
    for n, batch in enumerate(batches):
        models.sync_gradients(model, n == len(batches) - 1)
        scores = score(batch)
        chosen, rejected = scores.chosen_logps, scores.rejected_logps
        if needed.step:
            mine = slice(first, first + batch.num_pairs)
            values = chosen * step.chosen_gradients[mine] + rejected * step.rejected_gradients[mine]
            total += step.losses[mine].sum()
            first = mine.stop
        else:
            inputs = loss_inputs(loss_fn, batch, scores, **step_inputs)
            values = loss_fn(chosen, rejected, *reference_logps(batch), **inputs)[0]
            total += values.detach().sum()
        (values.sum() * world.size / len(pairs)).backward()
    return world.sum(total).item() / len(pairs)


def kl_of(model, reference, pairs, batch_size, world):
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for m in share(mismatched(pairs), batch_size, rank=world.rank, size=world.size):
            batch = lay_out(m)
            ratios = torch.cat(answer_logps(model, batch)) - torch.cat(answer_logps(reference, batch))
            total += ratios.sum()
    return losses.kto_kl(world.sum(total), 2 * len(pairs))


def measure(method, world, batch_size):
    component = {"_component_": "torchtune.models.llama3.llama3", **SHARDED_SIZES}
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "v_proj", "mlp"]}
    # The policy is not the reference: their weights differ.
    model = models.full(component, dtype="fp32") if method == "full" else models.lora(component, **lora, dtype="fp32")
    reference = models.full(component, dtype="fp32").requires_grad_(False)
    for seed, policy in enumerate((model, reference)):
        torch.manual_seed(0)
        models.prepare(policy, max_length=128)
        models.load(policy, tiny_llama(seed=seed, **SHARDED_SIZES).state_dict(), world=world)
    results = []
    for name, options in STEPS:
        loss = train_step(build(name, **options), model, reference, as_pairs(7), batch_size, world)
        norms = [p.grad.norm() for p in model.parameters() if p.requires_grad]
        results.append([loss, *(float(n.full_tensor() if hasattr(n, "full_tensor") else n) for n in norms)])
    return results


def main(path, *methods):
    world = dist.connect(dist.start("cpu"))
    results = {method: measure(method, world, batch_size=1) for method in methods}
    if world.is_main:
        with open(path, "w") as file:
            json.dump(results, file)
    dist.stop(world)


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(*sys.argv[1:])
