"""What a reference costs in memory: full DPO with each, against plain fine-tuning on the same pairs.

    python tools/measure_reference_memory.py [--device cuda]

Runs recipes/full_dpo_single_device on a random Llama (24 million parameters, float32) and 64 random pairs of 128
prompt and 64 answer tokens, each run in a process of its own: loss=sft, DPO with reference=cached as it fills the cache
and as it finds it, and with reference=model. Peaks are those of metrics.jsonl: on a GPU what torch has allocated, on
the CPU what the process had resident, Python, its libraries, what allocators keep and the mapped weight file included.
tests/cli/test_plan.py counts the bytes that tensors take instead.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

SIZES = {
    "vocab_size": 16_000, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "embed_dim": 384, "max_seq_len": 512,
    "intermediate_dim": 768,
}  # fmt: skip
RUNS = {  # settings by row of the table
    "loss=sft": ["loss=sft"],
    "reference=cached, filling": ["loss=sigmoid", "reference=cached"],
    "reference=cached, found": ["loss=sigmoid", "reference=cached"],
    "reference=model": ["loss=sigmoid", "reference=model"],
}


def write_inputs(folder: Path, device: str) -> None:
    """Writes a random model with a tokenizer of numbered words, pairs, and a config of all runs."""
    import tokenizers
    import torch
    from safetensors.torch import save_file
    from torchtune.models.convert_weights import tune_to_hf
    from torchtune.models.llama3 import llama3

    torch.manual_seed(0)
    heads = {"num_heads": SIZES["num_heads"], "num_kv_heads": SIZES["num_kv_heads"], "dim": SIZES["embed_dim"]}
    weights = tune_to_hf({name: 0.02 * w for name, w in llama3(**SIZES).state_dict().items()}, **heads)
    base = folder / "base"
    base.mkdir()
    save_file({name: w.contiguous() for name, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": SIZES["vocab_size"],
        "hidden_size": SIZES["embed_dim"], "intermediate_size": SIZES["intermediate_dim"],
        "num_hidden_layers": SIZES["num_layers"], "num_attention_heads": SIZES["num_heads"],
        "num_key_value_heads": SIZES["num_kv_heads"], "max_position_embeddings": SIZES["max_seq_len"],
        "rope_theta": 500_000.0, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
    }))  # fmt: skip
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, SIZES["vocab_size"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(base / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(special))

    rng = random.Random(0)

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(3, SIZES['vocab_size'])}" for _ in range(count))

    with (folder / "pairs.jsonl").open("w") as file:
        for _ in range(64):
            file.write(json.dumps({"prompt": text(127), "chosen": " " + text(63), "rejected": " " + text(63)}) + "\n")
    (folder / "config.yaml").write_text(json.dumps({
        "device": device, "dtype": "fp32", "model": {"_component_": "torchtune.models.llama3.llama3", **SIZES},
        "checkpointer": {"checkpoint_dir": str(base), "model_type": "LLAMA3"},
        "dataset": {"source": str(folder / "pairs.jsonl")}, "max_length": 256, "max_prompt_length": 128,
        "pairs_per_step": 16, "batch_size": 4, "keep_last_n": 0, "samples": {"num_prompts": 0},
    }))  # fmt: skip


def measure(folder: Path, settings: list[str]) -> tuple[float, float]:
    """Runs the recipe in a process of its own; returns peak GiB, and GiB when it began."""
    if "reference=cached" in settings:
        settings = [*settings, f"reference.cache_dir={folder / 'cache'}"]
    command = [sys.executable, __file__, "--worker", str(folder), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def work(folder: Path, settings: list[str]) -> None:
    """Runs the recipe; prints the peak by its last step, before the export, and what the process held at first."""
    from pairtune.process import torchao_names

    torchao_names.quiet()  # before torchao is imported
    import runpy

    from pairtune import config
    from pairtune.process import dist
    from pairtune.run import metrics

    recipe = runpy.run_path(str(ROOT / "recipes" / "full_dpo_single_device.py"))
    overrides = [*settings, f"output_dir={folder / 'run'}"]
    cfg = config.load(recipe["METHOD"], recipe["DEFAULTS"], [folder / "config.yaml"], overrides)
    began = metrics.peak_memory_gib(dist.start(cfg.device).device)
    recipe["main"](cfg)
    print(json.dumps([metrics.read_log(folder / "run" / "metrics.jsonl")[-1]["peak_memory_gib"], began]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args, settings = parser.parse_known_args()
    if args.worker:
        return work(Path(args.worker[0]), args.worker[1:])
    if settings:
        parser.error(f"unknown: {' '.join(settings)}")
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), args.device)
        measured = {name: measure(Path(folder), settings) for name, settings in RUNS.items()}
    plain = measured["loss=sft"][0] - measured["loss=sft"][1]
    print("| full DPO with | peak GiB | GiB of that for the run | of loss=sft's |\n| --- | --- | --- | --- |")
    for name, (peak, began) in measured.items():
        print(f"| `{name}` | {peak:.3f} | {peak - began:.3f} | {(peak - began) / plain:.2f} |")


if __name__ == "__main__":
    main()
