"""A config says what a run does, and a mistake in it is told before anything is loaded."""

import pytest
import yaml

from pairtune import config
from pairtune.errors import UserError

DEFAULTS = {
    "output_dir": "runs/x",
    "seed": 42,
    "dtype": "bf16",
    "compile": False,
    "model": {"_component_": config.REQUIRED},
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": config.REQUIRED,
        "model_type": config.REQUIRED,
    },
    "tokenizer": {"_component_": "torchtune.models.llama3.llama3_tokenizer", "path": "${checkpointer.checkpoint_dir}"},
    "dataset": {"source": config.REQUIRED, "limit": None, "columns": {}, "val_fraction": None, "overlong": "drop"},
    "eval_dataset": {"source": None},
    "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.0, "modules": ["q_proj", "v_proj"]},
    "max_length": 1024,
    "max_prompt_length": 512,
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0.0},
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 5e-6},
    "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1},
    "clip_grad_norm": 1.0,
    "pairs_per_step": 64,
    "batch_size": 4,
    "epochs": 1,
    "max_steps": None,
    "eval_every_n_steps": None,
}
BASE = """
model: {_component_: torchtune.models.llama3.llama3_8b}
checkpointer: {checkpoint_dir: /weights, model_type: LLAMA3}
dataset: {source: pairs.jsonl}
"""


@pytest.fixture
def write(tmp_path):
    def write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.fixture
def load(write):
    def load(*overrides, text=BASE, more=(), method="lora", defaults=DEFAULTS):
        paths = [write(text)] + [write(t, f"overlay{i}.yaml") for i, t in enumerate(more)]
        return config.load(method, defaults, paths, list(overrides))

    return load


def test_later_layers_win(load):
    text = BASE + "seed: 1\nper_method: {lora: {seed: 2}, full: {seed: 3}}"
    assert load(text=BASE).seed == 42
    assert load(text=BASE + "seed: 1").seed == 1
    assert load(text=text).seed == 2
    assert load(text=text, method="full").seed == 3
    assert load(text=text, more=["seed: 4"]).seed == 4
    assert load("seed=5", "seed=6", text=text, more=["seed: 4"]).seed == 6


def test_a_block_keeps_what_a_later_layer_does_not_name(load):
    cfg = load("lora.rank=4", "loss.beta=0.2", text=BASE + "lora: {alpha: 32}")
    assert (cfg.lora.rank, cfg.lora.alpha, cfg.lora.modules) == (4, 32, ["q_proj", "v_proj"])
    assert cfg.loss == {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.2, "label_smoothing": 0.0}


def test_another_component_does_not_inherit_arguments(load):
    assert load("loss=torchtune.rlhf.loss.RSOLoss", "loss.gamma=0.3").loss == {
        "_component_": "torchtune.rlhf.loss.RSOLoss",
        "gamma": 0.3,
    }


def test_references_are_resolved(load):
    assert load("checkpointer.checkpoint_dir=/elsewhere").tokenizer.path == "/elsewhere"


def test_a_value_may_hold_equals_signs_and_yaml(load):
    cfg = load(
        "dataset.source=/data/a=b.jsonl", "lora.modules=[q_proj,mlp]", "optimizer.lr=1e-4", "clip_grad_norm=None"
    )
    assert cfg.dataset.source == "/data/a=b.jsonl"
    assert cfg.lora.modules == ["q_proj", "mlp"]
    assert cfg.optimizer.lr == 1e-4
    assert cfg.clip_grad_norm is None


def test_a_tilde_removes(load):
    cfg = load("~lr_scheduler.warmup_ratio", "~clip_grad_norm")
    assert cfg.lr_scheduler == {"_component_": "pairtune.schedules.cosine"}
    assert cfg.clip_grad_norm is None
    assert load("~lr_scheduler").lr_scheduler is None


def test_the_saved_config_is_the_run(load, tmp_path):
    cfg = load("lora.rank=4", "loss=torchtune.rlhf.loss.RSOLoss", "~clip_grad_norm")
    config.save(cfg, tmp_path / "saved.yaml", "lora_dpo_single_device")
    assert config.load("lora", DEFAULTS, [tmp_path / "saved.yaml"], []) == cfg
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["lora"]["rank"] == 4


def test_one_file_serves_a_recipe_without_adapters(load):
    defaults = {k: v for k, v in DEFAULTS.items() if k != "lora"}
    text = BASE + "lora: {rank: 4}\nper_method: {lora: {lora: {alpha: 1}}}"
    assert "lora" not in load(text=text, method="full", defaults=defaults)
    with pytest.raises(UserError, match="this recipe has no lora; it is a key of lora_ and qlora_ recipes"):
        load("lora.rank=4", method="full", defaults=defaults)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lose.beta=1", ["unknown key lose", "nearest: loss"]),
        ("lora.rnak=1", ["unknown key lora.rnak", "nearest: lora.rank"]),
        ("learning_rate=1", ["unknown key learning_rate", "here it is called optimizer.lr"]),
        ("loss.betta=1", ["loss.betta", "DPOLoss", "beta, label_smoothing", "nearest: beta", "~loss.betta"]),
        ("loss=torchtune.rlhf.loss.DPOLos", ["loss._component_", "DPOLos", "cannot be imported"]),
        ("pairs_per_step=many", ["pairs_per_step=many", "whole number", "is text"]),
        ("pairs_per_step=3.5", ["pairs_per_step=3.5", "whole number"]),
        ("compile=1", ["compile=1", "true or false"]),
        ("lora.alpha=big", ["lora.alpha=big", "a number"]),
        ("loss.beta=big", ["loss.beta=big", "a number"]),
        ("lora.modules=q_proj", ["lora.modules=q_proj", "a list"]),
        ("seed=null", ["seed=null", "a whole number"]),
        ("max_steps=soon", ["max_steps=soon", "whole number"]),
        ("dataset=file.jsonl", ["dataset=file.jsonl", "a block of keys"]),
        ("loss.beta=0", ["loss.beta=0", "greater than 0", "loss.beta=0.1"]),
        ("loss.label_smoothing=0.5", ["label_smoothing=0.5", "below 0.5"]),
        ("lora.modules=[q_proj,o_proj]", ["lora.modules=[q_proj,o_proj]", "output_proj", "[q_proj]"]),
        ("dtype=float32", ["dtype=float32", "bf16, fp32", "nearest valid: dtype=fp32"]),
        ("epochs=0", ["epochs=0", "at least 1", "epochs=1"]),
        ("max_length=512", ["max_prompt_length=512", "max_length=512", "nothing", "max_prompt_length=511"]),
        ("batch_size=5", ["batch_size=5", "divide pairs_per_step=64", "batch_size=4", "pairs_per_step=65"]),
        ("eval_every_n_steps=10", ["eval_every_n_steps=10", "nothing to evaluate on"]),
        ("~optimizer.lr", ["optimizer.lr", "needs a learning rate"]),
        ("~seed", ["seed cannot be removed"]),
        ("~nothing", ["no such key"]),
        ("seed", ["must be key=value"]),
        ("seed=[", ["not valid YAML"]),
        ("tokenizer.path=${nowhere}", ["nowhere"]),
    ],
)
def test_a_mistake_is_named_with_its_rule_and_a_way_out(load, override, words):
    with pytest.raises(UserError) as error:
        load(override)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model: {_component_: x}\ncheckpointer: {model_type: L}\ndataset: {source: s}",
            ["checkpoint_dir", "no default"],
        ),
        (BASE + "per_method: {dora: {seed: 1}}", ["per_method.dora", "full, lora, qlora"]),
        (BASE + "per_method: {full: {sede: 1}}", ["per_method.full", "sede", "seed"]),
        (BASE + "a: [", ["not valid YAML"]),
        ("- 1", ["must hold keys"]),
    ],
)
def test_a_mistake_in_a_file_names_the_file(load, text, words):
    with pytest.raises(UserError) as error:
        load(text=text)
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        config.load("lora", DEFAULTS, [tmp_path / "nowhere.yaml"], [])
