"""Tables of weights' names say what torchtune's own conversions do, in both directions."""

import pytest
import torch
from torchtune.models import convert_weights
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

from pairtune.folders.families import FAMILIES

CONFIG = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32, "tie_word_embeddings": False}
SIZES = {"num_heads": 4, "num_kv_heads": 2, "dim": 32}
ROWS = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "qkv_proj": 64, "gate_up_proj": 96, "gate_proj": 48, "up_proj": 48}


def random_weights(family):
    """One random tensor for each name of a model of two layers, and biases of q, k and v where there are any."""
    generator, weights = torch.Generator().manual_seed(0), {}
    for module in FAMILIES[family].modules:
        for number in range(2) if "{}" in module.theirs else (0,):
            name, last = module.theirs.format(number), module.theirs.rpartition(".")[2]
            rows = ROWS.get(last, 32)
            shape = (rows,) if "norm" in last else (rows, 48 if last == "down_proj" else 32)
            weights[f"{name}.weight"] = torch.randn(shape, generator=generator)
            if family == "QWEN2" and last in ("q_proj", "k_proj", "v_proj"):
                weights[f"{name}.bias"] = torch.randn(rows, generator=generator)
    return weights


def theirs(family, weights):
    if family in ("PHI3_MINI", "PHI4"):
        return phi3_hf_to_tune(weights, **SIZES)
    if family == "QWEN2":
        return qwen2_hf_to_tune(weights, **SIZES)
    return convert_weights.hf_to_tune(weights, **SIZES)


@pytest.mark.parametrize("name", ["LLAMA2", "LLAMA3", "LLAMA3_2", "MISTRAL", "GEMMA", "QWEN2", "PHI3_MINI", "PHI4"])
def test_weights_are_converted_as_torchtune_does_and_back(name):
    family, weights = FAMILIES[name], random_weights(name)
    expected = theirs(name, weights)
    converted = {}
    for key, value in weights.items():
        converted |= family.to_ours(key, value, CONFIG)
    assert converted.keys() == expected.keys()
    for key, value in converted.items():
        assert torch.equal(value, expected[key]), key
    back = family.to_theirs(converted, CONFIG)
    assert back.keys() == weights.keys()
    for key, value in back.items():
        assert torch.equal(value, weights[key]), key


def test_a_tied_output_layer_is_the_embedding_and_rotary_buffers_are_left_out():
    family, value = FAMILIES["GEMMA"], torch.ones(2, 2)
    tied = family.to_ours("lm_head.weight", value, {**CONFIG, "model_type": "gemma", "tie_word_embeddings": None})
    assert tied.keys() == {"tok_embeddings.weight"}
    assert family.to_ours("lm_head.weight", value, CONFIG).keys() == {"output.weight"}
    assert family.to_ours("model.layers.3.self_attn.rotary_emb.inv_freq", value, CONFIG) == {}
    with pytest.raises(KeyError):
        family.to_ours("model.layers.3.self_attn.qkv_proj.weight", value, CONFIG)
    with pytest.raises(KeyError):
        family.to_theirs({"layers.0.attn.q_norm.scale": value}, CONFIG)


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("LLAMA3", "o_proj gate_proj up_proj down_proj lm_head"),
        ("MIXTRAL", "router o_proj lm_head gate w1 w2 w3"),
        ("PHI4", "o_proj down_proj lm_head qkv_proj gate_up_proj"),
        ("GPT2", "lm_head c_attn c_proj c_fc"),
        ("GPT_NEOX", "lm_head query_key_value dense dense_h_to_4h dense_4h_to_h embed_out"),
    ],
)
def test_lora_modules_are_torchtunes_names_and_the_architectures_own(name, own):
    ours = {"q_proj", "k_proj", "v_proj", "output_proj", "mlp", "output", "all-linear"}
    assert set(FAMILIES[name].lora_names) == ours | set(own.split())
