"""Run by test_versions.py in two environments: what NF4 stores, steps of an 8-bit optimizer, ten steps of each method.

As JSON on the last line; argv[1] is a folder for the runs.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from helpers import random_pairs, run_config, run_recipe, save_llama, save_pairs
from torchao.dtypes.nf4tensor import to_nf4
from torchao.optim import AdamW8bit


def nf4_digest():
    """Returns a digest of all that an NF4 weight is made of, and of what is computed with."""
    weight = to_nf4(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)), 64, 256)
    names, _ = weight.__tensor_flatten__()
    parts = [getattr(weight, name) for name in sorted(names)] + [weight.get_original_weight()]
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()


def steps_in_8_bits():
    """Returns the losses of least squares by AdamW8bit; 64 x 128 weights are enough for it to quantize their state."""
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(32, 128, generator=draw), torch.randn(32, 64, generator=draw)
    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer, losses = AdamW8bit([weight], lr=1e-2), []
    for _ in range(5):
        loss = (x @ weight.T - y).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def ten_steps(folder, method):
    """Returns the losses of a run of ten steps, at full precision."""
    overrides = [f"output_dir={folder / method}", "max_steps=10", "optimizer.lr=1e-3"]
    log = run_recipe(f"{method}_dpo_single_device", *overrides, config_paths=[folder / "config.yaml"])
    return [row["loss"] for row in log if "loss" in row]


def main(folder):
    save_llama(folder / "base")
    save_pairs(folder / "train.jsonl", random_pairs(80, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(8, seed=2))
    (folder / "config.yaml").write_text(json.dumps(run_config(folder)))
    losses = {method: ten_steps(folder, method) for method in ("full", "lora", "qlora")}
    print(json.dumps({"nf4": nf4_digest(), "adamw8bit": steps_in_8_bits(), **losses}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
