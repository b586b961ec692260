"""Preference losses, a class each, in torchtune's calling convention: its DPOLoss and these are interchangeable.

    losses, chosen_rewards, rejected_rewards = loss_fn(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, **inputs
    )  # all [P]; rewards are detached and for the log: beta r, or beta A and the like without a reference

calling.py says what a loss takes besides. A step's loss is the mean of `losses` over all of its pairs, however they are
cut into micro-batches and over processes. Published settings are published.py.

A loss is added by a class below with a `name`, a docstring whose first line the docs show, its options and its formula.
P pairs; logp, r, A, scores and z as in formulas.py; "TRL" is version 1.16.
"""

import math
from collections.abc import Callable
from dataclasses import KW_ONLY

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairtune.config.components import check_component, instantiate
from pairtune.config.rules import Rule, above, at_least, between, fits, show, wrong_kind
from pairtune.config.short_names import path_of
from pairtune.errors import UserError
from pairtune.losses.base import (
    SHARE,
    AverageLoss,
    Loss,
    MarginLoss,
    PairLoss,
    Values,
    WholeStepLoss,
    check_option,
    option,
    rewards_of,
)
from pairtune.losses.calling import Needs, after_step, check_convention, needs
from pairtune.losses.formulas import log_odds, same_rank, smoothed
from pairtune.process.dist import World

# Of the margin between two scores


class Sigmoid(MarginLoss):
    """DPO, arXiv 2305.18290, as torchtune's DPOLoss; with label_smoothing, cDPO.

    TRL 1.16 has label smoothing for aot, exo_pair and robust only.
    """

    name = "sigmoid"
    takes_margins = True
    aliases = ("dpo",)
    label_smoothing: float = option(0.0, between(0, 0.5))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 7."""
        return smoothed(self.beta * (chosen - rejected), self.label_smoothing)


class SigmoidNorm(MarginLoss):
    """Length-normalised DPO of Tulu 3, arXiv 2411.15124. Rewards are beta r, not averaged, as in TRL."""

    name = "sigmoid_norm"
    takes_margins = True
    averaged = True
    beta: float = 5.0

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return smoothed(self.beta * (chosen - rejected), 0.0)


class Hinge(MarginLoss):
    """SLiC's hinge on DPO's margin: RSO, arXiv 2309.06657, as torchtune's RSOLoss, whose gamma is this beta."""

    name = "hinge"
    takes_margins = True

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return F.relu(1 - self.beta * (chosen - rejected))


class Ipo(MarginLoss):
    """IPO, arXiv 2310.12036, of averages over tokens, as its authors ran it and as TRL has it; beta is its tau."""

    name = "ipo"
    averaged = True

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 17."""
        return (chosen - rejected - 1 / (2 * self.beta)) ** 2


class ExoPair(MarginLoss):
    """EXO for pairs, arXiv 2402.00856; label_smoothing is its epsilon and cannot be 0, where it is infinite."""

    name = "exo_pair"
    label_smoothing: float = option(1e-3, Rule(lambda v: 0 < v < 0.5, "above 0 and below 0.5"))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 16: KL(softmax of the two scores || 1 - e, e)."""
        z = self.beta * (chosen - rejected)
        prefers_chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-self.label_smoothing))
        return prefers_chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(self.label_smoothing))


class Robust(MarginLoss):
    """Robust DPO, arXiv 2403.00409: unbiased if label_smoothing is the share of swapped pairs; it can be negative."""

    name = "robust"
    takes_margins = True
    beta: float = 0.01
    label_smoothing: float = option(0.1, between(0, 0.5))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        z, e = self.beta * (chosen - rejected), self.label_smoothing
        return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


class Discopop(MarginLoss):
    """DiscoPOP, arXiv 2406.08414: the logistic and the exponential loss, mixed by the margin.

    Finite where TRL's exp(-z) overflows. Small margins shrink at first: at z = 0 the loss grows with the margin, since
    the mixture turns there from the logistic loss, ln 2, to the exponential one, 1. Its slope is
    (1 - ln 2) / (4 tau) - 3/4, which is 0.78 for tau 0.05 and above 0 for tau < 0.102. For tau 0.05 the loss has a
    minimum at z = -0.119 and falls only beyond z = 0.072, which is 1.4 nats at beta 0.05.
    """

    name = "discopop"
    beta: float = 0.05
    tau: float = option(0.05, above(0))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 5."""
        z = self.beta * (chosen - rejected)
        exponential = torch.exp(F.logsigmoid(z / self.tau) - z)  # exp(-z) sigmoid(z / tau), which overflow to inf * 0
        return -F.logsigmoid(z) * torch.sigmoid(-z / self.tau) + exponential


# Of each answer's own log-ratio


class NcaPair(PairLoss):
    """NCA for pairs, arXiv 2402.05369: the chosen answer's own likelihood counts, not only the margin."""

    name = "nca_pair"
    beta: float = 0.01

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        negatives = F.logsigmoid(-self.beta * chosen) + F.logsigmoid(-self.beta * rejected)
        return -F.logsigmoid(self.beta * chosen) - 0.5 * negatives


class BcoPair(PairLoss):
    """BCO, arXiv 2404.04656: rewards above and below their running mean.

    So a classifier of answers need not move it first. The mean is over the rewards of all answers up to the step
    before, which are the same in every micro-batch and process; the first step has 0. It is a buffer, so a checkpoint
    has it, and moves in `after_step`. With running_mean=False it stays 0, as in TRL's DPO; TRL's BCO counts the
    micro-batch at hand, too.
    """

    name = "bco_pair"
    beta: float = 0.01
    running_mean: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))  # the rewards' sum, and how many
        self.register_buffer("in_step", torch.zeros(2, dtype=torch.float64))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Delta, the mean reward, is `shift`."""
        rewards = self.beta * torch.cat([chosen, rejected]).detach()
        self.in_step += torch.stack([rewards.sum(dtype=torch.float64).cpu(), torch.tensor(float(len(rewards)))])
        total, count = self.seen.tolist()
        shift = total / max(count, 1.0)
        return -F.logsigmoid(self.beta * chosen - shift) - F.logsigmoid(-(self.beta * rejected - shift))

    def after_step(self, world: World) -> None:
        """Moves the mean by what the step's pairs had, in all processes; each has to call it."""
        if self.running_mean:
            self.seen += world.sum(self.in_step.to(world.device)).cpu()
        self.in_step.zero_()


class SppoHard(PairLoss):
    """SPPO with certain preferences, arXiv 2405.00675; beta is 1 / eta, and its authors', not TRL's 0.1."""

    name = "sppo_hard"
    beta: float = 0.001

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 4.7, with win rates 1 and 0."""
        return (chosen - 0.5 / self.beta) ** 2 + (rejected + 0.5 / self.beta) ** 2


class ApoZero(PairLoss):
    """APO-zero, arXiv 2408.06266: chosen answers become likelier; for those that are better than the model's own."""

    name = "apo_zero"

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 7."""
        return torch.sigmoid(-self.beta * chosen) + torch.sigmoid(self.beta * rejected)  # 1 - sigmoid(x) = sigmoid(-x)


class ApoDown(PairLoss):
    """APO-down, arXiv 2408.06266: both become less likely; for chosen answers that are worse than the model's own."""

    name = "apo_down"

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Eq. 8."""
        return torch.sigmoid(self.beta * chosen) + torch.sigmoid(-self.beta * (chosen - rejected))


class Dpop(PairLoss):
    """DPO-Positive, arXiv 2402.13228: a penalty where a chosen answer is less likely than in the reference."""

    name = "dpop"
    dpop_lambda: float = option(50.0, at_least(0))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * (chosen - rejected - self.dpop_lambda * F.relu(-chosen)))


# Of a whole step


class RankLoss(WholeStepLoss):
    """A loss of pairs by rank in the step; TRL sorts each process's micro-batch for itself. Rewards are beta r."""

    beta: float = option(0.1, above(0))
    label_smoothing: float = option(0.0, between(0, 0.5))
    _: KW_ONLY
    ld_alpha: float = option(1.0, SHARE)

    @property
    def needs(self) -> Needs:
        return Needs(whole_step=True, ld_alpha=self.ld_alpha)

    def of_step(self, policy_chosen: Tensor, policy_rejected: Tensor, chosen: Tensor, rejected: Tensor) -> Values:
        """`chosen` and `rejected` are the reference's."""
        margins = self.margins(policy_chosen, policy_rejected, chosen, rejected)
        losses = smoothed(self.beta * margins, self.label_smoothing)
        return losses, *rewards_of(self.beta, policy_chosen - chosen, policy_rejected - rejected)


class Aot(RankLoss):
    """AOT for pairs, arXiv 2406.05882: margins under the policy against margins under the reference, by rank.

    Each loss is that of the pair whose policy margin has this rank.
    """

    name = "aot"

    def margins(self, policy_chosen: Tensor, policy_rejected: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        margins = policy_chosen - policy_rejected
        return margins - same_rank(margins, chosen - rejected)


class AotUnpaired(RankLoss):
    """AOT of chosen against rejected answers, arXiv 2406.05882, by rank, whichever pairs they are of."""

    name = "aot_unpaired"

    def margins(self, policy_chosen: Tensor, policy_rejected: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
        chosen_ratios = policy_chosen - chosen
        return chosen_ratios - same_rank(chosen_ratios, policy_rejected - rejected)


class Kto(Loss):
    """KTO, arXiv 2402.01306: each answer for itself, desirable or not, against an estimate of the policy's KL.

    A pair is two answers: the loss of a pair is the mean of its two, so that a step's is the mean over its answers, if
    it has only pairs or only unpaired rows; where it has both, each row counts once. An answer without tokens, which an
    unpaired row has, does not count. `kl` is one number for the whole step, from all answers of its `mismatched` pairs;
    TRL's is of the answers that its micro-batch holds, over all processes. It stays constant while gradients are taken.
    """

    name = "kto"
    needs = Needs(takes_unpaired=True, inputs=("chosen_lengths", "rejected_lengths", "kl"))
    beta: float = option(0.1, above(0))
    desirable_weight: float = option(1.0, above(0))
    undesirable_weight: float = option(1.0, above(0))

    def formula(self, log_ratios: Tensor, desirable: Tensor, kl: Tensor) -> Tensor:
        """Eq. 7, up to a constant: answer by answer.

        Args:
            log_ratios: [A] r of A answers.
            desirable: [A] bool.
            kl: Scalar, see formulas.kto_kl.
        """
        wanted = desirable.to(log_ratios.dtype)
        weight = wanted * self.desirable_weight + (1 - wanted) * self.undesirable_weight
        return weight * torch.sigmoid(-self.beta * (2 * wanted - 1) * (log_ratios - kl))

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        *,
        chosen_lengths: Tensor,
        rejected_lengths: Tensor,
        kl: Tensor,
    ) -> Values:
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        has_chosen, has_rejected = ((lengths > 0).to(chosen.dtype) for lengths in (chosen_lengths, rejected_lengths))
        wanted = torch.ones_like(chosen, dtype=torch.bool)
        of_chosen = self.formula(chosen, wanted, kl.detach())
        of_rejected = self.formula(rejected, ~wanted, kl.detach())
        losses = (has_chosen * of_chosen + has_rejected * of_rejected) / (has_chosen + has_rejected)
        return losses, *rewards_of(self.beta, chosen, rejected)


# Without a reference


class Sft(Loss):
    """Negative log-likelihood of the chosen answers, a mean over the tokens of the whole step; no reference.

    TRL takes the mean over each process's micro-batch. Rewards are logp.
    """

    name = "sft"
    needs = Needs(reference=False, inputs=("mean_chosen_length",))

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        mean_chosen_length: float,
        whole_chosen_logps: Tensor | None = None,
    ) -> Values:
        """
        Args:
            mean_chosen_length: Chosen tokens of the whole step / pairs of the whole step.
            whole_chosen_logps: [P] chosen log-probabilities, where the others are LD-DPO's.
        """
        logps = policy_chosen_logps if whole_chosen_logps is None else whole_chosen_logps
        return -logps / mean_chosen_length, *rewards_of(1.0, logps, policy_rejected_logps)


class Simpo(AverageLoss):
    """SimPO, arXiv 2405.14734, with its authors' defaults; no reference, and no likelihood term, as TRL adds.

    The target margin gamma is beta * gamma_beta_ratio. Rewards are beta A.
    """

    name = "simpo"
    beta: float = option(2.0, above(0))
    gamma_beta_ratio: float = option(0.25, at_least(0))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.beta * self.gamma_beta_ratio)


class Orpo(AverageLoss):
    """ORPO, arXiv 2403.07691: likelihood of the chosen answer, and lambda times the odds ratio's loss; no reference.

    TRL calls lambda beta, and its likelihood is that of prompt and answer. Rewards are lambda A, as in TRL.
    """

    name = "orpo"
    beta_key = "orpo_lambda"
    orpo_lambda: float = option(0.1, above(0))

    def formula(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -chosen - self.orpo_lambda * F.logsigmoid(log_odds(chosen) - log_odds(rejected))


class Cpo(Loss):
    """CPO, arXiv 2401.08417: DPO with a uniform reference, and alpha times the likelihood a token; no reference.

    The chosen answers' likelihood is averaged over an answer's tokens and then over pairs; TRL averages over a
    micro-batch's tokens. Rewards are beta logp.
    """

    name = "cpo"
    needs = Needs(reference=False, inputs=("chosen_lengths",))
    beta: float = option(0.1, above(0))
    alpha: float = option(1.0, at_least(0))

    def formula(self, chosen: Tensor, rejected: Tensor, chosen_average: Tensor) -> Tensor:
        """Of logp, and of the chosen answers' A."""
        return -F.logsigmoid(self.beta * (chosen - rejected)) - self.alpha * chosen_average

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor,
    ) -> Values:
        average = policy_chosen_logps / chosen_lengths
        losses = self.formula(policy_chosen_logps, policy_rejected_logps, average)
        return losses, *rewards_of(self.beta, policy_chosen_logps, policy_rejected_logps)


# Mixtures


class WeightedSum(WholeStepLoss):
    """A weighted sum of losses. Rewards are those of the first that is not sft.

    Raises:
        UserError: A weight that is not above 0; terms that disagree on ld_alpha, since they share one forward. An sft
            term keeps whole answers beside LD-DPO, as in TRL.
    """

    def __init__(self, terms: list[Callable], weights: list[float]):
        super().__init__()
        for i, weight in enumerate(weights):
            check_option(f"terms[{i}].weight", weight, above(0), 1.0)
        self.weighted_terms = list(zip(terms, weights, strict=True))
        self.terms = nn.ModuleList(term for term in terms if isinstance(term, nn.Module))  # a function keeps nothing
        self.needs = _needs_of_all(terms)

    def of_step(self, *logps: Tensor | None, **inputs) -> Values:
        total, rewards = 0.0, None
        for term, weight in self.weighted_terms:
            names = needs(term).inputs + (("whole_chosen_logps",) if isinstance(term, Sft) else ())
            losses, *its_rewards = term(*logps, **{name: inputs[name] for name in names if name in inputs})
            total = total + weight * losses
            if rewards is None and not isinstance(term, Sft):
                rewards = its_rewards
        return total, *(rewards or its_rewards)

    def after_step(self, world: World) -> None:
        """Passes it on to the terms that have it."""
        for term in self.terms:
            after_step(term, world)


def _needs_of_all(terms: list[Callable]) -> Needs:
    needed = [needs(term) for term in terms]
    inputs = {name: None for n in needed for name in n.inputs}
    ld_alphas = {n.ld_alpha for n, term in zip(needed, terms, strict=True) if not isinstance(term, Sft)} or {1.0}
    if len(ld_alphas) > 1:
        raise UserError(
            f"loss.ld_alpha: the terms of a mixture share one forward and take the same, not {sorted(ld_alphas)}; "
            "those that have none go with ld_alpha=1 only, but for sft"
        )
    ld_alpha = ld_alphas.pop()
    whole_step = any(n.whole_step for n in needed)
    if ld_alpha != 1 and any(isinstance(term, Sft) for term in terms):
        inputs["whole_chosen_logps"] = None
    if whole_step and "whole_chosen_logps" in inputs:  # of which step_gradients has no gradient
        raise UserError(f"loss.ld_alpha={ld_alpha}: does not go with both sft and a loss that sorts (aot)")
    return Needs(
        reference=any(n.reference for n in needed),
        whole_step=whole_step,
        takes_unpaired=all(n.takes_unpaired for n in needed),
        inputs=tuple(inputs),
        ld_alpha=ld_alpha,
    )


class Rpo(WeightedSum):
    """DPO and alpha times sft: arXiv 2404.19733, which divides each answer by its own length, not by the mean one.

    Llama 3's (arXiv 2407.21783, 4.1.4) is alpha 0.2, with header and end tokens of the answers not scored.
    """

    name = "rpo"

    def __init__(self, beta: float = 0.1, alpha: float = 1.0):
        check_option("alpha", alpha, above(0), 1.0)
        super().__init__([Sigmoid(beta), Sft()], [1.0, alpha])


class Mpo(WeightedSum):
    """MPO, arXiv 2411.10442: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft. Other weights: a mixture."""

    name = "mpo"

    def __init__(self, beta: float = 0.1):
        super().__init__([Sigmoid(beta), BcoPair(beta), Sft()], [0.8, 0.2, 1.0])


class Mixture(WeightedSum):
    """A weighted sum of losses by name: `loss=[{name: sigmoid},{name: sft,weight: 0.2}]`; weight 1 is the default.

    Any module has its import path in place of a name: [{_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.1}, ...].
    """

    name = "mixture"

    def __init__(self, terms: list[dict]):
        if not terms:
            raise UserError("loss.terms=[]: must have at least one loss; e.g. loss.terms=[{name: sigmoid}]")
        made = [_made(f"loss.terms[{i}]", dict(term)) for i, term in enumerate(terms)]
        super().__init__([module for module, _ in made], [weight for _, weight in made])


def _made(key: str, options: dict) -> tuple[nn.Module, float]:
    """A term and its weight; a config has them at `key`."""
    weight = options.pop("weight", 1.0)
    if not fits(weight, float):
        raise wrong_kind(f"{key}.weight", weight, float)
    if not options.keys() & {"name", "_component_"}:
        raise UserError(
            f"{key}={show(options)}: must name its loss, such as name: sigmoid, or _component_: and an import path"
        )
    block = _checked(options, key)
    try:
        if "_component_" in options:  # of others than ours: whether it is called and answers as losses do
            check_convention(instantiate(block), block["_component_"])
        return instantiate(block), weight
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


# By name

LOSSES: dict[str, type[Loss]] = {
    made.name: made for made in list(vars().values()) if isinstance(made, type) and "name" in vars(made)
}
__all__ = [*(made.__name__ for made in LOSSES.values())]


def __getattr__(name: str) -> type[Loss]:
    """The classes by their short names: configs of earlier runs have pairtune.preference_losses.sigmoid."""
    if name in LOSSES:
        return LOSSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def build(name: str, **options) -> nn.Module:
    """Returns the loss of this short name.

    Raises:
        UserError: No such loss; an option that it does not have, or of another type, or out of its range.
    """
    return instantiate(_checked({"name": name, **options}, "loss"))


def _checked(options: dict, key: str) -> dict:
    """The block with `_component_` of options that may have a `name` instead; a config has them at `key`."""
    if "_component_" not in options:
        options = {"_component_": path_of(options["name"], key), **{k: v for k, v in options.items() if k != "name"}}
    check_component(key, options)
    return options
