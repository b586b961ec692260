"""Log-probabilities of answers: the one function that training, evaluation and the reference use.

They are computed inside the model's own forward, where `install` puts them in the place of the output projection:
logits exist only for scored tokens, and only a chunk of them at a time.

N scored tokens, P pairs, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TiedLinear, TransformerDecoder

from pairtune.models import attention, experts
from pairtune.models.additions import additions
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.pairs.batch import PairBatch

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**27}  # logits that exist at a time: 16 MiB (near a CPU's cache), 512 MiB
KEEP_LOGITS_BYTES = 2**30  # a trainable head keeps its logits for backward up to this size, and recomputes above


def install(
    model: TransformerDecoder | BridgedDecoder,
    back_end: str = "segments",
    windows: Sequence[int | None] | None = None,
) -> None:
    """Gives this decoder an `unembed` that returns token log-probabilities [N] while a batch is being scored.

    Without a batch (generation) it is torchtune's own and returns logits.

    Args:
        back_end: One of attention.BACK_ENDS.
        windows: Of the layers, as attention.install takes them; transformers' models know their own.
    """
    kept = additions(model)
    kept.back_end = back_end
    kept.mixtures = experts.mixtures_of(model)
    if isinstance(model, BridgedDecoder):
        model.share(model.ways[0])
        model.unembed = MethodType(_score, model)
        return
    attention.install(model, windows)
    kept.windows = list(windows or ())
    model.unembed = MethodType(_unembed, model)


def answer_logps(model: TransformerDecoder, batch: PairBatch, ld_alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """Returns each answer's summed log-probability in nats: chosen [P] and rejected [P], float32.

    Args:
        model: A decoder that `install` prepared.
        ld_alpha: LD-DPO's (arXiv 2409.06411): tokens beyond the length of the pair's shorter answer count this much.
            Policy and reference need the same.
    """
    chosen, rejected = _sums(answer_token_logps(model, batch), batch, ld_alpha).chunk(2)
    return chosen, rejected


@dataclass(frozen=True)
class AnswerScores:
    """What one forward tells about a batch's answers, each [P] float32 but the last."""

    chosen_logps: Tensor  # as answer_logps returns them
    rejected_logps: Tensor
    whole_chosen_logps: Tensor  # without ld_alpha
    chosen_weights: Tensor | None  # WPO's, detached
    rejected_weights: Tensor | None
    router_loss: Tensor | None = None  # a scalar: experts.router_loss of a mixture of experts


def answer_scores(
    model: TransformerDecoder, batch: PairBatch, *, ld_alpha: float = 1.0, weights: bool = False
) -> AnswerScores:
    """Returns log-probabilities as `answer_logps` does, and what some losses need besides.

    Args:
        weights: WPO's (arXiv 2406.11827), exp(mean_t [log p_t - log sum_v p_v^2]) of each answer: how likely it is by
            the token, next to what the policy would have sampled. They cost another look at the logits.
    """
    kept = model.pairtune
    if weights:
        kept.log_collision = torch.empty(len(batch.target), device=batch.target.device)  # [N], filled by the forward
    try:
        with experts.recorded_routing(kept.mixtures) as routing:
            token_logps = answer_token_logps(model, batch)
        log_weights = token_logps.detach() - kept.log_collision if weights else None
    finally:
        kept.log_collision = None
    chosen, rejected = _sums(token_logps, batch, ld_alpha).chunk(2)
    whole = chosen if ld_alpha == 1 else _sums(token_logps, batch).chunk(2)[0]
    router_loss = experts.router_loss(routing, kept.mixtures[0].experts_per_token, batch) if routing else None
    if log_weights is None:
        return AnswerScores(chosen, rejected, whole, None, None, router_loss)
    means = [answer.mean() for answer in log_weights.split(batch.answer_lengths)]
    of_answers = (torch.stack(means).exp() if means else log_weights).chunk(2)
    return AnswerScores(chosen, rejected, whole, *of_answers, router_loss)


def answer_token_logps(model: TransformerDecoder, batch: PairBatch) -> Tensor:
    """Returns each scored token's log-probability, [N] float32."""
    mask = None
    if not isinstance(model, BridgedDecoder):
        mask = attention.told(batch, model.pairtune.back_end, model.pairtune.windows)
    model.pairtune.batch = batch
    try:
        return model(batch.tokens, mask=mask, input_pos=batch.input_pos)
    finally:
        model.pairtune.batch = None


def _sums(token_logps: Tensor, batch: PairBatch, ld_alpha: float = 1.0) -> Tensor:
    """Returns one sum an answer, chosen ones first, [2 P]."""
    # One sum an answer, not index_add: that one adds in any order on a GPU, and policy = reference would not be exact.
    answers = token_logps.split(batch.answer_lengths)
    if ld_alpha == 1:
        sums = [logps.sum() for logps in answers]
    else:
        of_chosen, of_rejected = batch.answer_lengths[: batch.num_pairs], batch.answer_lengths[batch.num_pairs :]
        shared = list(map(min, of_chosen, of_rejected)) * 2
        sums = [a[:n].sum() + ld_alpha * a[n:].sum() for a, n in zip(answers, shared, strict=True)]
    return torch.stack(sums) if sums else token_logps  # none in a batch of padding, but still part of the graph


def _unembed(model: TransformerDecoder, hidden: Tensor) -> Tensor:
    batch = model.pairtune.batch
    if batch is None:
        return TransformerDecoder.unembed(model, hidden)
    # [N, D]: normalises each position for itself
    return _score(model, model.norm(hidden.flatten(0, 1)[batch.source]))


def _score(model: TransformerDecoder | BridgedDecoder, hidden: Tensor) -> Tensor:
    """Returns log-probabilities [N] from the scored positions' hidden states [N, D], normalised and scaled."""
    batch, log_collision = model.pairtune.batch, model.pairtune.log_collision
    softcap = getattr(model if isinstance(model, BridgedDecoder) else model.output, "softcap", None)
    if model.pairtune.uniform is not None:
        return _drawn_tokens(hidden, model.output, model.pairtune.uniform, softcap)
    weight = _plain_weight(model.output)
    if weight is None:
        return _checkpointed_token_logps(hidden, batch.target, model.output, softcap, log_collision)
    return token_logps(hidden, weight, batch.target, softcap=softcap, log_collision=log_collision)


def _drawn_tokens(hidden: Tensor, output: Callable, uniform: Tensor, softcap: float | None) -> Tensor:
    """Returns the tokens [N] where the probabilities, added up by id, reach `uniform` [N]."""
    vocabulary = output(hidden[:1]).shape[-1]
    tokens = [uniform.new_zeros(0, dtype=torch.long)]
    for h, u in _chunks(_chunk_size(hidden.device, vocabulary), hidden, uniform):
        reached = _capped(output(h), softcap).softmax(-1).cumsum(-1)
        tokens.append(torch.searchsorted(reached, u[:, None] * reached[:, -1:], right=True)[:, 0])
    return torch.cat(tokens).clamp_(max=vocabulary - 1)


def _plain_weight(output) -> Tensor | None:
    """The [V, D] matrix of an output layer that is nothing but a matrix product, else None (LoRA on the output)."""
    if isinstance(output, TiedLinear):
        return output.tied_module.weight
    if type(output) is nn.Linear and output.bias is None:
        return output.weight
    return None


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    softcap: float | None = None,
    chunk_size: int | None = None,
    keep_bytes: int = KEEP_LOGITS_BYTES,
    log_collision: Tensor | None = None,
) -> Tensor:
    """Returns log softmax(hidden @ weight.T) at `target`, [N] float32, for hidden [N, D], weight [V, D], target [N].

    With a `softcap`, softcap * tanh(logits / softcap) takes the place of the logits, as in Gemma 2. A frozen weight's
    gradient with respect to `hidden` is made in the forward, so that backward is one product by a scalar a token. A
    trainable weight keeps its logits, in the model's dtype, up to `keep_bytes`, and recomputes them above.
    `chunk_size` is in tokens. `log_collision` [N], where given, is filled with log sum_v p_v^2, the log-probability
    that two samples are the same token; no gradient passes through it.
    """
    chunk_size = chunk_size or _chunk_size(hidden.device, weight.shape[0])
    if not torch.is_grad_enabled() or not (hidden.requires_grad or weight.requires_grad):
        chunks = _chunks(chunk_size, hidden, target, log_collision)
        return torch.cat([_chunk_logps(_capped(h @ weight.T, softcap), t, c)[0] for h, t, c in chunks])
    if not weight.requires_grad:
        return _FrozenHead.apply(hidden, weight, target, softcap, chunk_size, log_collision)
    keep = hidden.shape[0] * weight.shape[0] * hidden.element_size() <= keep_bytes
    return _TrainableHead.apply(hidden, weight, target, softcap, chunk_size, keep, log_collision)


def _chunk_size(device: torch.device, vocabulary: int) -> int:
    return max(1, CHUNK_LOGITS.get(device.type, 2**27) // vocabulary)


def _chunks(chunk_size: int, first: Tensor, *others: Tensor | None):
    pieces = first.split(chunk_size)
    return zip(pieces, *(t.split(chunk_size) if t is not None else [None] * len(pieces) for t in others), strict=True)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Returns the logits in float32, or float64 as they are, capped if there is a cap."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if softcap is None else (logits / softcap).tanh_().mul_(softcap)


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """Returns d capped / d logit = 1 - tanh(logit / softcap)^2."""
    return (capped / softcap).square_().neg_().add_(1)


def _chunk_logps(logits: Tensor, target: Tensor, log_collision: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns log-probabilities [n] at the targets and the log-sum-exp [n] of _capped logits; fills `log_collision`."""
    lse = logits.logsumexp(-1)
    if log_collision is not None:
        with torch.no_grad():
            log_collision.copy_((logits - lse[:, None]).mul_(2).logsumexp(-1))
    return logits.gather(-1, target[:, None])[:, 0] - lse, lse


class _FrozenHead(torch.autograd.Function):
    """d logp_n / d hidden_n = weight[target_n] - softmax(logits_n) @ weight, known as soon as the logits are.

    With a softcap, row v of `weight` counts as much as its logit's slope.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap, chunk_size, log_collision):
        gradient = torch.empty_like(hidden)
        chunks = _chunks(chunk_size, hidden, target, log_collision, gradient)
        logps = [_frozen_chunk(h, weight, t, softcap, c, out) for h, t, c, out in chunks]
        ctx.save_for_backward(gradient)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_logps):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_logps[:, None]).to(gradient.dtype), None, None, None, None, None


def _frozen_chunk(hidden, weight, target, softcap, log_collision, gradient) -> Tensor:
    """Returns a chunk's log-probabilities and fills their gradients.

    A function of its own, so that nothing of its logits is left when the next chunk's come.
    """
    logits = _capped(hidden @ weight.T, softcap)
    logps, lse = _chunk_logps(logits, target, log_collision)
    wanted = weight[target]
    slope = None if softcap is None else _slope(logits, softcap)
    probabilities = logits.sub_(lse[:, None]).exp_()  # in place: the largest tensor there is
    if slope is not None:
        probabilities.mul_(slope)
        wanted = wanted * slope.gather(-1, target[:, None])
    torch.mm(probabilities.to(weight.dtype), weight, out=gradient).neg_().add_(wanted)
    return logps


class _TrainableHead(torch.autograd.Function):
    """With g_n the gradient of token n's log-probability, d logits_n = g_n (onehot(target_n) - softmax(logits_n)).

    With a softcap, that is of the capped logits; the others' is it times their slope.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, softcap, chunk_size, keep, log_collision):
        kept = [h @ weight.T if keep else None for h in hidden.split(chunk_size)]
        logps, lses = [], []
        for logits, (h, t, c) in zip(kept, _chunks(chunk_size, hidden, target, log_collision), strict=True):
            logp, lse = _chunk_logps(_capped(h @ weight.T if logits is None else logits, softcap), t, c)
            logps.append(logp)
            lses.append(lse)
        ctx.softcap, ctx.chunk_size, ctx.keep = softcap, chunk_size, keep
        ctx.save_for_backward(hidden, weight, target, torch.cat(lses), *(kept if keep else ()))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_logps):
        hidden, weight, target, lse, *kept = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        # In bf16, adding up chunks would round once a chunk.
        grad_weight = torch.zeros(weight.shape, dtype=lse.dtype, device=weight.device)
        chunks = _chunks(ctx.chunk_size, hidden, target, lse, grad_logps, grad_hidden)
        for i, (h, t, z, g, out) in enumerate(chunks):
            logits = kept[i] if ctx.keep else h @ weight.T
            grad_logits = _grad_logits(logits, t, z, g, ctx.softcap).to(weight.dtype)
            torch.mm(grad_logits, weight, out=out)
            grad_weight += grad_logits.T @ h
            del logits, grad_logits  # before the next chunk's come
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None


def _grad_logits(logits, target, lse, grad_logps, softcap) -> Tensor:
    """Returns [n, V] float32, from a chunk's logits, their log-sum-exp and the gradient of its log-probabilities."""
    logits = logits if softcap is None else _capped(logits, softcap)
    grad_logits = (logits - lse[:, None]).exp_().mul_(-grad_logps[:, None])
    grad_logits.scatter_add_(-1, target[:, None], grad_logps[:, None].to(grad_logits.dtype))
    return grad_logits if softcap is None else grad_logits.mul_(_slope(logits, softcap))


def _checkpointed_token_logps(
    hidden: Tensor, target: Tensor, output, softcap: float | None, log_collision: Tensor | None
) -> Tensor:
    """The same for any output layer, by autograd; backward computes each chunk's logits again."""

    def chunk(c, h, t):
        logits = output(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return _chunk_logps(logits if softcap is None else softcap * torch.tanh(logits / softcap), t, c)[0]

    with torch.no_grad():
        vocabulary = output(hidden[:1]).shape[-1]
    chunk_size = _chunk_size(hidden.device, vocabulary)
    chunks = _chunks(chunk_size, hidden, target, log_collision)
    # What is filled in place must not be among the arguments that a checkpoint saves.
    return torch.cat([checkpoint(partial(chunk, c), h, t, use_reentrant=False) for h, t, c in chunks])
