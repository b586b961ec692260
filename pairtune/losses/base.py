"""What preference losses have in common: options that are checked, log-ratios, scores, averages, a whole step.

modules.py has the losses themselves, and says how they are called. P pairs; logp, r, A and scores as in formulas.py.
"""

import inspect
import math
from dataclasses import KW_ONLY, dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, dataclass_transform

from torch import Tensor, nn

from pairtune.config.rules import Rule, above, fits, show, wrong_kind
from pairtune.errors import UserError
from pairtune.losses.calling import Needs, StepLosses
from pairtune.losses.formulas import Divergence, scores

Values = tuple[Tensor, Tensor, Tensor]  # losses, chosen rewards, rejected rewards: each [P]

SHARE = Rule(lambda v: 0 <= v <= 1, "at least 0 and at most 1")
ANY = Rule(lambda v: True, "a finite number")


def option(default: float | None, rule: Rule) -> Any:
    """Returns an option of this default whose value is checked when the loss is made, and is finite."""
    return field(default=default, metadata={"rule": rule})


def check_option(name: str, value: float, rule: Rule, default: float | None) -> None:
    """Refuses a value of a loss's option.

    Raises:
        UserError: It breaks the rule, or is not finite.
    """
    if not rule.holds(value) or not math.isfinite(value):
        raise UserError(f"loss.{name}={show(value)}: must be {rule.says}; e.g. loss.{name}={show(default)}")


@dataclass_transform(eq_default=False, field_specifiers=(field, option))
class Loss(nn.Module):
    """A loss whose options are its annotated attributes: every subclass is a dataclass.

    So its signature, which a config is checked against, is what it is seen to take: `beta: float = 0.1` is an option
    with its type and default, and one that a base class has gets another default in the same way; its rule stays.

    Attributes:
        name: In configs, loss=NAME; a class that has none goes by its import path.
        aliases: Further such names.
        beta_key: The option that publications call beta, by which rewards are scaled.
        needs: What it is called with.
        takes_weights: Pairs may have weights: `pair_weights` [P] multiply their losses.
        takes_margins: Pairs may have margins: `margins` [P], by which rewards have to differ.
    """

    aliases: ClassVar[tuple[str, ...]] = ()
    takes_weights: ClassVar[bool] = True
    takes_margins: ClassVar[bool] = False
    beta_key: ClassVar[str] = "beta"
    needs: ClassVar[Needs] = Needs()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        inherited = {one.name for one in fields(cls)} if is_dataclass(cls) else set()
        bare = inherited & vars(cls).keys() - inspect.get_annotations(cls).keys()
        if bare:  # a dataclass would go on with the base's default
            raise TypeError(
                f"{cls.__name__}: the default of an option needs its type, too: {sorted(bare)[0]}: float = ..."
            )
        dataclass(cls, eq=False, repr=False)

    def __call__(self, *logps: Tensor | None, pair_weights: Tensor | None = None, **inputs) -> Values:
        losses, *rewards = super().__call__(*logps, **inputs)
        return losses if pair_weights is None else losses * pair_weights, *rewards

    def __post_init__(self) -> None:
        super().__init__()
        bases = [vars(base).get("__dataclass_fields__", {}).values() for base in reversed(type(self).__mro__)]
        rules = {one.name: one.metadata["rule"] for options in bases for one in options if "rule" in one.metadata}
        for one in fields(self):
            value = getattr(self, one.name)
            if one.name in rules and value is not None:
                check_option(one.name, value, rules[one.name], one.default)


class PairLoss(Loss):
    """A loss of each pair's two log-ratios r; a subclass says which in `formula`. Rewards are beta r.

    Options:
        ld_alpha: LD-DPO, arXiv 2409.06411: how much the tokens beyond the shorter answer count, see logps.answer_logps.
        wpo: WPO, arXiv 2406.11827: losses are multiplied by the weights of both answers, see logps.answer_scores.

    Attributes:
        averaged: r, or its score, is divided by the answer's number of tokens: all of them, also with ld_alpha, as in
            TRL.
    """

    averaged: ClassVar[bool] = False

    beta: float = option(0.1, above(0))
    _: KW_ONLY
    ld_alpha: float = option(1.0, SHARE)
    wpo: bool = False

    @property
    def needs(self) -> Needs:
        lengths = ("chosen_lengths", "rejected_lengths") if self.averaged else ()
        weights = ("chosen_weights", "rejected_weights") if self.wpo else ()
        return Needs(inputs=lengths + weights, ld_alpha=self.ld_alpha)

    def score(self, log_ratios: Tensor) -> Tensor:
        """Returns what `formula` is given for r, before it is averaged."""
        return log_ratios

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Returns the losses [P] of scores [P]."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        chosen_weights: Tensor | None = None,
        rejected_weights: Tensor | None = None,
        margins: Tensor | None = None,
    ) -> Values:
        chosen_ratios = policy_chosen_logps - reference_chosen_logps
        rejected_ratios = policy_rejected_logps - reference_rejected_logps
        chosen, rejected = self.score(chosen_ratios), self.score(rejected_ratios)
        if self.averaged:
            chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
        if margins is not None:  # beta (chosen - rejected) - margin, in a loss of this difference alone
            chosen = chosen - margins / self.beta
        losses = self.formula(chosen, rejected)
        if self.wpo:
            losses = losses * (chosen_weights * rejected_weights).detach()
        return losses, *rewards_of(self.beta, chosen_ratios, rejected_ratios)


class MarginLoss(PairLoss):
    """A PairLoss of the difference between two scores alone, which f-divergences other than the reverse KL also give.

    Options:
        f_divergence, f_alpha: f-DPO, arXiv 2309.16240: see formulas.scores; alpha's f_alpha is 0.5 unless told.
    """

    _: KW_ONLY
    f_divergence: Divergence = "reverse_kl"
    f_alpha: float | None = option(None, ANY)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not fits(self.f_divergence, Divergence):
            raise wrong_kind("loss.f_divergence", self.f_divergence, Divergence)
        if self.f_alpha is not None and self.f_divergence != "alpha":
            raise UserError(
                f"loss.f_alpha={show(self.f_alpha)}: has no effect with loss.f_divergence={self.f_divergence}; "
                "set loss.f_divergence=alpha, or leave it out"
            )

    def score(self, log_ratios: Tensor) -> Tensor:
        return scores(log_ratios, self.f_divergence, 0.5 if self.f_alpha is None else self.f_alpha)


class AverageLoss(Loss):
    """A loss of each pair's two averages A, without a reference; a subclass says which in `formula`."""

    needs = Needs(reference=False, inputs=("chosen_lengths", "rejected_lengths"))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Returns the losses [P] of averages [P]."""
        raise NotImplementedError(f"{type(self).__name__} has no formula")

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
    ) -> Values:
        chosen, rejected = policy_chosen_logps / chosen_lengths, policy_rejected_logps / rejected_lengths
        return self.formula(chosen, rejected), *rewards_of(getattr(self, self.beta_key), chosen, rejected)


class WholeStepLoss(Loss):
    """A loss of all pairs of a step at once, in `of_step`; micro-batches then have their part of that: `step`."""

    takes_weights = False
    needs = Needs(whole_step=True)

    def of_step(self, *logps: Tensor | None, **inputs) -> Values:
        """Returns losses and rewards of a whole step's log-probabilities, as `forward` does."""
        raise NotImplementedError(f"{type(self).__name__} has no of_step")

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        step: StepLosses | None = None,
        **inputs,
    ) -> Values:
        """`step`: These pairs' part of calling.step_losses; without it, these pairs are the whole step."""
        if step is not None:
            return step.apply(policy_chosen_logps, policy_rejected_logps)
        logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        return self.of_step(*logps, **inputs)


def rewards_of(beta: float, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what is logged of these log-ratios or log-probabilities."""
    return beta * chosen.detach(), beta * rejected.detach()
