"""Qwen 3 is what transformers computes, in log-probabilities, gradients and exports, and the recipes train it."""

import math

import pytest
import torch
from helpers import padded_logps, random_pairs, run_config, run_recipe, save_llama, save_pairs
from omegaconf import OmegaConf
from torchtune.modules.peft import LoRALinear

from pairtune import models
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import check_model
from pairtune.folders.families import FAMILIES
from pairtune.models import generation
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

ONE = World(torch.device("cpu"))
SIZES = {  # heads together are twice as wide as the model
    "vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "embed_dim": 128,
    "intermediate_dim": 128, "max_seq_len": 128,
}  # fmt: skip


def component(tied):
    return {"_component_": "pairtune.qwen3.qwen3", **SIZES, "tie_word_embeddings": tied}


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def tied(request):
    return request.param


@pytest.fixture
def peer(tied):
    """transformers' own, with random weights everywhere, norms too."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, rope_theta=1_000_000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=tied, initializer_range=0.08, attn_implementation="eager", eos_token_id=2,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.fixture
def work(tmp_path, peer):
    """That model with the tests' tokenizer, and pairs."""
    save_llama(tmp_path / "base")
    peer.save_pretrained(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", random_pairs(16, seed=1))
    save_pairs(tmp_path / "held_out.jsonl", random_pairs(4, seed=2))
    return tmp_path


def read(folder):
    name = "torchtune.training.FullModelHFCheckpointer"
    return checkpoint.open_weights(
        OmegaConf.create({"_component_": name, "checkpoint_dir": str(folder), "model_type": "QWEN3"})
    )


def loaded(folder, tied):
    files = read(folder)
    model = models.full(component(tied), dtype="fp32")
    models.prepare(model, max_length=128)
    check_model(model, files.config)
    models.load(model, checkpoint.Weights(files), world=ONE)
    return model


def logps_of(peer, pairs):
    """In transformers, [2 pairs]: chosen, then rejected."""
    return padded_logps(lambda tokens: peer(tokens).logits, pairs)


def scores(model, pairs):
    return torch.cat(answer_logps(model, lay_out(pairs)))


def test_log_probabilities_and_gradients_are_those_of_transformers(work, peer, tied):
    pairs, upstream = random_pairs(4), torch.randn(8)
    expected = logps_of(peer, pairs)
    (expected * upstream).sum().backward()
    model = loaded(work / "base", tied)
    values = scores(model, pairs)
    (values * upstream).sum().backward()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-4)  # of sums of about 60 nats
    wanted = {}
    for name, parameter in peer.named_parameters():
        wanted |= FAMILIES["QWEN3"].to_ours(name, parameter.grad, peer.config.to_dict())
    ours = dict(model.named_parameters())
    assert ours.keys() == wanted.keys()
    for name, parameter in ours.items():
        assert (parameter.grad - wanted[name]).norm() < 1e-4 * wanted[name].norm(), name


def test_answers_are_the_greedy_ones_of_transformers(work, peer, tied):
    model, prompts = loaded(work / "base", tied), [pair.prompt for pair in random_pairs(3)]
    expected = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(6):
                tokens = torch.cat([tokens, peer(tokens).logits[:, -1:].argmax(-1)], dim=1)
        expected.append(tokens[0, len(prompt) :].tolist())
    assert generation.answers(model, prompts, world=ONE, stop_ids=[], max_new_tokens=6) == expected


def test_attention_by_a_dense_mask_is_the_same(work, tied):
    pairs, by_segments = random_pairs(4), loaded(work / "base", tied)
    by_mask = models.full(component(tied), dtype="fp32")
    models.prepare(by_mask, max_length=128, attention="mask")
    models.load(by_mask, checkpoint.Weights(read(work / "base")), world=ONE)
    torch.testing.assert_close(scores(by_mask, pairs), scores(by_segments, pairs), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_two_steps_of_a_recipe_and_its_export_in_transformers_and_peft(work, tied, method, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pairs, policy = random_pairs(4, seed=3), {}

    def gather_weights(model, world, gather=models.gather_weights, **options):
        assert any(isinstance(module, LoRALinear) for module in model.modules()) == (method != "full")
        policy["trained"] = scores(model, pairs).detach()
        return gather(model, world, **options)

    monkeypatch.setattr(models, "gather_weights", gather_weights)
    checkpointer = {"checkpoint_dir": str(work / "base"), "model_type": "QWEN3"}
    cfg = run_config(work, model=component(tied), checkpointer=checkpointer, epochs=1)
    (work / "config.yaml").write_text(OmegaConf.to_yaml(cfg))
    lr = "1e-3" if method == "full" else "5e-2"
    settings = [f"optimizer.lr={lr}", "clip_grad_norm=null", "samples.max_new_tokens=4", "lora.modules=[all-linear]"]
    recipe = f"{method}_dpo_single_device"
    settings = settings[: 4 - (method == "full")] + ["merge_into=dequantized"] * (method == "qlora")
    log = run_recipe(recipe, *settings, config_paths=[work / "config.yaml"])
    losses = [row["loss"] for row in log if "loss" in row]
    assert len(losses) == 2 and losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[1] != losses[0]
    exported = {"merged": AutoModelForCausalLM.from_pretrained(work / "run" / "export", dtype=torch.float32)}
    if method == "lora":
        base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
        with torch.no_grad():
            assert (logps_of(base, pairs) - policy["trained"]).abs().max() > 0.1  # training moved it
        exported["adapter"] = PeftModel.from_pretrained(base, work / "run" / "export" / "adapter")
    for name, model in exported.items():
        with torch.no_grad():
            torch.testing.assert_close(logps_of(model, pairs), policy["trained"], rtol=1e-5, atol=1e-4, msg=name)
