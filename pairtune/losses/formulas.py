"""Preference losses as pure functions: the formulas, and nothing else.

Options are taken as they come and have no defaults; modules, defaults and ranges are preference_losses.py.
All vectors are [P] and all functions work pair by pair, but for `same_rank`, which sorts.

P pairs. logp: an answer's summed log-probability, nats. r = logp of the policy - logp of the reference.
A = logp / number of the answer's tokens. A score s is r or what an f-divergence makes of it. z = beta (s_c - s_l).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
LARGEST_EXPONENT = 80.0  # e^80 and its negative are finite in float32 and bfloat16


# Scores


def scores(log_ratios: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """Returns f'(u), u = e^r the ratio of policy and reference, up to a constant: f-DPO, arXiv 2309.16240.

    Constants cancel between the answers of a pair. Exponents stop at 80, beyond which the gradient is 0; without that,
    the difference of two infinite scores is not a number.
    """
    if divergence == "forward_kl":
        return -torch.expm1((-log_ratios).clamp(max=LARGEST_EXPONENT))
    if divergence == "js":
        return math.log(2) + F.logsigmoid(log_ratios)
    if divergence == "alpha" and abs(alpha - 1) >= 1e-6:
        return torch.expm1(((alpha - 1) * log_ratios).clamp(max=LARGEST_EXPONENT)) / (alpha - 1)
    return log_ratios  # reverse KL, and the limit of alpha at 1


def same_rank(values: Tensor, others: Tensor) -> Tensor:
    """Returns, for each of `values`, that of `others` which has the same rank when both are sorted.

    Sorting both and giving each loss back to the pair that its first value came from is the same as this.
    """
    ranks = values.detach().argsort(stable=True).argsort()
    return others.sort(stable=True).values[ranks]


# With a reference


def sigmoid(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with label_smoothing > 0 cDPO. Scores of whole answers or, averaged, of tokens."""
    return _smoothed(beta * (chosen - rejected), label_smoothing)


def _smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def hinge(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """SLiC's hinge on DPO's margin: RSO, arXiv 2309.06657."""
    return F.relu(1 - beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17, with beta for its tau; of scores that are averages over tokens."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def exo_pair(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """EXO for pairs, arXiv 2402.00856 eq. 16: KL(softmax of the two scores || 1 - e, e)."""
    z = beta * (chosen - rejected)
    prefers_chosen = torch.sigmoid(z) * (F.logsigmoid(z) - math.log1p(-label_smoothing))
    return prefers_chosen + torch.sigmoid(-z) * (F.logsigmoid(-z) - math.log(label_smoothing))


def nca_pair(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """NCA for pairs, arXiv 2402.05369: of log-ratios."""
    negatives = F.logsigmoid(-beta * chosen) + F.logsigmoid(-beta * rejected)
    return -F.logsigmoid(beta * chosen) - 0.5 * negatives


def robust(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, arXiv 2403.00409: unbiased when a fraction label_smoothing < 0.5 of the pairs is swapped."""
    z, e = beta * (chosen - rejected), label_smoothing
    return (-(1 - e) * F.logsigmoid(z) + e * F.logsigmoid(-z)) / (1 - 2 * e)


def bco_pair(chosen: Tensor, rejected: Tensor, *, beta: float, shift: Tensor | float = 0.0) -> Tensor:
    """BCO, arXiv 2404.04656: of log-ratios. `shift` is the mean reward beta r so far, delta in the paper."""
    return -F.logsigmoid(beta * chosen - shift) - F.logsigmoid(-(beta * rejected - shift))


def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """SPPO, arXiv 2405.00675 eq. 4.7, with win rates 1 and 0 and beta for 1 / eta: of log-ratios."""
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def aot(policy_margins: Tensor, reference_margins: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, arXiv 2406.05882, of logp_c - logp_l: the step's distribution under the policy against the reference's."""
    return _smoothed(beta * (policy_margins - same_rank(policy_margins, reference_margins)), label_smoothing)


def aot_unpaired(chosen: Tensor, rejected: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """AOT, arXiv 2406.05882, of log-ratios: the chosen answers' distribution against the rejected ones'."""
    return _smoothed(beta * (chosen - same_rank(chosen, rejected)), label_smoothing)


def apo_zero(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: chosen answers become likelier, rejected ones less likely. Of log-ratios."""
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)  # 1 - sigmoid(x) = sigmoid(-x)


def apo_down(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: both become less likely, rejected answers more so. Of log-ratios."""
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def discopop(chosen: Tensor, rejected: Tensor, *, beta: float, tau: float) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 eq. 5: the logistic and the exponential loss, mixed by the margin."""
    z = beta * (chosen - rejected)
    exponential = torch.exp(F.logsigmoid(z / tau) - z)  # exp(-z) sigmoid(z / tau), which alone overflow to inf * 0
    return -F.logsigmoid(z) * torch.sigmoid(-z / tau) + exponential


def dpop(chosen: Tensor, rejected: Tensor, *, beta: float, dpop_lambda: float) -> Tensor:
    """DPO-Positive, arXiv 2402.13228: DPO with a penalty where a chosen answer is less likely than in the reference."""
    return -F.logsigmoid(beta * (chosen - rejected - dpop_lambda * F.relu(-chosen)))


def kto(
    log_ratios: Tensor,
    desirable: Tensor,
    *,
    kl: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """KTO, arXiv 2402.01306 eq. 7, up to a constant: answer by answer, each desirable or not.

    Args:
        log_ratios: [A] r of A answers.
        desirable: [A] bool.
        kl: Scalar, see `kto_kl`.
    """
    wanted = desirable.to(log_ratios.dtype)
    weight = wanted * desirable_weight + (1 - wanted) * undesirable_weight
    return weight * torch.sigmoid(-beta * (2 * wanted - 1) * (log_ratios - kl))


def kto_kl(sum_of_log_ratios: Tensor, count: int) -> Tensor:
    """Returns KTO's estimate of KL(policy || reference): the mean r of the step's mismatched answers, at least 0.

    A sum and a count, since the mean is the whole step's, over micro-batches and processes, before it is cut at 0.
    Without such answers, as in a step of one prompt, it is 0.
    """
    return (sum_of_log_ratios.detach() / max(count, 1)).clamp(min=0)


# Without a reference


def sft(policy_chosen_logps: Tensor, *, mean_chosen_length: float) -> Tensor:
    """Negative log-likelihood a token of all chosen answers of a step: it is the mean of these values over its pairs.

    Args:
        mean_chosen_length: Chosen tokens of the whole step / pairs of the whole step.
    """
    return -policy_chosen_logps / mean_chosen_length


def simpo(chosen: Tensor, rejected: Tensor, *, beta: float, gamma: float) -> Tensor:
    """SimPO, arXiv 2405.14734: of averages A."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(chosen: Tensor, rejected: Tensor, *, orpo_lambda: float) -> Tensor:
    """ORPO, arXiv 2403.07691: likelihood of the chosen answer, and lambda times the odds ratio's loss. Of averages A.

    An answer that is certain has infinite odds: A is taken as no greater than -epsilon there.
    """
    return -chosen - orpo_lambda * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(average: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) for log p."""
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    return average - torch.log(-torch.expm1(average))


def cpo(chosen: Tensor, rejected: Tensor, chosen_average: Tensor, *, beta: float, alpha: float) -> Tensor:
    """CPO, arXiv 2401.08417, of logp, with its likelihood term averaged over tokens and weighted."""
    return -F.logsigmoid(beta * (chosen - rejected)) - alpha * chosen_average
