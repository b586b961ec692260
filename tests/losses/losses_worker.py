"""A step of any loss, as a recipe does it, in one process or, run by torchrun, in several.

As a program it writes every case's numbers as JSON to argv[1].
"""

import inspect
import json
import os
import sys
from dataclasses import replace

import torch
from helpers import SHARDED_SIZES, random_pairs, tiny_llama
from torchtune.rlhf.loss import DPOLoss, RSOLoss

from pairtune import models
from pairtune.losses import formulas as losses
from pairtune.losses.calling import loss_inputs, mean_chosen_length, mismatched, needs, num_answers, step_losses
from pairtune.losses.modules import LOSSES, build
from pairtune.models.logps import answer_logps, answer_scores
from pairtune.pairs.batch import lay_out
from pairtune.pairs.steps import share
from pairtune.pairs.tokenize import Pair
from pairtune.process import dist

# Margins of a policy that is not the reference are large on random models: at these betas losses that sort, and
# those with an exponential in them, are not flat.
BETAS = {"aot": 0.5, "aot_unpaired": 0.5, "nca_pair": 0.1, "robust": 0.1, "bco_pair": 0.1, "sppo_hard": 0.1}


def variants():
    """Every loss by its name, and again with LD-DPO and WPO where it has them."""
    found = []
    for name, make in LOSSES.items():
        known, options = inspect.signature(make).parameters, {"beta": BETAS[name]} if name in BETAS else {}
        found += [(name, options)] if name != "mixture" else []
        further = {"ld_alpha": 0.3, "wpo": True}
        if further := {key: value for key, value in further.items() if key in known}:
            found.append((name, options | further))
    return found


STEPS = [
    *variants(),
    ("mixture", {"terms": [{"name": "aot", "beta": 0.5}, {"name": "sft", "weight": 0.2}, {"name": "ipo"}]}),
    ("mixture", {"terms": [{"name": "aot_unpaired"}, {"name": "sigmoid", "wpo": True}]}),
    ("mixture", {"terms": [{"name": "sigmoid", "ld_alpha": 0.3, "wpo": True}, {"name": "sft"}]}),
    ("torchtune.rlhf.loss.DPOLoss", {"beta": 0.3, "label_smoothing": 0.1}),
    ("torchtune.rlhf.loss.RSOLoss", {"gamma": 0.2}),
]


def loss_of(name, options):
    theirs = {"torchtune.rlhf.loss.DPOLoss": DPOLoss, "torchtune.rlhf.loss.RSOLoss": RSOLoss}
    return theirs[name](**options) if name in theirs else build(name, **options)


MAX_LENGTH = 60


def as_pairs(count, loss_fn=None):
    """Random pairs; prompts of every other one from the fourth on leave no more room than its own answers take. They
    have weights and margins, where a loss takes them."""
    pairs = [Pair(p.prompt, p.chosen, p.rejected, p.row) for p in random_pairs(count)]
    if getattr(loss_fn, "takes_weights", False):
        pairs = [replace(pair, weight=0.5 + pair.row % 3) for pair in pairs]
    if getattr(loss_fn, "takes_margins", False):
        pairs = [replace(pair, margin=pair.row % 3 - 0.5) for pair in pairs]
    for i in range(3, count, 2):
        room = MAX_LENGTH - max(len(pairs[i].chosen), len(pairs[i].rejected))
        pairs[i] = replace(pairs[i], prompt=(pairs[i].prompt * room)[:room])
    return pairs


def train_step(loss_fn, model, reference, pairs, batch_size, world):
    """Returns the step's mean loss, and d (mean loss) / d log-probabilities by pair; the gradients are the model's."""
    model.zero_grad()
    needed, known = needs(loss_fn), {"mean_chosen_length": mean_chosen_length(pairs)}
    known["mean_weight"] = sum(pair.weight for pair in pairs) / len(pairs)
    if "kl" in needed.inputs:
        known["kl"] = kl_of(model, reference, pairs, batch_size, world)
        assert known["kl"] > 0  # where it is cut, it would be alike however it is computed

    def reference_logps(batch):
        if not needed.reference:
            return None, None
        with torch.no_grad():
            return answer_logps(reference, batch, needed.ld_alpha)

    def score(batch):
        return answer_scores(model, batch, ld_alpha=needed.ld_alpha, weights=needed.weights)

    micro = share(pairs, batch_size, rank=world.rank, size=world.size)
    batches, values = [lay_out(m) for m in micro], [None] * len(micro)
    if needed.whole_step:
        with torch.no_grad():
            scores, references = [score(b) for b in batches], [reference_logps(b) for b in batches]
            values = step_losses(loss_fn, batches, scores, references, world, **known)
    total, rows = torch.zeros((), dtype=torch.float64), []
    for n, (its_pairs, batch, value) in enumerate(zip(micro, batches, values, strict=True)):
        models.sync_gradients(model, n == len(batches) - 1)
        scores = score(batch)
        logps = scores.chosen_logps, scores.rejected_logps
        for vector in (*logps, scores.whole_chosen_logps):
            vector.retain_grad()
        inputs = loss_inputs(loss_fn, batch, scores, **known) if value is None else {"step": value}
        per_pair = loss_fn(*logps, *reference_logps(batch), **inputs)[0]
        total += per_pair.detach().sum()
        (per_pair.sum() * world.size / len(pairs)).backward()
        whole = scores.whole_chosen_logps if scores.whole_chosen_logps is not logps[0] else None
        columns = [v.grad if v is not None and v.grad is not None else torch.zeros(len(its_pairs))
                   for v in (*logps, whole)]  # fmt: skip
        rows += zip([p.row for p in its_pairs], (torch.stack(columns, 1) / world.size).tolist(), strict=True)
    return world.sum(total).item() / len(pairs), [gradients for _, gradients in sorted(world.gather(rows))]


def kl_of(model, reference, pairs, batch_size, world):
    total, others = torch.zeros((), dtype=torch.float64), mismatched(pairs, MAX_LENGTH)
    with torch.no_grad():
        for m in share(others, batch_size, rank=world.rank, size=world.size):
            batch = lay_out(m)
            ratios = torch.cat(answer_logps(model, batch)) - torch.cat(answer_logps(reference, batch))
            total += ratios.sum()
    return losses.kto_kl(world.sum(total), num_answers(others))


def measure(world, batch_size):
    """Returns loss, gradients by pair and gradient norms by weight of a step with each of STEPS."""
    component = {"_component_": "torchtune.models.llama3.llama3", **SHARDED_SIZES}
    model, reference = (models.full(component, dtype="fp32") for _ in range(2))
    reference.requires_grad_(False)
    for seed, either in enumerate((reference, model)):  # the policy is not the reference
        models.prepare(either, max_length=128)
        models.load(either, tiny_llama(seed=seed, **SHARDED_SIZES).state_dict(), world=world)
    results = []
    for name, options in STEPS:
        loss_fn = loss_of(name, options)
        loss, gradients = train_step(loss_fn, model, reference, as_pairs(7, loss_fn), batch_size, world)
        norms = [p.grad.norm() for p in model.parameters()]
        norms = [float(n.full_tensor() if hasattr(n, "full_tensor") else n) for n in norms]
        results.append({"loss": loss, "gradients": gradients, "norms": norms})
    return results


def main(path):
    world = dist.connect(dist.start("cpu"))
    results = measure(world, batch_size=1)
    if world.is_main:
        with open(path, "w") as file:
            json.dump(results, file)
    dist.stop(world)


if __name__ == "__main__":
    assert "RANK" in os.environ
    main(sys.argv[1])
