"""What tools/ measure are runs that the recipes take; their numbers stand in docs/performance.md."""

import json
import math
import re
import runpy
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT

from pairtune.cli.commands import COMMANDS, main

TOOLS = ROOT / "tools"


@pytest.fixture(autouse=True)
def tools_find_each_other(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)


def test_a_benchmark_makes_the_same_steps_by_ours_torchtune_and_trl(tmp_path):
    """Losses 1e-4 apart, or its status is 1; a system that cannot run is named and left out. TRL has its own Python."""
    python = tmp_path / "trl" / "bin" / "python"  # an environment that is there
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "used"}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (tmp_path / "trl" / "made.json").write_text('{"trl": "9.9"}')
    systems = ["ours", "ours:cached:bridged", "torchtune", "trl:completions", "ours:sead=1"]
    words = ["--model", "tiny", "--lengths", "~24/8/8", "--steps", "3", "--json", tmp_path / "rows.jsonl"]
    words += ["--trl-env", tmp_path / "trl"]
    command = [sys.executable, TOOLS / "bench.py", *words, "--systems", *systems]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["system"] for row in rows] == systems[:-1]
    assert re.search("left out: ours:sead=1: .*unknown key sead", done.stdout)
    assert (tmp_path / "used").read_text().count("peers.py") == 1 and "TRL's environment: trl 9.9" in done.stdout
    losses = rows[0]["losses"]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and abs(losses[-1] - losses[0]) > 1e-3
    assert all(row["seconds"] > 0 < row["tflops"] for row in rows)


def test_a_benchmark_says_when_losses_do_not_agree():
    tool = runpy.run_path(str(TOOLS / "bench.py"))
    rows = [{"system": name, "losses": [0.69, last]} for name, last in (("ours", 0.68), ("theirs", 0.6802))]
    agree, told = tool["agreement"](rows, 1e-4)
    assert not agree and "DO NOT AGREE: 2.0e-04 apart" in told
    assert tool["agreement"](rows, 1e-3)[0]


@pytest.mark.parametrize("settings", [["loss=sft"], ["reference=cached"], ["reference=model"]])
def test_references_memory_is_measured_in_runs(tmp_path, settings, capfd):
    tool = runpy.run_path(str(TOOLS / "measure_reference_memory.py"))
    assert settings[-1] in [words[-1] for words in tool["RUNS"].values()]
    tool["write_inputs"](tmp_path, "cpu")
    words = ["validate", str(tmp_path / "config.yaml"), "--recipe", "full_dpo_single_device", *settings]
    assert main(words) == 0, capfd.readouterr()


def test_imports_are_summed_by_package():
    tool = runpy.run_path(str(TOOLS / "measure_start.py"))
    lines = [
        "self [us] | cumulative | imported package",
        "100 |       300 |   torch.nn",
        "50 |    350 | torch",
        "7 | 7 | os",
    ]
    spent = tool["by_package"]("".join(f"import time: {line}\n" for line in lines))
    assert spent == {"torch": pytest.approx(150e-6), "os": pytest.approx(7e-6)}
    assert {words[0] for words, _ in tool["ANSWERS"].values()} <= {*COMMANDS, "--help"}


def test_a_gpu_check_rehearsed_on_the_cpu_goes_on_after_a_case_whose_process_dies(tmp_path):
    words = ["--out", tmp_path, "--device", "cpu", "--tiny", "--steps", "3"]
    words += ["--parts", "backends,recipes,speed,plan", "--only", "segments"]
    dies = "dies=lora_dpo_single_device 24/8/8 metric_logger.signal=9"
    words += ["--run", dies, "--only", "dies", "--only", "full cached"]
    command = [sys.executable, TOOLS / "gpu_check.py", *words]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    found = {(row["part"], row["name"]): row for row in rows}
    failed = [(*key, row["note"]) for key, row in found.items() if row.get("ok") is False]
    assert [row[:2] for row in failed] == [("speed", "dies")], (tmp_path / "output.txt").read_text()[-3000:]
    assert re.fullmatch(r"its process died \(-9\); had logged pairs/s \[[\d.]+, [\d.]+, [\d.]+\]", failed[0][2])
    assert (
        found["backends", "segments"]["ok"] is True
        and max(found["backends", "segments"]["errors"]["windows, fp32"]) < 1e-5
    )
    assert found["recipes", "lora, segments"]["losses"] == pytest.approx([0.693] * 10, abs=0.05)
    assert found["speed", "full cached"]["pairs_per_second"] > 0 < found["plan", "full cached"]["counted_gib"]
    assert "| full cached: `full_dpo_single_device` `compile=true` `reference=cached` |" in done.stdout


def test_a_pairs_operations_are_those_that_a_step_counts():
    """At the shape of Llama 3 8B, by hand: 2 x 6,979,321,856 x 768 a forward of the body, and so on."""
    work = runpy.run_path(str(TOOLS / "random_work.py"))
    of_pair, sizes = work["flops_of_pair"], work["MODELS"]["8b"]
    long = work["Lengths"](512, 128, 128)
    assert of_pair(sizes, long, full=False, live=False) == pytest.approx(22.4e12, rel=2e-3)
    assert of_pair(sizes, long, full=False, live=True) == pytest.approx(33.5e12, rel=2e-3)
