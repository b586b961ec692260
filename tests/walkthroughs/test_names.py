"""What the scripts of the texts call a setting, with the values that they give it, is answered with what works here."""

import pytest
from helpers import ROOT

from pairtune import config
from pairtune.cli.commands import main
from pairtune.cli.recipe import read_recipe

LLAMA_3, LEAVE = "meta-llama/Llama-3.1-8B-Instruct", "leave it out"
TEXTS = {
    "EasyDeL": {
        ("repo_id", LLAMA_3): f"checkpointer.checkpoint_dir={LLAMA_3}",
        ("model_name", "dpo_example"): "output_dir=runs/dpo_example",
        ("dataset_name", "trl-lib/ultrafeedback_binarized"): "dataset.source=trl-lib/ultrafeedback_binarized",
        ("dataset_split", "train[:90%]"): "dataset.split=train[:90%]",
        ("refrence_model_repo_id", LLAMA_3): f"reference=model reference.checkpoint_dir={LLAMA_3}",
        ("reference_model", LLAMA_3): f"reference=model reference.checkpoint_dir={LLAMA_3}",
        ("processing_class", LLAMA_3): f"tokenizer.path={LLAMA_3}",
        ("attn_mechanism", "vanilla"): "attention=auto",
        ("beta", "0.08"): "loss.beta=0.08",
        ("loss_type", "sigmoid"): "loss=sigmoid",
        ("loss_type", "hinge"): "loss=hinge",
        ("loss_type", "ipo"): "loss=ipo",
        ("loss_type", "exo_pair"): "loss=exo_pair",
        ("loss_type", "nca_pair"): "loss=nca_pair",
        ("loss_type", "robust"): "loss=robust",
        ("loss_type", "bco_pair"): "loss=bco_pair",
        ("loss_type", "sppo_hard"): "loss=sppo_hard",
        ("loss_type", "aot"): "loss=aot",
        ("loss_type", "aot_pair"): "loss=aot_unpaired",
        ("loss_type", "apo_zero"): "loss=apo_zero",
        ("loss_type", "apo_down"): "loss=apo_down",
        ("label_smoothing", "0.0"): "loss.label_smoothing=0.0",
        ("max_length", "2048"): "max_length=2048",
        ("max_prompt_length", "256"): "max_prompt_length=256",
        ("max_completion_length", "256"): "max_completion_length=256",
        ("reference_free", "true"): "reference=none",
        ("reference_free", "false"): LEAVE,
        ("sync_ref_model", "true"): "reference=sync",
        ("sync_ref_model", "false"): LEAVE,
        ("ref_model_sync_steps", "64"): "reference=sync reference.every_n_steps=64",
        ("ref_model_mixup_alpha", "0.9"): "reference=sync reference.alpha=0.9",
        ("disable_dropout", "true"): "disable_dropout=true",
        ("total_batch_size", "16"): "pairs_per_step=16",
        ("gradient_accumulation_steps", "1"): "batch_size x 1 x devices",
        ("learning_rate", "1e-6"): "optimizer.lr=1e-06",
        ("log_steps", "50"): "log_every_n_steps=50",
        ("num_train_epochs", "3"): "epochs=3",
        ("do_last_save", None): LEAVE,
        ("save_steps", "1000"): "save_every_n_steps=1000",
        ("save_directory", "dpo_checkpoints"): "output_dir=dpo_checkpoints",
        ("use_wandb", None): "metric_logger=wandb",
        ("sharding_axis", "1,-1,1,1"): "run a distributed recipe",
    },
    "TRL script": {
        ("model_name_or_path", "mistralai/Mistral-7B-Instruct-v0.2"): (
            "checkpointer.checkpoint_dir=mistralai/Mistral-7B-Instruct-v0.2"
        ),
        ("torch_dtype", "bfloat16"): "dtype=bf16",
        ("attn_implementation", "flash_attention_2"): "attention=auto",
        ("use_peft", "true"): "run a lora_ recipe",
        ("lora_r", "64"): "lora.rank=64",
        ("lora_alpha", "128"): "lora.alpha=128",
        ("lora_dropout", "0.05"): "lora.dropout=0.05",
        ("lora_target_modules", "[q_proj,v_proj]"): "lora.modules=[q_proj,v_proj]",
        ("load_in_4bit", "true"): "run a qlora_ recipe",
        ("load_in_8bit", "false"): LEAVE,
        ("bnb_4bit_quant_type", "nf4"): LEAVE,
        ("bnb_4bit_compute_dtype", "bfloat16"): "dtype=bf16",
        ("bnb_4bit_use_double_quant", "true"): LEAVE,
        ("use_bnb_nested_quant", "true"): LEAVE,
        ("bf16", "true"): "dtype=bf16",
        ("tf32", "true"): LEAVE,
        ("evaluation_strategy", "steps"): "eval_every_n_steps=...",
        ("eval_steps", "100"): "eval_every_n_steps=100",
        ("gradient_checkpointing", "true"): "enable_activation_checkpointing=true",
        ("gradient_checkpointing_kwargs", "{use_reentrant: false}"): LEAVE,
        ("log_level", "info"): LEAVE,
        ("logging_steps", "50"): "log_every_n_steps=50",
        ("lr_scheduler_type", "cosine"): "lr_scheduler=pairtune.schedules.cosine",
        ("optim", "adamw_torch"): "optimizer=torch.optim.AdamW",
        ("do_eval", "true"): "eval_dataset=FILE",
        ("per_device_train_batch_size", "1"): "batch_size=1",
        ("per_device_eval_batch_size", "1"): LEAVE,
        ("save_total_limit", "1"): "keep_last_n=1",
        ("warmup_ratio", "0.1"): "lr_scheduler.warmup_ratio=0.1",
        ("report_to", "tensorboard"): "metric_logger=tensorboard",
        ("device_map", "auto"): LEAVE,
        ("use_cache", "false"): LEAVE,
        ("deepspeed", "zero2.json"): "run a distributed recipe",
    },
    "GPT-2 notebook": {
        ("r", "4"): "lora.rank=4",
        ("target_modules", "[q_proj,v_proj]"): "lora.modules=[q_proj,v_proj]",
        ("task_type", "CAUSAL_LM"): LEAVE,
        ("bias", "none"): LEAVE,
        ("ref_model", "null"): LEAVE,
        ("remove_unused_columns", "false"): LEAVE,
        ("evaluation_strategy", "epoch"): "eval_every_n_epochs=1",
        ("warmup_steps", "2"): "lr_scheduler.num_warmup_steps=2",
        ("fp16", "false"): LEAVE,
        ("report_to", "none"): "metric_logger=none",
        ("padding_side", "right"): LEAVE,
        ("pad_token_id", "50256"): LEAVE,
        ("max_new_tokens", "25"): "samples.max_new_tokens=25",
        ("temperature", "0.1"): "samples.temperature=0.1",
        ("top_k", "1"): "tune generate --top-k",
    },
    "Reviewer #2": {
        ("optimizer_type", "paged_adamw_32bit"): "optimizer=bitsandbytes.optim.PagedAdamW",
        ("optim", "paged_adamw_32bit"): "optimizer=bitsandbytes.optim.PagedAdamW",
        ("lora_r", "8"): "lora.rank=8",
    },
}
CASES = [(text, *name, here) for text, names in TEXTS.items() for name, here in names.items()]
WITH = {
    "loss.label_smoothing": ["loss=robust"],
    "eval_every_n": ["dataset.val_fraction=0.1"],
    "optimizer=": ["optimizer.lr=1e-4"],
}


@pytest.mark.parametrize(("text", "name", "value", "here"), CASES, ids=[f"{t}: {n}={v}" for t, n, v, _ in CASES])
def test_a_name_that_a_text_gives_is_answered_with_what_works(capsys, text, name, value, here):
    if not here.startswith(f"{name}="):  # which is so called here, too
        assert main(["run", "lora_dpo_single_device", "--config", "mistral_7b_v0_1", f"{name}={value or 'true'}"]) == 2
        said = capsys.readouterr().err
        assert here in said and said.count("\n") == 1
    if "=" in here and not {"...", "FILE"} & {*here.split("=")} and "bitsandbytes" not in here:
        needed = [word for key, words in WITH.items() if here.startswith(key) for word in words]
        path = ROOT / "configs" / "mistral_7b_v0_1.yaml"
        config.check(*read_recipe("lora_dpo_single_device"), [path], [*needed, *here.split()])


@pytest.mark.parametrize("text", TEXTS)
def test_a_whole_command_line_of_another_system_is_answered_at_once(capsys, text):
    names = {name: (value, here) for (name, value), here in TEXTS[text].items()}
    words = [word for name, (value, _) in names.items() for word in (f"--{name}", value) if word]
    assert main(["run", "lora_dpo_single_device", "--config", "mistral_7b_v0_1", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and [name for name in names if f"--{name}: " not in said] == []
    assert [here for _, here in names.values() if here not in said] == []
    words = [f"{name}={value or 'true'}" for name, (value, here) in names.items() if not here.startswith(f"{name}=")]
    assert main(["run", "lora_dpo_single_device", "--config", "mistral_7b_v0_1", *words]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and [word for word in words if word.partition("=")[0] not in said] == []
    assert [here for name, (_, here) in names.items() if not here.startswith(f"{name}=") and here not in said] == []
