"""What is wrong in a command or a config is said before torch, and whatever else takes seconds to import."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, SIZES

HEAVY = ("torch", "torchtune", "torchao", "torchdata", "datasets", "transformers", "matplotlib", "pyarrow", "pandas")

# Runs at the start of Python. Modules are found as ever, and end the process when they are imported.
SITECUSTOMIZE = f"""
import os, sys
from importlib.machinery import PathFinder

class Ends:
    def create_module(self, spec):
        os.write(2, b"imported: " + spec.name.encode())
        os._exit(99)

class Finder:
    def find_spec(self, name, path=None, target=None):
        spec = PathFinder.find_spec(name, path) if name in {HEAVY} else None
        if spec is not None:
            spec.loader.create_module = Ends().create_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's folder with all that a run needs, as far as its existence goes."""
    folder = tmp_path_factory.mktemp("start")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    (folder / "pairs.jsonl").write_text("{}\n")
    model = {"model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96}
    model |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    others = {
        "olmo": model | {"model_type": "olmo2"},
        "vision": {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}},
        "broken": model | {"hidden_size": "64"},
    }
    for name in ("model", "no_config", "no_weights", "lacks_a_shard", "no_tokenizer", *others):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(others.get(name, model)))
        (folder / name / "tokenizer.json").write_text("{}")
        (folder / name / "model.safetensors").write_text("")
    (folder / "no_config" / "config.json").unlink()
    (folder / "no_tokenizer" / "tokenizer.json").unlink()
    for name in ("no_weights", "lacks_a_shard"):
        (folder / name / "model.safetensors").unlink()
    index = {"weight_map": {"a": "1.safetensors"}}
    (folder / "lacks_a_shard" / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "mine.py").write_text("import torch\ndef loss(beta: float):\n    return torch.zeros(beta)\n")
    cfg = {
        "model": {"_component_": "torchtune.models.llama3.llama3", **SIZES},
        "checkpointer": {"checkpoint_dir": "model", "model_type": "LLAMA3"},
        "dataset": {"source": "pairs.jsonl"},
    }
    (folder / "my.yaml").write_text(json.dumps(cfg))
    (folder / "not.yaml").write_text("a: [")
    (folder / "my_copy.py").write_text((ROOT / "recipes" / "lora_dpo_single_device.py").read_text())
    return folder


def start(folder, *words):
    """Runs `tune` where nothing of HEAVY can be imported."""
    paths = [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-P", "-m", "pairtune.cli", *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


MISTAKES = {
    # words behind `tune run lora_dpo_single_device --config my.yaml`, and what is said
    "an unknown key": (["sead=1"], "unknown key sead; nearest: seed"),
    "a wrong type": (["seed=one"], "seed=one: must be a whole number"),
    "a wrong value": (["dtype=fp8"], "dtype=fp8: must be one of bf16, fp32"),
    "impossible together": (["batch_size=5"], "batch_size=5: must divide pairs_per_step=64"),
    "an unknown loss": (["loss=ip"], "loss.name=ip: no such loss; nearest: ipo"),
    "an option that a loss lacks": (["loss=ipo", "loss.betta=1"], "loss.betta: Ipo has no such argument"),
    "an option of a wrong type": (["loss=simpo", "loss.gamma=high"], "loss.gamma=high: must be a number"),
    "an argument that a component lacks": (["optimizer.rate=1"], "optimizer.rate: AdamW has no such argument"),
    "an argument that a component needs": (
        ["metric_logger=torchtune.training.metric_logging.DiskLogger"],
        "metric_logger.log_dir: DiskLogger needs it",
    ),
    "a component that is not there": (
        ["optimizer=torch.optim.AdmW"],
        "cannot be imported: torch.optim has no AdmW; nearest: optimizer=torch.optim.AdamW",
    ),
    "a package that is not there": (["loss=no_such.Loss"], "cannot be imported: there is no module no_such"),
    "a module for a component": (["optimizer=torch.optim.adamw"], "is not a class or function"),
    "a component of another kind": (
        ["loss=torchtune.models.llama3.llama3_8b"],
        "makes a TransformerDecoder, which is for model",
    ),
    "one of the user's that lacks an argument": (["loss=mine.loss"], "loss.beta: loss needs it"),
    "no model": (["checkpointer.checkpoint_dir=modl"], "checkpointer.checkpoint_dir=modl: no such folder"),
    "no config.json": (["checkpointer.checkpoint_dir=no_config"], "holds no config.json"),
    "no weights": (["checkpointer.checkpoint_dir=no_weights"], "holds no weights"),
    "a shard is missing": (["checkpointer.checkpoint_dir=lacks_a_shard"], "1 of them are missing: 1.safetensors"),
    "an architecture without a builder": (["checkpointer.checkpoint_dir=olmo"], "olmo/config.json: model_type=olmo2: "),
    "a vision shell": (["checkpointer.checkpoint_dir=vision"], "text_config's gemma3_text"),
    "a broken config.json": (["checkpointer.checkpoint_dir=broken"], "hidden_size='64': must be a whole number"),
    "a reference of another kind": (
        ["reference=model", "reference.checkpoint_dir=olmo"],
        "olmo/config.json: model_type=olmo2: ",
    ),
    "no tokenizer": (["tokenizer.path=no_tokenizer"], "tokenizer.path: the folder no_tokenizer has no tokenizer.json"),
    "no adapter": (["adapter=sft"], "adapter=sft: no such folder"),
    "no reference": (
        ["reference=model", "reference.checkpoint_dir=other"],
        "reference.checkpoint_dir=other: no such folder",
    ),
    "no pairs": (["dataset.source=piars.jsonl"], "there is no such file. Nearest in"),
    "no held-out pairs": (["eval_dataset.source=there/pairs.jsonl"], "eval_dataset.source=there/pairs.jsonl"),
    "a secret": (["metric_logger.api_key=abc"], "metric_logger.api_key: looks like a secret"),
}


@pytest.mark.parametrize("words, says", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_run_is_one_sentence_before_torch_is_imported(folder, words, says):
    result = start(folder, "run", "lora_dpo_single_device", "--config", "my.yaml", *words)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    "words, says",
    [
        (["runn"], "runn: no such command; nearest: run"),
        (["run", "lora_dpo_devices", "--config", "my"], "lora_dpo_devices: no such recipe; nearest: lora_dpo_"),
        (["run", "lora_dpo_distributed", "--config", "mine.yaml"], "mine.yaml: no such config"),
        (["run", "lora_dpo_distributed", "--config", "my", "loss=ip"], "loss.name=ip: no such loss"),
        (["run", "lora_dpo_distributed", "--config", "not"], "not.yaml: not valid YAML"),
        (["run", "full_dpo_distributed", "--config", "my", "lora.rank=4"], "this recipe has no lora"),
        (["run", "my_copy.py", "--config", "my", "sead=1"], "unknown key sead; nearest: seed"),
        (["run", "my_copy.py", "--config", "my", "dataset.source=a.jsonl"], "there is no such file"),
        (["run", "lora_dpo_single_device"], "or checkpointer.checkpoint_dir=FOLDER dataset.source=PAIRS"),
        (["run", "lora_dpo_single_device", "checkpointer.checkpoint_dir=model"], "dataset.source: has no default"),
        (["run", "lora_dpo_single_device", "dataset=pairs.jsonl"], "checkpointer.checkpoint_dir: has no default"),
        (["plan", "broken"], "broken/config.json: hidden_size='64': must be a whole number"),
        (["plan", "site"], "site: holds no config.json"),
        (["plan", "my", "sead=1"], "unknown key sead; nearest: seed"),
        (["plan", "my", "--recipe", "nothing"], "nothing: no such recipe"),
        (["validate", "lora_dpo_single_device", "--config", "my"], "take CONFIG --recipe lora_dpo_single_device"),
        (["validate", "your"], "your: no such config"),
    ],
)
def test_a_mistake_in_a_command_is_one_sentence_before_torch_is_imported(folder, words, says):
    result = start(folder, *words)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr and result.stderr.count("\n") == 1 and result.stdout == ""


@pytest.mark.parametrize(
    "words",
    [["--help"], ["--version"], ["ls"], ["cat", "llama3_8b"], ["run", "my_copy.py", "--help"], ["plan", "--help"]],
)
def test_what_only_prints_imports_nothing_of_it(folder, words):
    result = start(folder, *words)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 40


def test_a_run_without_mistakes_goes_on_to_import_torch(folder):
    """So a recipe starts, and the tests above test something."""
    for words in (["--config", "my.yaml"], ["checkpointer=./model", "dataset=pairs.jsonl"]):
        result = start(folder, "run", "lora_dpo_single_device", *words)
        assert (result.returncode, result.stderr) == (99, "imported: torch")


def test_a_recipe_that_does_something_of_its_own_may_do_without_the_files_that_its_config_names(folder):
    text = (folder / "my_copy.py").read_text().replace("def main(cfg):", "def main(cfg):\n    print('mine')")
    (folder / "edited.py").write_text(text)
    result = start(folder, "run", "edited.py", "--config", "my.yaml", "dataset.source=made/up.jsonl")
    assert result.stderr == "imported: torch"
    assert "unknown key sead" in start(folder, "run", "edited.py", "--config", "my.yaml", "sead=1").stderr


def test_a_recipe_that_reads_its_words_in_another_way_is_left_alone(folder):
    text = "METHOD, DEFAULTS = 'lora', {}\nif __name__ == '__main__':\n    import sys\n    print(sys.argv[1:])\n"
    (folder / "own.py").write_text(text)
    result = start(folder, "run", "own.py", "--config", "my.yaml", "sead=1")
    assert (result.returncode, result.stdout) == (0, f"['--config', '{folder}/my.yaml', 'sead=1']\n")
