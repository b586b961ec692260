"""How each pair fared over a run, from its pairs.bin: which labels may be wrong, which pairs were forgotten. No torch.

A pair whose label is wrong stays behind the others that are looked at in the same stage of training: its margin is
below theirs, and turns positive late or never (Swayamdipta et al., Dataset Cartography, arXiv 2009.10795, for margins
of preferences). So margins are compared within a stage only, whatever their size is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pairtune.run.pair_log import TIED, identity, margins

STAGE = 100  # looks that are compared with each other, at least: an evaluation, or that many of training in a row
FURTHEST = 5.0  # of a look's distance, in spreads: one look does not decide
SPREAD = 1.4826  # a standard deviation in median absolute ones


@dataclass(frozen=True)
class Course:
    """One pair's way through a run.

    Attributes:
        row: In its source.
        digest: Of its tokens: one row may make several pairs.
        steps, margins, losses: At each look.
        behind: How far its margin lay below the median of its stages, on average, in spreads.
        learned: The step from which its margin stayed positive; None: it was not at the end.
        was_forgotten: Whether it was positive once, and was not at the end.
    """

    row: int
    digest: int
    is_held_out: bool
    steps: tuple[int, ...]
    margins: tuple[float, ...]
    losses: tuple[float, ...]
    behind: float
    learned: int | None
    was_forgotten: bool


def courses(table: np.ndarray, *, held_out: bool) -> list[Course]:
    """Returns the pairs of training, or the held-out ones, those first that lie furthest behind.

    Args:
        table: pair_log.RECORDs of a run. Unpaired rows have no margin, and are left out; so are looks at which all
            margins are alike, as before the first update.
    """
    table = table[(table["is_held_out"] == held_out) & ~np.isnan(margins(table))]
    if not len(table):
        return []
    found = []
    behind = _behind(table)
    pairs = identity(table)
    order = np.argsort(pairs, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(pairs[order])) + 1):
        if len(group):
            found.append(_course(table[group], behind[group]))
    return sorted(found, key=lambda course: -course.behind)


def _course(looks: np.ndarray, behind: np.ndarray) -> Course:
    margin = margins(looks)
    known = behind[~np.isnan(behind)]
    positive = margin > 0
    last_wrong = np.flatnonzero(~positive)[-1] if not positive.all() else -1
    learned = None if last_wrong == len(looks) - 1 else int(looks["step"][last_wrong + 1])
    return Course(
        row=int(looks["row"][0]),
        digest=int(looks["digest"][0]),
        is_held_out=bool(looks["is_held_out"][0]),
        steps=tuple(looks["step"].tolist()),
        margins=tuple(margin.tolist()),
        losses=tuple(looks["loss"].tolist()),
        behind=float(known.mean()) if len(known) else 0.0,
        learned=learned,
        was_forgotten=bool(positive[:-1].any() and not positive[-1]),
    )


def _behind(table: np.ndarray) -> np.ndarray:
    """Returns for each look how far its margin lies below its stage's median, in spreads; NaN where all are alike."""
    margin, behind = margins(table), np.full(len(table), np.nan)
    for stage in _stages(table):
        middle = np.median(margin[stage])
        spread = SPREAD * np.median(np.abs(margin[stage] - middle))
        if np.ptp(margin[stage]) > TIED / 100:
            behind[stage] = np.clip((middle - margin[stage]) / max(spread, TIED / 100), -FURTHEST, FURTHEST)
    return behind


def _stages(table: np.ndarray) -> Iterator[np.ndarray]:
    """Yields indices of looks at about the same step: whole steps, and so many that there are STAGE of them."""
    steps = np.split(np.arange(len(table)), np.flatnonzero(np.diff(table["step"].astype(np.int64))) + 1)
    stage: list[np.ndarray] = []
    for number, step in enumerate(steps):
        stage.append(step)
        left = sum(map(len, steps[number + 1 : number + 1 + STAGE]))
        if sum(map(len, stage)) >= STAGE and left >= STAGE:
            yield np.concatenate(stage)
            stage = []
    if stage:
        yield np.concatenate(stage)


def contradictions(texts: dict[int, tuple[str, str, str]]) -> list[tuple[int, int]]:
    """Returns pairs of rows that say the opposite: the same prompt, and what one chose the other rejected.

    Args:
        texts: Prompt, chosen and rejected by row.
    """
    chosen: dict[tuple[str, str], list[int]] = {}
    for row, (prompt, better, _) in texts.items():
        chosen.setdefault((prompt, better.strip()), []).append(row)
    found = set()
    for row, (prompt, _, worse) in texts.items():
        found |= {
            (min(row, other), max(row, other)) for other in chosen.get((prompt, worse.strip()), ()) if other != row
        }
    return sorted(found)
