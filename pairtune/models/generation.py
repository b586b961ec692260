"""A few prompts answered by the model as it is: what the numbers look like in words."""

import torch
from torch import Tensor
from torchtune.generation import generate, sample
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache

from pairtune import console
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.models.bridge.decoder import BridgedDecoder


def answers(
    model: TransformerDecoder,
    prompts: list[list[int]],
    *,
    world: World,
    stop_ids: list[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = 16,
) -> list[list[int]]:
    """Returns an answer a prompt, token ids without the end token. Dropout is off meanwhile; the model is unchanged.

    Args:
        prompts: Token ids, each with its generation prompt at the end; the same in every process of a sharded model.
        max_new_tokens: At most; an answer also ends where the model's positions do.
        temperature: 0 takes the likeliest token; above, answers depend on `seed` and on the batch a prompt is in.
    """
    num_positions = model.pairtune.num_positions
    rng = torch.Generator(device=world.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    answered = []
    starts = range(0, len(prompts), batch_size)
    for start in console.progress(starts, "answers", shown=len(starts) > 1 and world.is_main):
        batch = prompts[start : start + batch_size]
        width = max(map(len, batch))
        room = min(max_new_tokens, num_positions - width)
        if room < 1:
            raise UserError(
                f"samples: a prompt of {width} tokens leaves no room in the model's {num_positions} positions"
            )
        complete = _complete_bridged if isinstance(model, BridgedDecoder) else _complete
        out = complete(model, batch, room, world=world, stop_ids=stop_ids, temperature=temperature, rng=rng)
        answered += [_until_stop(row[width:].tolist(), set(stop_ids)) for row in out]
    model.train(was_training)
    return answered


def _complete(
    model: TransformerDecoder,
    prompts: list[list[int]],
    room: int,
    *,
    world: World,
    stop_ids: list[int],
    temperature: float,
    rng: torch.Generator,
) -> Tensor:
    """Returns prompts, padded on the left, and after them at most `room` tokens."""
    device, width, used = world.device, max(map(len, prompts)), set().union(*prompts)
    alike = _Alike(model, world) if world.size > 1 else model
    # torchtune tells padding by its id: take one that no prompt holds, so that pad = eos or = bos does no harm.
    pad_id = next(i for i in range(model.tok_embeddings.num_embeddings) if i not in used)
    tokens = torch.tensor([[pad_id] * (width - len(p)) + p for p in prompts], device=device)
    dtype = model.tok_embeddings.weight.dtype
    how = {"batch_size": len(prompts), "device": device, "dtype": dtype, "decoder_max_seq_len": width + room}
    with local_kv_cache(model, **how):
        out, _ = generate(
            alike, tokens, max_generated_tokens=room, pad_id=pad_id, temperature=temperature or 1.0,
            top_k=None if temperature else 1, stop_tokens=list(stop_ids), rng=rng,
        )  # fmt: skip
    return out


@torch.no_grad()
def _complete_bridged(
    model: BridgedDecoder,
    prompts: list[list[int]],
    room: int,
    *,
    world: World,
    stop_ids: list[int],
    temperature: float,
    rng: torch.Generator,
) -> Tensor:
    """Does the same with transformers' cache, which each architecture has its own of; padding is masked."""
    device, width = world.device, max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    ended, stops = torch.zeros(len(prompts), dtype=torch.bool, device=device), torch.tensor(stop_ids, device=device)
    alike, cache, step = _Alike(model, world) if world.size > 1 else model, model.new_cache(), tokens
    while tokens.shape[1] < width + room and not ended.all():
        logits = alike(step, mask=mask, input_pos=position, cache=cache)[:, -1]
        drawn = torch.empty_like(logits).exponential_(1, generator=rng)  # else it would be torch's own generator
        step = sample(logits, temperature=temperature or 1.0, top_k=None if temperature else 1, q=drawn).long()
        tokens, ended = torch.cat([tokens, step], dim=1), ended | torch.isin(step[:, 0], stops)
        mask, position = torch.cat([mask, torch.ones_like(step)], dim=1), position[:, -1:] + 1
    return tokens


class _Alike:
    """A model whose next-token logits are the main process's everywhere.

    Each process samples for itself; a token that differed on one would end its forwards early and leave the others
    waiting for its shards.
    """

    def __init__(self, model: TransformerDecoder, world: World):
        self._model, self._world = model, world

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __call__(self, *args, **kwargs):
        self._world.beat("answering prompts")
        return self._world.from_main(self._model(*args, **kwargs)[:, -1:])  # torchtune looks at the last position only


def _until_stop(tokens: list[int], stop_ids: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in stop_ids), len(tokens))
    return tokens[:end]
