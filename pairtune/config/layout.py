"""What the files of a model's and of an adapter's folder are called, and which of them are read. No torch here."""

from pathlib import Path

from pairtune.errors import UserError
from pairtune.files import read_json

# In the order of preference: an index that names the shards, or one file.
MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
INDEX_FILES = tuple(name for name in MODEL_FILES if name.endswith(".index.json"))
META_FILE = "consolidated.00.pth"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
REPO_ID_FILE = "original_repo_id.json"  # torchtune's name; by it an exported adapter tells which model it belongs to
BASE_FILE = "base_weights.json"  # ours: which weights an adapter was trained on


def check_folder(checkpoint_dir: str, *, key: str = "checkpointer.checkpoint_dir") -> None:
    """Refuses a model's folder that is not there; the config has it at `key`."""
    if not Path(checkpoint_dir).is_dir():
        way_out = f"`tune download REPO_ID --output-dir {checkpoint_dir}` fetches a model"
        raise UserError(f"{key}={checkpoint_dir}: no such folder; {way_out}")


def find_config(checkpoint_dir: str, *, key: str = "checkpointer.checkpoint_dir") -> Path:
    """Returns the config.json of a model's folder.

    Args:
        key: The config's name for `checkpoint_dir`, for messages.

    Raises:
        UserError: No such folder, or none in it; with what the folder is instead, if that can be told.
    """
    check_folder(checkpoint_dir, key=key)
    folder = Path(checkpoint_dir)
    if not (folder / "config.json").is_file():
        what = _other_kind(folder, key)
        raise UserError(f"{key}={checkpoint_dir}: holds no config.json: it is not a model in Hugging Face layout{what}")
    return folder / "config.json"


def _other_kind(folder: Path, key: str) -> str:
    if (folder / "adapter_config.json").is_file():
        return f"; it is an adapter: name its base model's folder here, and adapter={folder} reference=start"
    if (folder / META_FILE).is_file():
        return f"; {META_FILE} is for checkpointer._component_=torchtune.training.FullModelMetaCheckpointer"
    if _has_gguf(folder):
        return "; it holds GGUF files, which are llama.cpp's: download the model's own repository"
    if not any(folder.iterdir()):
        return f"; it is empty: `tune download REPO_ID --output-dir {folder}` fetches a model"
    below = sorted(file.parent for pattern in ("*", "snapshots/*") for file in folder.glob(f"{pattern}/config.json"))
    return f"; nearest valid: {key}={below[0]}" if below else ""


def _has_gguf(folder: Path) -> bool:
    return any(folder.glob("*.gguf"))


def find_weights(checkpoint_dir: str, *, key: str = "checkpointer.checkpoint_dir") -> list[str]:
    """Returns the names of a model's weight files, all of which exist.

    Args:
        key: The config's name for `checkpoint_dir`, for messages.

    Raises:
        UserError: No such folder, no weights or no config.json in it, or a shard that its index names is missing.
    """
    folder, key = find_config(checkpoint_dir, key=key).parent, f"{key}={checkpoint_dir}"
    for name in MODEL_FILES:
        if not (folder / name).is_file():
            continue
        if name not in INDEX_FILES:
            return [name]
        shards = sorted(set(read_index(folder / name).values()))
        missing = [shard for shard in shards if not (folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{key}: {name} names {len(shards)} shards, {len(missing)} of them are missing: {', '.join(missing)}; "
                "download the folder again"
            )
        return shards
    others = "; it holds GGUF files, which are llama.cpp's: download the model's own repository" * _has_gguf(folder)
    raise UserError(f"{key}: holds no weights; looked for {', '.join(MODEL_FILES)}{others}")


def find_adapter(folder: str | Path, *, key: str = "adapter") -> Path:
    """Returns the file of an adapter's matrices.

    Args:
        key: The config's name for `folder`, for messages.

    Raises:
        UserError: There is none.
    """
    folder, told = Path(folder), f"{key}={folder}"
    if not folder.is_dir():
        raise UserError(f"{told}: no such folder; `tune download REPO_ID --output-dir {folder}` fetches one")
    for name in ADAPTER_FILES:
        if (folder / name).is_file():
            return folder / name
    inside = [file.parent for name in ADAPTER_FILES for file in folder.glob(f"*/{name}")]
    hint = f"; nearest valid: {key}={inside[0]}" if inside else ""
    raise UserError(f"{told}: holds no adapter; looked for {', '.join(ADAPTER_FILES)}{hint}")


def read_index(path: Path) -> dict[str, str]:
    """Returns which shard each weight is in, by their names, as an index.json says.

    Raises:
        UserError: It does not say.
    """
    content = read_json(path)
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise UserError(f"{path}: has no weight_map, the shard of each weight; download it again")
    return shards


def read_record(path: Path) -> dict:
    """Returns what a file that no model needs says; nothing if it is not there, or none that we know."""
    try:
        content = read_json(path)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
