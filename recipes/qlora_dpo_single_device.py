"""QLoRA DPO on one device: LoRA over a base whose linear layers are held in 4 bits (NF4).

    tune run recipes/qlora_dpo_single_device --config configs/reviewer2.yaml lora.rank=4

The reference policy is this model with its adapters switched off: no second copy is held.
Copy this file and edit it: all that a run does is below, in order.
"""

import gc
import math
import time
from pathlib import Path

import torch
from tqdm import tqdm

from pairtune import config, dist, models
from pairtune.folders import peft as adapters
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import check_model, windows
from pairtune.folders.export import check_export, export
from pairtune.losses import calling as loss_needs
from pairtune.losses.formulas import kto_kl
from pairtune.losses.published import advice_for
from pairtune.models import generation
from pairtune.models.logps import answer_logps, answer_scores
from pairtune.pairs import tokenize as data
from pairtune.pairs.batch import lay_out, longest_row
from pairtune.pairs.steps import Steps, share
from pairtune.reference import cache as reference_cache
from pairtune.reference.sources import (
    AdapterCopy,
    AdaptersOff,
    AsItStarts,
    SecondModel,
    check_moves,
    check_reference,
    has_second_model,
    is_own,
    open_second_model,
)
from pairtune.run import contract, metrics, rehearsal
from pairtune.run.checkpoints import Checkpoints, find, read_values
from pairtune.run.fingerprint import check_same, fingerprint
from pairtune.run.folder import make_room
from pairtune.run.state import TrainState, is_better
from pairtune.tokenizer.hf import adapt

METHOD = "qlora"  # picks per_method.qlora out of a config

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
    "model": {"_component_": config.REQUIRED},  # a torchtune builder, the base one: adapters are added here
    "lora": {
        "rank": 8,  # width of the adapters: their memory and capacity
        "alpha": 16.0,  # their output is scaled by alpha / rank
        "dropout": 0.0,  # on their input; has an effect with disable_dropout=false only
        "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"],  # by either's names; also: output, router
        "use_dora": False,  # a magnitude for each row besides: often better at small ranks, slower
        "use_rslora": False,  # scaled by alpha / sqrt(rank): for large ranks
    },
    "merge_into": "original",  # export: adapters in the base as it was; dequantized: as training saw it, in 4 bits
    "adapter": None,  # a folder: start from its adapter (ours, PEFT's), such as one of supervised fine-tuning
    "reference": {
        "name": "adapter_off",  # base; start: with `adapter`; cached: either, once; model: another; sync: moved; none
        "checkpoint_dir": None,  # model, cached: the folder of another model with this vocabulary; null: the run's
        "model": None,  # model, cached: its builder, if it is of another size or architecture; null: `model`
        "dtype": None,  # model, cached: bf16 or fp32; null: the run's
        "quantize": None,  # model, cached: true for 4 bits (NF4) in linear layers; null: true, as the base
        "cache_dir": None,  # cached: where runs share it; null: ~/.cache/pairtune/reference
        "every_n_steps": None,  # sync (TR-DPO): how often it moves toward the policy; null: 512, as published
        "alpha": None,  # sync: how far, 1 takes the policy's adapters; null: 0.6, as published
    },
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 5e-6, "weight_decay": 0.0},
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
    # The loss and the steps that minimise it: loss=ipo, or another of the README's table, or a module by its path
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0.0},
    "router_aux_loss_coef": 0.0,  # of a mixture of experts: how much the loss for an even use of experts counts
    "score_end": True,  # false: the end token of either answer is not scored, as in Llama 3
    "disable_dropout": True,  # policy and reference are the same network, as in torchtune and TRL
    "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1},  # null: constant
    "clip_grad_norm": 1.0,  # null: no clipping
    "pairs_per_step": 64,  # the batch that a step learns from, over all devices
    "batch_size": 4,  # pairs a device holds at a time; divides pairs_per_step and changes no result
    "epochs": 1,
    "max_steps": None,  # ends the run early, and the schedule with it
    # What it keeps
    "save_every_n_steps": 100,  # a checkpoint to resume from; null: at the end, on SIGTERM and on Ctrl-C only
    "keep_last_n": 1,  # so many stay on the disk; 0: none is written
    "keep_best": None,  # and the best by the held-out loss, rewards/accuracies or rewards/margins
    "export_best": False,  # export the best one's weights in place of the last one's
    "on_save_failure": "stop",  # a disk that is full stops the run; continue: train on with the earlier checkpoints
    "resume": False,  # true: the newest checkpoint of output_dir; auto: if there is one; or a path
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
    resumed = world.agree(find(cfg.resume, run_dir) if world.is_main else None)
    torch.manual_seed(cfg.seed)

    # 2. Policy and reference, on the meta device: what is wrong with a config shows before a weight is read
    loss_fn = config.instantiate(cfg.loss)
    needed = loss_needs.needs(loss_fn)
    check_reference(cfg.reference, loss_fn, METHOD, dtype=cfg.dtype, has_adapter=cfg.adapter is not None)
    files = checkpoint.open_weights(cfg.checkpointer, cfg.model)
    tokenizer = adapt(config.instantiate(cfg.tokenizer), cfg.tokenizer)
    own = is_own(cfg.reference, METHOD, cfg.dtype)  # what the run starts from
    with_copy = cfg.reference.name in ("start", "sync")
    build = {"dtype": cfg.dtype, "quantize_base": True, "frozen_copy": with_copy, "world": world}
    model = models.lora(cfg.model, **cfg.lora, **build)
    if cfg.disable_dropout and models.disable_dropout(model):
        world.print("disable_dropout=true: the model's dropout, such as lora.dropout, has no effect\n")
    prepared = {
        "max_length": cfg.max_length,
        "vocab_size": tokenizer.vocab_size,
        "attention": cfg.attention,
        "windows": windows(files.config, len(model.layers)),
        "checkpoint_activations": cfg.enable_activation_checkpointing,
        "compile_layers": cfg.compile,
    }
    models.prepare(model, **prepared)
    check_model(model, files.config)
    adapter = adapters.read_adapter(cfg.adapter, model, files) if cfg.adapter else None
    second = None
    if needed.reference and has_second_model(cfg.reference, METHOD, cfg.dtype):
        like = {"component": cfg.model, "dtype": cfg.dtype, "files": files, "tokenizer": tokenizer, "world": world}
        second = open_second_model(cfg.reference, METHOD, **like)
        second.prepare(**prepared)

    # 3. Preference pairs
    def read_pairs(key):
        limits = {name: cfg[name] for name in ("max_length", "max_prompt_length")}
        unpaired = needed.takes_unpaired
        told = {"progress": world.is_main, "beat": world.beat, "key": key}
        return data.read_pairs(cfg[key], tokenizer, **limits, unpaired=unpaired, **told)

    train, report = read_pairs("dataset")
    held_out = []
    if cfg.dataset.val_fraction:
        train, held_out = data.split_pairs(train, cfg.dataset.val_fraction)
        report = report.with_split(train, held_out)
    world.print(f"Training pairs: {cfg.dataset.source}\n{report}\n")
    if cfg.eval_dataset.source:
        held_out, report = read_pairs("eval_dataset")
        world.print(f"Held-out pairs: {cfg.eval_dataset.source}\n{report.with_split(train, held_out)}\n")
    order = {name: cfg[name] for name in ("pairs_per_step", "batch_size", "seed", "shuffle")}
    steps = Steps(train, **order, rank=world.rank, size=world.size)
    total_steps = min(cfg.epochs * len(steps), cfg.max_steps or math.inf)
    moved_every = check_moves(cfg.reference, total_steps)  # None: the reference stays as it is
    mixed_within = cfg.max_length if "kl" in needed.inputs else None  # KTO puts prompts before the answers to others
    dense = model.pairtune.dense_attention
    row_length = longest_row([*train, *held_out], mixed_within=mixed_within) if dense else None

    def batch_of(pairs):
        return lay_out(pairs, row_length, score_end=cfg.score_end).to(world.device)

    contract.check_pairs([*train, *held_out], tokenizer, score_end=cfg.score_end)
    contract.check_router(model, cfg.router_aux_loss_coef)
    contract.check_loss(loss_fn, train, held_out, pairs_per_step=cfg.pairs_per_step, keep_best=cfg.keep_best)
    rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=total_steps)
    identity = fingerprint(cfg, train, held_out, files, second.files if second else None)
    if resumed:
        changes = check_same(read_values(resumed), identity, resumed, total_steps=total_steps)
        world.print("\n".join([f"resuming from {resumed}", *(f"  changed: {line}" for line in changes)]), "\n")
    if world.is_main:
        make_room(run_dir, resumed)
        print(config.save(cfg, run_dir / "config.yaml", recipe=__file__))

    # 4. Weights
    longest = contract.longest(train, cfg.batch_size * world.size)
    cache = None

    def fill(reference):  # a few values of earlier runs are computed again; then those that are missing
        larger = reference_cache.BATCHES * cfg.batch_size  # no gradients: there is room
        with reference.weights() as frozen:
            for pairs in share(cache.samples(16), cfg.batch_size, rank=world.rank, size=world.size):
                cache.check(pairs, *answer_logps(frozen, batch_of(pairs), needed.ld_alpha))
            micro = share(cache.missing, larger, rank=world.rank, size=world.size)
            for pairs in tqdm(micro, desc="reference", leave=False, disable=not world.is_main):
                world.beat("reference")
                cache.put(pairs, *answer_logps(frozen, batch_of(pairs), needed.ld_alpha))
        cache.complete()

    if cfg.reference.name == "cached":
        folder = reference_cache.find_folder(cfg.reference.cache_dir)
        source = {"component": cfg.model, "weight_files": files.weight_files}
        if cfg.adapter:
            source["adapter_files"] = [adapters.find_weights(cfg.adapter)]
        source = (second.source if second else source) | {"ld_alpha": needed.ld_alpha, "score_end": cfg.score_end}
        found = reference_cache.identify(folder, second.model if second else model, world, **source)
        asked = [pair for step in range(min(total_steps, len(steps))) for pair in steps.pairs(step)]
        cache = reference_cache.ReferenceCache(folder, found, [*asked, *longest, *held_out], world)
        if second and cache.missing:  # it leaves before the policy comes
            second.load(world)
            fill(SecondModel(model, second.model))
        elif second:
            world.print(f"reference: the cache has all {len(cache):,} values; its model is not loaded to check them\n")
        second = None
        gc.collect()  # a model and the functions that it was given refer to each other
    models.load(model, checkpoint.Weights(files), world=world, adapter=adapter)
    if second:
        second.load(world)
        reference = SecondModel(model, second.model)
    elif with_copy:
        reference = AdapterCopy(model)
    elif cfg.adapter:
        reference = AsItStarts(model)
    else:
        reference = AdaptersOff(model)
    if cache and own:  # by the policy, which is its own reference before it is trained or resumed
        fill(reference)
        models.forget_gathered(model)

    # 5. Optimizer, schedule, and what is resumed: all of it is in `state`
    optimizer = config.instantiate(cfg.optimizer, [p for p in model.parameters() if p.requires_grad])
    scheduler = config.instantiate(cfg.lr_scheduler, optimizer, num_training_steps=total_steps, last_epoch=-1)
    contract.check_trained(model, optimizer)
    for line in advice_for(cfg.loss, cfg.optimizer.lr, METHOD, train) + checkpoint.rounding(files, cfg.dtype):
        world.print(f"advice: {line}")
    torch.manual_seed(cfg.seed + world.rank)  # dropout, if it is on, differs between processes
    meter = metrics.Meter()
    kept = {"loss_fn": loss_fn, "reference": reference if moved_every else None}
    state = TrainState(model, optimizer, scheduler, meter, world=world, fingerprint=identity, **kept)
    if resumed:
        state.load(resumed, run_dir, best_metric=cfg.keep_best)
    keeping = {key: cfg[key] for key in ("keep_last_n", "on_save_failure")}
    checkpoints = Checkpoints(run_dir, world, **keeping)
    logger = config.instantiate(cfg.metric_logger) if world.is_main else None
    log = metrics.RunLog(run_dir, world, logger, cfg, step=state.step, evaluated=state.evaluated)
    num_parameters, num_trained = models.num_parameters(model)
    world.print(
        f"{num_parameters:,} parameters, {num_trained:,} trained, {cfg.dtype} on {world}; {len(train):,} pairs, "
        f"{len(held_out):,} held out; {total_steps:,} steps of {cfg.pairs_per_step} pairs\n"
    )

    # 6. What is done with pairs: score them, evaluate on them, answer their prompts
    def reference_logps(pairs, batch):  # [P], [P]
        if not needed.reference:
            return None, None
        if cache:
            return cache(pairs)
        if cfg.reference.name == "none":  # to it, every answer is alike
            return torch.zeros(2, batch.num_pairs, device=world.device).unbind()
        with reference.weights() as frozen:
            return answer_logps(frozen, batch, needed.ld_alpha)

    def scores_of(batch):
        return answer_scores(model, batch, ld_alpha=needed.ld_alpha, weights=needed.weights)

    def watched(micro, doing):  # an evaluation may end early: it is made up for after resuming
        for pairs in micro:
            world.beat(doing)
            if doing == "evaluation" and interruption.requested():
                return
            yield pairs

    def of_whole_step(pairs, micro, doing):  # pairs of all processes, and this one's: what some losses take of a step
        known = {"mean_chosen_length": loss_needs.mean_chosen_length(pairs, score_end=cfg.score_end)}
        values = [None] * len(micro)
        with torch.no_grad():
            if "kl" in needed.inputs:  # KTO's baseline: every prompt with the answers to another one
                others = loss_needs.mismatched(pairs, cfg.max_length)
                log_ratios = torch.zeros((), device=world.device).double()
                for mixed in watched(share(others, cfg.batch_size, rank=world.rank, size=world.size), doing):
                    batch = batch_of(mixed)
                    policy, base = answer_logps(model, batch), reference_logps(mixed, batch)
                    log_ratios += (torch.cat(policy) - torch.cat(base)).sum()
                known["kl"] = kto_kl(world.sum(log_ratios), loss_needs.num_answers(others))
            if needed.whole_step:  # a loss that sorts the step's pairs: all values first, then each pair's gradient
                batches, scores, references = [], [], []
                for mine in watched(micro, doing):
                    batches.append(batch_of(mine))
                    scores.append(scores_of(batches[-1]))
                    references.append(reference_logps(mine, batches[-1]))
                values = loss_needs.step_losses(loss_fn, batches, scores, references, world, **known)
        return known, values

    def pair_losses(pairs, batch, meter, known, values=None):  # [P], to be differentiated; [P], the losses
        scores = scores_of(batch)
        chosen, rejected = scores.chosen_logps, scores.rejected_logps
        if values is None:
            inputs = loss_needs.loss_inputs(loss_fn, batch, scores, **known)
            losses, chosen_rewards, rejected_rewards = loss_fn(
                chosen, rejected, *reference_logps(pairs, batch), **inputs
            )
            differentiable = losses
        else:
            losses, chosen_rewards, rejected_rewards = values.losses, values.chosen_rewards, values.rejected_rewards
            differentiable = chosen * values.chosen_gradients + rejected * values.rejected_gradients
        meter.add(
            loss=losses,
            rewards_chosen=chosen_rewards[batch.with_chosen],
            rewards_rejected=rejected_rewards[batch.with_rejected],
            rewards_accuracies=(chosen_rewards > rejected_rewards)[batch.with_both].float(),  # a tie is not accurate
            logps_chosen=chosen[batch.with_chosen],
            logps_rejected=rejected[batch.with_rejected],
        )
        if "kl" in known:  # the same for each pair of the step
            meter.add(kl=known["kl"].expand(batch.num_pairs))
        if scores.router_loss is not None:  # of this micro-batch, the same for each of its pairs
            meter.add(router_loss=scores.router_loss.expand(batch.num_pairs))
            differentiable = differentiable + cfg.router_aux_loss_coef * scores.router_loss
        return differentiable, losses

    def evaluate():
        meter = metrics.Meter()
        micro = share(held_out, cfg.batch_size, rank=world.rank, size=world.size)
        model.eval()
        progress = tqdm(total=len(micro), desc="evaluation", leave=False, disable=not world.is_main)
        with torch.no_grad(), loss_needs.unchanged(loss_fn), progress:
            known, values = of_whole_step(held_out, micro, "evaluation")
            for pairs, value in zip(watched(micro, "evaluation"), values, strict=False):
                pair_losses(pairs, batch_of(pairs), meter, known, value)
                progress.update()
        model.train()
        if interruption.requested():
            return
        results = meter.read(world, "eval/")
        log.write(state.step, results)
        state.evaluated = state.step
        if world.is_main:
            tqdm.write(f"step {state.step}: held out {metrics.summary(results, 'eval/')}")
        if cfg.keep_best and is_better(results[f"eval/{cfg.keep_best}"], state.best, cfg.keep_best):
            state.best = {"step": state.step, "metric": cfg.keep_best, "value": results[f"eval/{cfg.keep_best}"]}

    asked = [[{"role": "user", "content": text}] for text in cfg.samples.prompts]
    prompts = [tokenizer.render(question, add_generation_prompt=True) for question in asked]
    prompts = prompts or [pair.prompt for pair in (held_out or train)[: cfg.samples.num_prompts]]
    questions = [tokenizer.decode(prompt) for prompt in prompts]

    def answer_prompts():
        options = {key: cfg.samples[key] for key in ("max_new_tokens", "temperature")}
        stop_ids = tokenizer.stop_ids
        answers = generation.answers(model, prompts, world=world, stop_ids=stop_ids, seed=cfg.seed, **options)
        return [tokenizer.decode(answer) for answer in answers]

    def is_due(interval):
        return state.step == total_steps or (interval and state.step % interval == 0)

    # 7. Before the first step: the longest pairs go forward and backward, and what must hold is checked
    interruption = dist.Interruption(world)
    pairs = longest[world.rank :: world.size]
    with contract.rehearsal(model, optimizer, loss_fn, pairs, world):
        known, (values,) = of_whole_step(longest, [pairs], "rehearsal")
        rehearsed = metrics.Meter()
        differentiable, losses = pair_losses(pairs, batch_of(pairs), rehearsed, known, values)
        differentiable.sum().backward()
        if not resumed:
            grad_norm = models.clip_gradients(model, math.inf)
            is_reference = cfg.disable_dropout and needed.reference and own and cfg.reference.name != "none"
            is_reference &= not (cache and cfg.dtype == "bf16")  # rounded otherwise, in other batches; it checks itself
            means = rehearsed.read(world)
            contract.check_start(losses, means, grad_norm, pairs=pairs, loss_fn=loss_fn, is_reference=is_reference)
    samples = run_dir / "samples.jsonl"
    before = generation.answers_before(samples, questions) if resumed else answer_prompts()
    if world.is_main:
        generation.write_samples(samples, questions, before)

    # 8. Train
    stop, num_pairs, num_tokens, last_log = False, 0, 0, time.perf_counter()
    progress = tqdm(
        total=total_steps, initial=state.step, desc="DPO", unit="step", dynamic_ncols=True, disable=not world.is_main
    )
    model.train()
    if held_out and resumed and state.step and is_due(cfg.eval_every_n_steps) and state.evaluated < state.step:
        evaluate()
        log.sync()
        checkpoints.save(state)
        stop = interruption.requested()
    for step in range(state.step + 1, total_steps + 1) if not stop else ():
        micro, num_pairs_in_step = steps[step - 1], steps.num_pairs(step - 1)
        if moved_every and step > 1 and (step - 1) % moved_every == 0:  # not before the evaluation of the step before
            reference.move(cfg.reference.alpha or 0.6)
        known, values = of_whole_step(steps.pairs(step - 1), micro, f"step {step}")
        losses, rows_in_step = [], []
        for pairs, value in zip(watched(micro, f"step {step}"), values, strict=True):
            batch = batch_of(pairs)
            differentiable, loss = pair_losses(pairs, batch, meter, known, value)
            # The mean over the step, however it is cut into micro-batches. FSDP averages gradients over processes.
            (differentiable.sum() * world.size / num_pairs_in_step).backward()
            losses.append(loss.detach())
            rows_in_step += [pair.row for pair in pairs]
            num_tokens += batch.num_tokens
        num_pairs += len(rows_in_step)
        grad_norm = models.clip_gradients(model, cfg.clip_grad_norm or math.inf)
        contract.check_step(step, torch.cat(losses), grad_norm, rows_in_step, world)
        meter.add(grad_norm=grad_norm[None].to(world.device))  # on the CPU when offloading
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        loss_needs.after_step(loss_fn, world)
        state.step = step
        progress.update()

        if step == 1 or step % cfg.log_every_n_steps == 0 or step == total_steps:
            seconds = time.perf_counter() - last_log
            results = meter.read(world) | {
                "epoch": step / len(steps),
                "lr": lr,
                "pairs_per_second": world.sum_number(num_pairs) / seconds,
                "tokens_per_second": world.sum_number(num_tokens) / seconds,
                "peak_memory_gib": metrics.peak_memory_gib(world.device),
            }
            log.write(step, results)
            progress.set_postfix_str(f"{metrics.summary(results)}, {results['pairs_per_second']:.1f} pairs/s")
            num_pairs, num_tokens, last_log = 0, 0, time.perf_counter()
        if held_out and is_due(cfg.eval_every_n_steps) and not interruption.requested():
            evaluate()
            last_log = time.perf_counter()
        stop = interruption.requested()
        is_best = state.best is not None and state.best["step"] == step
        if stop or is_best or is_due(cfg.save_every_n_steps):
            log.sync()
            checkpoints.save(state)
        if step == 1:
            checkpoints.check_room(state)
        if stop:
            break
    progress.close()
    checkpoints.close()
    log.close()
    stop = interruption.requested()
    interruption.end()
    if stop:
        world.print(f"\nstopped after step {state.step} of {total_steps}; {checkpoints}")
        raise SystemExit(interruption.status)

    # 9. Curves, answers, weights
    if cfg.export_best:
        world.print(f"\n{checkpoints.load_best(state)}")
    after = answer_prompts()
    compared = batch_of((held_out or train)[: min(4, cfg.batch_size)])  # not more than a step had room for
    with models.frozen(model):
        trained = answer_logps(model, compared)
    other_base = cfg.get("merge_into") == "original"  # QLoRA's: its own base is rounded to 4 bits
    gathered = models.gather_weights(model, world, adapters_only=other_base)
    if world.is_main:
        whole = models.on_base(gathered, checkpoint.Weights(files), cfg.dtype) if other_base else gathered
        exported = export(
            files,
            run_dir,
            merged=models.merge_adapters(model, whole),
            adapter=models.only_adapters(model, gathered),
            lora=cfg.get("lora"),
            tokenizer=tokenizer,
        )
        same = {"dtype": cfg.dtype, "other_base": other_base, **prepared}
        generation.write_samples(samples, questions, before, after)
        generation.show_samples(samples)
        metrics.plot_curves(log.path, run_dir / "curves.png")
        difference = check_export(exported, files, cfg.model, compared, trained, **same)
        print(f"\nrun folder {run_dir}, exported weights {exported}: {difference}")


if __name__ == "__main__":
    main(config.parse(METHOD, DEFAULTS))
