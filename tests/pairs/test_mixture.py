"""Several sources: each is read as its own block says, and weights and shares say how many pairs of it there are."""

from collections import Counter
from types import SimpleNamespace

import pytest
from test_data import write_json, write_jsonl
from test_tokenizer import CHATML, save

from pairtune.config.keys import ROWS
from pairtune.errors import UserError
from pairtune.pairs import tokenize
from pairtune.pairs.at_once import sets_of
from pairtune.pairs.mixture import counts_of, sources_of
from pairtune.pairs.tokenize import read_train_and_held_out
from pairtune.tokenizer.hf import hf_tokenizer

OFF = ROWS | {"source": None}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("mixture") / "model", chat_template=CHATML))


@pytest.fixture
def sources(tmp_path):
    """40 and 20 rows of strings, 30 of conversations under other names."""
    chat = [{"role": "user", "content": "Q"}]
    answers = [{"role": "assistant", "content": text} for text in ("Good", "Bad")]
    rows = [{"prompt": f"{name}{i}", "chosen": "B", "rejected": "W"} for name in "ab" for i in range(40)]
    write_jsonl(tmp_path / "a.jsonl", rows[:40])
    write_json(tmp_path / "b.json", rows[40:60])
    write_jsonl(tmp_path / "c.jsonl", [{"better": [*chat, answers[0]], "rejected": [*chat, answers[1]]}] * 30)
    return [str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.jsonl")]


def read(sources, tokenizer, told=None, held_out=None, seed=0, **options):
    world = SimpleNamespace(is_main=False, beat=None, print=(told if told is not None else []).append)
    block = ROWS | {"source": sources, "val_fraction": None, **options}
    return read_train_and_held_out(block, held_out or OFF, tokenizer, world, 100, None, seed=seed)


def counts(pairs, tokenizer):
    """Returns how many pairs of each source there are, by a letter of their prompts, and how often each pair is."""
    texts = [tokenizer.decode(pair.prompt) for pair in pairs]
    name = [next(name for name in ("a", "b", "Q") if f"user\n{name}" in text) for text in texts]
    return Counter(name), {
        n: Counter(Counter(t for t, m in zip(texts, name, strict=True) if m == n).values()) for n in "ab"
    }


@pytest.mark.parametrize("kept", [False, True])
def test_each_source_is_read_by_its_own_block_and_taken_as_often_as_it_says(
    sources, tokenizer, tmp_path, monkeypatch, kept
):
    if kept:
        monkeypatch.setattr(tokenize, "FEW", 5)
        monkeypatch.setattr("pairtune.pairs.keeping.FEW_BYTES", 1)
    a, b, c = sources
    blocks, told = [a, {"source": b, "weight": 2.5}, {"source": c, "columns": {"chosen": "better"}, "limit": 10}], []
    where = {"cache_dir": str(tmp_path / "kept") if kept else False}
    train, _ = read(blocks, tokenizer, told, **where)
    of_each, how_often = counts(train, tokenizer)
    assert of_each == {"a": 40, "b": 50, "Q": 10} and how_often["b"] == {2: 10, 3: 10}
    assert told[-1] == f"an epoch of 100 pairs: {a} 40 (40.0 %), {b} 50 (50.0 %; it has 20), {c} 10 (10.0 %)\n"
    assert sum("rows read" in text for text in told) == 3
    assert list(read(blocks, tokenizer, **where)[0]) == list(train) != list(read(blocks, tokenizer, seed=1, **where)[0])


def test_shares_are_of_all_pairs(sources, tokenizer):
    a, b, _ = sources
    assert counts(read([a, {"source": b, "share": 0.2}], tokenizer)[0], tokenizer)[0] == {"a": 40, "b": 10}
    both = [{"source": a, "share": 0.5}, {"source": b, "share": 0.5}]
    assert counts(read(both, tokenizer)[0], tokenizer) == ({"a": 20, "b": 20}, {"a": {1: 20}, "b": {1: 20}})
    assert counts_of([10, 1000, 4], [{"weight": 2}, {}, {"share": 0.5}]) == [20, 1000, 1020]


def test_each_source_holds_out_its_last_and_several_are_held_out_together(sources, tokenizer):
    a, b, _ = sources
    train, held_out = read([a, b], tokenizer, val_fraction=0.1)
    assert counts(train, tokenizer)[0] == {"a": 36, "b": 18} and counts(held_out, tokenizer)[0] == {"a": 4, "b": 2}
    assert [pair.row for pair in held_out] == [36, 37, 38, 39, 18, 19]
    _, held_out = read(a, tokenizer, held_out=ROWS | {"source": [a, b]})
    assert counts(held_out, tokenizer)[0] == {"a": 40, "b": 20}


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ([5], r"dataset.source\[0\]=5: must be a file, a folder or a Hub id, or a block"),
        (["a", {"limit": 3}], r"dataset.source\[1\]=.*or a block with a `source`"),
        ([{"source": "a", "wieght": 2}], r"dataset.source\[0\].wieght: unknown key; nearest: weight"),
        (["a", {"source": "b", "weight": 0}], r"dataset.source\[1\].weight=0: must be above 0"),
        (["a", {"source": "b", "share": 30}], r"dataset.source\[1\].share=30: must be above 0 and below 1"),
        ([{"source": "a", "share": 0.3, "weight": 2}], r"dataset.source\[0\]: weight=2 and share=0.3 both"),
        ([{"source": "a", "share": 0.3}, {"source": "b", "share": 0.3}], "the shares add up to 0.6; of all sources"),
        ([{"source": "a", "share": 0.9}, {"source": "b", "share": 0.3}, "c"], "the shares add up to 1.2"),
        ([{"source": "a", "share": 0.5}, {"source": "b", "share": 0.5}, "c"], "the shares add up to 1;.*to less"),
        ([], "names no source"),
    ],
)
def test_a_list_that_says_nothing_clear_is_refused(source, says):
    with pytest.raises(UserError, match=says):
        sources_of(ROWS | {"source": source}, "dataset")


def test_a_source_that_is_not_there_or_broken_is_named_by_its_place(sources, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"dataset.source\[1\].source=.*z.jsonl: there is no such file"):
        read([sources[0], str(tmp_path / "z.jsonl")], tokenizer)
    with pytest.raises(UserError, match=r"dataset.source\[1\].columns.chosen=worse: .* has no such column"):
        read([sources[0], {"source": sources[1], "columns": {"chosen": "worse"}}], tokenizer)


def test_held_out_sets_have_names(sources, tokenizer):
    a, b, _ = sources
    told, named = [], {"first": a, "second": {"source": b, "limit": 7}}
    _, held_out = read([a, b], tokenizer, told, held_out=OFF | {"source": named, "overlong": "error"})
    sets = sets_of(held_out)
    assert {name: len(pairs) for name, pairs in sets.items()} == {"first": 40, "second": 7} and len(held_out) == 47
    assert [tokenizer.decode(sets["second"][i].prompt) for i in (0, 6)] == [
        tokenizer.decode(held_out[i].prompt) for i in (40, 46)
    ]
    assert any(text.startswith(f"Held-out pairs: second, {b}\n") for text in told)
    for wrong, said in (
        ({"my set": a}, r"eval_dataset.source.my set: .* letters, digits"),
        ({"rewards": a}, "eval_dataset.source.rewards: .* none of loss, rewards"),
        ({"x": {"source": a, "weight": 2}}, r"eval_dataset.source.x.weight: unknown key"),
        ({"x": 5}, "eval_dataset.source.x=5: must be a file"),
    ):
        with pytest.raises(UserError, match=said):
            sources_of(OFF | {"source": wrong}, "eval_dataset")
