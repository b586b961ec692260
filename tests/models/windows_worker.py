"""Run by torchrun in test_windows.py: a step of a sharded Gemma 2, its numbers written as JSON to argv[1]."""

import json
import sys
from pathlib import Path

import torch
from helpers import random_pairs

from pairtune import models
from pairtune.models.gemma2 import gemma2
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process import dist

SIZES = {
    "vocab_size": 320, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32, "embed_dim": 72,
    "intermediate_dim": 96, "max_seq_len": 128, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 4.0,
}  # fmt: skip
LORA = {"rank": 3, "alpha": 6.0, "dropout": 0.0, "modules": ["q_proj", "v_proj", "mlp"]}
PAIRS = random_pairs(4, prompt=(20, 45), answer=(12, 25))


def measure(method, back_end, world):
    """Returns the log-probabilities of a process's answers, gathered, and each gradient's norm."""
    component = {"_component_": "pairtune.gemma2.gemma2", **SIZES}
    model = models.full(component, dtype="fp32") if method == "full" else models.lora(component, **LORA, dtype="fp32")
    options = {"windows": [8, None, 8, None], "attention": back_end, "checkpoint_activations": True}
    models.prepare(model, max_length=128, **options)
    torch.manual_seed(0)
    models.load(model, gemma2(**SIZES).state_dict(), world=world)
    logps = torch.cat(answer_logps(model, lay_out(PAIRS[world.rank :: world.size])))
    (logps.sum() * world.size).backward()  # FSDP averages over processes
    norms = [p.grad.norm() for p in model.parameters() if p.requires_grad]
    total = world.sum(logps.detach().double().sum())
    return [float(total), *(float(n.full_tensor() if hasattr(n, "full_tensor") else n) for n in norms)]


def main(path):
    world = dist.connect(dist.start("cpu"))
    results = [measure(method, back_end, world) for method in ("full", "lora") for back_end in ("segments", "mask")]
    if world.is_main:
        Path(path).write_text(json.dumps(results))
    dist.stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
