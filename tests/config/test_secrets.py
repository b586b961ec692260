"""Secrets reach no file, log or message; and what is downloaded or read is data, none of whose code runs."""

import json
import os
import pickle
import re

import pytest
import torch
from helpers import NF4_SIZES, ROOT, random_pairs, run_recipe, save_llama, save_pairs
from omegaconf import OmegaConf
from test_hub import download_alone, server  # noqa: F401  (fixtures)

from pairtune import config
from pairtune.config.secrets import check_secrets
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint
from pairtune.pairs.tokenize import read_rows

SECRET = "hf_" + "aB3" * 10
DEFAULTS = {
    "output_dir": "runs/x",
    "dataset": {"source": config.REQUIRED, "columns": {}},
    "tokenizer": {"_component_": "pairtune.tokenizer.hf_tokenizer", "path": "x"},
    "metric_logger": None,
}
SECRETS = [
    f"hf_token={SECRET}",
    f"token={SECRET}",
    f"HF_TOKEN={SECRET}",
    f"dataset.api_key={SECRET}",
    f"metric_logger.api_key={SECRET}",
    f"metric_logger={{_component_: torchtune.training.metric_logging.CometLogger, api_key: {SECRET}}}",
    f"tokenizer.auth_token={SECRET}",
    f"database_password={SECRET}",
    f"output_dir=runs/{SECRET}",
    f"dataset.source=https://me:{SECRET}@example.org/pairs.jsonl",
    f"dataset.source=https://example.org/pairs.jsonl?token={SECRET}",
    f"dataset.source=https://example.org/pairs.jsonl?a=1&X-Amz-Signature={SECRET}",
    "output_dir=${oc.env:HF_TOKEN}",
    "metric_logger.project=${oc.env:WANDB_API_KEY}",
]


@pytest.mark.parametrize("written", SECRETS)
@pytest.mark.parametrize("place", ["command line", "file", "per_method"])
def test_what_looks_like_a_secret_is_refused_and_not_shown(tmp_path, monkeypatch, written, place):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    key, _, value = written.partition("=")
    block = {key.rpartition(".")[2]: value}
    for part in reversed(key.split(".")[:-1]):
        block = {part: block}
    path = tmp_path / "config.yaml"
    content = {"command line": {}, "file": block, "per_method": {"per_method": {"full": block}}}[place]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        config.load("lora", DEFAULTS, [path], [written] if place == "command line" else [])
    message = str(refused.value)
    assert SECRET not in message and "looks like a secret" in message and "HF_TOKEN, WANDB_API_KEY" in message
    assert key in message and ("command line" if place == "command line" else "config.yaml") in message


@pytest.mark.parametrize(
    "block",
    [
        {"tokenizer": {"eos_token": "</s>", "max_tokens": 3, "special_tokens": ["a"]}},
        {"samples": {"max_new_tokens": 128, "prompts": ["What is a token?", "Is a password=1 safe?"]}},
        {"dataset": {"source": "https://example.org/pairs.jsonl?rows=100", "columns": {"prompt": "key"}}},
        {"output_dir": "${oc.env:HOME}/runs", "seed": 1, "hf_token": None},
    ],
)
def test_what_does_not_is_left_alone(block):
    check_secrets(block, "here")


def test_tokens_of_the_environment_reach_neither_files_nor_logs(tmp_path, monkeypatch, capfd):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "COMET_API_KEY", "KAGGLE_KEY"):
        monkeypatch.setenv(name, SECRET)
    save_llama(tmp_path / "base")
    save_pairs(tmp_path / "pairs.jsonl", random_pairs(4, prompt=(4, 8), answer=(3, 5)))
    sizes = " ".join(f"{key}: {size}," for key, size in NF4_SIZES.items())
    run_recipe(
        "lora_dpo_single_device", f"output_dir={tmp_path}/run", "device=cpu", "dtype=fp32", "pairs_per_step=4",
        f"model={{_component_: torchtune.models.llama3.llama3, {sizes}}}", f"dataset.source={tmp_path}/pairs.jsonl",
        f"checkpointer.checkpoint_dir={tmp_path}/base", "checkpointer.model_type=LLAMA3", "max_length=96",
        "max_prompt_length=64", "samples.max_new_tokens=2",
        f"metric_logger={{_component_: torchtune.training.metric_logging.DiskLogger, log_dir: {tmp_path}/logs}}",
    )  # fmt: skip
    out, err = capfd.readouterr()
    assert SECRET not in out + err
    files = [path for folder in ("run", "logs") for path in (tmp_path / folder).rglob("*") if path.is_file()]
    assert {"config.yaml", "metrics.jsonl"} <= {path.name for path in files}
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]


@pytest.mark.parametrize("repo", ["meta-llama/Meta-Llama-3-8B-Instruct", "org/gated", "org/absent"])
def test_a_download_shows_and_keeps_no_token(download_alone, tmp_path, repo):  # noqa: F811
    words = (repo, "--output-dir", str(tmp_path / "model"), "--hf-token", SECRET)
    _, out, err = download_alone(*words, HF_TOKEN=SECRET + "x")
    assert SECRET not in out + err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


class Code:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize("make", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_code_in_a_weights_file_does_not_run(tmp_path, monkeypatch, make):
    monkeypatch.chdir(tmp_path)
    save_llama(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    make({"lm_head.weight": Code()}, tmp_path / "base/pytorch_model.bin")
    block = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tmp_path / "base")}
    with pytest.raises(UserError, match=r"pytorch_model\.bin: cannot be read"):
        block = OmegaConf.create(block | {"model_type": "LLAMA3"})
        checkpoint.Weights(checkpoint.open_weights(block))
    assert not (tmp_path / "executed").exists()


def test_a_script_in_a_folder_of_pairs_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/data.py").write_text("import os\nos.mkdir('executed')\n")
    with pytest.raises(UserError, match="the folder cannot be read as a dataset"):
        read_rows(str(tmp_path / "data"))
    assert not (tmp_path / "executed").exists()


def test_nothing_asks_for_remote_code_or_reads_whole_pickles():
    for path in [file for folder in ("pairtune", "recipes", "tools") for file in (ROOT / folder).rglob("*.py")]:
        text = path.read_text()
        assert not re.search(r"trust_remote_code(?!=False)|\bpickle\.|weights_only\s*=\s*False|torch\.load\(", text), (
            path
        )
