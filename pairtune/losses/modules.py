"""Preference losses as modules in torchtune's calling convention, so that its DPOLoss and these are interchangeable:

    losses, chosen_rewards, rejected_rewards = loss_fn(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, **inputs
    )  # all [P]; rewards are detached and for the log: beta r, or beta A and the like without a reference

loss_needs.py says what a loss takes besides. A step's loss is the mean of `losses` over all of its pairs, however
they are cut into micro-batches and over processes. Formulas are losses.py; published settings loss_advice.py.

A loss is a function of its options, LOSSES by short name: the signature is the schema. Most make a PairLoss.
P pairs; r, A and scores as in losses.py. "TRL" is version 1.16.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor, nn

from pairtune.config.components import check_component, instantiate, rehearse_loss
from pairtune.config.rules import fits, nearest, show, wrong_kind
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.losses import formulas as losses
from pairtune.losses.calling import Needs, after_step, needs
from pairtune.losses.formulas import Divergence

Values = tuple[Tensor, Tensor, Tensor]  # losses, chosen rewards, rejected rewards: each [P]


# Modules


class PairLoss(nn.Module):
    """A loss that is a function of two scores a pair, such as r of the chosen and of the rejected answer.

    Args:
        function: chosen [P], rejected [P] -> losses [P].
        beta: Of the rewards that are logged.
        reference: Scores come from r; else from logp.
        averaged: Scores are divided by the answer's number of tokens.
        f_divergence, f_alpha: Scores are made from r, see losses.scores. reverse_kl leaves r as it is.
        ld_alpha: LD-DPO, see logps.answer_logps. The lengths of `averaged` are whole lengths, as in TRL.
        wpo: Losses are multiplied by the weights of both answers: WPO, see logps.answer_scores.
        whole_step: The function looks at all pairs of a step.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        *,
        beta: float,
        reference: bool = True,
        averaged: bool = False,
        f_divergence: Divergence = "reverse_kl",
        f_alpha: float | None = None,
        ld_alpha: float = 1.0,
        wpo: bool = False,
        whole_step: bool = False,
    ):
        super().__init__()
        _check_ld_alpha(ld_alpha)
        self.score = _score(f_divergence, f_alpha)
        self.function, self.beta, self.averaged, self.wpo = function, beta, averaged, wpo
        inputs = ("chosen_lengths", "rejected_lengths") if averaged else ()
        inputs += ("chosen_weights", "rejected_weights") if wpo else ()
        self.needs = Needs(reference, whole_step, inputs=inputs, ld_alpha=ld_alpha)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        *,
        chosen_lengths: Tensor | None = None,
        rejected_lengths: Tensor | None = None,
        chosen_weights: Tensor | None = None,
        rejected_weights: Tensor | None = None,
    ) -> Values:
        chosen, rejected = policy_chosen_logps, policy_rejected_logps
        if self.needs.reference:
            chosen, rejected = chosen - reference_chosen_logps, rejected - reference_rejected_logps
            rewards = chosen, rejected
            chosen, rejected = self.score(chosen), self.score(rejected)
        if self.averaged:
            chosen, rejected = chosen / chosen_lengths, rejected / rejected_lengths
        if not self.needs.reference:
            rewards = chosen, rejected
        values = self.function(chosen, rejected)
        if self.wpo:
            values = values * (chosen_weights * rejected_weights).detach()
        return values, *_rewards(self.beta, *rewards)


class BcoPair(PairLoss):
    """BCO: rewards above and below their running mean, so that a classifier of answers need not move it first.

    The mean is over the rewards of all answers up to the step before, which are the same in every micro-batch and
    process; the first step has 0. It is a buffer, so a checkpoint has it, and moves in `after_step`. With
    running_mean=False it stays 0, as in TRL's DPO; TRL's BCO counts the micro-batch at hand, too.
    """

    def __init__(self, beta: float = 0.01, running_mean: bool = True, ld_alpha: float = 1.0, wpo: bool = False):
        _check_positive("beta", beta, 0.01)
        super().__init__(self._values, beta=beta, ld_alpha=ld_alpha, wpo=wpo)
        self.running_mean = running_mean
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64))  # the rewards' sum, and how many
        self.register_buffer("in_step", torch.zeros(2, dtype=torch.float64))

    def _values(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        rewards = self.beta * torch.cat([chosen, rejected]).detach()
        self.in_step += torch.stack([rewards.sum(dtype=torch.float64).cpu(), torch.tensor(float(len(rewards)))])
        total, count = self.seen.tolist()
        return losses.bco_pair(chosen, rejected, beta=self.beta, shift=total / max(count, 1.0))

    def after_step(self, world: World) -> None:
        """Moves the mean by what the step's pairs had, in all processes; each has to call it."""
        if self.running_mean:
            self.seen += world.sum(self.in_step.to(world.device)).cpu()
        self.in_step.zero_()


class Aot(nn.Module):
    """AOT for pairs: margins under the policy against margins under the reference, by rank over the whole step.

    TRL sorts each process's micro-batch for itself. Each loss is that of the pair whose policy margin has this rank.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0, ld_alpha: float = 1.0):
        super().__init__()
        _check_positive("beta", beta, 0.1)
        _check_smoothing(label_smoothing)
        _check_ld_alpha(ld_alpha)
        self.beta, self.label_smoothing = beta, label_smoothing
        self.needs = Needs(whole_step=True, ld_alpha=ld_alpha)

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> Values:
        values = losses.aot(
            policy_chosen_logps - policy_rejected_logps,
            reference_chosen_logps - reference_rejected_logps,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps
        return values, *_rewards(self.beta, chosen, rejected)


class Sft(nn.Module):
    """Negative log-likelihood of the chosen answers, a mean over the tokens of the whole step; no reference.

    TRL takes the mean over each process's micro-batch. Rewards are logp.
    """

    needs = Needs(reference=False, inputs=("mean_chosen_length",))

    def __init__(self):  # its signature is the schema: no options
        super().__init__()

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
        """`whole_chosen_logps` [P] are the chosen log-probabilities where the others are LD-DPO's."""
        logps = policy_chosen_logps if whole_chosen_logps is None else whole_chosen_logps
        values = losses.sft(logps, mean_chosen_length=mean_chosen_length)
        return values, *_rewards(1.0, logps, policy_rejected_logps)


class Cpo(nn.Module):
    """CPO: DPO's loss with a uniform reference, and `alpha` times the chosen answer's likelihood a token; no reference.

    The likelihood is averaged over an answer's tokens and then over pairs; TRL averages over a micro-batch's tokens.
    Rewards are beta logp.
    """

    needs = Needs(reference=False, inputs=("chosen_lengths",))

    def __init__(self, beta: float = 0.1, alpha: float = 1.0):
        super().__init__()
        _check_positive("beta", beta, 0.1)
        _check_not_negative("alpha", alpha)
        self.beta, self.alpha = beta, alpha

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
        values = losses.cpo(policy_chosen_logps, policy_rejected_logps, average, beta=self.beta, alpha=self.alpha)
        return values, *_rewards(self.beta, policy_chosen_logps, policy_rejected_logps)


class Kto(nn.Module):
    """KTO: each answer for itself, desirable or not, against how far the policy is from the reference altogether.

    A pair is two answers: the loss of a pair is the mean of its two, so that a step's is the mean over its answers. An
    answer without tokens, which an unpaired row has, does not count. `kl` is one number for the whole step, from all
    answers of its `mismatched` pairs; TRL's is of the answers that its micro-batch holds, over all processes. It stays
    constant while gradients are taken.
    """

    needs = Needs(takes_unpaired=True, inputs=("chosen_lengths", "rejected_lengths", "kl"))

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0):
        super().__init__()
        _check_positive("beta", beta, 0.1)
        _check_positive("desirable_weight", desirable_weight, 1.0)
        _check_positive("undesirable_weight", undesirable_weight, 1.0)
        self.beta = beta
        self.weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}

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
        options = {"kl": kl.detach(), "beta": self.beta, **self.weights}
        wanted = torch.ones_like(chosen, dtype=torch.bool)
        of_chosen, of_rejected = losses.kto(chosen, wanted, **options), losses.kto(rejected, ~wanted, **options)
        values = (has_chosen * of_chosen + has_rejected * of_rejected) / (has_chosen + has_rejected)
        return values, *_rewards(self.beta, chosen, rejected)


class Mixture(nn.Module):
    """A weighted sum of losses. Rewards are those of the first that is not sft.

    Raises:
        UserError: A weight that is not above 0; terms that disagree on ld_alpha, since they share one forward. An sft
            term keeps whole answers beside LD-DPO, as in TRL.
    """

    def __init__(self, terms: list[Callable], weights: list[float]):
        super().__init__()
        for i, weight in enumerate(weights):
            _check_positive(f"terms[{i}].weight", weight, 1.0)
        self.weighted_terms = list(zip(terms, weights, strict=True))
        self.terms = nn.ModuleList(term for term in terms if isinstance(term, nn.Module))  # a function keeps nothing
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
        self.needs = Needs(
            reference=any(n.reference for n in needed),
            whole_step=whole_step,
            takes_unpaired=all(n.takes_unpaired for n in needed),
            inputs=tuple(inputs),
            ld_alpha=ld_alpha,
        )

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
        **inputs,
    ) -> Values:
        logps = policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps
        total, rewards = 0.0, None
        for term, weight in self.weighted_terms:
            names = needs(term).inputs + (("whole_chosen_logps",) if isinstance(term, Sft) else ())
            values, *its_rewards = term(*logps, **{name: inputs[name] for name in names if name in inputs})
            total = total + weight * values
            if rewards is None and not isinstance(term, Sft):
                rewards = its_rewards
        return total, *(rewards or its_rewards)

    def after_step(self, world: World) -> None:
        """Passes it on to the terms that have it."""
        for term in self.terms:
            after_step(term, world)


def _rewards(beta: float, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    return beta * chosen.detach(), beta * rejected.detach()


# The family. With a reference, but for simpo and orpo


def _takes(*names: str) -> Callable:
    """Puts these options of PairLoss, with types and defaults, in place of **common in a factory's signature."""

    def decorate(factory: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
        own, options = inspect.signature(factory), inspect.signature(PairLoss).parameters
        signature = own.replace(parameters=[*[*own.parameters.values()][:-1], *(options[name] for name in names)])

        @wraps(factory)
        def made(*args, **kwargs) -> PairLoss:
            given = signature.bind(*args, **kwargs)  # a TypeError of what is not in it
            return factory(*given.args, **given.kwargs)

        made.__signature__ = signature
        return made

    return decorate


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def sigmoid(beta: float = 0.1, label_smoothing: float = 0.0, **common) -> PairLoss:
    """DPO, torchtune's DPOLoss; with label_smoothing, cDPO (which TRL 1.16 has for aot, exo_pair and robust only)."""
    _check_positive("beta", beta, 0.1)
    _check_smoothing(label_smoothing)
    function = partial(losses.sigmoid, beta=beta, label_smoothing=label_smoothing)
    return PairLoss(function, beta=beta, **common)


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def sigmoid_norm(beta: float = 5.0, **common) -> PairLoss:
    """Length-normalised DPO, arXiv 2411.15124 (Tulu 3). Rewards are beta r, not averaged, as in TRL."""
    _check_positive("beta", beta, 5.0)
    return PairLoss(partial(losses.sigmoid, beta=beta), beta=beta, averaged=True, **common)


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def hinge(beta: float = 0.1, **common) -> PairLoss:
    """SLiC's hinge, torchtune's RSOLoss, whose gamma is this beta."""
    _check_positive("beta", beta, 0.1)
    return PairLoss(partial(losses.hinge, beta=beta), beta=beta, **common)


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def ipo(beta: float = 0.1, **common) -> PairLoss:
    """IPO of averages over tokens, as its authors ran it and as TRL has it; beta is the paper's tau."""
    _check_positive("beta", beta, 0.1)
    return PairLoss(partial(losses.ipo, beta=beta), beta=beta, averaged=True, **common)


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def exo_pair(beta: float = 0.1, label_smoothing: float = 1e-3, **common) -> PairLoss:
    """EXO; label_smoothing is its epsilon and cannot be 0, where the divergence is infinite."""
    _check_positive("beta", beta, 0.1)
    _check("label_smoothing", label_smoothing, 0 < label_smoothing < 0.5, "above 0 and below 0.5", 1e-3)
    function = partial(losses.exo_pair, beta=beta, label_smoothing=label_smoothing)
    return PairLoss(function, beta=beta, **common)


@_takes("ld_alpha", "wpo")
def nca_pair(beta: float = 0.01, **common) -> PairLoss:
    """NCA: the chosen answer's own likelihood counts, not only the margin."""
    _check_positive("beta", beta, 0.01)
    return PairLoss(partial(losses.nca_pair, beta=beta), beta=beta, **common)


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def robust(beta: float = 0.01, label_smoothing: float = 0.1, **common) -> PairLoss:
    """Robust DPO; label_smoothing is the fraction of swapped pairs, and its loss can be negative."""
    _check_positive("beta", beta, 0.01)
    _check_smoothing(label_smoothing)
    function = partial(losses.robust, beta=beta, label_smoothing=label_smoothing)
    return PairLoss(function, beta=beta, **common)


@_takes("ld_alpha", "wpo")
def sppo_hard(beta: float = 0.001, **common) -> PairLoss:
    """SPPO with certain preferences; beta is 1 / eta. TRL's default of 0.1 is not the authors', which is this."""
    _check_positive("beta", beta, 0.001)
    return PairLoss(partial(losses.sppo_hard, beta=beta), beta=beta, **common)


@_takes("ld_alpha")
def aot_unpaired(beta: float = 0.1, label_smoothing: float = 0.0, **common) -> PairLoss:
    """AOT of chosen against rejected answers, by rank over the whole step; TRL sorts each micro-batch for itself."""
    _check_positive("beta", beta, 0.1)
    _check_smoothing(label_smoothing)
    function = partial(losses.aot_unpaired, beta=beta, label_smoothing=label_smoothing)
    return PairLoss(function, beta=beta, whole_step=True, **common)


@_takes("ld_alpha", "wpo")
def apo_zero(beta: float = 0.1, **common) -> PairLoss:
    """APO-zero, for chosen answers that are better than the model's own."""
    _check_positive("beta", beta, 0.1)
    return PairLoss(partial(losses.apo_zero, beta=beta), beta=beta, **common)


@_takes("ld_alpha", "wpo")
def apo_down(beta: float = 0.1, **common) -> PairLoss:
    """APO-down, for chosen answers that are worse than the model's own."""
    _check_positive("beta", beta, 0.1)
    return PairLoss(partial(losses.apo_down, beta=beta), beta=beta, **common)


@_takes("f_divergence", "f_alpha", "ld_alpha", "wpo")
def discopop(beta: float = 0.05, tau: float = 0.05, **common) -> PairLoss:
    """DiscoPOP; finite where TRL's exp(-z) overflows.

    Small margins shrink at first: at z = 0 the loss grows with the margin, since the mixture turns there from the
    logistic loss, ln 2, to the exponential one, 1. Its slope is (1 - ln 2) / (4 tau) - 3/4, which is 0.78 for tau 0.05
    and above 0 for tau < 0.102. For tau 0.05 the loss has a minimum at z = -0.119 and falls only beyond z = 0.072,
    which is 1.4 nats at beta 0.05.
    """
    _check_positive("beta", beta, 0.05)
    _check_positive("tau", tau, 0.05)
    return PairLoss(partial(losses.discopop, beta=beta, tau=tau), beta=beta, **common)


@_takes("ld_alpha", "wpo")
def dpop(beta: float = 0.1, dpop_lambda: float = 50.0, **common) -> PairLoss:
    """DPO-Positive."""
    _check_positive("beta", beta, 0.1)
    _check_not_negative("dpop_lambda", dpop_lambda)
    return PairLoss(partial(losses.dpop, beta=beta, dpop_lambda=dpop_lambda), beta=beta, **common)


def simpo(beta: float = 2.0, gamma_beta_ratio: float = 0.25) -> PairLoss:
    """SimPO, with the defaults of its authors' code; no reference, and no likelihood term (TRL adds one by default).

    The target margin gamma is beta * gamma_beta_ratio. Rewards are beta A.
    """
    _check_positive("beta", beta, 2.0)
    _check_not_negative("gamma_beta_ratio", gamma_beta_ratio)
    function = partial(losses.simpo, beta=beta, gamma=beta * gamma_beta_ratio)
    return PairLoss(function, beta=beta, reference=False, averaged=True)


def orpo(orpo_lambda: float = 0.1) -> PairLoss:
    """ORPO; no reference. TRL calls lambda beta, and its likelihood is that of prompt and answer.

    Rewards are lambda A, as in TRL.
    """
    _check_positive("orpo_lambda", orpo_lambda, 0.1)
    return PairLoss(partial(losses.orpo, orpo_lambda=orpo_lambda), beta=orpo_lambda, reference=False, averaged=True)


def rpo(beta: float = 0.1, alpha: float = 1.0) -> Mixture:
    """DPO and `alpha` times sft: arXiv 2404.19733, which divides each answer by its own length, not by the mean one.

    Llama 3's (arXiv 2407.21783, 4.1.4) is alpha 0.2, with header and end tokens of the answers not scored.
    """
    _check_positive("alpha", alpha, 1.0)
    return Mixture([sigmoid(beta), Sft()], [1.0, alpha])


def mpo(beta: float = 0.1) -> Mixture:
    """MPO, arXiv 2411.10442: 0.8 sigmoid + 0.2 bco_pair + 1.0 sft. Other weights: a mixture."""
    return Mixture([sigmoid(beta), BcoPair(beta), Sft()], [0.8, 0.2, 1.0])


def mixture(terms: list[dict]) -> Mixture:
    """A weighted sum of losses by name: [{name: sigmoid, beta: 0.1}, {name: sft, weight: 0.2}]; weight 1 is default.

    Any module has its import path in place of a name: [{_component_: torchtune.rlhf.loss.DPOLoss, beta: 0.1}, ...].
    """
    if not terms:
        raise UserError("loss.terms=[]: must have at least one loss; e.g. loss.terms=[{name: sigmoid}]")
    modules, weights = [], []
    for i, term in enumerate(terms):
        key, options = f"loss.terms[{i}]", dict(term)
        weights.append(options.pop("weight", 1.0))
        if not fits(weights[-1], float):
            raise wrong_kind(f"{key}.weight", weights[-1], float)
        if not options.keys() & {"name", "_component_"}:
            raise UserError(
                f"{key}={show(options)}: must name its loss, such as name: sigmoid, or _component_: and an import path"
            )
        block = _checked(options, key)
        try:
            if "_component_" in options:
                rehearse_loss(block)  # of others than ours: whether it is called and answers as losses do
            modules.append(instantiate(block))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
    return Mixture(modules, weights)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "sigmoid": sigmoid,
    "sigmoid_norm": sigmoid_norm,
    "hinge": hinge,
    "ipo": ipo,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "robust": robust,
    "bco_pair": BcoPair,
    "sppo_hard": sppo_hard,
    "aot": Aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "dpop": dpop,
    "kto": Kto,
    "sft": Sft,
    "simpo": simpo,
    "orpo": orpo,
    "cpo": Cpo,
    "rpo": rpo,
    "mpo": mpo,
    "mixture": mixture,
}


ALIASES = {"dpo": "sigmoid"}


def path_of(name: str, key: str = "loss") -> str:
    """Returns the import path of the loss of this short name, which a config has at `key`.

    Raises:
        UserError: No such loss.
    """
    make = LOSSES.get(ALIASES.get(str(name), str(name)))
    if make is None:
        raise UserError(
            f"{key}.name={show(name)}: no such loss{nearest(name, LOSSES)}; there are {', '.join(LOSSES)}, or any "
            "module by its import path, such as loss=torchtune.rlhf.loss.DPOLoss"
        )
    return f"{make.__module__}.{make.__name__}"


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


# Options


def _score(f_divergence: str, f_alpha: float | None) -> Callable[[Tensor], Tensor]:
    if not fits(f_divergence, Divergence):
        raise wrong_kind("loss.f_divergence", f_divergence, Divergence)
    if f_alpha is not None and f_divergence != "alpha":
        raise UserError(
            f"loss.f_alpha={show(f_alpha)}: has no effect with loss.f_divergence={f_divergence}; "
            "set loss.f_divergence=alpha, or leave it out"
        )
    alpha = 0.5 if f_alpha is None else f_alpha
    _check("f_alpha", alpha, True, "a finite number", 0.5)
    return partial(losses.scores, divergence=f_divergence, alpha=alpha)


def _check_positive(name: str, value: float, default: float) -> None:
    _check(name, value, value > 0, "greater than 0", default)


def _check_not_negative(name: str, value: float) -> None:
    _check(name, value, value >= 0, "at least 0", 0.0)


def _check_smoothing(value: float) -> None:
    _check("label_smoothing", value, 0 <= value < 0.5, "at least 0 and below 0.5", 0.0 if value < 0 else 0.49)


def _check_ld_alpha(value: float) -> None:
    _check("ld_alpha", value, 0 <= value <= 1, "at least 0 and at most 1", min(max(value, 0.0), 1.0))


def _check(name: str, value: float, holds: bool, rule: str, valid: float) -> None:
    if not holds or not math.isfinite(value):
        raise UserError(f"loss.{name}={show(value)}: must be {rule}; e.g. loss.{name}={show(valid)}")
