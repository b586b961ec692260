"""Training checkpoints: all that resuming means, written so that a kill at any moment loses no earlier one.

A checkpoint is a folder, checkpoints/step_N. torch.distributed.checkpoint writes its tensors as safetensors, each
process its own shards, and any number of processes reads them back; the rest is state.json. Nothing is pickled. The
folder has a temporary name until every file is on the disk; its marker, written last, lists the files.
"""

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as torch_dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pairtune.config.rules import HIGHER_IS_BETTER
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.models.build import forget_gathered, plain_name
from pairtune.run.metrics import Meter

MARKER, VALUES = "COMPLETE", "state.json"
FILE_BYTES = 2**30  # of tensors a file: safetensors holds a file's bytes a second time while it writes them
_WAY_OUT = "remove that folder to go on from the one before it"


class TrainState:
    """What a run is after `step` steps. Weights that are not trained are not in it, nor are pairs: see fingerprint.py.

    Build it before the first forward: FSDP2 shows a model's shards, which are what the optimizer holds, until then.

    Attributes:
        step: Steps made.
        origin: The checkpoint of another run that this one branched from, if it did.
        evaluated: The last step that was evaluated; an interrupted evaluation is made up for.
        best: The best evaluation so far: `step`, `metric` and `value`; None before the first.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler,
        meter: Meter,
        *,
        world: World,
        fingerprint: dict,
        loss_fn: Callable | None = None,
        reference=None,
    ):
        """
        Args:
            loss_fn: If it is a module, its buffers are part of the state, such as bco_pair's running mean.
            reference: One that moves while training: its `tensors` are part of the state.
        """
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in a run of one process it is
        self.step, self.evaluated, self.best, self.origin = 0, 0, None, None
        self.fingerprint = fingerprint
        self._model, self._reference = model, reference
        buffers = loss_fn.state_dict() if isinstance(loss_fn, nn.Module) else {}
        self._loss = {f"loss.{name}": buffer for name, buffer in buffers.items()}
        self._trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer, self._scheduler, self._meter, self._world = optimizer, scheduler, meter, world
        if scheduler:
            _check_json(scheduler.state_dict(), "lr_scheduler")
        for group in self._param_groups():
            _check_json(group, "optimizer")

    def tensors(self) -> dict[str, Tensor]:
        """Returns this process's tensors by their names in a checkpoint: weights, optimizer, generators, sums."""
        rank = self._world.rank
        tensors = {f"model.{name}": p.data for name, p in self._trained.items()}
        for name, p in self._trained.items():
            for key, value in self._optimizer.state[p].items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{name}.{key}"] = value
        tensors[f"generator.{rank}.cpu"] = torch.get_rng_state()
        if self._world.device.type == "cuda":
            tensors[f"generator.{rank}.cuda"] = torch.cuda.get_rng_state(self._world.device)
        tensors[f"meter.{rank}"] = self._meter.state()[1]
        tensors |= self._loss
        return tensors | (self._reference.tensors() if self._reference else {})

    def values(self) -> dict:
        """Returns all that is not a tensor, as JSON can hold it."""
        optimizer = {
            name: {k: v for k, v in self._optimizer.state[p].items() if not isinstance(v, Tensor)}
            for name, p in self._trained.items()
        }
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "origin": self.origin,
            "num_processes": self._world.size,
            "torch": torch.__version__,
            "meter": self._meter.state()[0],
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
            "optimizer": {name: values for name, values in optimizer.items() if values},
            "param_groups": self._param_groups(),
            "fingerprint": self.fingerprint,
        }

    def _param_groups(self) -> list[dict]:
        return [
            {k: v.item() if isinstance(v, Tensor) else v for k, v in group.items() if k != "params"}
            for group in self._optimizer.param_groups
        ]

    def load(self, folder: Path, run_dir: Path, *, best_metric: str | None = None) -> None:
        """Becomes what a checkpoint holds; every process has to call it.

        Args:
            run_dir: This run's. The best checkpoint so far is forgotten if it is not there.
            best_metric: It is also forgotten if it was the best by another one, or of other held-out pairs.

        Raises:
            UserError: A file is damaged, or the schedule cannot go on for another number of steps.
        """
        values = read_values(folder)
        wanted = self._read(folder, lambda saved: self._templates(saved, values))
        self._load_optimizer(wanted, values)
        if self._scheduler:
            self._load_scheduler(values)
        self._load_meter(wanted, values)
        generators = {k.rpartition(".")[2]: v for k, v in wanted.items() if k.startswith("generator.")}
        if "cpu" in generators:
            torch.set_rng_state(generators["cpu"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self._world.device)
        self.step, self.evaluated, self.best = values["step"], values["evaluated"], values["best"]
        self.origin = values["origin"] if _is_within(folder, run_dir) else str(folder.resolve())
        same_held_out = values["fingerprint"]["held_out"] == self.fingerprint["held_out"]
        same_metric = not self.best or self.best["metric"] == best_metric
        if not (same_held_out and same_metric):
            self.evaluated = 0
        if self.best and not (
            same_held_out and same_metric and is_complete(run_dir / "checkpoints" / f"step_{self.best['step']}")
        ):
            self.best = None

    def load_weights(self, folder: Path) -> None:
        """Gives the model a checkpoint's weights, and changes nothing else; every process has to call it."""
        self._read(folder, lambda saved: {f"model.{name}": p.data for name, p in self._trained.items()})
        forget_gathered(self._model)

    def _read(self, folder: Path, templates: Callable[[dict], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Fills tensors, chosen by what the checkpoint has, from it."""
        reader = HuggingFaceStorageReader(str(folder))
        try:
            wanted = templates(reader.read_metadata().state_dict_metadata)
            dcp.load(wanted, storage_reader=reader, no_dist=self._world.mesh is None)
        except (Exception, CheckpointException) as error:  # the latter is no Exception; safetensors has its own
            raise UserError(f"resume: {folder} cannot be read: {_reason(error)}; {_WAY_OUT}") from None
        return wanted

    def _templates(self, saved: dict, values: dict) -> dict[str, Tensor]:
        """What to read: weights in place, and new tensors for all else that concerns this process."""
        rank, same_size = self._world.rank, values["num_processes"] == self._world.size
        wanted = {f"model.{name}": p.data for name, p in self._trained.items()} | self._loss
        wanted |= self._reference.tensors() if self._reference else {}
        for key, found in saved.items():
            kind, _, rest = key.partition(".")
            dtype, shape = found.properties.dtype, found.size
            if kind == "optimizer":
                parameter = self._trained[rest.rpartition(".")[0]]
                like_parameter = shape == parameter.shape
                wanted[key] = (
                    torch.zeros_like(parameter.data, dtype=dtype) if like_parameter else torch.zeros(shape, dtype=dtype)
                )
            elif kind == "generator":
                if rest.startswith(f"{rank}.") and rest.endswith(("cpu", self._world.device.type)):
                    wanted[key] = torch.zeros(shape, dtype=dtype)
            elif kind == "meter" and (int(rest) == rank if same_size else rank == 0):
                wanted[key] = torch.zeros(shape, dtype=dtype)
        return wanted

    def _load_optimizer(self, wanted: dict[str, Tensor], values: dict) -> None:
        state_dict = self._optimizer.state_dict()
        indices = [i for group in state_dict["param_groups"] for i in group["params"]]
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        names = {id(p): name for name, p in self._trained.items()}
        for index, parameter in zip(indices, parameters, strict=True):
            prefix = f"optimizer.{names[id(parameter)]}."
            state_dict["state"][index] = {
                **{key.removeprefix(prefix): value for key, value in wanted.items() if key.startswith(prefix)},
                **values["optimizer"].get(names[id(parameter)], {}),
            }
        for group, saved in zip(state_dict["param_groups"], values["param_groups"], strict=True):
            group.update({k: _as_before(v, group.get(k)) for k, v in saved.items()})
        self._optimizer.load_state_dict(state_dict)
        for parameter in parameters:  # which torch has cast to the weight's dtype
            state, prefix = self._optimizer.state[parameter], f"optimizer.{names[id(parameter)]}."
            for key, value in state.items():
                if prefix + key in wanted:
                    state[key] = wanted[prefix + key].to(value.device)

    def _load_scheduler(self, values: dict) -> None:
        then, now = values["fingerprint"]["config"], self.fingerprint["config"]
        if not isinstance(self._scheduler, LambdaLR) and any(then[k] != now[k] for k in ("epochs", "max_steps")):
            raise UserError(
                f"resume: {type(self._scheduler).__name__} cannot go on for another number of steps; leave epochs and "
                "max_steps as they were, or use pairtune.schedules.cosine"
            )
        self._scheduler.load_state_dict(values["scheduler"])
        if isinstance(self._scheduler, LambdaLR):
            # The next step's rate, by this run's schedule: another number of epochs makes another curve.
            schedule = zip(self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True)
            rates = [lr * share(self._scheduler.last_epoch) for lr, share in schedule]
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def _load_meter(self, wanted: dict[str, Tensor], values: dict) -> None:
        found = [value for key, value in wanted.items() if key.startswith("meter.")]
        sums = torch.stack(found).sum(0) if found else torch.zeros(2, len(values["meter"]), dtype=torch.float64)
        self._meter.load_state(values["meter"], sums, self._world.device)


def _check_json(values: dict, key: str) -> None:
    """Refuses what would not come back from state.json as it was, before training and not at the first save."""
    try:
        back = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        back = error
    if back != _with_lists(values):
        raise UserError(
            f"{key}: its state cannot be saved as JSON ({back if isinstance(back, Exception) else values}), and a run "
            f"could not be resumed exactly; name another {key}"
        )


def _with_lists(node):
    if isinstance(node, dict):
        return {key: _with_lists(value) for key, value in node.items()}
    return [_with_lists(value) for value in node] if isinstance(node, (list, tuple)) else node


def _is_within(folder: Path, run_dir: Path) -> bool:
    return folder.resolve().parent == (run_dir / "checkpoints").resolve()


def _as_before(value, current):
    """What JSON made of a value, in the type that it has in the optimizer."""
    if isinstance(current, Tensor):
        return torch.as_tensor(value, dtype=current.dtype, device=current.device)
    return tuple(value) if isinstance(current, tuple) else value


class Checkpoints:
    """The checkpoints of a run folder: written in the background, the newest and the best kept.

    Every process calls every method, at the same step.
    """

    def __init__(self, run_dir: Path, world: World, *, keep_last_n: int, on_save_failure: str = "stop"):
        """
        Args:
            keep_last_n: Checkpoints that stay, besides the best; 0 writes none.
            on_save_failure: stop, or continue: say so and train on. Earlier checkpoints stay in either case.
        """
        self._dir, self._world = run_dir / "checkpoints", world
        self._keep_last_n, self._on_save_failure = keep_last_n, on_save_failure
        self._pending: Future | None = None
        self._writing: Path | None = None  # the folder that it fills
        self._best: Path | None = None  # the best that is on the disk
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        # Collectives of a save run beside those of training: on the CPU, in a group of their own.
        hours = timedelta(hours=6)  # a slow disk; a process that dies ends it at once
        self._group = torch_dist.new_group(backend="gloo", timeout=hours) if world.mesh is not None else None
        if world.is_main:  # what a kill has left
            without_marker = (folder for folder in self._dir.glob("step_*") if not (folder / MARKER).exists())
            for folder in (*self._dir.glob(".step_*"), *without_marker):
                shutil.rmtree(folder, ignore_errors=True)
        self._check_shared()

    def folder(self, step: int) -> Path:
        """Returns where the checkpoint of a step is, or will be."""
        return self._dir / f"step_{step}"

    def __str__(self) -> str:
        complete = complete_checkpoints(self._dir)
        return f"resume=true goes on from {complete[-1]}" if complete else "there is no checkpoint to go on from"

    def save(self, state: TrainState) -> None:
        """Copies the state and returns; a thread writes the copy. Waits for the save before, if it still goes on.

        Raises:
            UserError: The disk has no room, or cannot be written; with on_save_failure=continue it is only told.
        """
        if not self._keep_last_n:
            return
        self.wait()
        self._world.beat(f"saving step {state.step}", patient=True)
        folder = self.folder(state.step)
        tensors, values = state.tensors(), state.values()
        missing = self._world.agree(self._missing_bytes(tensors) if self._world.is_main else None)
        if missing:
            self._fail(
                f"step {state.step}: no checkpoint: {self._dir} has {_gib(missing)} less than it takes; make room, or "
                f"lower keep_last_n={self._keep_last_n}"
            )
            return
        if self._world.agree(self._world.is_main and is_complete(folder)):  # the same weights, evaluated since
            if self._world.is_main:
                _write(folder / VALUES, json.dumps(values))
            return
        if self._world.is_main:
            self._dir.mkdir(parents=True, exist_ok=True)
        temporary = self._dir / f".step_{state.step}"
        files = _files(tensors, self._world.size)
        try:
            written = dcp.async_save(
                tensors,
                storage_writer=HuggingFaceStorageWriter(str(temporary), files, save_distributed=True),
                process_group=self._group,
                no_dist=self._group is None,
            )
        except (Exception, CheckpointException) as error:  # such as tensors of a kind that safetensors does not know
            self._fail(f"step {state.step}: no checkpoint: {_reason(error)}")
            return
        self._writing = temporary
        self._pending = self._thread.submit(self._finish, written, values, temporary, folder)

    def load_best(self, state: TrainState) -> str:
        """Gives the model the weights of the best checkpoint, if there is one; returns a sentence about it."""
        folder = self._best
        if state.best and is_complete(self.folder(state.best["step"])):
            folder = self.folder(state.best["step"])
        folder = self._world.agree(folder)
        if folder is None:
            return "export_best=true: no best checkpoint is on the disk; exported are the last weights"
        state.load_weights(folder)
        return f"exported are the weights of {folder}, the best by the held-out {read_values(folder)['best']['metric']}"

    def wait(self) -> None:
        """Returns when the last save has ended. Raises as `save` does."""
        pending, self._pending = self._pending, None
        try:
            size = None
            while pending and not futures.wait([pending], timeout=5).done:
                if size != (size := _size(self._writing)):  # it gets on; a disk that hangs is for the watchdog
                    self._world.beat("writing a checkpoint", patient=True)
            if pending:
                pending.result()
        except (Exception, CheckpointException) as error:
            self._fail(f"no checkpoint: {_reason(error)}")

    def close(self) -> None:
        """Waits for the last save and ends its thread."""
        self.wait()
        self._thread.shutdown()

    def check_room(self, state: TrainState) -> None:
        """Raises UserError, or tells, if the disk has no room for as many checkpoints as are kept, and one more."""
        if self._keep_last_n:
            copies = self._keep_last_n + 1
            missing = self._world.agree(self._missing_bytes(state.tensors(), copies) if self._world.is_main else None)
            if missing:
                self._fail(
                    f"{self._dir} has {_gib(missing)} less than {copies} checkpoints take (keep_last_n="
                    f"{self._keep_last_n}, and one while it is written); make room, or lower keep_last_n"
                )

    def _missing_bytes(self, tensors: dict[str, Tensor], copies: int = 1) -> int:
        needed = copies * sum(t.numel() * t.element_size() for t in tensors.values())  # a DTensor counts whole
        exists = next(p for p in (self._dir, *self._dir.parents) if p.exists())
        return max(0, needed - shutil.disk_usage(exists).free)

    def _finish(self, written: Future, values: dict, temporary: Path, folder: Path) -> None:
        """In the thread: waits for every process's files, then gives the folder its name, and its marker last."""
        try:
            written.result()
            sizes = self._sync_files(temporary)
            if self._world.is_main:
                _write(temporary / VALUES, json.dumps(values))
                _sync_folder(temporary)
                shutil.rmtree(folder, ignore_errors=True)  # one of this step that was damaged
                temporary.rename(folder)
                _sync_folder(self._dir)
                _write(folder / MARKER, json.dumps(sizes))
                self._prune(values["best"])
        except (Exception, CheckpointException):
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _sync_files(self, temporary: Path) -> dict[str, int]:
        """Has every process's files on the disk, and returns their sizes, which this process sees, too."""
        own = {}
        for path in temporary.glob(f"shard-{self._world.rank + 1:05}-*.safetensors"):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # torch before 2.15 leaves what is in a buffer
            own[path.name] = path.stat().st_size
        parts = [own]
        if self._group is not None:
            parts = [None] * self._world.size
            torch_dist.all_gather_object(parts, own, group=self._group)
        sizes = {name: size for part in parts for name, size in part.items()}
        if self._world.is_main:
            for name, size in sizes.items():
                if (temporary / name).stat().st_size != size:
                    raise OSError(f"{temporary / name} is not as long as the process that wrote it says")
        return sizes

    def _check_shared(self) -> None:
        """Raises UserError if a process does not see what the main one writes."""
        if not self._keep_last_n or self._world.size == 1:
            return
        token = self._dir / self._world.agree(f".seen-{os.getpid()}")
        if self._world.is_main:
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
    own = complete_checkpoints(run_dir / "checkpoints")
    if resume in (True, "auto"):
        if own or resume == "auto":
            return own[-1] if own else None
        raise UserError(f"resume=true: {run_dir}/checkpoints holds no complete one; resume=auto starts anew then")
    folder = Path(resume)
    if not folder.name.startswith("step_"):
        found = complete_checkpoints(folder / "checkpoints")
        if not found:
            raise UserError(
                f"resume={resume}: holds no complete checkpoint; must be true, false, auto, or the path of a run "
                "folder or of its checkpoints/step_N"
            )
        folder = found[-1]
    if not is_complete(folder):
        raise UserError(
            f"resume={resume}: is not a complete checkpoint: it has no {MARKER}, or lacks a file named there"
        )
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


def complete_checkpoints(folder: Path) -> list[Path]:
    """Returns the complete checkpoints of a `checkpoints` folder, oldest first."""
    numbered = [p for p in folder.glob("step_*") if p.name.removeprefix("step_").isdigit() and is_complete(p)]
    return sorted(numbered, key=lambda path: int(path.name.removeprefix("step_")))


def is_complete(folder: Path) -> bool:
    """Returns whether a checkpoint has its marker and every file that it lists, as long as it was.

    An error of the disk is an error: a checkpoint that cannot be read now is not one that is incomplete.
    """
    try:
        sizes = json.loads((folder / MARKER).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return False


def read_values(folder: Path) -> dict:
    """Returns a checkpoint's state.json."""
    try:
        return json.loads((folder / VALUES).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"resume: {folder / VALUES} cannot be read: {error}; {_WAY_OUT}") from None


def is_better(value: float, best: dict | None, metric: str) -> bool:
    """Returns whether an evaluation's value is the best so far; what is not a number never is."""
    if not math.isfinite(value):
        return False
    return best is None or (value > best["value"] if HIGHER_IS_BETTER[metric] else value < best["value"])


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


def _write(path: Path, text: str) -> None:
    """Replaces a small file at once, on the disk when this returns."""
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*")) if folder.exists() else 0


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _reason(error: BaseException) -> str:
    """What went wrong, of an error that DCP may have wrapped, one of each process."""
    failures = getattr(error, "failures", None) or {}
    inner = next((e[0] if isinstance(e, tuple) else e for e in failures.values()), error)
    if isinstance(inner, OSError) and inner.errno == errno.ENOSPC:
        return "the disk is full"
    return f"{type(inner).__name__}: {' '.join(str(inner).split())}"
