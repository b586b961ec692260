"""A run starts from any adapter, its reference is what it says, moves as it says, and disturbs no gradient."""

import copy
import json
import math
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
from helpers import (
    ENVIRONMENT,
    NF4_SIZES,
    SIZES,
    padded_logps,
    random_pairs,
    run_config,
    run_recipe,
    save_llama,
    save_pairs,
    tiny_llama,
)
from omegaconf import OmegaConf
from reference_worker import train
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from torchao.dtypes.nf4tensor import to_nf4

from pairtune import models
from pairtune.errors import UserError
from pairtune.folders import peft as adapters
from pairtune.folders import weights as checkpoint
from pairtune.folders.export import export
from pairtune.models.divergence import token_divergence
from pairtune.models.logps import answer_logps, answer_token_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World
from pairtune.reference.sources import AdapterCopy, AdaptersOff, SecondModel, open_second_model
from pairtune.tokenizer.hf import HFTokenizer

ONE = World(torch.device("cpu"))
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]}
HEADS = {"vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "intermediate_dim": 96}
MODELS = {  # kind of transformers model: model_type, torchtune's builder, its arguments, transformers' arguments
    "Llama": ("LLAMA3", "torchtune.models.llama3.llama3", {"rope_base": 10_000}, {"rope_theta": 10_000.0}),
    "Mistral": ("MISTRAL", "torchtune.models.mistral.mistral", {"rope_base": 10_000}, {"rope_theta": 10_000.0}),
    "Qwen2": ("QWEN2", "torchtune.models.qwen2.qwen2", {"rope_base": 1e6}, {"rope_theta": 1e6}),
    "Gemma": ("GEMMA", "torchtune.models.gemma.gemma", {"head_dim": 32}, {"head_dim": 32}),
    "Phi3": ("PHI3_MINI", "torchtune.models.phi3.phi3", {"rope_base": 10_000}, {"rope_theta": 10_000.0}),
}


def component(sizes=SIZES):
    return {"_component_": "torchtune.models.llama3.llama3", **sizes}


def random_adapter(model, *, seed=1, std=0.1):
    """What an SFT run may have left: no matrix is zero, and DoRA's magnitudes are about 1."""
    generator = torch.Generator().manual_seed(seed)
    shapes = sorted(models.adapter_shapes(model).items())
    return {name: torch.randn(shape, generator=generator) * std + name.endswith("magnitude") for name, shape in shapes}


def loaded(*, sizes=SIZES, start="sft", checkpointing=False, **changes):
    """A prepared model; `start` is the adapter: sft (random_adapter) or fresh."""
    model = models.lora(component(sizes), **{**LORA, "dtype": "fp32", "frozen_copy": True, **changes})
    models.prepare(model, max_length=128, checkpoint_activations=checkpointing)
    adapter = random_adapter(model) if start == "sft" else None
    models.load(model, tiny_llama(**sizes).state_dict(), world=ONE, adapter=adapter)
    return model


def scores(model, pairs):
    with torch.no_grad():
        return torch.cat(answer_logps(model, lay_out(pairs)))


def reference_scores(reference, pairs):
    with reference.weights() as frozen:
        return torch.cat(answer_logps(frozen, lay_out(pairs)))


def dpo_losses(policy, reference):
    """arXiv 2305.18290, eq. 7, of chosen and rejected log-probabilities under both, [2P] each."""
    (chosen, rejected), (ref_chosen, ref_rejected) = policy.chunk(2), reference.chunk(2)
    return -logsigmoid(0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected)))


def train_steps(model, pairs, *, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        chosen, rejected = answer_logps(model, lay_out(pairs))
        (rejected - chosen).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def trained_values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# Starting from an adapter


def saved_base(kind, folder, *, seed=0):
    """A random transformers model in `folder`: its checkpointer here, and torchtune's component."""
    import transformers

    torch.manual_seed(seed)
    model_type, path, ours, theirs = MODELS[kind]
    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": kind == "Gemma",
        "pad_token_id": 0, "rms_norm_eps": 1e-5, "initializer_range": 0.08,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes, **theirs))
    model.save_pretrained(folder)
    cfg = {"checkpoint_dir": str(folder), "model_type": model_type}
    cfg = OmegaConf.create({"_component_": "torchtune.training.FullModelHFCheckpointer", **cfg})
    files = checkpoint.open_weights(cfg)
    return files, {"_component_": path, **HEADS, "max_seq_len": 128, "norm_eps": 1e-5, **ours}


def built(files, component, *, adapter=None, **changes):
    model = models.lora(component, **{**LORA, "dtype": "fp32", **changes})
    models.prepare(model, max_length=128)
    models.load(model, checkpoint.Weights(files), world=ONE, adapter=adapter)
    return model


@pytest.mark.parametrize("kind", MODELS)
def test_an_exported_adapter_is_read_back_bit_for_bit(tmp_path, kind):
    files, component = saved_base(kind, tmp_path / "base")
    model = models.lora(component, **LORA, dtype="fp32")
    adapter = random_adapter(model)
    trained = built(files, component, adapter=adapter)
    gathered = models.gather_weights(trained, ONE)
    only = models.only_adapters(trained, gathered)
    assert {name: value.tolist() for name, value in only.items()} == {n: v.tolist() for n, v in adapter.items()}
    merged = models.merge_adapters(trained, gathered)
    exported = export(files, tmp_path / "run", merged=merged, adapter=only, lora=LORA)
    read = adapters.read_adapter(exported / "adapter", model, files)
    assert read.keys() == adapter.keys()
    for name, value in read.items():
        assert torch.equal(value, adapter[name]), name
    pairs = random_pairs(3)
    assert torch.equal(scores(built(files, component, adapter=read), pairs), scores(trained, pairs))


@pytest.mark.parametrize(
    ("kind", "modules"),
    [
        ("Llama", LORA["modules"]),
        ("Llama", ["k_proj", "output"]),
        ("Mistral", ["q_proj", "v_proj"]),
        ("Qwen2", LORA["modules"]),
        ("Gemma", ["q_proj", "k_proj", "mlp"]),
    ],
)
def test_an_adapter_that_peft_wrote_has_pefts_log_probabilities(tmp_path, kind, modules):
    import peft
    from transformers import AutoModelForCausalLM

    files, component = saved_base(kind, tmp_path / "base")
    names = {"output_proj": "o_proj", "output": "lm_head"}
    targets = [names.get(m, m) for m in modules if m != "mlp"]
    targets += ["gate_proj", "up_proj", "down_proj"] if "mlp" in modules else []
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False}
    torch.manual_seed(1)
    peft.get_peft_model(base, peft.LoraConfig(**settings, task_type="CAUSAL_LM")).save_pretrained(tmp_path / "sft")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    pairs = random_pairs(3)
    before = transformers_scores(base, pairs)
    expected = transformers_scores(peft.PeftModel.from_pretrained(base, tmp_path / "sft"), pairs)
    lora = LORA | {"modules": modules}
    adapter = adapters.read_adapter(tmp_path / "sft", models.lora(component, **lora, dtype="fp32"), files)
    found = scores(built(files, component, adapter=adapter, **lora), pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # float32, sums of about 100 nats
    assert (expected - before).abs().max() > 1


def transformers_scores(model, pairs):
    values = []
    for answer in ("chosen", "rejected"):
        for pair in pairs:
            tokens, start = torch.tensor([pair.prompt + getattr(pair, answer)]), len(pair.prompt)
            with torch.no_grad():
                logps = model(tokens).logits[0, start - 1 : -1].double().log_softmax(-1)
            values.append(logps.gather(-1, tokens[0, start:, None]).sum())
    return torch.stack(values).float()


@pytest.mark.parametrize("quantize_base", [False, True])
def test_a_model_that_starts_from_an_adapter_holds_it_whatever_wraps_its_layers(quantize_base):
    model = loaded(sizes=NF4_SIZES, checkpointing=True, quantize_base=quantize_base)
    adapter = random_adapter(model)
    held = models.only_adapters(model, models.gather_weights(model, ONE))
    assert held.keys() == adapter.keys()
    for name, value in held.items():
        assert torch.equal(value, adapter[name]), name
    assert trained_values(model).keys() == {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_an_adapter_takes_the_models_dtype():
    model = loaded(dtype="bf16")
    held = models.only_adapters(model, models.gather_weights(model, ONE))
    for name, value in random_adapter(model).items():
        assert torch.equal(held[name], value.bfloat16()), name


@pytest.fixture(scope="module")
def peft_folder(tmp_path_factory):
    """A tiny Llama's checkpointer, its component, and the files of an adapter as PEFT writes it."""
    import peft
    from transformers import AutoModelForCausalLM

    work = tmp_path_factory.mktemp("peft")
    files, component = saved_base("Llama", work / "base")
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(base, settings).save_pretrained(work / "sft")
    config = json.loads((work / "sft" / "adapter_config.json").read_text())
    return files, component, config, load_file(work / "sft" / "adapter_model.safetensors")


def write_adapter(folder, config, tensors, name="adapter_model.safetensors"):
    folder.mkdir()
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if name.endswith(".safetensors"):
        save_file(tensors, folder / name)
    else:
        torch.save(tensors, folder / name)


def read_from(peft_folder, folder, **changes):
    files, component, _, _ = peft_folder
    lora = LORA | {"modules": ["q_proj", "v_proj"]} | changes
    return adapters.read_adapter(folder, models.lora(component, **lora, dtype="fp32"), files)


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("r", 16, ["q_proj.lora_A is [4, 64]", "not rank 16"]),
        ("r", None, ["r is null", "must be a whole number above 0"]),
        ("lora_alpha", 32, ["lora_alpha is 32", "lora.alpha is 8.0", "lora.alpha=32"]),
        ("target_modules", ["q_proj"], ["target_modules is q_proj", "lora.modules=[q_proj]"]),
        ("target_modules", ["o_proj", "lm_head", "gate_proj", "up_proj", "down_proj"], ["[output_proj, mlp, output]"]),
        ("target_modules", ["q_proj", "up_proj"], ["target_modules is q_proj, up_proj", "[q_proj, up_proj]"]),
        ("target_modules", ["q_proj", "embed_tokens"], ["embed_tokens", "lm_head"]),
        ("peft_type", "IA3", ["peft_type is IA3"]),
        ("use_rslora", True, ["use_rslora is True", "lora.use_rslora is False", "lora.use_rslora=true"]),
        ("use_dora", True, ["use_dora is True", "lora.use_dora=true"]),
        ("rank_pattern", {"q_proj[": 8}, ["rank_pattern={q_proj[: 8}", "must be numbers by patterns"]),
        ("rank_pattern", ["q_proj"], ["rank_pattern=[q_proj]", "must be numbers by patterns"]),
        ("alpha_pattern", {"q_proj": "16"}, ["alpha_pattern", "must be numbers by patterns"]),
        ("bias", "lora_only", ["bias=lora_only"]),
        ("lora_bias", True, ["lora_bias"]),
        ("modules_to_save", ["lm_head"], ["modules_to_save", "lm_head"]),
        ("rank_pattern", {"q_proj": 8}, ["q_proj.lora_A is [4, 64]", "not rank 8"]),
        ("alpha_pattern", {"q_proj": 16}, ["q_proj has rank 4 and alpha 16", "rank 4 and alpha 8", "merge it"]),
        ("layers_to_transform", [0], ["layers_to_transform"]),
        ("init_lora_weights", "pissa", ["init_lora_weights=pissa", "base weights"]),
    ],
)
def test_settings_of_an_adapter_that_the_run_does_not_share_are_refused_by_name(
    tmp_path, peft_folder, setting, value, words
):
    _, _, config, tensors = peft_folder
    write_adapter(tmp_path / "sft", config | {setting: value}, tensors)
    with pytest.raises(UserError) as error:
        read_from(peft_folder, tmp_path / "sft")
    for word in [str(tmp_path / "sft"), *words]:
        assert word in str(error.value)


def test_paths_patterns_and_plain_names_of_layers_are_understood(tmp_path, peft_folder):
    _, _, config, tensors = peft_folder
    paths = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
    read = []
    for i, targets in enumerate([config["target_modules"], paths, r".*\.(q|v)_proj"]):
        write_adapter(tmp_path / str(i), config | {"target_modules": targets}, tensors)
        read.append(read_from(peft_folder, tmp_path / str(i)))
    assert len(read[0]) == 8
    assert all(torch.equal(other[name], value) for other in read[1:] for name, value in read[0].items())


LAYER_1 = "base_model.model.model.layers.1.self_attn"
Q, V = (f"{LAYER_1}.{name}_proj.lora_B.weight" for name in "qv")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (Q, None, ["layers.1.self_attn.q_proj.lora_B is not in it, and the other matrix is"]),
        (Q.replace(".1.", ".9."), torch.ones(64, 4), ["layers.9.self_attn.q_proj.lora_A is not in it"]),
        ("base_model.model.model.embed_tokens.weight", torch.ones(3), ["embed_tokens", "no matrix", "merge it"]),
        ("base_model.model.model.embed_tokens.weight", torch.ones(320, 64), ["embed_tokens", "another base", "merge"]),
        ("base_model.model.model.layers.9.mlp.up_proj.weight", torch.ones(96, 64), ["up_proj is not the base model's"]),
        ("base_model.model.v_head.weight", torch.ones(1, 64), ["v_head.weight is no matrix", "merge it"]),
        ("base_model.model.lm_head.base_layer.weight", torch.ones(320, 64), ["lm_head", "another base"]),
        (V, torch.zeros(32, 5), ["v_proj.lora_B", "[32, 5]", "not rank 4"]),
        (Q, torch.zeros(63, 4), ["q_proj.lora_B", "[63, 4]", "this base's heads"]),
        (Q.replace("B.weight", "magnitude_vector"), torch.ones(63), ["magnitude [63]", "this base's heads"]),
        (V, torch.full((32, 4), math.nan), ["v_proj.lora_b", "NaN"]),
    ],
)
def test_matrices_that_do_not_fit_are_named(tmp_path, peft_folder, name, value, words):
    _, _, config, tensors = peft_folder
    changed = {key: tensor for key, tensor in {**tensors, name: value}.items() if tensor is not None}
    write_adapter(tmp_path / "sft", config, changed)
    with pytest.raises(UserError) as error:
        read_from(peft_folder, tmp_path / "sft")
    for word in [str(tmp_path / "sft"), *words]:
        assert word in str(error.value)


def test_layers_whose_matrices_are_both_missing_or_too_many_are_named(tmp_path, peft_folder):
    _, _, config, tensors = peft_folder
    fewer = {name: value for name, value in tensors.items() if "layers.1.self_attn.q_proj" not in name}
    write_adapter(tmp_path / "fewer", config, fewer)
    with pytest.raises(UserError, match="2 of the model's adapters are not in it, such as layers.1.attn.q_proj.lora_a"):
        read_from(peft_folder, tmp_path / "fewer")
    more = {name.replace("layers.1", "layers.9"): value.clone() for name, value in tensors.items()}
    write_adapter(tmp_path / "more", config, tensors | more)
    with pytest.raises(UserError, match="4 of its matrices are not in the model's adapters, such as layers.9"):
        read_from(peft_folder, tmp_path / "more")


def peft_adapter(files, folder, **settings):
    """Writes a random adapter of PEFT's; returns the adapted model of transformers."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(files.path, dtype=torch.float32)
    adapted = peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", **settings))
    adapted.save_pretrained(folder)
    return adapted.eval()


QV = {"target_modules": ["q_proj", "v_proj"]}
QKV = {"target_modules": ["qkv_proj"]}


@pytest.mark.parametrize(
    ("family", "modules", "settings"),
    [
        ("Llama", ["q_proj", "v_proj"], QV | {"r": 16, "lora_alpha": 8, "rank_pattern": {"q_proj": 4, "v_proj": 4}}),
        ("Llama", ["q_proj", "v_proj"], QV | {"r": 4, "lora_alpha": 1, "alpha_pattern": {"(q|v)_proj": 8}}),
        ("Phi3", ["qkv_proj"], QKV | {"r": 16, "lora_alpha": 8, "rank_pattern": {"qkv_proj": 4}}),
        # As many times the rank as our blocks would have, and one A for all parts.
        ("Phi3", ["qkv_proj"], QKV | {"r": 4, "lora_alpha": 8, "rank_pattern": {"qkv_proj": 12}}),
        ("Phi3", ["qkv_proj"], QKV | {"r": 4, "lora_alpha": 8, "rank_pattern": {"qkv_proj": 12},
                                      "alpha_pattern": {"qkv_proj": 24}}),
    ],
)  # fmt: skip
def test_what_patterns_give_to_all_layers_alike_is_the_rank_and_alpha(tmp_path, family, modules, settings):
    files, component = saved_base(family, tmp_path / "base")
    theirs = peft_adapter(files, tmp_path / "sft", **settings)
    lora, tried = LORA | {"modules": modules, "rank": 2, "alpha": 1.0}, []
    for _ in range(3):  # each refusal's advice is followed, for one setting at a time
        model = models.lora(component, **lora, dtype="fp32")
        try:
            adapter = adapters.read_adapter(tmp_path / "sft", model, files)
            break
        except UserError as error:
            advice = str(error).rpartition("nearest valid: lora.")[2].split("=")
            assert advice not in tried
            tried.append(advice)
            lora[advice[0]] = float(advice[1]) if advice[0] == "alpha" else int(advice[1])
    tokens = torch.randint(3, 320, (2, 30))
    models.prepare(model, max_length=128)
    models.load(model, checkpoint.Weights(files), world=ONE, adapter=adapter)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_ranks_that_differ_between_layers_are_refused_with_a_way_out_that_leads_out(tmp_path):
    files, component = saved_base("Llama", tmp_path / "base")
    settings = QV | {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 16}}
    peft_adapter(files, tmp_path / "sft", r=4, lora_alpha=8, **settings)
    for rank, alpha in ((4, 8.0), (8, 16.0)):
        model = models.lora(
            component, **LORA | {"modules": QV["target_modules"], "rank": rank, "alpha": alpha}, dtype="fp32"
        )
        with pytest.raises(
            UserError, match="q_proj has rank 8 and alpha 16, .*v_proj has rank 4 and alpha 8 .*merge it"
        ):
            adapters.read_adapter(tmp_path / "sft", model, files)


def test_an_adapter_of_a_tied_output_layer_is_refused_without_advice_that_is_refused(tmp_path):
    files, component = saved_base("Gemma", tmp_path / "base")
    peft_adapter(files, tmp_path / "sft", r=4, lora_alpha=8, target_modules=["q_proj", "lm_head"])
    model = models.lora(component, **LORA | {"modules": ["q_proj"]}, dtype="fp32")
    with pytest.raises(UserError, match=r"the output layer, which is the embedding here \(tied\).* other layers$"):
        adapters.read_adapter(tmp_path / "sft", model, files)


@pytest.mark.parametrize("kind", ["Llama", "Gemma"])
def test_embeddings_beside_an_adapter_are_left_out_where_they_are_the_bases(tmp_path, kind):
    files, component = saved_base(kind, tmp_path / "base")
    theirs = peft_adapter(files, tmp_path / "sft", r=4, lora_alpha=8, **QV)
    theirs.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    names = load_file(tmp_path / "saved" / "adapter_model.safetensors").keys()
    assert any("embed_tokens" in name for name in names)
    model = models.lora(component, **LORA | {"modules": QV["target_modules"]}, dtype="fp32")
    expected = adapters.read_adapter(tmp_path / "sft", model, files)
    found = adapters.read_adapter(tmp_path / "saved", model, files)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_a_folder_without_an_adapter_is_told_and_a_pickle_runs_no_code(tmp_path, peft_folder):
    _, _, config, tensors = peft_folder
    with pytest.raises(UserError, match="no such folder"):
        read_from(peft_folder, tmp_path / "none")
    write_adapter(tmp_path / "adapter", None, tensors)
    with pytest.raises(UserError, match="lacks adapter_config.json"):
        read_from(peft_folder, tmp_path / "adapter")
    with pytest.raises(UserError, match=f"holds no adapter.*adapter={tmp_path}/adapter"):
        read_from(peft_folder, tmp_path)
    write_adapter(tmp_path / "code", config, {"a": pytest.raises}, "adapter_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        read_from(peft_folder, tmp_path / "code")
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json: cannot be read"):
        read_from(peft_folder, tmp_path / "adapter")
    write_adapter(tmp_path / "bin", config, tensors, "adapter_model.bin")
    assert len(read_from(peft_folder, tmp_path / "bin")) == 8


@pytest.mark.parametrize("modules", [["qkv_proj", "gate_up_proj"], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]])
def test_an_adapter_of_pefts_fused_phi_layers_is_theirs_here_and_ours_there(tmp_path, modules):
    """PEFT's has one A for queries, keys and values; each of ours has a copy of it, and is written as three blocks."""
    import peft
    from transformers import AutoModelForCausalLM

    files, component = saved_base("Phi3", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False)
    theirs = peft.get_peft_model(base, settings)
    theirs.save_pretrained(tmp_path / "peft")
    lora = LORA | {"modules": modules}
    model = models.lora(component, **lora, dtype="fp32")
    adapter = adapters.read_adapter(tmp_path / "peft", model, files)
    models.prepare(model, max_length=128)
    models.load(model, checkpoint.Weights(files), world=ONE, adapter=adapter)
    tokens = torch.randint(3, 320, (2, 30))
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(model(tokens), expected, atol=1e-4, rtol=1e-4)
        for module in (m for _, m in models.adapted_modules(model)):  # as after training
            module.lora_a.weight.add_(torch.randn_like(module.lora_a.weight) * 0.05)
        trained = model(tokens)
    gathered = models.gather_weights(model, ONE)
    adapters.write_adapter(tmp_path / "ours", models.only_adapters(model, gathered), files, lora)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "ours")(tokens).logits
    torch.testing.assert_close(found, trained, atol=1e-4, rtol=1e-4)
    assert (trained - expected).abs().max() > 0.01
    back = adapters.read_adapter(tmp_path / "ours", models.lora(component, **lora, dtype="fp32"), files)
    own = models.only_adapters(model, gathered)
    assert back.keys() == own.keys() and all(torch.equal(back[name], own[name]) for name in own)
    wrong = models.lora(component, **lora | {"rank": 2, "alpha": 4.0}, dtype="fp32")
    with pytest.raises(UserError, match="r is 4 in its adapter_config.json, lora.rank is 2"):
        adapters.read_adapter(tmp_path / "peft", wrong, files)


KINDS = {"dora": {"use_dora": True}, "rslora": {"use_rslora": True}, "both": {"use_dora": True, "use_rslora": True}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Phi3"])  # rotary order; biases; fused layers
def test_dora_and_rslora_are_pefts_in_both_directions_and_merge(tmp_path, family, kind):
    import peft
    from transformers import AutoModelForCausalLM

    files, component = saved_base(family, tmp_path / "base")
    modules = ["qkv_proj", "o_proj", "gate_up_proj"] if family == "Phi3" else ["q_proj", "k_proj", "o_proj", "up_proj"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules, init_lora_weights=False, **KINDS[kind])
    theirs = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:  # as after training
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    theirs.save_pretrained(tmp_path / "peft")
    lora = LORA | {"modules": modules} | KINDS[kind]
    model = models.lora(component, **lora, dtype="fp32")
    adapter = adapters.read_adapter(tmp_path / "peft", model, files)
    models.prepare(model, max_length=128)
    models.load(model, checkpoint.Weights(files), world=ONE, adapter=adapter)
    tokens = torch.randint(3, 320, (2, 30))
    gathered = models.gather_weights(model, ONE)
    merged = models.merge_adapters(model, gathered)
    exported = export(files, tmp_path / "run", merged=merged, adapter=models.only_adapters(model, gathered), lora=lora)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens).logits
        found = {
            "here": model(tokens),
            "there": peft.PeftModel.from_pretrained(base, exported / "adapter")(tokens).logits,
            "merged": AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)(tokens).logits,
            "merged by peft": theirs.merge_and_unload()(tokens).logits,
        }
    for where, logits in found.items():
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-4, msg=where)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_dora_starts_as_the_base_and_its_magnitudes_are_trained(dtype):
    model = models.lora(component(), **LORA, dtype=dtype, use_dora=True)
    models.prepare(model, max_length=128)
    models.load(model, tiny_llama().state_dict(), world=ONE)
    pairs = random_pairs(3)
    with models.reference_of(model):
        expected = scores(model, pairs)
    assert torch.equal(scores(model, pairs), expected)  # which a run checks before its first step
    sum(answer_logps(model, lay_out(pairs))).sum().backward()
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"weight", "magnitude"}
    assert all(m.magnitude.grad.abs().sum() > 0 for _, m in models.adapted_modules(model))


def test_an_adapter_of_ours_knows_the_weights_that_it_was_trained_on(tmp_path):
    files, component = saved_base("Llama", tmp_path / "base")
    model = models.lora(component, **LORA, dtype="fp32")
    models.prepare(model, max_length=128)
    models.load(model, checkpoint.Weights(files), world=ONE)
    adapter = models.only_adapters(model, models.gather_weights(model, ONE))
    adapters.write_adapter(tmp_path / "ours", adapter, files, LORA)
    model = models.lora(component, **LORA, dtype="fp32")
    adapters.read_adapter(tmp_path / "ours", model, files)
    weights = load_file(tmp_path / "base" / "model.safetensors")
    save_file({name: value + 0.01 for name, value in weights.items()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match="was trained on other weights than .*base holds.*checkpointer.checkpoint_dir"):
        adapters.read_adapter(tmp_path / "ours", model, files)


@pytest.mark.parametrize(
    ("record", "name", "revision"),
    [
        ('{"repo_id": "org/tiny"}', "org/tiny", None),
        ('{"repo_id": "org/tiny", "revision": "abc123"}', "org/tiny", "abc123"),
        ("", "base", None),  # neither a run nor its export needs this file
        ("[]", "base", None),
        ('{"repo_id": 5, "revision": "abc123"}', "base", None),
        (None, "base", None),
    ],
)
def test_an_adapter_names_its_base_by_what_tune_download_left_there_or_by_its_folder(tmp_path, record, name, revision):
    import peft

    files, component = saved_base("Llama", tmp_path / "base")
    if record is not None:
        (tmp_path / "base" / "original_repo_id.json").write_text(record)
    adapter = random_adapter(models.lora(component, **LORA, dtype="fp32"))
    adapters.write_adapter(tmp_path / "ours", adapter, files, LORA)
    said = peft.LoraConfig.from_pretrained(str(tmp_path / "ours"))
    assert said.base_model_name_or_path == (name if "/" in name else str((tmp_path / name).resolve()))
    assert said.revision == revision


def test_one_of_fused_layers_alone_is_written_with_rows_of_zero_for_the_others(tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    files, component = saved_base("Phi3", tmp_path / "base")
    lora = LORA | {"modules": ["k_proj", "up_proj"]}
    model = models.lora(component, **lora, dtype="fp32")
    models.prepare(model, max_length=128)
    models.load(model, checkpoint.Weights(files), world=ONE)
    for _, module in models.adapted_modules(model):
        torch.nn.init.normal_(module.lora_b.weight, std=0.1)
    adapter = models.only_adapters(model, models.gather_weights(model, ONE))
    adapters.write_adapter(tmp_path / "ours", adapter, files, lora)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    tokens = torch.randint(3, 320, (2, 30))
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(base, tmp_path / "ours")(tokens).logits
        torch.testing.assert_close(found, model(tokens), atol=1e-4, rtol=1e-4)
    back = adapters.read_adapter(tmp_path / "ours", models.lora(component, **lora, dtype="fp32"), files)
    assert back.keys() == adapter.keys() and all(torch.equal(back[name], adapter[name]) for name in adapter)
    fewer = models.lora(component, **lora | {"modules": ["q_proj", "up_proj"]}, dtype="fp32")
    with pytest.raises(UserError, match="qkv_proj adapts layers.0.attn.k_proj, too; nearest valid: add it"):
        adapters.read_adapter(tmp_path / "ours", fewer, files)


# The reference that the run started from


def test_from_an_sft_adapter_the_loss_is_ln_2_against_the_start_and_not_against_the_base():
    pairs, model = random_pairs(4), loaded()
    policy = scores(model, pairs)
    start = dpo_losses(policy, reference_scores(AdapterCopy(model), pairs))
    assert start.tolist() == pytest.approx([math.log(2)] * 4, abs=1e-6)
    base = dpo_losses(policy, reference_scores(AdaptersOff(model), pairs))
    assert (base - math.log(2)).abs().max() > 0.01


@pytest.mark.parametrize("changes", [{}, {"quantize_base": True}, {"use_dora": True}], ids=["lora", "qlora", "dora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_start_stays_what_a_copy_of_the_model_made_then_computes(changes, checkpointing):
    pairs, options = random_pairs(4), {"sizes": NF4_SIZES, **changes}
    model = loaded(**options, checkpointing=checkpointing)
    reference, peer = AdapterCopy(model), loaded(**options)
    before = scores(peer, pairs)
    train_steps(model, pairs)
    assert torch.equal(reference_scores(reference, pairs), before)
    assert (scores(model, pairs) - before).abs().max() > 1  # the policy moved, and is the policy again


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_copy_of_fresh_adapters_is_the_base_and_draws_no_random_number(use_dora):
    pairs, fresh = random_pairs(3), []
    for frozen_copy in (True, False):
        torch.manual_seed(5)
        model = models.lora(component(), **LORA, dtype="fp32", use_dora=use_dora, frozen_copy=frozen_copy)
        models.prepare(model, max_length=128)
        weights = tiny_llama().state_dict()
        torch.manual_seed(5)
        models.load(model, weights, world=ONE)
        fresh.append(model)
    values, expected = map(trained_values, fresh)
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in values.items())
    reference = AdapterCopy(fresh[0])
    train_steps(fresh[0], pairs)
    assert torch.equal(reference_scores(reference, pairs), reference_scores(AdaptersOff(fresh[0]), pairs))


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_copy_is_neither_trained_nor_counted_nor_exported(use_dora):
    model, plain = (loaded(frozen_copy=copied, use_dora=use_dora) for copied in (True, False))
    assert models.num_parameters(model) == models.num_parameters(plain)
    weights, expected = (models.gather_weights(m, ONE) for m in (model, plain))
    assert weights.keys() == expected.keys()
    merged = models.merge_adapters(model, weights)
    assert merged.keys() == tiny_llama().state_dict().keys()
    assert trained_values(model).keys() == trained_values(plain).keys()


def test_the_reference_has_no_dropout_and_gives_the_model_back_after_an_error():
    pairs, model = random_pairs(2), loaded(dropout=0.5).train()
    expected = scores(loaded(), pairs)
    for reference in (AdapterCopy(model), AdaptersOff(model)):
        before = trained_values(model)
        with pytest.raises(ZeroDivisionError), reference.weights() as frozen:
            assert not frozen.training and not torch.is_grad_enabled()
            raise ZeroDivisionError
        assert model.training and torch.is_grad_enabled()
        assert trained_values(model).keys() == before.keys()
    assert torch.equal(reference_scores(AdapterCopy(model), pairs), expected)


@pytest.mark.parametrize("reference_first", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "changes",
    [{"modules": LORA["modules"]}, {"modules": ["q_proj", "output"]}, {"quantize_base": True}, {"use_dora": True}],
    ids=["lora", "output", "qlora", "dora"],
)
def test_gradients_are_those_beside_a_reference_model_of_its_own(changes, checkpointing, reference_first):
    pairs, options = random_pairs(3), {"sizes": NF4_SIZES, **changes}
    model = loaded(**options, checkpointing=checkpointing)
    reference = AdapterCopy(model)
    separate, peer = loaded(**options), loaded(**options)
    train_steps(model, pairs, steps=2)  # policy and reference differ
    train_steps(peer, pairs, steps=2)
    if reference_first:
        expected = reference_scores(reference, pairs)
        policy = torch.cat(answer_logps(model, lay_out(pairs)))
    else:
        policy = torch.cat(answer_logps(model, lay_out(pairs)))
        expected = reference_scores(reference, pairs)
    assert torch.equal(expected, scores(separate, pairs))
    dpo_losses(policy, expected).sum().backward()
    dpo_losses(torch.cat(answer_logps(peer, lay_out(pairs))), scores(separate, pairs)).sum().backward()
    for p, wanted in zip(*[[p for p in m.parameters() if p.requires_grad] for m in (model, peer)], strict=True):
        torch.testing.assert_close(p.grad, wanted.grad, atol=1e-7, rtol=1e-5)
        assert wanted.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("start", ["fresh", "sft"])
def test_the_divergence_of_next_tokens_is_that_of_both_whole_distributions(start):
    model, pairs = loaded(start=start), random_pairs(64, seed=3, answer=(20, 40))
    reference = AdaptersOff(model)
    for parameter in trained_values(model):
        model.get_parameter(parameter).data.mul_(2)  # a policy that has gone far

    def distributions(one):
        """[N, V] float64 log-probabilities where an answer's tokens are predicted, by a forward an answer."""
        found = []
        for answer in ("chosen", "rejected"):
            for pair in pairs:
                tokens = torch.tensor([pair.prompt + getattr(pair, answer)])
                found.append(one(tokens)[0, len(pair.prompt) - 1 : -1].double().log_softmax(-1))
        return torch.cat(found)

    def reference_logps(batch):
        with reference.weights() as base:
            return answer_token_logps(base, batch)

    with torch.no_grad():
        policy = distributions(model)
        with reference.weights() as base:
            exact = (policy.exp() * (policy - distributions(base))).sum(-1)
    estimate = token_divergence(model, reference_logps, lay_out(pairs)).double()
    assert len(estimate) == len(exact) and (estimate >= 0).all()
    if start == "fresh":
        assert estimate.mean() == exact.mean() == 0
        return
    assert exact.mean() > 0.05
    stderr = (estimate - exact).std() / len(exact) ** 0.5
    assert abs((estimate - exact).mean()) < 3 * stderr < 0.2 * exact.mean()
    # A pair's own numbers, whatever batch it is in and wherever it stands there
    apart = [token_divergence(model, reference_logps, lay_out(some)) for some in (pairs[:5], pairs[5:8][::-1])]
    lengths = [len(pair.chosen) for pair in pairs]
    torch.testing.assert_close(apart[0][: sum(lengths[:5])].double(), estimate[: sum(lengths[:5])], atol=1e-5, rtol=0)
    last = sum(lengths[:7])
    torch.testing.assert_close(apart[1][: lengths[7]].double(), estimate[last : last + lengths[7]], atol=1e-5, rtol=0)


def test_compiled_layers_see_the_copy_and_then_the_policy_again():
    pairs, kind = random_pairs(2), {"use_dora": True}
    model = models.lora(component(), **LORA, **kind, dtype="fp32", frozen_copy=True)
    models.prepare(model, max_length=128, compile_layers=True)
    models.load(model, tiny_llama().state_dict(), world=ONE, adapter=random_adapter(model))
    reference, plain = AdapterCopy(model), loaded(**kind)
    start = scores(plain, pairs)
    for _ in range(2):
        torch.testing.assert_close(reference_scores(reference, pairs), start, atol=1e-3, rtol=0)
        torch.testing.assert_close(scores(model, pairs), scores(plain, pairs), atol=1e-3, rtol=0)
        with torch.no_grad():
            for m in (model, plain):
                for p in m.parameters():
                    if p.requires_grad:
                        p.mul_(1.2)
    assert (scores(plain, pairs) - start).abs().max() > 1


# The reference that is moved toward the policy (TR-DPO)


def moving(method):
    """Policy, reference, and the parameters that both have, by name, before they move."""
    if method == "full":
        model, second = (models.full(component(), dtype="fp32") for _ in range(2))
        second.requires_grad_(False).eval()
        for m in (model, second):
            models.prepare(m, max_length=128)
            models.load(m, tiny_llama().state_dict(), world=ONE)
        return model, SecondModel(model, second)
    model = loaded(sizes=NF4_SIZES, quantize_base=method == "qlora", use_dora=method == "dora")
    return model, AdapterCopy(model)


@pytest.mark.parametrize("alpha", [0.6, 0.05, 1.0])
@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora"])
def test_a_moved_reference_is_the_blend_computed_in_float64(method, alpha):
    model, reference = moving(method)
    pairs = random_pairs(3)
    expected = {name: value.double() for name, value in trained_values(model).items()}
    for _ in range(3):
        train_steps(model, pairs, steps=1)
        policy = trained_values(model)
        reference.move(alpha)
        expected = {name: alpha * policy[name].double() + (1 - alpha) * value for name, value in expected.items()}
    found = {name.removeprefix("reference."): value for name, value in reference.tensors().items()}
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], atol=1e-6, rtol=1e-6, msg=name)
    if alpha == 1.0:
        assert torch.equal(reference_scores(reference, pairs), scores(model, pairs))
    assert all(torch.equal(value, policy[name]) for name, value in trained_values(model).items())


def test_blending_in_bf16_rounds_once():
    model = loaded(dtype="bf16")
    reference = AdapterCopy(model)
    before = {name: value.clone() for name, value in reference.tensors().items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    reference.move(0.6)
    policy = trained_values(model)
    for name, value in reference.tensors().items():
        exact = 0.6 * policy[name.removeprefix("reference.")].double() + 0.4 * before[name].double()
        assert ((value.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6).all(), name


@pytest.mark.parametrize("method", ["full", "lora", "dora"])
def test_writing_into_its_tensors_restores_a_reference(method):
    model, reference = moving(method)
    pairs = random_pairs(3)
    train_steps(model, pairs)
    reference.move(0.6)
    saved, before = copy.deepcopy(reference.tensors()), reference_scores(reference, pairs)
    train_steps(model, pairs)
    reference.move(0.6)
    assert not torch.equal(reference_scores(reference, pairs), before)
    assert all(name.startswith("reference.layers.") or method == "full" for name in saved)
    for name, value in reference.tensors().items():
        value.copy_(saved[name])
    assert torch.equal(reference_scores(reference, pairs), before)


# A second model, of any folder


def tokens_of(size=320, prefix="w"):
    """A tokenizer of numbered words, as save_llama writes it."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"{prefix}{i}": i for i in range(3, size)}}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return HFTokenizer(backend, special, stop_ids=[], add_bos=True, template=None, style="")


def second_model(files, component, *, method="lora", run_dtype="fp32", **reference):
    """A loaded second model, as recipes make it; `files` and `component` are the run's."""
    second = open_second_model(
        reference, method, component=component, dtype=run_dtype, files=files, tokenizer=tokens_of(), world=ONE
    )
    second.make_ready(128)
    second.load(ONE)
    assert not any(p.requires_grad for p in second.model.parameters()) and not second.model.training
    return second.model


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_a_reference_of_another_folder_has_that_folders_log_probabilities(tmp_path, kind):
    """Of another architecture than the policy, too."""
    from transformers import AutoModelForCausalLM

    files, component = saved_base("Mistral", tmp_path / "base")
    _, other = saved_base(kind, tmp_path / "other", seed=1)
    model = second_model(files, component, checkpoint_dir=str(tmp_path / "other"), model=other)
    pairs = random_pairs(3)
    expected = transformers_scores(AutoModelForCausalLM.from_pretrained(tmp_path / "other", dtype=torch.float32), pairs)
    found = reference_scores(SecondModel(built(files, component), model), pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)  # float32, sums of about 100 nats
    assert (scores(built(files, component), pairs) - expected).abs().max() > 1


@pytest.fixture(scope="module")
def two_llamas(tmp_path_factory):
    """The checkpointer of a Llama whose matrices NF4 can cut, its component, and the folder of another one."""
    folder = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate(("base", "other")):
        save_llama(folder / name, seed=seed)
    cfg = {"checkpoint_dir": str(folder / "base"), "model_type": "LLAMA3"}
    cfg = OmegaConf.create({"_component_": "torchtune.training.FullModelHFCheckpointer", **cfg})
    return checkpoint.open_weights(cfg), component(NF4_SIZES), folder / "other"


def test_a_reference_in_4_bits_computes_with_what_torchao_makes_of_its_weights(two_llamas):
    files, ours, other = two_llamas
    expected, pairs = tiny_llama(seed=1, **NF4_SIZES), random_pairs(3)
    whole = padded_logps(expected, pairs)
    with torch.no_grad():
        for linear in (m for m in expected.layers.modules() if isinstance(m, torch.nn.Linear)):
            linear.weight.copy_(to_nf4(linear.weight).get_original_weight())
    expected = padded_logps(expected, pairs)
    found = scores(second_model(files, ours, checkpoint_dir=str(other), quantize=True), pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert (whole - expected).abs().max() > 0.1


def test_a_reference_in_4_bits_is_qloras_base_and_so_it_is_by_default_beside_one(two_llamas):
    files, ours, _ = two_llamas
    pairs, base = random_pairs(3), built(files, ours, quantize_base=True)
    for method, quantize in (("full", True), ("qlora", None)):
        assert torch.equal(
            scores(second_model(files, ours, method=method, quantize=quantize), pairs), scores(base, pairs)
        )
    whole = second_model(files, ours, method="qlora", quantize=False)
    torch.testing.assert_close(scores(whole, pairs), padded_logps(tiny_llama(**NF4_SIZES), pairs), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("run_dtype", "dtype"), [("fp32", "bf16"), ("bf16", None), ("bf16", "fp32")])
def test_a_reference_has_the_dtype_that_it_is_given_or_the_runs(two_llamas, run_dtype, dtype):
    files, ours, other = two_llamas
    pairs, wanted = random_pairs(3), models.DTYPES[dtype or run_dtype]
    model = second_model(files, ours, run_dtype=run_dtype, checkpoint_dir=str(other), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {wanted}
    expected = padded_logps(tiny_llama(seed=1, **NF4_SIZES).to(wanted), pairs).float()
    tolerance = {"rtol": 1e-5, "atol": 0} if wanted is torch.float32 else {"rtol": 0.01, "atol": 0.5}
    torch.testing.assert_close(scores(model, pairs), expected, **tolerance)


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("sizes", "damage", "reference", "words"),
    [
        ({}, lambda f: (f / "config.json").unlink(), {}, ["reference.checkpoint_dir=", "no config.json"]),
        ({}, lambda f: (f / "model.safetensors").unlink(), {}, ["reference.checkpoint_dir=", "holds no weights"]),
        ({"num_layers": 2}, None, {}, ["num_hidden_layers is 3 in `model` (reference.model is null) and 2"]),
        (
            {"intermediate_dim": 64},
            lambda f: edited(f, intermediate_size=128),
            {},
            [
                "[64, 128] in the checkpoint",
                "layers.0.mlp.w1.weight (model.layers.0.mlp.gate_proj",
                "reference.checkpoint_dir",
            ],
        ),
        ({}, None, {"model": component(NF4_SIZES | {"num_layers": 2})}, ["is 2 in `reference.model` and 3"]),
        ({}, None, {"model": component(NF4_SIZES | {"width": 3})}, ["reference: model.width: llama3 has no such"]),
        ({}, lambda f: edited(f, model_type="t5"), {}, ["config.json: model_type=t5"]),
        ({}, lambda f: (f / "tokenizer.json").write_text(tokens_of(prefix="v")._backend.to_str()), {}, ["317 of 320"]),
        ({"vocab_size": 300}, None, {"model": component(NF4_SIZES | {"vocab_size": 300})}, ["'w300'", "none there"]),
    ],
)
def test_a_reference_that_does_not_fit_is_refused_before_a_weight_is_read(
    tmp_path, two_llamas, sizes, damage, reference, words
):
    files, ours, _ = two_llamas
    save_llama(tmp_path / "other", sizes=NF4_SIZES | sizes)
    weights = load_file(tmp_path / "other" / "model.safetensors")
    save_file({name: value.mul_(math.nan) for name, value in weights.items()}, tmp_path / "other" / "model.safetensors")
    if damage:
        damage(tmp_path / "other")
    with pytest.raises(UserError) as error:  # had a weight been read, it would say NaN
        second_model(files, ours, checkpoint_dir=str(tmp_path / "other"), **reference)
    for word in words:
        assert word in str(error.value)


# Many processes

CASES = [
    {"method": "lora", "output": True},  # something of FSDP2's root is trained: it stays whole after a forward
    {"method": "lora", "output": True, "checkpointing": True, "reference_first": True},
    {"method": "lora", "output": True, "cpu_offload": True, "alpha": 1.0},
    {"method": "qlora"},
    {"method": "dora", "output": True},
    {"method": "dora", "cpu_offload": True, "alpha": 1.0},
    {"method": "full"},
    {"method": "full", "cpu_offload": True, "every": 1},
    {"method": "lora", "second": {"quantize": True}},
    {"method": "lora", "second": {"quantize": True}, "cpu_offload": True},
    {"method": "full", "second": {"quantize": True}, "checkpointing": True},
]


@pytest.mark.parametrize(
    ("num_processes", "cases"),
    [(2, CASES), (4, [{"method": m, "output": m == "lora", "replicate": 2} for m in ("lora", "full")])],
)
def test_processes_that_share_the_work_have_the_references_of_one(tmp_path, num_processes, cases):
    """Losses with references that move, the reference itself, and one that was saved, moved and loaded again."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)),
        *("--master_port", str(port), str(Path(__file__).with_name("reference_worker.py"))),
        *(str(tmp_path / "results.json"), json.dumps(cases)),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    for case, result in zip(cases, json.loads((tmp_path / "results.json").read_text()), strict=True):
        expected = train(world=ONE, **{k: v for k, v in case.items() if k not in ("replicate", "cpu_offload")})
        for key, values in expected.items():
            assert result[key] == pytest.approx(values, rel=1e-5, abs=1e-5), (case, key)
        if "second" not in case:  # which does not move
            assert result["restored"] == pytest.approx(result["reference"], abs=1e-6)
        assert (expected["losses"][0] == pytest.approx(math.log(2), abs=1e-6)) == ("second" not in case)
        moved = max(abs(a - b) for a, b in zip(expected["policy"], expected["reference"], strict=True))
        assert moved > 0.05, case


# From TRL

PEERS = ("peft", "datasets", "trl")


def test_an_adapter_that_trl_wrote_is_read_and_trained_on(tmp_path, monkeypatch):
    """Two steps of its SFTTrainer; then DPO on top of what it saved, which starts at ln 2 against it."""
    peft, datasets, trl = (pytest.importorskip(name, reason=f"{name} is not installed") for name in PEERS)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_llama(tmp_path / "base", sizes=NF4_SIZES)
    save_pairs(tmp_path / "train.jsonl", random_pairs(8, seed=1))
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    options = {"max_steps": 2, "learning_rate": 0.02, "per_device_train_batch_size": 4, "report_to": "none"}
    trainer = trl.SFTTrainer(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32),
        args=trl.SFTConfig(str(tmp_path / "trl"), use_cpu=True, bf16=False, save_strategy="no", **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "base", pad_token="</s>"),
        peft_config=peft.LoraConfig(**lora),
    )
    trainer.train()
    trainer.save_model(tmp_path / "sft")

    cfg = run_config(tmp_path, dataset={"source": str(tmp_path / "train.jsonl")}, eval_dataset={"source": None})
    cfg |= {"adapter": str(tmp_path / "sft"), "lora": {"rank": 4, "alpha": 8, "modules": ["q_proj", "v_proj"]}}
    cfg |= {"reference": {"name": "start"}, "epochs": 3, "samples": {"num_prompts": 0}, "lr_scheduler": None}
    (tmp_path / "config.yaml").write_text(json.dumps(cfg | {"optimizer": {"lr": 0.01}}))
    log = run_recipe("lora_dpo_single_device", config_paths=[tmp_path / "config.yaml"])
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and log[0]["rewards/margins"] == 0
    assert log[-1]["loss"] < 0.65

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    pairs = random_pairs(8, seed=1)
    before = transformers_scores(base, pairs)
    expected = transformers_scores(peft.PeftModel.from_pretrained(base, tmp_path / "sft"), pairs)
    assert (expected - before).abs().max() > 0.5  # it has learned something
    chosen, rejected = expected.chunk(2)
    assert log[0]["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
    assert log[0]["logps/rejected"] == pytest.approx(rejected.mean().item(), rel=1e-5)
    files = OmegaConf.create({"_component_": "torchtune.training.FullModelHFCheckpointer", **cfg["checkpointer"]})
    files = checkpoint.open_weights(files)
    options = {"modules": ["q_proj", "v_proj"]}
    model = models.lora(component(NF4_SIZES), **LORA | options, dtype="fp32")
    read = adapters.read_adapter(tmp_path / "sft", model, files)
    found = scores(built(files, component(NF4_SIZES), adapter=read, **options), pairs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
