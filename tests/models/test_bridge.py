"""transformers' own models train here as transformers and PEFT compute them."""

import json
import subprocess
import sys

import hf_peers
import pytest
import torch
from helpers import random_pairs, run_recipe
from torch._dynamo.utils import counters
from torch.nn.functional import scaled_dot_product_attention

from pairtune import models
from pairtune.config.uses import check_installed
from pairtune.errors import UserError
from pairtune.folders.opening import make_ready
from pairtune.folders.weights import Weights
from pairtune.models.bridge import visible
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out

# Matrices have a multiple of 16,384 weights or not; windows are shorter than a conversation, so that they bite.
SIZES = {
    "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
    "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
DENSE = {
    "Llama": {},
    "Qwen3": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0,
               "query_pre_attn_scalar": 12},
    "Gemma3Text": {"head_dim": 16, **BOTH},
    "Olmo2": {},
    "Olmo3": BOTH,
    "SmolLM3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]},
    "Granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "Glm4": {"head_dim": 16},
    "Phi3": {"sliding_window": 8},
    "Cohere": {"logit_scale": 0.25},
    "Starcoder2": {},
    "DiffLlama": {},  # some of its parameters are made beside the meta device
    "Gemma3nText": {
        "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 16, "laurel_rank": 8, "activation_sparsity_pattern": None,
        "layer_types": [*BOTH["layer_types"]] * 2, "sliding_window": 8,
    },
}  # fmt: skip
ELSEWHERE = ("Gemma3Text", "Olmo3", "SmolLM3", "Glm4", "Qwen3_5Text", "Lfm2", "FalconH1")  # test_bridge_families.py
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_chunk_size": 8}
APART = {  # with a state or a convolution along a row, or positions by its columns
    "Qwen3_5Text": {
        "head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "NemotronH": {
        "head_dim": 16, "ssm_state_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2,
        "chunk_size": 8, "layers_block_type": ["mamba", "attention", "mlp"], "num_hidden_layers": 3,
    },
    "FalconH1": MAMBA | {"mamba_d_ssm": 128},
    "GraniteMoeHybrid": MAMBA | {
        "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 0, "shared_intermediate_size": 96,
        "logits_scaling": 3.0,
    },
    "Bloom": {"n_layer": 2, "n_head": 4},
}  # fmt: skip

SAME = {"vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
SAME |= {"intermediate_dim": 96, "max_seq_len": 128, "rope_base": 10_000}
TORCHTUNES = {"_component_": "torchtune.models.llama3.llama3", **SAME, "norm_eps": 1e-6}


def component(folder):
    return {"_component_": "pairtune.models.bridge.causal_lm", "path": str(folder)}


def save(name, folder, **changes):
    """Writes a random model of a family, and returns transformers'."""
    import transformers

    config = getattr(transformers, f"{name}Config")(**SIZES | (DENSE | APART)[name] | changes)
    return hf_peers.save_peer(folder, config)


@pytest.fixture(scope="module", params=[*DENSE, *APART])
def base(request, tmp_path_factory):
    """A model's name, its folder as transformers wrote it, opened, and transformers' model."""
    folder = tmp_path_factory.mktemp(request.param)
    peer = save(request.param, folder / "base")
    return request.param, hf_peers.open_folder(folder / "base", "AUTO", component(folder / "base")), peer


def test_log_probabilities_and_gradients_are_those_of_transformers(base, capsys):
    name, files, peer = base
    model, pairs = hf_peers.load_ours(files, component(files.path)), random_pairs(4)
    models.settle(model, pairs, hf_peers.ONE)
    assert model.pairtune.sharing.prompts == (name in DENSE)
    assert ("a prompt of its own" in capsys.readouterr().out) == (name in APART)
    hf_peers.check_logps_and_gradients(peer, model, files)
    settled = hf_peers.our_logps(model, pairs)
    model.pairtune.back_end = "mask"  # the one that defines the truth
    torch.testing.assert_close(hf_peers.our_logps(model, pairs), settled, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["Gemma3Text", "Lfm2"])  # two kinds of layers each: shared, with windows; apart
def test_layers_are_compiled_once_for_all_batches_and_flex_sees_the_same(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    torch._dynamo.reset()
    counters.clear()
    peer, graphs = save(name, tmp_path), set()
    files = hf_peers.open_folder(tmp_path, "AUTO", component(tmp_path))
    model = hf_peers.load_ours(files, component(tmp_path), compile_layers=True)
    models.settle(model, random_pairs(4), hf_peers.ONE)
    for seed in range(3):
        pairs = random_pairs(3, seed=seed)
        batch, expected = lay_out(pairs, row_length=256), hf_peers.peer_logps(peer, pairs)
        torch.testing.assert_close(torch.cat(answer_logps(model, batch)), expected, rtol=1e-5, atol=0)
        with torch.no_grad():
            torch.testing.assert_close(torch.cat(answer_logps(model, batch)), expected, rtol=1e-5, atol=0)
        graphs.add(counters["stats"]["unique_graphs"])
    assert graphs == {4}  # with gradients and without, of each kind of layer
    model.pairtune.back_end = "flex"  # which on a CPU has no backward
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(torch.cat(answer_logps(model, batch)), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [name for name in (*DENSE, *APART) if name not in ELSEWHERE])
def test_what_a_run_exports_is_what_it_measured(name, tmp_path):
    save(name, tmp_path / "base")
    lora = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}
    hf_peers.write_config(tmp_path, component(tmp_path / "base"), "AUTO", lora=lora)
    hf_peers.check_run(tmp_path, "lora")


@pytest.mark.parametrize("name", ["Gemma2", "Gemma3nText"])
def test_what_a_run_of_all_weights_exports_is_what_it_measured(name, tmp_path):
    save(name, tmp_path / "base")
    hf_peers.write_config(tmp_path, component(tmp_path / "base"), "AUTO")
    hf_peers.check_run(tmp_path, "full")


def test_a_base_in_4_bits_trains_and_is_exported(tmp_path):
    save("Phi3", tmp_path / "base")
    hf_peers.write_config(tmp_path, component(tmp_path / "base"), "AUTO")
    hf_peers.check_run(tmp_path, "qlora")


@pytest.mark.parametrize("name", ["Gemma3Text", "Phi3", "Glm4", "Qwen3_5Text"])
def test_pefts_adapter_of_all_linear_layers_loads_here(name, tmp_path):
    save(name, tmp_path / "base")
    files = hf_peers.open_folder(tmp_path / "base", "AUTO", component(tmp_path / "base"))
    how = {"targets": "all-linear", "modules": ["all-linear"]}
    hf_peers.check_peft_adapter(files, component(files.path), tmp_path / "adapter", **how)


@pytest.mark.parametrize("use", ["use_dora", "use_rslora"])
def test_other_kinds_of_adapters_are_pefts(use, tmp_path):
    save("Gemma3Text", tmp_path / "base")
    lora = {"rank": 4, "alpha": 8.0, "modules": ["q_proj", "mlp"], use: True}
    files = hf_peers.open_folder(tmp_path / "base", "AUTO", component(tmp_path / "base"))
    model = hf_peers.load_ours(files, component(files.path), lora=lora)
    for _, layer in models.adapted_modules(model):
        torch.nn.init.normal_(layer.lora_b.weight, std=0.1)
    hf_peers.check_export(files, model, tmp_path, lora=lora)


@pytest.mark.parametrize(("name", "shares"), [("Gemma3Text", True), ("Lfm2", False)])
def test_rounding_to_bf16_is_told_from_what_a_token_must_not_see(name, shares, tmp_path):
    save(name, tmp_path)
    files = hf_peers.open_folder(tmp_path, "AUTO", component(tmp_path))
    model = models.full(component(tmp_path), dtype="bf16")
    make_ready(model, files.config, max_length=64)
    models.load(model, Weights(files), world=hf_peers.ONE)
    models.settle(model, random_pairs(4), hf_peers.ONE)
    assert model.pairtune.sharing.prompts == shares


def test_a_model_that_is_not_what_it_computes_alone_is_refused(tmp_path):
    """As one of torchtune's would be whose attention does not heed its mask."""
    save("Llama", tmp_path)
    model = hf_peers.load_ours(hf_peers.open_folder(tmp_path, "LLAMA3"), TORCHTUNES)
    models.settle(model, random_pairs(4), hf_peers.ONE)
    for layer in model.layers:
        layer.attn._attention_call = lambda q, k, v, mask, dropout_p, is_causal: attend(q, k, v)
    with pytest.raises(UserError, match="not those that it computes of each conversation alone: .* nats a token"):
        models.settle(model, random_pairs(4), hf_peers.ONE)


def attend(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


BUILDERS = {
    "Llama": ("LLAMA3", TORCHTUNES),
    "Qwen3": ("QWEN3", {"_component_": "pairtune.models.qwen3.qwen3", **SAME, "head_dim": 16}),
    "Gemma2": (
        "GEMMA2",
        {"_component_": "pairtune.models.gemma2.gemma2", **SAME, "head_dim": 16, "attn_logit_softcapping": 5.0,
         "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 12},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BUILDERS)
def test_ten_steps_are_those_of_torchtunes_builder(name, tmp_path):
    """From one adapter: the two draw fresh ones in another order."""
    from peft import LoraConfig, get_peft_model

    peer = save(name, tmp_path / "base")
    start = get_peft_model(peer, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    start.save_pretrained(tmp_path / "start")
    model_type, torchtunes = BUILDERS[name]
    lora = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}
    logs = []
    for kind, model in ((model_type, torchtunes), ("AUTO", component(tmp_path / "base"))):
        hf_peers.write_config(tmp_path, model, kind, lora=lora, adapter=str(tmp_path / "start"), reference="start")
        overrides = [f"output_dir={tmp_path / kind}", "epochs=5", "log_every_n_steps=1", "lr_scheduler=null"]
        logs.append(run_recipe("lora_dpo_single_device", *overrides, config_paths=[tmp_path / "config.yaml"]))
    assert len([row for row in logs[0] if "loss" in row]) == 10
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "logps/chosen", "logps/rejected", "eval/loss", "eval/logps/chosen"):
            if key in one:
                torch.testing.assert_close(other[key], one[key], rtol=1e-5, atol=1e-6, msg=f"{key} {one} {other}")


WRONG = {
    "an unknown architecture": ({"model_type": "sphinx"}, "model_type=sphinx: transformers has no causal language"),
    "code in the folder": (
        {"model_type": "sphinx", "auto_map": {"AutoModelForCausalLM": "sphinx.Sphinx"}}, "auto_map.*never run",
    ),
    "an encoder": ({"model_type": "t5"}, "model_type=t5: transformers has no causal language"),
    "quantized weights": ({"quantization_config": {"quant_method": "gptq"}}, "the weights are quantized"),
    "a value of the wrong kind": ({"num_attention_heads": "four"}, "config.json: .*num_attention_heads"),
    "an unknown activation": ({"hidden_act": "sillu"}, "config.json: transformers .* cannot make its SmolLM3.*sillu"),
    "another width": ({"intermediate_size": 112}, r"weights do not fit.*\[96, 64\] in the checkpoint, \[112, 64\]"),
    "a layer too few": (
        {"num_hidden_layers": 1, "layer_types": ["full_attention"], "no_rope_layers": [1]},
        r"9 tensors are no weights.*model.layers.1.*no weight of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG)
def test_a_folder_that_cannot_be_trained_is_refused_in_a_sentence(change, said, tmp_path):
    from transformers import SmolLM3Config

    hf_peers.save_peer(tmp_path, SmolLM3Config(**SIZES))
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=f"(?s){said}"):
        files = hf_peers.open_folder(tmp_path, "AUTO", component(tmp_path))
        hf_peers.load_ours(files, component(tmp_path))


def test_a_folder_of_other_settings_than_the_models_is_refused(tmp_path):
    """Of the same shapes: their weights would load, and compute something else."""
    from transformers import LlamaConfig

    hf_peers.save_peer(tmp_path / "one", LlamaConfig(**SIZES))
    hf_peers.save_peer(tmp_path / "other", LlamaConfig(**SIZES, rms_norm_eps=1e-3))
    files = hf_peers.open_folder(tmp_path / "one", "LLAMA", component(tmp_path / "one"))
    with pytest.raises(UserError, match="rms_norm_eps is 0.001 in `model` and 1e-06 in config.json"):
        hf_peers.load_ours(files, component(tmp_path / "other"))


def test_lora_modules_of_a_fused_layer_are_named_together(tmp_path):
    from transformers import Phi3Config

    hf_peers.save_peer(tmp_path, Phi3Config(**SIZES))
    files = hf_peers.open_folder(tmp_path, "PHI3", component(tmp_path))
    lora = {"rank": 4, "alpha": 8.0}
    with pytest.raises(UserError, match="qkv_proj computes what k_proj, v_proj would"):
        hf_peers.load_ours(files, component(tmp_path), lora=lora | {"modules": ["q_proj"]})
    model = hf_peers.load_ours(files, component(tmp_path), lora=lora | {"modules": ["q_proj", "k_proj", "v_proj"]})
    adapted = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "lora_a")}
    assert adapted == {"qkv_proj"}


def test_without_the_extra_the_model_is_refused_and_the_extra_named(monkeypatch):
    cfg = {"model": component("/nowhere")}
    check_installed(cfg)
    monkeypatch.setattr("pairtune.config.uses.find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(UserError, match=r"pip install 'pairtune\[models\]'"):
        check_installed(cfg)


def test_torchtunes_models_do_without_transformers():
    code = """
import sys
import pairtune.models, pairtune.folders.weights, pairtune.cli.plan
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_mask_that_counts_padding_is_the_same_where_a_model_is_only_counted():
    """Llama 4's chunks begin behind the padding on a row's left, a tensor on the model's device: meta to count."""
    from transformers.masking_utils import chunked_causal_mask_function

    masks = [chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.long, device=d)) for d in ("cpu", "meta")]
    seen = [visible.pattern_of(mask, 12) for mask in masks]
    assert torch.equal(*seen) and seen[0].sum() == 3 * (1 + 2 + 3 + 4)
