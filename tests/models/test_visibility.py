"""What each attention kernel is told of who sees whom is the dense mask, element by element; what it computes, too."""

import random
from types import SimpleNamespace

import pytest
import torch

from pairtune.models import attention, visibility
from pairtune.pairs.batch import lay_out

WINDOWS = (None, 1, 5, 64, 200)


def random_batches(count, seed=0):
    """Batches as there may be: common beginnings, unpaired rows, rows that end in padding or are nothing else."""
    rng = random.Random(seed)

    def pair():
        prompt, chosen, rejected = ([rng.randint(1, 3) for _ in range(rng.randint(0, n))] for n in (150, 90, 90))
        return SimpleNamespace(prompt=[0, *prompt], chosen=chosen, rejected=rejected or [1])

    for _ in range(count):
        yield lay_out([pair() for _ in range(rng.randint(0, 5))], rng.choice([384, 512, 1280])), rng.choice(WINDOWS)


def by_block_tables(batch, window):
    """The mask that FlexAttention's tables and function mean: [B, S, S]."""
    told = visibility.block_mask(visibility.key_ranges(batch, window))
    rows, size = batch.tokens.shape
    at = torch.arange(size)
    sees = torch.stack([told.mask_mod(torch.tensor(b), 0, at[:, None], at[None]) for b in range(rows)])
    visited = torch.zeros(rows, size // 128, size // 128, dtype=torch.bool)
    whole = visited.clone()
    tables = (
        (visited, told.kv_num_blocks, told.kv_indices),
        (whole, told.full_kv_num_blocks, told.full_kv_indices),
    )
    for blocks, numbers, indices in tables:
        for b, query in torch.cartesian_prod(torch.arange(rows), torch.arange(size // 128)).tolist():
            blocks[b, query, indices[b, 0, query, : numbers[b, 0, query]].long()] = True
    spread = [blocks.repeat_interleave(128, 1).repeat_interleave(128, 2) for blocks in (visited, whole)]
    backward = told.q_num_blocks.sum() + told.full_q_num_blocks.sum()
    assert backward == visited.sum() + whole.sum()  # the same blocks, by keys
    assert not (visited & whole).any()
    return (spread[0] & sees) | spread[1]


def test_block_masks_are_the_dense_mask():
    for batch, window in random_batches(500):
        assert torch.equal(by_block_tables(batch, window), visibility.dense_mask(batch, window))


def test_sequences_are_the_dense_mask():
    for batch, window in random_batches(500, seed=1):
        told, size = visibility.varlen(batch), batch.tokens.numel()
        found = torch.zeros(size, size, dtype=torch.bool)
        edges = zip(told.query_ends.tolist(), told.key_ends.tolist(), strict=True)
        first_query, first_key = next(edges)
        for last_query, last_key in edges:
            queries, keys = last_query - first_query, last_key - first_key
            assert queries <= told.most_queries and keys <= told.most_keys
            sees = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            sees = sees.triu(keys - queries - window + 1) if window else sees
            found[first_query:last_query].scatter_(1, told.token[first_key:last_key].expand(queries, -1), sees)
            first_query, first_key = last_query, last_key
        dense = torch.block_diag(*visibility.dense_mask(batch, window)).bool()
        real = batch.document.flatten() >= 0  # what padding sees is of no use to anyone
        assert torch.equal(found[real], dense[real])


def naive_attention(q, k, v, mask, scale, softcap):
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * scale
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    return scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 20])
def test_every_back_end_computes_what_the_mask_says(window, groups, softcap):
    torch.manual_seed(0)
    batch = next(b for b, _ in random_batches(9, seed=2) if len(b.pairs) > 2)
    size = batch.tokens.shape
    shapes = [(size[0], heads, size[1], 16) for heads in (4, groups, groups)]
    values = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    upstream = torch.randn(shapes[0], dtype=torch.float64)
    expected = [value.clone().requires_grad_() for value in values]
    out = naive_attention(*expected, visibility.dense_mask(batch, window), 0.3, softcap)
    out.backward(upstream)
    layer = attention.Attention(window=window, softcap=softcap, scale=0.3)
    for back_end in ("mask", "segments"):
        given = [value.clone().requires_grad_() for value in values]
        ours = layer(*given, attention.told(batch, back_end, [window]), 0.0, False)
        ours.backward(upstream)
        torch.testing.assert_close(ours, out, rtol=1e-9, atol=1e-9)
        for mine, theirs in zip(given, expected, strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-9)
    given = [value.float() for value in values]  # on a CPU flex has no backward, and varlen no kernel: gpu_check.py
    flex = layer(*given, attention.told(batch, "flex", [window]), 0.0, False)
    torch.testing.assert_close(flex, out.float(), rtol=1e-4, atol=1e-5)


def test_a_prefixs_repetition_gives_its_gradient_to_the_prefix():
    batch = next(b for b, _ in random_batches(9, seed=3) if len(b.pairs) > 2)
    told = visibility.varlen(batch)
    of_tokens = torch.randn(batch.tokens.numel(), 2, 8, dtype=torch.float64, requires_grad=True)
    index = told.token, told.own, told.again, told.repeated
    ours = attention._WithRepetitions.apply(of_tokens, *index)
    assert torch.equal(ours, of_tokens[told.token]) and len(told.again) > 100
    upstream = torch.randn_like(ours)
    (expected,) = torch.autograd.grad(of_tokens[told.token], of_tokens, upstream)
    torch.testing.assert_close(torch.autograd.grad(ours, of_tokens, upstream)[0], expected)


def test_flex_takes_rows_of_whole_blocks_only():
    batch = lay_out([SimpleNamespace(prompt=[1] * 50, chosen=[2], rejected=[3])])
    with pytest.raises(ValueError, match="rows of 52 tokens.*multiple of 128"):
        visibility.block_masks(batch, [])
