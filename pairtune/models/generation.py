"""A few prompts answered by the model as it is: what the numbers look like in words."""

import torch
from torchtune.generation import generate
from torchtune.modules import TransformerDecoder
from torchtune.modules.common_utils import local_kv_cache

from pairtune import console
from pairtune.dist import World
from pairtune.errors import UserError


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
    device, dtype = world.device, next(p.dtype for p in model.norm.parameters())
    vocabulary, num_positions = model.tok_embeddings.num_embeddings, model.pairtune.num_positions
    rng = torch.Generator(device=device).manual_seed(seed)
    was_training = model.training
    model.eval()
    alike = _Alike(model, world) if world.size > 1 else model
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
        used = set().union(*batch)
        # torchtune tells padding by its id: take one that no prompt holds, so that pad = eos or = bos does no harm.
        pad_id = next(i for i in range(vocabulary) if i not in used)
        tokens = torch.tensor([[pad_id] * (width - len(p)) + p for p in batch], device=device)
        cache = local_kv_cache(model, batch_size=len(batch), device=device, dtype=dtype,
                               decoder_max_seq_len=width + room)  # fmt: skip
        with cache:
            out, _ = generate(
                alike, tokens, max_generated_tokens=room, pad_id=pad_id, temperature=temperature or 1.0,
                top_k=None if temperature else 1, stop_tokens=list(stop_ids), rng=rng,
            )  # fmt: skip
        answered += [_until_stop(row[width:].tolist(), set(stop_ids)) for row in out]
    model.train(was_training)
    return answered


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
