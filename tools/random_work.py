"""What a measurement trains on, made and not downloaded: random models, a tokenizer, pairs of told lengths, in files.

Words are numbered, `w7` is token 7, and 0 and 1 begin and end a text, so that every program that reads these files
sees the same tokens. FLOPs a pair, too, as they are counted of sizes and lengths.

P, C and R tokens of a pair's prompt, chosen and rejected answer, the ends counted.
"""

import json
import math
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

LLAMA = "torchtune.models.llama3.llama3"
_TINY = {"vocab_size": 320, "num_layers": 3, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 128}
MODELS = {  # arguments of LLAMA
    "tiny": {**_TINY, "intermediate_dim": 128, "max_seq_len": 2048, "rope_base": 10_000},
    "small": {
        "vocab_size": 32_000, "num_layers": 4, "num_heads": 8, "num_kv_heads": 8, "embed_dim": 256,
        "intermediate_dim": 688, "max_seq_len": 4096, "rope_base": 10_000,
    },
    "1b": {
        "vocab_size": 128_256, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "embed_dim": 2048,
        "intermediate_dim": 8192, "max_seq_len": 8192, "rope_base": 500_000,
    },
    "8b": {
        "vocab_size": 128_256, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "embed_dim": 4096,
        "intermediate_dim": 14_336, "max_seq_len": 8192, "rope_base": 500_000,
    },
}  # fmt: skip
DTYPES = {"bf16": "BF16", "fp32": "F32"}  # safetensors' names
MIX = "mix"


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def total(self) -> int:
        return sum(self)


def draw_lengths(kind: str | Lengths, count: int, *, scale: float = 1.0, seed: int = 0) -> list[Lengths]:
    """Returns the lengths of `count` pairs: all as told, or of a mix.

    The mix has UltraFeedback's spread: prompts of 20 to 1,000 tokens, half of them under 120, answers of 20 to 900,
    half under 250, log-normal, the two answers of a pair drawn apart.

    Args:
        kind: MIX; "P/C/R", or "~P/C/R" for lengths within a tenth of these; or lengths.
        scale: Of the mix: a tenth for a rehearsal.
    """
    rng = random.Random(seed)
    if kind != MIX:
        one = kind if isinstance(kind, Lengths) else Lengths(*map(int, kind.lstrip("~").split("/")))
        near = 0.1 if kind[0] == "~" else 0.0
        return [Lengths(*(round(n * rng.uniform(1 - near, 1 + near)) for n in one)) for _ in range(count)]

    def draw(median: int, spread: float, most: int) -> int:
        tokens = min(most, max(20, rng.lognormvariate(math.log(median), spread)))
        return max(4, round(scale * tokens))

    return [Lengths(draw(120, 1.0, 1000), draw(250, 0.7, 900), draw(250, 0.7, 900)) for _ in range(count)]


# Files


def write_pairs(path: Path, lengths: Sequence[Lengths], vocabulary: int, seed: int = 0) -> None:
    """Writes rows of prompt, chosen and rejected that have so many tokens; the two answers begin differently."""
    rng = random.Random(seed)
    with path.open("w") as file:
        for prompt, chosen, rejected in lengths:
            answers = {
                "chosen": " " + _text([2, *_draw(rng, chosen - 2, vocabulary)]),
                "rejected": " " + _text([3, *_draw(rng, rejected - 2, vocabulary)]),
            }
            file.write(json.dumps({"prompt": _text(_draw(rng, prompt - 1, vocabulary)), **answers}) + "\n")


def _draw(rng: random.Random, count: int, vocabulary: int) -> list[int]:
    return rng.choices(range(4, vocabulary), k=count)


def _text(ids: Sequence[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def read_ids(row: dict) -> tuple[list[int], list[int], list[int]]:
    """Returns a row's tokens, prompt, chosen and rejected, as the tokenizer makes them."""
    prompt, *answers = ([int(word[1:]) for word in row[name].split()] for name in ("prompt", "chosen", "rejected"))
    return [0, *prompt], *([*answer, 1] for answer in answers)


def write_model(folder: Path, sizes: dict, *, dtype: str = "fp32", device: str = "cpu", num_files: int = 1) -> None:
    """Writes a random Llama in Hugging Face layout, drawn on `device`, and its tokenizer.

    Args:
        sizes: Arguments of LLAMA, as in MODELS.
        num_files: Of weights, filled at the same time.
    """
    write_config(folder, sizes, dtype=dtype)
    files: list[dict] = [{} for _ in range(num_files)]
    shapes = llama_shapes(sizes)
    for name in sorted(shapes, key=lambda name: -math.prod(shapes[name])):
        smallest = min(files, key=lambda file: sum(map(math.prod, file.values())))
        smallest[name] = shapes[name]
    names = [f"model-{i + 1:05d}-of-{num_files:05d}.safetensors" for i in range(num_files)]
    names = names if num_files > 1 else ["model.safetensors"]
    with ThreadPoolExecutor(num_files) as pool:
        sizes_of_files = list(pool.map(lambda file: _write_weights(folder / file[0], file[1], dtype, device),
                                       zip(names, files, strict=True)))  # fmt: skip
    if num_files > 1:
        where = {name: path for path, file in zip(names, files, strict=True) for name in file}
        index = {"metadata": {"total_size": sum(sizes_of_files)}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_config(folder: Path, sizes: dict, *, dtype: str = "fp32") -> None:
    """Writes what a model's folder has besides weights: config.json and the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": sizes["vocab_size"],
        "hidden_size": sizes["embed_dim"], "intermediate_size": sizes["intermediate_dim"],
        "num_hidden_layers": sizes["num_layers"], "num_attention_heads": sizes["num_heads"],
        "num_key_value_heads": sizes["num_kv_heads"], "max_position_embeddings": sizes["max_seq_len"],
        "rope_theta": float(sizes["rope_base"]), "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    _write_tokenizer(folder, sizes["vocab_size"])


def copy_pairs(path: Path, source: str, count: int) -> None:
    """Writes the first `count` rows of a file of pairs as texts: a prompt ends its line."""
    text = Path(source).read_text()
    rows = json.loads(text) if text.lstrip()[0] == "[" else [json.loads(line) for line in text.splitlines()]
    with path.open("w") as file:
        for row in rows[:count]:
            asked = row.get("prompt") or "\n".join(filter(None, (row["instruction"], row.get("input"))))
            pair = {"prompt": f"{asked}\n", "chosen": row["chosen"], "rejected": row["rejected"]}
            file.write(json.dumps(pair) + "\n")


def shapes_of(folder: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a folder's weights by their names, in sorted order."""
    from safetensors import safe_open

    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return dict(sorted(found.items()))


def write_adapter(folder: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> None:
    """Writes fresh adapters of every linear layer, in PEFT's layout: A is drawn, B zero, alpha twice the rank."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator, made, names = torch.Generator().manual_seed(1), {}, set()
    for name, shape in shapes.items():
        if ".layers." in name and len(shape) == 2:
            names.add(name.split(".")[-2])
            where = f"base_model.model.{name.removesuffix('.weight')}"
            made[f"{where}.lora_A.weight"] = torch.randn(rank, shape[1], generator=generator) * shape[1] ** -0.5
            made[f"{where}.lora_B.weight"] = torch.zeros(shape[0], rank)
    save_file(made, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0,
        "target_modules": sorted(names), "bias": "none", "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def llama_shapes(sizes: dict) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a Llama's weights under Hugging Face's names."""
    width, hidden, vocabulary = sizes["embed_dim"], sizes["intermediate_dim"], sizes["vocab_size"]
    kv = width // sizes["num_heads"] * sizes["num_kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    layer = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width),
        "mlp.down_proj": (width, hidden), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    for n in range(sizes["num_layers"]):
        shapes |= {f"model.layers.{n}.{name}.weight": shape for name, shape in layer.items()}
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def _write_weights(path: Path, shapes: dict, dtype: str, device: str) -> int:
    """Fills a mapped file, so that what a GPU has drawn is copied once. Returns its bytes."""
    import torch

    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        size = math.prod(shape) * kind.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": (end, end + size)}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + end)
    content = torch.from_file(str(path), shared=True, size=start + end, dtype=torch.uint8)
    for name, shape in shapes.items():
        first, last = header[name]["data_offsets"]
        value = torch.ones(shape, dtype=kind, device=device)
        if len(shape) > 1:
            generator = torch.Generator(device).manual_seed(sum(name.encode()) * 1000 + first % 997)
            value.normal_(0, shape[1] ** -0.5, generator=generator)
        content[start + first : start + last].view(kind).copy_(value.flatten())
    return end


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))


# What it costs


def body_parameters(sizes: dict) -> int:
    """Returns how many weights the matrices of all layers have."""
    return sum(math.prod(s) for n, s in llama_shapes(sizes).items() if ".layers." in n and len(s) > 1)


def flops_of_pair(sizes: dict, lengths: Lengths, *, full: bool, live: bool) -> float:
    """Returns the operations that a pair takes at least: its prompt once, logits of answers only, nothing twice.

    With T = P + C + R, a forward takes 2 T a weight of the body, 4 A a layer and unit of width for attention, of which
    A = (P + C)^2 / 2 + R P + R^2 / 2 places are seen, and 2 (C + R) a weight of the output layer. A policy takes it
    three times, but twice for weights that are frozen; a live reference once more.
    """
    prompt, chosen, rejected = lengths
    seen = (prompt + chosen) ** 2 / 2 + rejected * prompt + rejected**2 / 2
    body = 2 * body_parameters(sizes) * lengths.total
    attention = 4 * sizes["num_layers"] * sizes["embed_dim"] * seen
    head = 2 * sizes["vocab_size"] * sizes["embed_dim"] * (chosen + rejected)
    times = 3 if full else 2
    return times * body + 3 * attention + times * head + live * (body + attention + head)
