"""`model: auto` builds what transformers makes of a config.json, or refuses by the name of what no builder computes."""

import json
import sys

import hf_peers
import pytest
import torch
import transformers
from helpers import random_pairs
from published import MODELS

from pairtune import config, models
from pairtune.cli.recipe import read_recipe
from pairtune.config.architectures import ARCHITECTURES, check_config
from pairtune.config.auto import Choice, choose, choose_for
from pairtune.config.config_json import SETTINGS, config_key
from pairtune.config.uses import BRIDGE
from pairtune.errors import UserError
from pairtune.folders.check_model import check_model, describe

TINY = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1}
TINY |= {"eos_token_id": 2, "initializer_range": 0.2}
OF_KIND = {
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"num_key_value_heads": 4},
    **dict.fromkeys(("gemma", "gemma2", "qwen3"), {"head_dim": 32}),
    "mixtral": {"num_local_experts": 4},
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
HALF = {"rope_type": "default", "rope_theta": 77.0, "partial_rotary_factor": 0.5}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
LONGROPE |= {"short_factor": [1.5] * 8, "long_factor": [2.5] * 8}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}


def config_of(kind, **changes):
    """A tiny model's configuration in transformers."""
    return transformers.AutoConfig.for_model(kind, **(TINY | OF_KIND.get(kind, {}) | changes))


def written(kind, **changes):
    """Its config.json with every key, as a dict."""
    return json.loads(config_of(kind, **changes).to_json_string(use_diff=False))


@pytest.fixture
def without_extra(monkeypatch):
    """transformers is not installed."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    return monkeypatch


VARIANTS = [
    *((kind, {}) for kind in ARCHITECTURES),
    ("llama", {"rope_parameters": SCALED}),
    ("llama", {"rope_parameters": SCALED, "tie_word_embeddings": True}),
    ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": 5}),
    ("qwen2", {"tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),
    ("gemma2", {"query_pre_attn_scalar": 77, "sliding_window": 5}),
    ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("mixtral", {"num_experts_per_tok": 1}),
    ("gpt2", {"n_inner": 40}),
    ("gpt_neox", {"use_parallel_residual": False, "rope_parameters": HALF}),
    # by transformers' own classes
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_parameters": YARN}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 77.5}}),
    ("llama", {"head_dim": 8}),
    ("qwen3", {"attention_bias": True}),
    ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 64}),
    ("olmo2", {}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes"), VARIANTS)
def test_what_auto_builds_computes_what_transformers_does(tmp_path, kind, changes):
    peer = hf_peers.save_peer(tmp_path, config_of(kind, **changes))
    choice = choose(str(tmp_path))
    files = hf_peers.open_folder(tmp_path, choice.family, choice.component)
    pairs = random_pairs(2)
    with torch.no_grad():
        ours = hf_peers.our_logps(hf_peers.load_ours(files, choice.component), pairs)
        torch.testing.assert_close(ours, hf_peers.peer_logps(peer, pairs), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_auto_builds_the_model_of_each_config_from_what_its_folder_says(name):
    """A shipped config names its builder only so that a plan needs no folder."""
    from test_configs import load

    published = MODELS[name][1]
    choice, named = choose_for(published, "config.json"), load("lora_dpo_single_device", name)
    built, shipped = (models.full(block, dtype="bf16") for block in (choice.component, named.model))
    assert describe(built) == describe(shipped)
    assert [(n, p.shape) for n, p in built.named_parameters()] == [(n, p.shape) for n, p in shipped.named_parameters()]
    check_model(built, published)


# What a config.json may say

# Keys of transformers' configuration classes that change no log-probability: how weights are drawn, what a tokenizer or
# a caller may want, dropout, which training switches off, and heads that a causal model has not.
NO_NUMBER = {
    *("initializer_range", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id", "pretraining_tp", "dtype"),
    *("attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "hidden_dropout", "classifier_dropout"),
    *("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"),
    *("output_router_logits", "router_aux_loss_coef"),  # a run's own key has the coefficient
    *("original_max_position_embeddings",),  # of Phi's LongRoPE, which is refused
    *("use_bidirectional_attention",),  # refused of every model
    *("is_decoder", "architectures", "transformers_version", "_name_or_path", "id2label", "label2id", "problem_type"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "is_encoder_decoder"),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_key_of_transformers_configuration_is_read_or_held_or_changes_no_number(kind):
    theirs = transformers.AutoConfig.for_model(kind).to_dict()
    known = {config_key(name, theirs) for name in SETTINGS} | ARCHITECTURES[kind].only.keys()
    assert theirs.keys() - known - NO_NUMBER == set()


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"attention_bias": True}, "attention_bias=true: must be false"),
        ("llama", {"mlp_bias": True}, "mlp_bias=true"),
        ("llama", {"head_dim": 8}, "head_dim=8"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 77.5}},
            "rope_theta=77.5: torch.* takes whole numbers",
        ),
        ("llama", {"rope_parameters": SCALED | {"factor": 2.5}}, "rope_scaling.factor=2.5"),
        ("llama", {"rope_parameters": YARN}, "rope_parameters.rope_type=yarn: must be default or llama3"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention"),
        ("llama", {"logit_scale": 0.06}, "logit_scale=0.06"),
        ("llama", {"num_experts": 4}, "num_experts=4"),
        ("llama", {"layer_types": ["full_attention", "chunked_attention"]}, r"layer_types=\[chunked_attention\]"),
        ("llama", {"query_pre_attn_scalar": 77.0}, "query_pre_attn_scalar=77.0"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("mistral", {"tie_word_embeddings": True}, "tie_word_embeddings=true"),
        ("mistral", {"head_dim": 32}, "head_dim=32"),
        ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings=false"),
        ("qwen3", {"attention_bias": True}, "attention_bias=true"),
        ("phi3", {"rope_parameters": YARN | {"rope_type": "longrope"}}, "rope_type=longrope: must be default"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
        ("gpt_neox", {"attention_bias": False}, "attention_bias=false"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=true"),
    ],
)
def test_what_no_builder_computes_is_transformers_or_refused_by_its_name(tmp_path, without_extra, kind, changes, named):
    content, path = written(kind) | changes, tmp_path / "config.json"
    with pytest.raises(UserError, match=named) as error:
        choose_for(content, path)
    assert 'pip install "pairtune[models]"' in str(error.value) and "\n" not in str(error.value)
    without_extra.undo()
    assert choose_for(content, path) == Choice({"_component_": BRIDGE, "path": str(tmp_path)}, kind.upper())


OLMO2 = {"model_type": "olmo2", "architectures": ["Olmo2ForCausalLM"]}
GEMMA3 = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {}}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (OLMO2, r"model_type=olmo2 \(Olmo2ForCausalLM\): torchtune has no builder for it"),
        (OLMO2 | {"hidden_size": "?", "rope_scaling": 5, "num_hidden_layers": None}, "model_type=olmo2"),
        (OLMO2 | {"auto_map": {"AutoModelForCausalLM": "m.M"}}, "the repository's own code, auto_map, is never run"),
        (GEMMA3 | {"text_config": {"model_type": "gemma3_text"}}, "gemma3: Gemma3ForCond.* text_config's gemma3_text"),
        (GEMMA3 | {"text_config": {}, "model_type": None}, "model_type=None: Gemma3ForConditionalGeneration"),
        ({"model_type": "t5", "is_encoder_decoder": True, "architectures": ["T5Model"]}, "T5Model: is an encoder and"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, r"\[BertForMaskedLM\]: is a classifier"),
        (written("llama") | {"architectures": ["LlamaForSequenceClassification"]}, "is a classifier or reward model"),
        (written("mistral") | {"architectures": ["MistralModel"]}, r"\[MistralModel\]: was saved without its output"),
        (written("llama") | {"architectures": "LlamaForCausalLM"}, "architectures=LlamaForCausalLM: must be a list"),
        (
            written("llama") | {"architectures": ["MyForCausalLM"], "auto_map": {"AutoModelForCausalLM": "m.My"}},
            "MyForCausalLM.*is the repository's own class, and not LlamaForCausalLM",
        ),
        (written("llama") | {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config=mxfp4"),
        (
            OLMO2 | {"quantization_config": {"quant_method": "gptq"}},
            "quantization_config=gptq: the weights are quantized",
        ),
        (written("gemma2") | {"use_bidirectional_attention": True}, "use_bidirectional_attention=true: its tokens see"),
        ({}, "model_type: is missing"),
        ({"model_type": 5}, "model_type=5: must be text"),
        ({"model_type": ["llama"]}, r"model_type=\['llama'\]: must be text"),
        (written("llama") | {"num_attention_heads": "4"}, "num_attention_heads='4': must be a whole number"),
        (written("llama") | {"num_attention_heads": 0}, "num_attention_heads=0: must be above 0"),
        (written("llama") | {"num_hidden_layers": 10**30}, "must be at most 10000"),
        (OLMO2 | {"num_hidden_layers": 10**30}, "must be at most 10000"),
        (written("llama") | {"vocab_size": 10**30}, "must be at most 2147483648"),
        (written("llama") | {"rope_parameters": "yarn"}, "rope_parameters='yarn': must be a block"),
        (written("llama") | {"rope_parameters": {"rope_type": 5}}, "rope_type=5: must be one of default, linear"),
        (written("llama") | {"rope_parameters": {"type": "mrope", "mrope_section": [1]}}, "rope_type=mrope: must be"),
        (written("llama") | {"auto_map": 5, "architectures": ["Mine"], "mlp_bias": True}, "mlp_bias=true"),
        (written("llama") | {"layer_types": [1]}, r"layer_types=\[1\]: must be a list, each text"),
        (written("llama") | {"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=4"),
        (written("llama") | {"hidden_size": 63, "head_dim": None}, "num_attention_heads=4: must divide hidden_size=63"),
        (written("llama") | {"vocab_size": None}, "vocab_size: is missing"),
        (written("llama") | {"intermediate_size": None}, "intermediate_size: is missing"),
        ([], r"must hold keys and values"),
    ],
)
def test_a_config_json_of_no_model_that_is_trained_here_is_one_sentence(tmp_path, without_extra, content, named):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=named) as error:
        choose(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_repository_that_brings_its_code_for_what_transformers_has_is_built(tmp_path):
    phi = written("phi3") | {
        "architectures": ["Phi3ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "m.Phi3ForCausalLM"},
    }
    assert choose_for(phi, tmp_path / "config.json").family == "PHI3_MINI"
    check_config(phi, tmp_path / "config.json")


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ([], "it is empty: `tune download REPO_ID"),
        (["adapter_config.json", "adapter_model.safetensors"], "it is an adapter: name its base model's folder"),
        (["model-Q4_K_M.gguf"], "it holds GGUF files"),
        (["consolidated.00.pth", "params.json"], "FullModelMetaCheckpointer"),
        (["export/config.json"], "nearest valid: checkpointer.checkpoint_dir=.*/export"),
        (["snapshots/0a/config.json", "refs/main"], "nearest valid: checkpointer.checkpoint_dir=.*/snapshots/0a"),
        (["notes.txt"], "holds no config.json: it is not a model in Hugging Face layout$"),
    ],
)
def test_a_folder_that_is_something_else_is_told_to_be_that(tmp_path, files, named):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=named) as error:
        choose(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "rope", "longest"),
    [
        ("phi3", LONGROPE, 64),
        ("llama", YARN, None),
    ],
)
def test_a_length_that_changes_the_positions_of_shorter_pairs_is_refused(tmp_path, kind, rope, longest):
    """transformers chooses frequencies by a row's last position."""
    original = {"original_max_position_embeddings": 64} if kind == "phi3" else {}
    (tmp_path / "config.json").write_text(json.dumps(written(kind, rope_parameters=rope, **original)))
    words = [f"checkpointer.checkpoint_dir={tmp_path}", "dataset=pairs.jsonl", "max_prompt_length=10"]
    recipe = read_recipe("lora_dpo_single_device")
    assert config.load(*recipe, [], [*words, f"max_length={longest or 500}"]).model._component_ == BRIDGE
    if longest:
        with pytest.raises(UserError, match=f"nearest valid: max_length={longest}"):
            config.load(*recipe, [], [*words, f"max_length={longest + 1}"])
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(written("llama", rope_parameters=dynamic)))
    with pytest.raises(UserError, match="rope_type=dynamic: counts positions in another way in each row"):
        config.load(*recipe, [], words)


def test_what_is_saved_says_what_auto_was(tmp_path):
    for name, width in (("policy", 64), ("other", 32)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(written("qwen2", hidden_size=width)))
    words = [f"checkpointer.checkpoint_dir={tmp_path}/policy", "dataset=pairs.jsonl", "reference=model"]
    words += [f"reference.checkpoint_dir={tmp_path}/other", "model.attn_dropout=0.1"]
    recipe = read_recipe("lora_dpo_single_device")
    cfg = config.load(*recipe, [], words)
    assert cfg.model._component_ == "torchtune.models.qwen2.qwen2" and cfg.checkpointer.model_type == "QWEN2"
    assert (cfg.model.embed_dim, cfg.model.attn_dropout, cfg.reference.model.embed_dim) == (64, 0.1, 32)
    assert cfg.checkpointer._component_ == "torchtune.training.FullModelHFCheckpointer"
    config.save(cfg, tmp_path / "config.yaml", recipe="lora_dpo_single_device")
    (tmp_path / "named.yaml").write_text("model: {_component_: torchtune.models.llama3.llama3, vocab_size: 1}")
    assert config.load(*recipe, [tmp_path / "named.yaml"], ["model=auto", *words]) == cfg
    for name in ("policy", "other"):
        (tmp_path / name / "config.json").unlink()
    assert config.load(*recipe, [tmp_path / "config.yaml"], []) == cfg


@pytest.mark.parametrize(
    ("builder", "model_type"),
    [("torchtune.models.llama3_1.llama3_1_8b", "LLAMA3"), ("torchtune.models.qwen2_5.qwen2_5_0_5b", "QWEN2"),
     ("torchtune.models.phi4.phi4_14b", "PHI4"), ("pairtune.qwen3.qwen3_0_6b", "QWEN3"), ("mine.model", None)],
)  # fmt: skip
def test_a_builder_tells_the_model_type_where_the_folder_is_not_here(builder, model_type):
    words = ["checkpointer.checkpoint_dir=/nowhere", "dataset=pairs.jsonl", f"model={builder}"]
    recipe = read_recipe("lora_dpo_single_device")
    if model_type is None:
        with pytest.raises(UserError, match="checkpointer.model_type: neither /nowhere nor model=mine.model tells it"):
            config.check(*recipe, [], words)
    else:
        assert config.check(*recipe, [], words)["checkpointer"]["model_type"] == model_type
