"""Full DPO on one device: every weight is trained.

    tune run recipes/full_dpo_single_device --config configs/reviewer2.yaml loss.beta=0.2

The reference policy is a frozen copy of the model, made before the first step: it costs the weights a second time.
Copy this file and edit it: all that a run does is below, in order.
"""

import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pairtune import checkpoint, config, data, dist, generation, metrics, models
from pairtune.batch import lay_out, longest_row
from pairtune.loader import Steps, share
from pairtune.logps import answer_logps
from pairtune.model_config import check_model
from pairtune.tokenizer import adapt

METHOD = "full"  # picks per_method.full out of a config

# Every key, its default and what it costs. This is the schema: a key that is not here is an error.
DEFAULTS = {
    # The run
    "output_dir": f"runs/{METHOD}_dpo",  # the run folder: config, metrics, curves, samples, exported weights
    "seed": 42,  # order of the pairs, fresh adapters, sampled answers
    "device": "auto",  # cuda, cpu, or auto: a GPU where there is one
    "dtype": "bf16",  # bf16, or fp32 for twice the memory; log-probabilities and losses are float32 either way
    "compile": False,  # torch.compile a layer: faster steps, a minute or more before the first
    "attention": "auto",  # segments (a call a document) or mask (dense); auto: mask with compile, else segments
    "enable_activation_checkpointing": False,  # less memory for about a third more time
    # The model and how it is trained
    "model": {"_component_": config.REQUIRED},  # a torchtune builder
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 5e-7, "weight_decay": 0.0},
    # The model's files
    "checkpointer": {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": config.REQUIRED,  # a Hugging Face folder; its shards are found
        "model_type": config.REQUIRED,  # LLAMA2, LLAMA3, MISTRAL, GEMMA, QWEN2, ...
    },
    "tokenizer": {"_component_": "pairtune.tokenizer.hf_tokenizer", "path": "${checkpointer.checkpoint_dir}"},
    # The pairs
    "dataset": {
        "source": config.REQUIRED,  # a .json, .jsonl(.gz), .csv or .parquet file, a folder of them, or a Hub id
        "name": None,  # which configuration, for a Hub data set that has several
        "revision": None,  # which commit, branch or tag of it
        "split": "train",  # slices work: train[:90%]
        "limit": None,  # the first N rows only
        "columns": {},  # ours: theirs, where a column has another name; null leaves an optional one out
        "overlong": "drop",  # a pair over the budget: drop, trim_prompt (from the left) or error
        "val_fraction": None,  # hold out the last part for evaluation, such as 0.1
    },
    "eval_dataset": {
        "source": None,  # as above; null: val_fraction, or no evaluation
        "name": None,
        "revision": None,
        "split": "train",
        "limit": None,
        "columns": {},
        "overlong": "drop",
    },
    "max_length": 1024,  # tokens of prompt and longer answer
    "max_prompt_length": 512,  # tokens of the prompt; null: max_length alone decides
    "shuffle": True,  # a new order each epoch
    # The loss and the steps that minimise it
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0.0},
    "disable_dropout": True,  # policy and reference are the same network, as in torchtune and TRL
    "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1},  # null: constant
    "clip_grad_norm": 1.0,  # null: no clipping
    "pairs_per_step": 64,  # the batch that a step learns from, over all devices
    "batch_size": 4,  # pairs a device holds at a time; divides pairs_per_step and changes no result
    "epochs": 1,
    "max_steps": None,  # ends the run early, and the schedule with it
    # What it tells
    "log_every_n_steps": 1,
    "eval_every_n_steps": None,  # null: at the end only
    "samples": {
        "prompts": [],  # questions answered before and after; [] takes held-out prompts
        "num_prompts": 3,  # how many of those; 0: none
        "max_new_tokens": 128,
        "temperature": 0.0,  # 0 takes the likeliest token
    },
    "metric_logger": None,  # {_component_: torchtune.training.metric_logging.TensorBoardLogger, log_dir: ...}
}


def main(cfg):
    # 1. Device, run folder, seed
    world = dist.start(cfg.device)
    run_dir = Path(cfg.output_dir)
    torch.manual_seed(cfg.seed)

    # 2. Policy and reference, on the meta device: what is wrong with a config shows before a weight is read
    files = checkpoint.open_weights(cfg.checkpointer, run_dir)
    tokenizer = adapt(config.instantiate(cfg.tokenizer))
    loss_fn = config.instantiate(cfg.loss)
    model, reference = (models.full(cfg.model, dtype=cfg.dtype) for _ in range(2))
    reference.requires_grad_(False).eval()
    if cfg.disable_dropout and models.disable_dropout(model):
        world.print("disable_dropout=true: the model's dropout has no effect\n")
    for policy in (model, reference):
        models.prepare(
            policy,
            max_length=cfg.max_length,
            vocab_size=tokenizer.vocab_size,
            attention=cfg.attention,
            checkpoint_activations=cfg.enable_activation_checkpointing,
            compile_layers=cfg.compile,
        )
    check_model(model, checkpoint.read_config(cfg.checkpointer.checkpoint_dir))

    def reference_logps(batch):  # [P], [P]
        with torch.no_grad():
            return answer_logps(reference, batch)

    # 3. Preference pairs
    def read_pairs(key):
        source = cfg[key]
        rows = data.read_rows(
            source.source,
            split=source.split,
            name=source.name,
            revision=source.revision,
            limit=source.limit,
            columns=dict(source.columns),
            key=key,
        )
        return data.tokenize_pairs(
            rows,
            tokenizer,
            max_length=cfg.max_length,
            max_prompt_length=cfg.max_prompt_length,
            overlong=source.overlong,
            progress=world.is_main,
            key=key,
        )

    train, report = read_pairs("dataset")
    held_out = []
    if cfg.dataset.val_fraction:
        train, held_out = data.split_pairs(train, cfg.dataset.val_fraction)
        report = report.with_split(train, held_out)
    world.print(f"Training pairs: {cfg.dataset.source}\n{report}\n")
    if cfg.eval_dataset.source:
        held_out, report = read_pairs("eval_dataset")
        world.print(f"Held-out pairs: {cfg.eval_dataset.source}\n{report.with_split(train, held_out)}\n")
    steps = Steps(
        train,
        pairs_per_step=cfg.pairs_per_step,
        batch_size=cfg.batch_size,
        seed=cfg.seed,
        shuffle=cfg.shuffle,
        rank=world.rank,
        size=world.size,
    )
    total_steps = min(cfg.epochs * len(steps), cfg.max_steps or math.inf)
    row_length = longest_row([*train, *held_out]) if model.dense_attention else None
    config.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=total_steps)
    if world.is_main:
        checkpoint.make_room(run_dir)
        print(config.save(cfg, run_dir / "config.yaml", recipe=__file__))

    # 4. Weights
    for policy in (model, reference):
        models.load(policy, checkpoint.Weights(files), world=world)

    # 5. Optimizer, schedule, logs
    optimizer = config.instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
    scheduler = config.instantiate(cfg.lr_scheduler, optimizer, num_training_steps=total_steps, last_epoch=-1)
    log = metrics.RunLog(run_dir, world, config.instantiate(cfg.metric_logger) if world.is_main else None, cfg)
    num_parameters, num_trained = models.num_parameters(model)
    world.print(
        f"{num_parameters:,} parameters, {num_trained:,} trained, {cfg.dtype} on {world}; {len(train):,} pairs, "
        f"{len(held_out):,} held out; {total_steps:,} steps of {cfg.pairs_per_step} pairs\n"
    )
    torch.manual_seed(cfg.seed + world.rank)  # dropout, if it is on, differs between processes

    # 6. What is done with pairs: score them, evaluate on them, answer their prompts
    def pair_losses(batch, meter):  # [P]
        chosen, rejected = answer_logps(model, batch)
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
        return losses

    def evaluate(step):
        meter = metrics.Meter()
        micro = share(held_out, cfg.batch_size, rank=world.rank, size=world.size)
        model.eval()
        with torch.no_grad():
            for pairs in tqdm(micro, desc="evaluation", leave=False, disable=not world.is_main):
                world.beat("evaluation")
                pair_losses(lay_out(pairs, row_length).to(world.device), meter)
        model.train()
        results = meter.read(world, "eval/")
        log.write(step, results)
        if world.is_main:
            tqdm.write(f"step {step}: held out {metrics.summary(results, 'eval/')}")

    if cfg.samples.prompts:
        questions = [[{"role": "user", "content": text}] for text in cfg.samples.prompts]
        prompts = [tokenizer.render(question, add_generation_prompt=True) for question in questions]
    else:
        prompts = [pair.prompt for pair in (held_out or train)[: cfg.samples.num_prompts]]

    def answer_prompts():
        answers = generation.answers(
            model,
            prompts,
            world=world,
            stop_ids=tokenizer.stop_ids,
            max_new_tokens=cfg.samples.max_new_tokens,
            temperature=cfg.samples.temperature,
            seed=cfg.seed,
        )
        return [tokenizer.decode(answer) for answer in answers]

    # 7. Train
    before = answer_prompts()
    meter, rows, num_tokens, last_log = metrics.Meter(), [], 0, time.perf_counter()
    progress = tqdm(total=total_steps, desc="DPO", unit="step", dynamic_ncols=True, disable=not world.is_main)
    model.train()
    for step in range(1, total_steps + 1):
        micro, num_pairs_in_step = steps[step - 1], steps.num_pairs(step - 1)
        for pairs in micro:
            world.beat(f"step {step}")
            batch = lay_out(pairs, row_length).to(world.device)
            # The mean over the step, however it is cut into micro-batches. FSDP averages gradients over processes.
            loss = pair_losses(batch, meter).sum() * world.size / num_pairs_in_step
            loss.backward()
            rows += [pair.row for pair in pairs]
            num_tokens += batch.num_tokens
        grad_norm = models.clip_gradients(model, cfg.clip_grad_norm or math.inf)
        meter.add(grad_norm=grad_norm[None].to(world.device))  # on the CPU when offloading
        lr = optimizer.param_groups[0]["lr"]
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        progress.update()

        if step == 1 or step % cfg.log_every_n_steps == 0 or step == total_steps:
            seconds = time.perf_counter() - last_log
            results = meter.read(world) | {
                "epoch": step / len(steps),
                "lr": lr,
                "pairs_per_second": world.sum_number(len(rows)) / seconds,
                "tokens_per_second": world.sum_number(num_tokens) / seconds,
                "peak_memory_gib": metrics.peak_memory_gib(world.device),
            }
            log.write(step, results)
            metrics.check(step, results, world, rows=rows, same_at_start=cfg.disable_dropout)
            progress.set_postfix_str(f"{metrics.summary(results)}, {results['pairs_per_second']:.1f} pairs/s")
            rows, num_tokens, last_log = [], 0, time.perf_counter()
        if held_out and (step == total_steps or step % (cfg.eval_every_n_steps or total_steps) == 0):
            evaluate(step)
            last_log = time.perf_counter()
    progress.close()
    log.close()

    # 8. Curves, answers, weights
    after = answer_prompts()
    gathered = models.gather_weights(model, world)
    if world.is_main:
        metrics.plot_curves(log.path, run_dir / "curves.png")
        generation.write_samples(run_dir / "samples.jsonl", [tokenizer.decode(p) for p in prompts], before, after)
        exported = checkpoint.export(
            files,
            run_dir,
            merged=models.merge_adapters(model, gathered),
            adapter=models.only_adapters(model, gathered),
            lora=cfg.get("lora"),
            tokenizer=cfg.tokenizer,
        )
        print(f"\nrun folder {run_dir}, exported weights {exported}")


if __name__ == "__main__":
    main(config.parse(METHOD, DEFAULTS))
