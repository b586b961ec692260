"""Sliding windows and capped scores and logits are those of transformers, in training and in answers."""

import json
import subprocess
import sys
from pathlib import Path

import hf_peers
import pytest
import torch
import transformers
import windows_worker
from helpers import ENVIRONMENT, NF4_SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs, tiny_llama

from pairtune import models
from pairtune.config.architectures import check_config
from pairtune.errors import UserError
from pairtune.folders.check_model import check_model, windows
from pairtune.folders.families import FAMILIES as FAMILY
from pairtune.models import attention, gemma2, generation, logps, visibility
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

ONE = World(torch.device("cpu"))
BACK_ENDS = ("segments", "mask")
SIZES = {
    "vocab_size": 320, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 72, "intermediate_dim": 96,
    "max_seq_len": 128,
}  # fmt: skip
THEIRS = {
    "vocab_size": 320, "hidden_size": 72, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "initializer_range": 0.2,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "attn_implementation": "eager",
}  # fmt: skip
EPS = {"norm_eps": 1e-6, "rope_base": 10_000}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 24}
# Of each: transformers' name, what its config says of windows, our component, and each layer's window.
FAMILIES = {
    "mistral": ("Mistral", {"sliding_window": 8}, {"_component_": "torchtune.models.mistral.mistral", **EPS}, [8] * 4),
    "mixtral": (
        "Mixtral",
        {"sliding_window": 8, "num_local_experts": 4},
        {"_component_": "pairtune.mixtral.mixtral", "num_experts": 4, "norm_eps": 1e-6},
        [8] * 4,
    ),
    "phi3": ("Phi3", {"sliding_window": 8}, {"_component_": "torchtune.models.phi3.phi3", **EPS}, [8] * 4),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
        {"_component_": "torchtune.models.qwen2.qwen2", **EPS},
        [None, None, 8, 8],
    ),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 8, "head_dim": 32, "tie_word_embeddings": True, **CAPS},
        {"_component_": "pairtune.gemma2.gemma2", "head_dim": 32, **CAPS},
        [8, None, 8, None],
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


TABLES = {
    "gemma2": FAMILY["GEMMA2"],
    "mistral": FAMILY["MISTRAL"],
    "mixtral": FAMILY["MIXTRAL"],
    "phi3": FAMILY["PHI3_MINI"],
    "qwen2": FAMILY["QWEN2"],
}


def their_model(family):
    name, settings, *_ = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**THEIRS | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.2)  # no two norms alike
    return model


def our_weights(family, weights, config):
    """Weights of transformers' model, or their gradients, in our order and by our names."""
    table = TABLES[family]
    return {k: v for name, value in weights.items() for k, v in table.to_ours(name, value, config).items()}


def our_model(family, theirs, *, back_end="segments", lora=None, **prepared):
    component, config = SIZES | FAMILIES[family][2], theirs.config.to_dict()
    check_config(config, "config.json")
    model = models.lora(component, **lora, dtype="fp32") if lora else models.full(component, dtype="fp32")
    check_model(model, config)
    layers = windows(config, len(model.layers))
    models.prepare(model, max_length=128, attention=back_end, windows=layers, **prepared)
    models.load(model, our_weights(family, theirs.state_dict(), config), world=ONE)
    return model


def long_pairs(count=3):
    return random_pairs(count, prompt=(20, 45), answer=(12, 25))


def their_logps(model, pairs):
    """Every conversation alone in a row; chosen then rejected."""
    values = []
    for prompt, answer in [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]:
        logps = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        values.append(logps[len(prompt) - 1 : -1].gather(-1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(values)


def gradients(model, values, upstream):
    model.zero_grad()
    (values * upstream).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_log_probabilities_and_gradients_are_those_of_transformers(family, back_end, checkpointed):
    theirs, pairs, upstream = their_model(family), long_pairs(), torch.randn(6)
    expected = their_logps(theirs, pairs)
    wanted = our_weights(family, gradients(theirs, expected, upstream), theirs.config.to_dict())
    model = our_model(family, theirs, back_end=back_end, checkpoint_activations=checkpointed)
    assert model.pairtune.windows == FAMILIES[family][3]
    for row_length in (None, 128, 256):
        values = torch.cat(logps.answer_logps(model, lay_out(pairs, row_length)))
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=0)
        found = {models.plain_name(name): g for name, g in gradients(model, values, upstream).items()}
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            assert (gradient - wanted[name]).norm() / wanted[name].norm() < 1e-4, name


def test_windows_and_caps_are_not_for_nothing(family):
    """What the test above finds equal is far from a model without them."""
    theirs, pairs = their_model(family), long_pairs()
    expected, model = their_logps(theirs, pairs), our_model(family, theirs)
    logps.install(model)
    assert (torch.cat(logps.answer_logps(model, lay_out(pairs))) - expected).abs().max() > 1


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_pair_alone_equals_itself_packed(family, back_end):
    model, pairs = our_model(family, their_model(family), back_end=back_end).double(), long_pairs(4)
    alone = torch.stack([torch.cat(logps.answer_logps(model, lay_out([p]))) for p in pairs])
    for row_length in (None, 130, 300):
        packed = torch.cat(logps.answer_logps(model, lay_out(pairs, row_length))).view(2, 4).T
        torch.testing.assert_close(packed, alone, atol=1e-9, rtol=0)


@pytest.mark.parametrize("window", [1, 2, 9, 24, 33, 200])
def test_back_ends_agree_at_any_window(window):
    """Windows shorter and longer than tails, and as long as prompt or conversation."""
    model, pairs = our_model("mistral", their_model("mistral")).double(), long_pairs()
    found = []
    for back_end in BACK_ENDS:
        logps.install(model, back_end, [window, None, window, None])
        values = torch.cat(logps.answer_logps(model, lay_out(pairs)))
        found.append((values, gradients(model, values, torch.ones(6))))
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-9)


def test_a_window_that_no_conversation_fills_costs_no_mask():
    model, batch = our_model("mistral", their_model("mistral")), lay_out(long_pairs())
    logps.install(model, "segments", [400] * 4)
    without = visibility.dense_masks(batch, [])
    assert visibility.dense_masks(batch, [400]).keys() == without.keys()
    with torch.no_grad():
        values = torch.cat(logps.answer_logps(model, batch))
        logps.install(model, "segments")
        assert torch.equal(values, torch.cat(logps.answer_logps(model, batch)))


def test_answers_are_transformers_greedy_ones_past_the_window(family):
    """Prompts of several lengths share a batch: padding is on the left, and is no part of a window."""
    theirs = their_model(family)
    model, prompts = our_model(family, theirs), [p.prompt for p in random_pairs(3, prompt=(3, 30))]
    expected = []
    for prompt in prompts:
        tokens = theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False)[0, len(prompt) :].tolist()
        expected.append([t for t in tokens if t != 2])
    assert generation.answers(model, prompts, world=ONE, stop_ids=[2], max_new_tokens=24) == expected
    tokens = torch.tensor([prompts[0]])
    with torch.no_grad():  # as it is, without mask or cache
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_compiled_layers_have_their_windows_and_caps(monkeypatch):
    """Traced and differentiated as by default; code is not generated, which takes half a minute here."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")
    theirs, pairs, upstream = their_model("gemma2"), long_pairs(2), torch.randn(4)
    found = []
    for compiled in (False, True):
        model = our_model("gemma2", theirs, back_end="auto", compile_layers=compiled, checkpoint_activations=True)
        values = torch.cat(logps.answer_logps(model, lay_out(pairs, 256)))
        found.append((values, gradients(model, values, upstream)))
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_two_processes_compute_what_one_does(tmp_path):
    """On a Gemma 2 that FSDP2 shards, with checkpointed activations."""
    worker, path = Path(__file__).with_name("windows_worker.py"), tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(worker), str(path)], env=ENVIRONMENT, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [(method, back_end) for method in ("full", "lora") for back_end in BACK_ENDS]
    for case, result in zip(cases, json.loads(path.read_text()), strict=True):
        expected = windows_worker.measure(*case, ONE)
        assert len(expected) > 20 and result == pytest.approx(expected, rel=1e-4), case


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_recipes_train_with_the_window_of_config_json(tmp_path, method):
    """Before its first update a policy is its base, which the log's first line tells the log-probabilities of."""
    save_llama(tmp_path / "base")
    path, pairs = tmp_path / "base" / "config.json", random_pairs(8, prompt=(20, 40), answer=(12, 20))
    config = json.loads(path.read_text()) | {"model_type": "mistral", "sliding_window": 8}
    path.write_text(json.dumps(config))
    for name in ("train", "held_out"):
        save_pairs(tmp_path / f"{name}.jsonl", pairs)
    component = {"_component_": "torchtune.models.mistral.mistral", **NF4_SIZES}
    cfg = run_config(
        tmp_path, model=component, checkpointer={"checkpoint_dir": str(path.parent), "model_type": "MISTRAL"},
        max_steps=1, samples={"num_prompts": 0}, keep_last_n=0,
    )  # fmt: skip
    if method == "full":
        del cfg["lora"]
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    log = run_recipe(f"{method}_dpo_single_device", config_paths=[tmp_path / "config.yaml"])
    found = next(row["logps/chosen"] for row in log if "logps/chosen" in row)
    by_window = {}
    for window in (8, None):
        if method == "full":
            model = models.full(component, dtype="fp32")
        else:
            model = models.lora(component, **LORA, dtype="fp32", quantize_base=method == "qlora")
        models.prepare(model, max_length=128, windows=[window] * NF4_SIZES["num_layers"])
        models.load(model, tiny_llama(**NF4_SIZES).state_dict(), world=ONE)
        with torch.no_grad():
            by_window[window] = float(logps.answer_logps(model, lay_out(pairs))[0].mean())
    assert found == pytest.approx(by_window[8], rel=1e-5)
    assert found != pytest.approx(by_window[None], rel=1e-3)


# What a config.json says


QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "llama", "sliding_window": 16}, [None] * 4),
        ({"model_type": "gemma"}, [None] * 4),
        ({"model_type": "mistral"}, [4096] * 4),
        ({"model_type": "mistral", "sliding_window": None}, [None] * 4),
        ({"model_type": "mixtral"}, [None] * 4),
        ({"model_type": "mixtral", "sliding_window": 16}, [16] * 4),
        ({"model_type": "phi3"}, [None] * 4),
        ({"model_type": "phi3", "sliding_window": 2047}, [2047] * 4),
        (QWEN, [None, None, None, 16]),
        (QWEN | {"max_window_layers": 0}, [16] * 4),
        (QWEN | {"use_sliding_window": False}, [None] * 4),
        (QWEN | {"model_type": "qwen3", "max_window_layers": 2}, [None, None, 16, 16]),
        (QWEN | {"layer_types": ["sliding_attention", "full_attention"] * 2}, [16, None, 16, None]),
        ({"model_type": "gemma2", "sliding_window": 16}, [16, None, 16, None]),
        ({"model_type": "gemma2", "layer_types": ["full_attention", "sliding_attention"] * 2}, [None, 4096] * 2),
    ],
)
def test_windows_are_read_as_transformers_reads_them(config, expected):
    check_config(config | {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 4}, "config.json")
    assert windows(config, 4) == expected
    if config["model_type"] in ("llama", "gemma"):
        return
    theirs = transformers.AutoConfig.for_model(**config, num_hidden_layers=4)
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * 4
    assert [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds] == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_types": ["sliding_attention"] * 3}, "has 3 entries.*4 layers"),
        ({"layer_types": ["chunked_attention"] * 4}, "chunked_attention.*sliding_attention or full_attention"),
    ],
)
def test_layer_types_that_nobody_computes_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        windows(QWEN | change, 4)


@pytest.mark.parametrize("change", [{"sliding_window": "16"}, {"sliding_window": 0}, {"layer_types": [1]}])
def test_windows_of_the_wrong_kind_are_refused(change):
    needed = {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    with pytest.raises(UserError, match=next(iter(change))):
        check_config(needed | change, "config.json")


def test_a_mistral_with_layer_types_is_the_ministral_that_transformers_makes_of_it(tmp_path):
    kinds = ["full_attention", "sliding_attention"] * 2
    said = THEIRS | {"layer_types": kinds, "sliding_window": 8, "head_dim": 18}
    hf_peers.save_peer(tmp_path, transformers.MinistralConfig(**said))
    config = json.loads((tmp_path / "config.json").read_text()) | {"model_type": "mistral"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    peer, pairs = hf_peers.load_peer(tmp_path), long_pairs()
    assert peer.config.model_type == "ministral"
    component = SIZES | FAMILIES["mistral"][2]
    model = hf_peers.load_ours(hf_peers.open_folder(tmp_path, "MISTRAL"), component)
    torch.testing.assert_close(hf_peers.our_logps(model, pairs), hf_peers.peer_logps(peer, pairs), rtol=1e-5, atol=0)


# Gemma 2


def test_gemma_2s_weights_go_to_ours_and_back_unchanged():
    theirs = their_model("gemma2")
    config = theirs.config.to_dict()
    ours = our_weights("gemma2", theirs.state_dict(), config)
    assert ours.keys() == dict(our_model("gemma2", theirs).named_parameters()).keys()
    back = TABLES["gemma2"].to_theirs(ours, config)
    assert back.keys() == dict(theirs.named_parameters()).keys()
    for name, value in back.items():
        assert torch.equal(value, theirs.state_dict()[name]), name


def test_gemma_2_in_bf16_rounds_embeddings_as_transformers_and_the_rest_no_worse():
    theirs, tokens = their_model("gemma2"), torch.randint(3, 320, (2, 40))
    model = our_model("gemma2", theirs)
    with torch.no_grad():
        exact = theirs(tokens).logits
        model, theirs = model.bfloat16(), theirs.bfloat16()
        assert torch.equal(model.tok_embeddings(tokens), theirs.model.embed_tokens(tokens))  # sqrt(72) rounded, too
        error, their_error = ((m - exact).abs().mean() for m in (model(tokens), theirs(tokens).logits))
    assert 0 < error < 1.1 * their_error


@pytest.mark.parametrize("size", ["2b", "9b", "27b"])
def test_builders_are_googles_models(size):
    """The numbers of the config.json files that Google published."""
    sizes = {
        "2b": (26, 2304, 8, 4, 256, 9216, 256),
        "9b": (42, 3584, 16, 8, 256, 14336, 256),
        "27b": (46, 4608, 32, 16, 128, 36864, 144),
    }
    num_parameters = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "query_pre_attn_scalar")
    config = transformers.Gemma2Config(**dict(zip(names, sizes[size], strict=True)))
    model = models.full({"_component_": f"pairtune.gemma2.gemma2_{size}"}, dtype="bf16")
    check_model(model, config.to_dict())
    assert models.num_parameters(model)[0] == num_parameters[size]
    for change in ({"query_pre_attn_scalar": 224}, {"attn_logit_softcapping": None}, {"final_logit_softcapping": 50.0}):
        with pytest.raises(UserError, match=next(iter(change))):
            check_model(model, config.to_dict() | change)


LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]}


def test_gemma_2s_adapters_merge_into_what_they_compute():
    theirs, pairs = their_model("gemma2"), long_pairs()
    adapted = our_model("gemma2", theirs, lora=LORA)
    for _, module in models.adapted_modules(adapted):
        torch.nn.init.normal_(module.lora_b.weight, std=0.1)
    merged = our_model("gemma2", theirs)
    merged.load_state_dict(models.merge_adapters(adapted, models.gather_weights(adapted, ONE)))
    with torch.no_grad():
        values = torch.cat(logps.answer_logps(adapted, lay_out(pairs)))
        torch.testing.assert_close(torch.cat(logps.answer_logps(merged, lay_out(pairs))), values, rtol=1e-5, atol=0)
        with models.reference_of(adapted):
            expected = torch.cat(logps.answer_logps(adapted, lay_out(pairs)))
    torch.testing.assert_close(expected, their_logps(theirs, pairs).detach(), rtol=1e-5, atol=0)
    assert (values - expected).abs().max() > 0.1


def test_gemma_2s_base_in_nf4_is_what_its_export_computes():
    sizes = windows_worker.SIZES | {"embed_dim": 128, "num_kv_heads": 4, "intermediate_dim": 128}
    component, pairs = {"_component_": "pairtune.gemma2.gemma2", **sizes}, long_pairs()
    torch.manual_seed(0)
    weights = gemma2.gemma2(**sizes).state_dict()
    quantized = models.lora(component, **LORA | {"modules": ["q_proj", "mlp"]}, dtype="fp32", quantize_base=True)
    exported, base = (models.full(component, dtype="fp32") for _ in range(2))
    for model in (quantized, exported, base):
        models.prepare(model, max_length=128, windows=[8, None, 8, None])
    models.load(quantized, weights, world=ONE)
    models.load(exported, models.merge_adapters(quantized, models.gather_weights(quantized, ONE)), world=ONE)
    models.load(base, weights, world=ONE)
    with torch.no_grad():
        values = [torch.cat(logps.answer_logps(model, lay_out(pairs))) for model in (quantized, exported, base)]
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=0)
    assert (values[0] - values[2]).abs().max() > 0.1  # rounded, but for the embedding


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_capped_attention_passes_gradcheck(dropout_p):
    """Backward computes the scores again, and drops the same ones."""
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, 6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    capped = attention.Attention(window=4, softcap=2.0, scale=0.7)

    def attend(q, k, v):
        torch.manual_seed(1)
        return capped(q, k, v, mask=None, dropout_p=dropout_p, is_causal=True)

    assert torch.autograd.gradcheck(attend, inputs)


def test_capped_attention_is_its_formula():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    capped = attention.Attention(softcap=2.0, scale=0.7)

    scores = 2.0 * torch.tanh(0.7 * torch.einsum("bhqk,bhsk->bhqs", q, k) / 2.0)
    weights = (scores.exp() * torch.ones(6, 6).tril()).transpose(2, 3)
    expected = torch.einsum("bhsq,bhsk->bhqk", weights / weights.sum(2, keepdim=True), v)
    torch.testing.assert_close(capped(q, k, v, mask=None, dropout_p=0.0, is_causal=True), expected)
