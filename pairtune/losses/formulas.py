"""What the formulas of several losses share, as pure functions; the formulas themselves are modules.py's, a class each.

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


def scores(log_ratios: Tensor, divergence: Divergence, alpha: float) -> Tensor:
    """Returns f'(u), u = e^r the ratio of policy and reference, up to a constant: f-DPO, arXiv 2309.16240.

    `alpha` is TRL's: 1 gives the reverse KL, 0 the forward one.

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


def smoothed(z: Tensor, label_smoothing: float) -> Tensor:
    """Returns DPO's loss of z where a fraction label_smoothing of the pairs counts as swapped: cDPO."""
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def same_rank(values: Tensor, others: Tensor) -> Tensor:
    """Returns, for each of `values` [P], that of `others` [P] which has the same rank when both are sorted.

    Sorting both and giving each loss back to the pair that its first value came from is the same as this.
    """
    ranks = values.detach().argsort(stable=True).argsort()
    return others.sort(stable=True).values[ranks]


def log_odds(average: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) for A = log p.

    What is certain has infinite odds: A is taken as no greater than -epsilon there.
    """
    average = average.clamp(max=-torch.finfo(average.dtype).eps)
    return average - torch.log(-torch.expm1(average))


def kto_kl(sum_of_log_ratios: Tensor, count: int) -> Tensor:
    """Returns KTO's estimate of KL(policy || reference): the mean r of the step's mismatched answers, at least 0.

    A sum and a count, since the mean is the whole step's, over micro-batches and processes, before it is cut at 0.
    Without such answers, as in a step of one prompt, it is 0.
    """
    return (sum_of_log_ratios.detach() / max(count, 1)).clamp(min=0)
