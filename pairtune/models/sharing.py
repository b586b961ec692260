"""Whether both answers of a pair may follow one prompt in one row: found out by comparing, before training.

A model whose layers heed a mask sees in such a row what it sees in a conversation alone. One with a recurrent state or
a convolution does not, and a builder that nobody has tried may not either. So a few of the run's own pairs are scored
as the run will score them, and each answer alone, by the model's own forward: transformers' or torchtune's.

N scored tokens, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from pairtune.config.rules import one_line
from pairtune.errors import UserError
from pairtune.models.adapters import frozen
from pairtune.models.additions import Sharing, additions
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.models.build import dtype_of
from pairtune.models.execution import plainly
from pairtune.models.logps import answer_token_logps
from pairtune.models.shard import forget_gathered
from pairtune.pairs.at_once import document_lengths, lengths_of
from pairtune.pairs.batch import PairBatch, lay_out
from pairtune.process.dist import World

SOME = 2  # pairs: a row of several documents, and no more memory than a step takes
# Nats a token, the mean over tokens and the most: beyond this no rounding goes. Another token that is seen, or one that
# is not, moves those after it by tenths and more.
ROUNDING = {"fp32": (1e-3, 2e-2), "bf16": (0.2, 2.0)}
NOTHING = {"fp32": 1e-4, "bf16": 1e-2}  # a mean that needs no reason
# What a model raises that does not know a kind of mask, or is broken.
CANNOT = (TypeError, AttributeError, NotImplementedError, ValueError, LookupError, AssertionError, RuntimeError)


@dataclass(frozen=True)
class Difference:
    """Of log-probabilities of tokens, in nats."""

    mean: float
    most: float
    reason: str = ""  # why it cannot be computed so

    def is_rounding(self, dtype: str) -> bool:
        """Returns whether it may be no more than what numbers of this dtype, bf16 or fp32, make of it."""
        mean, most = ROUNDING[dtype]
        return self.mean <= mean and self.most <= most

    def is_like(self, other: "Difference", dtype: str) -> bool:
        """Returns whether it has no more reasons than another one, that of a model that computes the same otherwise."""
        beside = NOTHING[dtype]
        is_near = self.mean <= 2 * other.mean + beside and self.most <= 3 * other.most + 10 * beside
        return is_near and math.isfinite(self.mean)

    def __str__(self) -> str:
        known = f"{self.mean:.2g} nats a token, {self.most:.2g} at most"
        return f"it cannot compute so: {self.reason}" if self.reason else known


def settle(model: nn.Module, pairs: Sequence, world: World) -> None:
    """Makes a loaded model score each answer behind a prompt of its own where the two may not share one, and says so.

    Every process has to call it, with the same pairs.

    Args:
        model: From models.load.
        pairs: All that it will look at; the first few are compared.

    Raises:
        UserError: Neither gives what the model computes of each conversation alone.
    """
    some = [SimpleNamespace(prompt=p.prompt, chosen=p.chosen, rejected=p.rejected) for p in islice(pairs, SOME)]
    batch, dtype = lay_out(some).to(world.device), dtype_of(model)  # all tokens of an answer are scored
    layers = [*model.modules()]
    with frozen(model), plainly(model):
        alone = torch.cat([_alone(model, *conversation, world) for conversation in _conversations(batch)])
        if not alone.isfinite().all():
            return  # nothing is equal to that; the dry run tells of weights that are not finite
        _check_causal(model, *_conversations(batch)[0], alone, world, dtype)
        ways = model.ways if isinstance(model, BridgedDecoder) else [additions(model).sharing]
        for apart in [way for way in ways if not way.prompts] or ways[:1]:
            rounding = world.agree(_try(model, apart, batch, alone))  # only that, if anything is right
            if rounding.is_rounding(dtype):
                break
        tried = []
        for way in ways:
            tried.append(world.agree(_try(model, way, batch, alone)))
            if tried[-1].is_like(rounding, dtype):
                break
    forget_gathered(model)
    if [*model.modules()] != layers:
        raise UserError(
            f"model: {type(model.lm).__name__} puts other layers in the place of its own while it computes, which have "
            "dropout again: see config.json for how it attends (BigBird: attention_type=original_full)"
        )
    if not tried[-1].is_rounding(dtype):
        raise UserError(
            "model: the log-probabilities of answers are not those that it computes of each conversation alone: "
            f"{tried[-1]}, which is more than rounding; it cannot be trained here, and no run with it was right"
        )
    if not way.prompts or way.dense:
        world.print(_told(model, way, pairs, next((other for other in tried[:-1] if not other.reason), None)))


def _try(model: nn.Module, way: Sharing, batch: PairBatch, alone: Tensor) -> Difference:
    """Returns how far a model that takes answers in this way is from `alone`; infinitely, where it cannot."""
    if isinstance(model, BridgedDecoder):
        model.share(way)
    try:
        difference = (answer_token_logps(model, batch) - alone).abs()
    except CANNOT as error:
        if isinstance(error, torch.OutOfMemoryError) or not isinstance(model, BridgedDecoder):
            raise
        return Difference(math.inf, math.inf, one_line(error))
    return Difference(float(difference.mean()), float(difference.max()))


def _told(model: BridgedDecoder, way: Sharing, pairs: Sequence, shared: Difference | None) -> str:
    """Returns what it costs that a model does not take answers in the fastest way, and why it does not."""
    why = f"would be off otherwise ({shared})"
    if shared is None:
        why = "has layers that keep a state of a row" if model.is_stateful else "adds its masks to scores"
    cost = "attention is computed with all scores of a row"
    if not way.prompts:
        shared_tokens, (prompt, *answers) = int(document_lengths(pairs).sum()), lengths_of(pairs)
        tokens = int(sum((prompt * (answer > 0) + answer).sum() for answer in answers))
        cost = (
            f"each answer is computed behind a prompt of its own, {tokens:,} tokens in the place of {shared_tokens:,} "
            f"({tokens / shared_tokens:.2f} times as many)"
        )
    return f"model: {model.lm.config.model_type} {why}: {cost}\n"


def _conversations(batch: PairBatch) -> list[tuple[list[int], list[int]]]:
    """Returns prompt and answer of each, in the order in which they are scored."""
    answers = ((pair.prompt, getattr(pair, name)) for name in ("chosen", "rejected") for pair in batch.pairs)
    return [(prompt, answer) for prompt, answer in answers if answer]


def _check_causal(model: nn.Module, prompt: list, answer: list, alone: Tensor, world: World, dtype: str) -> None:
    """Refuses a model whose log-probabilities of an answer's beginning depend on what follows.

    Args:
        prompt, answer: The first conversation.
        alone: Of all of them, the first one's first.
    """
    half = len(answer) // 2
    if not half or not isinstance(model, BridgedDecoder):
        return
    difference = (_alone(model, prompt, answer[:half], world) - alone[:half]).abs()
    off = world.agree(Difference(float(difference.mean()), float(difference.max())))
    if not off.is_rounding(dtype):
        raise UserError(
            f"model: {type(model.lm).__name__} sees the tokens that it is to predict: without the second half of an "
            f"answer, the first has other log-probabilities ({off}); take a causal language model"
        )


def _alone(model: nn.Module, prompt: list[int], answer: list[int], world: World) -> Tensor:
    """Returns the log-probabilities of an answer's tokens, [tokens] float32, by the model's own forward.

    Raises:
        UserError: transformers' model cannot compute them.
    """
    tokens = torch.tensor([prompt + answer], device=world.device)
    scored = torch.arange(len(prompt) - 1, tokens.shape[1] - 1, device=world.device)
    if not isinstance(model, BridgedDecoder):
        logits = model(tokens)[0, scored]
    else:
        try:
            logits = model(tokens, published=scored)[0]
        except CANNOT as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UserError(
                f"model: transformers' {type(model.lm).__name__} does not compute a conversation of {tokens.shape[1]} "
                f"tokens: {one_line(error)}; see whether another version of transformers does"
            ) from error
    return logits.float().log_softmax(-1).gather(-1, tokens[0, scored + 1][:, None])[:, 0]
