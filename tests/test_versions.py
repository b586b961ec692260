"""torchtune finds what it needs of any torchao; the numbers are the same with all versions; one that lacks it is named.

`make test-newest` runs this file, and what else touches other libraries, with the versions of constraints-newest.txt.
"""

import json
import os
import subprocess
import sys

import pytest
import torchao
from helpers import ENVIRONMENT, ROOT

from pairtune.process import torchao_names

PINNED = os.environ.get("PAIRTUNE_PINNED_PYTHON")  # the Python of an environment made from constraints.txt


def plan(**environment):
    """Runs `tune plan`, which imports all that a run does."""
    command = [sys.executable, "-m", "pairtune.cli", "plan", "reviewer2", "--recipe", "qlora_dpo_distributed"]
    return subprocess.run(command, env=ENVIRONMENT | environment, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_importing_what_a_run_needs_says_nothing():
    done = plan()
    assert done.returncode == 0 and done.stderr == ""


NEWER = {  # what a torchao of the future may do: its module, and what is said of it
    "has lost a package": ("", "No module named 'torchao.dtypes'"),
    "cannot be imported": ("raise OSError('libtorch: undefined symbol')", "libtorch: undefined symbol"),
    "has lost a name": ("from torch import gone", "cannot import name 'gone' from 'torch'"),
}


@pytest.mark.parametrize("text, says", NEWER.values(), ids=NEWER)
def test_a_torchao_that_torchtune_cannot_be_imported_with_is_named(tmp_path, text, says):
    (tmp_path / "torchao").mkdir()
    (tmp_path / "torchao" / "__init__.py").write_text(text)
    (tmp_path / "torchao-0.19.0.dist-info").mkdir()
    (tmp_path / "torchao-0.19.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.19.0\n")
    done = plan(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for words in ("torchao 0.19.0", says, "known to work: torchao 0.15 to 0.18; pip install 'torchao<0.19'"):
        assert words in done.stderr


def test_names_that_torchao_has_lost_say_so_when_called_and_are_not_left_in_it(monkeypatch):
    for place, names in torchao_names.QUANTIZERS.items():
        for name in names:
            monkeypatch.delattr(f"{place}.{name}", raising=False)
    with torchao_names.stand_ins():
        gone = torchao.quantization.int4_weight_only
    with pytest.raises(
        torchao_names.TorchaoError, match="torchao.quantization.int4_weight_only: torchao 0.* no longer"
    ):
        gone(groupsize=32)
    assert not hasattr(torchao.quantization, "int4_weight_only")


def test_nf4_is_one_class_under_the_name_that_torchtune_knows():
    from torchao.dtypes.nf4tensor import NF4Tensor
    from torchtune.modules.common_utils import NF4Tensor as torchtunes

    assert NF4Tensor is torchtunes


@pytest.mark.skipif(not PINNED, reason="make test-newest compares two environments")
def test_nf4_8_bit_steps_and_ten_losses_of_each_method_are_those_of_the_pinned_versions(tmp_path):
    workers = []
    for python in (PINNED, sys.executable):
        folder = tmp_path / str(len(workers))
        folder.mkdir()
        command = [python, str(ROOT / "tests" / "versions_worker.py"), str(folder)]
        workers.append(subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True))
    pinned, here = (json.loads(worker.communicate(timeout=600)[0].splitlines()[-1]) for worker in workers)
    assert here.pop("nf4") == pinned.pop("nf4")  # the same bits
    for name, losses in pinned.items():
        assert here[name] == pytest.approx(losses, rel=1e-6, abs=0), name
    assert [len(pinned[method]) for method in ("full", "lora", "qlora")] == [10, 10, 10]
