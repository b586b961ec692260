"""Prompts answered by a model as it is, a token at a time, with a cache of keys and values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder

from pairtune.errors import UserError
from pairtune.models.attention import GroupedAttention
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.models.cached import cached, seen_by_the_newest
from pairtune.models.decoding import Step
from pairtune.process import console
from pairtune.process.dist import World


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: of the likeliest `top_k`, of these the fewest that have a probability of `top_p`.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k, top_p: None for all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def pick(self, logits: Tensor, rng: torch.Generator) -> Tensor:
        """Returns a token each, [B], for logits [B, V]: in the order of transformers' generate, and drawn by `rng`."""
        if not self.temperature:
            return logits.argmax(-1)
        # argmax of p / q with q of an exponential distribution is a draw by p, without waiting for the device
        q = torch.empty_like(logits, dtype=torch.float32).exponential_(1, generator=rng)
        return (self.kept(logits).softmax(-1) / q).argmax(-1)

    def kept(self, logits: Tensor) -> Tensor:
        """Returns logits in float32, by temperature, -inf for tokens that are not drawn."""
        logits = logits.float() / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(-1)
            is_tail = ordered.softmax(-1).cumsum(-1) <= 1 - self.top_p
            is_tail[:, -1] = False  # the likeliest stays
            logits = logits.masked_fill(is_tail.gather(-1, order.argsort(-1)), -torch.inf)
        return logits


def answers(
    model: TransformerDecoder,
    prompts: list[list[int]],
    *,
    world: World,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
    fixed_shapes: bool = False,
) -> list[list[int]]:
    """Returns an answer a prompt, token ids without the end token. Dropout is off meanwhile; the model is unchanged.

    Args:
        prompts: Token ids, each with its generation prompt at the end; the same in every process of a sharded model.
        max_new_tokens: At most; an answer also ends where the model's positions do.
        temperature: 0 takes the likeliest token; above, answers depend on `seed` and on the batch a prompt is in.
        fixed_shapes: As in `stream`.
    """
    rng = torch.Generator(device=world.device).manual_seed(seed)
    how, answered = Sampling(temperature), []
    starts = range(0, len(prompts), batch_size)
    for start in console.progress(starts, "answers", shown=len(starts) > 1 and world.is_main):
        batch = prompts[start : start + batch_size]
        found: list[list[int]] = [[] for _ in batch]
        options = {"world": world, "stop_ids": stop_ids, "max_new_tokens": max_new_tokens, "fixed_shapes": fixed_shapes}
        for tokens in stream(model, batch, **options, sampling=how, rng=rng):
            for answer, token in zip(found, tokens, strict=True):
                answer += [] if token is None else [token]
        answered += found
    return answered


@torch.no_grad()
def stream(
    model: TransformerDecoder,
    prompts: list[list[int]],
    *,
    world: World,
    stop_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    rng: torch.Generator,
    fixed_shapes: bool = False,
) -> Iterator[list[int | None]]:
    """Yields the next token of each prompt, one step after the other; None for an answer that has ended.

    Prompts of several lengths are padded on the left. Every process of a sharded model has to take every step.

    Args:
        fixed_shapes: Steps are alike, so that layers that are compiled are compiled once, and a GPU is given a step as
            a whole: a model of ours in one process, see decoding.py.

    Raises:
        ValueError: fixed_shapes of a sharded model.
        UserError: A prompt leaves no room in the model's positions.
    """
    width, positions = max(map(len, prompts)), model.pairtune.num_positions
    room = min(max_new_tokens, positions - width)
    if fixed_shapes and world.size > 1:
        raise ValueError("fixed_shapes: a step of several processes has a token of its own in each")
    if room < 1:
        raise UserError(f"a prompt of {width:,} tokens leaves no room in the model's {positions:,} positions")
    was_training = model.training
    model.eval()
    stops, ended = set(stop_ids), [False] * len(prompts)
    if isinstance(model, BridgedDecoder):
        steps = _bridged(model, prompts, world)
    else:
        steps = _cached(model, prompts, room, world, fixed_shapes=fixed_shapes)
    try:
        logits = next(steps)
        for left in range(room, 0, -1):
            tokens = sampling.pick(logits, rng)
            found = tokens.tolist()
            ended = [was or token in stops for was, token in zip(ended, found, strict=True)]
            yield [None if is_over else token for is_over, token in zip(ended, found, strict=True)]
            if all(ended) or left == 1:
                return
            logits = steps.send(tokens[:, None])
    finally:
        steps.close()  # the cache goes
        model.train(was_training)


def _padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns tokens, whether they are any, and their positions, [B, S] each."""
    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    there = torch.tensor([[False] * (width - len(p)) + [True] * len(p) for p in prompts], device=device)
    return tokens, there, (there.cumsum(1) - 1).clamp(min=0)


def _cached(model: TransformerDecoder, prompts: list[list[int]], room: int, world: World, *, fixed_shapes: bool):
    """Yields logits [B, V] of the next token, and is sent that, [B, 1]: with keys and values kept in each layer."""
    tokens, there, position = _padded(prompts, world.device)
    width, alike = tokens.shape[1], _Alike(model, world) if world.size > 1 else model
    how = {"device": world.device, "dtype": model.tok_embeddings.weight.dtype}
    padded = len({*map(len, prompts)}) > 1
    windows = {module._attention_call.window for module in model.modules() if isinstance(module, GroupedAttention)}
    # A token sees those before it that are no padding; padding sees itself, since a softmax over nothing is NaN.
    sees = torch.ones(width, width, dtype=torch.bool, device=world.device).tril() & there[:, None]
    sees |= torch.eye(width, dtype=torch.bool, device=world.device)
    alike = _as_written(alike, model) if model.pairtune.is_compiled else alike
    with cached(model, len(prompts), width + room, fixed_shapes=fixed_shapes, **how) as kept, _last_only(model):
        token = yield alike(tokens, mask=sees, input_pos=position)[:, -1]
        if fixed_shapes:
            step = Step(model, kept, there, position[:, -1:], room=room, windows=windows)
            for _ in range(1, room):
                token = yield step(token)
            return
        there, position = F.pad(there, (0, room), value=True), position[:, -1:]
        for filled in range(width + 1, width + room):
            position = position + 1
            seen = seen_by_the_newest(there[:, :filled], windows, padded=padded)
            token = yield alike(token, mask=seen, input_pos=position)[:, -1]


def _bridged(model: BridgedDecoder, prompts: list[list[int]], world: World):
    """Does the same with transformers' cache, which each architecture has its own of."""
    step, mask, position = _padded(prompts, world.device)
    mask = mask.long()
    alike, cache = _Alike(model, world) if world.size > 1 else model, model.new_cache()
    while True:
        step = yield alike(step, mask=mask, input_pos=position, cache=cache)[:, -1]
        mask, position = torch.cat([mask, torch.ones_like(step)], 1), position[:, -1:] + 1


def _as_written(call: Callable, model: nn.Module) -> Callable:
    """`call`, which runs the model, without the programs of its layers: of each size of what they keep another one.

    Other programs, such as that which reads NF4, stay.
    """
    layers = [module for module in model.modules() if module._compiled_call_impl is not None]
    compiled = [layer._compiled_call_impl for layer in layers]

    def run(*args, **kwargs):
        for layer in layers:
            layer._compiled_call_impl = None
        try:
            return call(*args, **kwargs)
        finally:
            for layer, program in zip(layers, compiled, strict=True):
                layer._compiled_call_impl = program

    return run


@contextmanager
def _last_only(model: TransformerDecoder) -> Iterator[None]:
    """Has the model compute logits of a row's last token only: of a whole prompt they would be as wide as long."""
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, -1:], *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


class _Alike:
    """A model whose next-token logits are the main process's everywhere.

    Each process samples for itself; a token that differed on one would end its forwards early and leave the others
    waiting for its shards.
    """

    def __init__(self, model: TransformerDecoder, world: World):
        self._model, self._world = model, world

    def __call__(self, *args, **kwargs):
        self._world.beat("answering prompts")
        return self._world.from_main(self._model(*args, **kwargs)[:, -1:])
