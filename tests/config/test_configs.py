"""Every file in configs/ builds the model that its name says, for every recipe; published runs are as published."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT
from published import MODELS
from published_bridged import BRIDGED

from pairtune import config, models
from pairtune.cli.commands import load_yaml
from pairtune.cli.find import find, own, torchtunes
from pairtune.cli.recipe import read_recipe
from pairtune.config.uses import BRIDGE
from pairtune.errors import UserError
from pairtune.folders.check_model import check_model, check_model_type
from pairtune.run import rehearsal

CONFIGS = {path.stem: path for path in sorted((ROOT / "configs").glob("*.yaml"))}
RECIPES = {name: read_recipe(name) for name in own("recipe")}

# Published runs: the model's config that goes below, its recipe, and what the source says.
RUNS = {
    "run_zephyr": ("zephyr_7b_sft", "full_dpo_distributed", {
        "loss": {"_component_": "pairtune.losses.Sigmoid", "beta": 0.1}, "optimizer.lr": 5e-7, "epochs": 3,
        "optimizer._component_": "torch.optim.AdamW", "pairs_per_step": 32, "max_length": 1024,
        "max_prompt_length": 512, "seed": 42, "dataset.split": "train_prefs", "eval_dataset.split": "test_prefs",
        "lr_scheduler": {"_component_": "pairtune.schedules.linear", "warmup_ratio": 0.1},
    }),
    "run_notus": ("zephyr_7b_sft", "full_dpo_distributed", {
        "loss": {"_component_": "pairtune.losses.Sigmoid", "beta": 0.1}, "epochs": 3, "seed": 42,
        "optimizer": {"_component_": "torch.optim.RMSprop", "lr": 5e-7}, "pairs_per_step": 64, "max_length": 1024,
        "max_prompt_length": 512, "lr_scheduler": {"_component_": "pairtune.schedules.linear", "warmup_ratio": 0.1},
    }),
    "run_tulu3": ("tulu3_8b_sft", "full_dpo_distributed", {
        "loss": {"_component_": "pairtune.losses.SigmoidNorm", "beta": 5.0}, "optimizer.lr": 5e-7,
        "optimizer.weight_decay": 0.0, "pairs_per_step": 128, "max_length": 2048, "epochs": 1,
        "lr_scheduler": {"_component_": "pairtune.schedules.linear", "warmup_ratio": 0.1},
    }),
    "run_llama3": ("llama3_8b", "full_dpo_distributed", {
        "loss": {"_component_": "pairtune.losses.Rpo", "beta": 0.1, "alpha": 0.2}, "score_end": False,
        "optimizer.lr": 1e-5,
    }),
    "run_dpo_mix_7k": ("mistral_7b_v0_2", "qlora_dpo_distributed", {
        "loss": {"_component_": "pairtune.losses.Sigmoid", "beta": 0.1}, "optimizer.lr": 5e-6,
        "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1}, "pairs_per_step": 12,
        "batch_size": 1, "epochs": 1, "max_prompt_length": 1024, "max_length": 1536, "dtype": "bf16", "seed": 42,
        "eval_every_n_steps": 100, "lora.rank": 64, "lora.alpha": 128, "lora.dropout": 0.05,
        "lora.modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    }),
    "run_reviewer2_tinyllama": ("tinyllama_1_1b", "lora_dpo_single_device", {
        "loss": {"_component_": "pairtune.losses.Sigmoid", "beta": 0.1}, "optimizer.lr": 5e-4,
        "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.0}, "pairs_per_step": 10,
        "max_steps": 2000, "max_prompt_length": 256, "lora.rank": 8, "lora.alpha": 16, "lora.dropout": 0.05,
    }),
    **{
        f"run_simpo_{name}": (base, "full_dpo_distributed", {
            "loss": {"_component_": "pairtune.losses.Simpo", "beta": beta, "gamma_beta_ratio": ratio},
            "optimizer.lr": lr, "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1},
            "pairs_per_step": 128, "epochs": 1, "max_length": length, "max_prompt_length": prompt, "seed": 42,
        })
        for name, base, beta, ratio, lr, length, prompt in (
            ("llama3_8b_instruct", "llama3_8b", 2.5, 0.55, 1e-6, 2048, 1800),
            ("llama3_8b_instruct_v0_2", "llama3_8b", 10.0, 0.3, 1e-6, 2048, 1800),
            ("llama3_8b_base", "llama3_8b", 2.0, 0.5, 6e-7, 2048, 1800),
            ("mistral_7b_base", "zephyr_7b_sft", 2.0, 0.8, 3e-7, 1024, 512),
            ("mistral_7b_instruct", "mistral_7b_v0_2", 2.5, 0.1, 5e-7, 2048, 1800),
            ("gemma2_9b", "gemma2_9b", 10.0, 0.5, 8e-7, 2048, 1800),
        )
    },
}  # fmt: skip


def load(recipe, *names, overrides=()):
    return config.load(*RECIPES[recipe], [CONFIGS[name] for name in names], list(overrides))


def build(method, cfg):
    if method == "full":
        return models.full(cfg.model, dtype=cfg.dtype)
    return models.lora(cfg.model, **cfg.lora, dtype=cfg.dtype, quantize_base=method == "qlora")


def test_no_config_is_without_a_test():
    assert len(RECIPES) == 6 and len(CONFIGS) > 50
    assert CONFIGS.keys() == MODELS.keys() | BRIDGED.keys() | RUNS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_config_builds_the_published_model_for_every_recipe(name):
    number, published = MODELS[name]
    for method in config.METHODS:
        cfgs = [load(recipe, name) for recipe, (of, _) in RECIPES.items() if of == method]
        assert len(cfgs) == 2 and cfgs[0].model == cfgs[1].model and cfgs[0].get("lora") == cfgs[1].get("lora")
        check_model_type(cfgs[0].checkpointer.model_type, published)
        rehearsal.rehearse(cfgs[0].optimizer, cfgs[0].lr_scheduler, cfgs[0].loss, num_training_steps=1000)
        model = build(method, cfgs[0])
        total, trained = models.num_parameters(model)
        assert total - (trained if method != "full" else 0) == number
        assert trained > 0 and all(p.is_meta for p in model.parameters())
        check_model(model, published)
        models.prepare(model, max_length=cfgs[0].max_length, vocab_size=published["vocab_size"])


@pytest.mark.parametrize("name", BRIDGED)
def test_a_config_of_a_folder_builds_the_published_model_for_every_recipe(name, tmp_path):
    size, published = BRIDGED[name]
    (tmp_path / "config.json").write_text(json.dumps(published))
    for method in config.METHODS:
        recipes = [recipe for recipe, (of, _) in RECIPES.items() if of == method]
        cfgs = [load(r, name, overrides=[f"checkpointer.checkpoint_dir={tmp_path}"]) for r in recipes]
        assert len(cfgs) == 2 and cfgs[0].model == cfgs[1].model and cfgs[0].get("lora") == cfgs[1].get("lora")
        assert cfgs[0].model._component_ == BRIDGE
        rehearsal.rehearse(cfgs[0].optimizer, cfgs[0].lr_scheduler, cfgs[0].loss, num_training_steps=1000)
        model = build(method, cfgs[0])
        total, trained = models.num_parameters(model)
        assert total - (trained if method != "full" else 0) == size
        assert trained > 0 and all(p.is_meta for p in model.parameters())
        of_text = published.get("text_config", published)
        models.prepare(model, max_length=cfgs[0].max_length, vocab_size=of_text["vocab_size"])


@pytest.mark.parametrize(
    ("builder", "name", "differs"),
    [
        ("phi4.phi4_14b", "phi4_14b", "rope_theta is 10000.0 in `model` and 250000.0"),
        ("mistral.mistral_7b", "mistral_7b_v0_2", "rope_theta is 10000.0 in `model` and 1000000.0"),
        ("mistral.mistral_7b", "mistral_7b_v0_3", "vocab_size is 32000 in `model` and 32768"),
        ("llama3.llama3_8b", "llama3_1_8b", "rope_scaling.factor is 1.0 in `model` and 8.0"),
    ],
)
def test_a_builder_of_torchtunes_that_is_another_model_is_refused(builder, name, differs):
    model = models.full({"_component_": f"torchtune.models.{builder}"}, dtype="bf16")
    with pytest.raises(UserError, match=re.escape(differs)):
        check_model(model, MODELS[name][1])


@pytest.mark.parametrize("name", MODELS)
def test_transformers_counts_as_many_parameters_in_the_published_config(name):
    """Layers are alike: those of a model of one and of two tell the rest."""
    from transformers import AutoConfig, AutoModelForCausalLM

    number, published = MODELS[name]
    counts, layers = [], "n_layer" if "n_layer" in published else "num_hidden_layers"
    for num_layers in (1, 2):
        values = published | {layers: num_layers, "pad_token_id": 0}
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
        counts.append(sum(p.numel() for p in model.parameters()))
    one, two = counts
    assert one + (published[layers] - 1) * (two - one) == number


@pytest.mark.parametrize("run", RUNS)
def test_a_published_run_is_as_published_and_fits_every_recipe(run):
    base, recipe, expected = RUNS[run]
    for other in RECIPES:
        cfg = load(other, base, run)
        assert cfg.output_dir == f"runs/{run.removeprefix('run_')}"
        rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=1000)
    cfg = load(recipe, base, run)
    for key, value in expected.items():
        found = cfg
        for part in key.split("."):
            found = found[part]
        assert found == value, key


def test_the_reviewer_2_text_asks_for_prompts_longer_than_the_whole():
    base, recipe, _ = RUNS["run_reviewer2_tinyllama"]
    with pytest.raises(UserError, match=r"max_prompt_length=256: must be below max_length=128.* max_length=512"):
        load(recipe, base, "run_reviewer2_tinyllama", overrides=["max_length=128"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_commands_above_a_config_are_those_of_its_content(name):
    head = CONFIGS[name].read_text().partition("\n\n")[0].replace("\\\n# ", "")
    runs = re.findall(r"^#   tune run (\S+) (.+)$", head, re.MULTILINE)
    assert runs and head.startswith("# ") and all(len(line) <= 120 for line in CONFIGS[name].read_text().splitlines())
    for recipe, words in reversed(runs):  # the first one is that of RUNS
        given = [Path(path) for path in re.findall(r"--config (\S+)", words)]
        assert find("recipe", recipe).stem in RECIPES
        assert given[-1] == Path("configs", f"{name}.yaml") and all((ROOT / path).is_file() for path in given)
    if name in RUNS:
        assert (given[0].stem, Path(recipe).stem) == RUNS[name][:2]
    downloads = re.findall(r"tune download (\S+/\S+) --output-dir (\S+)", head)
    if name in MODELS.keys() | BRIDGED.keys() and name != "reviewer2":
        assert downloads == [(downloads[0][0], load_text(name)["checkpointer"]["checkpoint_dir"])]
        assert downloads[0][1] == "/tmp/" + downloads[0][0].partition("/")[2]


def load_text(name):
    return load_yaml(CONFIGS[name])


def test_a_file_may_hold_what_only_some_recipes_have(tmp_path):
    """One file serves all six; on the command line of another recipe such a key is an error."""
    text = "merge_into: dequantized\nadapter: null\nfsdp_cpu_offload: true\nlora: {rank: 3}\n"
    (tmp_path / "more.yaml").write_text(text)
    for recipe, schema in RECIPES.items():
        cfg = config.load(*schema, [CONFIGS["llama3_8b"], tmp_path / "more.yaml"], [])
        assert cfg.get("merge_into") == ("dequantized" if recipe.startswith("qlora") else None)
        assert cfg.get("fsdp_cpu_offload") == (True if recipe.endswith("distributed") else None)
        assert ("lora" in cfg) == (not recipe.startswith("full"))
    with pytest.raises(UserError, match="merge_into.*qlora_ recipes"):
        load("lora_dpo_single_device", "llama3_8b", overrides=["merge_into=dequantized"])


# torchtune's own DPO configs, with the recipe of ours that has the same name

THEIR_DATA = ["dataset.source=pairs", "dataset.columns={prompt: question, chosen: response_j, rejected: response_k}"]
THEIRS = {  # what is left to set, by the key that the error names without it
    name: {"seed": ["seed=42"], "dataset.source": THEIR_DATA} | more
    for name, more in {
        "llama2/7B_lora_dpo": {"pairs_per_step": ["pairs_per_step=64"]},
        "llama2/7B_lora_dpo_single_device": {},
        "llama3_1/8B_lora_dpo": {"pairs_per_step": ["pairs_per_step=64"]},
        "llama3_1/8B_lora_dpo_single_device": {},
        "llama3_1/8B_full_dpo": {"pairs_per_step": ["pairs_per_step=128"]},
    }.items()
}


def load_theirs(name, overrides):
    method = "full" if "full" in name else "lora"
    recipe = f"{method}_dpo_{'single_device' if 'single' in name else 'distributed'}"
    return config.load(*RECIPES[recipe], [torchtunes("config")[name]], overrides)


def test_these_are_all_dpo_configs_of_torchtunes():
    assert {name for name in torchtunes("config") if "dpo" in name} == THEIRS.keys()


@pytest.mark.parametrize("name", THEIRS)
def test_torchtunes_dpo_configs_run_here_but_for_what_an_error_names(name):
    content, needed = load_yaml(torchtunes("config")[name]), THEIRS[name]
    for key in needed:
        with pytest.raises(UserError, match=key) as error:
            load_theirs(name, [o for k, overrides in needed.items() if k != key for o in overrides])
        assert "\n" not in str(error.value)
    cfg = load_theirs(name, [o for overrides in needed.values() for o in overrides])
    for key in ("output_dir", "batch_size", "epochs", "device", "dtype", "compile", "enable_activation_checkpointing"):
        assert cfg[key] == content[key], key
    assert cfg.max_steps == 1000 and cfg.pairs_per_step == (32 if "single" in name else 128 if "full" in name else 64)
    assert cfg.optimizer == content["optimizer"] | {"lr": float(content["optimizer"]["lr"])}
    assert cfg.lr_scheduler == content["lr_scheduler"] and cfg.loss.items() >= content["loss"].items()
    assert cfg.model._component_ == content["model"]["_component_"].replace("lora_", "")
    assert set(cfg.model) == {"_component_"} and "output_dir" not in cfg.checkpointer
    assert cfg.checkpointer.checkpoint_files == content["checkpointer"]["checkpoint_files"]
    if "lora" in name:
        modules = ["q_proj", "v_proj", "output_proj", "mlp"]
        kinds = {"use_dora": False, "use_rslora": False}
        assert cfg.lora == {"rank": 8, "alpha": 16, "dropout": 0.0, "modules": modules} | kinds
    rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=1000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"resume_from_checkpoint": True}, "resume_from_checkpoint=true.*resume=true"),
        ({"save_adapter_weights_only": True}, "save_adapter_weights_only=true.*exported"),
        ({"log_peak_memory_stats": False}, "log_peak_memory_stats=false.*always logged"),
        ({"epochs": 2}, "max_steps_per_epoch=1000: cuts each epoch"),
        ({"ref_checkpointer": {"checkpoint_dir": "/else"}}, "ref_checkpointer: is not checkpointer"),
        ({"dataset": {"_component_": "mine.pairs"}}, "dataset._component_=mine.pairs.*dataset.columns"),
    ],
)
def test_what_torchtune_does_and_recipes_here_do_not_is_refused(tmp_path, change, words):
    content = load_yaml(torchtunes("config")["llama2/7B_lora_dpo_single_device"]) | change
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=words):
        config.load(*RECIPES["lora_dpo_single_device"], [path], [] if "dataset" in change else THEIR_DATA)


@pytest.mark.parametrize("name", ["llama3_2_1b", "tinyllama_1_1b"])
def test_a_config_tells_what_is_counted_on_a_gpu(name):
    """The others take minutes: python tools/count_gpus.py --check"""
    tool = runpy.run_path(str(ROOT / "tools" / "count_gpus.py"))
    line = tool["LINE"].search(CONFIGS[name].read_text())[0]
    assert tool["true_line"](CONFIGS[name], line) == line


def test_the_pages_name_every_config():
    pages = "".join(page.read_text() for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    missing = [name for name in CONFIGS if f"`{name}`" not in pages and f"configs/{name}.yaml" not in pages]
    assert missing == ["run_simpo_llama3_8b_instruct_v0_2"]  # beside the first of its two
