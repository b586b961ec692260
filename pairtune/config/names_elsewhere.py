"""What other systems call a key, and what to set here: docs/coming_from.md prints it, answers.py answers from it.

TRL's names are fields of its DPOConfig, PEFT's of its LoraConfig; tests compare both. Others are as those systems'
documents and published configs have them.
"""

from dataclasses import dataclass, field
from typing import Any

from pairtune.config.rules import show

ALL_HF = "TRL, EasyDeL, axolotl, LLaMA-Factory"


@dataclass(frozen=True)
class Elsewhere:
    """Names that mean the same elsewhere.

    Attributes:
        words: The names.
        systems: Whose they are, with commas between.
        here: What to set, with {} for their value: `epochs={}`; or why there is nothing to set.
        when: The same for single values, as key=value writes them.
    """

    words: tuple[str, ...]
    systems: str
    here: str
    when: dict[str, str] = field(default_factory=dict)

    def says(self, value: Any) -> str:
        """Returns what to do in place of setting one of the names to this value; "" is a value that is not known."""
        written = show(value)  # YAML reads `no` as false
        text = self.when.get(written.lower()) or (self.when.get("no") if value is False else None) or self.here
        return text.replace("{}", written if value not in (None, "") else "...")


def _row(words: str, systems: str, here: str, **when: str) -> Elsewhere:
    return Elsewhere(tuple(words.split()), systems, here, when)


_LEAVE = "leave it out"
_ITSELF = f"{_LEAVE}: what the run starts from is the reference, without a second copy where adapters are trained"
_SYNCED = f"; where sync_ref_model is false, {_LEAVE}"
_FOLDER = "a folder, which `tune download ORG/NAME` makes of a Hub id"
_STEP = "pairs_per_step counts the pairs of a step over all devices: set it to batch_size x {} x devices"

ROWS = {
    "Steps and batches": (
        _row("num_train_epochs", "TRL, EasyDeL, LLaMA-Factory", "epochs={}"),
        _row("num_epochs n_epochs", "axolotl, dpo", "epochs={}"),
        _row("max_training_steps", "EasyDeL", "max_steps={}"),
        _row("max_steps_per_epoch per_epoch_training_steps", "torchtune, EasyDeL",
             "max_steps={} ends the run, not each epoch"),
        _row("n_examples", "dpo", "max_steps ends the run: set it to {} / pairs_per_step"),
        _row("per_device_train_batch_size", "TRL, LLaMA-Factory", "batch_size={}"),
        _row("per_gpu_train_batch_size per_device_batch_size micro_batch_size", "axolotl, others", "batch_size={}"),
        _row("gradient_accumulation_steps", f"{ALL_HF}, torchtune, dpo", _STEP),
        _row("total_batch_size", "EasyDeL", "pairs_per_step={}"),
        _row(
            "per_device_eval_batch_size eval_batch_size", "TRL, EasyDeL, dpo",
            f"{_LEAVE}: batch_size holds for evaluation, too",
        ),
        _row("auto_find_batch_size", "TRL", "batch_size=auto"),
        _row("data_seed shuffle_seed_train", "TRL, EasyDeL", "seed={}"),
        _row("train_sampling_strategy", "TRL", "shuffle=true", sequential="shuffle=false"),
        _row("shuffle_train_dataset", "EasyDeL", "shuffle={}"),
        _row(
            "dataloader_drop_last", "TRL", f"{_LEAVE}: the last step of an epoch holds the pairs that are left",
        ),
    ),
    "Optimizer and schedule": (
        _row("learning_rate lr", f"{ALL_HF}, dpo", "optimizer.lr={}"),
        _row("weight_decay", "TRL, EasyDeL, axolotl, LLaMA-Factory", "optimizer.weight_decay={}"),
        _row(
            "adam_beta1 adam_beta2", "TRL, axolotl", "optimizer.betas=[0.9,0.999] holds both; yours is {}",
        ),
        _row("adam_epsilon", "TRL, axolotl", "optimizer.eps={}"),
        _row(
            "optim optimizer_type", "TRL, LLaMA-Factory, others",
            "optimizer=torch.optim.AdamW, or another class by its import path",
            **dict.fromkeys(("adamw", "adamw_torch", "adamw_hf"), "optimizer=torch.optim.AdamW"),
            adamw_torch_fused="optimizer.fused=true",
            rmsprop="optimizer=torch.optim.RMSprop", sgd="optimizer=torch.optim.SGD",
            adafactor="optimizer=torch.optim.Adafactor",
            **dict.fromkeys(
                ("adamw_8bit", "adamw_bnb_8bit"), "optimizer=bitsandbytes.optim.AdamW8bit, where it is installed"
            ),
            **dict.fromkeys(
                ("paged_adamw_32bit", "paged_adamw"), "optimizer=bitsandbytes.optim.PagedAdamW, where it is installed"
            ),
            paged_adamw_8bit="optimizer=bitsandbytes.optim.PagedAdamW8bit, where it is installed",
        ),
        _row(
            "lr_scheduler_type scheduler", "TRL, EasyDeL, LLaMA-Factory",
            "lr_scheduler=pairtune.schedules.cosine, or another schedule by its import path",
            cosine="lr_scheduler=pairtune.schedules.cosine", linear="lr_scheduler=pairtune.schedules.linear",
            constant="lr_scheduler=null", constant_with_warmup="lr_scheduler.min_ratio=1.0", none="lr_scheduler=null",
        ),
        _row("lr_scheduler_kwargs", "TRL", "lr_scheduler.ARGUMENT=..., each argument of it a key"),
        _row("warmup_steps", f"{ALL_HF}, dpo", "lr_scheduler.num_warmup_steps={}"),
        _row("num_warmup_steps", "torchtune", "lr_scheduler.num_warmup_steps={}"),
        _row("warmup_ratio", "TRL (earlier), axolotl, LLaMA-Factory", "lr_scheduler.warmup_ratio={}"),
        _row("learning_rate_end", "EasyDeL", "lr_scheduler.min_ratio is the share of the rate that is left"),
        _row("optim_args extra_optimizer_kwargs", "TRL, EasyDeL", "optimizer.ARGUMENT=..., each argument of it a key"),
        _row("max_grad_norm clip_grad", f"{ALL_HF}, dpo", "clip_grad_norm={}"),
        _row("neftune_noise_alpha", "TRL, axolotl, LLaMA-Factory", f"{_LEAVE}: embeddings get no noise here"),
        _row("optimizer_in_bwd", "torchtune", f"{_LEAVE}: gradients of all pairs of a step come first"),
    ),
    "Loss": (
        _row("loss_type pref_loss", "TRL, EasyDeL, LLaMA-Factory", "loss={}", aot_pair="loss=aot_unpaired",
             kto_pair="loss=kto"),
        _row("loss_weights", "TRL", "loss=[{name: sigmoid},{name: sft,weight: 0.2}] gives each term its weight"),
        _row("beta rl_beta pref_beta dpo_beta", f"{ALL_HF}, dpo", "loss.beta={}"),
        _row("label_smoothing dpo_label_smoothing", f"{ALL_HF}, dpo", "loss.label_smoothing={}"),
        _row("rl", "axolotl", "loss={}", dpo="loss=sigmoid"),
        _row("rpo_alpha", "TRL (earlier), EasyDeL, axolotl", "loss=rpo loss.alpha={}"),
        _row("pref_ftx", "LLaMA-Factory", "loss=rpo loss.alpha={}"),
        _row("simpo_gamma", "axolotl, LLaMA-Factory", "loss=simpo; loss.gamma_beta_ratio is {} / beta"),
        _row("cpo_alpha", "axolotl", "loss=cpo"),
        _row("use_weighting dpo_use_weighting", "TRL, axolotl", "loss.wpo={}"),
        _row("ld_alpha", "TRL", "loss.ld_alpha={}"),
        _row("f_divergence_type", "TRL", "loss.f_divergence={}", js_divergence="loss.f_divergence=js",
             alpha_divergence="loss.f_divergence=alpha"),
        _row("f_alpha_divergence_coef", "TRL", "loss.f_alpha={}"),
        _row("discopop_tau", "TRL", "loss=discopop loss.tau={}"),
    ),
    "Reference": (
        _row("ref_model ref_model_name_or_path", "LLaMA-Factory, TRL (earlier)",
             "reference=model reference.checkpoint_dir={}", null=_ITSELF),
        _row("reference_model reference_model_repo_id refrence_model_repo_id", "EasyDeL",
             f"reference=model reference.checkpoint_dir={{}}, {_FOLDER}; where it is the model itself, {_LEAVE}",
             null=_ITSELF),
        _row("sync_ref_model", "TRL, EasyDeL", "reference=sync", false=f"{_LEAVE}: reference=sync alone moves it"),
        _row("ref_model_mixup_alpha", "TRL, EasyDeL", f"reference=sync reference.alpha={{}}{_SYNCED}"),
        _row("ref_model_sync_steps", "TRL, EasyDeL", f"reference=sync reference.every_n_steps={{}}{_SYNCED}"),
        _row("precompute_ref_log_probs", "TRL, EasyDeL, axolotl", "reference=cached",
             false=f"{_LEAVE}: reference=cached alone computes it once"),
        _row("precompute_ref_batch_size", "TRL", f"{_LEAVE}: batch_size holds for the reference, too"),
        _row("reference_free", "TRL (earlier), EasyDeL, dpo", "reference=none",
             false=f"{_LEAVE}: reference=none alone does without"),
        _row("force_use_ref_model", "TRL (earlier)", "reference=model reference.checkpoint_dir=FOLDER"),
        _row("reference_dtype", "dpo", "reference=model reference.dtype=bf16",
             float32="reference=model reference.dtype=fp32"),
        _row("ref_adapter_name model_adapter_name", "TRL (earlier)", "reference=start"),
        _row("ref_checkpointer", "torchtune", "reference=model reference.checkpoint_dir=FOLDER"),
    ),
    "Adapters": (
        _row("lora_r lora_rank r", "PEFT, TRL scripts, axolotl, LLaMA-Factory, torchtune", "lora.rank={}"),
        _row("lora_alpha", "PEFT, TRL scripts, axolotl, LLaMA-Factory, torchtune", "lora.alpha={}"),
        _row("lora_dropout", "PEFT, TRL scripts, axolotl, LLaMA-Factory, torchtune", "lora.dropout={}"),
        _row("target_modules", "PEFT", "lora.modules={}"),
        _row("lora_target_modules lora_target lora_attn_modules", "TRL scripts, axolotl, LLaMA-Factory, torchtune",
             "lora.modules={}", all="lora.modules=all-linear"),
        _row("lora_target_linear", "axolotl", "lora.modules=all-linear"),
        _row("apply_lora_to_mlp", "torchtune", "lora.modules takes mlp, too: [q_proj,v_proj,mlp]"),
        _row("apply_lora_to_output", "torchtune", "lora.modules takes output, too: [q_proj,v_proj,output]"),
        _row("use_rslora", "PEFT, TRL scripts, LLaMA-Factory", "lora.use_rslora={}"),
        _row("use_dora", "PEFT, TRL scripts, LLaMA-Factory, torchtune", "lora.use_dora={}"),
        _row("peft_use_dora", "axolotl", "lora.use_dora={}"),
        _row("peft_use_rslora", "axolotl", "lora.use_rslora={}"),
        _row("bias", "PEFT", f"{_LEAVE}: biases are not trained with adapters"),
        _row("modules_to_save", "PEFT",
             f"{_LEAVE}: adapters alone are trained; lora.modules takes output, and full_ recipes train all"),
        _row("lora_modules_to_save", "TRL scripts, axolotl",
             f"{_LEAVE}: adapters alone are trained; lora.modules takes output, and full_ recipes train all"),
        _row("init_lora_weights", "PEFT", f"{_LEAVE}: A is drawn, B is zero, as in LoRA's paper"),
        _row("exclude_modules layers_to_transform layers_pattern rank_pattern alpha_pattern", "PEFT",
             f"{_LEAVE}: lora.modules says which, in all layers alike"),
        _row("task_type peft_type inference_mode fan_in_fan_out base_model_name_or_path", "PEFT",
             f"{_LEAVE}: it follows from the model"),
        _row("use_peft", "TRL scripts", "run a lora_ recipe", false="run a full_ recipe"),
        _row("finetuning_type", "LLaMA-Factory", "run a lora_ recipe", full="run a full_ recipe"),
        _row("load_in_4bit", "TRL scripts, axolotl", "run a qlora_ recipe",
             false=f"{_LEAVE}: qlora_ recipes alone hold the base in 4 bits"),
        _row("quantization_bit", "LLaMA-Factory", "run a qlora_ recipe: 4 bits, NF4, unless its base_dtype is int8"),
        _row("load_in_8bit", "TRL scripts, axolotl", "run a qlora_ recipe, whose base_dtype can be int8",
             false=f"{_LEAVE}: qlora_ recipes alone hold the base in fewer bits"),
        _row("bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_use_double_quant bnb_4bit_quant_storage", "TRL scripts",
             f"{_LEAVE}: qlora_ recipes use NF4 with doubly quantized scales"),
        _row("adapter_name_or_path lora_model_dir", "LLaMA-Factory, axolotl", "adapter={}"),
    ),
    "Model": (
        _row("model_name_or_path", "TRL scripts, handbook, LLaMA-Factory",
             f"checkpointer.checkpoint_dir={{}}, {_FOLDER}"),
        _row("base_model repo_id", "axolotl, EasyDeL", f"checkpointer.checkpoint_dir={{}}, {_FOLDER}"),
        _row("checkpoint_dir", "torchtune", "checkpointer.checkpoint_dir={}"),
        _row("model_revision revision", "TRL scripts, PEFT, handbook",
             "`tune download --revision {}` fetches that commit of a model; dataset.revision={} is a data set's"),
        _row("model_init_kwargs", "TRL", f"{_LEAVE}: `model` is a builder with its arguments"),
        _row("tokenizer_name_or_path tokenizer_path", "TRL (earlier), others", "tokenizer.path={}"),
        _row("processor_repo_id processing_class", "EasyDeL",
             f"tokenizer.path={{}}, {_FOLDER}; where it is the model's own, {_LEAVE}"),
        _row("chat_template template", "TRL (earlier), axolotl, LLaMA-Factory", "tokenizer.chat_template={}"),
        _row("pad_token pad_token_id pad_to_multiple_of padding_value padding_side label_pad_token_id", "TRL, EasyDeL",
             f"{_LEAVE}: nothing is padded"),
        _row("is_encoder_decoder", "EasyDeL", f"{_LEAVE}: models are decoders"),
        _row("bf16 pure_bf16", ALL_HF, "dtype=bf16", false="dtype=fp32"),
        _row("fp16", "TRL, axolotl, LLaMA-Factory", "dtype=bf16; float16 is not there",
             false=f"{_LEAVE}: dtype is bf16 or fp32"),
        _row("fp8", "axolotl", "enable_fp8_training={} in full_ recipes"),
        _row("fp8_recipe_name", "torchtune", f"{_LEAVE}: enable_fp8_training=true takes torchao's rowwise_with_gw_hp"),
        _row("torch_dtype policy_dtype param_dtype attn_dtype bnb_4bit_compute_dtype",
             "TRL scripts (earlier), handbook, dpo, EasyDeL", "dtype=bf16", float32="dtype=fp32", fp32="dtype=fp32"),
        _row("attn_softmax_dtype", "EasyDeL", f"{_LEAVE}: a softmax is float32"),
        _row("tf32", "TRL", f"{_LEAVE}: dtype=bf16 is faster, and float32 products are float32's"),
        _row("attn_implementation attn_mechanism flash_attention flash_attn",
             "TRL scripts, EasyDeL, handbook, axolotl, LLaMA-Factory", "attention=auto"),
        _row("torch_compile", "TRL, axolotl", "compile={}"),
        _row("gradient_checkpointing", "TRL, axolotl, LLaMA-Factory", "enable_activation_checkpointing={}"),
        _row("gradient_checkpointing_kwargs", "TRL", f"{_LEAVE}: layers are computed again without reentry"),
        _row("activation_checkpointing", "TRL, dpo", "enable_activation_checkpointing={}"),
        _row("activation_offloading", "TRL, axolotl", "enable_activation_offloading={}"),
        _row("tiled_mlp", "axolotl",
             f"{_LEAVE}: with enable_activation_checkpointing=true and compile=false long rows take it in pieces"),
        _row("use_liger_kernel logprob_vocab_chunk_size", "TRL, EasyDeL, LLaMA-Factory",
             f"{_LEAVE}: logits are made for scored tokens alone, in parts"),
        _row("use_cache", "TRL, LLaMA-Factory", f"{_LEAVE}: training caches no keys"),
        _row("fsdp fsdp_config sharding_axis sharding_axis_dims auto_shard_states", "TRL, EasyDeL, axolotl",
             "run a distributed recipe: it shards with FSDP2"),
        _row("device_map", "others", f"{_LEAVE}: device=auto is a GPU where there is one; distributed recipes shard"),
        _row("deepspeed", "TRL, axolotl, LLaMA-Factory",
             "run a distributed recipe: FSDP2 does as ZeRO-3; fsdp_cpu_offload=true as its offload"),
        _row("ddp_timeout", "TRL, LLaMA-Factory", "collective_timeout_s={}"),
        _row("use_cpu", "TRL", "device=cpu", false="device=auto"),
        _row("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend", "TRL",
             f"{_LEAVE}: models are sharded with FSDP2"),
    ),
    "Pairs": (
        _row("dataset_name dataset_path data_path train_dataset", "TRL scripts, EasyDeL, others", "dataset.source={}"),
        _row("dataset_config dataset_configs", "TRL scripts, handbook", "dataset.name={}"),
        _row("dataset_split dataset_train_split dataset_splits", "TRL scripts, EasyDeL, handbook", "dataset.split={}"),
        _row("dataset_test_split", "TRL scripts", "eval_dataset.split={}"),
        _row("train_file dataset_file", "others", "dataset.source={}"),
        _row("eval_file validation_file", "others", "eval_dataset.source={}"),
        _row("datasets dataset_mixer dataset_mixture", "axolotl, handbook, dpo",
             "dataset.source takes a list: [FIRST, {source: SECOND, weight: 0.5}]"),
        _row("test_datasets", "axolotl", "eval_dataset.source takes a list, or names: {math: FILE, code: FILE}"),
        _row("dataset_streaming", "TRL scripts", f"{_LEAVE}: all pairs are tokenized before the first step"),
        _row("max_samples max_train_samples", "LLaMA-Factory, others", "dataset.limit={}"),
        _row("max_eval_samples n_eval_examples", "dpo, others", "eval_dataset.limit={}"),
        _row("val_set_size val_size", "axolotl, LLaMA-Factory", "dataset.val_fraction={}"),
        _row("max_seq_len max_seq_length max_sequence_length sequence_len cutoff_len model_max_length",
             "torchtune, EasyDeL, axolotl, LLaMA-Factory, handbook", "max_length={}"),
        _row("max_prompt_len", "axolotl", "max_prompt_length={}"),
        _row("max_target_length max_answer_length", "TRL (earlier)", "max_completion_length={}"),
        _row("truncation_mode", "TRL, EasyDeL",
             "dataset.overlong=drop or trim_prompt (from the left); answers are never cut",
             keep_end="dataset.overlong=trim_prompt"),
        _row("dataset_num_proc preprocessing_num_workers dataset_processes", ALL_HF,
             f"{_LEAVE}: pairs are tokenized once, in one process"),
        _row("dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers",
             "TRL, axolotl, LLaMA-Factory", f"{_LEAVE}: all pairs are in memory before the first step"),
        _row("remove_unused_columns", "TRL", f"{_LEAVE}: other columns are passed over"),
        _row("padding_free packing sample_packing", "TRL, axolotl, LLaMA-Factory",
             f"{_LEAVE}: the pairs of a batch lie in one row, without padding, unless attention=mask"),
    ),
    "What is kept and told": (
        _row("output_dir_path save_directory local_run_dir", "EasyDeL, dpo", "output_dir={}"),
        _row("overwrite_output_dir", "LLaMA-Factory", f"{_LEAVE}: an earlier run in output_dir is moved aside"),
        _row("model_name trainer_prefix", "EasyDeL",
             "output_dir=runs/{}: a run is called by its folder; the model's is checkpointer.checkpoint_dir"),
        _row("run_name exp_name wandb_name", "TRL, EasyDeL, axolotl, dpo", "metric_logger=wandb metric_logger.name={}"),
        _row("use_wandb wandb", "EasyDeL, dpo", "metric_logger=wandb", false="metric_logger=none"),
        _row("wandb_project project", "TRL, axolotl", "metric_logger=wandb metric_logger.project={}"),
        _row("wandb_entity", "axolotl, EasyDeL", "metric_logger=wandb metric_logger.entity={}"),
        _row("report_to", "TRL, LLaMA-Factory", "metric_logger={}", all="metric_logger=wandb or another; one at a time",
             comet_ml="metric_logger=comet", **{"[]": "metric_logger=none"}),
        _row("logging_steps log_steps report_steps", ALL_HF, "log_every_n_steps={}"),
        _row("logging_dir", "TRL (earlier), LLaMA-Factory", "metric_logger=tensorboard metric_logger.log_dir={}"),
        _row("logging_strategy", "TRL", "log_every_n_steps=1"),
        _row("log_level disable_tqdm progress_bar_type verbose", "TRL, EasyDeL",
             f"{_LEAVE}: bars on a terminal, plain lines elsewhere"),
        _row("logging_first_step", "TRL", f"{_LEAVE}: the first step is always logged"),
        _row("eval_strategy evaluation_strategy", "TRL, LLaMA-Factory", "eval_every_n_steps=...",
             epoch="eval_every_n_epochs=1", no="eval_dataset=null", steps="eval_every_n_steps=..."),
        _row("eval_steps eval_every evaluation_steps", "TRL, EasyDeL, LLaMA-Factory, dpo", "eval_every_n_steps={}"),
        _row("evals_per_epoch", "axolotl", "eval_every_n_epochs is 1 / {}"),
        _row("eval_on_start do_first_eval", "TRL, dpo",
             f"{_LEAVE}: held-out pairs are looked at before the first step, too"),
        _row("do_eval", "TRL, EasyDeL, LLaMA-Factory", "eval_dataset=FILE evaluates", false="eval_dataset=null"),
        _row("do_train do_predict", "TRL, LLaMA-Factory", f"{_LEAVE}: a run trains"),
        _row("save_steps", "TRL, EasyDeL, axolotl, LLaMA-Factory", "save_every_n_steps={}"),
        _row("save_strategy", "TRL", "save_every_n_steps=...", no="save_every_n_steps=null",
             epoch="save_every_n_steps=..., as many as an epoch has", best="keep_best=loss"),
        _row("saves_per_epoch", "axolotl", "save_every_n_steps=..., the steps of an epoch / {}"),
        _row("save_total_limit max_checkpoints_to_keep", ALL_HF, "keep_last_n={}"),
        _row("do_last_save", "EasyDeL", f"{_LEAVE}: the last step's weights are always exported",
             false="keep_last_n=0 writes no checkpoint; the last step's weights are always exported"),
        _row("save_only_model save_adapter_weights_only", "TRL, torchtune",
             f"{_LEAVE}: merged weights and adapter are exported beside the checkpoints; keep_last_n=0 writes none"),
        _row("load_best_model_at_end", "TRL, axolotl", "keep_best=loss export_best={}"),
        _row("metric_for_best_model", "TRL, axolotl", "keep_best={}", eval_loss="keep_best=loss",
             **{"eval_rewards/accuracies": "keep_best=rewards/accuracies",
                "eval_rewards/margins": "keep_best=rewards/margins"}),
        _row("early_stopping_patience early_stopping_steps", "axolotl, LLaMA-Factory", "early_stop={}"),
        _row("greater_is_better", "TRL", f"{_LEAVE}: keep_best knows it of its metric"),
        _row("resume_from_checkpoint", "TRL, axolotl, LLaMA-Factory, torchtune", "resume={}"),
        _row("auto_resume_from_checkpoints resume_if_possible", "axolotl, EasyDeL", "resume=auto",
             false="resume=false"),
        _row("push_to_hub hub_model_id hub_strategy hub_private_repo hub_always_push hub_revision", "TRL, axolotl",
             "`hf upload REPO_ID RUN_FOLDER/export` pushes an export"),
        _row("sample_during_eval n_eval_model_samples generate_during_eval", "dpo, TRL (earlier)",
             "samples.num_prompts={}, answered before and after", true="samples.num_prompts=3",
             false="samples.num_prompts=0"),
        _row("max_new_tokens", "others", "samples.max_new_tokens={}, of answers before and after"),
        _row("temperature", "others", "samples.temperature={}, of answers before and after"),
        _row("do_sample top_k top_p", "others",
             "samples.temperature above 0 draws answers; `tune generate --top-k` and `--top-p` say among which tokens"),
        _row("log_peak_memory_stats track_memory", "torchtune, EasyDeL", f"{_LEAVE}: peak memory is always logged"),
        _row("plot_loss", "LLaMA-Factory", f"{_LEAVE}: curves.png is always drawn"),
    ),
}  # fmt: skip
