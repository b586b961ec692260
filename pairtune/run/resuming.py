"""Resuming: which checkpoint a run goes on from, and what is read of it, on any number of processes.

Before anything of one is used, its files are compared with what its marker says of them: marker.py. What a run makes of
it is told by state.TrainState; how one is written: checkpoints.py.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.run.disk_space import reason
from pairtune.run.marker import check_content, check_files, is_complete, lacking, read_marker

VALUES = "state.json"
_WAY_OUT = "remove that folder to go on from the one before it"


def find(resume: bool | str, run_dir: Path) -> Path | None:
    """Returns the checkpoint that a run begins with, None for the start.

    Args:
        resume: false; true: the newest complete checkpoint of `run_dir`; auto: the same, if there is one; or a path, of
            a checkpoint or of another run folder.

    Raises:
        UserError: There is none, or the path is an earlier checkpoint of this very run folder.
    """
    if resume is False:
        return None
    own = complete_checkpoints(run_dir / "checkpoints", refuse=True)
    if resume in (True, "auto"):
        if own or resume == "auto":
            return own[-1] if own else None
        newest = max((run_dir / "checkpoints").glob("step_*"), key=lambda path: path.stat().st_mtime_ns, default=None)
        why = f" ({newest.name}: {lacking(newest)})" if newest else ""
        raise UserError(f"resume=true: {run_dir}/checkpoints holds no complete one{why}; resume=auto starts anew then")
    folder = Path(resume)
    if not folder.exists():
        raise UserError(f"resume={resume}: there is no such folder; it was moved, or is called otherwise")
    if not folder.name.startswith("step_"):
        found = complete_checkpoints(folder / "checkpoints", refuse=True)
        if not found:
            raise UserError(
                f"resume={resume}: holds no complete checkpoint; must be true, false, auto, or the path of a run "
                "folder or of its checkpoints/step_N"
            )
        folder = found[-1]
    if read_marker(folder) is None or not is_complete(folder):
        raise UserError(f"resume={resume}: is not a complete checkpoint: {lacking(folder)}")
    if own and _branched_from(own[-1], resume):
        return own[-1]  # the same command again
    if own and folder.resolve().parent == own[-1].resolve().parent and folder.resolve() != own[-1].resolve():
        raise UserError(
            f"resume={resume}: this run went on to {own[-1].name}, which would be overwritten; resume=true goes on "
            "from there, and another output_dir makes a branch from here"
        )
    return folder


def _branched_from(own: Path, resume: str) -> bool:
    """Returns whether a run's checkpoint stems from the one, or the run folder, that `resume` names."""
    origin = read_values(own)["origin"]
    return origin is not None and Path(resume).resolve() in (Path(origin), Path(origin).parent.parent)


def complete_checkpoints(folder: Path, *, refuse: bool = False) -> list[Path]:
    """Returns the complete checkpoints of a `checkpoints` folder, oldest first.

    Args:
        refuse: Raise UserError for the newest if its marker is damaged, which else is not complete.
    """
    numbered = [p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit()]
    numbered.sort(key=lambda path: int(path.name.removeprefix("step_")))
    if refuse and numbered:
        read_marker(numbered[-1])
    return [path for path in numbered if is_complete(path)]


def read_values(folder: Path, world: World | None = None) -> dict:
    """Returns a checkpoint's state.json.

    Args:
        world: Compare the checksums of all its files with what was written; every process has to call it then.

    Raises:
        UserError: A file is damaged.
    """
    if world:
        check_files(folder, world, way_out=_WAY_OUT)
    try:
        content = (folder / VALUES).read_bytes()
        values = json.loads(content)
    except (OSError, ValueError) as error:
        raise UserError(f"resume: {folder / VALUES} cannot be read: {error}; {_WAY_OUT}") from None
    check_content(folder, VALUES, content, way_out=_WAY_OUT)
    return values


def read_tensors(folder: Path, templates: Callable[[dict], dict[str, Tensor]], world: World) -> dict[str, Tensor]:
    """Returns tensors by their names in a checkpoint, filled from it in place; every process has to call it.

    Args:
        templates: Chooses the tensors to fill by what the checkpoint has: names, and torch's metadata of each.

    Raises:
        UserError: A file is damaged.
    """
    reader = HuggingFaceStorageReader(str(folder))
    try:
        wanted = templates(reader.read_metadata().state_dict_metadata)
        dcp.load(wanted, storage_reader=reader, no_dist=world.mesh is None)
    except UserError:
        raise
    except (Exception, CheckpointException) as error:  # the latter is no Exception; safetensors has its own
        raise UserError(f"resume: {folder} cannot be read: {reason(error)}; {_WAY_OUT}") from None
    return wanted
