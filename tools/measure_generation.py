"""Times `tune generate` beside transformers' generate: the same model, prompts and greedy tokens, each in turn.

python tools/measure_generation.py                # a random model of SmolLM2 135M's shape
python tools/measure_generation.py FOLDER --batch-size 8 --new-tokens 512 --dtype bf16 --compile
"""

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from pairtune import config, models
from pairtune.cli.alone import overrides_of, without_pairs
from pairtune.folders import weights
from pairtune.folders.opening import make_ready
from pairtune.models import decoding, execution
from pairtune.models.generation import answers
from pairtune.process import dist


def make(folder: Path) -> None:
    """Writes a random model of SmolLM2 135M's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    shape |= {"num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, rope_theta=1e5)).save_pretrained(folder)


def ours(folder: Path, dtype: str, device: str, *, compiled: bool = False, base_dtype: str | None = None):
    """Returns a function from prompts and a number to answers, as `tune generate` gives them."""
    name = "qlora" if base_dtype else "full"
    method, defaults = without_pairs(f"{name}_dpo_single_device")
    words = [*overrides_of(folder), f"dtype={dtype}", f"device={device}"]
    cfg = config.load(method, defaults, [], words)
    world = dist.alone(cfg.device)
    files = weights.open_weights(cfg.checkpointer, cfg.model)
    fewer_bits = {"base_dtype": base_dtype} if base_dtype else {}
    model = models.policy(name, cfg.model, {**cfg.lora} if base_dtype else None, dtype=cfg.dtype, **fewer_bits)
    make_ready(model, files.config, 1)
    models.load(model, weights.Weights(files), world=world)
    if compiled:
        decoding.check(model)
        execution.execute(model, execution.Execution("mask", compile=True))
    how = {"world": world, "stop_ids": [], "batch_size": 10**6, "fixed_shapes": compiled}
    return torch.inference_mode()(lambda prompts, count: answers(model, prompts, **how, max_new_tokens=count))


def theirs(folder: Path, dtype: str, device: str):
    """Returns the same of transformers, as it is when it is loaded."""
    from transformers import AutoModelForCausalLM

    found = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu" if device == "auto" else device
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind).to(found).eval()
    model.generation_config.eos_token_id = None

    def answer(prompts, count):
        tokens = torch.tensor(prompts, device=found)
        how = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **how)[:, tokens.shape[1] :].tolist()

    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="ours with compile=true, beside ours without it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = args.folder or Path(name) / "model"
        if args.folder is None:
            make(folder)
        systems = {"pairtune": ours, "transformers": theirs}
        systems |= {"compiled": partial(ours, compiled=True)} if args.compile else {}
        systems = {system: opened(folder, args.dtype, args.device) for system, opened in systems.items()}
    vocabulary = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 1000, (args.batch_size, args.prompt_tokens), generator=vocabulary).tolist()
    first = {system: answer(prompts, args.new_tokens) for system, answer in systems.items()}
    same = sum(len({*map(tuple, answers)}) == 1 for answers in zip(*first.values(), strict=True))
    print(f"{same} of {len(prompts)} answers are the same tokens", flush=True)
    took: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(args.turns):
        for system, answer in systems.items():
            began = time.process_time() if not torch.cuda.is_available() else time.monotonic()
            answer(prompts, args.new_tokens)
            ended = time.process_time() if not torch.cuda.is_available() else time.monotonic()
            took[system].append(ended - began)
    tokens, clock = args.batch_size * args.new_tokens, "s" if torch.cuda.is_available() else "CPU s"
    for system, times in took.items():
        least, median, most = min(times), statistics.median(times), max(times)
        print(f"{system:<13} {tokens / median:8.1f} tokens a {clock} ({tokens / most:.1f} to {tokens / least:.1f})")
    for system in took.keys() - {"transformers"}:
        ratio = statistics.median(took["transformers"]) / statistics.median(took[system])
        print(f"{system} takes 1/{ratio:.2f} of transformers' time")


if __name__ == "__main__":
    main()
