"""An interrupted run goes on as if nothing had been: the same numbers, bit for bit, and nothing lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import NF4_SIZES, ROOT, SHARDED_SIZES, random_pairs, run_recipe, save_llama, save_pairs
from safetensors.torch import load_file

from pairtune.metrics import read_log

METHODS = ("full", "lora", "qlora")
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


def write_inputs(folder, *, sizes=NF4_SIZES, dropout=True):
    """28 pairs in steps of 8: the fourth and last step of an epoch has 4; three epochs are 12 steps."""
    save_llama(folder / "base", sizes=sizes)
    save_pairs(folder / "train.jsonl", random_pairs(28, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(6, seed=2))
    cfg = {
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "model": {"_component_": "torchtune.models.llama3.llama3", **sizes},
        "checkpointer": {"checkpoint_dir": str(folder / "base"), "model_type": "LLAMA3"},
        "dataset": {"source": str(folder / "train.jsonl")},
        "eval_dataset": {"source": str(folder / "held_out.jsonl")},
        "max_length": 96,
        "max_prompt_length": 64,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "pairs_per_step": 8,
        "batch_size": 2,
        "epochs": 3,
        "log_every_n_steps": 2,
        "eval_every_n_steps": 3,
        "samples": {"num_prompts": 2, "max_new_tokens": 5},
        "lora": {"rank": 4, "alpha": 8, "dropout": 0.2},
        "disable_dropout": not dropout,
        "per_method": {"lora": {"optimizer": {"lr": 2e-3}}, "qlora": {"optimizer": {"lr": 2e-3}}},
        "collective_timeout_s": 60,
    }
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
    return load_file(folder / "export" / "model-00001-of-00001.safetensors")


@pytest.mark.parametrize("step", [2, 6, 8])
@pytest.mark.parametrize("method", METHODS)
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
    samples = [(work / name / "samples.jsonl").read_text() for name in ("run", "straight")]
    assert samples[0] == samples[1]


def test_any_checkpoint_of_a_run_can_be_branched_from(work):
    """Every step is saved, those between two logged ones and two evaluations included."""
    keep = ("save_every_n_steps=1", "keep_last_n=12")
    straight = run(work, "lora_dpo_single_device", f"output_dir={work / 'straight'}", *keep)
    expected = exported(work / "straight")
    for step in (1, 3, 5, 9, 12):
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
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=300)
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
    [("full", 1, ""), ("full", 4, "data_parallel_replicate_dim=2"), ("lora", 1, ""), ("lora", 4, "")],
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


def test_a_single_device_recipe_goes_on_from_a_checkpoint_of_two_processes(two_processes):
    work, runs = two_processes
    folder = runs("lora")
    overrides = (f"output_dir={folder / 'alone'}", f"resume={folder / 'cut'}")
    log = run_recipe("lora_dpo_single_device", *overrides, config_paths=[work / "config.yaml"])
    losses, expected = (
        [r["loss"] for r in rows if "loss" in r] for rows in (log, read_log(folder / "straight" / "metrics.jsonl"))
    )
    assert losses == pytest.approx(expected, abs=1e-6)
