"""What several tests need: small models, random pairs, naive computations."""

import json
import os
import random
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pairtune  # noqa: F401  before torchtune, which may want names that torchao no longer has

# isort: split

import tokenizers
import torch
from safetensors.torch import save_file
from torchtune.models.convert_weights import tune_to_hf
from torchtune.models.llama3 import llama3
from torchtune.models.llama3_2._component_builders import llama3_2
from torchtune.rlhf import get_batch_log_probs

from pairtune import config
from pairtune.run.metrics import read_log

SIZES = {
    "vocab_size": 320,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 64,
    "max_seq_len": 128,
    "intermediate_dim": 96,
    "rope_base": 10_000,
}


def random_pairs(count, *, seed=0, vocabulary=320, prompt=(8, 40), answer=(3, 20), shared=(0, 3)):
    """Pairs of random tokens; the answers begin alike for `shared` tokens and end in token 2."""
    rng = random.Random(seed)

    def tokens(low, high):
        return [rng.randrange(3, vocabulary) for _ in range(rng.randint(low, high))]

    pairs = []
    for row in range(count):
        start = tokens(*shared)
        chosen, rejected = [*start, 3, *tokens(*answer), 2], [*start, 4, *tokens(*answer), 2]
        pairs.append(SimpleNamespace(prompt=[1, *tokens(*prompt)], chosen=chosen, rejected=rejected, row=row))
    return pairs


def tiny_llama(*, seed=0, tied=False, **sizes):
    torch.manual_seed(seed)
    sizes = SIZES | sizes
    if tied:
        sizes.pop("rope_base")
        model = llama3_2(**sizes)
        with torch.no_grad():
            model.tok_embeddings.weight.mul_(0.1)  # as an output layer, unit normal weights give absurd logits
        return model
    return llama3(**sizes)


def padded_logps(model, pairs):
    """What torchtune's recipes compute: every conversation alone in a padded row, all logits; chosen then rejected."""
    conversations = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in conversations)
    tokens = torch.zeros(len(conversations), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, answer) in enumerate(conversations):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return get_batch_log_probs(model(tokens), labels)


ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
}  # of a test's processes
SHARED = ROOT.parent / "shared" / "data"  # real weights, pairs and tokenizers; tests that need them skip without
NF4_SIZES = SIZES | {"embed_dim": 128, "num_kv_heads": 4, "intermediate_dim": 128}  # multiples of 16,384 weights


def save_llama(folder, *, sizes=NF4_SIZES, seed=0):
    """Writes a random Llama in Hugging Face layout with a tokenizer of numbered words: `w7` is token 7."""
    folder.mkdir(parents=True, exist_ok=True)
    heads = {"num_heads": sizes["num_heads"], "num_kv_heads": sizes["num_kv_heads"], "dim": sizes["embed_dim"]}
    weights = tune_to_hf(tiny_llama(seed=seed, **sizes).state_dict(), **heads)
    save_file({k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["embed_dim"],
        "intermediate_size": sizes["intermediate_dim"],
        "num_hidden_layers": sizes["num_layers"],
        "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"],
        "max_position_embeddings": sizes["max_seq_len"],
        "rope_theta": sizes["rope_base"],
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_tokenizer(folder, sizes["vocab_size"])


def save_tokenizer(folder, vocab_size):
    """Writes a tokenizer of numbered words: `w7` is token 7; 1 and 2 are its BOS and end."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, vocab_size)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def save_pairs(path, pairs):
    """Writes random_pairs as prompt, chosen, rejected strings that the tokenizer above reads back as the same ids."""

    def words(ids):
        return " ".join(f"w{i}" for i in ids)

    with path.open("w") as file:
        for pair in pairs:
            answers = {"chosen": " " + words(pair.chosen[:-1]), "rejected": " " + words(pair.rejected[:-1])}
            file.write(json.dumps({"prompt": words(pair.prompt[1:]), **answers}) + "\n")


def run_config(folder, *, sizes=NF4_SIZES, **changes):
    """What the configs of runs in a folder have in common: base/, train.jsonl and held_out.jsonl are there."""
    return {
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "model": {"_component_": "torchtune.models.llama3.llama3", **sizes},
        "checkpointer": {"checkpoint_dir": str(folder / "base"), "model_type": "LLAMA3"},
        "dataset": {"source": str(folder / "train.jsonl")},
        "eval_dataset": {"source": str(folder / "held_out.jsonl")},
        "max_length": 96,
        "max_prompt_length": 64,
        "pairs_per_step": 8,
        "lora": {"rank": 4, "alpha": 8},
        "collective_timeout_s": 240,  # a slow machine compiles for longer than a minute
        **changes,
    }


def run_recipe(name, *overrides, config_paths=()):
    """Runs a recipe's main in this process and returns its metrics.jsonl as objects, from the first step on."""
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"))
    cfg = config.load(recipe["METHOD"], recipe["DEFAULTS"], list(config_paths), list(overrides))
    recipe["main"](cfg)
    return from_first_step(Path(cfg.output_dir) / "metrics.jsonl")


def start_two(program, *words):
    """Runs a program in two processes, and waits for it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(program), *words], env=ENVIRONMENT, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def from_first_step(path):
    """Returns the objects of a metrics.jsonl but the evaluation before the first step."""
    return [row for row in read_log(path) if row["step"]]


# As NF4_SIZES, and cut in four: each matrix has a multiple of 4 x 16,384 weights.
SHARDED_SIZES = SIZES | {"embed_dim": 256, "num_kv_heads": 4, "intermediate_dim": 256}
