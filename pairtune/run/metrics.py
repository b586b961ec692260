"""What a run writes down: exact means in metrics.jsonl and in torchtune's loggers, each pair in pairs.bin, and what
follows from them: its verdict and its curves."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pairtune.config import instantiate
from pairtune.config.uses import lacks
from pairtune.errors import UserError
from pairtune.files import telling, write_text
from pairtune.models.logps import AnswerScores
from pairtune.pairs.at_once import sets_of
from pairtune.pairs.batch import PairBatch
from pairtune.pairs.digests import numbers_of, short_digest
from pairtune.pairs.pair import Pair
from pairtune.process.dist import World
from pairtune.run import pair_log, report, verdict
from pairtune.run.curves import draw_curves, plot_curves
from pairtune.run.finished import open_run
from pairtune.run.log_file import FILE, keep_lines, read_log, set_names
from pairtune.run.pair_texts import decoder
from pairtune.run.verdict import Verdict

__all__ = ["Meter", "RunLog", "draw_curves", "peak_memory_gib", "plot_curves", "read_log", "summary"]

WAY_ON = "resume=true goes on"
STEPS_AT_ONCE = 16  # whose pairs are appended together
DRAWING = 20  # times as long as curves take to draw, they are not drawn again before the end: 1 s in 20
_SLASHED = {
    f"{kind}_{which}": f"{kind}/{which}"
    for kind in ("rewards", "logps")
    for which in ("chosen", "rejected", "margins", "accuracies")
}


class Meter:
    """Means over everything added since the last read, over all processes. Sums stay on the device until then."""

    def __init__(self):
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._pairs: list[tuple[list[tuple], tuple[int, ...], Tensor]] = []  # row and digest, lengths, [5, P] values
        self.restart_clock()

    def add(self, **values: Tensor) -> None:
        """Adds vectors of one value a pair. `rewards_chosen` is called rewards/chosen where it is read.

        Unpaired rows have values of one answer: vectors may differ in length, and be empty.
        """
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().sum(dtype=torch.float64)
            self._counts[name] = self._counts.get(name, 0) + value.numel()

    def add_pairs(
        self,
        batch: PairBatch,
        scores: AnswerScores,
        losses: Tensor,
        chosen_rewards: Tensor,
        rejected_rewards: Tensor,
        *,
        kl: Tensor | None = None,
    ) -> None:
        """Adds what every run logs of a micro-batch, and counts its pairs and tokens for `read_speed`.

        Args:
            scores: Of the policy.
            losses, chosen_rewards, rejected_rewards: [P], of the loss.
            kl: KTO's baseline, a scalar of the whole step.
        """
        self.add(
            loss=losses,
            rewards_chosen=chosen_rewards[batch.with_chosen],
            rewards_rejected=rejected_rewards[batch.with_rejected],
            rewards_accuracies=(chosen_rewards > rejected_rewards)[batch.with_both].float(),  # a tie is not accurate
            logps_chosen=scores.chosen_logps[batch.with_chosen],
            logps_rejected=scores.rejected_logps[batch.with_rejected],
        )
        if kl is not None:
            self.add(kl=kl.expand(batch.num_pairs))
        if scores.router_loss is not None:  # of this micro-batch, the same for each of its pairs
            self.add(router_loss=scores.router_loss.expand(batch.num_pairs))
        self._num_pairs += batch.num_pairs
        self._num_tokens += batch.num_tokens
        values = losses, chosen_rewards, rejected_rewards, scores.chosen_logps, scores.rejected_logps
        table = torch.stack([value.detach().float() for value in values])
        of_pairs = [(pair.row, short_digest(pair)) for pair in batch.pairs]
        self._pairs.append((of_pairs, batch.answer_lengths, table))

    def take_pairs(self) -> "SeenPairs":
        """Returns what `add_pairs` was given since."""
        seen, self._pairs = self._pairs, []
        of_pairs = [pair for some, _, _ in seen for pair in some]
        lengths = [pair for some, both, _ in seen for pair in zip(both[: len(some)], both[len(some) :], strict=True)]
        return SeenPairs([(*p, *n) for p, n in zip(of_pairs, lengths, strict=True)], [table for _, _, table in seen])

    def restart_clock(self) -> None:
        """Begins anew to measure speed: what lies behind, such as an evaluation, is no training."""
        self._num_pairs, self._num_tokens, self._since = 0, 0, time.perf_counter()

    def read_speed(self, world: World) -> dict[str, float]:
        """Returns pairs and tokens per second of all processes since the clock was started, and starts it anew.

        peak_memory_gib is this process's, see `peak_memory_gib`. Every process has to call it.
        """
        seconds = time.perf_counter() - self._since
        speed = {
            "pairs_per_second": world.sum_number(self._num_pairs) / seconds,
            "tokens_per_second": world.sum_number(self._num_tokens) / seconds,
            "peak_memory_gib": peak_memory_gib(world.device),
        }
        self.restart_clock()
        return speed

    def state(self) -> tuple[list[str], Tensor]:
        """Returns the metrics' names, and their sums and counts so far, [2, names] on the CPU."""
        names = list(self._sums)
        table = [[float(self._sums[n]) for n in names], [float(self._counts[n]) for n in names]]
        return names, torch.tensor(table, dtype=torch.float64)

    def load_state(self, names: list[str], sums: Tensor, device: torch.device) -> None:
        """Takes up sums and counts as `state` returned them."""
        for name, total, count in zip(names, *sums, strict=True):
            self._sums[name], self._counts[name] = total.to(device), int(count)

    def read(self, world: World, prefix: str = "") -> dict[str, float]:
        """Returns the mean of every metric, the same in each process, and starts anew. Every process has to call it.

        Pairs that `take_pairs` did not take are let go.

        rewards/margins is the difference of the means of rewards/chosen and rewards/rejected; over pairs that is the
        mean of their differences. A metric of which there is no value at all is left out.
        """
        self._pairs.clear()
        if not self._sums:  # an edited loop that adds nothing
            return {}
        sums = torch.stack([*self._sums.values()])
        counts = torch.tensor([*self._counts.values()], dtype=torch.float64, device=sums.device)
        sums, counts = world.sum(sums).tolist(), world.sum(counts).tolist()
        names = [_SLASHED.get(name, name) for name in self._sums]
        means = {name: s / n for name, s, n in zip(names, sums, counts, strict=True) if n}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        self._sums.clear()
        self._counts.clear()
        return {prefix + name: value for name, value in means.items()}


def identities(held_out: Sequence) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns what pair_log.set_numbers takes, of each held-out set that has a name."""
    found, sets = {}, sets_of(held_out)
    mean = numbers_of(held_out, "weight").mean() if sets else 1.0
    for name, pairs in sets.items():
        table = np.zeros(len(pairs), pair_log.RECORD)
        table["row"], table["digest"] = [pair.row for pair in pairs], list(map(short_digest, pairs))
        found[name] = pair_log.identity(table), numbers_of(pairs, "weight") / mean
    return found


class SeenPairs(NamedTuple):
    """What pairs came to, on this process; its values stay on the device until `seen_by_all` reads them."""

    known: list[tuple[int, ...]]  # row, digest and lengths of each
    tables: list[Tensor]  # [5, P] each: pair_log's values of them


def seen_by_all(of_steps: list[SeenPairs], world: World) -> list[list[tuple]]:
    """Returns pair_log.VALUES of each step's pairs, in no order, of all processes, in one look at the device.

    Every process has to call it.
    """
    tables = [table for seen in of_steps for table in seen.tables]
    values = iter(torch.cat(tables, 1).T.tolist() if tables else [])
    own = [(n, *known, *next(values)) for n, seen in enumerate(of_steps) for known in seen.known]
    found: list[list[tuple]] = [[] for _ in of_steps]
    for n, *of_pair in world.gather(own):
        found[n].append(tuple(of_pair))
    return found


class RunLog:
    """Appends to metrics.jsonl, one object a logged step, and passes the same to a torchtune logger if there is one.

    Only the main process writes. A run that goes on from `step` keeps what was logged up to there, and held-out
    results up to `evaluated`.
    """

    def __init__(
        self,
        run_dir: Path,
        world: World,
        logger: Mapping | None,
        cfg: Mapping,
        step: int = 0,
        evaluated: int = -1,
        held_out: Sequence[Pair] = (),
        tokenizer: Any = None,
    ):
        """
        Args:
            logger: The config's `metric_logger`.
            cfg: The whole config, which a logger notes.
            held_out, tokenizer: The report shows some of these pairs in words. Sets of them that have names are told
                of by themselves, too.
        """
        self.path, self._pairs_path = run_dir / FILE, run_dir / pair_log.FILE
        self._world, self._file, self._pairs = world, None, None
        self._start = pair_log.records(0, [], is_held_out=True)  # held-out pairs before the first step
        self._unwritten: dict[int, SeenPairs] = {}  # by step
        self._drawn, self._draw_after = None, 0.0
        self._sets = identities(held_out)
        self._text_of = decoder(held_out, tokenizer)
        self._exports_best = bool(cfg.get("export_best"))
        if world.is_main:
            with telling(self.path, WAY_ON):
                keep_lines(self.path, step, evaluated)
                pair_log.keep(self._pairs_path, step, evaluated)
                self._file, self._pairs = self.path.open("a"), self._pairs_path.open("ab")
            kept = pair_log.read(self._pairs_path)
            self._start = kept[(kept["is_held_out"] == 1) & (kept["step"] == 0)]
        self._logger = instantiate(logger) if world.is_main else None
        if self._logger is not None and (missing := lacks("metric_logger", self._logger)):
            raise UserError(f"metric_logger: what {logger['_component_']} makes has no {', '.join(missing)}")
        if self._logger is not None:
            self._logger.log_config(cfg)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends a line; the first step's goes before that of the evaluation which precedes it."""
        if self._file:
            finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}  # JSON has no NaN
            line = json.dumps({"step": step, **finite}) + "\n"
            with telling(self.path, WAY_ON):
                if step == 1 and "loss" in metrics:  # on top, where readers of logs look for where the loss starts
                    line += self.path.read_text()
                    self._file.truncate(0)
                self._file.write(line)
                self._file.flush()
        if self._logger is not None:
            self._logger.log_dict(metrics, step)

    def write_pairs(self, step: int, meter: Meter) -> None:
        """Appends what each pair of a training step came to; several steps at once, so that few wait for their device.

        Every process has to call it.
        """
        self._unwritten[step] = meter.take_pairs()
        if len(self._unwritten) == STEPS_AT_ONCE:
            self._append_pairs()

    def write_evaluation(self, step: int, meter: Meter) -> dict[str, float]:
        """Returns what the held-out pairs came to, and appends it; verdict and curves are those up to here then.

        Every process has to call it.

        Returns:
            The meter's means, pair_log.held_out_numbers and set_numbers.
        """
        self._append_pairs()
        (seen,) = seen_by_all([meter.take_pairs()], self._world)
        now = pair_log.records(step, seen, is_held_out=True)
        results = meter.read(self._world, "eval/")
        if step == 0:
            self._start = now
        self._append(now)
        numbers = {}
        if self._world.is_main and len(now):
            numbers = pair_log.held_out_numbers(now, self._start) | pair_log.set_numbers(now, self._start, self._sets)
        results |= self._world.agree(numbers)
        self.write(step, results)
        self.conclude("no")
        return results

    def fail(self, step: int) -> None:
        """Appends that a step's loss or gradient is no finite number, and concludes. Every process has to call it."""
        self._append_pairs()
        self.write(step, {"loss": math.nan, "grad_norm": math.nan})
        self.conclude("failed")

    def conclude(self, ended: str = "yes") -> Verdict | None:
        """Returns the verdict on the run, and writes verdict.json, curves.png and report.html.

        None but in the main process.

        Args:
            ended: See verdict.Verdict. While the run goes on ("no"), a disk that refuses them costs these files only,
                and curves wait until drawing them takes a twentieth of the time.
        """
        if not self._world.is_main:
            return None
        rows = read_log(self.path)
        found = verdict.judge(rows, ended=ended, exports_best=self._exports_best)
        try:
            verdict.save(self.path.with_name(verdict.FILE), found)
            self._draw(rows, found)
            if rows:
                run = replace(open_run(self.path.parent), runs=ended == "no")  # this process has the folder
                write_text(self.path.with_name(report.FILE), report.write(run, self._text_of))
        except OSError as error:
            if ended == "yes":
                raise
            print(f"{self.path.with_name(verdict.FILE)}: cannot be written: {error.strerror or error}")
        return found

    def _draw(self, rows: list[dict], found: Verdict) -> None:
        began, waits = time.monotonic(), found.ended == "no" and found.step == 0
        if waits or found.ended == "no" and began < self._draw_after or self._drawn == (len(rows), found.name):
            return
        plot_curves(self.path, self.path.with_name("curves.png"), f"{self.path.parent.name}: {found.headline}")
        self._drawn = len(rows), found.name
        self._draw_after = time.monotonic() + DRAWING * (time.monotonic() - began)

    def _append(self, table) -> None:
        if self._pairs:
            with telling(self._pairs_path, WAY_ON):
                self._pairs.write(table.tobytes())
                self._pairs.flush()

    def _append_pairs(self) -> None:
        steps, self._unwritten = self._unwritten, {}
        for step, seen in zip(steps, seen_by_all(list(steps.values()), self._world), strict=True):
            self._append(pair_log.records(step, seen, is_held_out=False))

    def sync(self) -> None:
        """Returns when all that was logged is on the disk. Every process has to call it."""
        self._append_pairs()
        for file in filter(None, (self._file, self._pairs)):
            with telling(self.path, WAY_ON):
                os.fsync(file.fileno())

    def close(self) -> None:
        """Ends the files; `conclude` may follow."""
        for file in filter(None, (self._file, self._pairs)):
            with telling(self.path, WAY_ON):
                file.close()
        if self._logger is not None:
            self._logger.close()


def summary(results: dict[str, float], prefix: str = "") -> str:
    """Returns loss, accuracy and margin in words, as far as there are any; no ranking where rewards are alike. Held-out
    pairs that have a name have a line each."""
    shown = {"loss": "loss {:.4f}", "rewards/accuracies": "accuracy {:.3f}", "rewards/margins": "margin {:+.3f}"}
    if results.get(f"{prefix}rewards/margins") == 0:
        shown = {"loss": shown["loss"]}
    words = ", ".join(words.format(results[prefix + key]) for key, words in shown.items() if prefix + key in results)
    of_sets = [f"  {name}: {summary(results, f'{prefix}{name}/')}" for name in set_names(results, prefix)]
    return "\n".join([words, *of_sets])


def peak_memory_gib(device: torch.device) -> float:
    """Returns the most memory held so far: allocated on a GPU; resident in the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kilobytes / 2**20
