"""Every family of models loads, trains and is exported as transformers and PEFT compute it."""

from pathlib import Path

import hf_peers
import pytest
import torch
from helpers import random_pairs
from safetensors.torch import load_file, save_file

from pairtune.errors import UserError
from pairtune.folders.families import FAMILIES
from pairtune.folders.weights import Weights, open_weights

# All matrices of layers have a multiple of 16,384 weights, as NF4 wants; no two sides that could be confused are alike.
SIZES = {
    "vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 192,
    "max_seq_len": 128,
}  # fmt: skip
THEIRS = {
    "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256,
    "intermediate_size": 192, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ALL_HEADS, THEIR_HEADS = {"num_kv_heads": 4}, {"num_key_value_heads": 4}
TIED = {"tie_word_embeddings": True}
CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0, "query_pre_attn_scalar": 144}


def rope(theta, factor=None):
    """What a config.json of transformers 5 says of positions; `factor`: scaled as Llama 3.1's."""
    if factor is None:
        return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    scaling = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    scaling |= {"rope_type": "llama3", "rope_theta": theta, "factor": factor}
    return {"rope_parameters": scaling, "max_position_embeddings": 131_072}


# Of each: checkpointer.model_type, transformers' config, what it says beside THEIRS, our builder, what it takes beside
# SIZES.
MODELS = {
    "llama2": ("LLAMA2", "Llama", rope(1e4) | THEIR_HEADS, "torchtune.models.llama2.llama2", ALL_HEADS),
    "tinyllama": ("LLAMA2", "Llama", rope(1e4), "torchtune.models.llama2.llama2", {}),
    "llama3": ("LLAMA3", "Llama", rope(5e5), "torchtune.models.llama3.llama3", {}),
    "llama3_1": (
        "LLAMA3", "Llama", rope(5e5, 8.0), "torchtune.models.llama3_1._component_builders.llama3_1", {},
    ),
    "llama3_2": (
        "LLAMA3_2", "Llama", rope(5e5, 32.0) | TIED, "torchtune.models.llama3_2._component_builders.llama3_2", {},
    ),
    "smollm2": (
        "LLAMA3_2", "Llama", rope(1e5) | TIED, "torchtune.models.llama3_2.llama3_2",
        {"rope_base": 100_000, "scale_factor": 1},
    ),
    "mistral": ("MISTRAL", "Mistral", rope(1e4) | {"sliding_window": 8}, "torchtune.models.mistral.mistral", {}),
    "gemma": (
        "GEMMA", "Gemma", rope(1e4) | TIED | {"num_key_value_heads": 1, "head_dim": 128, "rms_norm_eps": 1e-6},
        "torchtune.models.gemma.gemma", {"num_kv_heads": 1, "head_dim": 128},
    ),
    "gemma2": (
        "GEMMA2", "Gemma2", rope(1e4) | TIED | CAPS | {"head_dim": 128, "sliding_window": 8, "rms_norm_eps": 1e-6},
        "pairtune.gemma2.gemma2", {"head_dim": 128} | CAPS,
    ),
    "qwen2": ("QWEN2", "Qwen2", rope(1e6), "torchtune.models.qwen2.qwen2", {}),
    "qwen2_tied": ("QWEN2", "Qwen2", rope(1e6) | TIED, "torchtune.models.qwen2.qwen2", TIED),
    "phi3": (
        "PHI3_MINI", "Phi3", rope(1e4) | THEIR_HEADS | {"sliding_window": 16}, "torchtune.models.phi3.phi3", ALL_HEADS,
    ),
    "phi4": ("PHI4", "Phi3", rope(2.5e5), "torchtune.models.phi3.phi3", {"rope_base": 250_000}),
}  # fmt: skip
ELSEWHERE = {  # the same, and more
    "GPT2": "test_gpt2.py",
    "GPT_NEOX": "test_gpt_neox.py",
    "QWEN3": "test_qwen3.py",
    "MIXTRAL": "test_mixtral.py",
}
LORA = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def component(name):
    *_, builder, sizes = MODELS[name]
    return {"_component_": builder, **SIZES, **sizes}


@pytest.fixture(scope="module", params=MODELS)
def base(request, tmp_path_factory):
    """A model's name, its folder as transformers wrote it, and transformers' model."""
    import transformers

    model_type, kind, said, *_ = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    peer = hf_peers.save_peer(folder / "base", getattr(transformers, f"{kind}Config")(**THEIRS | said))
    hf_peers.write_config(folder, component(request.param), model_type, lora=LORA)
    return request.param, hf_peers.open_folder(folder / "base", model_type), peer


def test_every_family_is_tested_here_or_elsewhere():
    assert FAMILIES.keys() == {model_type for model_type, *_ in MODELS.values()} | ELSEWHERE.keys()
    for model_type, file in ELSEWHERE.items():
        assert f'"{model_type}"' in Path(__file__).with_name(file).read_text(), file


def test_log_probabilities_and_gradients_are_those_of_transformers(base):
    name, files, peer = base
    hf_peers.check_logps_and_gradients(peer, hf_peers.load_ours(files, component(name)), files)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_a_run_exports_is_what_it_measured(base, method):
    hf_peers.check_run(base[1].path.parent, method)


def test_torchtunes_own_file_without_a_config_json_is_exported_for_transformers(base, tmp_path):
    name, files, _ = base
    model_type = files.family.name
    torch.save(dict(Weights(files)), tmp_path / "model.pt")
    block = {"_component_": "torchtune.training.FullModelTorchTuneCheckpointer", "checkpoint_dir": str(tmp_path)}
    files = open_weights(block | {"model_type": model_type}, component(name))
    hf_peers.check_export(files, hf_peers.load_ours(files, component(name)), tmp_path / "run")


def test_pefts_adapter_of_all_linear_layers_loads_here(base, tmp_path):
    name, files, _ = base
    hf_peers.check_peft_adapter(files, component(name), tmp_path, targets="all-linear", modules=["all-linear"])


@pytest.mark.parametrize("name", ["llama3_2", "gemma", "qwen2_tied"])
def test_a_tied_output_layer_that_is_stored_too_is_the_embedding_or_refused(name, tmp_path):
    import transformers

    model_type, kind, said, *_ = MODELS[name]
    peer = hf_peers.save_peer(tmp_path, getattr(transformers, f"{kind}Config")(**THEIRS | said))
    weights, pairs = load_file(tmp_path / "model.safetensors"), random_pairs(2)
    embedding = weights.pop(EMBEDDING)
    output, expected = embedding.clone(), hf_peers.peer_logps(peer, pairs)

    def scores(stored):
        save_file(weights | stored, tmp_path / "model.safetensors", {"format": "pt"})
        files = hf_peers.open_folder(tmp_path, model_type)
        return hf_peers.our_logps(hf_peers.load_ours(files, component(name)), pairs)

    # As Qwen3 0.6B has it; and as safetensors.torch.save_model writes it.
    for stored in ({EMBEDDING: embedding, OUTPUT: output}, {OUTPUT: output}):
        torch.testing.assert_close(scores(stored), expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(
            hf_peers.peer_logps(hf_peers.load_peer(tmp_path), pairs), expected, rtol=1e-5, atol=0
        )
    output[5, 7] += 1  # transformers leaves both as they are, and computes with an untied output
    with pytest.raises(UserError, match="embed_tokens.weight and lm_head.weight differ.*tie_word_embeddings to false"):
        scores({EMBEDDING: embedding, OUTPUT: output})
