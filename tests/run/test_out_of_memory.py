"""A run that does not fit takes the next smaller choice of `auto`, and gives the numbers of a run that named it."""

import subprocess
import sys

import pytest
import torch
import yaml
from helpers import (
    ENVIRONMENT,
    ROOT,
    SHARDED_SIZES,
    SIZES,
    random_pairs,
    run_config,
    run_recipe,
    save_llama,
    save_pairs,
)
from torchtune.models.llama3 import llama3

from pairtune import models
from pairtune.errors import UserError
from pairtune.models.execution import SELECTIVE
from pairtune.run import choosing
from pairtune.run.choosing import GIB
from pairtune.run.memory import Setting
from pairtune.run.metrics import read_log

NARROW = '''
import os

import torch
from torchtune.models.llama3 import llama3


def narrow(**sizes):
    """A Llama that has room for so many tokens at a time, in one process of several."""
    model = llama3(**sizes)
    model.layers[-1].mlp.register_forward_pre_hook(run_out)
    return model


def run_out(layer, inputs):
    tokens = inputs[0].shape[0] * inputs[0].shape[1]
    if tokens > TOKENS and not inputs[0].is_meta and os.environ.get("RANK", "1") == "1":
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {tokens} GiB.")
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A model with room for two of the longest pairs, which have 100 tokens."""
    work = tmp_path_factory.mktemp("work")
    save_llama(work / "base", sizes=SHARDED_SIZES)
    save_pairs(work / "train.jsonl", random_pairs(16, prompt=(39, 39), answer=(28, 28), shared=(0, 0)))
    save_pairs(work / "held_out.jsonl", random_pairs(4, seed=2))
    (work / "narrow.py").write_text(NARROW.replace("TOKENS", "210"))
    model = {**SHARDED_SIZES, "_component_": "narrow.narrow"}
    cfg = run_config(work, sizes=SHARDED_SIZES, samples={"num_prompts": 0}, model=model, max_steps=2)
    (work / "config.yaml").write_text(yaml.safe_dump(cfg))
    return work


@pytest.fixture(scope="module")
def named(work):
    """The log of a run that names the smaller choice."""
    overrides = [f"output_dir={work / 'named'}", "batch_size=2", "model._component_=torchtune.models.llama3.llama3"]
    return run_recipe("lora_dpo_single_device", *overrides, config_paths=[work / "config.yaml"])


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_ends_with_the_next_smaller_choice_and_the_numbers_of_a_run_that_named_it(work, named, processes):
    kind, folder = ("single_device", "distributed")[processes - 1], work / f"run-{processes}"
    done = subprocess.run(
        [sys.executable, "-m", "pairtune.cli", "run", *["--nproc_per_node", str(processes)] * (processes > 1),
         str(ROOT / "recipes" / f"lora_dpo_{kind}.py"), "--config", "config.yaml", f"output_dir={folder}"],
        cwd=work, env=ENVIRONMENT, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    tried = "attention=segments compile=false enable_activation_checkpointing=false batch_size="
    told = (folder / "console.log").read_text()
    assert f"at {tried}4: starting again with less" in done.stdout
    assert f"auto: {tried}2: " in told and f"; {tried}4 ran out of memory" in told
    assert not (work / f"run-{processes}.1").exists()
    assert yaml.safe_load((folder / "config.yaml").read_text())["batch_size"] == 2
    logs = read_log(folder / "metrics.jsonl"), named
    losses, wanted = ([row["loss"] for row in rows if "loss" in row] for rows in logs)
    assert losses == wanted if processes == 1 else losses == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize(
    ("device", "asked", "order"),
    [
        ("cpu", {}, [(False, 4), (False, 2), (False, 1), (True, 2), (True, 1)]),
        ("cpu", {"batch_size": 2}, [(False, 2), (True, 2)]),
        ("cpu", {"enable_activation_checkpointing": False}, [(False, 4), (False, 2), (False, 1)]),
        ("cpu", {"batch_size": 4, "enable_activation_checkpointing": False}, [(False, 4)]),
        (
            "cuda",
            {"compile": True},
            [(False, 8), (False, 4), (SELECTIVE, 6), (True, 8), (True, 4), (True, 2), (True, 1)],
        ),
        ("cuda", {"compile": True, "batch_size": 8}, [(False, 8), (SELECTIVE, 8), (True, 8)]),
    ],
)
def test_each_choice_that_runs_out_is_followed_by_the_next_smaller_one(device, asked, order):
    """Until nothing that the config leaves to auto makes it smaller; what it names is never changed."""
    with torch.device("meta"):
        model = llama3(**SIZES | {"max_seq_len": 1024})
    models.fit(model, max_length=1024)
    pair = random_pairs(1, prompt=(511, 511), answer=(254, 254), shared=(0, 0))[0]  # 1,024 tokens
    work = choosing.Work(pair, 1024, 64)
    adamw = {"_component_": "torch.optim.AdamW", "lr": 1e-5}
    asked, ran_out, tried = dict.fromkeys(choosing.KEYS, "auto") | asked, None, []
    while True:
        memory = 80 * GIB if device == "cuda" else None
        chosen = choosing.choose(asked, work, model, None, adamw, Setting(device=device), memory, ran_out)
        assert all(chosen.keys[key] == value for key, value in asked.items() if value != "auto")
        tried.append((chosen.execution.checkpointing, chosen.batch_size))
        if not chosen.has_smaller:
            break
        ran_out = chosen.note | {"way_out": "no more"}
    assert tried == order
    with pytest.raises(UserError, match="no more"):
        choosing.choose(
            asked, work, model, None, adamw, Setting(device=device), memory, chosen.note | {"way_out": "no more"}
        )
