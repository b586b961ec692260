"""What a loss takes of a whole step, all micro-batches and processes together: KTO's baseline, the ranks of AOT.

DPO takes nothing: its first pass is empty, and a reader of DPO need not look further.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pairtune.losses.calling import (
    AnswerScores,
    StepLosses,
    loss_inputs,
    mean_chosen_length,
    mismatched,
    needs,
    num_answers,
    step_losses,
)
from pairtune.losses.formulas import kto_kl
from pairtune.pairs.batch import PairBatch
from pairtune.pairs.digests import numbers_of
from pairtune.pairs.steps import Steps
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World


class WholeStep:
    """A step seen as a whole. Every process makes one, goes through its first pass, and calls `end`.

        whole = WholeStep(loss_fn, pairs, micro, ...)
        for some in whole.first_pass:  # without gradients
            batch = lay_out(some)
            whole.add(batch, scores of the policy, log-probabilities of the reference)
        whole.end(world)

    Attributes:
        num_pairs: Of all processes.
        first_pass: Micro-batches, this process's, whose log-probabilities are needed before any loss is.
        kl: KTO's baseline, a scalar, after `end`; None for other losses.
    """

    def __init__(
        self,
        loss_fn: Callable,
        pairs: list[Pair],
        micro: list[list[Pair]],
        steps: Steps,
        *,
        max_length: int,
        score_end: bool,
    ):
        """
        Args:
            pairs: The step's, of all processes.
            micro: This process's micro-batches of them.
            steps: The run's, which shares pairs out.
            max_length: Most tokens of prompt and longer answer.
            score_end: As for batch.lay_out.
        """
        self.num_pairs, self.kl = len(pairs), None
        self._loss_fn, self._micro = loss_fn, micro
        self._mean_weight = float(numbers_of(pairs, "weight").mean()) if pairs else 1.0
        self._mean_chosen_length = mean_chosen_length(pairs, score_end=score_end)
        self._has_baseline = "kl" in needs(loss_fn).inputs
        others = mismatched(pairs, max_length) if self._has_baseline else []
        self._num_others = num_answers(others)
        self._log_ratios: Tensor | float = 0.0
        self._mixed = steps.share(others)
        self._is_sorted = needs(loss_fn).whole_step
        # In one micro-batch the loss sees the whole step as it is, and differentiates itself.
        self._is_sorted &= steps.is_shared_out(micro)
        self.first_pass = [*self._mixed, *(micro if self._is_sorted else [])]
        self._added: list[tuple[PairBatch, AnswerScores, tuple]] = []  # of `micro`
        self._num_added = 0
        self._of_pairs: dict[int, StepLosses] = {}  # by id of a micro-batch's list

    def add(self, batch: PairBatch, scores: AnswerScores, reference: tuple[Tensor | None, Tensor | None]) -> None:
        """Takes what one micro-batch of the first pass gave, in its order.

        Args:
            scores: From calling.policy_scores.
            reference: Chosen and rejected log-probabilities, [P] each.
        """
        self._num_added += 1
        if self._num_added <= len(self._mixed):
            policy = scores.chosen_logps, scores.rejected_logps
            self._log_ratios = self._log_ratios + (torch.cat(policy) - torch.cat(reference)).sum().double()
        else:
            self._added.append((batch, scores, reference))

    def end(self, world: World) -> "WholeStep":
        """Makes of the first pass what `inputs` needs; of one that was cut short, nothing. Every process calls it."""
        if self._num_added < len(self.first_pass):
            return self
        if self._has_baseline:
            total = torch.as_tensor(self._log_ratios, dtype=torch.float64, device=world.device)
            self.kl = kto_kl(world.sum(total), self._num_others)
        if self._is_sorted:
            batches, scores, references = map(list, zip(*self._added, strict=True))
            cut = step_losses(self._loss_fn, batches, scores, references, world, **self._known)
            self._of_pairs = {id(pairs): losses for pairs, losses in zip(self._micro, cut, strict=True)}
        return self

    @property
    def _known(self) -> dict:
        return {"mean_chosen_length": self._mean_chosen_length, "kl": self.kl, "mean_weight": self._mean_weight}

    def inputs(self, batch: PairBatch, scores: AnswerScores) -> dict:
        """Returns the keyword arguments that the loss takes beside log-probabilities; none for DPO.

        Args:
            batch: Of one of `micro`.
        """
        if self._is_sorted:
            return {"step": self._of_pairs[id(batch.pairs)]}
        return loss_inputs(self._loss_fn, batch, scores, **self._known)
