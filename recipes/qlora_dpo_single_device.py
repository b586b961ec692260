"""QLoRA DPO on one device: LoRA over a base whose linear layers are held in 4 bits (NF4), or in 8.

    tune run recipes/qlora_dpo_single_device --config configs/reviewer2.yaml lora.rank=4

The reference policy is this model with its adapters switched off: no second copy is held.
Copy this file and edit it: all that a run does is below, in order.
"""

from pathlib import Path

import torch

from pairtune import config, models
from pairtune.config import keys
from pairtune.folders import peft, weights
from pairtune.folders.export import export_checked, export_size, probe
from pairtune.folders.opening import make_ready
from pairtune.losses.calling import after_step, policy_scores, takes_unpaired, unchanged
from pairtune.losses.published import advice_for
from pairtune.losses.whole_step import WholeStep
from pairtune.models.experts import with_router_loss
from pairtune.pairs.batch import lay_out
from pairtune.pairs.steps import Steps, count_steps
from pairtune.pairs.tokenize import read_train_and_held_out
from pairtune.process import console, dist
from pairtune.reference import KL_PAIRS, Reference
from pairtune.run import checkpoints, choosing, contract, dry_run, folder, metrics, optimizers, rehearsal, resuming
from pairtune.run.card import write_card
from pairtune.run.fingerprint import check_same, fingerprint
from pairtune.run.samples import Samples
from pairtune.run.state import TrainState
from pairtune.tokenizer import adapt

METHOD = "qlora"  # picks per_method.qlora out of a config

# Every key and its default: one that is not here is an error. `tune run RECIPE --help` prints all, with comments.
DEFAULTS = {
    # Where it runs, what it keeps and tells: the same in every recipe
    "output_dir": f"runs/{METHOD}_dpo",  # the run folder: config, metrics, checkpoints, curves, samples, export
    **keys.RUN,  # seed, device, dtype, compile, eval_every_n_steps, save_every_n_steps, keep_best, resume, ...
    **keys.FILES,  # checkpointer.checkpoint_dir and .model_type; tokenizer
    # The model and how it is trained
    "model": {"_component_": "auto"},  # what the folder's config.json says; or a base builder, of torchtune's or yours
    "lora": {
        "rank": 8,  # width of the adapters: their memory and capacity
        "alpha": 16.0,  # their output is scaled by alpha / rank
        "dropout": 0.0,  # on their input; has an effect with disable_dropout=false only
        "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"],  # Hugging Face's names, too; output, router
        "use_dora": False,  # a magnitude for each row besides: often better at small ranks, slower
        "use_rslora": False,  # scaled by alpha / sqrt(rank): for large ranks
    },
    "adapter": None,  # a folder: start from its adapter (ours, PEFT's), such as one of supervised fine-tuning
    "base_dtype": "nf4",  # what the base is held in: nf4, 4 bits; int8, fp8: 8 bits, nearer to it
    "merge_into": "original",  # export: adapters in the base as it was; dequantized: as training saw it, in few bits
    # adapter_off: the base model; start: the adapter that the run starts from; model: of checkpoint_dir; none: zeros;
    # sync: what the run starts from, moved toward the policy; cached: adapter_off, start or model, computed once
    "reference": {"name": "adapter_off", **keys.REFERENCE},
    "optimizer": {"_component_": "torch.optim.AdamW", "lr": 5e-6, "weight_decay": 0.0},
    "decay_norms_and_biases": False,  # true: weight_decay shrinks parameters of one dimension, too
    # The pairs
    "dataset": {**keys.ROWS, **keys.TOKENS, **keys.STREAM, "val_fraction": None},  # 0.1: the last tenth is held out
    "eval_dataset": {**keys.ROWS, "source": None},  # null: val_fraction, or no evaluation
    "max_length": 1024,  # tokens of prompt and longer answer
    "max_prompt_length": 512,  # tokens of the prompt; null: max_length alone decides
    "max_completion_length": None,  # tokens of the longer answer: a pair over it is dropped, answers are never cut
    "shuffle": True,  # a new order each epoch
    # The loss and the steps that minimise it: loss=ipo, or another of the README's table, or loss=my_file.MyLoss
    "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1, "label_smoothing": 0.0},
    "router_aux_loss_coef": 0.0,  # of a mixture of experts: how much the loss for an even use of experts counts
    "score_end": True,  # false: the end token of either answer is not scored, as in Llama 3
    "disable_dropout": True,  # else policy and reference would differ by chance; torchtune and TRL do so, too
    "lr_scheduler": {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1},  # null: constant
    "clip_grad_norm": 1.0,  # null: no clipping
    "pairs_per_step": 64,  # the batch that a step learns from, over all devices
    "batch_size": "auto",  # pairs a device holds at a time, of the longest; divides pairs_per_step, changes no result
    "epochs": 1,  # 0.5: half of them, in steps rounded up
    "max_steps": None,  # ends the run early, and the schedule with it
}


def main(cfg):
    # 1. Processes, run folder, seed
    world = dist.start(cfg.device)
    run_dir = Path(cfg.output_dir).expanduser()
    claim = folder.claim(run_dir, config.paths(cfg)) if world.is_main else None  # from here on no other run has it
    resumed = world.agree(claim.check(resuming.find(cfg.resume, run_dir)) if claim else None)  # None: from the start
    torch.manual_seed(cfg.seed)

    # 2. Policy and reference, on the meta device: what is wrong with a config shows before the model's weights are read
    loss_fn = config.instantiate(cfg.loss)  # what it takes besides, its class says: losses/calling.py, Needs
    reference = Reference(cfg.reference, METHOD, loss_fn, dtype=cfg.dtype, adapter=cfg.adapter, world=world)
    files = weights.open_weights(cfg.checkpointer, cfg.model)
    tokenizer = adapt(config.instantiate(cfg.tokenizer), cfg.tokenizer)
    base = {"dtype": cfg.dtype, "base_dtype": cfg.base_dtype}
    model = models.qlora(cfg.model, **cfg.lora, **base, frozen_copy=reference.copies_adapters, world=world)
    if cfg.disable_dropout and models.disable_dropout(model):
        world.print("disable_dropout=true: the model's dropout, such as lora.dropout, has no effect\n")
    make_ready(model, files.config, cfg.max_length, tokenizer.vocab_size)
    adapter = peft.read_adapter(cfg.adapter, model, files) if cfg.adapter else None
    reference.build(cfg.model, files, tokenizer, cfg.max_length)

    # 3. Preference pairs
    budget = cfg.max_length, cfg.max_prompt_length, takes_unpaired(loss_fn), cfg.max_completion_length
    train, held_out = read_train_and_held_out(cfg.dataset, cfg.eval_dataset, tokenizer, world, *budget, seed=cfg.seed)
    total_steps = count_steps(train, cfg.pairs_per_step, cfg.epochs, cfg.max_steps)
    # What says `auto` is chosen by the device's memory and the work to do; none of it changes a result
    work = choosing.work(train + held_out, loss_fn, cfg.max_length, cfg.pairs_per_step, total_steps)
    asked = {key: cfg[key] for key in choosing.KEYS}
    how = choosing.choose_and_execute(asked, work, model, reference, cfg.optimizer, world)
    cfg.update(how.keys)  # for config.yaml
    # steps[n] is this process's part of step n + 1, over all epochs: micro-batches, each as much as fits
    steps = Steps(train, cfg.pairs_per_step, how.batch_size, world, seed=cfg.seed, shuffle=cfg.shuffle, rows=how.rows)
    eval_every = steps.interval(cfg.eval_every_n_steps, cfg.eval_every_n_epochs)  # in steps

    def batch_of(pairs):
        return lay_out(pairs, how.row_length, score_end=cfg.score_end).to(world.device)

    contract.check_pairs(train + held_out, tokenizer, score_end=cfg.score_end)
    contract.check_router(model, cfg.router_aux_loss_coef)
    contract.check_loss(loss_fn, train, held_out, pairs_per_step=cfg.pairs_per_step, keep_best=cfg.keep_best)
    reference.check_moves(total_steps)
    rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, model, world, num_training_steps=total_steps)
    identity = fingerprint(cfg, train, held_out, files, reference.files)
    if resumed:
        check_same(resuming.read_values(resumed, world), identity, resumed, world, total_steps=total_steps)
    if world.is_main:
        claim.make_room(resumed)
        print(config.save(cfg, run_dir / "config.yaml", recipe=__file__, defaults=DEFAULTS))
    told = weights.advice(files, cfg.dtype, cfg.max_length)
    for line in advice_for(cfg.loss, cfg.optimizer.lr, METHOD, train) + told:
        world.print(f"advice: {line}")

    # 4. Weights; and with reference=cached, the values that no earlier run has kept
    heaviest = steps.heaviest()  # for section 7: a micro-batch a process
    reference.open_cache(model, [*steps.seen_in(total_steps), *sum(heaviest, []), *held_out], score_end=cfg.score_end)

    def fill_cache():
        for pairs in reference.unanswered(steps.share):
            reference.keep(batch_of(pairs))

    with reference.alone():  # the values of another model, if it is one: it leaves before the policy comes
        fill_cache()
    models.load(model, weights.Weights(files), world=world, adapter=adapter)
    models.settle(model, train, world)  # whether both answers may follow one prompt in a row: compared with each alone
    reference.attach(model)  # with reference=model, its weights are read now
    fill_cache()  # the policy's own values, as it is before training

    # 5. Optimizer, schedule, and what is resumed: all of it is in `state`
    optimizer = optimizers.make(cfg.optimizer, model.parameters(), cfg.decay_norms_and_biases)
    scheduler = config.instantiate(cfg.lr_scheduler, optimizer, num_training_steps=total_steps, last_epoch=-1)
    contract.check_trained(model, optimizer)
    torch.manual_seed(cfg.seed + world.rank)  # dropout, if it is on, differs between processes
    meter = metrics.Meter()
    state = TrainState(
        model, optimizer, scheduler, meter, world, identity, loss_fn=loss_fn, reference=reference, steps=steps
    )
    if resumed:
        state.load(resumed, run_dir, best_metric=cfg.keep_best)
    saved = checkpoints.Checkpoints(run_dir, world, cfg.keep_last_n, cfg.keep_best, cfg.on_save_failure, state.best)
    world.print(f"{models.sizes(model)}, {cfg.dtype} on {world}; {total_steps:,} steps of {cfg.pairs_per_step} pairs\n")

    # 6. Signals; the losses of a few pairs, and of all held-out ones
    interruption = dist.Interruption(world)  # SIGTERM, Ctrl-C and SIGHUP are heard between steps from here on

    def over_whole_step(pairs, micro, doing, iterate=iter):  # for losses that look at all pairs at once, as KTO does
        whole = WholeStep(loss_fn, pairs, micro, steps, max_length=cfg.max_length, score_end=cfg.score_end)
        with torch.no_grad():
            for extra in iterate(whole.first_pass):  # without gradients; nothing in DPO
                world.beat(doing)
                batch = batch_of(extra)
                whole.add(batch, policy_scores(model, batch, loss_fn), reference.logps(batch, first_pass=True))
        return whole.end(world)

    def pair_losses(pairs, whole, into):  # [P], to be differentiated; `into` is a meter
        batch = batch_of(pairs)
        scores = policy_scores(model, batch, loss_fn)
        # A loss of your own goes here: one value a pair, not their mean, and rewards for the log
        losses, chosen_rewards, rejected_rewards = loss_fn(
            scores.chosen_logps, scores.rejected_logps, *reference.logps(batch), **whole.inputs(batch, scores)
        )
        into.add_pairs(batch, scores, losses, chosen_rewards, rejected_rewards, kl=whole.kl)
        return with_router_loss(losses, scores.router_loss, cfg.router_aux_loss_coef)

    def evaluate():
        held_out_meter, micro = metrics.Meter(), steps.share(held_out)
        model.eval()
        with torch.no_grad(), unchanged(loss_fn), reference.remembered():
            whole = over_whole_step(held_out, micro, "evaluation", interruption.unless_stopped)
            for pairs in interruption.unless_stopped(world.progress(micro, "evaluation")):
                world.beat("evaluation")
                pair_losses(pairs, whole, held_out_meter)
            of_kl = steps.share(held_out[:KL_PAIRS] if state.step else [])  # token by token
            for pairs in interruption.unless_stopped(of_kl):
                world.beat("evaluation")
                held_out_meter.add(kl_per_token=reference.divergence(model, batch_of(pairs)))
        model.train()
        if interruption.requested():  # the loop's top makes up for it after resuming
            return
        results = log.write_evaluation(state.step, held_out_meter)  # with the verdict and the curves so far
        state.note_evaluation(results, cfg.keep_best)
        world.print(f"step {state.step}: held out {metrics.summary(results, 'eval/')}")

    # 7. Before the first step: the longest pairs go forward and backward, and policy and reference are compared
    mine = heaviest[world.rank]
    with dry_run.step(model, optimizer, loss_fn, mine, world, how) as trial:  # leaves no gradient and no trace
        saved.check_disk_space(state, total_steps - state.step, export_size(model, files, tokenizer))
        losses = pair_losses(mine, over_whole_step(sum(heaviest, []), [mine], "dry run"), trial.meter)
        losses.sum().backward()
        if not resumed:  # then the policy has moved already
            trial.check(losses, batch_of(mine), reference, dropout=not cfg.disable_dropout)
    log = metrics.RunLog(run_dir, world, cfg.metric_logger, cfg, state.step, state.evaluated, held_out, tokenizer)
    samples = Samples(run_dir / "samples.jsonl", tokenizer, world, cfg.samples, held_out or train, seed=cfg.seed)
    samples.before(model, resumed=resumed is not None)

    # 8. Train
    progress = console.Progress("step", total_steps, initial=state.step, shown=world.is_main, stays=True)
    meter.restart_clock()
    while True:
        # What is due after state.step steps (null: after the last); after resuming, what an interruption has left out
        if held_out and state.owes_evaluation(eval_every, total_steps):
            evaluate()
            meter.restart_clock()
        stop, ended = interruption.requested(), state.step == total_steps or state.stops_early(cfg.early_stop)
        if stop or ended or state.is_best or state.is_due(cfg.save_every_n_steps, total_steps):
            log.sync()  # before the checkpoint, which must not know more than the log
            saved.save(state)
        if stop or ended:
            break

        step, micro = state.step + 1, steps[state.step]
        reference.follow(step)  # reference=sync: now and then it moves toward the policy
        whole = over_whole_step(steps.pairs(state.step), micro, f"step {step}")
        losses_of_step = []
        for pairs in micro:
            world.beat(f"step {step}")
            losses = pair_losses(pairs, whole, meter)
            # The mean over the step, however it is cut into micro-batches. FSDP averages gradients over processes.
            (losses.sum() * world.size / whole.num_pairs).backward()
            losses_of_step.append(losses.detach())
        grad_norm = models.clip_gradients(model, cfg.clip_grad_norm)
        contract.check_finite(step, losses_of_step, grad_norm, micro, world, log)
        log.write_pairs(step, meter)  # what each came to, for `tune pairs`
        meter.add(grad_norm=grad_norm[None].to(world.device))  # on the CPU when offloading
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        if scheduler:
            scheduler.step()
        after_step(loss_fn, world)
        state.step = step
        progress.update()
        may_end = cfg.early_stop and state.owes_evaluation(eval_every, total_steps)
        if step == 1 or may_end or state.is_due(cfg.log_every_n_steps, total_steps):
            results = meter.read(world) | steps.seen(step) | {"lr": lr} | meter.read_speed(world)
            log.write(step, results)
            progress.tell(f"{metrics.summary(results)}, {results['pairs_per_second']:.1f} pairs/s")
    progress.close()
    saved.close()
    log.close()
    for table in steps.account():  # of dataset.streaming=true: what became of the rows
        world.print(f"\n{table}")
    stop = interruption.requested()  # again: it may have come while the last checkpoint was written
    interruption.end()
    if stop:
        world.print(f"\nstopped after step {state.step} of {total_steps}; {saved}\n{log.conclude('stopped')}")
        raise SystemExit(interruption.status)

    # 9. Answers, weights, curves, verdict
    with saved.telling_the_way_on():  # the disk may be full by now
        if cfg.export_best:
            saved.load_best(state)
        samples.after(model)
        trained = probe(model, batch_of(steps.some(held_out or train)))  # the export has to give this
        onto_original = cfg.merge_into == "original"  # and not onto the base in few bits
        gathered = models.gather_weights(model, world, adapters_only=onto_original)
        if world.is_main:
            samples.show()
            verdict = log.conclude("yes" if state.step == total_steps else "early")
            told = export_checked(
                model, gathered, files, run_dir, cfg.model, cfg.max_length, tokenizer, trained, onto_original
            )
            write_card(run_dir)  # README.md of the export
            print(f"\nrun folder {run_dir}, exported weights {told}\n\n{verdict}")


if __name__ == "__main__":
    main(config.parse(METHOD, DEFAULTS))
