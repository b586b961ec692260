"""Mixtures of experts that transformers computes: log-probs, gradients, router loss, adapters and fewer bits."""

import runpy
import sys
from dataclasses import dataclass

import hf_peers
import pytest
import torch
import transformers
from helpers import ROOT, random_pairs
from torchtune.modules.peft import get_adapter_params

from pairtune import models
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint
from pairtune.models import grouped
from pairtune.models.frozen_base import is_held
from pairtune.models.logps import answer_scores
from pairtune.pairs.batch import lay_out
from pairtune.process import dist
from pairtune.run import contract

SIZES = {
    "vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64,
    "intermediate_size": 96, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "n_shared_experts": 1,
          "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
LATENT = ROUTED | {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 16,
                   "qk_nope_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
MIXTURES = {
    "Qwen3Moe": FOUR | {"moe_intermediate_size": 48, "head_dim": 16, "norm_topk_prob": True},
    "GptOss": LOCAL | {"head_dim": 16, "sliding_window": 8, "rope_parameters": {"rope_type": "default"}},
    "Mixtral": LOCAL,
    "Qwen2Moe": FOUR | {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48},
    "Olmoe": FOUR,
    "FlexOlmo": FOUR,
    "Glm4Moe": ROUTED | {"head_dim": 16},
    "DeepseekV2": LATENT,
    "DeepseekV3": LATENT,
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48},
    "GraniteMoe": LOCAL,
    "GraniteMoeShared": LOCAL | {"shared_intermediate_size": 48},
    "Dots1": ROUTED | {"head_dim": 16},
    "Llama4Text": LOCAL | {"num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 96,
                           "attention_chunk_size": 8},
    "Qwen3VLMoe": {
        "text_config": SIZES | FOUR | {"moe_intermediate_size": 48, "head_dim": 16, "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}},
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
                          "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    },
}  # fmt: skip
# transformers has no router loss for them: all but the last are kept even by a bias.
WITHOUT_LOSS = ("Glm4Moe", "DeepseekV2", "DeepseekV3", "Dots1", "Llama4Text")
TOOL = runpy.run_path(str(ROOT / "tools" / "check_plan.py"))
LORA = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}


def component(folder):
    return {"_component_": "pairtune.models.bridge.causal_lm", "path": str(folder)}


def save(folder, name):
    sizes = {} if "text_config" in MIXTURES[name] else SIZES
    return hf_peers.save_peer(folder, getattr(transformers, f"{name}Config")(**sizes | MIXTURES[name]))


def opened(folder):
    return hf_peers.open_folder(folder, "AUTO", component(folder))


def with_random_b(model):
    for module in model.modules():
        if isinstance(module, grouped.LoRAExpertsLinear):
            torch.nn.init.normal_(module.lora_b.weight, std=0.1)
    return model


@pytest.mark.parametrize("name", MIXTURES)
def test_log_probabilities_and_gradients_are_those_of_transformers(name, tmp_path):
    peer = save(tmp_path, name)
    files = opened(tmp_path)
    hf_peers.check_logps_and_gradients(peer, hf_peers.load_ours(files, component(tmp_path)), files)


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss", "GraniteMoe", "DeepseekV3", "Llama4Text"])
@pytest.mark.parametrize("changes", [{}, {"modules": ["w2"], "use_rslora": True}], ids=["all", "down"])
def test_adapters_of_experts_are_the_policy_merged_and_in_peft(name, changes, tmp_path):
    save(tmp_path / "base", name)
    files, lora = opened(tmp_path / "base"), LORA | changes
    model = with_random_b(hf_peers.load_ours(files, component(files.path), lora=lora))
    exported = hf_peers.check_export(files, model, tmp_path / "run", lora=lora)
    back = hf_peers.load_ours(files, component(files.path), lora=lora, adapter=exported / "adapter")
    with torch.no_grad():
        assert torch.equal(hf_peers.our_logps(back, random_pairs(4)), hf_peers.our_logps(model, random_pairs(4)))


@pytest.mark.parametrize("name", ["Qwen3Moe", "GptOss"])
def test_pefts_adapters_of_parameters_compute_here_what_they_do_there(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    save(tmp_path / "base", name)
    files, lora = opened(tmp_path / "base"), LORA | {"modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]}
    targets = ["mlp.experts.gate_up_proj", "experts.down_proj"]
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets, use_rslora=True)
    peer = get_peft_model(hf_peers.load_peer(files.path), settings).eval()
    for parameter_name, parameter in peer.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.1)
    peer.save_pretrained(tmp_path / "start")
    pairs, lora = random_pairs(4), lora | {"use_rslora": True}
    model = hf_peers.load_ours(files, component(files.path), lora=lora, adapter=tmp_path / "start")
    torch.testing.assert_close(hf_peers.our_logps(model, pairs), hf_peers.peer_logps(peer, pairs), rtol=1e-5, atol=0)
    for modules, said in (
        (["q_proj", "w2"], "means experts' down_proj, gate_up_proj, and lora.modules down_proj of experts"),
        (["q_proj"], "means experts' down_proj, gate_up_proj, and lora.modules none of experts"),
    ):
        with pytest.raises(UserError, match=said):
            lora = lora | {"modules": modules}
            hf_peers.load_ours(files, component(files.path), lora=lora, adapter=tmp_path / "start")


@pytest.mark.parametrize(
    ("name", "base_dtype"), [("Qwen3Moe", "nf4"), ("Llama4Text", "nf4"), ("GptOss", "int8"), ("Qwen3Moe", "fp8")]
)
def test_qlora_computes_what_its_dequantized_base_does(name, base_dtype, tmp_path):
    save(tmp_path, name)
    files = opened(tmp_path)

    def loaded(state, **how):
        model = models.lora(component(tmp_path), **LORA, dropout=0.0, dtype="fp32", **how)
        models.prepare(model, max_length=64)
        models.load(model, state, world=hf_peers.ONE)
        generator = torch.Generator().manual_seed(0)
        for parameter in get_adapter_params(model).values():
            parameter.data.normal_(std=0.1, generator=generator)
        return model

    def result(model):
        values = hf_peers.our_logps(model, random_pairs(4))
        values.sum().backward()
        return {"log-probs": values} | {n: p.grad for n, p in get_adapter_params(model).items()}

    held = loaded(checkpoint.Weights(files), quantize_base=True, base_dtype=base_dtype)
    weights, original = models.gather_weights(held, hf_peers.ONE), checkpoint.Weights(files)
    experts = [key for key in original if ".experts." in key and key.endswith("_proj.weight")]
    assert len(experts) == 4
    for key in experts:
        assert is_held(held.get_parameter(key).data)
        error = (weights[key] - original[key]).abs().mean() / original[key].abs().mean()
        assert 1e-3 < error < 0.12, key
    found, expected = result(held), result(loaded({k: v for k, v in weights.items() if ".lora_" not in k}))
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert torch.equal(value, expected[key]), key


def transformers_router_loss(peer, pairs, num_experts):
    """Of each token once: the mask leaves out of the rejected answers what the chosen ones have, too."""
    tokens, labels = hf_peers.padded(pairs)
    mask = torch.zeros_like(tokens)
    for i, pair in enumerate(pairs * 2):
        answer = pair.chosen if i < len(pairs) else pair.rejected
        mask[i, : len(pair.prompt) + len(answer)] = 1
    logits = peer(tokens, attention_mask=mask, output_router_logits=True).router_logits
    for i, pair in enumerate(pairs):
        alike = [a == b for a, b in zip(pair.chosen, pair.rejected, strict=False)]
        mask[len(pairs) + i, : len(pair.prompt) + [*alike, False].index(False)] = 0
    load_balancing_loss = vars(sys.modules[type(peer).__module__])["load_balancing_loss_func"]
    return load_balancing_loss(logits, num_experts, 2, mask)


@pytest.mark.parametrize("name", sorted(MIXTURES.keys() - WITHOUT_LOSS))
def test_the_router_loss_is_transformers_and_counts_a_shared_prompt_once(name, tmp_path):
    peer, pairs = save(tmp_path, name), random_pairs(4)
    expected = transformers_router_loss(peer, pairs, 4)
    expected.backward()
    model = hf_peers.load_ours(opened(tmp_path), component(tmp_path), checkpoint_activations=True)
    contract.check_router(model, 0.02)
    found = answer_scores(model, lay_out(pairs)).router_loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    routers = [(n, p.grad) for n, p in peer.named_parameters() if n.endswith(("gate.weight", "router.weight"))]
    ours = {models.plain_name(n): p.grad for n, p in model.named_parameters()}
    routers = [(n, gradient) for n, gradient in routers if gradient is not None and "shared" not in n]
    assert routers
    for n, gradient in routers:
        assert (ours[f"lm.{n}"] - gradient).norm() < 1e-4 * gradient.norm(), n
    assert answer_scores(model, lay_out([])).router_loss == 0


def test_a_router_loss_that_transformers_does_not_have_is_refused(tmp_path):
    save(tmp_path, "DeepseekV3")
    model = hf_peers.load_ours(opened(tmp_path), component(tmp_path))
    with pytest.raises(UserError, match="router_aux_loss_coef=0.02: .*nearest valid: router_aux_loss_coef=0"):
        contract.check_router(model, 0.02)


def test_magnitudes_of_experts_are_refused(tmp_path):
    save(tmp_path, "Qwen3Moe")
    settings = LORA | {"dropout": 0.0, "dtype": "fp32", "use_dora": True}
    with pytest.raises(UserError, match="lora.use_dora=true: experts' matrices have no magnitudes"):
        models.lora(component(tmp_path), **settings)
    models.lora(component(tmp_path), **settings | {"modules": ["q_proj"]})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [16, 5])
def test_grouped_products_are_those_of_each_expert(dtype, transposed, width):
    """Of 16 numbers a row one kernel takes all experts, of 5 each is multiplied by itself; one has no token."""
    torch.manual_seed(0)
    chosen = torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [0, 1]])
    shape = (4, width, 24) if transposed else (4, 24, width)
    layer = grouped.ExpertsLinear(shape, transposed)
    layer.weight = torch.nn.Parameter(torch.randn(shape).to(dtype))
    bias = torch.randn(4, 24).to(dtype).requires_grad_()
    tokens = torch.randn(5, width).to(dtype).requires_grad_()
    weights = torch.rand(5, 2)
    groups = grouped.Groups.of(chosen, 4)
    rows = layer(groups.spread(tokens), groups.ends) + grouped.rows_of(bias, groups.ends, 10)
    found = groups.gathered(rows, weights)
    inputs = [tokens, layer.weight, bias]
    upstream = torch.randn(5, 24).to(dtype)
    gradients = torch.autograd.grad(found, inputs, upstream)
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    matrices = exact[1] if transposed else exact[1].transpose(1, 2)
    expected = torch.stack(
        [
            sum(weights[t, k].double() * (exact[0][t] @ matrices[e] + exact[2][e]) for k, e in enumerate(of.tolist()))
            for t, of in enumerate(chosen)
        ]
    )
    wanted = torch.autograd.grad(expected, exact, upstream.double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for value, other in zip([found, *gradients], [expected, *wanted], strict=True):
        assert value.dtype == dtype and (value - other).norm() <= bound * other.norm()
    assert (gradients[1][2] == 0).all()


def test_what_a_run_with_a_router_loss_exports_is_what_it_measured(tmp_path):
    save(tmp_path / "base", "Qwen3Moe")
    changes = {"router_aux_loss_coef": 0.02, "enable_activation_checkpointing": True}
    hf_peers.write_config(tmp_path, component(tmp_path / "base"), "AUTO", lora=LORA, **changes)
    hf_peers.check_run(tmp_path, "full")


@dataclass(frozen=True)
class Planned(TOOL["Case"]):
    @property
    def component(self):
        return self.sizes


def check_plan(folder, config, method, **how):
    """What `tune plan` counts is what two training steps allocate, in a model that is wide enough to tell."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # attention has buffers a thread
    config.get_text_config().update({"vocab_size": 2000, "hidden_size": 128, "max_position_embeddings": 512})
    config.save_pretrained(folder)
    dtype = "bf16" if method == "qlora" else "fp32"
    case = Planned(method, dtype, 2, 60, 60, modules=("all-linear",), sizes=component(folder), **how)
    try:
        measured = TOOL["measure"](case, dist.start("cpu"))
    finally:
        torch.set_num_threads(threads)
    assert TOOL["predict"](case).total == pytest.approx(measured, rel=0.01)


def test_predicted_peak_is_what_a_training_step_allocates(tmp_path):
    config = transformers.GptOssConfig(**SIZES | MIXTURES["GptOss"])
    check_plan(tmp_path, config, "qlora", checkpointing=True)
