"""GPT-NeoX and Pythia compute, load and export what transformers and PEFT do: fused rows that take turns."""

import json

import hf_peers
import pytest
import torch
from helpers import random_pairs
from safetensors.torch import load_file, save_file

from pairtune import models
from pairtune.config.architectures import check_config
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import check_model
from pairtune.models import generation

SIZES = {"vocab_size": 320, "num_layers": 2, "num_heads": 4, "embed_dim": 128, "max_seq_len": 128}
COMPONENT = {"_component_": "pairtune.gpt_neox.gpt_neox", **SIZES, "intermediate_dim": 256}
LORA = {"rank": 4, "alpha": 8.0, "modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]}


def config(**changes):
    from transformers import GPTNeoXConfig

    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    more = {"vocab_size": 320, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    return GPTNeoXConfig(**sizes | more | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that transformers wrote, and its model."""
    folder = tmp_path_factory.mktemp("gpt_neox")
    peer = hf_peers.save_peer(folder / "base", config())
    hf_peers.write_config(folder, COMPONENT, "GPT_NEOX", lora=LORA)
    return hf_peers.open_folder(folder / "base", "GPT_NEOX"), peer


@pytest.mark.parametrize("attention", ["segments", "mask"])
def test_log_probabilities_and_gradients_are_those_of_transformers(base, attention):
    files, peer = base
    peer.zero_grad()
    hf_peers.check_logps_and_gradients(peer, hf_peers.load_ours(files, COMPONENT, attention=attention), files)


def test_checkpointed_activations_change_no_gradient(base):
    files, peer = base
    peer.zero_grad()
    hf_peers.check_logps_and_gradients(peer, hf_peers.load_ours(files, COMPONENT, checkpoint_activations=True), files)


def test_one_behind_the_other_with_other_rotations_is_as_in_transformers(tmp_path):
    rope = {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    peer = hf_peers.save_peer(tmp_path, config(use_parallel_residual=False, rope_parameters=rope))
    files = hf_peers.open_folder(tmp_path, "GPT_NEOX")
    component = COMPONENT | {"use_parallel_residual": False, "rotary_pct": 0.5, "rope_base": 500}
    hf_peers.check_logps_and_gradients(peer, hf_peers.load_ours(files, component), files)


def test_answers_are_those_of_transformers(base):
    files, peer = base
    model, prompts = hf_peers.load_ours(files, COMPONENT), [pair.prompt for pair in random_pairs(4)]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
                            eos_token_id=2, pad_token_id=2)  # fmt: skip
        expected.append([token for token in out[0, len(prompt) :].tolist() if token != 2])
    found = generation.answers(model, prompts, world=hf_peers.ONE, stop_ids=[2], max_new_tokens=8)
    assert found == expected


@pytest.mark.parametrize("modules", [LORA["modules"], ["v_proj", "k_proj", "embed_out"]])
def test_exports_load_in_transformers_and_peft(base, tmp_path, modules):
    """All three of query_key_value have adapters, or two of them: then the rows of queries are zeros, every third."""
    lora = LORA | {"modules": modules}
    files, _ = base
    model = hf_peers.load_ours(files, COMPONENT, lora=lora)
    exported = hf_peers.check_export(files, model, tmp_path, lora=lora)
    settings = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is False
    if modules == LORA["modules"]:
        again = hf_peers.load_ours(files, COMPONENT, lora=lora, adapter=exported / "adapter")
        for ours, read in zip(model.parameters(), again.parameters(), strict=True):
            assert torch.equal(ours, read)


@pytest.mark.parametrize("output", [[], ["lm_head"]])
def test_pefts_adapters_load_here(base, tmp_path, output):
    """transformers 5 calls the output layer lm_head, files embed_out."""
    names = [*LORA["modules"], *output]
    hf_peers.check_peft_adapter(base[0], COMPONENT, tmp_path, targets=names, modules=names)


def test_a_folder_as_the_hub_has_it_is_read_the_same(base, tmp_path):
    """Half precision, masks and angles among the weights, a config.json of transformers 4."""
    files, _ = base
    weights = {name: value.half() for name, value in load_file(files.path / "model.safetensors").items()}
    for layer in range(2):
        attention = f"gpt_neox.layers.{layer}.attention"
        weights[f"{attention}.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
        weights[f"{attention}.masked_bias"] = torch.tensor(-1e4)
        weights[f"{attention}.rotary_emb.inv_freq"] = torch.ones(4)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    said = json.loads((files.path / "config.json").read_text())
    said.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(said | {"rotary_pct": 0.25, "rotary_emb_base": 10000}))
    hub = hf_peers.open_folder(tmp_path, "GPT_NEOX")
    check_model(models.full(COMPONENT, dtype="fp32"), hub.config)
    expected, found = dict(checkpoint.Weights(files)), dict(checkpoint.Weights(hub))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].half()) for name in found)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_a_run_exports_is_what_it_measured(base, method):
    hf_peers.check_run(base[0].path.parent, method)


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """The smallest matrices hold 16,384 weights: one process takes them as torchao does, two fill them up."""
    hf_peers.save_peer(tmp_path / "base", config())
    hf_peers.write_config(tmp_path, COMPONENT, "GPT_NEOX", lora=LORA)
    hf_peers.check_two_processes(tmp_path, "qlora")


@pytest.mark.parametrize(
    ("size", "count"),  # as the table in Pythia's repository has them
    [
        ("70m", 70_426_624),
        ("160m", 162_322_944),
        ("410m", 405_334_016),
        ("1b", 1_011_781_632),
        ("1_4b", 1_414_647_808),
        ("2_8b", 2_775_208_960),
        ("6_9b", 6_857_302_016),
        ("12b", 11_846_072_320),
    ],
)
def test_named_sizes_have_the_published_numbers_of_parameters(size, count):
    model = models.full({"_component_": f"pairtune.gpt_neox.pythia_{size}"}, dtype="bf16")
    assert models.num_parameters(model) == (count, count)


NEOX = {
    "model_type": "gpt_neox",
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "rotary_pct": 0.25,
    "rotary_emb_base": 10_000,
    "use_parallel_residual": True,
    "layer_norm_eps": 1e-5,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads is 4 in `model` and 8 in config.json"),
        ({"rotary_pct": 1.0}, "rotary_pct is 0.25 in `model` and 1.0 in config.json"),
        ({"rotary_emb_base": 500}, "rotary_emb_base is 10000.0 in `model` and 500.0 in config.json"),
        ({"use_parallel_residual": False}, "use_parallel_residual is True in `model` and False in config.json"),
        ({"layer_norm_eps": 0.01}, "layer_norm_eps is 1e-05 in `model` and 0.01 in config.json"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.factor is 1.0 in `model` and 2.0"),
    ],
)
def test_a_model_that_is_not_the_folders_is_refused(change, words):
    model = models.full(COMPONENT, dtype="fp32")
    check_model(model, NEOX)
    with pytest.raises(UserError) as error:
        check_model(model, NEOX | change)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu_fast"}, "hidden_act=gelu_fast: must be gelu; "),
        ({"attention_bias": False}, "attention_bias=false: must be true"),
        ({"rotary_pct": "0.25"}, "rotary_pct='0.25': must be a number"),
        ({"use_parallel_residual": 1}, "use_parallel_residual=1: must be true or false"),
    ],
)
def test_a_config_of_another_gpt_neox_is_refused(tmp_path, change, words):
    check_config(NEOX | {"hidden_act": "gelu", "attention_bias": True}, tmp_path)
    with pytest.raises(UserError) as error:
        check_config(NEOX | change, tmp_path)
    assert words in str(error.value)
