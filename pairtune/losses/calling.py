"""How a loss is called: what it needs besides log-probabilities, and what of that concerns a whole step.

A loss says so in an attribute `needs`; one that has none, as torchtune's, needs a reference and nothing else.
P pairs.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from pairtune.config.rules import one_line
from pairtune.errors import UserError
from pairtune.models.logps import AnswerScores, answer_scores
from pairtune.pairs.at_once import longest_row
from pairtune.pairs.batch import PairBatch
from pairtune.pairs.digests import NUMBERS
from pairtune.process.dist import World


@dataclass(frozen=True)
class Needs:
    """What a loss has to be called with. The defaults are those of torchtune's modules, and of anyone's.

    Attributes:
        reference: Reference log-probabilities; else None does for both.
        whole_step: The whole step's values in one call, see `step_gradients`. It is called again for each micro-batch,
            with `step`, its part of the StepLosses, and answers with `step.apply`.
        takes_unpaired: Rows that have one answer are taken, too.
        inputs: Further keyword arguments, see `loss_inputs`.
        ld_alpha: For logps.answer_scores of the policy and logps.answer_logps of the reference.
    """

    reference: bool = True
    whole_step: bool = False
    takes_unpaired: bool = False
    inputs: tuple[str, ...] = ()
    ld_alpha: float = 1.0

    @property
    def weights(self) -> bool:
        """For logps.answer_scores."""
        return "chosen_weights" in self.inputs


def needs(loss_fn: Callable) -> Needs:
    """Returns what this loss needs; torchtune's and users' own modules need a reference and nothing else."""
    return getattr(loss_fn, "needs", Needs())


def takes_unpaired(loss_fn: Callable) -> bool:
    """Returns whether this loss learns from rows with one answer and a label, too, as KTO does."""
    return needs(loss_fn).takes_unpaired


def check_takes(loss_fn: Callable, names: Iterable[str], where: str) -> None:
    """Refuses weights or margins of pairs that this loss does not take.

    Args:
        names: weight, margin, or both.
        where: The config's block that has them.

    Raises:
        UserError: With the losses that take them.
    """
    for name in names:
        if not getattr(loss_fn, f"takes_{name}s", False):
            called = getattr(loss_fn, "name", type(loss_fn).__name__)
            way = "loss=sigmoid, hinge, sigmoid_norm and robust do" if name == "margin" else "loss=sigmoid does"
            way += ", and is torchtune's DPOLoss" if called == "DPOLoss" else ""
            raise UserError(
                f"{where}.columns.{name}: the loss {called} takes no {name}s of pairs; {way}; or leave it out"
            )


def policy_scores(model: TransformerDecoder, batch: PairBatch, loss_fn: Callable) -> AnswerScores:
    """Returns the answers' log-probabilities under the policy, and what else this loss takes of its forward."""
    needed = needs(loss_fn)
    return answer_scores(model, batch, ld_alpha=needed.ld_alpha, weights=needed.weights)


def row_length(loss_fn: Callable, pairs: list, max_length: int) -> int:
    """Returns the length of rows, in tokens, that every batch of these pairs fits in, see at_once.longest_row."""
    mixes = "kl" in needs(loss_fn).inputs  # KTO puts each prompt before the answers to another one
    return longest_row(pairs, mixed_within=max_length if mixes else None)


def after_step(loss_fn: Callable, world: World) -> None:
    """Lets a loss that keeps something over steps, such as a running mean, take in the step that was just made.

    Such a loss has a method `after_step`; what it keeps are buffers, which checkpoints hold. Every process has to
    call it.
    """
    if hasattr(loss_fn, "after_step"):
        loss_fn.after_step(world)


@contextmanager
def unchanged(loss_fn: Callable) -> Iterator[None]:
    """Around forwards that no step comes of: what the loss keeps over steps is as before."""
    buffers = list(loss_fn.buffers()) if isinstance(loss_fn, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def loss_inputs(
    loss_fn: Callable,
    batch: PairBatch,
    scores: AnswerScores,
    *,
    mean_chosen_length: float | None = None,
    kl: Tensor | None = None,
    mean_weight: float = 1.0,
) -> dict[str, Tensor | float]:
    """Returns the keyword arguments that this loss takes for this batch.

    Args:
        scores: Of the policy, made with this loss's ld_alpha and weights.
        mean_chosen_length: For sft: chosen tokens / pairs, both of the whole step.
        kl: For kto: scalar of the whole step, from formulas.kto_kl over answers of `mismatched` pairs.
        mean_weight: Of the whole step's pairs: divided by it, weights leave a step's mean loss a weighted mean.
    """
    known = vars(scores) | {"mean_chosen_length": mean_chosen_length, "kl": kl}
    names = needs(loss_fn).inputs
    if "chosen_lengths" in names:
        lengths = torch.tensor(batch.answer_lengths, device=batch.target.device)
        known["chosen_lengths"], known["rejected_lengths"] = lengths.chunk(2)
    return {name: known[name] for name in names} | _of_pairs(batch, mean_weight)


def _of_pairs(batch: PairBatch, mean_weight: float) -> dict[str, Tensor]:
    """Returns weights and margins where a pair has one of its own: contract.check_loss has refused them elsewhere."""
    weights, margins = ([getattr(pair, name, default) for pair in batch.pairs] for name, default in NUMBERS.items())
    found = {}
    if mean_weight != 1 or any(weight != 1 for weight in weights):
        found["pair_weights"] = torch.tensor([weight / mean_weight for weight in weights], device=batch.target.device)
    if any(margins):
        found["margins"] = torch.tensor(margins, device=batch.target.device)
    return found


def mismatched(pairs: list, max_length: int) -> list:
    """Returns the pairs with each prompt followed by the answers to another one: what KTO's KL is estimated on.

    The next pair's that has another prompt and whose answers fit behind this one. A pair without such a one is left
    out; the shortest prompt's never is while there is another prompt, so there are none in a step of one prompt only.
    They are laid out as the prompt's own ones are, so that it runs through the model once. Called with all pairs of a
    step, before they are shared between processes, it depends on neither.

    Args:
        max_length: Most tokens of prompt + longer answer, as each of the pairs has. TRL cuts answers there instead.
    """
    found = []
    for i, pair in enumerate(pairs):
        others = (pairs[(i + n) % len(pairs)] for n in range(1, len(pairs)))
        room = max_length - len(pair.prompt)
        fitting = (o for o in others if max(len(o.chosen), len(o.rejected)) <= room and o.prompt != pair.prompt)
        other = next(fitting, None)
        if other is not None:
            answers = ("chosen", "rejected", "chosen_unscored", "rejected_unscored")
            found.append(replace(pair, **{name: getattr(other, name) for name in answers if hasattr(other, name)}))
    return found


@dataclass(frozen=True)
class StepLosses:
    """A whole step's losses and rewards, and the gradients of the sum of its losses: each [P], detached."""

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_gradients: Tensor
    rejected_gradients: Tensor

    def apply(self, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns losses and rewards with these values; the losses' gradients are those of the whole step."""
        chosen = policy_chosen_logps * self.chosen_gradients
        rejected = policy_rejected_logps * self.rejected_gradients
        losses = self.losses + (chosen - chosen.detach()) + (rejected - rejected.detach())
        return losses, self.chosen_rewards, self.rejected_rewards


def step_gradients(
    loss_fn: Callable,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    **inputs,
) -> StepLosses:
    """Returns d (sum of the step's losses) / d logps, for losses that are not sums over pairs.

    All vectors are the whole step's, of all processes. Then, micro-batch by micro-batch, the sum over its pairs of
    `chosen_logps * chosen_gradients + rejected_logps * rejected_gradients` has the loss's own gradient.
    """
    with torch.enable_grad():
        policy = [logps.detach().requires_grad_() for logps in (policy_chosen_logps, policy_rejected_logps)]
        values = loss_fn(*policy, reference_chosen_logps, reference_rejected_logps, **inputs)
        gradients = torch.autograd.grad(values[0].sum(), policy, allow_unused=True, materialize_grads=True)
    return StepLosses(*(value.detach() for value in values), *gradients)


def step_losses(
    loss_fn: Callable,
    batches: list[PairBatch],
    scores: list[AnswerScores],
    references: list[tuple],
    world: World,
    **known,
) -> list[StepLosses]:
    """Returns `step_gradients` of a step that is spread over micro-batches and processes, cut into these micro-batches.

    Every process has to call it.

    Args:
        batches, scores, references: This process's, one a micro-batch; references are pairs of [P] or of None.
        known: For `loss_inputs`.
    """
    logps = [(s.chosen_logps, s.rejected_logps, *r) for s, r in zip(scores, references, strict=True)]
    inputs = [loss_inputs(loss_fn, b, s, **known) for b, s in zip(batches, scores, strict=True)]
    columns = [_of_all([row[i] for row in logps], world) for i in range(4)]
    of_step = {k: _of_all([i[k] for i in inputs], world) for k in inputs[0]}
    # Each process computes all of it; what the loss keeps over steps, it keeps in one.
    with nullcontext() if world.is_main else unchanged(loss_fn):
        whole = step_gradients(loss_fn, *columns, **of_step)
    counts = world.gather([sum(batch.num_pairs for batch in batches)])
    first, cut = sum(counts[: world.rank]), []
    for batch in batches:
        mine = slice(first, first + batch.num_pairs)
        cut.append(StepLosses(*(value[mine] for value in vars(whole).values())))
        first = mine.stop
    return cut


def _of_all(values: list, world: World):
    """One tensor of every process's micro-batches; what is not a vector is the same everywhere."""
    if not isinstance(values[0], Tensor) or values[0].ndim == 0:
        return values[0]
    gathered = world.gather([number for value in values for number in value.tolist()])  # a float is exact there
    return torch.tensor(gathered, dtype=values[0].dtype, device=values[0].device)


def num_answers(pairs: list) -> int:
    """Returns how many answers there are: two a pair, one of an unpaired row."""
    return sum(bool(pair.chosen) + bool(pair.rejected) for pair in pairs)


def mean_chosen_length(pairs: list, *, score_end: bool = True) -> float:
    """Returns scored chosen tokens / pairs."""
    unscored = sum(stop - start for pair in pairs for start, stop in getattr(pair, "chosen_unscored", ()))
    return (sum(max(0, len(pair.chosen) - (not score_end)) for pair in pairs) - unscored) / max(1, len(pairs))


def example_inputs(
    loss_fn: Callable,
    num_pairs: int,
    *,
    lengths: tuple[int, int] = (1, 1),
    weights: tuple[float, float] = (1.0, 1.0),
    whole_chosen_logp: float = 0.0,
) -> dict[str, Tensor | float]:
    """Returns keyword arguments as this loss takes them, to try it with: the same for each pair.

    Args:
        lengths, weights: Of the chosen and of the rejected answer.
    """

    def of_each(value: float) -> Tensor:
        return torch.full((num_pairs,), value)

    known = {
        **{"chosen_lengths": of_each(lengths[0]), "rejected_lengths": of_each(lengths[1])},
        **{"chosen_weights": of_each(weights[0]), "rejected_weights": of_each(weights[1])},
        **{"whole_chosen_logps": of_each(whole_chosen_logp), "mean_chosen_length": float(lengths[0])},
        "kl": torch.tensor(0.0),
    }
    return {name: known[name] for name in needs(loss_fn).inputs}


def check_convention(loss_fn: Callable, path: str) -> None:
    """Calls a loss of this import path once, for two pairs.

    Raises:
        UserError: It fails, or does not return losses that depend on the policy and two rewards, three vectors.
    """
    logps = [torch.zeros(2, requires_grad=True) for _ in range(4)]
    try:
        reference = logps[2:] if needs(loss_fn).reference else (None, None)
        result = loss_fn(*logps[:2], *reference, **example_inputs(loss_fn, 2))
    except Exception as error:
        raise _not_a_pair_loss(path, f"called so, it fails: {one_line(error)}") from None
    if not isinstance(result, (tuple, list)):
        raise _not_a_pair_loss(path, f"it returns a {type(result).__name__}")
    if len(result) != 3 or not all(isinstance(r, Tensor) and r.shape == (2,) for r in result):
        shapes = ", ".join(str(list(r.shape)) if isinstance(r, Tensor) else type(r).__name__ for r in result)
        raise _not_a_pair_loss(path, f"for two pairs it returns {shapes}")
    if not result[0].requires_grad:
        raise _not_a_pair_loss(path, "its losses do not depend on the policy")


def _not_a_pair_loss(path: str, reason: str) -> UserError:
    return UserError(
        f"loss._component_={path}: must map policy chosen, policy rejected, reference chosen and reference rejected "
        f"log-probabilities to losses, chosen rewards and rejected rewards, one of each a pair; {reason}; use one such "
        "as torchtune.rlhf.loss.DPOLoss"
    )


def loss_of(loss_fn: Callable, *logps: Tensor, margin: float = 0.0) -> float:
    """Returns the loss of one pair from its log-probabilities alone, [1] each, in the order of a loss's arguments."""
    inputs = example_inputs(loss_fn, 1) | ({"margins": torch.tensor([margin])} if margin else {})
    with torch.no_grad(), unchanged(loss_fn):
        return float(loss_fn(*(values.detach().cpu() for values in logps), **inputs)[0])


def loss_at_start(
    loss_fn: Callable, *, has_chosen: bool = True, has_rejected: bool = True, margin: float = 0.0
) -> float | None:
    """Returns the loss of a pair whose policy is the reference, or None if it depends on more than that.

    None: without a reference, with an sft term, with WPO's weights.

    Args:
        has_chosen, has_rejected: Of an unpaired row, one.
        margin: The pair's own.
    """
    if not needs(loss_fn).reference:
        return None
    # Two such pairs that have nothing else in common: a loss that gives both one value depends on nothing else.
    values = []
    for logps, lengths, weights in (((0.0, 0.0), (1, 1), (1.0, 1.0)), ((-7.0, -11.0), (3, 5), (0.5, 0.25))):
        chosen, rejected = torch.tensor([logps[0] * has_chosen]), torch.tensor([logps[1] * has_rejected])
        lengths = lengths[0] * has_chosen, lengths[1] * has_rejected
        inputs = example_inputs(loss_fn, 1, lengths=lengths, weights=weights, whole_chosen_logp=float(chosen))
        inputs |= {"margins": torch.tensor([margin])} if margin else {}
        with torch.no_grad(), unchanged(loss_fn):
            values.append(float(loss_fn(chosen, rejected, chosen, rejected, **inputs)[0]))
    return values[0] if math.isclose(*values, rel_tol=1e-5, abs_tol=1e-6) else None
