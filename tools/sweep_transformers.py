"""Tries every decoder of the installed transformers, alone or with images around it: does it train, and in which way?

    python tools/sweep_transformers.py [TYPE ...] --results FILE --write docs/transformers_types.md

Of each model_type a small random model is made by transformers, saved, opened by pairtune.models.bridge, and compared:
log-probabilities of answers and every parameter's gradient with those of transformers' own model, which reads the
folder by from_pretrained, on each conversation alone, in float32. About 25 minutes on a CPU for all; TYPE ...
tries some. What --results holds already is not tried again.
"""

import argparse
import importlib.metadata
import io
import json
import math
import multiprocessing
import random
import sys
import tempfile
import traceback
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import torch

import pairtune  # noqa: F401  before torchtune
from pairtune import models
from pairtune.config.rules import one_line
from pairtune.errors import UserError
from pairtune.folders.opening import make_ready
from pairtune.folders.weights import ModelFolder, Weights, open_weights
from pairtune.models.bridge.build import class_of, known_types
from pairtune.models.logps import answer_token_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

CPU = World(torch.device("cpu"))
VOCABULARY = 96
LARGEST = 20_000_000  # parameters: a model that is larger was not made small by SMALL
SECONDS = 90  # for one type
LOGPS, GRADIENTS = 1e-5, 1e-4  # of an agreement: nats a token, and of the norm of all gradients
# What a setting is in a small model, by its name; a configuration takes those that it has. Windows and chunks are
# shorter than a conversation, so that they bite.
SMALL = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "emb_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "intermediate_size_mlp", "block_ff_dim", "dff"), 96),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "d_inner"), 96),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 6),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 256),
    **dict.fromkeys(("sliding_window", "local_attention"), 5),
    **dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"), 2
    ),
    **dict.fromkeys(("router_top_k", "moe_router_topk", "num_key_value_heads", "max_window_layers"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "moe_layer_freq"), 1),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size", "q_lora_rank"), 32),
    **dict.fromkeys(("head_dim", "global_head_dim", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("index_head_dim", "mamba_d_state", "mamba_d_head", "mamba_head_dim", "ssm_state_size"), 16),
    **dict.fromkeys(("state_size", "qk_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "mamba_n_heads", "mamba_num_heads", "chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank", "laurel_rank", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "n_groups", "mamba_expand", "index_n_heads"), 2),
    **dict.fromkeys(("embed_dim", "out_hidden_size", "vision_output_dim", "projector_input_dim"), 64),  # of images
    **dict.fromkeys(("depth", "mm_tokens_per_image"), 4),
    "image_size": 56,
    **dict.fromkeys(("is_decoder", "causal"), True),  # of those that can be encoders, too
    "attention_chunk_size": 6,
    "linear_num_value_heads": 4,
    "mamba_d_ssm": 128,
    "moe_num_shared_experts": 1,
    "num_kv_shared_layers": 2,
    "conv_L_cache": 3,
    "index_topk": 64,
    "zero_expert_num": 0,
    "use_sliding_window": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING, CONVOLUTION, LINEAR = (
    {"layer_types": [kind, "full_attention"] * 3} for kind in ("sliding_attention", "conv", "linear_attention")
)
ROPE = {"rope_type": "default", "rope_theta": 1e4}
# Where a family wants more than that its settings are small; None: the setting is left out.
MORE = {
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text", "qwen3", "cohere_compass_text"), SLIDING),
    "gemma3n_text": SLIDING | {"activation_sparsity_pattern": None},
    **dict.fromkeys(("lfm2", "lfm2_moe", "lfm3"), CONVOLUTION),
    "lfm2_moe": CONVOLUTION | {"num_dense_layers": 1},
    "granitemoehybrid": LINEAR,
    "bamba": {"attn_layer_indices": [1, 3, 5]},
    "falcon": {"head_dim": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "smollm3": {"layer_types": ["full_attention"] * 6, "no_rope_layers": [1, 1, 0, 1, 1, 0]},
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe"), {"head_dim": 16}),
    "ministral": {"head_dim": 16, "sliding_window": 5},
    "mamba2": {"head_dim": 16, "num_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
    "big_bird": {"attention_type": "original_full"},
    "rwkv": {"rescale_every": 0},
    "kimi_linear": {"num_hidden_layers": 2},
    "prophetnet": {"num_hidden_layers": None},
    "xlm": {"is_encoder": False},
    "zamba": {"tie_word_embeddings": False},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2, "num_hidden_layers": 2, "num_heads": 2, "v_head_dim": None,
              "qk_head_dim": None},
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 3, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4, "hc_lowrank": 8,
    },
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "linear_attention", "hybrid",
                                     "linear_attention"]},
    "cohere_compass_text": SLIDING | {"rope_parameters": dict.fromkeys(SLIDING["layer_types"], ROPE)},
    # Inside of models with images: positions of three kinds, and what their sizes are lists of.
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_ocr_text", "paddleocr_vl_text",
                     "qwen2_5_omni_text"), {"rope_parameters": ROPE | {"mrope_section": [2, 3, 3]}}),
    "glm4v_moe_text": {"rope_parameters": ROPE | {"mrope_section": [1, 1, 2], "partial_rotary_factor": 0.5}},
    "ernie4_5_vl_moe_text": {"moe_intermediate_size": [32, 32]},
    "granite4_vision": {"deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], "downsample_rate": "4/8"},
}  # fmt: skip


@dataclass
class Result:
    """What came of one model_type.

    Attributes:
        way: shared, dense (shared, by a tensor of all pairs of a row's tokens), apart, refused, or not made.
        logps: Largest difference of a token's log-probability, in nats.
        gradients: Norm of the difference of all gradients, divided by their norm.
        said: Why it was refused, or not made.
    """

    model_type: str
    way: str
    logps: float = math.nan
    gradients: float = math.nan
    said: str = ""

    @property
    def is_wrong(self) -> bool:
        """Whether it would train, and not as it computes alone."""
        return self.way in ("shared", "dense", "apart") and not (self.logps <= LOGPS and self.gradients <= GRADIENTS)


def small_config(model_type: str):
    """Returns a configuration of a few thousand parameters."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type](**small_settings(CONFIG_MAPPING[model_type]))


def small_settings(kind: type) -> dict:
    """Returns the settings that make a small configuration of a class; of its blocks of images or sound, too."""
    from transformers import CONFIG_MAPPING

    known = kind().to_dict()
    settings = {key: value for key, value in SMALL.items() if key in known or hasattr(kind, key)}
    for key in ("sliding_window", "head_dim", "num_local_experts"):
        if key in known and known[key] is None:
            settings.pop(key, None)
    if "kv_lora_rank" in known:
        settings |= {"head_dim": 8, "num_key_value_heads": 4, "qk_head_dim": 24}
    for name in kind.sub_configs:
        if of_block := (known.get(name) or {}).get("model_type"):
            settings[name] = {"model_type": of_block} | small_settings(CONFIG_MAPPING[of_block])
    settings |= MORE.get(kind.model_type, {})
    return {key: value for key, value in settings.items() if value is not None}


def random_pairs(count: int = 3) -> list[SimpleNamespace]:
    """Returns pairs of random tokens, of different lengths."""
    rng = random.Random(0)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))]

    return [
        SimpleNamespace(prompt=tokens(8, 20), chosen=[3, *tokens(4, 12)], rejected=[4, *tokens(4, 12)], row=row)
        for row in range(count)
    ]


def save(model_type: str, folder: Path) -> torch.nn.Module:
    """Writes a small random model and returns it, as transformers computes it."""
    config = small_config(model_type)
    kind = class_of(config)  # with what it has for images: what a folder of such a type holds
    with torch.device("meta"):
        size = sum(p.numel() for p in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: its settings have other names")
    torch.manual_seed(0)
    peer = kind._from_config(small_config(model_type), attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.7 * parameter.shape[-1] ** -0.5)
            elif name.endswith("sinks"):
                parameter.normal_()
            elif name.endswith("q_norm.weight") and model_type.startswith("gemma4"):
                parameter.mul_(0.25)  # which scales its scores, and nothing else does
        for module in peer.modules():
            if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx] = 0  # as it has been since their training; Youtu's is made so
    peer.save_pretrained(folder)
    return kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def alone(peer: torch.nn.Module, pairs: list) -> torch.Tensor:
    """Returns each answer token's log-probability, by transformers' model on each conversation alone."""
    found = []
    for name in ("chosen", "rejected"):
        for pair in pairs:
            answer = getattr(pair, name)
            logits = peer(input_ids=torch.tensor([pair.prompt + answer]), use_cache=False).logits[0]
            scores = logits[len(pair.prompt) - 1 : -1].log_softmax(-1)
            found.append(scores.gather(-1, torch.tensor(answer)[:, None])[:, 0])
    return torch.cat(found)


def gradients(model: torch.nn.Module, logps: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the gradients of a weighted sum of log-probabilities, by the parameters' names."""
    weights = torch.randn(len(logps), generator=torch.Generator().manual_seed(1))
    (logps * weights).sum().backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}


def opened(folder: Path, pairs: list) -> tuple[torch.nn.Module, ModelFolder]:
    """Returns a folder's model here, in the way in which it may take these pairs, and the folder."""
    component = {"_component_": "pairtune.models.bridge.causal_lm", "path": str(folder)}
    files = open_weights({"checkpoint_dir": str(folder), "model_type": "AUTO"}, component)
    model = models.full(component, dtype="fp32")
    models.disable_dropout(model)
    make_ready(model, files.config, max_length=64)
    models.load(model, Weights(files), world=CPU)
    with redirect_stdout(io.StringIO()):
        models.settle(model, pairs, CPU)
    return model, files


def try_type(model_type: str, folder: Path) -> Result:
    """Returns what comes of one model_type."""
    try:
        peer, pairs = save(model_type, folder), random_pairs()
    except Exception as error:
        return Result(model_type, "not made", said=f"{type(error).__name__}: {one_line(error)}"[:160])
    try:
        expected = alone(peer, pairs)
        wanted = gradients(peer, expected)
    except Exception as error:  # then nothing here may train, either
        expected = error
    try:
        model, files = opened(folder, pairs)
    except UserError as error:
        return Result(model_type, "refused", said=one_line(error).replace(str(folder), "FOLDER")[:240])
    if isinstance(expected, Exception):
        raise expected
    logps = answer_token_logps(model, lay_out(pairs))
    found = gradients(model, logps)
    ours = (files.family.to_ours(name, value, files.config) for name, value in wanted.items())
    wanted = {name: value for of_one in ours for name, value in of_one.items()}
    off = sum(float((found[name] - value).square().sum()) for name, value in wanted.items())
    norm = sum(float(value.square().sum()) for value in wanted.values())
    how = model.pairtune.sharing
    way = "apart" if not how.prompts else "dense" if how.dense else "shared"
    return Result(model_type, way, float((logps - expected).abs().max()), math.sqrt(off / norm))


def table(results: list[Result]) -> str:
    """Returns the page."""
    version, counts = importlib.metadata.version("transformers"), {}
    for result in results:
        counts.setdefault(result.way, []).append(result.model_type)
    told = ", ".join(f"{len(names)} {way}" for way, names in sorted(counts.items()))
    lines = [
        "# Every decoder of transformers\n",
        "Made by `python tools/sweep_transformers.py --write docs/transformers_types.md`, with transformers",
        f"{version}: a small random model of each `model_type`, with what it has for images or sound, scored and",
        "differentiated by [the bridge](transformers.md) and by transformers on each conversation alone, in float32.",
        "Differences are the largest of a token's log-probability, in nats, and the norm of that of all gradients,",
        f"over their norm. Of {len(results)} types: {told}. `tests/models/test_bridge_types.py` repeats some rows.\n",
        "shared: both answers follow one prompt; dense: the same, with attention over all pairs of a row's tokens;",
        "apart: each answer has a prompt of its own; refused: in a sentence, before training; not made: no small model",
        "came of the tool's settings, so that nothing is known of the type.\n",
        "| model_type | way | log-probabilities | gradients | |",
        "| --- | --- | --- | --- | --- |",
    ]
    for r in sorted(results, key=lambda r: r.model_type):
        numbers = ("", "") if math.isnan(r.logps) else (f"{r.logps:.1e}", f"{r.gradients:.1e}")
        lines.append(f"| {r.model_type} | {r.way} | {numbers[0]} | {numbers[1]} | {r.said.replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def result_of(model_type: str, pipe) -> None:
    """Sends what comes of one model_type: in a process of its own, which may be ended."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            pipe.send(try_type(model_type, Path(folder)))
        except Exception:
            traceback.print_exc()
            pipe.send(Result(model_type, "traceback", said=traceback.format_exc().splitlines()[-1]))


def within_limit(model_type: str) -> Result:
    """Returns what comes of one model_type, or that it takes too long."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=result_of, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        found = ours.recv() if ours.poll(SECONDS) else Result(model_type, "cut off", said=f"more than {SECONDS} s")
    except EOFError:
        found = Result(model_type, "traceback", said="the process ended")
    process.kill()
    process.join()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE")
    parser.add_argument("--results", metavar="FILE", type=Path, help="JSON Lines, added to; types in it are skipped")
    parser.add_argument("--write", metavar="PAGE", type=Path, help="the page to write the table to")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    known = args.results.read_text().splitlines() if args.results and args.results.exists() else []
    results = {result.model_type: result for result in (Result(**json.loads(line)) for line in known)}
    for model_type in args.types or sorted(known_types()):
        if model_type in results:
            continue
        results[model_type] = within_limit(model_type)
        line = json.dumps(asdict(results[model_type]))
        print(line, flush=True)
        if args.results:
            with args.results.open("a") as file:
                file.write(line + "\n")
    if args.write:
        args.write.write_text(table(list(results.values())))
    if wrong := [r.model_type for r in results.values() if r.is_wrong or r.way in ("traceback", "cut off")]:
        sys.exit(f"wrong, or without a sentence: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
