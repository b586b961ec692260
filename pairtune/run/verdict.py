"""Whether a run was good, in words: a pure function of the rows of its metrics.jsonl, so that it can be had of any run.

Every verdict is about held-out pairs, and about all of them: accuracy comes with the interval that as many pairs leave
open. Thresholds stand on top, each with its reason. No torch.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pairtune.files import write_text
from pairtune.run.evaluations import SAME, Held, Run, held_of, interval
from pairtune.run.log_file import set_names

FILE = "verdict.json"
ENOUGH = 100  # held-out pairs: an accuracy of one half is known to 0.1; below, "no better than chance" is not known
FEW = 8  # held-out pairs whose mean loss says nothing
RISE = 0.25  # of how far the held-out loss had come down: as much of it lost again is no noise
DRIFTED = 0.25  # nats a token that chosen answers lost: each token has become a fifth less likely
STILL = 0.02  # nats a token
LENGTH = 0.3  # correlation of margin and length difference from which length matters


@dataclass(frozen=True)
class Verdict:
    """What a run came to.

    Attributes:
        name: learned, memorised, drifted, did not move, length only, too few held-out pairs, none held out, diverged.
        says: In a sentence, for people.
        numbers: In lines, what it rests on.
        advice: What to change, a line each.
        best: The evaluation with the lowest held-out loss: `step`, `loss`, and `accuracy` where there are pairs.
        step: Up to which it was judged.
        ended: yes; early (early_stop); stopped (a signal); failed; no (it runs, or was killed).
    """

    name: str
    says: str
    numbers: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    best: dict | None = None
    step: int = 0
    ended: str = "yes"

    def __str__(self) -> str:
        return "\n".join(
            [
                f"verdict: {self.headline}",
                *(f"  {line}" for line in self.numbers),
                *(f"  -> {line}" for line in self.advice),
            ]
        )

    @property
    def headline(self) -> str:
        """Name and sentence."""
        about = {"stopped": f" (stopped after step {self.step})", "failed": f" (failed after step {self.step})"}
        about |= {"no": f" (up to step {self.step})", "early": f" (early_stop after step {self.step})"}
        return f"{self.name}{about.get(self.ended, '')}: {self.says}"


def judge(rows: Sequence[Mapping], *, ended: str = "yes", exports_best: bool = False) -> Verdict:
    """Returns the verdict on a run.

    Args:
        rows: Of its metrics.jsonl, by metrics.read_log; of a run that was killed, those that there are.
        ended: See Verdict.
        exports_best: The run exports its best weights: what to change takes that into account.
    """
    training = [row for row in rows if "loss" in row]
    losses = [math.nan if row["loss"] is None else row["loss"] for row in training]
    held = sorted((held_of(row) for row in rows if "eval/loss" in row), key=lambda one: one.step)
    run = Run(losses, [row["step"] for row in training], held, exports_best)
    name, says, advice = _called(run)
    finite = [one for one in held if math.isfinite(one.loss)]
    best = min(finite, key=lambda one: one.loss) if finite else None
    return Verdict(
        name,
        says,
        numbers=tuple(_numbers(run, best)),
        advice=tuple(advice),
        best=best and {"step": best.step, "loss": best.loss, "accuracy": best.accuracy},
        step=max((row["step"] for row in rows), default=0),
        ended=ended,
    )


def _called(run: Run) -> tuple[str, str, list[str]]:
    """Returns the name, the sentence and the advice."""
    if run.diverged:
        return (
            "diverged",
            f"the training loss went from {_loss(run.start)} to {_worst(run)}",
            ["lower optimizer.lr, by ten at first; lengthen lr_scheduler.warmup_ratio; with dtype=bf16, try fp32"],
        )
    if not run.held:
        return (
            "none held out",
            "there are no held-out pairs, and training pairs alone cannot tell learning from memorising",
            ["dataset.val_fraction=0.1 holds out a tenth, or name a file: eval_dataset=FILE"],
        )
    last = run.held[-1]
    if not run.losses:
        return "did not move", "no step was made yet", []
    if _is_still(run):
        return "did not move", _still_words(run), _still_advice(run)
    if run.fell and (best := _risen_from(run)) is not None:
        return "memorised", _memorised_words(run, best), _memorised_advice(run, best)
    if _drift(last):
        return _drifted(last)
    low, _ = last.interval
    if low <= 0.5 and last.count < ENOUGH:
        return _too_few(last)
    if low <= 0.5 or not _is_better(run):
        return "did not move", f"{_ranks(last)}, no better than chance or than before training", _still_advice(run)
    if _is_length(last):
        return _length_only(last)
    return "learned", f"{_ranks(last)}; chance would rank half", _learned_advice(run)


# What holds


def _is_still(run: Run) -> bool:
    """Whether neither losses nor answers' likelihood show that anything was trained."""
    last = run.held[-1]
    lost = last.get("chosen_lost/nats_per_token")
    change = abs(last.loss - run.before)
    return not run.fell and change <= max(last.stderr, SAME * abs(run.before)) and abs(lost or 0.0) <= STILL


def _risen_from(run: Run) -> Held | None:
    """Returns the best evaluation where the held-out loss has risen since by more than noise, or has never fallen with
    the training loss; None where neither is so."""
    before, last = run.before, run.held[-1]
    best = min(run.held, key=lambda one: one.loss)
    if last.row.get("eval/pairs", FEW) < FEW and last.row.get("eval/auc/answers", 0) < FEW:
        return None
    if last.loss - before > max(last.stderr, SAME * abs(before)):
        return best
    if run.start - run.end > RISE * abs(run.start) and last.loss > before - last.stderr:  # training alone got on
        return best
    return best if last.loss - best.loss > max(last.stderr, RISE * (before - best.loss)) else None


def _is_better(run: Run) -> bool:
    """Whether the ranking is better than before training, where there was one then."""
    start, last = run.held[0], run.held[-1]
    if start is last or not start.is_ranking or start.accuracy is None:
        return True
    return last.interval[0] > start.accuracy or start.loss - last.loss > max(last.stderr, SAME * abs(start.loss))


def _is_length(last: Held) -> bool:
    """Whether what is ranked rightly could be so by length alone."""
    baseline, tied = last.get("length_baseline"), abs(last.get("length_correlation") or 0.0) >= LENGTH
    count, among = last.get("like_length/pairs") or 0, last.get("like_length/accuracies")
    if baseline is None or not tied or baseline < last.interval[0] or interval(baseline, last.count)[0] <= 0.5:
        return False
    left, stderr = last.get("length_controlled/margins"), last.get("length_controlled/stderr")
    if left is not None and left <= 2 * stderr:  # of a pair whose answers have one length
        return True
    return count >= ENOUGH / 5 and among < 0.6 and interval(among, count)[0] <= 0.5


def _drift(last: Held) -> bool:
    lost, share = last.get("chosen_lost/nats_per_token"), last.get("chosen_lost/share")
    return lost is not None and lost >= DRIFTED and interval(share, int(last.get("answers") or 0))[0] > 0.5


# In words


def _loss(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else "no finite number"


def _worst(run: Run) -> str:
    bad = next((step for step, loss in zip(run.steps, run.losses, strict=True) if not math.isfinite(loss)), None)
    bad = next((one.step for one in run.held if not math.isfinite(one.loss)), None) if bad is None else bad
    return f"{_loss(run.end)}, its mean at the end" if bad is None else f"what is no finite number in step {bad}"


def _ranks(one: Held) -> str:
    if one.accuracy is None:
        return f"held-out loss {_loss(one.loss)}"
    low, high = one.interval
    what = "held-out pairs rightly" if "eval/rewards/accuracies" in one.row else "held-out answers rightly"
    return f"it ranks {one.accuracy:.1%} of {one.count:,} {what} (interval {low:.1%} to {high:.1%})"


def _numbers(run: Run, best: Held | None) -> list[str]:
    lines = []
    if run.losses:
        lines.append(f"training loss {_loss(run.start)} at first, {_loss(run.end)} at the end")
    if not run.held or best is None:
        return lines
    start, last = run.held[0], run.held[-1]
    before = "before training" if start.step == 0 else f"at step {start.step}"
    lines.append(
        f"held-out loss {_loss(start.loss)} {before}, {_loss(last.loss)} at step {last.step}; "
        f"best {_loss(best.loss)} {'before training' if best.step == 0 else f'at step {best.step}'}"
    )
    for name in set_names(last.row):
        first, now = (held_of(_of_set(one.row, name)) for one in (start, last))
        ranked = f"; {_ranks(now)}" if now.is_ranking and now.accuracy is not None else ""
        lines.append(
            f"{name}: held-out loss {_loss(first.loss)} {before}, {_loss(now.loss)} at step {last.step}{ranked}"
        )
    if last.get("length_baseline") is not None:
        among, tied = last.get("like_length/accuracies"), last.get("length_correlation")
        line = f"by length alone {last.get('length_baseline'):.1%} would be ranked rightly"
        if among is not None and last.is_ranking:
            line += f"; among the {last.get('like_length/pairs'):,} of like length {among:.1%} are"
        lines.append(line + (f"; margin and length difference correlate by {tied:+.2f}" if tied is not None else ""))
    if (lost := last.get("chosen_lost/nats_per_token")) is not None:
        share = last.get("chosen_lost/share")
        word = "lost" if lost > 0 else "gained"
        lines.append(f"chosen answers {word} {abs(lost):.3f} nats a token; {share:.0%} of them became less likely")
    if (kl := last.get("kl_per_token")) is not None:
        lines.append(f"the policy's next tokens are {kl:.3g} nats a token from the reference's (KL)")
    return lines


def _of_set(row: Mapping, name: str) -> dict:
    """Returns an evaluation's row as if the held-out pairs of this name were all."""
    own = {f"eval/{key.removeprefix(f'eval/{name}/')}": row[key] for key in row if key.startswith(f"eval/{name}/")}
    return {"step": row["step"], "eval/loss": None, **own}


def _still_words(run: Run) -> str:
    last = run.held[-1]
    return f"the held-out loss was {_loss(run.before)} and is {_loss(last.loss)}; the policy is what it was"


def _still_advice(run: Run) -> list[str]:
    more = "train longer (epochs, max_steps) or raise optimizer.lr: by two for whole weights, by ten for adapters"
    return [more, "if the training loss does not fall either, look at the pairs: `tune validate CONFIG --all`"]


def _memorised_words(run: Run, best: Held) -> str:
    last = run.held[-1]
    came = f"from {_loss(best.loss)} {'before training' if best.step == 0 else f'at step {best.step}'}"
    text = f"the training loss fell to {_loss(run.end)}, and the held-out loss went {came} to {_loss(last.loss)}"
    return f"{text}; {_ranks(last)}" if last.accuracy is not None else text


def _memorised_advice(run: Run, best: Held) -> list[str]:
    last = run.held[-1]
    if best.step == 0:
        found = "it ranks better than chance, and is surer of it than right"
        nothing = "nothing that holds for other pairs was found"
        lines = [f"{found if last.interval[0] > 0.5 else nothing}: `tune pairs RUN` lists labels that may be wrong"]
        lines += ["try fewer epochs, a lower optimizer.lr, a higher loss.beta; more pairs help most"]
    else:
        way = "keep_best=loss export_best=true exports that, early_stop=3 ends there"
        lines = [f"it was best at step {best.step}: {'which is exported' if run.exports_best else way}"]
        lines += ["or fewer epochs, a lower optimizer.lr, a higher loss.beta"]
    if last.accuracy is not None and last.interval[1] < 0.5:
        lines.append("fewer than half are ranked rightly: are chosen and rejected the wrong way round in one file?")
    return lines


def _too_few(last: Held) -> tuple[str, str, list[str]]:
    low, high = last.interval
    says = "there is one held-out pair" if last.count == 1 else f"there are {last.count:,} held-out pairs"
    if last.accuracy is not None:
        says += f", of which {last.accuracy:.1%} are ranked rightly (interval {low:.1%} to {high:.1%})"
    else:
        says += ", which nothing can be said from"
    return "too few held-out pairs", says, [f"hold out {ENOUGH} or more: dataset.val_fraction, or eval_dataset=FILE"]


def _drifted(last: Held) -> tuple[str, str, list[str]]:
    lost, share = last.get("chosen_lost/nats_per_token"), last.get("chosen_lost/share")
    says = f"chosen answers lost {lost:.2f} nats a token, {share:.0%} of them became less likely; {_ranks(last)}"
    return (
        "drifted",
        says,
        ["raise loss.beta, lower optimizer.lr, or take a loss that holds on to chosen answers: loss=dpop, or loss=rpo"],
    )


def _length_only(last: Held) -> tuple[str, str, list[str]]:
    tied, baseline = last.get("length_correlation"), last.get("length_baseline")
    says = f"{_ranks(last)}, by length alone it would be {baseline:.1%}; margins correlate with it by {tied:+.2f}"
    return (
        "length only",
        says,
        ["give pairs whose chosen answer is not always the longer (or shorter) one, or loss=sigmoid_norm, loss=simpo"],
    )


def _learned_advice(run: Run) -> list[str]:
    last, best = run.held[-1], min(run.held, key=lambda one: one.loss)
    if best is not last and not run.exports_best and last.loss - best.loss > SAME * abs(run.held[0].loss):
        return [f"step {best.step} was a little better: keep_best=loss export_best=true exports that"]
    return []


# The file


def save(path: Path, verdict: Verdict) -> None:
    """Writes a verdict as JSON, with its text."""
    write_text(path, json.dumps(asdict(verdict) | {"text": str(verdict)}, indent=1, ensure_ascii=False) + "\n")
