"""A component is what its key is for, which is told before it is called."""

import functools

import pytest
import torch

from pairtune import config
from pairtune.cli.recipe import read_recipe
from pairtune.config.uses import check_installed
from pairtune.errors import UserError
from pairtune.process.dist import World
from pairtune.run.metrics import RunLog

RECIPE = read_recipe("lora_dpo_distributed")
KEYS = ("metric_logger", "loss", "optimizer", "lr_scheduler", "tokenizer", "model", "reference.model")
called = []


def call(*arguments, **named):
    called.append(arguments)


def nothing(*arguments, **named) -> None:
    called.append(arguments)


class Half:
    def __init__(self, **named):
        called.append(named)

    def log_dict(self, metrics, step): ...


class Whole(Half):
    def log_config(self, cfg): ...
    def close(self): ...


def whole(**named) -> Whole:
    return Whole()


steps = functools.partial(torch.optim.SGD, momentum=0.5)


@pytest.fixture
def load(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {_component_: torchtune.models.llama3.llama3_8b}\n"
        "checkpointer: {checkpoint_dir: /weights, model_type: LLAMA3}\ndataset: {source: pairs.jsonl}\n"
    )

    def load(*overrides, ask=config.load):
        return ask(*RECIPE, [tmp_path / "c.yaml"], list(overrides))

    return load


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "path", ["os.system", "builtins.print", "builtins.dict", "subprocess.run", "shutil.rmtree", "pathlib.Path.unlink"]
)
def test_nothing_of_pythons_own_is_a_component_and_nothing_is_imported_to_tell(load, key, path):
    for ask in (config.check, config.load):
        with pytest.raises(UserError, match=rf"{key}._component_={path}: is of Python's own library, and .* such as"):
            load(f"{key}={path}", "reference=model", "reference.checkpoint_dir=x", ask=ask)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("path", ["torch.os.system", "torch.rand", "test_uses.nothing", "test_uses.Half"])
def test_what_is_no_such_thing_is_refused_before_it_is_called(load, key, path):
    called.clear()
    if key == "loss" and path.startswith("test_uses"):
        return  # a loss may be any callable: the rehearsal calls it with four tensors
    with pytest.raises(UserError, match=rf"{key}._component_={path}: "):
        load(f"{key}={path}", "reference=model", "reference.checkpoint_dir=x")
    assert called == []


def test_a_logger_says_what_it_is(load):
    with pytest.raises(UserError, match="is no class, and no function whose annotation says.*log_dict, log_config, cl"):
        load("metric_logger=test_uses.call")
    for path in ("test_uses.Whole", "test_uses.whole"):
        assert load(f"metric_logger={path}").metric_logger == {"_component_": path}
    assert load("optimizer=test_uses.steps", "optimizer.lr=1").optimizer["_component_"] == "test_uses.steps"


def test_what_a_logger_makes_is_looked_at_even_if_it_is_false(tmp_path):
    with pytest.raises(UserError, match="metric_logger: what .* makes has no") as error:
        RunLog(tmp_path, World(torch.device("cpu")), {"_component_": "builtins.dict"}, {})
    assert "log_dict, log_config, close" in str(error.value)


@pytest.mark.parametrize("name", ["comet", "mlflow"])
def test_a_logger_that_is_not_installed_is_told_before_anything_is_read(load, name, monkeypatch):
    monkeypatch.setattr("pairtune.config.uses.find_spec", lambda package: None)
    with pytest.raises(
        UserError, match=r"needs the package \w+, which is not installed: pip install \w+, or metric_log"
    ):
        check_installed(load(f"metric_logger={name}", ask=config.check))


@pytest.mark.parametrize(
    ("name", "logger", "arguments"),
    [
        ("wandb", "WandBLogger", {"project": "pairtune", "log_dir": "runs/lora_dpo"}),
        ("WandB", "WandBLogger", {"project": "pairtune", "log_dir": "runs/lora_dpo"}),
        ("tensorboard", "TensorBoardLogger", {"log_dir": "runs/lora_dpo/tensorboard"}),
        ("disk", "DiskLogger", {"log_dir": "runs/lora_dpo/log"}),
        ("stdout", "StdoutLogger", {}),
    ],
)
def test_a_logger_goes_by_a_short_name(load, name, logger, arguments):
    block = {"_component_": f"torchtune.training.metric_logging.{logger}", **arguments}
    assert load(f"metric_logger={name}").metric_logger == block
    assert load(f"metric_logger={name}", "output_dir=x").metric_logger.get("log_dir", "x").startswith("x")
    if arguments:
        assert load("metric_logger.log_dir=y", f"metric_logger={name}").metric_logger.log_dir == "y"
