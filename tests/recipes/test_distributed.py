"""Many processes give the numbers of one, hold a part each, send what the formula says, and end together.

Processes are real: torchrun starts them, gloo connects them, on the CPU.
"""

import json
import math
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import (
    ENVIRONMENT,
    ROOT,
    SHARDED_SIZES,
    from_first_step,
    random_pairs,
    run_recipe,
    save_llama,
    save_pairs,
    tiny_llama,
)
from safetensors.torch import load_file

from pairtune.pairs.steps import Steps, share
from pairtune.process.dist import World
from pairtune.run import pair_log
from pairtune.run.metrics import read_log
from pairtune.run.resuming import complete_checkpoints

METHODS = ("full", "lora", "qlora")
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """37 pairs in steps of 8: the fifth and last step of an epoch has 5, which 2 or 4 processes cannot share evenly."""
    work = tmp_path_factory.mktemp("work")
    save_llama(work / "base", sizes=SHARDED_SIZES)
    save_pairs(work / "train.jsonl", random_pairs(37, seed=1))
    save_pairs(work / "held_out.jsonl", random_pairs(7, seed=2))
    cfg = {
        "device": "cpu",
        "dtype": "fp32",
        "model": {"_component_": "torchtune.models.llama3.llama3", **SHARDED_SIZES},
        "checkpointer": {"checkpoint_dir": str(work / "base"), "model_type": "LLAMA3"},
        "dataset": {"source": str(work / "train.jsonl")},
        "eval_dataset": {"source": str(work / "held_out.jsonl")},
        "max_length": 96,
        "max_prompt_length": 64,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "pairs_per_step": 8,
        "batch_size": 1,
        "epochs": 2,
        "eval_every_n_steps": 5,
        "samples": {"num_prompts": 2, "max_new_tokens": 5},
        "lora": {"rank": 4, "alpha": 8},
        "per_method": {"lora": {"optimizer": {"lr": 2e-3}}, "qlora": {"optimizer": {"lr": 2e-3}}},
        "collective_timeout_s": 240,  # a slow machine compiles for longer than a minute
    }
    (work / "config.yaml").write_text(json.dumps(cfg))
    return work


@pytest.fixture(scope="module")
def single(work):
    """The single-device runs, by method: folder and log."""
    runs = {}

    def single(method):
        if method not in runs:
            folder = work / f"{method}-single"
            log = run_recipe(f"{method}_dpo_single_device", f"output_dir={folder}", config_paths=[work / "config.yaml"])
            runs[method] = folder, log
        return runs[method]

    return single


def tune_run(work, num_processes, method, folder, *overrides, cwd=None):
    """The command of a distributed run; returns its arguments."""
    return [
        *(sys.executable, "-m", "pairtune.cli", "run", "--nproc_per_node", str(num_processes)),
        *(str(ROOT / "recipes" / f"{method}_dpo_distributed.py"), "--config", str(work / "config.yaml")),
        *(f"output_dir={folder}", *overrides),
    ]


def run(command, **options):
    done = subprocess.run(command, env=ENVIRONMENT, text=True, capture_output=True, timeout=600, **options)
    return done.returncode, done.stdout + done.stderr


def assert_same_numbers(log, expected, tolerance=1e-5):
    assert len(log) == len(expected)
    for row, wanted in zip(log, expected, strict=True):
        assert row.keys() == wanted.keys()
        for key in row.keys() - SPEED:
            # A correlation of margins that are near zero magnifies their rounding
            near = 1e-3 if key == "eval/length_correlation" else tolerance
            assert row[key] == pytest.approx(wanted[key], rel=near, abs=near), (row["step"], key)


@pytest.mark.parametrize(("method", "num_processes"), [("lora", 1), *((method, 2) for method in METHODS), ("qlora", 4)])
def test_any_number_of_processes_gives_the_numbers_of_one_device(work, single, method, num_processes, capfd):
    folder = work / f"{method}-{num_processes}"
    if num_processes == 1:  # a world of one, without torchrun
        run_recipe(f"{method}_dpo_distributed", f"output_dir={folder}", config_paths=[work / "config.yaml"])
        output = capfd.readouterr().out
    else:
        status, output = run(tune_run(work, num_processes, method, folder))
        assert status == 0, output[-3000:]
    single_folder, expected = single(method)
    log = from_first_step(folder / "metrics.jsonl")
    assert [r["step"] for r in log if "loss" in r] == list(range(1, 11))
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same_numbers(log, expected)
    verdicts = [json.loads((f / "verdict.json").read_text()) for f in (folder, single_folder)]
    assert verdicts[0]["name"] == verdicts[1]["name"] and verdicts[0]["text"] == verdicts[1]["text"]
    assert len(pair_log.read(folder / "pairs.bin")) == len(pair_log.read(single_folder / "pairs.bin")) > 0
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        if (single_folder / "export" / name).exists():
            weights, wanted = (load_file(f / "export" / name) for f in (folder, single_folder))
            assert weights.keys() == wanted.keys()
            for key in weights:
                torch.testing.assert_close(weights[key], wanted[key], atol=1e-5, rtol=0)
    assert (folder / "samples.jsonl").read_text() == (single_folder / "samples.jsonl").read_text()
    assert output.count("rows read") == 2  # one table a data set, not one a process


def test_an_export_of_many_processes_loads_in_transformers_and_peft(work, single):
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    folder = work / "lora-2"
    if not folder.exists():
        run(tune_run(work, 2, "lora", folder))
    tokens = torch.randint(3, 320, (1, 20))
    merged = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "export" / "adapter", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, adapted(tokens).logits, atol=1e-4, rtol=1e-4)
        assert (merged(tokens).logits - base(tokens).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("base_dtype", "told"), [("nf4", "filled up to whole blocks"), ("fp8", " in fp8, fp32 on 2 pr")]
)
def test_qlora_on_any_matrices_is_the_same_on_two_processes_and_merges_as_in_peft(work, tmp_path, base_dtype, told):
    """None of the sizes is a multiple of NF4's 16,384 values, and most have rows that two cannot share evenly."""
    from peft import AutoPeftModelForCausalLM

    sizes = SHARDED_SIZES | {"embed_dim": 72, "num_heads": 6, "num_kv_heads": 3, "intermediate_dim": 97}
    save_llama(tmp_path / "base", sizes=sizes)
    model = {"_component_": "torchtune.models.llama3.llama3", **sizes}
    settings = [f"checkpointer.checkpoint_dir={tmp_path / 'base'}", f"model={json.dumps(model)}", "max_steps=3"]
    settings += ["samples.num_prompts=0", "keep_last_n=0", "eval_every_n_steps=null", f"base_dtype={base_dtype}"]
    one = [f"output_dir={tmp_path / 'one'}", *settings]
    expected = run_recipe("qlora_dpo_single_device", *one, config_paths=[work / "config.yaml"])
    status, output = run(tune_run(work, 2, "qlora", tmp_path / "two", *settings))
    assert status == 0, output[-3000:]
    assert told in output
    assert_same_numbers(from_first_step(tmp_path / "two" / "metrics.jsonl"), expected)
    exported = load_file(tmp_path / "two" / "export" / "model.safetensors")
    adapter = tmp_path / "two" / "export" / "adapter"
    adapted = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32)
    merged = adapted.merge_and_unload().state_dict()
    for name, weight in exported.items():
        torch.testing.assert_close(weight, merged[name], atol=1e-6, rtol=0, msg=name)


def test_a_vocabulary_that_processes_cannot_share_evenly_is_exported(work, tmp_path):
    """FSDP2 pads the last shard: a gathered weight is a part of its memory."""
    sizes = SHARDED_SIZES | {"vocab_size": 321}
    save_llama(tmp_path / "base", sizes=sizes)
    model = {"_component_": "torchtune.models.llama3.llama3", **sizes}
    settings = [f"checkpointer.checkpoint_dir={tmp_path / 'base'}", f"model={json.dumps(model)}", "max_steps=2"]
    settings += ["samples.num_prompts=0", "keep_last_n=0"]
    status, output = run(tune_run(work, 2, "full", tmp_path / "two", *settings))
    assert status == 0, output[-3000:]
    one = [f"output_dir={tmp_path / 'one'}", *settings]
    run_recipe("full_dpo_single_device", *one, config_paths=[work / "config.yaml"])
    found, expected = (load_file(tmp_path / name / "export" / "model.safetensors") for name in ("two", "one"))
    assert found.keys() == expected.keys() and found["model.embed_tokens.weight"].shape[0] == 321
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("method", "num_processes", "setting"),
    [
        ("full", 4, "data_parallel_replicate_dim=2"),
        ("lora", 2, "fsdp_cpu_offload=true"),
        ("full", 2, "enable_activation_checkpointing=true attention=mask batch_size=8"),  # more than a process has
    ],
)
def test_how_it_is_sharded_changes_no_number(work, single, method, num_processes, setting):
    folder = work / "setting"
    status, output = run(tune_run(work, num_processes, method, folder, *setting.split()))
    assert status == 0, output[-3000:]
    assert_same_numbers(from_first_step(folder / "metrics.jsonl"), single(method)[1])


def test_compiled_layers_are_sharded_and_give_the_same_losses(work, single):
    folder = work / "compiled"
    status, output = run(tune_run(work, 2, "lora", folder, "compile=true", "max_steps=2", "samples.num_prompts=0"))
    assert status == 0, output[-3000:]
    losses = [row["loss"] for row in read_log(folder / "metrics.jsonl") if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in single("lora")[1] if "loss" in row][:2], abs=1e-5)


def test_without_torchrun_options_a_machine_without_gpus_runs_one_process(work, single):
    command = tune_run(work, 1, "lora", work / "plain")
    at = command.index("--nproc_per_node")
    status, output = run(command[:at] + command[at + 2 :])
    assert status == 0, output[-3000:]
    assert_same_numbers(from_first_step(work / "plain" / "metrics.jsonl"), single("lora")[1])


def test_two_nodes_meet_by_rendezvous_and_give_the_same_numbers(work, single):
    """Two agents of one process each on 127.0.0.1, as two machines would be started."""
    folder = work / "nodes"
    command = tune_run(work, 1, "lora", folder, "data_parallel_replicate_dim=2")
    at = command.index("--nproc_per_node")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    rendezvous = ["--nnodes", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", address, "--rdzv_id", "7"]
    command = [*command[:at], *rendezvous, *command[at:]]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    agents = [subprocess.Popen(command, env=ENVIRONMENT, **pipes) for _ in range(2)]
    outputs = [agent.communicate(timeout=600)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(o[-2000:] for o in outputs)
    assert_same_numbers(from_first_step(folder / "metrics.jsonl"), single("lora")[1])
    assert sum(output.count("rows read") for output in outputs) == 2


# What a process holds and sends


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """fsdp_worker.py's result by method and number of processes."""
    results = {}

    def measured(method, num_processes):
        if num_processes not in results:
            path = tmp_path_factory.mktemp("measured") / "result.json"
            worker = str(Path(__file__).with_name("fsdp_worker.py"))
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
            status, output = run([*command, "--standalone", worker, str(path), *METHODS])
            assert status == 0, output[-3000:]
            results[num_processes] = json.loads(path.read_text())
        return results[num_processes][method]

    return measured


@pytest.mark.parametrize("method", METHODS)
def test_parameters_and_optimizer_state_fall_with_the_number_of_processes(measured, method):
    for kind in ("parameters", "optimizer"):
        one, two, four = (measured(method, n)[kind] for n in (1, 2, 4))
        assert two == pytest.approx(one / 2, rel=0.01)
        assert four == pytest.approx(one / 4, rel=0.01)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_sends_what_fsdp_has_to_and_nothing_more(measured, method):
    """L layers: each gathered for forward and for backward, the root once; one reduce-scatter a trained block."""
    layers, result = SHARDED_SIZES["num_layers"], measured(method, 2)
    trained_blocks = layers + (method == "full")  # adapters live in layers only
    reference = layers + (method == "full")  # its own forward; with adapters off the root is there already

    def counts(kind):
        return {name: count for name, (count, _) in result[kind].items()}

    assert counts("cached") == {"all_gather": 2 * layers + 1, "reduce_scatter": trained_blocks}
    assert counts("live") == {"all_gather": 2 * layers + 1 + reference, "reduce_scatter": trained_blocks}
    assert counts("accumulated") == {"all_gather": 2 * (2 * layers + 1), "reduce_scatter": trained_blocks}


def test_gradients_are_reduced_in_float32_and_only_those_that_are_trained(measured):
    """Bytes of the reduce-scatters: four a trained parameter, which AdamW's two moments take twice."""
    for method in METHODS:
        _, num_bytes = measured(method, 2)["cached"]["reduce_scatter"]
        assert num_bytes == measured(method, 1)["optimizer"] / 2


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_plan_on_paper_counts_the_bytes_that_are_sent(measured, method):
    """tools/plan.py's formulas, on this model in float32, against what a step gathered and reduced."""
    paper = runpy.run_path(str(ROOT / "tools" / "plan.py"))
    sizes = paper["sizes"](tiny_llama(**SHARDED_SIZES), rank=4)
    result = measured(method, 2)
    for kind, micro_batches, reference in (("cached", 1, False), ("live", 1, True), ("accumulated", 2, False)):
        expected = paper["gathered_bytes"](sizes, method, micro_batches, reference, item=4)
        assert result[kind]["all_gather"][1] == expected
        assert result[kind]["reduce_scatter"][1] == paper["reduced_bytes"](sizes, method)


# Who gets which pair


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_pair_is_seen_once_an_epoch_and_all_processes_take_equally_many_micro_batches(size):
    pairs = random_pairs(37)
    ranks = [Steps(pairs, 12, 1, World(torch.device("cpu"), rank=r, size=size), seed=0) for r in range(size)]
    for epoch in range(2):
        seen = []
        for step in range(4 * epoch, 4 * epoch + 4):
            shares = [rank[step] for rank in ranks]
            assert len({len(micro) for micro in shares}) == 1
            members = [pair for micro in shares for batch in micro for pair in batch]
            assert len(members) == len(ranks[0].pairs(step))
            assert all(len(batch) <= 1 for micro in shares for batch in micro)
            seen += members
        assert sorted(map(id, seen)) == sorted(map(id, pairs))


def test_evaluation_shares_leave_nothing_out_and_add_nothing():
    pairs = random_pairs(11)
    for size in (1, 2, 3, 4, 8):
        shares = [share(pairs, 2, rank=r, size=size) for r in range(size)]
        assert sorted(id(x) for micro in shares for batch in micro for x in batch) == sorted(map(id, pairs))
        assert len({len(micro) for micro in shares}) == 1


# One process fails


PEER = '''
import os, signal, threading, time
from torchtune.rlhf.loss import DPOLoss
from pairtune.errors import UserError
from pairtune.tokenizer.hf import hf_tokenizer

class Loss(DPOLoss):
    """DPO's loss, until rank 1 computes its eighth: the first of step 2, behind three of the rehearsal."""
    def __init__(self, beta=0.1, end=""):
        super().__init__(beta)
        self.end, self.calls = end, 0
    def forward(self, *logps):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls == 8:
            if self.end == "killed":
                open("killed_at", "w").write(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
            if self.end == "nan":
                return tuple(x * float("nan") for x in super().forward(*logps))
            if self.end == "stuck":
                threading.Event().wait()
            raise RuntimeError("the eighth loss of rank 1")
        return super().forward(*logps)

def tokenizer(path):
    if os.environ["RANK"] == "1":
        raise UserError(f"{path}: row 17 cannot be read on this machine")
    return hf_tokenizer(path)
'''


def run_with_peer(work, *overrides):
    folder = work / "peer"
    folder.mkdir(exist_ok=True)
    (folder / "peer.py").write_text(PEER)
    overrides = [override.replace("WORK", str(work)) for override in (*overrides, "eval_dataset.source=null")]
    status, output = run(tune_run(work, 2, "lora", folder / "run", *overrides), cwd=folder)
    return status, output, time.time()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss={_component_: peer.Loss, end: killed}"], ["SIGKILL", "rank 1 failed"]),
        (["loss={_component_: peer.Loss, end: raised}"], ["rank 1 failed", "RuntimeError: the eighth loss of rank 1"]),
        (["tokenizer={_component_: peer.tokenizer, path: WORK/base}"], ["base: row 17 cannot be read on this machine"]),
    ],
)
def test_a_process_that_dies_ends_the_run_with_its_message(work, overrides, words):
    status, output, ended = run_with_peer(work, *overrides)
    assert status != 0
    last = "\n".join(output.strip().splitlines()[-25:])
    for word in words:
        assert word in last
    assert output.count(words[-1]) == 1
    if "killed" in overrides[0]:
        assert ended - float((work / "peer" / "killed_at").read_text()) < 30


def test_a_process_that_stands_still_is_named_with_its_line(work):
    status, output, _ = run_with_peer(work, "loss={_component_: peer.Loss, end: stuck}", "collective_timeout_s=6")
    assert status != 0
    assert "no progress; each process stands at" in output
    assert output.count("no progress") == 1
    (stuck,) = [line for line in output.splitlines() if line.startswith("  rank 1:")]
    assert "peer.py" in stuck and "threading.Event().wait()" in stuck and "step 2" in stuck
    (waiting,) = [line for line in output.splitlines() if line.startswith("  rank 0:")]
    assert "peer.py" not in waiting


def test_a_config_mistake_is_told_once_for_all_processes(work):
    status, output, _ = run_with_peer(work, "data_parallel_replicate_dim=3")
    assert status == 2
    assert output.count("data_parallel_replicate_dim=3: must divide the 2 processes; nearest valid") == 1


def test_a_loss_that_is_not_finite_on_one_process_names_its_row_and_leaves_the_checkpoint(work):
    settings = ("shuffle=false", "save_every_n_steps=1")
    status, output, _ = run_with_peer(work, "loss={_component_: peer.Loss, end: nan}", *settings)
    assert status == 2
    said = "step 2: the loss of rows [14] is not a finite number; no update was made"
    assert said in output and said in (work / "peer" / "run" / "console.log").read_text()
    assert [p.name for p in complete_checkpoints(work / "peer" / "run" / "checkpoints")] == ["step_1"]


def test_a_missing_shard_is_told_once_for_all_processes(work, tmp_path):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    status, output, _ = run_with_peer(work, f"checkpointer.checkpoint_dir={tmp_path}")
    assert status == 2
    assert output.count("1 of them are missing: model-00002-of-00002.safetensors") == 1


# The text


def test_the_six_recipes_are_one_text():
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "sync_recipes.py"), "--check"], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("change", ["a shared line", "a line of the twin"])
def test_recipes_that_drift_apart_are_shown(tmp_path, change):
    for folder in ("recipes", "tools"):
        (tmp_path / folder).mkdir()
        for file in (ROOT / folder).glob("*.py"):
            (tmp_path / folder / file.name).write_text(file.read_text())
    name = "full_dpo_distributed.py" if change == "a shared line" else "qlora_dpo_single_device.py"
    path = tmp_path / "recipes" / name
    path.write_text(path.read_text().replace("float(optimizer.param_groups[0]", "float(optimizer.param_groups[-1]"))
    tool = [sys.executable, str(tmp_path / "tools" / "sync_recipes.py")]
    check = subprocess.run([*tool, "--check"], text=True, capture_output=True)
    assert check.returncode == 1 and f"--- {name}" in check.stdout and "param_groups[-1]" in check.stdout
    subprocess.run([*tool, "--write"], check=True, capture_output=True)
    assert subprocess.run([*tool, "--check"], capture_output=True).returncode == 0
    assert path.read_text() == (ROOT / "recipes" / name).read_text()
