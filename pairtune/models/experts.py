"""A sparse mixture of experts in the place of a layer's MLP, and the loss that keeps all experts in use.

Tokens are grouped by expert, and each expert runs once on its group. One without tokens runs on none: its gradient is
then zero, not absent, so that processes which route differently still send each other the same.

B rows, S row length, D width, T = B S tokens, E experts, K experts a token.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pairtune.pairs.batch import PairBatch


class MixtureOfExperts(nn.Module):
    """Each token's weighted sum of the K experts that the router likes best (arXiv 2401.04088, 2.1).

    The weights are the router's softmax over all experts, in float32, divided by its sum over the K chosen ones. There
    is no capacity that a token could exceed, and no noise on the router.

    Args:
        router: D -> E.
        experts: E modules, D -> D.
        experts_per_token: K.
    """

    def __init__(self, router: nn.Linear, experts: list[nn.Module], experts_per_token: int):
        super().__init__()
        if not 1 <= experts_per_token <= len(experts):
            raise ValueError(f"experts_per_token={experts_per_token}: there are {len(experts)} experts")
        self.router, self.experts, self.experts_per_token = router, nn.ModuleList(experts), experts_per_token
        self.recorded: list[Tensor] | None = None  # of recorded_routing

    @torch.compiler.disable  # groups have another size each time
    def forward(self, x: Tensor) -> Tensor:
        """Returns [B, S, D] for x [B, S, D]."""
        tokens = x.flatten(0, 1)
        logits = self.router(tokens)  # [T, E]
        if self.recorded is not None:
            self.recorded.append(logits)
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(self.experts_per_token)  # [T, K]
        weights = weights / weights.sum(-1, keepdim=True)
        by_expert = chosen.flatten().argsort(stable=True)  # [T K], numbers of choices
        groups = tokens[by_expert // self.experts_per_token].split(_sizes_of_groups(chosen, len(self.experts)))
        outputs = torch.cat([expert(group) for expert, group in zip(self.experts, groups, strict=True)])
        # Each choice's output back in its place, then added up in the order of choice: nothing is added in any order.
        outputs = outputs[by_expert.argsort()].view(*chosen.shape, -1)  # [T, K, D]
        return (outputs * weights[..., None]).sum(1).to(x.dtype).view_as(x)


def _sizes_of_groups(chosen: Tensor, num_experts: int) -> list[int]:
    """Returns how many tokens chose each expert; on the meta device, which knows no values, as many as any other."""
    if chosen.is_meta:
        return [(chosen.numel() + n) // num_experts for n in range(num_experts)]
    return torch.bincount(chosen.flatten(), minlength=num_experts).tolist()  # a CPU-GPU sync, one a layer


class RecordedRouter:
    """What a router of transformers' tells, as MixtureOfExperts does: its logits, while someone wants them.

    Args:
        experts_per_token: K.
    """

    def __init__(self, experts_per_token: int):
        self.experts_per_token, self.recorded = experts_per_token, None

    def record(self, logits: Tensor) -> None:
        """Keeps logits [..., E]."""
        if self.recorded is not None:
            self.recorded.append(logits.flatten(0, -2))


@contextmanager
def recorded_routing(mixtures: "list[MixtureOfExperts | RecordedRouter]") -> Iterator[list[Tensor]]:
    """Yields a list to which each mixture's forward adds its router's logits [T, E], in the order of layers.

    What activation checkpointing computes again in backward is not recorded again.
    """
    recorded = []
    for mixture in mixtures:
        mixture.recorded = recorded
    try:
        yield recorded
    finally:
        for mixture in mixtures:
            mixture.recorded = None


def with_router_loss(losses: Tensor, router_loss: Tensor | None, coefficient: float) -> Tensor:
    """Returns the losses [P] as they are, with the gradient of losses + coefficient * router_loss.

    Args:
        router_loss: A scalar; None for a model without a router.
    """
    return losses if router_loss is None else losses + coefficient * (router_loss - router_loss.detach())


def router_loss(logits: list[Tensor], experts_per_token: int, batch: PairBatch) -> Tensor:
    """Returns E sum_e f_e P_e, a float32 scalar: K where experts are used alike, E at worst for K = 1.

    f_e is the number of choices of expert e divided by that of tokens, P_e the mean of its probability (arXiv
    2101.03961, eq. 4 to 6, with all layers' tokens in one mean, as in transformers). A token counts once a layer, also
    where both answers share it; padding does not count. f and P are means over this batch, so that the mean over a
    step's micro-batches depends on how it is cut into them.

    Args:
        logits: Of recorded_routing, [T, E] a layer.
        experts_per_token: K.
    """
    counts = (batch.document.flatten() >= 0).float()  # [T]
    choices = probabilities = 0.0  # [E], summed over tokens and layers
    for layer in logits:
        likelihood = layer.softmax(-1, dtype=torch.float32)
        chosen = torch.zeros_like(likelihood).scatter(1, likelihood.topk(experts_per_token).indices, 1.0)
        choices, probabilities = choices + counts @ chosen, probabilities + counts @ likelihood
    num_tokens = (counts.sum() * len(logits)).clamp(min=1)  # there are none in a batch of padding
    return logits[0].shape[-1] * (choices / num_tokens * (probabilities / num_tokens)).sum()


def mixtures_of(model: nn.Module) -> list[MixtureOfExperts | RecordedRouter]:
    """Returns a model's mixtures of experts, in the order of layers; a dense model has none.

    Of transformers' those that have a router loss there: others are kept even in another way, such as by a bias.
    """
    modules = (getattr(module, "recorded_router", module) for module in model.modules())
    return [module for module in modules if isinstance(module, (MixtureOfExperts, RecordedRouter))]
