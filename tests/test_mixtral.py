"""Mixtral computes what transformers' does: log-probabilities, gradients, router loss; trained and given back."""

import json

import pytest
import torch
from helpers import random_pairs, run_config, run_recipe, save_llama, save_pairs
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import LoRALinear
from torchtune.rlhf import get_batch_log_probs

from pairtune import adapters, checkpoint, contract, experts, mixtral, models
from pairtune.batch import lay_out
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.export import export
from pairtune.logps import answer_logps, answer_scores
from pairtune.model_config import check_model

ONE = World(torch.device("cpu"))
SIZES = {
    "vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 128, "intermediate_dim": 128,
    "max_seq_len": 128, "num_experts": 4, "experts_per_token": 2,
}  # fmt: skip
COMPONENT = {"_component_": "pairtune.mixtral.mixtral", **SIZES}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "output_proj"]}
LORA = LORA | {"dtype": "fp32"}


def save_mixtral(folder, *, width=128, **options):
    """Writes transformers' random Mixtral of SIZES, with a tokenizer, and returns it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    peer = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=320, hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
            initializer_range=0.08, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    if not (folder / "tokenizer.json").exists():
        save_llama(folder)
    peer.save_pretrained(folder, **options)
    return peer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder and transformers' model of it."""
    folder = tmp_path_factory.mktemp("mixtral") / "base"
    return folder, save_mixtral(folder).eval()


def open_folder(folder):
    block = {"checkpoint_dir": str(folder), "model_type": "MIXTRAL"}
    return checkpoint.open_weights(OmegaConf.create(block))


def loaded(folder, method="full", *, seed=0, dtype="fp32", **changes):
    """Our model with the folder's weights, prepared and loaded; adapters' B matrices are away from zero."""
    if method == "full":
        model = models.full(COMPONENT, dtype=dtype)
    else:
        lora = {name: changes.pop(name, value) for name, value in LORA.items()}
        model = models.lora(COMPONENT, **lora | {"dtype": dtype}, quantize_base=method == "qlora")
    models.prepare(model, max_length=128, **changes)
    models.load(model, checkpoint.Weights(open_folder(folder)), world=ONE)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b.weight, std=0.1)
    return model


def padded(pairs):
    """Every conversation alone in a padded row, chosen ones first: tokens, labels, attention mask."""
    conversations = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    width = max(len(prompt) + len(answer) for prompt, answer in conversations)
    tokens = torch.zeros(len(conversations), width, dtype=torch.long)
    labels = torch.full_like(tokens, -100)
    for i, (prompt, answer) in enumerate(conversations):
        tokens[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    mask = torch.zeros_like(tokens)
    for i, (prompt, answer) in enumerate(conversations):
        mask[i, : len(prompt) + len(answer)] = 1
    return tokens, labels, mask


def transformers_logps(peer, pairs):
    tokens, labels, mask = padded(pairs)
    return get_batch_log_probs(peer(tokens, attention_mask=mask).logits, labels)


def scores(model, pairs):
    with torch.no_grad():
        return torch.cat(answer_logps(model, lay_out(pairs, 256 if model.dense_attention else None)))


def named_gradients(peer, config):
    """transformers' gradients under our names, from its experts' stacked ones."""
    family, found = open_folder_family(), {}
    for name, parameter in peer.named_parameters():
        found |= family.to_ours(name, parameter.grad, config)
    return found


def open_folder_family():
    from pairtune.families import FAMILIES

    return FAMILIES["MIXTRAL"]


# What it computes


@pytest.mark.parametrize("attention", ["segments", "mask"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_log_probabilities_and_gradients_are_those_of_transformers(base, attention, checkpointing):
    folder, peer = base
    pairs, upstream = random_pairs(4), torch.randn(8)
    peer.zero_grad()
    expected = transformers_logps(peer, pairs)
    (expected * upstream).sum().backward()
    model = loaded(folder, attention=attention, checkpoint_activations=checkpointing)
    values = torch.cat(answer_logps(model, lay_out(pairs, 256 if attention == "mask" else None)))
    (values * upstream).sum().backward()
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=1e-5)
    wanted = named_gradients(peer, open_folder(folder).config)
    found = {models.plain_name(name): p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name
