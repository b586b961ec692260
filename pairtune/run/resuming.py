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

from pairtune.errors import UserError
from pairtune.process.dist import World
from pairtune.run.disk_space import reason
from pairtune.run.marker import MARKER, check_content, check_files, is_complete, lacking

VALUES = "state.json"
_WAY_OUT = "remove that folder to go on from the one before it"


def find(resume: bool | str, run_dir: Path) -> Path | None:
    """Returns the checkpoint that a run begins with, None for the start; prints which newer ones have lost something.

    Args:
        resume: false; true: the newest complete checkpoint of `run_dir`; auto: the same, if there is one; or a path, of
            a checkpoint or of another run folder.

    Raises:
        UserError: There is none, or none is whole any more, or the path is an earlier checkpoint of this very run
            folder.
    """
    if resume is False:
        return None
    own, lacks = _newest(run_dir)
    if resume in (True, "auto"):
        if own is None:
            _refuse_start(resume, run_dir, lacks)
        _tell(lacks, own)
        return own
    folder = Path(resume)
    if not folder.exists():
        raise UserError(f"resume={resume}: there is no such folder; it was moved, or is called otherwise")
    others: list[str] = []
    if not folder.name.startswith("step_"):
        folder, others = _newest(folder)
        if folder is None:
            raise UserError(
                f"resume={resume}: holds no complete checkpoint{_in_brackets(others)}; must be true, false, auto, or "
                "the path of a run folder or of its checkpoints/step_N"
            )
    if wrong := lacking(folder):
        raise UserError(f"resume={resume}: is not a complete checkpoint: {wrong}; name another one, or its run folder")
    if own and _branched_from(own, resume):
        _tell(lacks, own)
        return own  # the same command again
    if own and folder.resolve().parent == own.resolve().parent and folder.resolve() != own.resolve():
        raise UserError(
            f"resume={resume}: this run went on to {own.name}, which would be overwritten; resume=true goes on "
            "from there, and another output_dir makes a branch from here"
        )
    _tell(others if own else [*others, *lacks], folder)
    return folder


def _newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """Returns the newest complete checkpoint of a run folder, and what each newer one lacks.

    Raises:
        UserError: The marker of one of these is damaged.
    """
    lacks: list[str] = []
    for path in reversed(_numbered(run_dir / "checkpoints")):
        if not (wrong := lacking(path)):
            return path, lacks
        lacks.append(f"{path} is not whole: {wrong}")
    return None, lacks


def _refuse_start(resume: bool | str, run_dir: Path, lacks: list[str]) -> None:
    """Where no checkpoint is whole: resume=auto may start anew if no complete one is lost by that.

    Raises:
        UserError: It is not, or resume=true.
    """
    lost = any((path / MARKER).exists() for path in _numbered(run_dir / "checkpoints"))
    if resume == "auto" and not lost:
        for said in lacks:
            print(f"resume=auto: {said}; the run starts anew")
        return
    anew = "resume=false starts anew, and keeps this run beside it" if lost else "resume=auto starts anew then"
    said = f"{run_dir}/checkpoints holds no complete one{_in_brackets(lacks)}"
    raise UserError(f"resume={str(resume).lower()}: {said}; {anew}")


def _tell(lacks: list[str], taken: Path | None) -> None:
    for said in lacks if taken else []:
        print(f"resume: {said}; {taken} is taken instead")


def _in_brackets(lacks: list[str]) -> str:
    return f" ({'; '.join(lacks)})" if lacks else ""


def _branched_from(own: Path, resume: str) -> bool:
    """Returns whether a run's checkpoint stems from the one, or the run folder, that `resume` names."""
    origin = read_values(own)["origin"]
    return origin is not None and Path(resume).resolve() in (Path(origin), Path(origin).parent.parent)


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a `checkpoints` folder, oldest first."""
    return [path for path in _numbered(folder) if is_complete(path)]


def _numbered(folder: Path) -> list[Path]:
    """What is called as a checkpoint in a `checkpoints` folder, by the number of its step."""
    numbered = [path for path in folder.glob("step_*") if path.name.removeprefix("step_").isdigit()]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step_")))


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
