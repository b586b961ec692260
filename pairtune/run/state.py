"""What a run is after a number of steps: all that resuming means, as tensors and as JSON, and back."""

import math
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from pairtune.config.rules import HIGHER_IS_BETTER, set_and_metric
from pairtune.errors import UserError
from pairtune.models.adapters import plain_name
from pairtune.models.shard import forget_gathered
from pairtune.process.dist import World
from pairtune.run.marker import is_complete, lacking
from pairtune.run.metrics import Meter
from pairtune.run.optimizer_state import OptimizerState, as_before, as_numbers, check_json
from pairtune.run.optimizers import make_state
from pairtune.run.resuming import read_tensors, read_values


class TrainState:
    """What a run is after `step` steps. Weights that are not trained are not in it, nor are pairs: see fingerprint.py.

    Build it before the first forward: FSDP2 shows a model's shards, which are what the optimizer holds, until then.

    Attributes:
        step: Steps made.
        origin: The checkpoint of another run that this one branched from, if it did.
        evaluated: The last step that was evaluated, -1 before; an interrupted evaluation is made up for.
        best: The best evaluation so far by keep_best: `step`, `metric` and `value`; None before the first. That before
            the first step is none: there is nothing to keep.
        lowest: The evaluation with the lowest held-out loss so far, in the same form, that before the first step
            included; of the held-out set that keep_best names, if it names one. num_worse: evaluations since.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        scheduler,
        meter: Meter,
        world: World,
        fingerprint: dict,
        *,
        loss_fn: Callable | None = None,
        reference=None,
        steps=None,
    ):
        """
        Args:
            loss_fn: If it is a module, its buffers are part of the state, such as bco_pair's running mean.
            reference: One that moves while training: its `tensors` are part of the state.
            steps: Of a stream, whose `state` is part of this one.
        """
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in a run of one process it is
        self.step, self.evaluated, self.best, self.origin = 0, -1, None, None
        self.lowest, self.num_worse, self._counted = None, 0, -1
        self.fingerprint = fingerprint
        self._model, self._reference, self._steps = model, reference, steps
        buffers = loss_fn.state_dict() if isinstance(loss_fn, nn.Module) else {}
        self._loss = {f"loss.{name}": buffer for name, buffer in buffers.items()}
        self._trained = {plain_name(name): p for name, p in model.named_parameters() if p.requires_grad}
        self._optimizer, self._scheduler, self._meter, self._world = optimizer, scheduler, meter, world
        self._kept = OptimizerState(optimizer, self._trained, world)
        if scheduler:
            check_json(as_numbers(scheduler.state_dict()), "lr_scheduler", "lr_scheduler")
        check_json(self._kept.groups(), "optimizer", "optimizer")

    def is_due(self, every_n_steps: int | Fraction | None, total_steps: int) -> bool:
        """Returns whether something is to be done after this step: at the end, and every so many steps.

        Where these are a fraction, it is due after the first step that reaches a multiple of it.
        """
        if self.step == total_steps:
            return True
        return bool(every_n_steps) and self.step // every_n_steps > (self.step - 1) // every_n_steps >= 0

    def owes_evaluation(self, every_n_steps: int | Fraction | None, total_steps: int) -> bool:
        """Returns whether held-out pairs are to be looked at now: before the first step, and when `is_due`."""
        return self.evaluated < self.step and (self.step == 0 or self.is_due(every_n_steps, total_steps))

    def stops_early(self, patience: int | None) -> bool:
        """Returns whether so many evaluations in a row had no lower held-out loss than one before; null: never."""
        return patience is not None and self.num_worse >= patience

    @property
    def is_best(self) -> bool:
        """Whether no evaluation was better than that of this step, by the metric of `keep_best`."""
        return self.best is not None and self.best["step"] == self.step

    def note_evaluation(self, results: dict[str, float], metric: str | None) -> None:
        """Takes in the held-out pairs' results of this step.

        Args:
            results: From Meter.read, with the prefix eval/.
            metric: keep_best, by which the best checkpoint is chosen, if one is.
        """
        self.evaluated = self.step
        if self._counted < self.step:  # else this step is looked at once more, for another keep_best
            self._counted, self.num_worse = self.step, self.num_worse + 1
            loss_of_set = _loss_of_set(metric)
            loss = results.get(f"eval/{loss_of_set}", math.nan)
            if is_better(loss, self.lowest, "loss"):
                self.lowest, self.num_worse = {"step": self.step, "metric": loss_of_set, "value": loss}, 0
        if metric and self.step and is_better(value := results[f"eval/{metric}"], self.best, metric):
            self.best = {"step": self.step, "metric": metric, "value": value}

    def tensors(self) -> dict[str, Tensor]:
        """Returns this process's tensors by their names in a checkpoint: weights, optimizer, generators, sums."""
        rank = self._world.rank
        tensors = {f"model.{name}": p.data for name, p in self._trained.items()}
        tensors |= self._kept.tensors()
        tensors[f"generator.{rank}.cpu"] = torch.get_rng_state()
        if self._world.device.type == "cuda":
            tensors[f"generator.{rank}.cuda"] = torch.cuda.get_rng_state(self._world.device)
        tensors[f"meter.{rank}"] = self._meter.state()[1]
        tensors |= self._loss
        return tensors | (self._reference.tensors() if self._reference else {})

    def values(self) -> dict:
        """Returns all that is not a tensor, as JSON can hold it."""
        return {
            "step": self.step,
            "evaluated": self.evaluated,
            "best": self.best,
            "lowest": self.lowest,
            "num_worse": self.num_worse,
            "origin": self.origin,
            "num_processes": self._world.size,
            "num_shards": self._world.num_shards if self._world.shards else 1,
            "torch": torch.__version__,
            "meter": self._meter.state()[0],
            "scheduler": as_numbers(self._scheduler.state_dict()) if self._scheduler else None,
            "optimizer": self._kept.values(),
            "param_groups": self._kept.groups(),
            "fingerprint": self.fingerprint,
            "stream": self._steps.state() if self._steps else None,
        }

    def load(self, folder: Path, run_dir: Path, *, best_metric: str | None = None) -> None:
        """Becomes what a checkpoint holds; every process has to call it.

        Args:
            run_dir: This run's. The best checkpoint so far is forgotten if it is not there.
            best_metric: It is also forgotten if it was the best by another one, or of other held-out pairs.

        Raises:
            UserError: A file is damaged, or optimizer or schedule cannot go on from it.
        """
        values, found = read_values(folder), {}
        if len(values["param_groups"]) != len(self._optimizer.param_groups):
            raise UserError(
                f"resume: {folder} has an optimizer of {len(values['param_groups'])} parameter groups, this run of "
                f"{len(self._optimizer.param_groups)}: it was written when norms and biases were decayed, too; go on "
                "with decay_norms_and_biases=true"
            )
        make_state(self._optimizer)  # as its own step makes it, and then each tensor is filled

        def templates(saved: dict) -> dict[str, Tensor]:
            found.update(saved)
            return self._templates(saved, values)

        if self._steps:
            self._steps.load(values.get("stream"))
        wanted = read_tensors(folder, templates, self._world)
        self._kept.load(wanted, values["optimizer"], values["param_groups"], found)
        if self._scheduler:
            self._load_scheduler(values)
        self._load_meter(wanted, values)
        generators = {k.rpartition(".")[2]: v for k, v in wanted.items() if k.startswith("generator.")}
        if "cpu" in generators:
            torch.set_rng_state(generators["cpu"])
        if "cuda" in generators:
            torch.cuda.set_rng_state(generators["cuda"], self._world.device)
        self.step, self.evaluated, self.best = values["step"], values["evaluated"], values["best"]
        self.lowest, self.num_worse = values.get("lowest"), values.get("num_worse", 0)  # earlier versions have neither
        self.origin = values["origin"] if _is_within(folder, run_dir) else str(folder.resolve())
        same_held_out = values["fingerprint"]["held_out"] == self.fingerprint["held_out"]
        same_metric = not self.best or self.best["metric"] == best_metric
        if not same_held_out:
            self.evaluated = -1
        elif not same_metric:  # this step is looked at again; what was found before it stands
            self.evaluated = min(self.evaluated, self.step - 1)
        if not same_held_out or (self.lowest and self.lowest["metric"] != _loss_of_set(best_metric)):
            self.lowest, self.num_worse = None, 0
        else:
            self._counted = values["evaluated"]
        if self.best and not (same_held_out and same_metric):
            self.best = None
        if self.best and not self.is_best:
            self._look_for_best(run_dir / "checkpoints" / f"step_{self.best['step']}")

    def _look_for_best(self, folder: Path) -> None:
        """Forgets the best checkpoint so far if it is not whole, or not in this run's folder, and says so."""
        if not is_complete(folder):
            why = f"is not whole: {lacking(folder)}" if folder.exists() else "is not there"
            self._world.print(f"resume: the best checkpoint so far, {folder}, {why}; the best from here on is kept")
            self.best = None

    def load_weights(self, folder: Path) -> None:
        """Gives the model a checkpoint's weights, and changes nothing else; every process has to call it."""
        weights = {f"model.{name}": p.data for name, p in self._trained.items()}
        read_tensors(folder, lambda saved: weights, self._world)
        forget_gathered(self._model)

    def _templates(self, saved: dict, values: dict) -> dict[str, Tensor]:
        """What to read: weights in place, and new tensors for all else that concerns this process."""
        rank, same_size = self._world.rank, values["num_processes"] == self._world.size
        wanted = {f"model.{name}": p.data for name, p in self._trained.items()} | self._loss
        wanted |= self._reference.tensors() if self._reference else {}
        wanted |= self._kept.templates(saved, values.get("num_shards"))
        for key, found in saved.items():
            kind, _, rest = key.partition(".")
            dtype, shape = found.properties.dtype, found.size
            if kind == "generator":
                if rest.startswith(f"{rank}.") and rest.endswith(("cpu", self._world.device.type)):
                    wanted[key] = torch.zeros(shape, dtype=dtype)
            elif kind == "meter" and (int(rest) == rank if same_size else rank == 0):
                wanted[key] = torch.zeros(shape, dtype=dtype)
        return wanted

    def _load_scheduler(self, values: dict) -> None:
        then, now = values["fingerprint"]["config"], self.fingerprint["config"]
        if not isinstance(self._scheduler, LambdaLR) and any(then[k] != now[k] for k in ("epochs", "max_steps")):
            raise UserError(
                f"resume: {type(self._scheduler).__name__} cannot go on for another number of steps; leave epochs and "
                "max_steps as they were, or use pairtune.schedules.cosine"
            )
        self._scheduler.load_state_dict(as_before(values["scheduler"], self._scheduler.state_dict()))
        if isinstance(self._scheduler, LambdaLR):
            # The next step's rate, by this run's schedule: another number of epochs makes another curve.
            schedule = zip(self._scheduler.base_lrs, self._scheduler.lr_lambdas, strict=True)
            rates = [lr * share(self._scheduler.last_epoch) for lr, share in schedule]
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = as_before(float(rate), group["lr"])

    def _load_meter(self, wanted: dict[str, Tensor], values: dict) -> None:
        found = [value for key, value in wanted.items() if key.startswith("meter.")]
        sums = torch.stack(found).sum(0) if found else torch.zeros(2, len(values["meter"]), dtype=torch.float64)
        self._meter.load_state(values["meter"], sums, self._world.device)


def _loss_of_set(metric: str | None) -> str:
    """Returns the held-out loss of the set that a metric of keep_best is of."""
    name, _ = set_and_metric(metric or "")
    return f"{name}/loss" if name else "loss"


def _is_within(folder: Path, run_dir: Path) -> bool:
    return folder.resolve().parent == (run_dir / "checkpoints").resolve()


def is_better(value: float, best: dict | None, metric: str) -> bool:
    """Returns whether an evaluation's value is the best so far; what is not a number never is."""
    if not math.isfinite(value):
        return False
    higher = HIGHER_IS_BETTER[set_and_metric(metric)[1]]
    return best is None or (value > best["value"] if higher else value < best["value"])
