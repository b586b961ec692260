"""A config says what a run does, and a mistake in it is told before anything is loaded."""

import json
import shlex

import pytest
import torch
import yaml
from helpers import SIZES
from omegaconf import OmegaConf

from pairtune import config
from pairtune.config.saved import changes
from pairtune.errors import UserError
from pairtune.run import rehearsal

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
    "samples": {"prompts": [], "num_prompts": 3},
    "metric_logger": None,
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


@pytest.fixture
def check(write):
    return lambda *overrides: config.check("lora", DEFAULTS, [write(BASE)], list(overrides))


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
    assert cfg.lr_scheduler == {"_component_": "pairtune.schedules.cosine", "warmup_ratio": None}
    assert cfg.clip_grad_norm is None
    assert load("~lr_scheduler").lr_scheduler is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["lora.rank=4", "loss=torchtune.rlhf.loss.RSOLoss", "~clip_grad_norm"],
        ["~lr_scheduler.warmup_ratio"],
        ["~lr_scheduler"],
        ["~loss.beta", "~loss.label_smoothing"],
        ["optimizer=torch.optim.SGD", "optimizer=torch.optim.AdamW", "optimizer.lr=1e-4", "~optimizer.weight_decay"],
        ["lr_scheduler.num_warmup_steps=2"],
        ["metric_logger=torchtune.training.metric_logging.DiskLogger", "metric_logger.log_dir=/x"],
        [r"output_dir=\${HOME}/a \\\${b}", "dataset.columns.chosen=good", "dataset.columns.rejected=bad"],
    ],
)
def test_the_saved_config_is_the_run(load, tmp_path, overrides):
    defaults = DEFAULTS | {"optimizer": {**DEFAULTS["optimizer"], "weight_decay": 0.3}}
    cfg = load(*overrides, text=BASE.replace("/weights", r"'/\${weights}'"), defaults=defaults)
    config.save(cfg, tmp_path / "saved.yaml", "lora_dpo_single_device")
    again = config.load("lora", defaults, [tmp_path / "saved.yaml"], [])
    assert OmegaConf.to_container(again, resolve=True) == OmegaConf.to_container(cfg, resolve=True)
    assert yaml.safe_load((tmp_path / "saved.yaml").read_text())["lora"]["rank"] == cfg.lora.rank
    assert again.checkpointer.checkpoint_dir == "/${weights}"


def test_a_component_within_a_block_is_one_like_any_other(load, tmp_path):
    defaults = DEFAULTS | {"reference": {"name": "model", "checkpoint_dir": None, "model": None}}
    block = {"_component_": "torchtune.models.llama3.llama3", **SIZES}
    build = f"reference.model={json.dumps(block)}"
    assert load(defaults=defaults).reference.model is None
    cfg = load("reference.checkpoint_dir=x", build, "reference.model.attn_dropout=null", defaults=defaults)
    assert cfg.reference.model == block
    config.save(cfg, tmp_path / "saved.yaml", "lora_dpo_single_device")
    assert config.load("lora", defaults, [tmp_path / "saved.yaml"], []) == cfg
    assert load("reference.checkpoint_dir=x", build, "~reference.model", defaults=defaults).reference.model is None
    for words, override in (
        ("reference.model.rank: llama3 has no such argument", "reference.model.rank=3"),
        ("reference.model=3: must be a component", "reference.model=3"),
        ("reference.model._component_=a.b: cannot be imp", "reference.model.rope_base=1 reference.model=a.b"),
    ):
        with pytest.raises(UserError, match=words):
            load("reference.checkpoint_dir=x", build, *override.split(), defaults=defaults)


def test_a_saved_config_says_what_is_not_the_default(load, tmp_path):
    defaults = DEFAULTS | {"output_dir": "runs/x", "dataset": {**DEFAULTS["dataset"], "columns": {}, "limit": None}}
    words = ("dataset.columns={chosen: good}", "dataset.limit=3", "optimizer.betas=[0.9,0.99]", "~lr_scheduler")
    cfg = load(*words, "loss=ipo", "loss.beta=0.1", "output_dir='a  # default: c'", defaults=defaults)
    text = config.save(cfg, tmp_path / "saved.yaml", "lora_dpo_single_device", defaults)
    assert config.load("lora", defaults, [tmp_path / "saved.yaml"], []) == cfg
    found = {key: (value, default) for key, value, default in changes(text)}
    assert found.items() >= {
        "dataset.columns.chosen": ("good", "none"), "dataset.limit": ("3", "null"),
        "optimizer.betas": ("[0.9,0.99]", "none"),
        "loss._component_": ("pairtune.losses.Ipo", DEFAULTS["loss"]["_component_"]),
    }.items()  # fmt: skip
    assert found["lr_scheduler"][0] == "null" and found["lr_scheduler"][1].startswith("{_component_: ")
    assert "optimizer.lr" not in found and "loss.beta" not in found  # of another component than the default
    assert found["output_dir"][1] == "runs/x"
    assert config.save(cfg, tmp_path / "plain.yaml", "lora_dpo_single_device").count("# default") == 1


def test_the_saved_command_can_be_pasted(load, tmp_path):
    path = tmp_path / "a run's" / "config.yaml"
    command = config.save(load(), path, tmp_path / "my rec.py").splitlines()[0]
    assert shlex.split(command.removeprefix("# ")) == ["tune", "run", "my rec", "--config", str(path)]


def test_a_folder_that_cannot_be_made_is_named(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir=.*/file/run: cannot be written: Not a directory; name another"):
        config.save(load(), tmp_path / "file" / "run" / "config.yaml", "lora_dpo_single_device")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_warmup_steps: 2", {"num_warmup_steps": 2, "warmup_ratio": None}),
        ("num_warmup_steps: 2, warmup_ratio: null", {"num_warmup_steps": 2, "warmup_ratio": None}),
        ("warmup_ratio: null", {"warmup_ratio": None}),
        ("num_warmup_steps: null", {"warmup_ratio": 0.1}),
    ],
)
def test_a_file_chooses_how_warm_up_is_told(load, text, expected):
    cfg = load(text=BASE + f"lr_scheduler: {{{text}}}")
    assert cfg.lr_scheduler == {"_component_": "pairtune.schedules.cosine", **expected}


def test_two_warm_ups_in_one_place_are_refused(load):
    with pytest.raises(UserError, match="says the same in another way; keep one of them"):
        load(text=BASE + "lr_scheduler: {num_warmup_steps: 2, warmup_ratio: 0.1}")


def test_null_is_an_argument_that_is_not_passed():
    block = OmegaConf.create({"_component_": "torch.optim.AdamW", "lr": 0.5, "weight_decay": None})
    optimizer = config.instantiate(block, [torch.nn.Parameter(torch.zeros(1))])
    assert (optimizer.defaults["lr"], optimizer.defaults["weight_decay"]) == (0.5, 0.01)  # torch's own default
    assert config.instantiate(None) is None


def test_a_component_is_built_with_the_text_of_an_escaped_reference():
    block = OmegaConf.create({"_component_": "pathlib.PurePath", "x": None})
    assert str(config.instantiate(block, r"${a}")) == "${a}"
    block = OmegaConf.create({"_component_": "builtins.dict", "path": r"/\${a}"})
    assert config.instantiate(block) == {"path": "/${a}"}


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer=torch.optim.SGD", "optimizer.lr=0.1", "optimizer.momentum=0.9"],  # its default is 0, a number
        ["optimizer=torch.optim.Adafactor", "optimizer.lr=0.1", "optimizer.eps=[null,0.001]"],
        ["metric_logger=torchtune.training.metric_logging.TensorBoardLogger", "metric_logger.log_dir=x"],
        ["checkpointer.recipe_checkpoint=null", "checkpointer.checkpoint_files=[a.safetensors]"],
        ["samples.prompts=[Why?,'1']"],
        ["optimizer.fused=true", "optimizer.capturable=true"],  # for a GPU, and rehearsed without one
    ],
)
def test_these_are_right(load, overrides):
    cfg = load(*overrides)
    rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=10)


def test_a_component_that_is_null_by_default_is_a_block(load):
    cfg = load("metric_logger=torchtune.training.metric_logging.StdoutLogger")
    assert cfg.metric_logger == {"_component_": "torchtune.training.metric_logging.StdoutLogger"}
    assert type(config.instantiate(cfg.metric_logger)).__name__ == "StdoutLogger"


def test_a_block_of_the_users_own_keys_is_filled_one_by_one(load):
    cfg = load("dataset.columns.chosen=a", "dataset.columns.rejected=b")
    assert cfg.dataset.columns == {"chosen": "a", "rejected": "b"}


def test_one_file_serves_a_recipe_without_adapters(load):
    defaults = {k: v for k, v in DEFAULTS.items() if k != "lora"}
    text = BASE + "lora: {rank: 4}\nper_method: {lora: {lora: {alpha: 1}}}"
    assert "lora" not in load(text=text, method="full", defaults=defaults)
    with pytest.raises(UserError, match="this recipe has no lora; it is a key of lora_ and qlora_ recipes"):
        load("lora.rank=4", method="full", defaults=defaults)


def test_what_a_run_starts_from_is_not_passed_over(load):
    recipe = {"method": "full", "defaults": {k: v for k, v in DEFAULTS.items() if k not in ("lora", "adapter")}}
    load(text=BASE + "adapter: null\nper_method: {lora: {adapter: sft}}", **recipe)
    for text in ("adapter: sft", "per_method: {full: {adapter: sft}}"):
        with pytest.raises(UserError, match="adapter=sft: full_ recipes start from whole weights: merge it first"):
            load(text=BASE + text, **recipe)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("lose.beta=1", ["unknown key lose", "nearest: loss"]),
        ("lora.rnak=1", ["unknown key lora.rnak", "nearest: lora.rank"]),
        ("learning_rate=1", ["unknown key learning_rate", "here it is called optimizer.lr: set optimizer.lr=1"]),
        ("loss.betta=1", ["loss.betta", "DPOLoss", "beta, label_smoothing", "nearest: beta", "~loss.betta"]),
        ("loss=torchtune.rlhf.loss.DPOLos", ["loss._component_", "DPOLos", "cannot be imported"]),
        ("pairs_per_step=many", ["pairs_per_step=many", "whole number", "is text"]),
        ("pairs_per_step=3.5", ["pairs_per_step=3.5", "whole number"]),
        ("compile=1", ["compile=1", "true, false or auto"]),
        ("lora.alpha=big", ["lora.alpha=big", "a number"]),
        ("loss.beta=big", ["loss.beta=big", "a number"]),
        ("lora.modules=q_projj", ["lora.modules=[q_projj]", "a list"]),
        ("seed=null", ["seed=null", "a whole number"]),
        ("max_steps=soon", ["max_steps=soon", "whole number"]),
        ("lora=16", ["lora=16: must be a block of keys, rank, alpha, dropout, modules", "such as lora.rank=16"]),
        ("samples=true", ["samples=true: must be a block of keys, prompts, num_prompts; set one of them"]),
        ("optimizer=1e-4", ["must be a component", "one of its arguments, such as optimizer.lr=0.0001"]),
        ("loss.beta=0", ["loss.beta=0", "greater than 0", "loss.beta=0.1"]),
        ("loss.label_smoothing=0.5", ["label_smoothing=0.5", "below 0.5"]),
        ("lora.modules=[q_proj,o_projj]", ["lora.modules=[q_proj,o_projj]", "output_proj", "[q_proj]"]),
        ("dtype=float32", ["dtype=float32", "bf16, fp32", "nearest valid: dtype=fp32"]),
        ("epochs=0", ["epochs=0", "above 0", "epochs=1"]),
        ("max_prompt_length=1024", ["max_prompt_length=1024", "max_length=1024", "nothing", "max_prompt_length=1023"]),
        ("batch_size=5", ["batch_size=5", "divide pairs_per_step=64", "batch_size=4", "pairs_per_step=65"]),
        ("eval_every_n_steps=10", ["eval_every_n_steps=10", "nothing to evaluate on"]),
        ("~optimizer.lr", ["optimizer.lr", "needs a learning rate"]),
        ("~seed", ["seed cannot be removed"]),
        ("~nothing", ["no such key"]),
        ("seed", ["must be key=value"]),
        ("seed=[", ["not valid YAML"]),
        ("tokenizer.path=${nowhere}", ["tokenizer.path", "nowhere"]),
        ("metric_logger.log_dir=x", ["metric_logger.log_dir=x", "no metric_logger", "metric_logger=torchtune."]),
        (
            "metric_logger=torchtune.training.metric_logging.DiskLogger",
            ["metric_logger.log_dir", "DiskLogger needs it"],
        ),
        ("metric_logger=5", ["metric_logger=5", "a component, named by its import path"]),
        ("optimizer=null", ["optimizer=null", "a component", "optimizer=torch.optim.AdamW"]),
        ("checkpointer.output_dir=/x", ["checkpointer.output_dir=/x", "recipe decides it", "remove it"]),
        ("checkpointer.recipe_checkpoint=foo", ["checkpointer.recipe_checkpoint=foo", "recipe decides it"]),
        ("checkpointer.should_load_recipe_state=true", ["should_load_recipe_state=true", "recipe decides it"]),
        ("checkpointer.safe_serialization=false", ["safe_serialization=false", "recipe decides it"]),
        ("lr_scheduler.num_training_steps=5", ["num_training_steps=5", "recipe decides it"]),
        ("optimizer.params=[]", ["optimizer.params", "no such argument"]),
        ("optimizer.fused=maybe", ["optimizer.fused=maybe", "true or false", "is text"]),
        ("optimizer.betas=[a,b]", ["optimizer.betas=[a,b]", "a list of 2, each a number"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas=[0.9]", "a list of 2, each a number"]),
        ("optimizer.betas=0.9", ["optimizer.betas=0.9", "a list of 2, each a number, is a number"]),
        ("lr_scheduler.num_warmup_steps=1.5", ["num_warmup_steps=1.5", "a whole number"]),
        ("lr_scheduler.num_warmup_steps=abc", ["num_warmup_steps=abc", "a whole number"]),
        ("lr_scheduler.warmup_ratio=1.5", ["warmup_ratio=1.5", "below 1", "e.g. lr_scheduler.warmup_ratio=0.1"]),
        ("loss.beta=.inf", ["loss.beta=inf", "finite number"]),
        ("clip_grad_norm=.inf", ["clip_grad_norm=inf", "finite", "clip_grad_norm=null"]),
        ("lora.modules=[]", ["lora.modules=[]", "nearest valid: lora.modules=[q_proj,v_proj]"]),
        ("lora.modules=[[q_proj]]", ["lora.modules=[[q_proj]]", "a list of at least one"]),
        ("lora.dropout=1.0", ["lora.dropout=1.0", "below 1", "e.g. lora.dropout=0.0"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", "e.g. optimizer.lr=5e-06"]),
        ("~tokenizer.path", ["tokenizer.path", "llama3_tokenizer needs it", "set tokenizer.path="]),
        ("~checkpointer.checkpoint_dir", ["checkpointer.checkpoint_dir: has no default"]),
        ("tokenizer=torchtune.models.qwen2.qwen2_tokenizer", ["tokenizer.path", "qwen2_tokenizer needs it"]),
        ("lr_scheduler=torchtune.training.get_cosine_schedule_with_warmup", ["num_warmup_steps", "needs it"]),
        (
            "lr_scheduler=torch.optim.lr_scheduler.StepLR",
            ["lr_scheduler._component_=torch.optim.lr_scheduler.StepLR", "no num_training_steps", "schedules.cosine"],
        ),
        ("dataset.source=null", ["dataset.source=null", "text"]),
        ("seed=99999999999999999999", ["seed=99999999999999999999", "below 4294967296", "e.g. seed=42"]),
        ("samples.prompts=[1,2]", ["samples.prompts=[1,2]", "a list of text, numbers in quotes"]),
        (
            "checkpointer._component_=torchtune.training.DistributedCheckpointer",
            ["one of auto, torchtune.training.FullModelHFCheckpointer, torchtune.training.FullModelMetaCheckpointer"],
        ),
        ("checkpointer.checkpoint_dir=123", ["checkpointer.checkpoint_dir=123", "text", "checkpoint_dir='\"123\"'"]),
        ("lr_scheduler=cosine", ["lr_scheduler._component_=cosine", "nearest: lr_scheduler=pairtune.schedules.cosine"]),
        ("optimizer=adamw", ["optimizer._component_=adamw", "nearest: optimizer=torch.optim.AdamW"]),
        ("loss=ippo", ["loss.name=ippo: no such loss", "nearest: ipo"]),
        ("loss=cheese", ["loss.name=cheese: no such loss", "loss=torchtune.rlhf.loss.DPOLoss"]),
        ("model=llama3_8b", ["model._component_=llama3_8b", "full import path", "torchtune.models.llama3.llama3_8b"]),
        ("optimizer=torch.optim", ["optimizer._component_=torch.optim", "not a class or function"]),
        ("tokenizer.chat_template={{ x }}", ["not valid YAML", "quotes", ".jinja file"]),
    ],
)
def test_a_mistake_is_named_with_its_rule_and_a_way_out_and_so_it_is_before_anything_is_imported(
    load, check, override, words
):
    with pytest.raises(UserError) as error:
        load(override)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError) as before:
        check(override)
    assert str(before.value) == str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "model: {_component_: x}\ncheckpointer: {model_type: L}\ndataset: {source: s}",
            ["checkpoint_dir", "no default"],
        ),
        (BASE + "per_method: {dora: {seed: 1}}", ["per_method.dora", "full, lora, qlora"]),
        (BASE + "per_method: {full: {sede: 1}}", ["per_method.full", "sede", "seed"]),
        (BASE + "per_method: {qlora: {epochs: lots}}", ["per_method.qlora", "epochs=lots", "a number"]),
        (BASE + "per_method: {qlora: {lora: {rank: 0}}}", ["per_method.qlora", "lora.rank=0", "at least 1"]),
        (BASE + "per_method: [lora]", ["config.yaml", "per_method=[lora]", "full, lora, qlora"]),
        (BASE + "per_method: {lora: 5}", ["per_method.lora", "block of keys"]),
        (BASE + "1: 2", ["unknown key 1"]),
        (BASE + "a: [", ["not valid YAML"]),
        ("- 1", ["must hold keys"]),
    ],
)
def test_a_mistake_in_a_file_names_its_place(load, text, words):
    with pytest.raises(UserError) as error:
        load(text=text)
    for word in words:
        assert word in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file"):
        config.load("lora", DEFAULTS, [tmp_path / "nowhere.yaml"], [])


def test_another_methods_components_need_not_be_installed_here(load):
    load(text=BASE + "per_method: {qlora: {optimizer: {_component_: bitsandbytes.optim.PagedAdamW, lr: 1.0e-4}}}")


def test_an_argument_needs_a_component(load):
    with pytest.raises(UserError, match="there is no lr_scheduler that could take it; name one first: lr_scheduler="):
        load("lr_scheduler=null", "lr_scheduler.warmup_ratio=0.2")
    with pytest.raises(UserError, match="lr_scheduler=null: leaves out what lr_scheduler.warmup_ratio=0.2 is an arg"):
        load("lr_scheduler.warmup_ratio=0.2", "lr_scheduler=null")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optimizer.weight_decay=-1"], ["optimizer.weight_decay=-1", "Invalid weight_decay", "another value"]),
        (["optimizer.betas=[0.9,1.5]"], ["optimizer.betas=[0.9,1.5]", "Invalid beta"]),
        (["optimizer.fused=true", "optimizer.foreach=true"], ["optimizer.fused=true optimizer.foreach=true"]),
        (["optimizer=torch.optim.LBFGS", "optimizer.lr=1"], ["optimizer._component_=torch.optim.LBFGS", "closure"]),
        (["optimizer=torch.optim.SparseAdam", "optimizer.lr=1"], ["torch.optim.SparseAdam", "dense gradients"]),
        (["lr_scheduler.num_warmup_steps=10"], ["10 steps", "nearest valid: lr_scheduler.num_warmup_steps=9"]),
        (["lr_scheduler.min_ratio=1.5"], ["lr_scheduler.min_ratio=1.5", "nearest valid: lr_scheduler.min_ratio=1"]),
        (["loss=torchtune.rlhf.loss.PPOLoss"], ["loss._component_=torchtune.rlhf.loss.PPOLoss", "DPOLoss"]),
        (["loss=torch.nn.CrossEntropyLoss"], ["loss._component_=torch.nn.CrossEntropyLoss", "policy chosen"]),
        (["loss=test_config.OneNumber"], ["loss._component_=test_config.OneNumber", "it returns [2], [], [2]"]),
        (["loss=test_config.Bare"], ["loss._component_=test_config.Bare", "it returns a Tensor"]),
    ],
)
def test_a_rehearsal_tells_what_signatures_cannot(load, overrides, words):
    cfg = load(*overrides)
    with pytest.raises(UserError) as error:
        rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=10)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_rehearsal_leaves_no_trace():
    state = torch.get_rng_state()
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 0.1}
    rehearsal.rehearse(optimizer, None, {"_component_": "torchtune.rlhf.loss.DPOLoss"}, num_training_steps=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert optimizer == {"_component_": "torch.optim.AdamW", "lr": 0.1}


class OneNumber(torch.nn.Module):
    def forward(self, chosen, rejected, reference_chosen, reference_rejected):
        return chosen, chosen.mean(), rejected


class Bare(torch.nn.Module):
    def forward(self, chosen, rejected, reference_chosen, reference_rejected):
        return chosen
