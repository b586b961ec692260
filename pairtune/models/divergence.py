"""How far a policy's next tokens are from a reference's: KL divergence in nats a token, along answers that are there.

At each scored position the policy draws a token, and both say how likely it was: with r = p_reference / p_policy, the
mean of r - 1 - log r has KL(policy, reference) for its expectation and is never negative (J. Schulman, "Approximating
KL Divergence", 2020, k3; arXiv 2402.03300, equation 4). The exact value needs both whole distributions at a time.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from pairtune.models.additions import additions
from pairtune.models.logps import answer_token_logps
from pairtune.pairs.batch import PairBatch, to_device
from pairtune.pairs.digests import short_digest


@torch.no_grad()
def token_divergence(policy: nn.Module, reference_logps: Callable[[PairBatch], Tensor], batch: PairBatch) -> Tensor:
    """Returns an estimate for each of N scored positions, float32, whose mean is the divergence in nats a token.

    Three forwards without gradients. What is drawn depends on the pair, not on its batch: a number of processes or a
    resumed run change nothing.

    Args:
        policy: A model that logps.install prepared, without dropout.
        reference_logps: Gives the reference's answer_token_logps of a batch.
        batch: Pairs whose answers' positions are looked at.
    """
    kept = additions(policy)
    kept.uniform = to_device(_uniform(batch), batch.target.device)
    try:
        drawn = replace(batch, target=answer_token_logps(policy, batch))
    finally:
        kept.uniform = None
    log_r = reference_logps(drawn) - answer_token_logps(policy, drawn)
    return log_r.exp() - 1 - log_r


def _uniform(batch: PairBatch) -> Tensor:
    """Returns [N] random numbers in [0, 1), an answer's from its pair's tokens."""
    numbers = [torch.zeros(0)]
    for n, length in enumerate(batch.answer_lengths):
        pair, answer = batch.pairs[n % batch.num_pairs], n // batch.num_pairs
        generator = torch.Generator().manual_seed(2 * short_digest(pair) + answer)
        numbers.append(torch.rand(length, generator=generator))
    return torch.cat(numbers)
