"""Training checkpoints on the disk, written so that a kill at any moment loses no earlier one.

A checkpoint is a folder, checkpoints/step_N. torch.distributed.checkpoint writes its tensors as safetensors, each
process its own shards; the rest is state.json. Nothing is pickled. The folder has a temporary name until every file is
on the disk; its marker, written last, lists the files with their sizes and checksums: marker.py. What is in one is told
by state.TrainState; how one is found and read: resuming.py.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageWriter

from pairtune.errors import UserError
from pairtune.files import give_modes, sync_folder, telling, write_text
from pairtune.process.dist import World
from pairtune.run import disk_space
from pairtune.run.disk_space import reason, shown
from pairtune.run.marker import MARKER, check_files, digest, digest_file, is_complete, replace_file, write_marker
from pairtune.run.resuming import VALUES, complete_checkpoints, read_values

FILE_BYTES = 2**30  # of tensors a file: safetensors holds a file's bytes a second time while it writes them


class Checkpoints:
    """The checkpoints of a run folder: written in the background, the newest and the best kept.

    Every process calls every method, at the same step. `state` is the run's TrainState.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        keep_last_n: int,
        keep_best: str | None = None,
        on_save_failure: str = "stop",
        best: Mapping | None = None,
    ):
        """
        Args:
            keep_last_n: Checkpoints that stay, besides the best; 0 writes none.
            keep_best: The metric by which a best one is kept, if one is.
            on_save_failure: stop, or continue: say so and train on. Earlier checkpoints stay in either case.
            best: TrainState.best, of a resumed run.
        """
        self._dir, self._world = run_dir / "checkpoints", world
        self._keep_last_n, self._on_save_failure = keep_last_n, on_save_failure
        self._keeps_best = keep_best is not None
        self._pending: Future | None = None
        self._writing: Path | None = None  # the folder that it fills
        self._synced = 0  # bytes of all saves that were read back for their checksums
        there = best and is_complete(self.folder(best["step"]))
        self._best = self.folder(best["step"]) if there else None  # that is on the disk
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Collectives of a save run beside those of training: on the CPU, in a group of their own.
        hours = timedelta(hours=6)  # a slow disk; a process that dies ends it at once
        self._group = torch_dist.new_group(backend="gloo", timeout=hours) if world.mesh is not None else None
        if world.is_main:  # what a kill has left
            ours = (folder for folder in self._dir.glob("*") if re.fullmatch(r"\.?step_\d+", folder.name))
            for folder in ours:
                if folder.name[0] == "." or not (folder / MARKER).exists():
                    shutil.rmtree(folder, ignore_errors=True)
        self._check_shared()

    def folder(self, step: int) -> Path:
        """Returns where the checkpoint of a step is, or will be."""
        return self._dir / f"step_{step}"

    def __str__(self) -> str:
        complete = complete_checkpoints(self._dir)
        return f"resume=true goes on from {complete[-1]}" if complete else "there is no checkpoint to go on from"

    def save(self, state) -> None:
        """Copies the state and returns; a thread writes the copy. Waits for the save before, if it still goes on.

        Raises:
            UserError: The disk has no room, or cannot be written; with on_save_failure=continue it is only told.
        """
        if not self._keep_last_n or state.step == 0:  # nothing was learned that could be lost
            return
        self.wait()
        self._world.beat(f"saving step {state.step}", patient=True)
        folder = self.folder(state.step)
        tensors, values = state.tensors(), state.values()
        if self._world.agree(self._world.is_main and is_complete(folder)):  # the same weights, perhaps evaluated since
            if self._world.is_main:
                with telling(folder, "resume=true goes on"):
                    _note_evaluation(folder, values)
            return
        needed = {"checkpoints": disk_space.num_bytes(tensors, self._world.num_shards)}
        found = disk_space.missing(self._dir.parent, needed) if self._world.is_main else None
        missing, where = self._world.agree(found)
        if missing:
            self._fail(
                f"step {state.step}: no checkpoint: {where} has {shown(missing)} less than it takes; make room, or "
                f"lower keep_last_n={self._keep_last_n}"
            )
            return
        if self._world.is_main:
            with telling(self._dir, "resume=true goes on from an earlier one"):
                self._dir.mkdir(parents=True, exist_ok=True)
        temporary = self._dir / f".step_{state.step}"
        files = _files(tensors, self._world.size)
        own = [(name, file) for name, file in files.items() if name.startswith("local.")]
        files |= dict(self._world.gather(own))  # the main process's map is everyone's
        try:
            written = dcp.async_save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(temporary), files, save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (Exception, CheckpointException) as error:  # such as tensors of a kind that safetensors does not know
            self._fail(f"step {state.step}: no checkpoint: {reason(error)}")
            return
        self._writing = temporary
        self._pending = self._thread.submit(self._finish, written, values, temporary, folder)

    def load_best(self, state) -> None:
        """Gives the model the weights of the best checkpoint, if there is one, and prints which."""
        folder = self._best
        if state.best and is_complete(self.folder(state.best["step"])):
            folder = self.folder(state.best["step"])
        folder = self._world.agree(folder)
        if folder is None:
            self._world.print("\nexport_best=true: no best checkpoint is on the disk; exported are the last weights")
            return
        check_files(folder, self._world, way_out="resume=true export_best=false exports the last weights")
        state.load_weights(folder)
        best = state.best if state.best and folder == self.folder(state.best["step"]) else read_values(folder)["best"]
        self._world.print(f"\nexported are the weights of {folder}, the best by the held-out {best['metric']}")

    def wait(self) -> None:
        """Returns when the last save has ended. Raises as `save` does."""
        pending, self._pending = self._pending, None
        before = None
        while pending and not futures.wait([pending], timeout=5).done:
            now = _size(self._writing), self._synced
            if now != before:  # it gets on; a disk that hangs is for the watchdog
                self._world.beat("writing a checkpoint", patient=True)
            before = now
        try:
            if pending:
                pending.result()
        except (Exception, CheckpointException) as error:
            self._fail(f"no checkpoint: {reason(error)}")

    def close(self) -> None:
        """Waits for the last save and ends its thread."""
        self.wait()
        self._thread.shutdown()

    @contextmanager
    def telling_the_way_on(self) -> Iterator[None]:
        """Around what comes after the last step: what the disk refuses there is told, and that the state is kept.

        Raises:
            UserError: In place of the disk's error.
        """
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"after the last step: {reason(error)}; nothing is half written, and when this is mended, {self}"
                + (", without training again" if complete_checkpoints(self._dir) else "")
            ) from None

    def check_disk_space(self, state, steps_left: int, export_bytes: int) -> None:
        """Raises UserError, or tells, if the disk has no room for what the run still writes at its fullest moment.

        That is one checkpoint more than are kept, or those that are kept and the export; one that is there counts,
        since another one takes its place.

        Args:
            state: With the optimizer's state in place.
            steps_left: How many checkpoints there may still be.
            export_bytes: From export.export_size.
        """
        size, found = disk_space.num_bytes(state.tensors(), self._world.num_shards), None
        if self._world.is_main:
            moments = disk_space.at_the_fullest(
                size,
                export_bytes,
                kept=self._keep_last_n and self._keep_last_n + self._keeps_best,
                there=len(complete_checkpoints(self._dir)),
                steps_left=steps_left,
            )
            found = max(disk_space.missing(self._dir.parent, sizes) for sizes in moments)
        missing, where = self._world.agree(found)
        if missing:
            self._fail(
                f"{where} has {shown(missing)} less than the run takes: {shown(size)} a checkpoint (keep_last_n="
                f"{self._keep_last_n}, and one while it is written), {shown(export_bytes)} for the export; make room, "
                f"or {'lower keep_last_n' if self._keep_last_n > 1 else 'name another output_dir'}"
            )

    def _finish(self, written: Future, values: dict, temporary: Path, folder: Path) -> None:
        """In the thread: waits for every process's files, then gives the folder its name, and its marker last."""
        try:
            written.result()
            files = self._sync_files(temporary)
            if self._world.is_main:
                text = json.dumps(values)
                files[VALUES] = digest(text.encode())
                write_text(temporary / VALUES, text, durable=True)
                give_modes(temporary)
                sync_folder(temporary)
                shutil.rmtree(folder, ignore_errors=True)  # one of this step that was damaged
                temporary.rename(folder)
                sync_folder(self._dir)
                write_marker(folder, files)
                self._prune(values["best"])
        except (Exception, CheckpointException):
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _sync_files(self, temporary: Path) -> dict[str, list]:
        """Has every process's files on the disk, and returns what the marker says of each, by their names.

        Raises:
            OSError: In every process, where one of them cannot.
        """
        own, error = {}, None
        try:
            for path in temporary.glob(f"shard-{self._world.rank + 1:05}-*.safetensors"):
                with path.open("rb") as file:
                    os.fsync(file.fileno())  # torch before 2.15 leaves what is in a buffer
                own[path.name] = digest_file(path, self._count_synced)
        except OSError as raised:
            error = raised
        parts = [(own, error)]
        if self._group is not None:  # told, before it is raised: the others would wait for it
            parts = [None] * self._world.size
            told = error and f"process {self._world.rank}: {reason(error)}"
            torch_dist.all_gather_object(parts, (own, told), group=self._group)
            error = next((OSError(told) for _, told in parts if told), None)
        if error:
            raise error
        files = {name: said for part, _ in parts for name, said in part.items()}
        if self._world.is_main:
            for name, (size, _) in files.items():
                if (temporary / name).stat().st_size != size:
                    raise OSError(f"{temporary / name} is not as long as the process that wrote it says")
        return files

    def _count_synced(self, num_bytes: int) -> None:
        self._synced += num_bytes

    def _check_shared(self) -> None:
        """Raises UserError if a process does not see what the main one writes."""
        if not self._keep_last_n or self._world.size == 1:
            return
        token = self._dir / self._world.agree(f".seen-{os.getpid()}")
        if self._world.is_main:
            with telling(self._dir, "name another output_dir"):
                self._dir.mkdir(parents=True, exist_ok=True)
                token.touch()
        self._world.barrier()
        blind = self._world.max_number(int(not token.exists()))
        if self._world.is_main:
            token.unlink()
        if blind:
            raise UserError(
                f"output_dir={self._dir.parent}: not all machines see it, and each process writes its own shards "
                "there; name a folder on a disk that they share, or keep_last_n=0"
            )

    def _prune(self, best: dict | None) -> None:
        complete = complete_checkpoints(self._dir)
        if best and is_complete(self.folder(best["step"])):
            self._best = self.folder(best["step"])  # else the save of a new best has failed: the one before stays
        kept = [*complete[-self._keep_last_n :], self._best]
        for folder in complete:
            if folder not in kept:
                (folder / MARKER).unlink()
                shutil.rmtree(folder, ignore_errors=True)

    def _fail(self, message: str) -> None:
        if self._on_save_failure == "stop":
            raise UserError(f"{message}. Earlier checkpoints are as they were (on_save_failure=continue trains on)")
        self._world.print(f"{message}. Training goes on (on_save_failure=continue)")


def _note_evaluation(folder: Path, values: dict) -> None:
    """Adds what an evaluation of its step has found to a checkpoint that is complete; all else in it stays."""
    saved = read_values(folder)
    found = {key: values[key] for key in ("evaluated", "best", "lowest", "num_worse")}
    found["fingerprint"] = saved["fingerprint"] | {"held_out": values["fingerprint"]["held_out"]}
    # Not what forgets the best, as where a run is resumed without keep_best by mistake
    is_other = saved["evaluated"] == values["evaluated"] and values["best"] not in (None, saved["best"])
    if saved["evaluated"] < values["evaluated"] or is_other:
        replace_file(folder, VALUES, json.dumps(saved | found))


def _files(tensors: dict[str, Tensor], num_processes: int) -> dict[str, int]:
    """Which file, from 1, of each process a tensor goes to."""
    files, filled = {}, 0
    for name, tensor in tensors.items():
        files[name] = 1 + filled // (FILE_BYTES * num_processes)
        filled += tensor.numel() * tensor.element_size()
    own = [name for name in tensors if name.startswith(("generator.", "meter."))]
    for rank in range(num_processes):  # every process looks its own up here
        files |= {f"{n.split('.')[0]}.{rank}{''.join('.' + part for part in n.split('.')[2:])}": files[n] for n in own}
    return files


def _size(folder: Path) -> int:
    """Returns how many bytes are in a folder, to which another thread may just give its name."""
    size = 0
    with suppress(FileNotFoundError):
        for path in folder.glob("*"):
            with suppress(FileNotFoundError):
                size += path.stat().st_size
    return size
