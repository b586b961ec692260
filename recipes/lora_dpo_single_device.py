"""LoRA DPO on one device.

    tune run recipes/lora_dpo_single_device --config configs/reviewer2.yaml lora.rank=4

The reference policy is this model with its adapters switched off: no second copy is held.
Copy this file and edit it: all that a run does is below, in order.
"""

import json
import math
import time
from pathlib import Path

import torch
from torchtune.modules.peft import disable_adapter
from tqdm import tqdm

from pairtune import checkpoint, config, data, dist, generation, metrics, models
from pairtune.attention import dense_mask
from pairtune.batch import lay_out
from pairtune.errors import UserError
from pairtune.loader import Steps, micro_batches
from pairtune.logps import answer_logps
from pairtune.tokenizer import adapt

METHOD = "lora"  # picks per_method.lora out of a config

# Every key, its default and what it costs. This is the schema: a key that is not here is an error.
DEFAULTS = {
    # The run
    "output_dir": "runs/lora_dpo",  # the run folder: config, metrics, curves, samples, exported weights
    "seed": 42,  # order of the pairs, fresh adapters, sampled answers
    "device": "auto",  # auto (a GPU where there is one), cpu, cuda, cuda:N
    "dtype": "bf16",  # bf16 or fp32 (twice the memory); log-probabilities and losses are float32 either way
    "compile": False,  # torch.compile a layer: faster steps, a minute or more before the first
    "attention": "auto",  # segments (a call a document), mask (dense), auto: segments where the model can
    "enable_activation_checkpointing": False,  # less memory for about a third more time
    # The model
    "model": {"_component_": config.REQUIRED},  # a torchtune builder, the base one: adapters are added here
    "lora": {
        "rank": 8,  # width of the adapters: memory and capacity
        "alpha": 16.0,  # their output is scaled by alpha / rank
        "dropout": 0.0,  # on their input; only with disable_dropout=false
        "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"],  # also: output (the vocabulary layer)
    },
    "disable_dropout": True,  # compare policy and reference on the same network, as torchtune and TRL do
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": config.REQUIRED,  # a Hugging Face folder; its shards are found
        "model_type": config.REQUIRED,  # LLAMA2, LLAMA3, MISTRAL, GEMMA2, QWEN2, ...
    },
    "tokenizer": {"_component_": "pairtune.tokenizer.hf_tokenizer", "path": "${checkpointer.checkpoint_dir}"},
    # The pairs
    "dataset": {
        "source": config.REQUIRED,  # a .json(l)(.gz), .csv or .parquet file, a folder of them, or a Hub id
        "name": None,  # the Hub data set's configuration, if it has several
        "split": "train",  # slices work: train[:90%]
        "limit": None,  # the first N rows only
        "columns": {},  # ours: theirs, where a column has another name
        "overlong": "drop",  # pairs over the budget: drop, trim_prompt (from the left) or error
        "val_fraction": None,  # hold out the last part for evaluation, such as 0.1
    },
    "eval_dataset": {"source": None, "name": None, "split": "train", "limit": None, "columns": {}, "overlong": "drop"},
    "max_length": 1024,  # tokens of prompt and longer answer
    "max_prompt_length": 512,  # tokens of the prompt; null: max_length alone decides
    "shuffle": True,  # a new order each epoch
    # The loss and its minimiser
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0.0},
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 5e-6, "weight_decay": 0.0},
    "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1},  # null: constant
    "clip_grad_norm": 1.0,  # null: no clipping
    "pairs_per_step": 64,  # the batch a step learns from
    "batch_size": 4,  # pairs that are in memory at a time; divides pairs_per_step
    "epochs": 1,
    "max_steps": None,  # ends the run early, schedule included
    # What it tells
    "log_every_n_steps": 1,
    "eval_every_n_steps": None,  # null: at the end only
    "samples": {
        "prompts": [],  # questions answered before and after; [] takes held-out prompts
        "num_prompts": 3,  # how many of those
        "max_new_tokens": 128,
        "temperature": 0.0,  # 0 takes the likeliest token
    },
    "metric_logger": None,  # e.g. torchtune.training.metric_logging.TensorBoardLogger
}


def main(cfg):
    # 1. Device, run folder, seed
    world = dist.start(cfg.device)
    run_dir = Path(cfg.output_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    config.save(cfg, run_dir / "config.yaml", recipe=__file__)
    print((run_dir / "config.yaml").read_text())
    torch.manual_seed(cfg.seed)

    # 2. The model's shape, the weights' files: everything that can be wrong before a weight is read
    weights = checkpoint.open_weights(cfg.checkpointer, run_dir)
    if cfg.lora.dropout and cfg.disable_dropout:
        print(f"lora.dropout={cfg.lora.dropout} has no effect: disable_dropout=true, the custom for DPO")
    lora = {**cfg.lora, "modules": list(cfg.lora.modules), "dropout": 0.0 if cfg.disable_dropout else cfg.lora.dropout}
    model = models.lora(cfg.model, **lora, quantize_base=False, dtype=cfg.dtype)
    models.prepare(model, max_length=cfg.max_length)
    loss_fn = config.instantiate(cfg.loss)

    # 3. Tokenizer and preference pairs
    tokenizer = adapt(config.instantiate(cfg.tokenizer))
    if tokenizer.vocab_size > model.tok_embeddings.num_embeddings:
        raise UserError(
            f"tokenizer: has {tokenizer.vocab_size} token ids, the model {model.tok_embeddings.num_embeddings}"
        )

    def read_pairs(source, title):
        rows = data.read_rows(
            source.source, split=source.split, name=source.name, limit=source.limit, columns=dict(source.columns)
        )
        pairs, report = data.tokenize_pairs(
            rows,
            tokenizer,
            max_length=cfg.max_length,
            max_prompt_length=cfg.max_prompt_length,
            overlong=source.overlong,
        )
        print(f"\n{title}: {source.source}\n{report}")
        return pairs

    train, held_out = read_pairs(cfg.dataset, "Training pairs"), []
    if cfg.dataset.val_fraction:
        train, held_out = data.split_pairs(train, cfg.dataset.val_fraction)
    if cfg.eval_dataset.source:
        held_out = read_pairs(cfg.eval_dataset, "Held-out pairs")
    steps = Steps(
        train, pairs_per_step=cfg.pairs_per_step, batch_size=cfg.batch_size, seed=cfg.seed, shuffle=cfg.shuffle
    )
    total_steps = min(cfg.epochs * len(steps), cfg.max_steps or math.inf)

    # 4. Policy and reference
    models.load(model, checkpoint.read_weights(weights), device=world.device)
    if cfg.enable_activation_checkpointing:
        models.checkpoint_activations(model)
    if cfg.compile:
        models.compile_layers(model)

    def logps(policy, batch):  # [P], [P]
        return answer_logps(policy, batch, mask=dense_mask(batch) if use_mask else None)

    def reference_logps(batch):  # [P], [P]
        with torch.no_grad(), disable_adapter(model):
            return logps(model, batch)

    use_mask = cfg.attention == "mask" or (cfg.attention == "auto" and cfg.compile)
    if cfg.attention == "segments" and not model.segments_allowed:
        raise UserError("attention=segments: this model's attention layers need a dense mask; use attention=auto")

    # 5. Optimizer, schedule, logs
    optimizer = config.instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
    scheduler = cfg.lr_scheduler and config.instantiate(
        cfg.lr_scheduler, optimizer, num_training_steps=total_steps, last_epoch=-1
    )
    log = metrics.RunLog(run_dir, cfg.metric_logger and config.instantiate(cfg.metric_logger))
    num_all, num_trained = models.num_parameters(model)
    print(f"\n{num_all:,} parameters, {num_trained:,} trained, {cfg.dtype} on {world.device}")
    print(f"{len(train):,} pairs, {len(held_out):,} held out, {total_steps:,} steps of {cfg.pairs_per_step} pairs\n")

    def pair_loss(pairs, meter):
        """The loss of each of these pairs, [P]; what is logged of them goes to the meter."""
        batch = lay_out(pairs).to(world.device)
        chosen, rejected = logps(model, batch)
        losses, chosen_rewards, rejected_rewards = loss_fn(chosen, rejected, *reference_logps(batch))
        meter.add(
            loss=losses,
            rewards_chosen=chosen_rewards,
            rewards_rejected=rejected_rewards,
            rewards_margins=chosen_rewards - rejected_rewards,
            rewards_accuracies=(chosen_rewards > rejected_rewards).float(),  # a tie is not accurate
            logps_chosen=chosen,
            logps_rejected=rejected,
        )
        return losses, batch.num_tokens

    def evaluate(step):
        meter = metrics.Meter()
        model.eval()
        with torch.no_grad():
            for pairs in tqdm(micro_batches(held_out, cfg.batch_size), desc="evaluation", leave=False):
                pair_loss(pairs, meter)
        model.train()
        results = meter.read("eval/")
        log.write(step, results)
        tqdm.write(
            f"step {step}: held-out loss {results['eval/loss']:.4f}, accuracy "
            f"{results['eval/rewards/accuracies']:.3f}, margin {results['eval/rewards/margins']:+.3f}"
        )

    def answer_samples():
        if cfg.samples.prompts:
            prompts = [
                tokenizer.render([{"role": "user", "content": text}], add_generation_prompt=True)
                for text in cfg.samples.prompts
            ]
        else:
            prompts = [pair.prompt for pair in (held_out or train)[: cfg.samples.num_prompts]]
        tokens = generation.answers(
            model,
            prompts,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=cfg.samples.max_new_tokens,
            temperature=cfg.samples.temperature,
            seed=cfg.seed,
        )
        return [tokenizer.decode(p) for p in prompts], [tokenizer.decode(t) for t in tokens]

    # 6. Train
    prompts, before = answer_samples()
    meter, num_pairs_seen, num_tokens, last_log = metrics.Meter(), 0, 0, time.perf_counter()
    progress = tqdm(total=total_steps, desc="DPO", unit="step")
    model.train()
    for step in range(1, total_steps + 1):
        batches = steps[step - 1]
        num_pairs = sum(map(len, batches))
        for pairs in batches:
            losses, tokens = pair_loss(pairs, meter)
            (losses.sum() / num_pairs).backward()  # the mean over the step's pairs, however they are batched
            num_tokens += tokens
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_grad_norm or math.inf)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        lr = optimizer.param_groups[0]["lr"]
        if scheduler:
            scheduler.step()
        num_pairs_seen += num_pairs
        progress.update()

        if step == 1 or step % cfg.log_every_n_steps == 0 or step == total_steps:
            results = meter.read()
            if not math.isfinite(results["loss"]) or not math.isfinite(grad_norm):
                rows = sorted(pair.row for pairs in batches for pair in pairs)
                raise UserError(f"step {step}: loss {results['loss']}, gradient norm {grad_norm}; rows {rows}")
            if step == 1 and abs(results["rewards/margins"]) > 0.01:
                raise UserError(
                    f"step 1: the mean margin is {results['rewards/margins']:.4f}; before the first update policy and "
                    "reference are the same model and it must be 0"
                )
            seconds = time.perf_counter() - last_log
            results |= {
                "lr": lr,
                "grad_norm": float(grad_norm),
                "pairs_per_second": num_pairs_seen / seconds,
                "tokens_per_second": num_tokens / seconds,
                "peak_memory_gib": metrics.peak_memory_gib(world.device),
            }
            log.write(step, results)
            progress.set_postfix_str(
                f"loss {results['loss']:.4f}, accuracy {results['rewards/accuracies']:.2f}, "
                f"margin {results['rewards/margins']:+.3f}, {results['pairs_per_second']:.1f} pairs/s"
            )
            num_pairs_seen, num_tokens, last_log = 0, 0, time.perf_counter()
        if held_out and (step == total_steps or (cfg.eval_every_n_steps and step % cfg.eval_every_n_steps == 0)):
            evaluate(step)
            last_log = time.perf_counter()
    progress.close()
    log.close()

    # 7. Curves, answers, weights
    metrics.plot_curves(log.path, run_dir / "curves.png")
    _, after = answer_samples()
    with (run_dir / "samples.jsonl").open("w") as file:
        for prompt, old, new in zip(prompts, before, after, strict=True):
            file.write(json.dumps({"prompt": prompt, "before": old, "after": new}, ensure_ascii=False) + "\n")
    for prompt, old, new in list(zip(prompts, before, after, strict=True))[:3]:
        print(f"\nprompt: {prompt.strip()}\nbefore: {old.strip()}\nafter:  {new.strip()}")
    exported = checkpoint.export(
        weights,
        run_dir,
        merged=models.merged_state_dict(model),
        adapter=models.adapter_state_dict(model),
        lora=lora,
        tokenizer_dir=cfg.tokenizer.get("path"),
    )
    print(f"\nmerged weights: {exported}\nadapter:        {exported / 'adapter'}\ncurves:         {run_dir / 'curves.png'}")


if __name__ == "__main__":
    main(config.parse(METHOD, DEFAULTS))
