"""The cases of gpu_check.py by part and name, the most telling first."""

import json
from pathlib import Path

from random_work import MODELS

# Attention's back ends: a name, and whether layers are compiled

BACK_ENDS = {
    "flex, compiled": ("flex", True),
    "mask, compiled": ("mask", True),
    "varlen": ("varlen", False),
    "segments": ("segments", False),
    "mask": ("mask", False),
}

# Ten steps of a tiny model, on the device and on the CPU

TEN = ["pairs_per_step=8", "batch_size=4", "max_steps=10", "optimizer.lr=1e-3", "~lr_scheduler.warmup_ratio"]
FULL, LORA, QLORA = (f"{method}_dpo_single_device" for method in ("full", "lora", "qlora"))
TORCHRUN = "lora_dpo_distributed under torchrun"
EXACT, QUANTIZED, ROUGH = 1e-5, 1e-3, 0.05  # of a loss, absolutely
BITS_8 = "optimizer._component_=torchao.optim.AdamW8bit"
OFFLOADED = "optimizer._component_=torchao.optim.CPUOffloadOptimizer"
PAGED = "optimizer._component_=bitsandbytes.optim.PagedAdamW"
AWAY = ["enable_activation_offloading=true"]
FP8 = ["enable_fp8_training=true", "dtype=bf16"]
BRIDGE = ["model._component_=pairtune.models.bridge.causal_lm", "model.path=${checkpointer.checkpoint_dir}"]
BRIDGED = [*(f"~model.{size}" for size in MODELS["tiny"]), *BRIDGE, "checkpointer.model_type=auto"]
RECIPES = {  # recipe, overrides, what the CPU takes in place of these, how far losses may differ
    "lora": (LORA, [], None, EXACT),
    "full": (FULL, [], None, EXACT),
    "qlora": (QLORA, [], None, QUANTIZED),
    "lora, distributed": ("lora_dpo_distributed", [], (LORA, []), EXACT),
    "lora, torchrun": (TORCHRUN, [], (LORA, []), EXACT),
    "full, distributed": ("full_dpo_distributed", [], (FULL, []), EXACT),
    "qlora, distributed": ("qlora_dpo_distributed", [], (QLORA, []), QUANTIZED),
    "full, distributed, offloaded": ("full_dpo_distributed", ["fsdp_cpu_offload=true"], (FULL, []), EXACT),
    "lora, mask, compiled": (LORA, ["attention=mask", "compile=true"], (LORA, []), EXACT),
    "lora, mask": (LORA, ["attention=mask"], (LORA, []), EXACT),
    "lora, segments": (LORA, ["attention=segments"], (LORA, []), EXACT),
    "lora, flex": (LORA, ["attention=flex", "compile=true"], (LORA, []), EXACT),
    "lora, checkpointing": (LORA, ["enable_activation_checkpointing=true"], (LORA, []), EXACT),
    "lora, offloaded": (LORA, AWAY, (LORA, []), EXACT),
    "qlora, offloaded, compiled": (QLORA, [*AWAY, "compile=true"], (QLORA, []), QUANTIZED),
    "full, distributed, activations offloaded": ("full_dpo_distributed", AWAY, (FULL, []), EXACT),
    "full, fp8": (FULL, FP8, None, ROUGH),
    "full, fp8, compiled": (FULL, [*FP8, "compile=true"], (FULL, FP8), ROUGH),
    "full, distributed, fp8": ("full_dpo_distributed", FP8, (FULL, FP8), ROUGH),
    "lora, bf16": (LORA, ["dtype=bf16"], (LORA, []), ROUGH),
    "lora, bf16, varlen": (LORA, ["dtype=bf16", "attention=varlen"], (LORA, []), ROUGH),
    "lora, bf16, compiled": (LORA, ["dtype=bf16", "compile=true"], (LORA, []), ROUGH),
    "qlora, bf16": (QLORA, ["dtype=bf16"], (QLORA, []), ROUGH),
    "qlora, int8": (QLORA, ["base_dtype=int8"], None, QUANTIZED),
    "qlora, fp8": (QLORA, ["base_dtype=fp8"], None, QUANTIZED),
    "lora, cached": (LORA, ["reference=cached"], None, EXACT),
    "full, cached": (FULL, ["reference=cached"], None, EXACT),
    "lora, start": (LORA, ["reference=start"], None, EXACT),
    "lora, DoRA": (LORA, ["lora.use_dora=true"], None, EXACT),
    "lora, KTO": (LORA, ["loss=kto"], None, EXACT),
    "full, AdamW8bit": (FULL, [BITS_8], (FULL, []), ROUGH),
    "full, CPUOffloadOptimizer": (FULL, [OFFLOADED], (FULL, []), EXACT),
    "full, PagedAdamW": (FULL, [PAGED], (FULL, []), EXACT),
    "lora, bridged": (LORA, BRIDGED, None, EXACT),
    "lora, bridged, flex": (LORA, [*BRIDGED, "attention=flex", "compile=true"], (LORA, BRIDGED), EXACT),
    "lora, bridged, mask, compiled": (LORA, [*BRIDGED, "attention=mask", "compile=true"], (LORA, BRIDGED), EXACT),
    "qlora, bridged": (QLORA, BRIDGED, None, QUANTIZED),
}

# Greedy answers of the tiny model, on the device and on the CPU: settings of measure_generation.ours

ANSWERS = {
    "greedy": {},
    "greedy, compiled": {"compiled": True},
    "greedy, NF4, compiled": {"compiled": True, "base_dtype": "nf4"},
}

# Killed and continued

RESUMED = {
    "lora": (LORA, []),
    "full": (FULL, []),
    "qlora": (QLORA, []),
    "lora, distributed, dropout": ("lora_dpo_distributed", ["lora.dropout=0.2", "disable_dropout=false"]),
}

# Steps at full size

LONG, MIX = "512/128/128", "mix"
FAST = ["compile=true"]  # as it is by default in runs of more than a few steps; all else is chosen by default, too
BITS_8_FULL = [*FAST, "reference=cached", "optimizer._component_=torchao.optim.AdamW8bit"]
RUNS = {  # of speed, on configs/llama3_8b.yaml
    "lora live": ("lora_dpo_single_device", LONG, FAST),
    "lora cached": ("lora_dpo_single_device", LONG, [*FAST, "reference=cached"]),
    "qlora live": ("qlora_dpo_single_device", LONG, FAST),
    "lora live, mix": ("lora_dpo_single_device", MIX, FAST),
    "full cached": ("full_dpo_single_device", LONG, [*FAST, "reference=cached"]),
    "full cached, 8-bit AdamW": ("full_dpo_single_device", LONG, BITS_8_FULL),
    "full, fp8, 8-bit AdamW": ("full_dpo_single_device", LONG, [*BITS_8_FULL, *FP8]),
    "lora live, eager": ("lora_dpo_single_device", LONG, ["compile=false"]),
    "qlora live, eager": ("qlora_dpo_single_device", LONG, ["compile=false"]),
}

PEERS = {  # LoRA, live, systems of bench.py
    "torchtune, compiled, no checkpointing, 2 pairs": "torchtune:compiled:pairs=2",
    "TRL, checkpointing, 4 pairs": "trl:checkpointing:pairs=4",
    "torchtune, compiled, 4 pairs": "torchtune:compiled:checkpointing:pairs=4",
    "torchtune, 4 pairs": "torchtune:checkpointing:pairs=4",
    "TRL, no checkpointing, 2 pairs": "trl:pairs=2",
}


def run_dir(name: str, settings: dict) -> Path:
    """Returns the run folder of a run of speed."""
    return Path(settings["folder"]) / f"speed_{name.replace(', ', '_').replace(' ', '_')}"


def logged(name: str, settings: dict) -> list[float]:
    """Returns the pairs a second of the steps that such a run has logged so far."""
    path = run_dir(name, settings) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [round(row["pairs_per_second"], 2) for row in rows if "loss" in row]


def names_of(part: str, settings: dict, only: list[str] = ()) -> list[str]:
    """Returns the names of a part's cases that have one of these words, all of them where there is none."""
    runs = settings["runs"]
    found = {"backends": BACK_ENDS, "recipes": RECIPES, "answers": ANSWERS, "resume": RESUMED, "speed": runs}
    found = (found | {"plan": runs, "peers": PEERS}).get(part, ())
    return [name for name in found if not only or any(words in name for words in only)]
