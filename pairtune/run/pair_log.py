"""pairs.bin: what each pair came to whenever a run saw it, and the numbers that held-out pairs give together. No torch.

A record a pair and look at it, of fixed length, appended: training pairs in the step that learns from them, before its
update, and held-out pairs at every evaluation. What a kill has cut short is no record.

P pairs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pairtune.errors import UserError
from pairtune.files import write_bytes

FILE = "pairs.bin"
RECORD = np.dtype(
    [
        ("step", "<u4"),
        ("is_held_out", "u1"),
        ("row", "<u4"),  # of the pair, in its source; several pairs may come of one
        ("digest", "<u4"),  # of its tokens: a row and a digest are one pair
        ("chosen_length", "<u4"),  # scored tokens; 0: an unpaired row has no such answer
        ("rejected_length", "<u4"),
        ("loss", "<f4"),
        ("chosen_reward", "<f4"),
        ("rejected_reward", "<f4"),
        ("chosen_logp", "<f4"),  # nats
        ("rejected_logp", "<f4"),
    ]
)
VALUES = RECORD.names[2:]  # what a run knows of a pair when it sees it
LIKE_LENGTH = 0.2  # answers are of like length if they differ by at most this share of the longer one
TIED = 1e-4  # margins that differ by less are all one, but for rounding: where the policy is the reference
LOST = 0.01  # nats: an answer that lost less is as it was, but for rounding


def records(step: int, seen: Sequence[tuple], *, is_held_out: bool) -> np.ndarray:
    """Returns [P] RECORDs by row and digest.

    Args:
        seen: From metrics.seen_by_all: VALUES of each pair.
    """
    table = np.array([(step, is_held_out, *values) for values in sorted(seen, key=lambda pair: pair[:2])], RECORD)
    for answer in ("chosen", "rejected"):
        for value in ("reward", "logp"):
            table[f"{answer}_{value}"][table[f"{answer}_length"] == 0] = np.nan
    return table


def read(path: Path) -> np.ndarray:
    """Returns the RECORDs of a file in the order in which they were made; none where there is no file.

    Raises:
        UserError: It holds something else.
    """
    content = path.read_bytes() if path.exists() else b""
    table = np.frombuffer(content[: len(content) // RECORD.itemsize * RECORD.itemsize], RECORD)
    if (table["is_held_out"] > 1).any():
        raise UserError(f"{path}: is damaged, or another version's; take it out of the folder")
    return table


def keep(path: Path, step: int, evaluated: int) -> None:
    """Leaves the records of training up to a step, and of evaluations up to another."""
    table = read(path)
    last = np.where(table["is_held_out"] == 1, evaluated, step)
    write_bytes(path, table[table["step"].astype(np.int64) <= last].tobytes())


def identity(table: np.ndarray) -> np.ndarray:
    """Returns a number a pair, [P]: of its row and digest."""
    return table["row"].astype(np.uint64) << np.uint64(32) | table["digest"]


def margins(table: np.ndarray) -> np.ndarray:
    """Returns chosen reward - rejected reward, [P]; NaN of an unpaired row."""
    return table["chosen_reward"].astype(np.float64) - table["rejected_reward"]


def held_out_numbers(now: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """Returns what an evaluation's pairs say together beside means, as metrics.jsonl names it: see docs/run_folder.md.

    The same on any number of processes: sums are made in the pairs' order, in float64.

    Args:
        now: RECORDs of one evaluation.
        start: Of the evaluation before the first step; empty where there was none.
    """
    found = {"pairs": int(((now["chosen_length"] > 0) & (now["rejected_length"] > 0)).sum())}
    if len(now) > 1:
        found["loss_stderr"] = float(now["loss"].std(ddof=1, dtype=np.float64) / np.sqrt(len(now)))
    return {f"eval/{name}": value for name, value in (found | _of_lengths(now) | _lost(now, start) | _auc(now)).items()}


def set_numbers(
    now: np.ndarray, start: np.ndarray, sets: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> dict[str, float]:
    """Returns the means and `held_out_numbers` of each set of held-out pairs by itself: eval/SET/loss and so on.

    Args:
        now, start: As for held_out_numbers.
        sets: By name, the `identity` of each pair, and its weight in place of a mean of 1 over all held-out pairs.
    """
    known, first = np.unique(identity(now), return_index=True)
    found = {}
    for name, (of_pairs, weights) in sets.items():
        own = now[first[np.searchsorted(known, of_pairs)]]
        own["loss"] /= weights.mean()  # a weighted mean of this set's, then
        numbers = {f"eval/{key}": value for key, value in _means(own).items()} | held_out_numbers(own, start)
        found |= {f"eval/{name}/{key.removeprefix('eval/')}": value for key, value in numbers.items()}
    return found


def _means(now: np.ndarray) -> dict[str, float]:
    """The means that metrics.Meter has of all pairs."""
    has_chosen, has_rejected = now["chosen_length"] > 0, now["rejected_length"] > 0
    values = {
        "loss": now["loss"],
        "rewards/chosen": now["chosen_reward"][has_chosen],
        "rewards/rejected": now["rejected_reward"][has_rejected],
        "rewards/accuracies": margins(now)[has_chosen & has_rejected] > 0,
        "logps/chosen": now["chosen_logp"][has_chosen],
        "logps/rejected": now["rejected_logp"][has_rejected],
    }
    means = {name: float(column.mean(dtype=np.float64)) for name, column in values.items() if len(column)}
    if {"rewards/chosen", "rewards/rejected"} <= means.keys():
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means


def _of_lengths(now: np.ndarray) -> dict[str, float]:
    now = now[(now["chosen_length"] > 0) & (now["rejected_length"] > 0)]
    if not len(now):
        return {}
    margin = margins(now)
    longer = now["chosen_length"].astype(np.float64) - now["rejected_length"]  # tokens
    alike = np.abs(longer) <= LIKE_LENGTH * np.maximum(now["chosen_length"], now["rejected_length"])
    found = {
        "length_baseline": float(max((longer > 0).mean(), (longer < 0).mean())),
        "like_length/pairs": int(alike.sum()),
    }
    if alike.any():
        found["like_length/accuracies"] = float((margin[alike] > 0).mean())
    if margin.std() > TIED and longer.std() > 0:
        found["length_correlation"] = float(np.corrcoef(margin, longer)[0, 1])
        at_like, stderr = _intercept(longer, margin)
        found |= {"length_controlled/margins": at_like, "length_controlled/stderr": stderr}
    return found


def _intercept(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Returns the least squares line's value at x = 0, and its standard error."""
    spread = ((x - x.mean()) ** 2).sum()
    slope = ((x - x.mean()) * y).sum() / spread
    at_zero = y.mean() - slope * x.mean()
    variance = ((y - at_zero - slope * x) ** 2).sum() / max(1, len(x) - 2)
    return float(at_zero), float(np.sqrt(variance * (1 / len(x) + x.mean() ** 2 / spread)))


def _lost(now: np.ndarray, start: np.ndarray) -> dict[str, float]:
    """How chosen answers have fared since before the first step."""
    known, first = np.unique(identity(start), return_index=True)
    now = now[(now["chosen_length"] > 0) & np.isin(identity(now), known)]
    if not len(now):
        return {}
    before = start[first[np.searchsorted(known, identity(now))]]["chosen_logp"].astype(np.float64)
    lost = before - now["chosen_logp"]
    return {
        "answers": len(now),
        "chosen_lost/share": float((lost > LOST).mean()),
        "chosen_lost/nats_per_token": float((lost / now["chosen_length"]).mean()),
    }


def _auc(now: np.ndarray) -> dict[str, float]:
    """Of unpaired rows: how often a desirable answer has the higher reward of two, ties for half."""
    if ((now["chosen_length"] > 0) & (now["rejected_length"] > 0)).any():
        return {}
    desirable = np.sort(now["chosen_reward"][now["chosen_length"] > 0])
    undesirable = now["rejected_reward"][now["rejected_length"] > 0]
    if not (len(desirable) and len(undesirable)):
        return {}
    above = [len(desirable) - np.searchsorted(desirable, undesirable, side) for side in ("left", "right")]
    return {
        "auc": float((above[0] + above[1]).mean() / 2 / len(desirable)),
        "auc/answers": min(len(desirable), len(undesirable)),
    }
