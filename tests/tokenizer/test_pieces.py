"""A text cut at special tokens gives what the library makes of it whole, ids and offsets, in all vocabularies."""

import random
from bisect import bisect_right

import pytest
import tokenizers
from test_tokenizer import TRAINING_TEXT
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, trainers

from pairtune.tokenizer.pieces import PieceEncoder

SPECIAL = ["<s>", "</s>", "<|a|>", "<|a|><|a|>"]  # one is another one twice
WORDS = [*SPECIAL, " ", "\n", "reviewer", "wants ", "Ça", "é", "ablation.", "🙂", "<|a", "|>", "▁", "<", "s>", "11"]
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
SEQUENCE = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES])
CASES = {  # pre-tokenizer, normalizer, how special tokens are added, and whether a text is cut
    "bytes": (BYTES, None, {}, True),
    "bytes, a space before each": (pre_tokenizers.ByteLevel(add_prefix_space=True), None, {}, True),
    "a sequence, NFC": (SEQUENCE, normalizers.NFC(), {"normalized": False}, True),
    "a space before each": (pre_tokenizers.Metaspace(prepend_scheme="always"), None, {}, True),
    "no words": (None, normalizers.Replace(" ", "▁"), {"normalized": False}, True),
    "prepended": (None, normalizers.Prepend("▁"), {"normalized": False}, True),
    "a space before the first": (pre_tokenizers.Metaspace(prepend_scheme="first"), None, {}, False),
    "takes the space behind it": (BYTES, None, {"rstrip": True}, False),
    "takes the space before it": (BYTES, None, {"lstrip": True}, False),
    "words of their own": (BYTES, None, {"single_word": True}, False),
    "looked for when normalized": (BYTES, normalizers.Lowercase(), {"normalized": True}, False),
}


@pytest.mark.parametrize("name", CASES)
def test_a_text_in_pieces_gives_what_it_gives_whole(name):
    words, normalizer, how, is_cut = CASES[name]
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    if words is not None:
        backend.pre_tokenizer = words
    if normalizer is not None:
        backend.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], initial_alphabet=alphabet)
    backend.train_from_iterator(TRAINING_TEXT, trainer)
    backend.add_special_tokens([AddedToken(text, special=True, **{"normalized": False, **how}) for text in SPECIAL])
    pieces, rng = PieceEncoder(backend), random.Random(0)
    assert (pieces._cut is not None) == is_cut
    for _ in range(300):
        text = "".join(rng.choices(WORDS, k=rng.randrange(12)))
        whole, found = backend.encode(text, add_special_tokens=False), pieces.encode(text)
        assert (found.ids, found.offsets) == (whole.ids, whole.offsets), text
        at, stops = rng.randrange(len(text) + 1), [stop for _, stop in whole.offsets]
        for asked in (found, PieceEncoder(backend).encode(text)):  # and one that was asked for no offsets before
            assert (asked.ids, asked.num_before(at)) == (whole.ids, bisect_right(stops, at)), (text, at)


def test_a_mixture_of_tokens_that_are_looked_for_before_and_after_normalizing_is_not_cut():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.add_special_tokens([AddedToken("<s>", normalized=False), AddedToken("<s><s>", normalized=True)])
    assert PieceEncoder(backend)._cut is None
    dropping = tokenizers.Tokenizer(models.BPE(dropout=0.1))
    dropping.add_special_tokens(["<s>"])
    assert PieceEncoder(dropping)._cut is None
