"""An interrupted run goes on as if nothing had been: the same numbers, bit for bit, and nothing lost."""

import fcntl
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    NF4_SIZES,
    ROOT,
    SHARDED_SIZES,
    from_first_step,
    random_pairs,
    run_config,
    run_recipe,
    save_llama,
    save_pairs,
)
from safetensors.torch import load_file

from pairtune.errors import UserError
from pairtune.folders.tensors import read_shard
from pairtune.process.dist import Interruption, World
from pairtune.run import checkpoints as checkpoints_on_disk
from pairtune.run import disk_space, marker, samples
from pairtune.run.checkpoints import Checkpoints
from pairtune.run.marker import is_complete, lacking
from pairtune.run.metrics import Meter, read_log
from pairtune.run.places import LOCK
from pairtune.run.resuming import find, read_values
from pairtune.run.state import TrainState

WORLD = World(torch.device("cpu"))
METHODS = ("full", "lora", "qlora")
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def write_inputs(folder, *, sizes=NF4_SIZES, dropout=True):
    """28 pairs in steps of 8: the fourth and last step of an epoch has 4; three epochs are 12 steps."""
    save_llama(folder / "base", sizes=sizes)
    save_pairs(folder / "train.jsonl", random_pairs(28, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(6, seed=2))
    cfg = run_config(
        folder,
        sizes=sizes,
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-3},
        batch_size=2,
        epochs=3,
        log_every_n_steps=2,
        eval_every_n_steps=3,
        samples={"num_prompts": 2, "max_new_tokens": 5},
        lora={"rank": 4, "alpha": 8, "dropout": 0.2},
        disable_dropout=not dropout,
        per_method={"lora": {"optimizer": {"lr": 2e-3}}, "qlora": {"optimizer": {"lr": 2e-3}}},
    )
    (folder / "config.yaml").write_text(json.dumps(cfg))


@pytest.fixture
def work(tmp_path):
    write_inputs(tmp_path)
    return tmp_path


def run(work, recipe, *overrides):
    return run_recipe(recipe, *overrides, config_paths=[work / "config.yaml"])


def interrupted(work, recipe, step, *overrides):
    """Runs until SIGTERM comes while a step is logged; every step is."""
    logger = f"metric_logger={{_component_: interrupting.Interrupt, step: {step}}}"
    with pytest.raises(SystemExit) as end:
        run(work, recipe, logger, *overrides)
    assert end.value.code == 143


def numbers(log):
    return [{key: value for key, value in row.items() if key not in SPEED} for row in log]


def exported(folder):
    return load_file(folder / "export" / "model.safetensors")


@pytest.mark.parametrize(("method", "step"), [("full", 6), ("lora", 2), ("lora", 6), ("lora", 8), ("qlora", 2)])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(work, method, step):
    """Step 2 is mid-epoch, 6 an evaluation that the signal forestalls, 8 the end of an epoch; dropout is on."""
    recipe = f"{method}_dpo_single_device"
    straight = run(work, recipe, f"output_dir={work / 'straight'}")
    interrupted(work, recipe, step)
    assert read_log(work / "run" / "metrics.jsonl")[-1]["step"] == step
    resumed = run(work, recipe, "resume=true")
    assert numbers(resumed) == numbers(straight)
    weights, expected = exported(work / "run"), exported(work / "straight")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    for name in ("samples.jsonl", "pairs.bin", "verdict.json"):
        assert (work / "run" / name).read_bytes() == (work / "straight" / name).read_bytes()


def test_any_checkpoint_of_a_run_can_be_branched_from(work):
    """Every step is saved, those between two logged ones and two evaluations included."""
    keep = ("save_every_n_steps=1", "keep_last_n=12")
    straight = run(work, "lora_dpo_single_device", f"output_dir={work / 'straight'}", *keep)
    expected = exported(work / "straight")
    for step in (1, 5, 9):
        source = work / "straight" / "checkpoints" / f"step_{step}"
        branch = work / f"branch-{step}"
        log = run(work, "lora_dpo_single_device", f"output_dir={branch}", f"resume={source}")
        assert numbers(log) == numbers(straight)
        assert all(torch.equal(value, expected[name]) for name, value in exported(branch).items())
        assert (branch / "samples.jsonl").read_text() == (work / "straight" / "samples.jsonl").read_text()


# On several processes


def tune_run(work, num_processes, method, *overrides):
    """A distributed run in processes of its own; returns its exit status and output."""
    command = [
        *(sys.executable, "-m", "pairtune.cli", "run", "--nproc_per_node", str(num_processes)),
        *(str(ROOT / "recipes" / f"{method}_dpo_distributed.py"), "--config", str(work / "config.yaml"), *overrides),
    ]
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """Runs of a method on 2 processes: straight, and interrupted after step 6; QLoRA with dropout."""
    work = tmp_path_factory.mktemp("two")
    write_inputs(work, sizes=SHARDED_SIZES, dropout=False)
    made = set()

    def runs(method):
        if method not in made:
            made.add(method)
            dropout = f"disable_dropout={str(method != 'qlora').lower()}"
            status, output = tune_run(work, 2, method, f"output_dir={work / method / 'straight'}", dropout)
            assert status == 0, output[-3000:]
            logger = "metric_logger={_component_: interrupting.Interrupt, step: 6}"
            status, output = tune_run(work, 2, method, f"output_dir={work / method / 'cut'}", logger, dropout)
            assert status == 143, output[-3000:]
            assert f"stopped after step 6 of 12; resume=true goes on from {work / method / 'cut'}" in output
            assert "Traceback" not in output
        return work / method

    return work, runs


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_resume_bit_for_bit(two_processes, method):
    work, runs = two_processes
    folder = runs(method)
    shutil.copytree(folder / "cut", folder / "resumed")
    dropout = f"disable_dropout={str(method != 'qlora').lower()}"
    status, output = tune_run(work, 2, method, f"output_dir={folder / 'resumed'}", "resume=true", dropout)
    assert status == 0, output[-3000:]
    log, straight = (read_log(folder / name / "metrics.jsonl") for name in ("resumed", "straight"))
    assert numbers(log) == numbers(straight)
    weights, expected = exported(folder / "resumed"), exported(folder / "straight")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("method", "num_processes", "setting"),
    [("full", 4, "data_parallel_replicate_dim=2"), ("lora", 1, "")],
)
def test_a_checkpoint_of_two_processes_goes_on_in_any_number(two_processes, method, num_processes, setting):
    work, runs = two_processes
    folder = runs(method)
    target = folder / f"on-{num_processes}"
    shutil.copytree(folder / "cut", target)
    status, output = tune_run(work, num_processes, method, f"output_dir={target}", "resume=true", *setting.split())
    assert status == 0, output[-3000:]
    log, straight = (read_log(path / "metrics.jsonl") for path in (target, folder / "straight"))
    assert [row["step"] for row in log] == [row["step"] for row in straight]
    for row, wanted in zip(log, straight, strict=True):
        for key in ("loss", "eval/loss"):
            if key in wanted:
                assert row[key] == pytest.approx(wanted[key], abs=1e-6)


def test_a_flipped_bit_in_the_other_processs_shard_ends_both_with_one_sentence(two_processes):
    work, runs = two_processes
    target = runs("lora").parent / "flipped"
    shutil.copytree(runs("lora") / "cut", target)
    (shard,) = (target / "checkpoints" / "step_6").glob("shard-00002-*")
    flipped(shard, 0.9)
    status, output = tune_run(work, 2, "lora", f"output_dir={target}", "resume=true")
    assert status == 2 and output.count("is damaged") == 1 and f"{shard} is damaged" in output, output[-3000:]


def test_a_single_device_recipe_goes_on_from_a_checkpoint_of_two_processes(two_processes):
    work, runs = two_processes
    folder = runs("lora")
    overrides = (f"output_dir={folder / 'alone'}", f"resume={folder / 'cut'}")
    log = run_recipe("lora_dpo_single_device", *overrides, config_paths=[work / "config.yaml"])
    losses, expected = (
        [r["loss"] for r in rows if "loss" in r] for rows in (log, read_log(folder / "straight" / "metrics.jsonl"))
    )
    assert losses == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", ["aot", "kto", "sigmoid"])
def test_a_signal_as_an_evaluation_begins_saves_and_loses_nothing(work, loss):
    """With a loss that looks at the whole of them, the held-out pairs' first pass is cut short."""
    recipe, settings = "lora_dpo_single_device", (f"loss={loss}", "log_every_n_steps=1", "epochs=2")
    straight = run(work, recipe, f"output_dir={work / 'straight'}", *settings)
    interrupted(work, recipe, 3, *settings)  # an evaluation is due
    assert checkpoints(work) == ["step_3"]
    assert sorted(row["step"] for row in read_log(work / "run" / "metrics.jsonl")) == [0, 1, 2, 3]
    assert numbers(run(work, recipe, "resume=true", *settings)) == numbers(straight)


def test_fp8_starts_at_ln_2_and_resumed_with_a_cache_is_the_uninterrupted_run_bit_for_bit(work):
    recipe, settings = "full_dpo_single_device", ("enable_fp8_training=true", "dtype=bf16", "epochs=1")
    straight = run(work, recipe, f"output_dir={work / 'straight'}", "log_every_n_steps=1", *settings)
    assert next(row["loss"] for row in straight if "loss" in row) == pytest.approx(math.log(2), abs=1e-6)
    cached = ("log_every_n_steps=1", "reference=cached", f"reference.cache_dir={work / 'cache'}", *settings)
    interrupted(work, recipe, 2, *cached)
    resumed = run(work, recipe, "resume=true", *cached)
    for row in straight:
        row.pop("eval/kl_per_token", None)  # which takes the reference's model, not its values
    assert numbers(resumed) == numbers(straight)
    weights, expected = exported(work / "run"), exported(work / "straight")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    plain = run(work, recipe, f"output_dir={work / 'plain'}", "log_every_n_steps=1", *settings[1:])
    assert [row.get("loss") for row in plain][2:] != [row.get("loss") for row in straight][2:]


# What is kept, and what is refused


def checkpoints(work, name="run"):
    return sorted(p.name for p in (work / name / "checkpoints").iterdir())


def test_the_newest_and_the_best_are_kept_and_the_best_can_be_exported(work):
    """Held-out pairs are turned round: the more a run learns, the worse it gets on them."""
    held_out = [json.loads(line) for line in (work / "held_out.jsonl").read_text().splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in held_out]
    (work / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turned))
    settings = ("keep_best=loss", "export_best=true", "save_every_n_steps=2", "keep_last_n=2")
    log = run(work, "lora_dpo_single_device", "eval_every_n_steps=1", *settings, "disable_dropout=true")
    evaluations = {row["step"]: row["eval/loss"] for row in log if "eval/loss" in row}
    best = min(evaluations, key=evaluations.get)
    assert best < 10
    assert set(checkpoints(work)) == {f"step_{best}", "step_10", "step_12"}
    again = run(
        work, "lora_dpo_single_device", f"output_dir={work / 'best'}", f"max_steps={best}", *settings,
        "disable_dropout=true", f"resume={work / 'run' / 'checkpoints' / f'step_{best}'}", "export_best=false",
    )  # fmt: skip
    assert again[-1]["step"] == best
    one, other = exported(work / "run"), exported(work / "best")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_to_resume_changes_nothing_in_the_checkpoint_that_it_goes_on_from(work):
    """Not when another metric is asked for by mistake, on a disk that has no room; a branch of the best keeps it."""
    recipe, settings = "lora_dpo_single_device", ("keep_best=loss", "eval_every_n_steps=null", "epochs=1")
    run(work, recipe, *settings)
    state = work / "run" / "checkpoints" / "step_4" / "state.json"
    before = state.read_text()
    assert json.loads(before)["best"]["step"] == 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(disk_space, "missing", lambda folder, sizes: (2**30 * bool(sizes["checkpoints"]), folder))
        run(work, recipe, "resume=true", "epochs=1", "eval_every_n_steps=null")
    assert json.loads(state.read_text())["best"]["step"] == 4
    run(work, recipe, *settings, f"resume={state.parent}", f"output_dir={work / 'branch'}")
    branch = json.loads((work / "branch" / "checkpoints" / "step_4" / "state.json").read_text())
    assert branch["best"] == json.loads(before)["best"]


def test_a_run_that_has_ended_goes_on_for_more_epochs(work):
    run(work, "full_dpo_single_device")
    log = run(work, "full_dpo_single_device", "resume=true", "epochs=4")
    assert log[-1]["step"] == 16
    schedule = [row["lr"] for row in log if row["step"] > 12 and "lr" in row]
    straight = run(work, "full_dpo_single_device", f"output_dir={work / 'straight'}", "epochs=4")
    assert schedule == [row["lr"] for row in straight if row["step"] > 12 and "lr" in row]


def test_a_checkpoint_holds_safetensors_and_json_and_nothing_is_pickled(work):
    interrupted(work, "lora_dpo_single_device", 4)
    (folder,) = (work / "run" / "checkpoints").iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["COMPLETE", "shard-00001-model-00001-of-00001.safetensors", "state.json"]
    json.loads((folder / "COMPLETE").read_text()), json.loads((folder / "state.json").read_text())
    saved = load_file(folder / names[1])
    trained = {name.removeprefix("model.") for name in saved if name.startswith("model.")}
    assert trained and all("lora_" in name for name in trained)
    assert {f"optimizer.{name}.{key}" for name in trained for key in ("step", "exp_avg", "exp_avg_sq")} <= saved.keys()


def test_a_half_written_checkpoint_is_never_taken(work):
    run(work, "lora_dpo_single_device", "save_every_n_steps=4", "keep_last_n=3")
    folder = work / "run" / "checkpoints"
    (folder / "step_12" / "COMPLETE").unlink()
    shard = next((folder / "step_8").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / ".step_16").mkdir()
    run(work, "lora_dpo_single_device", "resume=true", "save_every_n_steps=4", "keep_last_n=3")
    kept = (work / "run" / "console.log").read_text()
    assert f"{folder / 'step_12'} is not whole: it has no COMPLETE; {folder / 'step_4'} is taken instead\n" in kept
    assert checkpoints(work) == ["step_12", "step_4", "step_8"]


LOST = {  # of a checkpoint; and what is said of it
    "a shard": (
        lambda folder: (folder / "a.safetensors").unlink(),
        "a.safetensors is missing: it was moved or removed",
    ),
    "half a shard": (lambda folder: os.truncate(folder / "a.safetensors", 50), "a.safetensors has 50 bytes, 100 were"),
    "the state": (lambda folder: (folder / "state.json").unlink(), "state.json is missing: it was moved or removed"),
    "what the state holds": (lambda folder: os.truncate(folder / "state.json", 0), "state.json has 0 bytes, 16 were"),
    "the marker": (lambda folder: (folder / "COMPLETE").unlink(), "it has no COMPLETE"),
}


@pytest.mark.parametrize("resume", [True, "auto", "of another run", "a branch"])
@pytest.mark.parametrize("lost", LOST)
def test_a_checkpoint_that_lost_something_is_passed_over_aloud_and_only_for_one_that_is_whole(
    tmp_path, capsys, lost, resume
):
    lose, says = LOST[lost]
    run_dir = tmp_path / "run" if resume in (True, "auto", "a branch") else tmp_path / "branch"
    origin = tmp_path / "before" / "checkpoints" / "step_4"
    folders = [tmp_path / "run" / "checkpoints" / f"step_{step}" for step in (4, 8, 12)]
    for folder in (origin, *folders):
        folder.mkdir(parents=True)
        (folder / "a.safetensors").write_bytes(bytes(100))
        (folder / "state.json").write_text(
            json.dumps({"origin": str(origin)}) if resume == "a branch" else '{"origin": null}'
        )
        marker.write_marker(folder, {path.name: marker.digest_file(path) for path in folder.iterdir()})
    asked = {"of another run": str(tmp_path / "run"), "a branch": str(origin)}.get(resume, resume)
    says = says.replace("16 were", f"{(origin / 'state.json').stat().st_size} were")
    told = []
    for newest in (2, 1, 0):
        assert find(asked, run_dir) == folders[newest]
        assert capsys.readouterr().out == "".join(
            f"resume: {line}; {folders[newest]} is taken instead\n" for line in told
        )
        lose(folders[newest])
        told.append(f"{folders[newest]} is not whole: {lacking(folders[newest])}")
        assert says in told[-1]
    if resume == "a branch" or (resume == "auto" and lost == "the marker"):  # as a kill leaves a first one
        assert find(asked, run_dir) == (origin if resume == "a branch" else None)
        taken = f"{origin} is taken instead" if resume == "a branch" else "the run starts anew"
        assert f"{told[0]}; {taken}\n" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="holds no complete") as refusal:
            find(asked, run_dir)
        assert all(line in str(refusal.value) for line in told)


def flipped(path, place):
    """Turns one bit of a file, at a place from 0 to 1 in it; returns what it was."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[min(int(place * len(before)), len(before) - 1)] ^= 1
    path.write_bytes(changed)
    return before


@pytest.mark.parametrize("name", ["shard-00001-model-00001-of-00001.safetensors", "state.json", "COMPLETE"])
def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_refused_by_the_files_name(work, name):
    interrupted(work, "lora_dpo_single_device", 4)
    folder = work / "run" / "checkpoints" / "step_4"
    for resume in (True, "auto", str(folder), str(work / "run")):
        for place in (0, 0.001, 0.02, 0.3, 0.5, 0.77, 0.999, 1):
            before = flipped(folder / name, place)
            with pytest.raises(UserError, match=f"{name} is damaged: .*remove .* to go on from the|{name} cannot be"):
                read_values(find(resume, work / "run" if resume in (True, "auto") else work / "branch"), WORLD)
            (folder / name).write_bytes(before)
    flipped(folder / name, 0.6)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        run(work, "lora_dpo_single_device", "resume=true")
    (folder / name).write_bytes(before)
    (shard,) = folder.glob("*.safetensors")
    (folder / "COMPLETE").write_text(json.dumps({shard.name: shard.stat().st_size}))  # of an earlier version
    assert run(work, "lora_dpo_single_device", "resume=true")[-1]["step"] == 12


def test_what_was_moved_is_missing_and_not_damaged(work):
    interrupted(work, "lora_dpo_single_device", 4)
    folder = work / "run" / "checkpoints" / "step_4"
    (shard,) = folder.glob("*.safetensors")
    shard.rename(work / "shard")
    says = f"{shard.name} is missing: it was moved or removed"
    for resume in (True, str(folder)):
        with pytest.raises(UserError, match=says):
            find(resume, work / "run")
    with pytest.raises(UserError, match=f"{says}; remove that folder"):
        read_values(folder, WORLD)
    with pytest.raises(UserError, match="step_9: there is no such folder; it was moved, or is called otherwise"):
        find(str(folder.with_name("step_9")), work / "other")
    with pytest.raises(UserError, match="model.safetensors: is missing: it was moved or removed since it was found"):
        read_shard(work / "base" / "moved" / "model.safetensors")


def test_a_best_checkpoint_that_was_damaged_meanwhile_is_not_exported(work, monkeypatch):
    settings = ("keep_best=loss", "eval_every_n_steps=4", "epochs=1", "samples.num_prompts=0")
    run(work, "lora_dpo_single_device", *settings)
    flipped(next((work / "run" / "checkpoints" / "step_4").glob("*.safetensors")), 0.5)
    saved = Checkpoints(work / "run", WORLD, keep_last_n=1)
    with pytest.raises(UserError, match="damaged: .*; resume=true export_best=false exports the last weights"):
        saved.load_best(SimpleNamespace(best={"step": 4, "metric": "loss", "value": 0.5}))


@pytest.mark.parametrize("written", [0, 1, 2, 3])
def test_a_kill_while_an_evaluation_is_noted_leaves_the_checkpoint_whole(tmp_path, monkeypatch, written):
    """state.json is replaced between two writes of the marker: a kill before any of the three, and behind all."""
    (tmp_path / "state.json").write_text('{"evaluated": 0}')
    (tmp_path / "a.safetensors").write_bytes(bytes(100))
    marker.write_marker(tmp_path, {path.name: marker.digest_file(path) for path in tmp_path.iterdir()})
    write, left = marker.write_text, iter([*[True] * written, False])

    def killed(*args, **options):
        if not next(left):
            raise KeyboardInterrupt
        write(*args, **options)

    monkeypatch.setattr(marker, "write_text", killed)
    with suppress(KeyboardInterrupt):
        marker.replace_file(tmp_path, "state.json", '{"evaluated": 12345}')
    assert is_complete(tmp_path) and read_values(tmp_path, WORLD)["evaluated"] == (12345 if written > 1 else 0)
    monkeypatch.setattr(marker, "write_text", write)
    marker.replace_file(tmp_path, "state.json", '{"evaluated": 6}')
    assert read_values(tmp_path, WORLD)["evaluated"] == 6
    flipped(tmp_path / "state.json", 0.99)
    with pytest.raises(UserError, match="state.json"):
        read_values(tmp_path, WORLD)


def test_resume_true_needs_a_checkpoint_and_auto_does_not(work):
    with pytest.raises(
        UserError, match="resume=true: .*run/checkpoints holds no complete one; resume=auto starts anew"
    ):
        run(work, "lora_dpo_single_device", "resume=true")
    log = run(work, "lora_dpo_single_device", "resume=auto", "max_steps=2")
    assert log[-1]["step"] == 2


def test_going_back_in_a_run_that_went_on_is_refused(work):
    run(work, "lora_dpo_single_device", "save_every_n_steps=4", "keep_last_n=3")
    with pytest.raises(UserError, match="this run went on to step_12, which would be overwritten; resume=true goes on"):
        run(work, "lora_dpo_single_device", f"resume={work / 'run' / 'checkpoints' / 'step_4'}")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("loss.beta=0.2", "loss.beta: 0.1 then, 0.2 now"),
        ("optimizer.lr=0.5", "optimizer.lr: 0.002 then, 0.5 now"),
        ("seed=7", "seed: 42 then, 7 now"),
        ("lora.rank=8", "lora.rank: 4 then, 8 now"),
        ("lr_scheduler=null", "lr_scheduler: {_component_: pairtune.schedules.cosine, warmup_ratio: 0.1} then, null"),
        ("dataset.limit=20", "training pairs: 28 then, 20 now\n  dataset.limit: null then, 20 now"),
        ("tokenizer.chat_template='{{ bos_token }}{% for m in messages %}{{ m.content }} w9 {% endfor %}'",
         "training pairs: as many, but not the same or not so tokenized; first from row 0"),
    ],
)  # fmt: skip
def test_another_run_is_refused_with_the_difference(work, setting, words):
    interrupted(work, "lora_dpo_single_device", 4)
    with pytest.raises(UserError) as refusal:
        run(work, "lora_dpo_single_device", "resume=true", setting)
    assert words in str(refusal.value) and "belongs to another run" in str(refusal.value)
    assert run(work, "lora_dpo_single_device", "resume=true")[-1]["step"] == 12  # nothing was spoiled


def test_a_resumed_stream_is_the_uninterrupted_one_bit_for_bit_and_no_other_is_taken(work, capsys):
    """In steps of 8 of a source of 28 rows: stopped within its second pass."""
    stream = ("samples.num_prompts=0", "epochs=1", "max_steps=6", "dataset.streaming=true", "dataset.shuffle_buffer=20")
    straight = run(work, "lora_dpo_single_device", f"output_dir={work / 'straight'}", *stream)
    interrupted(work, "lora_dpo_single_device", 4, *stream)
    for other in ("dataset.shuffle_buffer=21", "dataset.limit=27"):
        with pytest.raises(UserError, match="another stream"):
            run(work, "lora_dpo_single_device", "resume=true", *stream, other)
    capsys.readouterr()
    assert numbers(run(work, "lora_dpo_single_device", "resume=true", *stream)) == numbers(straight)
    assert "Streamed: " in capsys.readouterr().out and straight[-2]["rows/read"] == 48
    weights, expected = exported(work / "run"), exported(work / "straight")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert (work / "run" / "pairs.bin").read_bytes() == (work / "straight" / "pairs.bin").read_bytes()


def test_weights_and_margins_are_resumed_with_their_pairs_and_do_not_mind_a_cached_reference(work):
    rows = [json.loads(line) for line in (work / "train.jsonl").read_text().splitlines()]
    rows = [row | {"w": 0.5 + i % 3, "m": 0.3 * (i % 2)} for i, row in enumerate(rows)]
    (work / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    method, columns = "lora_dpo_single_device", "dataset.columns={weight: w, margin: m}"
    how = ("loss=sigmoid", "max_steps=3", "disable_dropout=true", f"reference.cache_dir={work / 'cache'}")
    how = (*how, "reference=cached", "log_every_n_steps=1", "samples.num_prompts=0")
    straight = run(work, method, f"output_dir={work / 'straight'}", columns, *how)
    interrupted(work, method, 2, columns, *how)
    with pytest.raises(UserError, match="training pairs: as many, but not the same"):
        run(work, method, "resume=true", "dataset.columns={weight: w}", *how)
    assert numbers(run(work, method, "resume=true", columns, *how)) == numbers(straight)
    weights, expected = exported(work / "run"), exported(work / "straight")
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    live = run(work, method, f"output_dir={work / 'live'}", columns, *how[:3], *how[-2:])
    assert [row["loss"] for row in live if "loss" in row] == pytest.approx(
        [row["loss"] for row in straight if "loss" in row], abs=1e-5
    )


def test_changed_pairs_and_base_weights_are_refused(work):
    interrupted(work, "lora_dpo_single_device", 4)
    train = work / "train.jsonl"
    lines = train.read_text().splitlines()
    train.write_text("\n".join([*lines[:20], lines[20].replace('" w', '" w9 w', 1), *lines[21:]]) + "\n")
    with pytest.raises(UserError, match="not the same or not so tokenized; first from row 20"):
        run(work, "lora_dpo_single_device", "resume=true")
    train.write_text("\n".join(lines) + "\n")
    save_llama(work / "base", seed=1)
    with pytest.raises(UserError, match="base weights: not the same in model.safetensors"):
        run(work, "lora_dpo_single_device", "resume=true")


def test_harmless_changes_are_allowed_and_listed(work, capsys):
    interrupted(work, "lora_dpo_single_device", 4)
    shutil.move(work / "train.jsonl", work / "moved.jsonl")
    capsys.readouterr()
    changes = ("log_every_n_steps=1", "epochs=4", "batch_size=4", f"dataset.source={work / 'moved.jsonl'}")
    assert run(work, "lora_dpo_single_device", "resume=true", *changes)[-1]["step"] == 16
    told = capsys.readouterr().out
    for line in (
        "log_every_n_steps: 2 then, 1 now",
        "epochs: 3 then, 4 now",
        "batch_size: 2 then, 4 now",
        "dataset.source",
    ):
        assert f"  changed: {line}" in told
    kept = (work / "run" / "console.log").read_text()
    first, second = kept.split("\n# 2")  # each run's begin with its day and its command
    assert "stopped after step 4 of 12" in first and told.removesuffix("\n") in second


def test_what_a_resumed_qlora_run_is_merged_into_may_change(work, capsys):
    interrupted(work, "qlora_dpo_single_device", 10)
    run(work, "qlora_dpo_single_device", "resume=true", "merge_into=dequantized")
    assert "  changed: merge_into: original then, dequantized now" in capsys.readouterr().out


# The disk


def test_a_disk_without_room_is_told_before_the_first_step_with_what_is_missing(work, monkeypatch):
    usage = shutil.disk_usage(work)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    said = r"has 2.\d+ MiB less than the run takes: 0.25 MiB a checkpoint \(keep_last_n=1, and one while"
    with pytest.raises(UserError, match=said):
        run(work, "lora_dpo_single_device")
    assert read_log(work / "run" / "metrics.jsonl") == []


def test_a_save_that_fails_leaves_the_earlier_ones_and_training_goes_on_if_asked(work):
    """No file may be longer than a limit that metrics fit in and weights do not: the disk says so, half-way through."""
    interrupted(work, "lora_dpo_single_device", 4)
    gc.collect()  # the error that ended it here keeps its hold on the folder
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
        "from pairtune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    recipe = str(ROOT / "recipes" / "lora_dpo_single_device.py")
    command = [sys.executable, "-c", code, "run", recipe, "--config", str(work / "config.yaml"), "resume=true"]
    limited = {"text": True, "capture_output": True, "timeout": 200}
    stopped = subprocess.run([*command, "save_every_n_steps=2"], **limited)
    assert stopped.returncode == 2
    assert "no checkpoint: OSError: [Errno 27] File too large" in stopped.stderr
    assert checkpoints(work) == ["step_4"] and is_complete(work / "run" / "checkpoints" / "step_4")
    went_on = subprocess.run([*command, "on_save_failure=continue", "max_steps=8"], **limited)
    assert "Training goes on (on_save_failure=continue)" in went_on.stdout
    assert read_log(work / "run" / "metrics.jsonl")[-1]["step"] == 8  # and then the export is too long for the limit
    assert checkpoints(work) == ["step_4"]


def test_a_second_ctrl_c_ends_at_once(work):
    """SIGINT is noted first; another, more than a second later, is the interrupt that Python knows."""
    world = World(torch.device("cpu"))
    interruption = Interruption(world)
    try:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun's, of the same Ctrl-C
        assert interruption.requested() and interruption.status == 130
        interruption._since -= 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        interruption.end()


@pytest.mark.parametrize("ignored", [False, True])
def test_a_hangup_is_a_signal_to_stop_unless_it_was_ignored_from_the_start(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    interruption = Interruption(World(torch.device("cpu")))
    try:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # a shell's, and the terminal's own
        assert interruption.requested() != ignored
        assert ignored or interruption.status == 129
    finally:
        interruption.end()
        signal.signal(signal.SIGHUP, before)


# Killed


@pytest.mark.parametrize(("processes", "kills", "pairs"), [(1, 2, []), (2, 1, ["--stream"])])
def test_runs_that_are_killed_at_random_end_as_if_they_had_been_left_alone(processes, kills, pairs):
    script = str(ROOT / "tests" / "kill_runs.py")
    command = [sys.executable, script, "--kills", str(kills), "--processes", str(processes), *pairs]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kill" in done.stdout and "0 losses" in done.stdout


# What a review found


def test_a_made_up_evaluation_is_made_up_once(work):
    """Stopped before the evaluation of step 6; stopped again at step 8 after that was made up; then to the end."""
    straight = run(work, "lora_dpo_single_device", f"output_dir={work / 'straight'}")
    interrupted(work, "lora_dpo_single_device", 6)
    assert "eval/loss" not in read_log(work / "run" / "metrics.jsonl")[-1]
    interrupted(work, "lora_dpo_single_device", 8, "resume=true", "save_every_n_steps=100")
    shutil.rmtree(work / "run" / "checkpoints" / "step_8")  # as if it had been killed before it was saved
    log = work / "run" / "metrics.jsonl"
    assert [row["step"] for row in read_log(log) if "eval/loss" in row] == [0, 3, 6]
    with pytest.raises(UserError, match="resume=true: .* holds no complete one"):  # keep_last_n=1: step 6 was pruned
        run(work, "lora_dpo_single_device", "resume=true")
    assert numbers(from_first_step(log)) == numbers(straight)[: len(from_first_step(log))]


def test_a_run_killed_after_a_made_up_evaluation_has_it_once(work):
    straight = run(work, "lora_dpo_single_device", f"output_dir={work / 'straight'}")
    interrupted(work, "lora_dpo_single_device", 6)
    shutil.copytree(work / "run", work / "copy")
    interrupted(work, "lora_dpo_single_device", 8, "resume=true")
    # A kill right after the made-up evaluation: its line is there, and the checkpoint does not know of it.
    made_up = next(r for r in read_log(work / "run" / "metrics.jsonl") if r["step"] == 6 and "eval/loss" in r)
    with (work / "copy" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(made_up) + "\n")
    assert numbers(run(work, "lora_dpo_single_device", f"output_dir={work / 'copy'}", "resume=true")) == numbers(
        straight
    )


def test_the_final_evaluation_is_made_up_too(work):
    straight = run(work, "lora_dpo_single_device", f"output_dir={work / 'straight'}", "log_every_n_steps=1")
    interrupted(work, "lora_dpo_single_device", 12, "log_every_n_steps=1")
    assert not (work / "run" / "export").exists()
    log = run(work, "lora_dpo_single_device", "resume=true", "log_every_n_steps=1")
    assert numbers(log) == numbers(straight) and (work / "run" / "export").exists()


def test_a_best_checkpoint_that_is_not_there_is_forgotten(work):
    """In a branch, by another metric, with other held-out pairs: the weights that are exported are the last ones."""
    settings = ("save_every_n_steps=3", "keep_last_n=4", "keep_best=loss")
    run(work, "lora_dpo_single_device", *settings, "disable_dropout=true")
    source = work / "run" / "checkpoints" / "step_12"
    branch = (f"output_dir={work / 'branch'}", f"resume={source}", "export_best=true", "disable_dropout=true")
    run(work, "lora_dpo_single_device", *settings, *branch)
    one, other = exported(work / "branch"), exported(work / "run")
    assert all(torch.equal(one[name], other[name]) for name in one)
    settings = ("keep_best=rewards/margins", "epochs=4", "save_every_n_steps=100", "disable_dropout=true")
    log = run(work, "lora_dpo_single_device", "resume=true", *settings)
    margins = {row["step"]: row["eval/rewards/margins"] for row in log if row["step"] >= 12 and "eval/loss" in row}
    best = read_values(work / "run" / "checkpoints" / "step_16")["best"]
    assert best == {"step": max(margins, key=margins.get), "metric": "rewards/margins", "value": max(margins.values())}


def test_another_metric_of_the_best_keeps_what_was_evaluated_before(work, capsys):
    """The last step is looked at once more; it counts once for early_stop, and is the best by the new metric."""
    every = ("eval_every_n_steps=4", "disable_dropout=true")
    before = run(work, "lora_dpo_single_device", *every, "keep_best=loss")
    pairs, counted = (work / "run" / "pairs.bin").read_bytes(), read_values(work / "run" / "checkpoints" / "step_12")
    settings = ("resume=true", "keep_best=rewards/margins", "export_best=true")
    after = run(work, "lora_dpo_single_device", *every, *settings)
    assert numbers(after) == numbers(before) and (work / "run" / "pairs.bin").read_bytes() == pairs
    found = read_values(work / "run" / "checkpoints" / "step_12")
    value = [row["eval/rewards/margins"] for row in after if "eval/loss" in row][-1]
    assert found["best"] == {"step": 12, "metric": "rewards/margins", "value": value}
    assert (found["lowest"], found["num_worse"]) == (counted["lowest"], counted["num_worse"])
    assert "the best by the held-out rewards/margins" in capsys.readouterr().out


def test_the_best_stays_where_the_save_of_a_better_one_failed_and_so_do_folders_of_others(tmp_path):
    folders = tmp_path / "checkpoints"
    for step in (5, 30):
        (folders / f"step_{step}").mkdir(parents=True)
        marker.write_marker(folders / f"step_{step}", {})
    for name in ("step_8_of_mine", "step_9", ".step_31"):
        (folders / name).mkdir()
    saved = Checkpoints(tmp_path, WORLD, 1, "loss", best={"step": 5})
    saved._prune({"step": 20})
    assert checkpoints(tmp_path, "") == ["step_30", "step_5", "step_8_of_mine"]


def test_bytes_are_counted_while_they_are_digested_and_while_files_go(tmp_path, monkeypatch):
    monkeypatch.setattr(marker, "PART_BYTES", 1000)
    (tmp_path / "weights").write_bytes(bytes(range(250)) * 10)
    counted = []
    assert marker.digest_file(tmp_path / "weights", counted.append) == marker.digest(bytes(range(250)) * 10)
    assert counted == [1000, 1000, 500]
    (tmp_path / "renamed").symlink_to(tmp_path / "gone")  # listed, and not there any more
    assert checkpoints_on_disk._size(tmp_path) == 2500 and checkpoints_on_disk._size(tmp_path / "gone") == 0


SYNC = """
import sys
from pathlib import Path
from pairtune.process import dist
from pairtune.run.checkpoints import Checkpoints
world = dist.connect(dist.start("cpu"))
try:
    Checkpoints(Path(sys.argv[1]), world, 1)._sync_files(Path(sys.argv[1]))
except OSError as error:
    (Path(sys.argv[1]) / f"said_{world.rank}").write_text(str(error))
dist.stop(world)
"""


def test_what_one_process_cannot_sync_is_told_by_all(tmp_path):
    (tmp_path / "shard-00001-a.safetensors").write_bytes(b"whole")
    (tmp_path / "shard-00002-a.safetensors").mkdir()  # no file that could be read
    (tmp_path / "worker.py").write_text(SYNC)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(tmp_path / "worker.py"), str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [(tmp_path / f"said_{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1] and said[0].startswith("process 1: IsADirectoryError")


def test_a_branch_that_is_started_again_goes_on(work):
    run(work, "lora_dpo_single_device", "save_every_n_steps=4", "keep_last_n=3")
    branch = (f"output_dir={work / 'branch'}", f"resume={work / 'run' / 'checkpoints' / 'step_4'}")
    interrupted(work, "lora_dpo_single_device", 8, *branch)
    run(work, "lora_dpo_single_device", *branch)
    assert not (work / "branch.1").exists()
    assert numbers(read_log(work / "branch" / "metrics.jsonl")) == numbers(read_log(work / "run" / "metrics.jsonl"))


def test_checkpoints_of_an_earlier_run_are_moved_aside_with_it(work):
    run(work, "lora_dpo_single_device")
    (work / "run" / "metrics.jsonl").unlink()
    run(work, "lora_dpo_single_device", "seed=1", "max_steps=4")
    assert checkpoints(work) == ["step_4"] and checkpoints(work, "run.1") == ["step_12"]


def test_a_folder_that_another_run_writes_to_is_refused(work):
    run(work, "lora_dpo_single_device", "max_steps=2")
    with (work / "run" / LOCK).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for setting in ("resume=true", "resume=false"):
            with pytest.raises(UserError, match="another run is writing there"):
                run(work, "lora_dpo_single_device", setting)


def test_an_end_before_the_checkpoint_is_refused(work):
    run(work, "lora_dpo_single_device")
    with pytest.raises(UserError, match="is after step 12, and this run ends with step 5: raise epochs or max_steps"):
        run(work, "lora_dpo_single_device", "resume=true", "max_steps=5")


def test_a_key_that_the_checkpoint_does_not_know_is_allowed_and_told(work, capsys):
    interrupted(work, "lora_dpo_single_device", 4)
    path = work / "run" / "checkpoints" / "step_4" / "state.json"
    values = json.loads(path.read_text())
    del values["fingerprint"]["config"]["shuffle"]
    marker.replace_file(path.parent, path.name, json.dumps(values))
    run(work, "lora_dpo_single_device", "resume=true")
    assert "  changed: shuffle: null then, true now" in capsys.readouterr().out


def test_a_checkpoint_of_a_loss_under_its_earlier_path_goes_on(work):
    interrupted(work, "lora_dpo_single_device", 4, "loss=sigmoid", "loss.beta=0.2")
    path = work / "run" / "checkpoints" / "step_4" / "state.json"
    text = path.read_text()
    assert "pairtune.losses.Sigmoid" in text
    earlier = text.replace("pairtune.losses.Sigmoid", "pairtune.preference_losses.sigmoid")
    marker.replace_file(path.parent, path.name, earlier)
    with pytest.raises(UserError, match="loss.beta: 0.2 then, 0.3 now"):
        run(work, "lora_dpo_single_device", "loss=sigmoid", "loss.beta=0.3", "resume=true")
    run(work, "lora_dpo_single_device", "loss=sigmoid", "loss.beta=0.2", "resume=true")


def test_texts_with_any_line_separator_survive(work):
    prompts = ["one\u2028two", "three\x85four"]
    samples.write_samples(work / "samples.jsonl", prompts, ["a\u2029b", "c"])
    assert samples.answers_before(work / "samples.jsonl", prompts) == ["a\u2029b", "c"]
    samples.write_samples(work / "samples.jsonl", prompts, ["a\u2029b", "c"], ["d", "e"])
    samples.show_samples(work / "samples.jsonl")


def test_a_signal_that_comes_while_processes_agree_is_not_lost():
    """The handler runs when the collective returns, before its result is stored."""
    interruption = Interruption(World(torch.device("cpu")))
    try:
        agree = interruption._world.max_number

        class Late(World):
            def max_number(self, number):
                agreed = agree(number)
                signal.raise_signal(signal.SIGTERM)
                return agreed

        interruption._world = Late(torch.device("cpu"))
        assert not interruption.requested()
        assert interruption.requested()
    finally:
        interruption.end()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop, torch.optim.Adafactor, torch.optim.SGD]
)
def test_any_optimizers_state_comes_back_in_its_own_dtype(tmp_path, kind, dtype):
    """NAdam keeps a float32 product beside bf16 weights, which torch would round when it loads."""

    def make():
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 5).to(dtype)
        optimizer = kind(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20, cycle_momentum=False)
        identity = {"held_out": {}, "config": {"epochs": 1, "max_steps": None}}
        state = TrainState(model, optimizer, schedule, Meter(), world=WORLD, fingerprint=identity)
        return model, optimizer, schedule, state

    def train(model, optimizer, schedule, steps):
        for _ in range(steps):
            model(torch.arange(6.0).to(dtype)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    model, optimizer, schedule, state = make()
    train(model, optimizer, schedule, 4)
    state.step = 4
    keeping = Checkpoints(tmp_path, WORLD, keep_last_n=1)
    keeping.save(state)
    train(model, optimizer, schedule, 5)  # while the copy is written
    keeping.close()
    again, optimizer_again, schedule_again, state_again = make()
    state_again.load(tmp_path / "checkpoints" / "step_4", tmp_path)
    train(again, optimizer_again, schedule_again, 5)
    assert torch.equal(again.weight, model.weight) and torch.equal(again.bias, model.bias)
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[p].items():
            found = optimizer_again.state[q][key]
            assert found.dtype == value.dtype and torch.equal(found, value), key


def test_a_schedule_that_json_does_not_give_back_is_refused_before_training():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 4])
    with pytest.raises(UserError, match="lr_scheduler: its state cannot be saved as JSON"):
        TrainState(model, optimizer, schedule, Meter(), world=WORLD, fingerprint={})


def test_a_disk_that_answers_with_an_error_loses_no_checkpoint(work, monkeypatch):
    """A stale file handle is not a missing marker."""
    run(work, "lora_dpo_single_device")
    read_text = Path.read_text

    def stale(self, *args, **kwargs):
        if self.name == "COMPLETE":
            raise OSError(116, "Stale file handle")
        return read_text(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", stale)
    with pytest.raises(OSError, match="Stale"):
        run(work, "lora_dpo_single_device", "resume=auto")
    monkeypatch.undo()
    assert checkpoints(work) == ["step_12"]
