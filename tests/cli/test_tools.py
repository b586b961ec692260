"""What tools/ measure are runs that the recipes take; their numbers stand in docs/performance.md."""

import runpy

import pytest
from helpers import ROOT

from pairtune.cli.commands import COMMANDS, main

TOOLS = ROOT / "tools"


def test_the_benchmark_is_a_run(tmp_path, capfd):
    tool = runpy.run_path(str(TOOLS / "bench.py"))
    tool["make_work"](tmp_path, 4)
    tool["write_configs"](tmp_path)
    assert main(["validate", str(tmp_path / "ours.yaml"), "--recipe", "lora_dpo_single_device"]) == 0, (
        capfd.readouterr()
    )


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
