"""Every architecture that the recipes take has the log-probabilities, answers and exports that its peers compute."""

import json
import re

import pytest
import torch
from helpers import padded_logps, random_pairs, save_llama
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torchtune.config._utils import _get_component_from_path
from torchtune.modules.peft import LoRALinear

from pairtune import config, models
from pairtune.config.architectures import check_config
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import check_model, check_model_type
from pairtune.folders.export import export
from pairtune.models import generation
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

ONE = World(torch.device("cpu"))
SIZES = {
    "vocab_size": 320,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "embed_dim": 128,
    "intermediate_dim": 128,
    "max_seq_len": 128,
}
BUILDERS = {
    "llama2": ("torchtune.models.llama2.llama2", SIZES),
    "llama3_1": ("torchtune.models.llama3_1._component_builders.llama3_1", SIZES),
    "llama3_2": ("torchtune.models.llama3_2._component_builders.llama3_2", SIZES),
    "mistral": ("torchtune.models.mistral.mistral", SIZES),
    "phi3": ("torchtune.models.phi3.phi3", SIZES),
    "gemma": ("torchtune.models.gemma.gemma", SIZES | {"head_dim": 32}),
    "qwen2": ("torchtune.models.qwen2.qwen2", SIZES),
    "qwen2_tied": ("torchtune.models.qwen2.qwen2", SIZES | {"tie_word_embeddings": True}),
}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "mlp"], "dtype": "fp32"}


def random_model(name):
    """torchtune's own model with random weights everywhere, biases and norms too."""
    path, arguments = BUILDERS[name]
    torch.manual_seed(0)
    model = _get_component_from_path(path)(**arguments)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "scale" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(std=0.1 if "tok_embeddings" in parameter_name else 0.08)
    return model


def prepared(name, weights, *, lora=False):
    path, arguments = BUILDERS[name]
    component = {"_component_": path, **arguments}
    model = models.lora(component, **LORA) if lora else models.full(component, dtype="fp32")
    models.prepare(model, max_length=128)
    models.load(model, weights, world=ONE)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b.weight, std=0.05)
    return model


def merged_and_adapter(model):
    weights = models.gather_weights(model, ONE)
    return models.merge_adapters(model, weights), models.only_adapters(model, weights)


def scores(model, pairs):
    with torch.no_grad():
        return torch.cat(answer_logps(model, lay_out(pairs)))


@pytest.mark.parametrize("name", BUILDERS)
def test_log_probabilities_and_gradients_equal_the_padded_forward(name):
    peer, pairs, upstream = random_model(name), random_pairs(4), torch.randn(8)
    expected = padded_logps(peer, pairs)
    (expected * upstream).sum().backward()
    model = prepared(name, peer.state_dict())
    values = torch.cat(answer_logps(model, lay_out(pairs)))
    (values * upstream).sum().backward()
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    for (parameter_name, parameter), wanted in zip(model.named_parameters(), peer.parameters(), strict=True):
        error = (parameter.grad - wanted.grad).norm() / wanted.grad.norm()
        assert error < 1e-5, parameter_name


@pytest.mark.parametrize("name", BUILDERS)
def test_merged_adapters_compute_what_the_adapted_model_computes(name):
    weights, pairs = random_model(name).state_dict(), random_pairs(4)
    adapted = prepared(name, weights, lora=True)
    merged = prepared(name, models.merge_adapters(adapted, models.gather_weights(adapted, ONE)))
    torch.testing.assert_close(scores(merged, pairs), scores(adapted, pairs), atol=1e-3, rtol=0)
    assert (scores(adapted, pairs) - scores(prepared(name, weights), pairs)).abs().max() > 0.1


@pytest.mark.parametrize("name", BUILDERS)
def test_answers_are_the_greedy_ones_whatever_prompts_share_a_batch(name):
    model = prepared(name, random_model(name).state_dict())
    prompts = [pair.prompt for pair in random_pairs(4)]
    expected = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + 8 and (tokens[-1] != 2 or len(tokens) == len(prompt)):
            with torch.no_grad():
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        expected.append([t for t in tokens[len(prompt) :] if t != 2])
    options = {"world": ONE, "stop_ids": [2]}
    assert generation.answers(model, prompts, **options, max_new_tokens=8) == expected
    # An answer ends where the positions do; it does not crash there.
    long = generation.answers(model, prompts[:1], **options, max_new_tokens=1000)
    assert len(long[0]) <= 128 - len(prompts[0])


def test_qwen2_exports_are_the_policy_in_transformers_and_peft(tmp_path):
    """Qwen 2 has biases, and its rotary layout is Hugging Face's own: its adapters must not be reordered."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, rope_theta=1_000_000.0, rms_norm_eps=1e-5,
        tie_word_embeddings=False, initializer_range=0.08,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    cfg = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(tmp_path / "base"),
        "model_type": "QWEN2",
    }
    files = checkpoint.open_weights(OmegaConf.create(cfg))
    path, arguments = BUILDERS["qwen2"]
    component = {"_component_": path, **arguments, "norm_eps": 1e-5, "rope_base": 1_000_000.0}
    model = models.lora(component, **LORA)
    models.prepare(model, max_length=128)
    check_model(model, checkpoint.read_config(cfg["checkpoint_dir"]))
    models.load(model, checkpoint.Weights(files), world=ONE)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b.weight, std=0.1)
    merged, adapter = merged_and_adapter(model)
    exported = export(files, tmp_path / "run", merged=merged, adapter=adapter, lora=LORA)
    tokens = torch.randint(3, 320, (2, 30))
    peers = {"merged": AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peers["adapter"] = PeftModel.from_pretrained(base, exported / "adapter")
    with torch.no_grad():
        expected = model(tokens)
        for name, peer in peers.items():
            torch.testing.assert_close(peer(tokens).logits, expected, atol=1e-3, rtol=1e-4, msg=name)
        with models.reference_of(model):
            assert (model(tokens) - expected).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "model_type"), [("Llama", "LLAMA3"), ("Mistral", "MISTRAL"), ("Qwen2", "QWEN2"), ("Phi3", "PHI3_MINI")]
)
@pytest.mark.parametrize("sharded", [False, True])
def test_weights_are_read_as_torchtune_reads_them(tmp_path, kind, model_type, sharded):
    import transformers

    sizes = {
        "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0, "max_position_embeddings": 128,
    }  # fmt: skip
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes))
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB" if sharded else "1GB")
    cfg = {"checkpoint_dir": str(tmp_path / "base"), "model_type": model_type}
    cfg = OmegaConf.create({"_component_": "torchtune.training.FullModelHFCheckpointer", **cfg})
    weights = checkpoint.Weights(checkpoint.open_weights(cfg))
    names = sorted(path.name for path in (tmp_path / "base").glob("*.safetensors"))
    theirs = config.instantiate(cfg, checkpoint_files=names, output_dir=str(tmp_path / "run"))
    expected = theirs.load_checkpoint()["model"]
    assert set(weights) == set(expected) and len(weights) == len(expected) > 15
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_ROPE |= {"original_max_position_embeddings": 8192}
LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rope_theta": 10_000.0}, ["rope_theta", "500000.0", "10000.0"]),
        ({"rope_parameters": {"rope_theta": 10_000.0}}, ["rope_theta"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling.factor"]),
        ({"num_attention_heads": 8}, ["num_attention_heads", "head_dim"]),
        ({"num_key_value_heads": 4}, ["num_key_value_heads"]),
        ({"num_hidden_layers": 3}, ["num_hidden_layers"]),
        ({"intermediate_size": 96}, ["intermediate_size is 128 in `model` and 96 in config.json"]),
        ({"hidden_size": 64}, ["hidden_size"]),
        ({"rms_norm_eps": 0.01}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": True}, ["tie_word_embeddings"]),
    ],
)
def test_a_model_that_is_not_the_folders_is_refused(change, words):
    model = models.full({"_component_": "torchtune.models.llama3.llama3", **SIZES}, dtype="fp32")
    check_model(model, LLAMA)
    with pytest.raises(UserError) as error:
        check_model(model, LLAMA | change)
    for word in [*words, "do not belong together"]:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("left_out", "default"),
    [("rope_theta", "10000.0"), ("rms_norm_eps", "1e-06"), ("num_key_value_heads", "4")],
)
def test_what_config_json_leaves_out_is_compared_with_what_transformers_takes(left_out, default):
    model = models.full({"_component_": "torchtune.models.llama3.llama3", **SIZES}, dtype="fp32")
    config = {key: value for key, value in LLAMA.items() if key != left_out}
    with pytest.raises(UserError, match=f"{left_out} is .* in `model` and {default} by default"):
        check_model(model, config)


def test_another_architectures_name_in_lora_modules_is_refused():
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "dtype": "fp32"}
    component = {"_component_": "torchtune.models.llama3.llama3", **SIZES}
    check_model(models.lora(component, **lora, modules=["q_proj", "o_proj", "output", "all-linear"]), LLAMA)
    with pytest.raises(UserError, match="c_attn, dense: is of another architecture .*=llama; here .* q_proj, .*o_proj"):
        check_model(models.lora(component, **lora, modules=["q_proj", "c_attn", "dense"]), LLAMA)
    with pytest.raises(UserError, match="router: this model has no such layer; it has q_proj, [a-z_, ]*all-linear$"):
        models.lora(component, **lora, modules=["router"])


@pytest.mark.parametrize("names", [1, 30])
def test_all_tensors_that_are_no_weights_of_a_model_are_listed(tmp_path, names):
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    strange = {f"v_head.{number}.weight": torch.ones(1, 128) for number in range(names)}
    save_file(weights | strange, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as error:
        checkpoint.Weights(checkpoint.open_weights({"checkpoint_dir": str(tmp_path), "model_type": "LLAMA3"}))
    text = str(error.value)
    assert f": {names} tensors are no weights of checkpointer.model_type=LLAMA3" in text
    assert "\n  v_head.0.weight [1, 128] in model.safetensors: no weight of LLAMA3" in text
    assert text.count("\n") == min(names, 21) and ("and 10 more" in text) == (names == 30)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_of_any_torch_is_read(tmp_path, zipped):
    save_llama(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    files = checkpoint.open_weights({"checkpoint_dir": str(tmp_path), "model_type": "LLAMA3"})
    found = checkpoint.Weights(files)
    assert torch.equal(found["output.weight"], weights["lm_head.weight"]) and len(found) == len(weights)
    if not zipped:  # its code is run no more than another one's
        torch.save({"a": pytest.raises}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
        with pytest.raises(UserError, match="a pickle that holds more than weights, which nothing runs"):
            checkpoint.Weights(files)


@pytest.mark.parametrize(("builder", "model_type"), [("gemma.gemma", "gemma"), ("pairtune.gemma2.gemma2", "gemma2")])
def test_gemmas_own_norm_is_compared_too(builder, model_type):
    builder = builder if builder.startswith("pairtune") else f"torchtune.models.{builder}"
    component = {"_component_": builder, **SIZES, "head_dim": 32}
    component |= {"query_pre_attn_scalar": 256} if model_type == "gemma2" else {}
    model = models.full(component, dtype="fp32")
    config = LLAMA | {"model_type": model_type, "head_dim": 32, "rope_theta": 1e4, "rms_norm_eps": 1e-6}
    config |= {"tie_word_embeddings": None}
    check_model(model, config)
    with pytest.raises(UserError, match="rms_norm_eps is 1e-06 in `model` and 1e-05 in config.json"):
        check_model(model, config | {"rms_norm_eps": 1e-5})


def test_llama_3_1s_scaled_rope_is_told_from_llama_3s():
    model = models.full({"_component_": BUILDERS["llama3_1"][0], **SIZES}, dtype="fp32")
    check_model(model, LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}})
    with pytest.raises(UserError, match="rope_scaling.factor is 8.0 in `model` and 1.0 in config.json"):
        check_model(model, LLAMA)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act=gelu: must be silu or swish; the builder of model_type=llama"),
        ({"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type=linear: must be default or llama3"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_parameters.rope_type=yarn: must be default"),
        ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_scaling.type=longrope: must be default"),
        (
            {"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 2.0}},
            "rope_scaling.high_freq_factor=2.0: must be 4; the builder",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.low_freq_factor=null: must be"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.rope_type=null: must be default or llama3"),
        # These have more settings than a factor.
        ({"rope_scaling": {"type": "longrope", "factor": 1.0, "short_factor": [1.5]}}, "rope_scaling.type=longrope"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.5}},
            "rope_scaling.rope_type=yarn: must be default or llama3",
        ),
        (  # transformers takes rope_scaling
            {"rope_scaling": LLAMA3_ROPE, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"model_type": "gemma", "hidden_act": "silu"}, "hidden_act=silu: must be gelu_pytorch_tanh or gelu"),
        ({"model_type": "gemma", "hidden_activation": "relu"}, "hidden_activation=relu: must be gelu_pytorch_tanh"),
        ({"num_hidden_layers": None}, "num_hidden_layers: is missing"),
    ],
)
def test_a_config_json_of_positions_or_an_activation_that_nobody_computes_here_is_refused(tmp_path, change, words):
    same = {"rope_type": "default", "rope_theta": 5e5}
    check_config(LLAMA | {"hidden_act": "silu", "rope_parameters": same, "rope_scaling": dict(same)}, tmp_path)
    for kind in ("linear", "dynamic"):
        check_config(LLAMA | {"rope_scaling": {"type": kind, "factor": 1.0}}, tmp_path)
    check_config(LLAMA | {"model_type": "gemma", "hidden_act": "gelu"}, tmp_path)
    with pytest.raises(UserError, match=re.escape(words)):
        check_config(LLAMA | change, tmp_path)


def test_scaled_positions_are_no_other_architectures():
    model = models.full(
        {"_component_": "torchtune.models.mistral.mistral", **SIZES, "rope_base": 500_000}, dtype="fp32"
    )
    check_model(model, LLAMA)
    with pytest.raises(UserError, match="rope_scaling.factor is 1.0 in `model` and 8.0 in config.json"):
        check_model(model, LLAMA | {"model_type": "mistral", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}})


def test_a_model_type_of_another_architecture_is_refused():
    check_model_type("LLAMA3", {"model_type": "llama"})
    check_model_type("LLAMA3", {})
    with pytest.raises(UserError, match="model_type=QWEN2.*which is LLAMA2 or LLAMA3 or LLAMA3_2 here"):
        check_model_type("QWEN2", {"model_type": "llama"})
    with pytest.raises(UserError, match="model_type=t5: is none of llama, mistral, "):
        check_model_type("LLAMA3", {"model_type": "t5"})


def test_attention_that_cannot_see_prefix_and_own_tail_is_refused():
    model = models.full({"_component_": "torchtune.models.gemma2.gemma2", **SIZES, "head_dim": 32}, dtype="fp32")
    with pytest.raises(UserError, match="Gemma2Attention"):
        models.prepare(model, max_length=128)


def test_an_export_takes_only_what_belongs_to_a_model_and_keeps_the_earlier_one_until_it_is_done(tmp_path):
    """The base is the export of an earlier LoRA run, read-only, with an adapter and other things beside its weights."""
    from torchtune.models.convert_weights import tune_to_hf

    base = tmp_path / "base"
    (base / "adapter").mkdir(parents=True)
    peer = random_model("mistral")
    heads = {"num_heads": 4, "num_kv_heads": 2, "dim": 128}
    weights = {k: v.contiguous() for k, v in tune_to_hf(peer.state_dict(), **heads).items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "config.json").write_text(json.dumps(LLAMA | {"model_type": "mistral"}))
    for name in ("tokenizer.json", "README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"):
        (base / name).write_text("{}")
    for file in base.rglob("*.json"):
        file.chmod(0o444)
    cfg = {
        "checkpoint_dir": str(base),
        "model_type": "MISTRAL",
        "_component_": "torchtune.training.FullModelHFCheckpointer",
    }
    for _ in range(2):  # the second replaces the first
        files = checkpoint.open_weights(OmegaConf.create(cfg))
        model = prepared("mistral", checkpoint.Weights(files), lora=True)
        merged, adapter = merged_and_adapter(model)
        exported = export(files, tmp_path / "run", merged=merged, adapter=adapter, lora=LORA)
        names = {str(p.relative_to(exported)) for p in exported.rglob("*") if p.is_file()}
        assert names == {
            "config.json", "tokenizer.json", "model.safetensors",
            "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/base_weights.json",
            "adapter/tokenizer.json",
        }  # fmt: skip
        assert json.loads((exported / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["export"]


@pytest.mark.parametrize(
    ("stored", "dtype", "told"),
    [("float16", "bf16", True), ("float32", "bf16", True), ("bfloat16", "bf16", False), ("float16", "fp32", False)],
)
def test_weights_that_the_runs_dtype_rounds_are_told(tmp_path, stored, dtype, told):
    save_llama(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value.to(getattr(torch, stored)) for name, value in load_file(file).items()}
    weights["model.norm.weight"] = weights["model.norm.weight"].float()  # as some folders have it
    save_file(weights, file)
    folder = checkpoint.open_weights({"checkpoint_dir": str(tmp_path), "model_type": "LLAMA3"})
    lines = checkpoint.rounding(folder, dtype)
    assert len(lines) == told and all(f"weights are {stored}, which has more digits" in line for line in lines)
