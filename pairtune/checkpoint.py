"""Weights in and out: Hugging Face folders are read and written by torchtune's checkpointers, found and named by us."""

import json
import logging
import shutil
import tempfile
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune import config as torchtune_config
from torchtune import training
from torchtune.models import convert_weights
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune
from torchtune.training.checkpointing._utils import safe_torch_load

from pairtune.errors import UserError
from pairtune.metrics import lock
from pairtune.model_config import check_config, check_model_type, model_type_of
from pairtune.rules import one_line

# In the order of preference: an index that names the shards, or one file.
WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # others are quantized: they need their scales

TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
EXPORTED = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "LICENSE*",
    *TOKENIZER_FILES,
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
        shards = sorted(set(_read_index(folder / name).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{key}: {name} names {len(shards)} shards, {len(missing)} of them are missing: {', '.join(missing)}; "
                "download the folder again"
            )
        return shards
    raise UserError(f"{key}: holds no weights; looked for {', '.join(WEIGHT_FILES)}")


def _read_index(path: Path) -> dict[str, str]:
    """Returns which shard each weight is in, by their names, as an index.json says."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; download it again") from None
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{path}: has no weight_map, the shard of each weight; download it again")
    return shards


def open_weights(checkpointer, run_dir: Path):
    """Returns torchtune's checkpointer for the config's `checkpointer` block; no weight is read yet.

    `checkpoint_files` may be left out: the shards are found. Exports go below `run_dir`.

    Raises:
        UserError: The folder is not a model, its files are not complete, or `model_type` is not its architecture.
    """
    arguments = OmegaConf.to_container(checkpointer, resolve=True)
    files = arguments.pop("checkpoint_files", None) or find_weights(arguments["checkpoint_dir"])
    check_model_type(arguments["model_type"], read_config(arguments["checkpoint_dir"]))
    try:
        return torchtune_config.instantiate(
            OmegaConf.create(arguments), checkpoint_files=list(files), output_dir=str(run_dir)
        )
    except KeyError as error:
        known = ", ".join(t.value.upper() for t in training.ModelType)
        raise UserError(f"checkpointer.model_type: {error} is not one of torchtune's: {known}") from None
    except ValueError as error:
        raise UserError(f"checkpointer: {error}") from None


def open_like(checkpointer, checkpoint_dir: str):
    """Returns torchtune's checkpointer for another folder, whose config.json says what architecture it has.

    Args:
        checkpointer: From open_weights; another name of the same conversion, such as LLAMA2, is kept.

    Raises:
        UserError: As open_weights.
    """
    find_weights(checkpoint_dir)
    model_type = model_type_of(read_config(checkpoint_dir), like=checkpointer._model_type.value.upper())
    block = {"checkpoint_dir": checkpoint_dir, "model_type": model_type}
    path = "torchtune.training.FullModelHFCheckpointer"
    return open_weights(OmegaConf.create({"_component_": path, **block}), Path(checkpointer._output_dir))


def weight_files(checkpointer) -> list[Path]:
    """Returns the paths of the weight files that a checkpointer, from open_weights, will read."""
    return [Path(path) for path in checkpointer._checkpoint_paths]


def read_config(checkpoint_dir: str) -> dict:
    """Returns the folder's config.json; what is read of it is of its kind (model_config.check_config)."""
    path = Path(checkpoint_dir) / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read: {error}; download it again") from None
    check_config(content, path)
    return content


def make_room(run_dir: Path, resumed: Path | None = None) -> None:
    """Makes the run folder; an earlier run that it holds is kept beside it, as run_dir.1, run_dir.2, ...

    Args:
        resumed: The checkpoint that the run goes on from. If it is of this folder, the folder stays; if of another one,
            what that run has logged and answered is copied.
    """
    continues = resumed is not None and resumed.resolve().parent.parent == run_dir.resolve()
    log = run_dir / "metrics.jsonl"
    if log.exists():
        with log.open("a") as file:
            if not lock(file):
                raise UserError(
                    f"output_dir={run_dir}: another run is writing there; wait for it, or name another folder"
                )
    if (log.exists() or (run_dir / "checkpoints").exists()) and not continues:
        kept = next(p for n in count(1) if not (p := run_dir.with_name(f"{run_dir.name}.{n}")).exists())
        run_dir.rename(kept)
        print(f"{run_dir} held an earlier run, which is now {kept}\n")
    run_dir.mkdir(parents=True, exist_ok=True)
    for left in run_dir.glob(".export-*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    for name in ("metrics.jsonl", "samples.jsonl") if resumed and not continues else ():
        source = resumed.parent.parent / name
        if source.exists():
            shutil.copy(source, run_dir / name)


class Weights(Mapping):
    """A folder's weights under torchtune's names, on the CPU; each is converted when it is asked for.

    safetensors files are memory-mapped: however many processes read them, the machine holds them once, and may drop
    what it has no room for. torchtune's own reader converts everything first, which for Llama copies an eighth.

    `empty` holds the same weights on the meta device: their names and shapes, for which no value is read.

    Raises:
        UserError: A file is damaged, or lacks a weight that the index says it has; a weight is in two files, is
            quantized, is none of this architecture's, or, when it is asked for, has a value that is not finite.
    """

    def __init__(self, checkpointer):
        self._checkpointer = checkpointer
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}  # which file a tensor is in
        checkpointer._weight_map = {}  # which shard a weight goes to when the model is saved: as in load_checkpoint
        for number, path in enumerate(checkpointer._checkpoint_paths, start=1):
            shard = read_shard(path)
            for key in shard.keys() & self._files.keys():
                raise UserError(f"{path}: {key} is there twice, also in {self._files[key].name}; remove one file")
            self._tensors |= shard
            self._files |= dict.fromkeys(shard, path)
            checkpointer._weight_map |= dict.fromkeys(shard, f"{number:04}")
        _check_index(checkpointer._checkpoint_dir, self._files)
        self.empty: dict[str, Tensor] = {}
        self._sources: dict[str, str] = {}
        for key, value in self._tensors.items():
            converted = self._convert_empty(key, value)
            self.empty |= converted
            self._sources |= dict.fromkeys(converted, key)

    def _convert_empty(self, key: str, value: Tensor) -> dict[str, Tensor]:
        try:
            return self._convert(key, value.to("meta"))
        except Exception as error:  # torchtune's conversions raise what Python raises
            kind = self._checkpointer._model_type.value.upper()
            raise UserError(
                f"{self._files[key]}: {key} {list(value.shape)} is no weight of checkpointer.model_type={kind}, or not "
                f"of the sizes in config.json: {one_line(error)}"
            ) from None

    def _convert(self, key: str, value: Tensor) -> dict[str, Tensor]:
        config, kind = self._checkpointer._config, self._checkpointer._model_type
        heads = {
            "num_heads": config["num_attention_heads"],
            "num_kv_heads": config["num_key_value_heads"],
            "dim": config["hidden_size"],
        }
        if kind in (training.ModelType.PHI3_MINI, training.ModelType.PHI4):
            # torchtune's conversion reads a fused matrix as three equal parts unless it is told of fewer key heads.
            grouped = heads["num_heads"] != heads["num_kv_heads"]
            return phi3_hf_to_tune({key: value}, **(heads if grouped else dict.fromkeys(heads)))
        if kind is training.ModelType.QWEN2:
            tied = config["tie_word_embeddings"]
            return qwen2_hf_to_tune({key: value}, **heads, tie_word_embeddings=tied)
        return convert_weights.hf_to_tune({key: value}, **heads, head_dim=config.get("head_dim"))

    def __getitem__(self, name: str) -> Tensor:
        key = self._sources[name]
        value = self._tensors[key]
        # The sum of finite numbers may overflow: only then is every number looked at, which takes several passes.
        if not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
            raise UserError(
                f"{self._files[key]}: {key} holds NaN or infinite values: the file is damaged, or the run that saved "
                "it had diverged; download it again, or take an earlier checkpoint"
            )
        return self._convert(key, value)[name]

    def __iter__(self):
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def read_shard(path: Path) -> dict[str, Tensor]:
    """Returns a file's tensors by name, memory-mapped. A pickle may hold tensors only: none of its code is run."""
    try:
        shard = safe_torch_load(path)
    except ValueError as error:
        reason = one_line(error.__cause__).partition(". ")[0]
        more = "" if path.suffix == ".safetensors" else ", or a pickle that holds more than weights, which nothing runs"
        raise UserError(
            f"{path}: cannot be read: {reason}; it is damaged{more}; download it again, as safetensors if there are any"
        ) from error
    if not isinstance(shard, dict):
        raise UserError(f"{path}: holds a {type(shard).__name__}, not weights by name; save the model's state_dict")
    for key, value in shard.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{path}: {key} is a {type(value).__name__}: not weights by name; save the state_dict")
        if value.dtype not in FLOATS:
            dtype = str(value.dtype).removeprefix("torch.")
            raise UserError(f"{path}: {key} is {dtype}: quantized; take the model that it was made from")
    return shard


def _check_index(folder: Path, files: dict[str, Path]) -> None:
    """Every weight that an index names is in the file that it names, as far as that file is read."""
    read = {path.name for path in files.values()}
    for index in (folder / name for name in WEIGHT_FILES if name.endswith(".index.json")):
        shards = _read_index(index) if index.is_file() else {}
        elsewhere = (key for key, shard in shards.items() if key not in files or files[key].name != shard)
        absent = [key for key in elsewhere if shards[key] in read]
        if absent:
            raise UserError(
                f"{index}: {len(absent)} weights are not in the file it names, such as {absent[0]} in "
                f"{shards[absent[0]]}; download the folder again"
            )


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
        merged: models.merge_adapters of the gathered weights.
        adapter: models.only_adapters of the same; empty without adapters.
        lora: rank, alpha, dropout and modules, with an adapter.
        tokenizer: The config's `tokenizer` block: its `path`, if a folder, is where the tokenizer's files are, and its
            `chat_template` is the one that goes with them.
    """
    checkpoint_dir = Path(checkpointer._checkpoint_dir)
    dtype = str(next(iter(merged.values())).dtype).removeprefix("torch.")
    state = {training.MODEL_KEY: merged}
    if adapter:
        if checkpointer._model_type is training.ModelType.QWEN2:
            adapter = _undo_rotary_order(adapter, checkpointer._config)
        state |= {training.ADAPTER_KEY: adapter, training.ADAPTER_CONFIG: _adapter_config(lora)}
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".export-") as name:
        written, folder = Path(name) / "epoch_0", Path(name) / "export"
        checkpointer._output_dir = Path(name)
        torchtune_log = logging.getLogger("torchtune.utils._logging")  # it names files that are about to move
        torchtune_log.disabled = True
        checkpointer.save_checkpoint(state, epoch=0)
        torchtune_log.disabled = False
        folder.mkdir()
        # torchtune copies all that lies in the base's folder, an adapter of an earlier run included.
        for file in [file for pattern in EXPORTED for file in written.glob(pattern) if file.is_file()]:
            file.rename(folder / file.name)
        _copy_tokenizer(tokenizer or {}, checkpoint_dir, folder)
        _edit_json(folder / "config.json", torch_dtype=dtype, dtype=dtype)
        if adapter:
            _move_adapter(written, folder, checkpoint_dir)
        exported = run_dir / "export"
        if exported.exists():
            exported.rename(Path(name) / "earlier")
        folder.rename(exported)
    return exported


def pairs_together(matrix: Tensor, heads: int) -> Tensor:
    """Returns the rows of [rows, rank] as torchtune orders them for its rotary embedding.

    Hugging Face keeps a head's first halves of rotated pairs before its second ones, torchtune keeps pairs together.
    """
    rows, rank = matrix.shape
    return matrix.view(heads, 2, rows // heads // 2, rank).transpose(1, 2).reshape(rows, rank)


def _undo_rotary_order(adapter: dict[str, Tensor], config: dict) -> dict[str, Tensor]:
    """Reorders B of q_proj and k_proj so that torchtune's conversion to PEFT gives back the order it has.

    torchtune reorders them for every architecture, from its own rotary layout to Hugging Face's; Qwen 2's weights
    never left the latter.
    """
    reordered = dict(adapter)
    for name, value in adapter.items():
        for projection, key in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if f"{projection}.lora_b" in name:
                reordered[name] = pairs_together(value, config[key])
    return reordered


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


def _move_adapter(written: Path, folder: Path, checkpoint_dir: Path) -> None:
    target = folder / "adapter"
    target.mkdir()
    if not (written / "adapter_model.safetensors").exists():
        (written / "adapter_model.pt").rename(target / "adapter_model.pt")
        print("adapter: torchtune knows no PEFT layout of this architecture; adapter_model.pt has torchtune's names")
        return
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (written / name).rename(target / name)
    for file in _tokenizer_files(folder):
        shutil.copy(file, target / file.name)
    if "base_model_name_or_path" not in json.loads((target / "adapter_config.json").read_text()):
        _edit_json(target / "adapter_config.json", base_model_name_or_path=str(checkpoint_dir.resolve()))


def _copy_tokenizer(tokenizer: dict, checkpoint_dir: Path, folder: Path) -> None:
    """Puts the run's tokenizer and chat template into a folder that has the base model's."""
    path, template = tokenizer.get("path"), tokenizer.get("chat_template")
    if path and Path(path).is_dir() and Path(path).resolve() != checkpoint_dir.resolve():
        for file in _tokenizer_files(Path(path)):
            shutil.copy(file, folder / file.name)
    elif path and Path(path).is_file():
        shutil.copy(path, folder / Path(path).name)
    if template and template != "plain":
        text = Path(template).read_text() if "{" not in template else template
        (folder / "chat_template.jinja").write_text(text)


def _tokenizer_files(folder: Path) -> list[Path]:
    return [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()]


def _edit_json(path: Path, **values) -> None:
    edited = json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n"
    path.unlink()  # a copy of a read-only file is read-only
    path.write_text(edited)
