"""Weights in and out: Hugging Face folders are read and written by torchtune's checkpointers, found and named by us."""

import json
import logging
import shutil
from pathlib import Path

from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config as torchtune_config
from torchtune import training

from pairtune.errors import UserError

# In the order of preference: an index that names the shards, or one file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


def find_weights(checkpoint_dir: str) -> list[str]:
    """Returns the names of the folder's weight files, all of which exist.

    Raises:
        UserError: No such folder, no weights or no config.json in it, or a shard that its index names is missing.
    """
    folder = Path(checkpoint_dir)
    key = f"checkpointer.checkpoint_dir={checkpoint_dir}"
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; `tune download REPO_ID --output-dir {checkpoint_dir}` fetches a model")
    if not (folder / "config.json").is_file():
        raise UserError(f"{key}: holds no config.json: it is not a model in Hugging Face layout")
    for name in WEIGHT_FILES:
        if not (folder / name).is_file():
            continue
        if not name.endswith(".index.json"):
            return [name]
        shards = sorted(set(json.loads((folder / name).read_text())["weight_map"].values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{key}: {name} names {len(shards)} shards, {len(missing)} of them are missing: {', '.join(missing)}; "
                "download the folder again"
            )
        return shards
    raise UserError(f"{key}: holds no weights; looked for {', '.join(WEIGHT_FILES)}")


def open_weights(checkpointer, run_dir: Path):
    """Returns torchtune's checkpointer for the config's `checkpointer` block; nothing is read yet.

    `checkpoint_files` may be left out: the shards are found. Exports go below `run_dir`.
    """
    arguments = OmegaConf.to_container(checkpointer, resolve=True)
    files = arguments.pop("checkpoint_files", None) or find_weights(arguments["checkpoint_dir"])
    try:
        return torchtune_config.instantiate(
            OmegaConf.create(arguments), checkpoint_files=files, output_dir=str(run_dir / ".export")
        )
    except KeyError as error:
        known = ", ".join(t.value.upper() for t in training.ModelType)
        raise UserError(f"checkpointer.model_type: {error} is not one of torchtune's: {known}") from None
    except ValueError as error:
        raise UserError(f"checkpointer: {error}") from None


def read_weights(checkpointer) -> dict[str, Tensor]:
    """Returns the folder's weights under torchtune's names, on the CPU."""
    return checkpointer.load_checkpoint()[training.MODEL_KEY]


def export(
    checkpointer,
    run_dir: Path,
    *,
    merged: dict[str, Tensor],
    adapter: dict[str, Tensor] | None = None,
    lora: dict | None = None,
    tokenizer: dict | None = None,
) -> Path:
    """Writes run_dir/export: the merged weights in Hugging Face layout, with the config and tokenizer of the base.

    An adapter goes to run_dir/export/adapter in PEFT layout, with the tokenizer beside it. The folder takes its name
    when it is complete.

    Args:
        merged: models.merged_state_dict(model).
        adapter: models.adapter_state_dict(model).
        lora: rank, alpha, dropout and modules, with an adapter.
        tokenizer: The config's `tokenizer` block: its `path`, if a folder, is where the tokenizer's files are, and its
            `chat_template` is the one that goes with them.
    """
    checkpoint_dir = Path(checkpointer._checkpoint_dir)
    dtype = str(next(iter(merged.values())).dtype).removeprefix("torch.")
    state = {training.MODEL_KEY: merged}
    if adapter:
        state |= {training.ADAPTER_KEY: adapter, training.ADAPTER_CONFIG: _adapter_config(lora)}
    torchtune_log = logging.getLogger("torchtune.utils._logging")  # it names files that are about to move
    torchtune_log.disabled = True
    checkpointer.save_checkpoint(state, epoch=0)
    torchtune_log.disabled = False
    folder = Path(checkpointer._output_dir) / "epoch_0"
    _copy_tokenizer(tokenizer or {}, checkpoint_dir, folder)
    _edit_json(folder / "config.json", torch_dtype=dtype, dtype=dtype)
    if adapter:
        _move_adapter(folder, checkpoint_dir)
    exported = run_dir / "export"
    if exported.exists():
        shutil.rmtree(exported)
    folder.rename(exported)
    shutil.rmtree(checkpointer._output_dir)
    return exported


def _adapter_config(lora: dict) -> dict:
    names = [m for m in lora["modules"] if m != "mlp"] + (["w1", "w2", "w3"] if "mlp" in lora["modules"] else [])
    return {
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "target_modules": names,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "lora_dropout": lora["dropout"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _move_adapter(folder: Path, checkpoint_dir: Path) -> None:
    target = folder / "adapter"
    target.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        if (folder / name).exists():
            shutil.move(folder / name, target / name)
    (folder / "adapter_model.pt").unlink(missing_ok=True)  # torchtune's second copy of the same weights
    for file in _tokenizer_files(folder):
        shutil.copy2(file, target / file.name)
    config = target / "adapter_config.json"
    if config.exists() and "base_model_name_or_path" not in json.loads(config.read_text()):
        _edit_json(config, base_model_name_or_path=str(checkpoint_dir.resolve()))


def _copy_tokenizer(tokenizer: dict, checkpoint_dir: Path, folder: Path) -> None:
    """Puts the run's tokenizer and chat template into a folder that has the base model's."""
    path, template = tokenizer.get("path"), tokenizer.get("chat_template")
    if path and Path(path).is_dir() and Path(path).resolve() != checkpoint_dir.resolve():
        for file in _tokenizer_files(Path(path)):
            shutil.copy2(file, folder / file.name)
    elif path and Path(path).is_file():
        shutil.copy2(path, folder / Path(path).name)
    if template and template != "plain":
        text = Path(template).read_text() if "{" not in template else template
        (folder / "chat_template.jinja").write_text(text)


def _tokenizer_files(folder: Path) -> list[Path]:
    names = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
    return [file for name in names for file in folder.glob(name) if file.is_file()]


def _edit_json(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n")
