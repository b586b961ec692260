"""Mixtral computes what transformers' does: log-probabilities, gradients, router loss; trained and given back."""

import copy
import json
import math
import os
import subprocess
import sys
from itertools import combinations

import pytest
import torch
from helpers import ROOT, from_first_step, random_pairs, run_config, run_recipe, save_llama, save_pairs
from helpers import SIZES as SIZES_OF_LLAMA
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import nn
from torchao.dtypes.nf4tensor import NF4Tensor
from torchtune.modules.peft import LoRALinear
from torchtune.rlhf import get_batch_log_probs

from pairtune import models
from pairtune.errors import UserError
from pairtune.folders import peft as adapters
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import check_model
from pairtune.folders.export import export
from pairtune.folders.families import FAMILIES
from pairtune.models import experts, mixtral
from pairtune.models.logps import answer_logps, answer_scores
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World
from pairtune.run import contract

ONE = World(torch.device("cpu"))
SIZES = {
    "vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "intermediate_dim": 256,
    "max_seq_len": 128, "num_experts": 8, "experts_per_token": 2,
}  # fmt: skip
COMPONENT = {"_component_": "pairtune.mixtral.mixtral", **SIZES}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ATTENTION, "dtype": "fp32"}
PAIRS = random_pairs(8, seed=1, prompt=(2, 6), answer=(1, 3), shared=(0, 0))


def save_mixtral(folder, **options):
    """Writes transformers' random Mixtral of SIZES, with a tokenizer, and returns it."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    peer = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=320, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=128,
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


def loaded(folder, method="full", *, modules=None, dtype="fp32", **changes):
    """Our model with the folder's weights, prepared and loaded; adapters' B matrices are away from zero."""
    if method == "full":
        model = models.full(COMPONENT, dtype=dtype)
    else:
        lora = LORA | {"modules": modules or LORA["modules"]}
        model = models.lora(COMPONENT, **lora, quantize_base=method == "qlora")
    models.prepare(model, max_length=128, **changes)
    models.load(model, checkpoint.Weights(open_folder(folder)), world=ONE)
    torch.manual_seed(1)
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


def transformers_router_loss(peer, pairs):
    """Of these pairs' tokens, each once: the mask leaves out of the rejected answers what the chosen ones have, too."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    tokens, _, mask = padded(pairs)
    logits = peer(tokens, attention_mask=mask, output_router_logits=True).router_logits
    for i, pair in enumerate(pairs):
        alike = [a == b for a, b in zip(pair.chosen, pair.rejected, strict=False)]
        mask[len(pairs) + i, : len(pair.prompt) + [*alike, False].index(False)] = 0
    return load_balancing_loss_func(logits, 8, 2, mask)


def scores(model, pairs):
    with torch.no_grad():
        return torch.cat(answer_logps(model, lay_out(pairs, 256 if model.pairtune.takes_fixed_rows else None)))


def gradients_under_our_names(peer, config):
    """transformers' gradients, from its experts' stacked ones."""
    found = {}
    for name, parameter in peer.named_parameters():
        if parameter.grad is not None:
            found |= FAMILIES["MIXTRAL"].to_ours(name, parameter.grad, config)
    return found


def merged_and_adapter(model):
    weights = models.gather_weights(model, ONE)
    return models.merge_adapters(model, weights), models.only_adapters(model, weights)


# What it computes


def test_a_copy_of_a_model_scores_by_itself():
    """What pairtune keeps with a model goes along: its mixtures are the copy's own."""
    torch.manual_seed(0)
    model = mixtral.mixtral(**SIZES)
    models.prepare(model, max_length=128, windows=[8, None])
    twin, pairs = copy.deepcopy(model), random_pairs(2)
    assert twin.pairtune.lora is None and twin.pairtune.windows == [8, None]
    assert [id(m) for m in twin.pairtune.mixtures] == [id(layer.mlp) for layer in twin.layers]
    before = scores(model, pairs)
    assert torch.equal(scores(twin, pairs), before)
    with torch.no_grad():
        twin.output.weight.zero_()
    assert torch.equal(scores(model, pairs), before) and not torch.equal(scores(twin, pairs), before)


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
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)  # of sums of 100 nats
    wanted = gradients_under_our_names(peer, open_folder(folder).config)
    found = {models.plain_name(name): p.grad for name, p in model.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm(), name


def test_bf16_differs_from_float32_as_it_does_in_transformers(base):
    folder, peer = base
    pairs = random_pairs(4)
    with torch.no_grad():
        expected = transformers_logps(peer, pairs)
        theirs = transformers_logps(save_mixtral(folder).bfloat16().eval(), pairs).float()
    ours = scores(loaded(folder, dtype="bf16"), pairs)
    assert ours.dtype == torch.float32
    assert 0 < (ours - expected).abs().max() < 2 * (theirs - expected).abs().max()


def test_an_expert_without_tokens_has_gradients_of_zero(base):
    """Absent ones would make processes send each other different things."""
    folder, _ = base
    pairs = random_pairs(1, prompt=(1, 1), answer=(1, 1), shared=(0, 0))
    for method in ("full", "lora"):
        model = loaded(folder, method, modules=["mlp"])
        with experts.recorded_routing(model.pairtune.mixtures) as routing:
            chosen, rejected = answer_logps(model, lay_out(pairs))
        (chosen - rejected).sum().backward()
        used = [set(layer.topk(2).indices.flatten().tolist()) for layer in routing]
        assert any(len(numbers) < 8 for numbers in used)
        for name, parameter in model.named_parameters():
            if ".experts." not in name or not parameter.requires_grad:
                continue
            layer, expert = int(name.split(".")[1]), int(name.split(".experts.")[1].split(".")[0])
            idle = expert not in used[layer]
            assert (parameter.grad.abs().max() == 0) == idle, name


def test_the_router_loss_and_its_gradient_are_those_of_transformers(base):
    folder, peer = base
    pairs = random_pairs(4)
    peer.zero_grad()
    expected = transformers_router_loss(peer, pairs)
    expected.backward()
    wanted = gradients_under_our_names(peer, open_folder(folder).config)
    for checkpointing in (False, True):
        model = loaded(folder, checkpoint_activations=checkpointing, attention="mask")
        found = answer_scores(model, lay_out(pairs, 256)).router_loss
        found.backward()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None and wanted[models.plain_name(name)].norm() > 0:
                error = (parameter.grad - wanted[models.plain_name(name)]).norm()
                assert error <= 1e-4 * wanted[models.plain_name(name)].norm(), name
        assert model.get_parameter(router_of(model)).grad.norm() > 0


def router_of(model):
    return next(name for name, _ in model.named_parameters() if name.endswith("mlp.router.weight"))


def test_a_batch_of_padding_has_a_router_loss_of_zero(base):
    model = loaded(base[0])
    loss = answer_scores(model, lay_out([])).router_loss
    loss.backward()
    assert loss == 0 and all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


# What it is made of


def test_the_sizes_are_the_published_ones():
    """Weights of mistralai/Mixtral-8x7B-v0.1 and Mixtral-8x22B-v0.1, as their safetensors' headers add up."""
    with torch.device("meta"):
        built = {8 * 7: mixtral.mixtral_8x7b(), 8 * 22: mixtral.mixtral_8x22b()}
    assert models.num_parameters(built[8 * 7])[0] == 46_702_792_704
    assert models.num_parameters(built[8 * 22])[0] == 140_620_634_112


@pytest.mark.parametrize(("method", "per_layer"), [("lora", 0), ("qlora", 4 + 3 * 8)])
def test_adapters_are_on_every_expert_and_the_router_stays_as_it_is(base, method, per_layer):
    model = loaded(base[0], method, modules=["q_proj", "mlp"])
    adapted = {name for name, _ in models.adapted_modules(model)}
    mlp = {f"layers.{i}.mlp.experts.{e}.w{n}" for i in range(2) for e in range(8) for n in (1, 2, 3)}
    assert adapted == mlp | {f"layers.{i}.attn.q_proj" for i in range(2)}
    quantized = [name for name, p in model.named_parameters() if isinstance(p.data, NF4Tensor)]
    assert len(quantized) == 2 * per_layer
    assert type(model.layers[0].mlp.router) is nn.Linear and not model.layers[0].mlp.router.weight.requires_grad
    named = models.lora(COMPONENT, **LORA | {"modules": ["router"]}, quantize_base=method == "qlora")
    assert [name for name, _ in models.adapted_modules(named)] == ["layers.0.mlp.router", "layers.1.mlp.router"]
    assert not isinstance(named.layers[0].mlp.router.weight.data, NF4Tensor)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_merged_adapters_compute_what_the_adapted_model_computes(base, method):
    model, pairs = loaded(base[0], method, modules=["q_proj", "mlp", "router"]), random_pairs(3)
    merged, _ = merged_and_adapter(model)
    plain = models.full(COMPONENT, dtype="fp32")
    models.prepare(plain, max_length=128)
    models.load(plain, merged, world=ONE)
    torch.testing.assert_close(scores(plain, pairs), scores(model, pairs), atol=1e-3, rtol=0)


@pytest.mark.parametrize("key", ["num_local_experts", "num_experts_per_tok"])
def test_another_number_of_experts_is_refused(base, key):
    config = open_folder(base[0]).config
    model = models.full(COMPONENT, dtype="fp32")
    check_model(model, config)
    with pytest.raises(UserError, match=f"{key} is . in `model` and 3 in config.json"):
        check_model(model, config | {key: 3})


def test_a_router_loss_without_a_router_is_refused(base):
    contract.check_router(loaded(base[0]), 0.02)
    llama = models.full({"_component_": "torchtune.models.llama3.llama3", **SIZES_OF_LLAMA}, dtype="fp32")
    contract.check_router(llama, 0.0)
    with pytest.raises(UserError, match="router_aux_loss_coef=0.02: .*nearest valid: router_aux_loss_coef=0"):
        contract.check_router(llama, 0.02)


# Weights in and out


def test_weights_under_transformers_own_names_are_read_too(base, tmp_path):
    save_mixtral(tmp_path, save_original_format=False)
    hub, own = (checkpoint.Weights(open_folder(folder)) for folder in (base[0], tmp_path))
    assert "model.layers.0.mlp.experts.gate_up_proj" in load_file(tmp_path / "model.safetensors")
    assert set(hub) == set(own)
    for name in hub:
        assert torch.equal(hub[name], own[name]), name


def test_attention_adapters_are_the_policy_in_peft_and_come_back(base, tmp_path):
    from peft import PeftModel

    folder, _ = base
    files, model = open_folder(folder), loaded(folder, "lora")
    merged, adapter = merged_and_adapter(model)
    exported = export(files, tmp_path / "run", merged=merged, adapter=adapter, lora=LORA)
    tokens = torch.randint(3, 320, (2, 30))
    with torch.no_grad():
        peer = PeftModel.from_pretrained(save_mixtral(folder), exported / "adapter").eval()
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-3, rtol=1e-4)
    back = adapters.read_adapter(exported / "adapter", model, files)
    assert back.keys() == adapter.keys() and all(torch.equal(back[name], adapter[name]) for name in back)


class ExpertsAsLayers(nn.Module):
    """A mixture as transformers 4 had it: each expert three linear layers under the Hub's names."""

    def __init__(self, mixture):
        super().__init__()
        number, inner, width = mixture.experts.gate_up_proj.shape
        self.gate = linear(mixture.gate.weight)
        self.experts = nn.ModuleList(nn.Module() for _ in range(number))
        for n, expert in enumerate(self.experts):
            gate, up = mixture.experts.gate_up_proj[n].chunk(2)
            expert.w1, expert.w2, expert.w3 = linear(gate), linear(mixture.experts.down_proj[n]), linear(up)

    def forward(self, x):
        chances = self.gate(x).softmax(-1)
        top = chances.topk(2)
        weights = torch.zeros_like(chances).scatter(-1, top.indices, top.values / top.values.sum(-1, keepdim=True))
        outputs = [e.w2(nn.functional.silu(e.w1(x)) * e.w3(x)) for e in self.experts]
        return sum(weights[..., n, None] * y for n, y in enumerate(outputs))


def linear(weight):
    layer = nn.Linear(*reversed(weight.shape), bias=False)
    layer.weight = nn.Parameter(weight.detach().clone())
    return layer


def test_expert_adapters_are_the_policy_in_peft_where_experts_are_layers(base, tmp_path):
    """As in transformers 4. In version 5 experts are no layers, and PEFT 0.18 would leave their adapters out."""
    from peft import PeftModel

    folder, _ = base
    lora = LORA | {"modules": ["q_proj", "mlp", "router"]}
    files, model = open_folder(folder), loaded(folder, "lora", modules=lora["modules"])
    merged, adapter = merged_and_adapter(model)
    exported = export(files, tmp_path / "run", merged=merged, adapter=adapter, lora=lora)
    peer = save_mixtral(folder)
    for layer in peer.model.layers:
        mixture = ExpertsAsLayers(layer.mlp)
        del layer.mlp
        layer.block_sparse_moe = mixture
        object.__setattr__(layer, "mlp", mixture)  # where its forward looks for it; named once only
    peer = PeftModel.from_pretrained(peer, exported / "adapter").eval()
    assert len([name for name, _ in peer.named_parameters() if "lora_A" in name]) == 2 * (1 + 1 + 3 * 8)
    tokens = torch.randint(3, 320, (2, 30))
    with torch.no_grad():
        torch.testing.assert_close(peer(tokens).logits, model(tokens), atol=1e-3, rtol=1e-4)
    back = adapters.read_adapter(exported / "adapter", model, files)
    assert back.keys() == adapter.keys() and all(torch.equal(back[name], adapter[name]) for name in back)
    assert "leaves the experts' matrices out" in (exported / "adapter" / "README.md").read_text()


# Runs


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a model that NF4 can cut in two, pairs, and the config of runs on them."""
    work = tmp_path_factory.mktemp("work")
    save_mixtral(work / "base")
    save_pairs(work / "train.jsonl", PAIRS)
    save_pairs(work / "held_out.jsonl", random_pairs(4, seed=2))
    cfg = run_config(
        work,
        model=COMPONENT,
        checkpointer={"checkpoint_dir": str(work / "base"), "model_type": "MIXTRAL"},
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3},
        batch_size=1, max_steps=2, router_aux_loss_coef=0.02, samples={"num_prompts": 1, "max_new_tokens": 3},
    )  # fmt: skip
    (work / "config.yaml").write_text(json.dumps(cfg))
    return work


def run(work, recipe, *overrides):
    folder = work / "-".join([recipe, *overrides]).replace("=", "_")
    return folder, run_recipe(recipe, f"output_dir={folder}", *overrides, config_paths=[work / "config.yaml"])


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_an_export_is_the_trained_policy_in_transformers(work, method):
    from transformers import MixtralForCausalLM

    as_trained = ["merge_into=dequantized"] if method == "qlora" else []
    folder, log = run(work, f"{method}_dpo_single_device", *as_trained)
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)  # without the router's loss
    assert 2 < log[0]["router_loss"] < 8  # 2 where all experts are used alike, 8 where always the same two are
    peer, loading = MixtralForCausalLM.from_pretrained(folder / "export", dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        chosen, rejected = transformers_logps(peer.eval(), random_pairs(4, seed=2)).chunk(2)
    held_out = next(row for row in log if "eval/loss" in row)
    assert "eval/router_loss" in held_out
    assert chosen.mean() == pytest.approx(held_out["eval/logps/chosen"], rel=1e-5)
    assert rejected.mean() == pytest.approx(held_out["eval/logps/rejected"], rel=1e-5)
    assert abs(held_out["eval/rewards/margins"]) > 1e-4  # it moved


def test_the_router_loss_enters_a_step_by_its_coefficient(work):
    """Two steps of plain gradient descent differ by learning rate times coefficient times transformers' gradient."""
    from transformers import MixtralForCausalLM

    changes = ["optimizer={_component_: torch.optim.SGD, lr: 1.0}", "lr_scheduler=null", "clip_grad_norm=null"]
    changes += ["max_steps=1", "batch_size=8"]
    weights = []
    for coefficient in (0.0, 2.0):
        folder = work / f"coefficient-{coefficient}"
        changed = [*changes, f"router_aux_loss_coef={coefficient}", f"output_dir={folder}"]
        run_recipe("full_dpo_single_device", *changed, config_paths=[work / "config.yaml"])
        weights.append(load_file(folder / "export" / "model.safetensors"))
    peer = MixtralForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    transformers_router_loss(peer, PAIRS).backward()
    for n, layer in enumerate(peer.model.layers):
        name = f"model.layers.{n}.block_sparse_moe.gate.weight"
        torch.testing.assert_close((weights[0][name] - weights[1][name]) / 2, layer.mlp.gate.weight.grad,
                                   atol=1e-6, rtol=1e-3)  # fmt: skip


def test_two_processes_give_the_numbers_of_one(work):
    """A step has two pairs of a few tokens, one a process, and experts that only one of them has tokens for."""
    model, used = loaded(work / "base"), []
    for pair in PAIRS:
        with experts.recorded_routing(model.pairtune.mixtures) as routing, torch.no_grad():
            answer_logps(model, lay_out([pair]))
        used.append([sorted(set(layer.topk(2).indices.flatten().tolist())) for layer in routing])
    assert all(a != b for a, b in combinations(used, 2))  # whatever two pairs share a step
    _, expected = run(work, "full_dpo_single_device", "pairs_per_step=2")
    folder = work / "two"
    command = [
        *(sys.executable, "-m", "pairtune.cli", "run", "--nproc_per_node", "2"),
        *(str(ROOT / "recipes" / "full_dpo_distributed.py"), "--config", str(work / "config.yaml")),
        *(f"output_dir={folder}", "pairs_per_step=2"),
    ]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    log = from_first_step(folder / "metrics.jsonl")
    assert len(log) == len(expected)
    for row, wanted in zip(log, expected, strict=True):
        for key in row.keys() - {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}:
            assert row[key] == pytest.approx(wanted[key], rel=1e-5, abs=1e-5), (row["step"], key)
