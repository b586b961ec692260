"""Fetches a model's files from the Hugging Face Hub into a folder that torchtune's checkpointers read.

Only what training reads: a repository often holds its weights two or three times over. Nothing here imports torch.
"""

import errno
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects

from pairtune.errors import UserError

REPO_ID_FILE = "original_repo_id.json"  # torchtune's name; by it an exported adapter tells which model it belongs to
INDEX_FILE = "model.safetensors.index.json"
OTHER_FRAMEWORKS = ("*.msgpack", "*.h5", "*.ot", "*.tflite", "*.onnx", "*.onnx_data", "*.gguf", "*.mlmodel")
# Weights a second time, where safetensors exist. Not all of original/: Llama 3's tokenizer.model is only there.
OTHER_WEIGHTS = ("*.bin", "*.bin.index.json", "*.pth", "*.pt", "*.safetensors")
OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
# The client's HTTP library was requests, then httpx, then httpx2; its errors are what HfHubHTTPError derives from.
UNREACHABLE = (OSError, *HfHubHTTPError.__bases__)


def download(
    repo_id: str,
    output_dir: Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    ignore_patterns: list[str] | None = None,
) -> Path:
    """Returns the absolute folder that now holds the repository's files, complete, and REPO_ID_FILE.

    Files already there are kept if they are what the repository has. `ignore_patterns` replaces the default choice of
    what to leave out (`unread`); an empty list leaves out nothing.

    Raises:
        UserError: no such repository or revision, no access, no network, no space, another model in `output_dir`.
    """
    folder = Path(output_dir).expanduser().absolute()
    _check_folder(folder, repo_id)
    try:
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True, token=token, timeout=30)
        have = {file.rfilename: file.size or 0 for file in info.siblings}
        ignore = unread(list(have)) if ignore_patterns is None else ignore_patterns
        wanted = list(filter_repo_objects(have, ignore_patterns=ignore))
        skipped = have.keys() - wanted
        if skipped:
            total = show_size(sum(have[name] for name in skipped))
            print(f"Leaving out {len(skipped)} files, {total} (--ignore-patterns without a pattern fetches all):")
            print("  " + ", ".join(sorted(skipped)))
        _check_space(folder, {name: have[name] for name in wanted})
        # By commit: what was listed is what comes, also when somebody pushes meanwhile.
        snapshot_download(repo_id, revision=info.sha, local_dir=folder, ignore_patterns=ignore, token=token)
    except (HFValidationError, *UNREACHABLE) as error:
        raise UserError(_explain(error, repo_id, revision, folder)) from error
    _check_complete(folder, {name: have[name] for name in wanted}, ignore)
    (folder / REPO_ID_FILE).write_text(json.dumps({"repo_id": repo_id}, indent=4))
    return folder


def unread(files: list[str]) -> list[str]:
    """Returns those of a repository's files that DPO does not read.

    Weights for other frameworks always; .bin, .pth and further safetensors only beside the model's own safetensors,
    which are those in the root under the names that transformers saves.
    """
    patterns = OTHER_FRAMEWORKS
    if any(_is_own_weights(name) for name in files):
        patterns += OTHER_WEIGHTS
    return [name for name in files if not _is_own_weights(name) and any(fnmatch(name, p) for p in patterns)]


def sizes(folder: Path) -> dict[str, int]:
    """Returns bytes by relative path for the files in a downloaded folder, without the client's own bookkeeping."""
    files = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {str(name): path.stat().st_size for name, path in files.items() if name.parts[0] != ".cache"}


def show_size(size: int) -> str:
    """Returns bytes for people: `512 B`, `1.2 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _is_own_weights(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in OWN_WEIGHTS)


def _check_folder(folder: Path, repo_id: str) -> None:
    """Two models in one folder would be read as one: same default folder for models that differ only in owner."""
    record = folder / REPO_ID_FILE
    if not record.is_file():
        return
    other = json.loads(record.read_text()).get("repo_id")
    if other != repo_id:
        raise UserError(f"{folder} holds {other}; give {repo_id} a folder of its own with --output-dir")


def _check_space(folder: Path, wanted: dict[str, int]) -> None:
    there = sizes(folder) if folder.is_dir() else {}
    needed = sum(size for name, size in wanted.items() if there.get(name) != size)
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    if needed > free:
        raise UserError(_no_space(folder, f"{show_size(needed)} needed, {show_size(free)} free"))


def _check_complete(folder: Path, wanted: dict[str, int], ignore: list[str]) -> None:
    """Every file has the size that the repository says, and every shard that the index names is there."""
    there = sizes(folder)
    broken = [name for name, size in wanted.items() if there.get(name, -1) < size]
    if broken:
        raise UserError(f"{folder}: incomplete: {', '.join(broken)}; the same command again fetches the rest")
    index = folder / INDEX_FILE
    if INDEX_FILE not in wanted:
        return
    shards = set(json.loads(index.read_text())["weight_map"].values())
    missing = sorted(set(filter_repo_objects(shards, ignore_patterns=ignore)) - there.keys())
    if missing:
        raise UserError(
            f"{folder}: {INDEX_FILE} names {', '.join(missing)}, which the repository does not hold: "
            "its upload is incomplete; take another --revision"
        )


def _explain(error: Exception, repo_id: str, revision: str | None, folder: Path) -> str:
    """Returns what went wrong and the way out, in one sentence or two."""
    page = f"{constants.ENDPOINT}/{repo_id}"
    login = "--hf-token TOKEN, or HF_TOKEN, or `hf auth login`"
    cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
    status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
    if isinstance(error, HFValidationError):
        return f"{repo_id}: a model is named owner/name, as on {constants.ENDPOINT}"
    if isinstance(cause, GatedRepoError):
        return f"{repo_id} is gated: accept its licence at {page}, then give your token: {login}"
    if isinstance(cause, RevisionNotFoundError):
        return f"{repo_id} has no revision {revision}; its branches and tags are at {page}/refs"
    if isinstance(cause, RepositoryNotFoundError):
        return f"{repo_id}: no such model at {constants.ENDPOINT}, or a private one; if it is yours: {login}"
    if status in (401, 403):
        return f"{repo_id}: the Hub refuses this token ({_first_line(cause)}); another one: {login}"
    if status is not None:
        return f"{repo_id}: the Hub answers with an error, try later: {_first_line(cause)}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return _no_space(folder, "the disk is full")
    if isinstance(error, OSError) and error.filename is not None:  # of a file, not of a connection
        return f"{folder}: cannot be written ({error}); another folder: --output-dir DIR"
    return (
        f"{repo_id}: {constants.ENDPOINT} cannot be reached ({type(error).__name__}: {_first_line(error)}); "
        "the same command again goes on where it stopped"
    )


def _no_space(folder: Path, why: str) -> str:
    return f"{folder}: {why}; another disk: --output-dir DIR"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
