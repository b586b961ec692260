"""Whether programs that serve exports compute what pairtune does: llama.cpp by GGUF files, and vLLM on a GPU.

python tools/check_consumers.py --env /tmp/consumers                       # runs of tiny random models, made here
python tools/check_consumers.py --env /tmp/consumers runs/mine runs/other  # of runs of yours

Each program has an environment of its own in --env, which is made on the first call (llama.cpp is compiled: minutes).
Printed is the table of docs/run_folder.md: log-probabilities of random answers, and greedy tokens, beside pairtune's
on the same export, in float32. Status 1 if a program in float32 differs by more than rounding.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import consumers_env
import torch

from pairtune.process import torchao_names

ROUNDING = 1e-4  # nats a token: products are summed in another order
NUM_NEW, VOCABULARY = 24, 320
MODELS = {  # transformers' names of families, and what a tiny one has beside the sizes of all
    "Llama": {"rope_theta": 10_000.0},
    "Qwen3": {"head_dim": 32},
    "Gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 16},
}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128, "bos_token_id": 1,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
RUNS = {  # a recipe and what it is told
    "LoRA, merged": ("lora", []),
    "full": ("full", ["optimizer.lr=1e-3"]),
    "QLoRA, merge_into=original": ("qlora", ["merge_into=original"]),
    "QLoRA, merge_into=dequantized": ("qlora", ["merge_into=dequantized"]),
}


@dataclass(frozen=True)
class Numbers:
    """Of several answers: their sums of log-probabilities, and greedy tokens after each prompt."""

    logps: list[float]
    tokens: list[list[int]]

    def against(self, ours: "Numbers", lengths: list[int]) -> tuple[float, int]:
        """Returns the largest difference, nats a token, and how many greedy answers are the same."""
        pairs = zip(self.logps, ours.logps, lengths, strict=True)
        largest = max(abs(a - b) / length for a, b, length in pairs)
        return largest, sum(a == b for a, b in zip(self.tokens, ours.tokens, strict=True))


def sequences(vocabulary: int, count: int = 6) -> list[tuple[list[int], list[int]]]:
    """Returns random prompts and answers, in tokens; the first is a begin token."""
    rng = torch.Generator().manual_seed(0)
    draw = lambda n: torch.randint(3, vocabulary, (n,), generator=rng).tolist()  # noqa: E731
    return [([1, *draw(8 + 4 * n)], draw(12)) for n in range(count)]


def ours(export: Path, asked: list[tuple[list[int], list[int]]]) -> Numbers:
    """Returns what pairtune computes of an export, in float32 on the CPU."""
    from types import SimpleNamespace

    from pairtune.cli.asking import Asked, Model
    from pairtune.models.generation import answers
    from pairtune.models.logps import answer_logps
    from pairtune.pairs.batch import lay_out

    model = Model(Asked(export, overrides=["dtype=fp32", "device=cpu"]))
    pairs = [SimpleNamespace(prompt=p, chosen=a, rejected=a, row=n) for n, (p, a) in enumerate(asked)]
    with torch.inference_mode():
        logps = [answer_logps(model._model, lay_out([pair]))[0].item() for pair in pairs]
        how = {"world": model.world, "stop_ids": [], "max_new_tokens": NUM_NEW, "batch_size": 1}
        return Numbers(logps, answers(model._model, [prompt for prompt, _ in asked], **how))


def make(folder: Path, name: str, python: Path) -> None:
    """Writes a tiny random model with the tokenizers of both sides: words for ours, sentencepiece's for converters."""
    import tokenizers
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **MODELS[name])
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.08)
        if name.startswith("Gemma"):  # so large, and the output, too, that a token would be followed by itself
            model.model.embed_tokens.weight.mul_(0.2)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    told = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (text := folder.parent / "text.txt").write_text(
        "\n".join(f"{a}{b} {b}{c}" for a in "abcdefgh" for b in "aeiou" for c in "klmnst")
    )
    consumers_env.ask(
        python, program="sentencepiece", model=str(folder / "tokenizer"), vocab_size=VOCABULARY, text=str(text)
    )
    (folder / "tokenizer.vocab").unlink()


def train(folder: Path, base: Path, name: str) -> Path:
    """Trains a model for two steps by a recipe; returns the run's export."""
    method, words = RUNS[name]
    rng = torch.Generator().manual_seed(1)
    draw = lambda n: " ".join(f"w{i}" for i in torch.randint(3, VOCABULARY, (n,), generator=rng).tolist())  # noqa: E731
    rows = [{"prompt": draw(8), "chosen": f" {draw(6)}", "rejected": f" {draw(6)}"} for _ in range(8)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = folder / f"{base.name} {name}"
    command = [sys.executable, "-m", "pairtune.cli", "run", f"{method}_dpo_single_device", *words]
    command += [f"checkpointer.checkpoint_dir={base}", f"dataset.source={folder / 'pairs.jsonl'}", "dtype=fp32"]
    command += [f"output_dir={run}", "pairs_per_step=4", "max_length=64", "max_prompt_length=32", "device=cpu"]
    command += [] if words and "lr" in words[0] else ["optimizer.lr=1e-2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return run / "export"


def exports(args: argparse.Namespace, folder: Path, python: Path):
    """Yields what is checked: a name and an export each."""
    for path in args.runs:
        yield path.name, path / "export" if (path / "export").is_dir() else path
    for name in () if args.runs else MODELS:
        make(folder / name, name, python)
        for run in RUNS:
            yield f"{name}, {run}", train(folder, folder / name, run)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", type=Path, nargs="*", metavar="RUN", help="runs or exports of yours; default: tiny ones"
    )
    parser.add_argument("--env", type=Path, required=True, help="where environments are, or are made")
    args = parser.parse_args()
    torchao_names.quiet()
    python, converter = consumers_env.llama_cpp(args.env / "llama_cpp")
    try:
        vllm = consumers_env.vllm(args.env / "vllm")
    except SystemExit as error:
        vllm = None
        print(f"vLLM was not run: {error}")
    print("| export | program | nats a token, at most | the same greedy answers |\n| --- | --- | --- | --- |")
    is_wrong, versions = False, set()
    with tempfile.TemporaryDirectory() as name:
        for title, export in exports(args, Path(name), python):
            vocabulary = json.loads((export / "config.json").read_text())["vocab_size"]
            asked = sequences(vocabulary)
            expected, lengths = ours(export, asked), [len(answer) for _, answer in asked]
            programs = {}
            for kind in ("f32", "q8_0"):
                target = Path(name) / f"model-{kind}.gguf"
                consumers_env.convert(python, converter, export, target, kind)
                programs[f"llama.cpp, {kind}"] = python, {"program": "llama_cpp", "model": str(target)}
            if vllm:
                programs["vLLM, float32"] = vllm, {"program": "vllm", "model": str(export)}
            for program, (of, how) in programs.items():
                said = consumers_env.ask(of, **how, sequences=asked, num_new=NUM_NEW)
                largest, same = Numbers(said["logps"], said["tokens"]).against(expected, lengths)
                versions.add(f"{program.partition(',')[0]} by {how['program']} {said['version']}")
                is_exact = "32" in program
                is_wrong |= is_exact and (largest > ROUNDING or same < len(asked))
                print(f"| {title} | {program} | {largest:.1e} | {same} of {len(asked)} |", flush=True)
    print(f"{', '.join(sorted(versions))}, torch {torch.__version__}")
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
