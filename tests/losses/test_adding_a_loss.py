"""A loss is added by its class alone: in a user's file, by its path, and in the library, by its name."""

import json
import re
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import ENVIRONMENT, ROOT
from test_losses import random_step

from pairtune import config
from pairtune.config import short_names
from pairtune.errors import UserError
from pairtune.losses.base import PairLoss
from pairtune.losses.calling import Needs, needs
from pairtune.losses.modules import LOSSES, build
from pairtune.run import rehearsal

RECIPE = runpy.run_path(str(ROOT / "recipes" / "lora_dpo_single_device.py"))
GIVEN = [
    "model={_component_: torchtune.models.llama3.llama3_8b}",
    "checkpointer.checkpoint_dir=/weights",
    "checkpointer.model_type=LLAMA3",
    "dataset.source=pairs.jsonl",
]


def load(*overrides):
    return config.load("lora", RECIPE["DEFAULTS"], [], [*GIVEN, *overrides])


def example():
    """The class that docs/losses.md has a person write."""
    (written,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "losses.md").read_text(), re.DOTALL)
    return written


@pytest.fixture
def my_losses(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(example())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("my_losses", None)  # another test's
    yield
    sys.modules.pop("my_losses", None)


def cubic(logps, beta, tau):
    z = beta * (logps[0] - logps[2] - logps[1] + logps[3])
    return torch.relu(tau - z) ** 3, beta * (logps[0] - logps[2])


def test_a_class_in_a_users_file_works_by_its_path(my_losses):
    cfg = load("loss=my_losses.Cubic", "loss.tau=2", "loss.wpo=true", "loss.ld_alpha=0.5")
    rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=10)
    loss_fn = config.instantiate(cfg.loss)
    assert needs(loss_fn) == Needs(inputs=("chosen_weights", "rejected_weights"), ld_alpha=0.5)
    logps, _ = random_step()
    half, whole = torch.full((6,), 0.5, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    losses, rewards, _ = loss_fn(*logps, chosen_weights=half, rejected_weights=whole)
    expected, expected_rewards = cubic(logps, 0.2, 2.0)
    torch.testing.assert_close(losses, 0.5 * expected)
    torch.testing.assert_close(rewards, expected_rewards)
    term = {"_component_": "my_losses.Cubic", "weight": 0.5}
    torch.testing.assert_close(build("mixture", terms=[term])(*logps)[0], 0.5 * cubic(logps, 0.2, 1.0)[0])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("loss.tua=2", "loss.tua: Cubic has no such argument; it takes beta, tau, ld_alpha, wpo; nearest: tau"),
        ("loss.f_divergence=js", "loss.f_divergence: Cubic has no such argument"),
        ("loss.tau=high", "loss.tau=high: must be a number"),
        ("loss.beta=-1", "loss.beta=-1: must be greater than 0"),
    ],
)
def test_its_options_are_checked_as_ours_are(my_losses, option, words):
    with pytest.raises(UserError, match=f"^{words}"):
        load("loss=my_losses.Cubic", option)


def test_another_default_keeps_its_options_rule(my_losses):
    with pytest.raises(UserError, match="loss.beta=0.0: must be greater than 0; e.g. loss.beta=0.2"):
        build("mixture", terms=[{"_component_": "my_losses.Cubic", "beta": 0.0}])


def test_a_default_without_its_type_is_refused_since_it_would_be_passed_over():
    with pytest.raises(TypeError, match="Mine: the default of an option needs its type, too: beta: float"):
        type("Mine", (PairLoss,), {"beta": 5.0})


BY_NAME = """
import json, runpy, sys
from pathlib import Path
import pairtune
from pairtune import config
from pairtune.losses.modules import build
assert Path(pairtune.__file__).parents[1] == Path.cwd()
recipe = runpy.run_path("recipes/lora_dpo_single_device.py")
cfg = config.load("lora", recipe["DEFAULTS"], [], [*sys.argv[1:], "loss=cubic", "loss.tau=2"])
import torch
losses, *_ = config.instantiate(cfg.loss)(*torch.tensor([[-1.0], [-2.0], [-1.5], [-1.0]]))
(term,) = build("mixture", terms=[{"name": "third"}]).terms
print(json.dumps([cfg.loss._component_, losses.item(), type(term).__name__]))
"""


def test_a_class_in_the_library_works_by_its_name_and_is_in_the_table(tmp_path):
    """In a copy of the source; no other line of it is touched."""
    for folder in ("pairtune", "recipes", "tools", "docs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    modules, added = tmp_path / "pairtune" / "losses" / "modules.py", example().partition("\n\n\n")[2]
    named = added.replace(
        "    beta:", '    """A cubed hinge."""\n\n    name = "cubic"\n    aliases = ("third",)\n    beta:', 1
    )
    modules.write_text(modules.read_text().replace("class Hinge(", f"{named}\n\nclass Hinge(", 1))

    def run(*words):
        environment = ENVIRONMENT | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    path, value, term = json.loads(run("-c", BY_NAME, *GIVEN).splitlines()[-1])
    assert (path, term) == ("pairtune.losses.Cubic", "Cubic")
    assert value == pytest.approx((2 - 0.2 * 1.5) ** 3)
    run("tools/doc_tables.py", "--write")
    row = "| `cubic` or `third` | A cubed hinge | `beta=0.2`, `tau=1`, `ld_alpha`, `wpo` |"
    assert row in (tmp_path / "docs" / "losses.md").read_text()


def test_short_names_are_those_of_the_classes_and_known_without_them():
    assert {name: short_names.path_of(name) for name in LOSSES} == {
        name: f"pairtune.losses.{made.__name__}" for name, made in LOSSES.items()
    }
    code = "import sys; from pairtune.config.short_names import path_of; print(path_of('dpo'), "
    code += "[name for name in sys.modules if name.startswith('pairtune.losses')])"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, text=True, capture_output=True, check=True)
    assert done.stdout == "pairtune.losses.Sigmoid []\n"


@pytest.mark.parametrize("module", short_names.EARLIER)
def test_an_earlier_versions_paths_are_todays(module):
    for name, made in LOSSES.items():
        for path in (f"{module}.{name}", f"{module}.{made.__name__}"):
            assert short_names.current(path) == f"pairtune.losses.{made.__name__}"
    assert short_names.current("my_losses.Ipo") == "my_losses.Ipo"
    earlier = f"loss={{_component_: {module}.ipo, beta: 0.3}}"
    assert load(earlier).loss == load(earlier, "loss=ipo").loss == {"_component_": "pairtune.losses.Ipo", "beta": 0.3}
    logps, inputs = random_step()
    inputs = {name: inputs[name] for name in ("chosen_lengths", "rejected_lengths")}
    term = {"_component_": f"{module}.ipo", "beta": 0.3}
    got = build("mixture", terms=[term])(*logps, **inputs)[0]
    assert torch.equal(got, build("ipo", beta=0.3)(*logps, **inputs)[0])
