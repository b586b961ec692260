"""The layout says exactly which token sees which, where it stands and who is scored by whom."""

import random
from types import SimpleNamespace

import pytest
import torch
from helpers import random_pairs

from pairtune.losses.calling import mismatched
from pairtune.models.visibility import dense_mask
from pairtune.pairs.at_once import longest_row
from pairtune.pairs.batch import lay_out
from pairtune.pairs.tokenize import Pair

PAIR = SimpleNamespace(prompt=[10, 11, 12], chosen=[20, 21, 2], rejected=[20, 31, 32, 2])


def test_a_pair_is_laid_out_as_prefix_and_two_tails():
    batch = lay_out([PAIR])
    assert batch.tokens.tolist() == [[10, 11, 12, 20, 21, 2, 31, 32, 2]]  # the common 20 stands once
    assert batch.input_pos.tolist() == [[0, 1, 2, 3, 4, 5, 4, 5, 6]]
    assert batch.segment.tolist() == [[0, 0, 0, 0, 1, 1, 2, 2, 2]]
    assert batch.source.tolist() == [2, 3, 4] + [2, 3, 6, 7]
    assert batch.target.tolist() == [20, 21, 2] + [20, 31, 32, 2]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert batch.num_tokens == 9


def test_an_unpaired_row_has_one_tail_and_says_which():
    desirable, undesirable = (SimpleNamespace(**{**vars(PAIR), answer: []}) for answer in ("rejected", "chosen"))
    batch = lay_out([desirable, PAIR, undesirable])
    assert batch.tokens[0, :6].tolist() == [10, 11, 12, 20, 21, 2] and batch.tokens[0, -7:-4].tolist() == [10, 11, 12]
    assert batch.tokens[0, -4:].tolist() == [20, 31, 32, 2] and batch.input_pos[0, -4:].tolist() == [3, 4, 5, 6]
    assert batch.answer_lengths == (3, 3, 0, 0, 4, 4) and batch.num_tokens == 6 + 9 + 7
    assert batch.with_chosen.tolist() == [0, 1] and batch.with_rejected.tolist() == [1, 2]
    assert batch.with_both.tolist() == [1]
    assert [document.tails for document in batch.rows[0]] == [(3,), (2, 3), (4,)]


def test_each_row_of_the_mask_is_the_conversation_up_to_that_token():
    """The tokens that a token sees, read in order, are its own conversation so far: nothing more, nothing less."""
    pairs = random_pairs(4)
    for row_length in (None, 128, 250):
        batch = lay_out(pairs, row_length)
        mask = dense_mask(batch)
        seen = set()
        for r, column in (batch.document >= 0).nonzero().tolist():
            visible = batch.tokens[r][mask[r, column]].tolist()
            pair = pairs[batch.document[r, column]]
            answer = pair.rejected if batch.segment[r, column] == 2 else pair.chosen
            conversation = pair.prompt + answer
            position = int(batch.input_pos[r, column])
            assert visible == conversation[: position + 1]
            seen.add((int(batch.document[r, column]), int(batch.segment[r, column]), position))
        assert len(seen) == batch.num_tokens
        assert mask.any(-1).all()  # a row without a single key is NaN after softmax


def test_every_answer_token_is_scored_once_by_the_token_before_it():
    pairs = random_pairs(5)
    batch = lay_out(pairs, 128)
    mask = dense_mask(batch)
    width = batch.tokens.shape[1]
    for sequence in range(10):
        pair = pairs[sequence % 5]
        answer = pair.chosen if sequence < 5 else pair.rejected
        mine = batch.sequence == sequence
        assert batch.target[mine].tolist() == answer
        for n, source in enumerate(batch.source[mine].tolist()):
            r, column = divmod(source, width)
            assert batch.tokens[r][mask[r, column]].tolist() == pair.prompt + answer[:n]
    assert len(batch.source) == sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)


def test_rows_are_filled_and_nothing_is_lost():
    pairs = random_pairs(20)
    batch = lay_out(pairs, 128)
    assert batch.tokens.shape[1] == 128
    assert sorted(set(batch.document.unique().tolist()) - {-1}) == list(range(20))
    alone = lay_out(pairs, None)
    assert (batch.document >= 0).sum() == alone.tokens.numel() == alone.num_tokens


def test_what_cannot_be_laid_out_is_refused():
    with pytest.raises(ValueError, match="9 tokens does not fit a row of 8"):
        lay_out([PAIR], 8)
    with pytest.raises(ValueError, match="at least one token"):
        lay_out([SimpleNamespace(prompt=[], chosen=[1], rejected=[2])])


def test_no_pair_at_all_is_a_batch_of_padding():
    for row_length in (None, 128):
        batch = lay_out([], row_length)
        assert batch.num_pairs == batch.num_tokens == len(batch.source) == 0
        assert (batch.document == -1).all() and dense_mask(batch).any(-1).all()


def test_moving_to_a_device_moves_every_tensor():
    batch = lay_out([PAIR]).to(torch.device("meta"))
    assert {t.device.type for t in vars(batch).values() if isinstance(t, torch.Tensor)} == {"meta"}


def test_without_their_ends_answers_are_scored_up_to_there():
    """Llama 3's: what is left has the positions and targets that it has otherwise."""
    pairs = random_pairs(5)
    whole, cut = lay_out(pairs), lay_out(pairs, score_end=False)
    kept = torch.ones(len(whole.target), dtype=torch.bool)
    kept[torch.tensor(whole.answer_lengths).cumsum(0) - 1] = False
    assert cut.answer_lengths == tuple(n - 1 for n in whole.answer_lengths)
    for name in ("source", "target", "sequence"):
        assert torch.equal(getattr(cut, name), getattr(whole, name)[kept])
    assert not (cut.target == 2).any() and torch.equal(cut.tokens, whole.tokens)


def test_a_mixed_row_takes_any_prompt_with_any_answers_that_fit_behind_it():
    long_prompt = SimpleNamespace(prompt=[3] * 100, chosen=[4, 2], rejected=[5, 2])
    long_answers = SimpleNamespace(prompt=[3] * 10, chosen=[4] * 60, rejected=[5] * 60)
    pairs = [long_prompt, long_answers]
    assert longest_row(pairs, 1) == longest_row(pairs, 1, mixed_within=102) == longest_row(pairs, 1, mixed_within=159)
    assert longest_row(pairs, 1) == 10 + 60 + 60 and longest_row(pairs) == 256
    assert longest_row(pairs, 1, mixed_within=160) == 100 + 60 + 60
    lay_out([SimpleNamespace(prompt=[3] * 100, chosen=[4] * 60, rejected=[5] * 60)], 220)


def test_no_mixed_pair_is_longer_than_its_row():
    rng = random.Random(0)
    for seed in range(50):
        pairs = [Pair(p.prompt, p.chosen, p.rejected, p.row) for p in random_pairs(12, seed=seed, shared=(0, 9))]
        max_length = max(len(p.prompt) + max(len(p.chosen), len(p.rejected)) for p in pairs) + rng.randint(0, 9)
        row = longest_row(pairs, 1, mixed_within=max_length)
        mixed = mismatched(pairs, max_length)
        assert mixed and max(lay_out([pair]).num_tokens for pair in [*pairs, *mixed]) <= row <= 2 * max_length - 1
