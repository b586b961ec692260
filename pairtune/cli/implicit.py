"""A judge that is a policy itself, by the reward that DPO has it learn: `--judge implicit:FOLDER`.

beta * (log p_policy - log p_reference) of an answer is the reward of Rafailov et al. 2023, equation 5, but for a term
of the prompt alone. That it tells better answers from worse is what arXiv 2406.09760 trains by, round after round.
Log-probabilities are those of training: the same tokens, layout and functions, as `tune eval` has them.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from pairtune.config.config_json import setting
from pairtune.config.saved import reference_of
from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.making.judge.question import Question, Said
from pairtune.process import console
from pairtune.run import places

NAME_ONE = "name a reference that is a model's folder: --judge-reference FOLDER"

MOST_TOKENS = 4096  # of a conversation, by a model that no run tells of


class ImplicitReward:
    """Scores an answer by how much likelier a policy finds it than its reference does."""

    compares = False

    def __init__(self, name: str, reference: Path | None = None):
        """
        Args:
            name: implicit:FOLDER, of a run, whose export is the policy, and whose reference and beta are the run's; or
                of a model.
            reference: A model's; of a run's folder, in the place of the run's own.

        Raises:
            UserError: There is no policy, or no folder of its reference.
        """
        folder, where = name.partition(":")[2], f"--judge {name}"
        self._folder, self._reference = Path(folder).expanduser(), reference and reference.expanduser()
        if not self._folder.is_dir():
            raise UserError(f"{where}: there is no such folder; give a run's, or a model's")
        is_model = (self._folder / "config.json").is_file()
        if not is_model and not (self._folder / places.CONFIG).is_file():
            raise UserError(f"{where}: holds no config.json: it is no model's folder, nor a run's")
        if is_model and reference is None:
            raise UserError(f"{where}: likelier than which model finds it? {NAME_ONE}")
        compared = self._reference or _reference_of(self._folder, where)
        if not compared.is_dir():
            raise UserError(f"{where}: its reference {compared} is no folder here; {NAME_ONE}")
        self.name = f"{folder}'s own likelihoods, against {compared}'s"

    def judge(self, questions: Sequence[Question]) -> list[Said]:
        """Returns each answer's reward, None for one that is empty, or over the budget of tokens.

        Raises:
            UserError: A model cannot be opened, the run's loss has no such reward, or no answer can be tokenized.
        """
        import torch

        from pairtune import config
        from pairtune.cli.evaluate import Asked, open_models, settle
        from pairtune.losses.modules import Sigmoid
        from pairtune.process import dist

        found = [Said(None, "the answer is empty")] * len(questions)
        asked = [n for n, question in enumerate(questions) if question.answers[0].strip()]
        if not asked:
            return found
        cfg, _ = settle(Asked(self._folder, "answers", self._reference, self._of_model()))
        loss = Sigmoid(beta=_beta(config.instantiate(cfg.loss), self._folder))
        opened = open_models(cfg, dist.alone(cfg.device), loss)
        pairs, left_out = _tokenized({n: questions[n] for n in asked}, opened.tokenizer, cfg)
        for n, why in left_out.items():
            found[n] = Said(None, why)
        with torch.no_grad():
            for n, reward in _rewards(opened, pairs, loss) if pairs else ():
                found[n] = Said(None, "the reward is not a number") if math.isnan(reward) else Said(reward)
        return found

    def _of_model(self) -> list[str]:
        """Returns what no run tells of a model: how long conversations may be, and in which dtype it computes."""
        described = read_object(self._folder / "config.json")
        if not described:
            return []
        positions = setting(described, "max_position_embeddings")
        words = [f"max_length={min(positions, MOST_TOKENS)}"] if positions else []
        is_whole = "float32" in (described.get("dtype"), described.get("torch_dtype"))
        return [*words, *["dtype=fp32"] * is_whole]


def _reference_of(folder: Path, where: str) -> Path:
    """Returns the folder of what a run was compared with.

    Raises:
        UserError: It is in no folder.
    """
    if not (folder / places.EXPORT).is_dir():
        raise UserError(f"{where}: has no {places.EXPORT}: the run has not ended; `resume=true` goes on with it")
    found, is_other = reference_of(yaml.safe_load((folder / places.CONFIG).read_text(encoding="utf-8")))
    if is_other:
        raise UserError(f"{where}: {is_other}; {NAME_ONE}")
    return found


def _beta(loss_fn: Any, folder: Path) -> float:
    """Returns the loss's beta.

    Raises:
        UserError: Its rewards are others.
    """
    from pairtune.losses.calling import needs

    if not needs(loss_fn).reference or not hasattr(loss_fn, "beta"):
        called = getattr(loss_fn, "name", type(loss_fn).__name__)
        export = folder / places.EXPORT
        raise UserError(
            f"--judge implicit:{folder}: the run's loss {called} compares with no reference by a beta, and gives no "
            f"such reward; take its export as a model: --judge implicit:{export} --judge-reference FOLDER"
        )
    if needs(loss_fn).ld_alpha < 1:
        raise UserError(
            f"--judge implicit:{folder}: the run's loss weighs tokens beyond the shorter answer by ld_alpha, which a "
            f"single answer does not have; take its export as a model: --judge implicit:{folder / places.EXPORT} "
            "--judge-reference FOLDER"
        )
    return float(loss_fn.beta)


def _tokenized(questions: dict[int, Question], tokenizer, cfg) -> tuple[list, dict[int, str]]:
    """Returns a Pair of one answer for each question, `row` being its number, and why there is none for others."""
    from dataclasses import replace

    from pairtune.pairs.tokenize import tokenize_pairs

    pairs, left_out = [], {}
    limits = {name: cfg[name] for name in ("max_length", "max_prompt_length", "max_completion_length")}
    for kind in (str, list):  # a text and messages are two forms of rows
        numbers = [n for n, question in questions.items() if isinstance(question.row["prompt"], kind)]
        if not numbers:
            continue
        rows = [{"prompt": questions[n].row["prompt"], "completion": _completion(questions[n])} for n in numbers]
        rows = [{**row, "label": True} for row in rows]
        some, report = tokenize_pairs(
            rows, tokenizer, **limits, unpaired=True, any_may_go=True, progress=False, key="answers"
        )
        pairs += [replace(pair, row=numbers[pair.row]) for pair in some]
        left_out |= {numbers[n]: why for why, dropped in report.dropped.items() for n in dropped}
    return pairs, left_out


def _completion(question: Question):
    (answer,) = question.answers
    is_text = isinstance(question.row["prompt"], str)
    return answer if is_text else [{"role": "assistant", "content": answer}]


def _rewards(opened, pairs: list, loss) -> Iterator[tuple[int, float]]:
    """Yields each pair's row, and its answer's reward."""
    from pairtune.losses.calling import policy_scores
    from pairtune.pairs.batch import lay_out
    from pairtune.pairs.steps import Steps

    how = opened.load(pairs)
    steps = Steps(pairs, len(pairs), how.batch_size, opened.world, seed=0, rows=how.rows)
    micro = steps.share(pairs)
    for some in console.progress(micro, "implicit rewards", shown=len(micro) > 1):
        batch = lay_out(some, row_length=how.row_length, score_end=opened.cfg.score_end).to(opened.world.device)
        policy, reference = policy_scores(opened.model, batch, loss).chosen_logps, opened.reference.logps(batch)[0]
        rewards = loss.beta * (policy - reference)
        yield from zip((pair.row for pair in batch.pairs), rewards.tolist(), strict=True)
