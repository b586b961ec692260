"""GPT-2 computes, loads and exports what transformers and PEFT do: learned positions, fused and transposed layers."""

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
from pairtune.models import generation, gpt2
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.run import samples

SIZES = {"vocab_size": 320, "num_layers": 2, "num_heads": 4, "embed_dim": 128, "max_seq_len": 128}
COMPONENT = {"_component_": "pairtune.gpt2.gpt2", **SIZES}
LORA = {"rank": 4, "alpha": 8.0, "modules": ["c_attn", "c_proj"]}


def config(**changes):
    from transformers import GPT2Config

    sizes = {"n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}
    return GPT2Config(**sizes | {"bos_token_id": 1, "eos_token_id": 2} | changes)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder that transformers wrote, and its model."""
    folder = tmp_path_factory.mktemp("gpt2")
    peer = hf_peers.save_peer(folder / "base", config())
    hf_peers.write_config(folder, COMPONENT, "GPT2", lora={**LORA, "modules": ["c_attn", "c_proj", "c_fc"]})
    return hf_peers.open_folder(folder / "base", "GPT2"), peer


@pytest.mark.parametrize("attention", ["segments", "mask"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_are_those_of_transformers(base, attention, checkpointing):
    files, peer = base
    peer.zero_grad()
    model = hf_peers.load_ours(files, COMPONENT, attention=attention, checkpoint_activations=checkpointing)
    hf_peers.check_logps_and_gradients(peer, model, files)


def test_other_sizes_of_the_mlp_and_an_untied_output_are_those_of_transformers(tmp_path):
    peer = hf_peers.save_peer(tmp_path, config(n_inner=192, tie_word_embeddings=False, layer_norm_epsilon=1e-3))
    files = hf_peers.open_folder(tmp_path, "GPT2")
    component = COMPONENT | {"intermediate_dim": 192, "tie_word_embeddings": False, "norm_eps": 1e-3}
    hf_peers.check_logps_and_gradients(peer, hf_peers.load_ours(files, component), files)


def test_compiled_layers_compute_the_same(tmp_path):
    pairs, peer = random_pairs(4), hf_peers.save_peer(tmp_path, config(n_layer=1))
    files = hf_peers.open_folder(tmp_path, "GPT2")
    model = hf_peers.load_ours(files, COMPONENT | {"num_layers": 1}, compile_layers=True)
    with torch.no_grad():
        torch.testing.assert_close(
            hf_peers.our_logps(model, pairs), hf_peers.peer_logps(peer, pairs), rtol=1e-5, atol=0
        )


def test_positions_restart_with_each_document_and_each_answer(base):
    """A pair far behind in a row longer than the model's positions is scored as if it were alone."""
    files, _ = base
    model, pairs = hf_peers.load_ours(files, COMPONENT), random_pairs(12)
    with torch.no_grad():
        together = torch.stack(answer_logps(model, lay_out(pairs)))
        alone = torch.cat([torch.stack(answer_logps(model, lay_out([pair]))) for pair in pairs], dim=1)
    assert lay_out(pairs).tokens.shape[1] > 3 * SIZES["max_seq_len"]
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)


def test_answers_are_those_of_transformers(base):
    """Greedy ones, of prompts of unequal lengths, with a cache of keys and values; they end where positions do."""
    files, peer = base
    model, prompts = hf_peers.load_ours(files, COMPONENT), [pair.prompt for pair in random_pairs(4)]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        out = peer.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False,
                            eos_token_id=2, pad_token_id=2)  # fmt: skip
        expected.append([token for token in out[0, len(prompt) :].tolist() if token != 2])
    options = {"world": hf_peers.ONE, "stop_ids": [2]}
    assert generation.answers(model, prompts, **options, max_new_tokens=8) == expected
    long = generation.answers(model, prompts[:1], **options, max_new_tokens=1000)
    assert 8 <= len(long[0]) <= 128 - len(prompts[0])


def test_exports_load_in_transformers_and_peft(base, tmp_path):
    files, _ = base
    model = hf_peers.load_ours(files, COMPONENT, lora=LORA)
    exported = hf_peers.check_export(files, model, tmp_path, lora=LORA)
    settings = json.loads((exported / "adapter" / "adapter_config.json").read_text())
    assert settings["fan_in_fan_out"] is True
    assert settings["target_modules"] == ["c_attn", "c_proj"]
    again = hf_peers.load_ours(files, COMPONENT, lora=LORA, adapter=exported / "adapter")
    for ours, read in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, read)


def test_an_adapter_of_a_part_of_c_attn_loads_in_peft(base, tmp_path):
    files, _ = base
    lora = LORA | {"modules": ["v_proj", "q_proj", "c_fc"]}
    hf_peers.check_export(files, hf_peers.load_ours(files, COMPONENT, lora=lora), tmp_path, lora=lora)


def test_pefts_adapters_load_here(base, tmp_path):
    """PEFT has one A for c_attn's queries, keys and values."""
    names = ["c_attn", "c_proj"]
    hf_peers.check_peft_adapter(base[0], COMPONENT, tmp_path, targets=names, modules=names)


def test_a_folder_as_the_hub_has_it_is_read_the_same(base, tmp_path):
    """Names without a prefix, masks of several types among them, a config.json that does not speak of tying."""
    files, _ = base
    weights = load_file(files.path / "model.safetensors")
    plain = {name.removeprefix("transformer."): value for name, value in weights.items()}
    assert plain.keys() != weights.keys()
    for layer, mask in enumerate((torch.ones(1, 1, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8).to(torch.uint8))):
        plain |= {f"h.{layer}.attn.bias": mask, f"h.{layer}.attn.masked_bias": torch.tensor(-1e4)}
    save_file(plain, tmp_path / "model.safetensors", {"format": "pt"})
    said = json.loads((files.path / "config.json").read_text())
    hub = {name: value for name, value in said.items() if name not in ("tie_word_embeddings", "head_dim")}
    (tmp_path / "config.json").write_text(json.dumps(hub | {"n_ctx": 128}))
    expected, found = (dict(checkpoint.Weights(f)) for f in (files, hf_peers.open_folder(tmp_path, "GPT2")))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_mask_may_have_any_type_and_a_weight_may_not(base, tmp_path):
    files, _ = base
    weights = load_file(files.path / "model.safetensors")
    weights["transformer.h.0.mlp.c_fc.weight"] = weights["transformer.h.0.mlp.c_fc.weight"].to(torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((files.path / "config.json").read_text())
    with pytest.raises(UserError, match=r"h\.0\.mlp\.c_fc\.weight is uint8: quantized"):
        checkpoint.Weights(hf_peers.open_folder(tmp_path, "GPT2"))


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_a_run_exports_is_what_it_measured(base, method):
    hf_peers.check_run(base[0].path.parent, method)


def test_two_processes_give_the_numbers_of_one(base):
    hf_peers.check_two_processes(base[0].path.parent, "full")


@pytest.mark.parametrize(
    ("builder", "count"),
    [
        (gpt2.gpt2_124m, 124_439_808),
        (gpt2.gpt2_355m, 354_823_168),
        (gpt2.gpt2_774m, 774_030_080),
        (gpt2.gpt2_1_5b, 1_557_611_200),
    ],
)
def test_named_sizes_have_the_published_numbers_of_parameters(builder, count):
    model = models.full({"_component_": f"pairtune.gpt2.{builder.__name__}"}, dtype="bf16")
    assert models.num_parameters(model) == (count, count)


GPT2 = {"model_type": "gpt2", "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 320}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_head": 8}, "n_head is 4 in `model` and 8 in config.json"),
        ({"n_embd": 256}, "n_embd is 128 in `model` and 256 in config.json"),
        ({"n_layer": 3}, "n_layer is 2 in `model` and 3 in config.json"),
        ({"n_positions": 64}, "n_positions is 128 in `model` and 64 in config.json"),
        ({"vocab_size": 100}, "vocab_size is 320 in `model` and 100 in config.json"),
        ({"layer_norm_epsilon": 0.01}, "layer_norm_epsilon is 1e-05 in `model` and 0.01 in config.json"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is True in `model` and False in config.json"),
    ],
)
def test_a_model_that_is_not_the_folders_is_refused(change, words):
    model = models.full(COMPONENT, dtype="fp32")
    check_model(model, GPT2)
    with pytest.raises(UserError) as error:
        check_model(model, GPT2 | change)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation_function": "relu"}, "activation_function=relu: must be gelu_new or gelu_pytorch_tanh"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true: must be false"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=true: must be false"),
        ({"add_cross_attention": True}, "add_cross_attention=true: must be false"),
        ({"scale_attn_weights": False}, "scale_attn_weights=false: must be true"),
        ({"n_head": None}, "n_head: is missing"),
        ({"n_embd": "128"}, "n_embd='128': must be a whole number"),
    ],
)
def test_a_config_of_another_gpt_2_is_refused(tmp_path, change, words):
    check_config(GPT2 | {"activation_function": "gelu_new", "add_cross_attention": False}, tmp_path)
    with pytest.raises(UserError) as error:
        check_config(GPT2 | change, tmp_path)
    assert words in str(error.value)


# What a run says of its answers


@pytest.mark.parametrize(
    ("after", "words"),
    [(["x", "y"], "0 of 2 answers changed: the policy barely moved"), (["x", "z"], "1 of 2 answers changed")],
)
def test_samples_say_how_many_answers_changed(tmp_path, capsys, after, words):
    samples.write_samples(tmp_path / "samples.jsonl", ["a", "b"], ["x", "y"], after)
    samples.show_samples(tmp_path / "samples.jsonl")
    assert capsys.readouterr().out.endswith(f"{words}\n")
