"""What other systems call a key is answered with ours, and what the answer sets is right."""

import dataclasses
import re
import shlex

import pytest

from pairtune import config
from pairtune.cli import main
from pairtune.cli.find import own
from pairtune.cli.recipe import read_recipe
from pairtune.config.answers import answer
from pairtune.config.names_elsewhere import ROWS
from pairtune.errors import UserError

RECIPES = {name: read_recipe(name) for name in own("recipe")}
WORDS = [(word, row) for rows in ROWS.values() for row in rows for word in row.words]
VALUES = {  # such as people give; 2 for others
    **dict.fromkeys(("learning_rate", "lr", "lora_dropout", "label_smoothing", "weight_decay", "warmup_ratio"), 0.25),
    **dict.fromkeys(("dpo_label_smoothing", "ref_model_mixup_alpha", "val_size", "val_set_size", "ld_alpha"), 0.25),
    **dict.fromkeys(("loss_type", "pref_loss", "rl"), "ipo"), "metric_for_best_model": "loss", "report_to": "wandb",
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target", "lora_attn_modules"), "q_proj"),
    **dict.fromkeys(("base_model", "repo_id", "model_name_or_path", "checkpoint_dir", "ref_model"), "/weights"),
    **dict.fromkeys(("reference_model", "reference_model_repo_id", "refrence_model_repo_id"), "/weights"),
    **dict.fromkeys(("processor_repo_id", "processing_class"), "/weights"), "train_dataset": "/here",
    **dict.fromkeys(("model_name", "trainer_prefix"), "dpo_example"), "max_sequence_length": 2048,
    "resume_if_possible": True,
    **dict.fromkeys(("ref_model_name_or_path", "tokenizer_path", "tokenizer_name_or_path", "logging_dir"), "/weights"),
    **dict.fromkeys(("adapter_name_or_path", "lora_model_dir", "dataset_name", "dataset_path", "data_path"), "/here"),
    **dict.fromkeys(("train_file", "dataset_file", "eval_file", "validation_file", "save_directory"), "a.jsonl"),
    **dict.fromkeys(("output_dir_path", "local_run_dir", "run_name", "exp_name", "wandb_name", "project"), "run"),
    **dict.fromkeys(("wandb_project", "wandb_entity", "revision", "model_revision", "dataset_config"), "main"),
    **dict.fromkeys(("dataset_configs", "chat_template", "template"), "x"), "f_divergence_type": "forward_kl",
    **dict.fromkeys(("dataset_split", "dataset_splits", "dataset_train_split", "dataset_test_split"), "test"),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing", "torch_compile", "use_dora"), True),
    "activation_offloading": True,
    **dict.fromkeys(("use_rslora", "peft_use_dora", "peft_use_rslora", "shuffle_train_dataset"), True),
    **dict.fromkeys(("use_weighting", "dpo_use_weighting", "load_best_model_at_end", "sync_ref_model"), True),
    **dict.fromkeys(("max_seq_len", "max_seq_length", "sequence_len", "cutoff_len", "model_max_length"), 2048),
    "resume_from_checkpoint": True, "total_batch_size": 64,
}  # fmt: skip
BASE = """
model: {_component_: torchtune.models.llama3.llama3_8b}
checkpointer: {checkpoint_dir: /weights, model_type: LLAMA3}
dataset: {source: pairs.jsonl}
"""
WITH = {  # what the answer's keys need besides
    "loss.ld_alpha": "loss=sigmoid", "loss.wpo": "loss=sigmoid", "loss.f_divergence": "loss=sigmoid",
    "loss.f_alpha": "loss=sigmoid loss.f_divergence=alpha", "keep_best": "dataset.val_fraction=0.5",
    "eval_every_n_steps": "dataset.val_fraction=0.5", "eval_every_n_epochs": "dataset.val_fraction=0.5",
    "lr_scheduler.num_warmup_steps": "~lr_scheduler.warmup_ratio", "eval_dataset.split": "eval_dataset=a",
    "early_stop": "dataset.val_fraction=0.5 eval_every_n_steps=5",
    "optimizer": "optimizer.lr=1", "reference.dtype": "reference.checkpoint_dir=/x",
}  # fmt: skip


@pytest.fixture
def check(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(BASE)

    def check(*overrides, recipe="lora_dpo_distributed"):
        return config.check(*RECIPES[recipe], [path], list(overrides))

    return check


@pytest.mark.parametrize(("word", "row"), WORDS, ids=[word for word, _ in WORDS])
def test_a_name_is_refused_with_what_to_set_and_that_is_right(check, word, row):
    values = [VALUES.get(word, 2), *row.when]
    for value in values:
        with pytest.raises(UserError, match=f"unknown key {word}") as error:
            check(f"{word}={str(value).lower() if isinstance(value, bool) else value}")
        text = row.says(value)
        assert text in str(error.value) and "\n" not in str(error.value)
        settings = [w.rstrip(",;:") for w in re.split(r" (?![^\[]*\])", text) if re.match(r"[a-z_.]+=[^ ]", w)]
        if not settings or any("..." in w or "FILE" in w or "FOLDER" in w for w in settings):
            assert re.search(r"leave it out|run a |`|[a-z_]{4}", text)  # why, or how
            continue
        needed = [w for s in settings for w in shlex.split(WITH.get(s.partition("=")[0], ""))]
        if "bitsandbytes" not in text:
            check(*needed, *settings)


def test_a_name_has_one_row_and_is_no_key_of_ours():
    words = [word for word, _ in WORDS]
    assert sorted(set(words)) == sorted(words)
    ours = {key for _, defaults in RECIPES.values() for key in defaults}
    assert ours & set(words) == set()


def test_names_said_to_be_trls_and_pefts_are_fields_there():
    peft, trl = pytest.importorskip("peft"), pytest.importorskip("trl")
    fields = {
        "TRL": {field.name for field in dataclasses.fields(trl.DPOConfig)},
        "PEFT": {field.name for field in dataclasses.fields(peft.LoraConfig)},
        "TRL scripts": {f.name for c in (trl.ModelConfig, trl.ScriptArguments) for f in dataclasses.fields(c)},
    }
    for system, names in fields.items():
        theirs = [row for _, row in WORDS if system in row.systems.split(", ")]
        strangers = [row.words for row in theirs if not names & {*row.words}]
        assert strangers == [], system
    known = {word for word, _ in WORDS} | {key for _, defaults in RECIPES.values() for key in defaults}
    about_dpo = fields["TRL"] - {f.name for f in dataclasses.fields(trl.DPOConfig.__mro__[2])} - known
    assert about_dpo <= {"trust_" + "remote_code"}  # refused as a secret is: no code comes from the Hub


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "training.learning_rate=1e-4",
            "training.learning_rate: here it is called optimizer.lr: set optimizer.lr=0.0001",
        ),
        ("peft_config.r=16", "peft_config.r: here it is called lora.rank: set lora.rank=16"),
        (
            "peft_config={r: 16, lora_alpha: 32}",
            "peft_config.lora_alpha: here it is called lora.alpha: set lora.alpha=32",
        ),
        ("lora.r=16", "unknown key lora.r; here it is called lora.rank: set lora.rank=16"),
        ("Learning-Rate=1", "here it is called optimizer.lr: set optimizer.lr=1"),
        ("optimizer.learning_rate=1", "optimizer.learning_rate: AdamW has no such argument.*set optimizer.lr=1"),
    ],
)
def test_a_name_is_found_by_its_last_part(check, given, said):
    with pytest.raises(UserError, match=re.escape(said).replace(r"\.\*", ".*")):
        check(given)


def test_a_file_of_another_system_is_answered_at_once(tmp_path):
    (tmp_path / "trl.yaml").write_text("num_train_epochs: 3\nbeta: 0.5\nload_in_4bit: true\nnonsense: 1\n")
    with pytest.raises(UserError) as error:
        config.check(*RECIPES["lora_dpo_single_device"], [tmp_path / "trl.yaml"], [])
    for words in ("set epochs=3", "set loss.beta=0.5", "load_in_4bit: here run a qlora_ recipe", "too, nonsense"):
        assert words in str(error.value)
    assert answer("nonsense", 1) == ""


@pytest.mark.parametrize(
    ("words", "set_here"),
    [
        (["--learning_rate", "1e-4"], "optimizer.lr: set optimizer.lr=0.0001"),
        (["--learning-rate=1e-4"], "optimizer.lr: set optimizer.lr=0.0001"),
        (["-lr", "1e-4"], "optimizer.lr: set optimizer.lr=0.0001"),
        (["--lora_target_modules", "all"], "lora.modules: set lora.modules=all-linear"),
        (["--per_device_train_batch_size", "2", "seed=1"], "batch_size: set batch_size=2"),
        (["--load_in_4bit", "--bf16"], "run a qlora_ recipe; --bf16: here it is called dtype: set dtype=bf16"),
        (["--bf16", "seed=1"], "dtype: set dtype=bf16"),
        (["--max_length", "512"], "set max_length=512"),
        (["--optimizer.lr=1e-4"], "set optimizer.lr=1e-4"),
        (["--optimizer", "adamw"], "set optimizer=torch.optim.AdamW"),
        (["--optimizer=adafactor"], "set optimizer=torch.optim.Adafactor"),
        (["--lr_scheduler", "cosine"], "set lr_scheduler=pairtune.schedules.cosine"),
    ],
)
def test_a_name_with_dashes_gets_the_answer_that_it_has_without(capsys, tmp_path, words, set_here):
    """Behind the recipe, before it, for the commands that look ahead, and for a recipe that Python runs."""
    (tmp_path / "c.yaml").write_text(BASE)
    config_path, option = str(tmp_path / "c.yaml"), words[0].partition("=")[0]
    for command in (
        ["run", "lora_dpo_single_device", "--config", config_path, *words],
        ["run", *words, "lora_dpo_distributed", "--config", config_path],
        ["validate", config_path, *words],
        ["plan", *words, config_path],
    ):
        assert main(command) == 2
        assert f"{option}: a key is set without dashes, as key=value; " in (said := capsys.readouterr().err)
        assert said.endswith(f"{set_here}\n") and said.count("\n") == 1
    with pytest.raises(UserError, match=f"{option}: a key is set without dashes"):
        config.parse(*RECIPES["lora_dpo_single_device"], ["--config", config_path, *words])
