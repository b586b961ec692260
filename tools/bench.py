"""Seconds a step and peak memory of our LoRA DPO recipe against torchtune's, on the same work, in one run.

    python tools/bench.py [--steps 10] [--threads 1]

Both recipes run as they are, each in processes of its own, on one random model (hidden 256, 4 layers, vocabulary
32,000) and one file of random pairs (about 300 prompt and 85 answer tokens), 4 pairs a step, float32, CPU. A recipe
runs twice, for few and for many steps; the difference is what steps cost, without start, load and save. CPU seconds,
not wall seconds: they hold still on a busy machine.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from pairtune import torchao_names

VOCABULARY, LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN = 32_000, 4, 256, 8, 8, 688
PAIRS_PER_STEP, WARM_STEPS = 4, 2
MODEL = {
    "vocab_size": VOCABULARY, "num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS, "embed_dim": WIDTH,
    "max_seq_len": 2048, "intermediate_dim": HIDDEN, "rope_base": 10_000,
}  # fmt: skip
LORA = {"lora_rank": 8, "lora_alpha": 16, "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"]}


# The work


def make_work(folder: Path, num_pairs: int) -> None:
    """Writes a model in Hugging Face layout, a tokenizer of numbered words, and pairs of such words."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from torchtune.models.convert_weights import tune_to_hf
    from torchtune.models.llama3 import llama3

    base = folder / "base"
    base.mkdir()
    torch.manual_seed(0)
    weights = tune_to_hf(llama3(**MODEL).state_dict(), num_heads=HEADS, num_kv_heads=KV_HEADS, dim=WIDTH)
    save_file({k: v.contiguous() for k, v in weights.items()}, base / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rope_theta": float(MODEL["rope_base"]), "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (base / "config.json").write_text(json.dumps(config))
    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(base / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(special))
    rng = random.Random(0)

    def text(low, high):
        return " ".join(f"w{rng.randrange(2, VOCABULARY)}" for _ in range(rng.randint(low, high)))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(num_pairs):
            answers = {"chosen": " " + text(70, 100), "rejected": " " + text(70, 100)}
            file.write(json.dumps({"prompt": text(280, 320), **answers}) + "\n")


def torchtune_rows(tokenizer, *, source):
    """The pairs as torchtune's DPO recipes read them; named as `dataset._component_` in the peer's config."""

    def ids(text):
        return [int(word[1:]) for word in text.split()]

    rows = []
    for pair in map(json.loads, Path(source).read_text().splitlines()):
        row, prompt = {}, [0, *ids(pair["prompt"])]
        for kind in ("chosen", "rejected"):
            answer = [*ids(pair[kind]), 1]
            row[f"{kind}_input_ids"] = prompt + answer
            row[f"{kind}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return rows


class TorchtunePadding:
    """All that torchtune's recipe asks of a tokenizer here."""

    pad_id = 0


# The runs, each a process of its own


def run_ours(folder: Path, steps: int) -> None:
    import runpy

    sys.argv = ["recipe", "--config", str(folder / "ours.yaml"), f"max_steps={steps}"]
    runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "lora_dpo_single_device.py"), run_name="__main__")


def run_torchtune(folder: Path, steps: int) -> None:
    import runpy

    import torchtune

    recipe = Path(torchtune.__file__).parents[1] / "recipes" / "lora_dpo_single_device.py"
    sys.argv = ["recipe", "--config", str(folder / "torchtune.yaml"), f"max_steps_per_epoch={steps}"]
    runpy.run_path(str(recipe), run_name="__main__")


def run_loaded(folder: Path, steps: int) -> None:
    """The model, loaded, and nothing else: what both peaks are compared with."""
    from safetensors.torch import load_file
    from torchtune.models.llama3 import lora_llama3

    lora_llama3(**MODEL, **LORA, apply_lora_to_mlp=True)
    load_file(folder / "base" / "model.safetensors")


def write_configs(folder: Path) -> None:
    weights = {"checkpoint_dir": str(folder / "base"), "model_type": "LLAMA3"}
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 1e-4}
    ours = {
        "output_dir": str(folder / "ours"), "device": "cpu", "dtype": "fp32", "checkpointer": weights,
        "model": {"_component_": "torchtune.models.llama3.llama3", **MODEL},
        "lora": {"rank": 8, "alpha": 16, "modules": [*LORA["lora_attn_modules"], "mlp"]},
        "dataset": {"source": str(folder / "pairs.jsonl")}, "optimizer": optimizer, "lr_scheduler": None,
        "pairs_per_step": PAIRS_PER_STEP, "batch_size": PAIRS_PER_STEP, "samples": {"num_prompts": 0},
    }  # fmt: skip
    theirs = {
        "output_dir": str(folder / "torchtune"), "device": "cpu", "dtype": "fp32", "seed": 0, "compile": False,
        "model": {"_component_": "torchtune.models.llama3.lora_llama3", **MODEL, **LORA, "apply_lora_to_mlp": True},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", **weights,
            "checkpoint_files": ["model.safetensors"], "output_dir": str(folder / "torchtune"),
        },
        "tokenizer": {"_component_": "bench.TorchtunePadding"},
        "dataset": {"_component_": "bench.torchtune_rows", "source": str(folder / "pairs.jsonl")},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1}, "optimizer": optimizer,
        "lr_scheduler": None, "epochs": 1, "max_steps_per_epoch": None, "gradient_accumulation_steps": 1,
        "batch_size": PAIRS_PER_STEP, "shuffle": True, "resume_from_checkpoint": False,
        "enable_activation_checkpointing": False, "log_every_n_steps": 1, "save_adapter_weights_only": True,
        "metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"},
    }  # fmt: skip
    for name, cfg in (("ours", ours), ("torchtune", theirs)):
        (folder / f"{name}.yaml").write_text(json.dumps(cfg))  # JSON is YAML


def measure(which: str, folder: Path, steps: int, threads: int) -> tuple[float, float]:
    """Returns the CPU seconds and the peak resident GiB of a process that runs `which` for `steps` steps."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, __file__, "--child", which, "--folder", str(folder), "--steps", str(steps)]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{which} failed:\n{output[-3000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--child", choices=["ours", "torchtune", "loaded"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torchao_names.quiet()
    if args.child:
        {"ours": run_ours, "torchtune": run_torchtune, "loaded": run_loaded}[args.child](args.folder, args.steps)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_work(folder, PAIRS_PER_STEP * (args.steps + WARM_STEPS))
        write_configs(folder)
        _, loaded = measure("loaded", folder, 0, args.threads)
        print(f"{'recipe':<12}{'CPU s a step':>14}{'peak GiB':>11}{'above the loaded model':>25}")
        seconds = {}
        for which in ("torchtune", "ours"):
            short, _ = measure(which, folder, WARM_STEPS, args.threads)
            long, peak = measure(which, folder, WARM_STEPS + args.steps, args.threads)
            seconds[which] = (long - short) / args.steps
            print(f"{which:<12}{seconds[which]:>14.2f}{peak:>11.2f}{peak - loaded:>25.2f}", flush=True)
        print(f"torchtune / ours: {seconds['torchtune'] / seconds['ours']:.2f}x CPU seconds a step")


if __name__ == "__main__":
    main()
