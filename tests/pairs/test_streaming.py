"""A stream gives the pairs that whole sources give, mixed and shuffled, holds few rows, and goes on bit for bit."""

import gzip
import json
from collections import Counter
from types import SimpleNamespace

import datasets
import pyarrow
import pytest
import torch
from helpers import save_tokenizer
from test_data import write_csv, write_json, write_jsonl, write_parquet

from pairtune.config.checks import check_together
from pairtune.config.keys import ROWS, STREAM
from pairtune.errors import UserError
from pairtune.pairs.rows import read_rows
from pairtune.pairs.steps import Steps, count_steps
from pairtune.pairs.stream_nodes import Blocks, Passes
from pairtune.pairs.streamed_files import CHUNK, shards_of
from pairtune.pairs.tokenize import read_train_and_held_out, tokenize_pairs
from pairtune.process.dist import World
from pairtune.run import choosing, contract
from pairtune.run.fingerprint import digest_pairs
from pairtune.tokenizer.hf import hf_tokenizer

OFF = ROWS | {"source": None}
WORLD = World(torch.device("cpu"))
LOOKED_AT = 96  # rows, in place of 1,000
WHOLE = {"split": "train", "name": None, "revision": None, "key": "dataset"}


@pytest.fixture(autouse=True)
def fewer_rows_are_looked_at(monkeypatch):
    monkeypatch.setattr("pairtune.pairs.streaming.LOOKED_AT", LOOKED_AT)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    save_tokenizer(folder, 320)
    return hf_tokenizer(str(folder))


def rows_of(name, count):
    """Rows that say which source they are of, and which number they have there: `w5 w7` is row 4 of a second one."""
    words = [f"w{3 + name} w{3 + number % 300} w{3 + number // 300}" for number in range(count)]
    return [{"prompt": text, "chosen": " w3 w4", "rejected": " w4 w3 w5"} for text in words]


def read(sources, tokenizer, told=None, **options):
    world = SimpleNamespace(is_main=False, beat=None, print=(told if told is not None else []).append)
    block = (
        ROWS | STREAM | {"source": sources, "val_fraction": None, "streaming": True, "shuffle_buffer": 100} | options
    )
    return read_train_and_held_out(block, OFF, tokenizer, world, 32, None)[0]


def stream(sources, tokenizer, *, size=8, shuffle=True, rank=0, processes=1, **options):
    world = World(torch.device("cpu"), rank, processes)
    return Steps(read(sources, tokenizer, **options), size, 2, world, seed=5, shuffle=shuffle)


def drawn(steps, count, start=0):
    return [steps.pairs(step) for step in range(start, start + count)]


def numbers(steps):
    return [pair.row for pairs in steps for pair in pairs]


# Files


@pytest.fixture(params=["jsonl", "jsonl.gz", "json", "csv", "parquet", "saved", "shards", "arrow"])
def source(request, tmp_path):
    """The same rows as a file or folder of each kind; texts hold line ends and what else trips readers."""
    rows = [{"prompt": f"{i} Ünï \u2028 \"'", "chosen": f"a,\n{i}" * (1 + i % 5), "rejected": "NA"} for i in range(300)]
    path, kind = tmp_path / f"rows.{request.param}", request.param
    if kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif kind == "arrow":  # which `datasets` streams, as data sets of the Hub
        path.mkdir()
        for number, part in enumerate((rows[:120], rows[120:])):
            table = pyarrow.Table.from_pylist(part)
            with pyarrow.ipc.new_stream(str(path / f"train-{number}.arrow"), table.schema) as file:
                file.write_table(table, max_chunksize=50)
    elif kind == "shards":
        path.mkdir()
        write_jsonl(path / "train-0.jsonl", rows[:120])
        write_jsonl(path / "train-1.jsonl", rows[120:])
    elif kind == "jsonl.gz":
        with gzip.open(path, "wt") as file:
            file.write("".join(json.dumps(row) + "\n\n" for row in rows))
    else:
        {"jsonl": write_jsonl, "json": write_json, "csv": write_csv, "parquet": write_parquet}[kind](path, rows)
    return path, rows


def test_rows_come_as_whole_files_give_them_and_go_on_from_any_place(source):
    path, rows = source
    shards = list(shards_of(str(path), **WHOLE).values())
    assert [row for shard in shards for row, _ in shard(None)] == rows == list(read_rows(str(path)))
    for shard in shards:
        found = list(shard(None))
        for number in (0, 1, 63, 64, 65, len(found) - 2, len(found) - 1):
            behind = json.loads(json.dumps(found[number][1]))
            assert [row for row, _ in shard(behind)] == [row for row, _ in found[number + 1 :]]


def test_a_list_of_json_is_read_piece_by_piece(tmp_path):
    rows = [{"text": "x" * (CHUNK // 3 + i), "more": [{"y": i}, None]} for i in range(12)]
    (tmp_path / "rows.json").write_text("\n [ " + " ,\n".join(map(json.dumps, rows)) + " ] \n")
    (shard,) = shards_of(str(tmp_path / "rows.json"), **WHOLE).values()
    assert [row for row, _ in shard(None)] == rows


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2\n', ["a.jsonl, line 2", "invalid JSON"]),
        ("a.jsonl", '{"a": 1}\n[1]\n', ["a.jsonl, line 2", "expected an object"]),
        ("a.json", '[{"a": 1}, {"a": 2}', ["a.json, row 2 (from 0)", "invalid JSON"]),
        ("a.json", '[{"a": 1}, {"a": 2} {"a": 3}' + ", 3" * 99, ["a.json, row 2 (from 0)", "expected '[', ','"]),
        ("a.json", '[{"a": 1}, ]', ["a.json, row 1 (from 0)", "invalid JSON"]),
        ("a.json", '[{"a": 1}, {"a": 2, "a": 3}]', ["row 1 (from 0)", "'a' stands twice"]),
        ("a.csv", 'a,b\n1,2\n"3\n', ["a.csv", "unexpected end"]),
        ("a.csv", "a,b\n1,2\n1,2,3\n", ["a.csv, line 3", "not as many cells"]),
        ("a.jsonl", b'{"a": "\xff"}\n', ["a.jsonl", "can't decode"]),
        ("a.parquet", b"PAR1", ["a.parquet cannot be read"]),
        ("a.txt", "x", ["a.txt", ".jsonl"]),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, words):
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        [row for shard in shards_of(str(tmp_path / name), **WHOLE).values() for row, _ in shard(None)]
    assert all(word in str(error.value) for word in words), error.value


def test_what_datasets_cannot_read_on_is_named(tmp_path):
    table = pyarrow.Table.from_pylist(rows_of(0, 5000))
    with pyarrow.ipc.new_stream(str(tmp_path / "train.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=500)
    whole = (tmp_path / "train.arrow").read_bytes()
    (tmp_path / "train.arrow").write_bytes(whole[: len(whole) // 2])
    (shard,) = shards_of(str(tmp_path), **WHOLE).values()
    with pytest.raises(UserError, match=r"dataset\.source=.*: the rows cannot be read on: OSError: Expected"):
        list(shard(None))


def test_a_part_of_a_split_is_refused(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows_of(0, 3))
    with pytest.raises(UserError, match=r"dataset.split='train\[:10%\]'.*limit"):
        shards_of(str(tmp_path / "a.jsonl"), **WHOLE | {"split": "train[:10%]"})
    with pytest.raises(UserError, match="dataset.split='test'.*has train"):
        shards_of(str(tmp_path / "a.jsonl"), **WHOLE | {"split": "test"})


# Order


def test_a_stream_that_is_not_shuffled_has_the_pairs_of_the_whole_source_in_their_order(tmp_path, tokenizer):
    """Rows of several answers make several pairs each, which steps may come between."""
    rows = [row | {"rejected": [" w5", f" w{6 + i % 200} w7", " w8"]} for i, row in enumerate(rows_of(0, 50))]
    write_jsonl(tmp_path / "a.jsonl", rows)
    whole, _ = tokenize_pairs(rows, tokenizer, max_length=32)
    steps = stream(str(tmp_path / "a.jsonl"), tokenizer, shuffle=False)
    assert [pair for pairs in drawn(steps, 37) for pair in pairs] == (list(whole) * 2)[: 37 * 8]
    assert steps.epoch(37) == 1 and steps.seen(37)["rows/read"] == 99


def test_a_pass_has_every_row_once_and_each_another_order(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", rows_of(0, 80))
    steps = stream(str(tmp_path / "a.jsonl"), tokenizer, shuffle_buffer=1000)
    first, second = numbers(drawn(steps, 10)), numbers(drawn(steps, 10, 10))
    assert sorted(first) == sorted(second) == list(range(80)) and len({*map(tuple, (first, second, range(80)))}) == 3
    steps = stream(str(tmp_path / "a.jsonl"), tokenizer, shuffle_buffer=20)
    assert [sorted(numbers(drawn(steps, 5, start))) for start in (0, 5)] == [[*range(40)], [*range(40, 80)]]
    limited = stream(str(tmp_path / "a.jsonl"), tokenizer, shuffle_buffer=20, limit=16)
    assert set(numbers(drawn(limited, 10))) == set(range(16))


@pytest.fixture
def three(tmp_path):
    """200 rows in JSON Lines, 30 in CSV, two shards of parquet with 70 and 40."""
    write_jsonl(tmp_path / "a.jsonl", rows_of(0, 200))
    write_csv(tmp_path / "b.csv", rows_of(1, 30))
    (tmp_path / "c").mkdir()
    write_parquet(tmp_path / "c" / "0.parquet", rows_of(2, 110)[:70])
    write_parquet(tmp_path / "c" / "1.parquet", rows_of(2, 110)[70:])
    blocks = [{"source": str(tmp_path / name)} for name in ("a.jsonl", "b.csv", "c")]
    return [blocks[0], blocks[1] | {"weight": 2}, blocks[2] | {"share": 0.4}]


def test_rows_are_drawn_by_weight_and_share(three, tokenizer):
    told = []
    steps = stream(three, tokenizer, shuffle_buffer=100, told=told)
    names = Counter(pair.prompt[1] - 3 for pairs in drawn(steps, 200) for pair in pairs)
    for name, rate in enumerate((0.2, 0.4, 0.4)):  # 1,600 draws: five standard deviations
        assert names[name] / 1600 == pytest.approx(rate, abs=5 * (rate * (1 - rate) / 1600) ** 0.5)
    assert any("20.0 %" in line and "40.0 %" in line for line in told)
    assert steps.epoch(200) == 1 == names[0] // 200
    of_c = [pair.row for step in drawn(stream(three, tokenizer), 200) for pair in step if pair.prompt[1] == 5]
    assert all(sorted(of_c[i : i + 110]) == [*range(110)] for i in (0, 110, 220))
    for table, word in zip(steps.account(), ("a.jsonl", "b.csv", "c"), strict=True):
        assert word in table.splitlines()[0] and "gone through" in table


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_mixture_goes_on_from_any_step_bit_for_bit(three, tokenizer, shuffle):
    pairs = read(three, tokenizer, shuffle_buffer=50)
    straight, cut, *others = (Steps(pairs, 8, 2, WORLD, seed=5, shuffle=shuffle) for _ in range(6))
    expected, before = drawn(straight, 40), 0
    for stop, again in zip((1, 6, 7, 39), others, strict=True):  # a block of 50 rows ends within steps 6 and 12
        assert drawn(cut, stop - before, before) == expected[before:stop]
        again.load(json.loads(json.dumps(cut.state())))
        assert drawn(again, 40 - stop, stop) == expected[stop:]
        before = stop
        assert again.account() == straight.account() and again.seen(40) == straight.seen(40)


def test_processes_share_the_steps_of_one(three, tokenizer):
    alone = drawn(stream(three, tokenizer), 20)
    both = [stream(three, tokenizer, rank=rank, processes=2) for rank in (0, 1)]
    for step in range(20):
        parts = [pair for steps in both for pairs in steps[step] for pair in pairs]
        assert sorted(map(repr, parts)) == sorted(map(repr, alone[step]))


def test_rows_that_changed_meanwhile_are_refused(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, rows_of(0, 60))
    steps = stream(str(path), tokenizer, shuffle_buffer=30)
    drawn(steps, 5)
    state, before = steps.state(), digest_pairs(read(str(path), tokenizer))
    path.write_text(path.read_text().replace("w40 ", "w41 "))  # of the second block: as long as it was
    again = stream(str(path), tokenizer, shuffle_buffer=30)
    with pytest.raises(UserError, match="row 30 on are not those that the checkpoint was written with"):
        again.load(state)
    assert digest_pairs(read(str(path), tokenizer)) != before
    other = digest_pairs(read(str(path), tokenizer, shuffle_buffer=31))
    assert other["stream"] != before["stream"] and digest_pairs(list(read(str(path), tokenizer)))["num"] == 60


# Memory


class Row(dict):
    """One that is counted while it is alive."""

    alive = most = 0

    def __init__(self, *args):
        super().__init__(*args)
        Row.alive += 1
        Row.most = max(Row.most, Row.alive)

    def __del__(self):
        Row.alive -= 1


@pytest.mark.parametrize("count", [2_000, 20_000])
def test_no_more_rows_are_alive_than_a_buffer_of_them(count):
    def shard(position):
        return ((Row({"number": number}), number + 1) for number in range(position or 0, count))

    Row.alive = Row.most = 0
    node = Blocks(Passes(0, {"rows": shard}, None, "rows"), 100, seed=0)
    assert sum(next(node).row["number"] for _ in range(count)) == count * (count - 1) // 2
    assert Row.most <= 202  # two blocks, while one takes the place of the other


# What becomes of rows


def long_source(tmp_path, rows, *, behind=LOOKED_AT):
    """Good rows, as many as are looked at before a run, and these."""
    write_jsonl(tmp_path / "a.jsonl", [*rows_of(0, behind), *rows])
    return str(tmp_path / "a.jsonl")


def behind_the_first(source, tokenizer, count, **options):
    steps = stream(source, tokenizer, shuffle=False, **options)
    drawn(steps, LOOKED_AT // 8)
    return steps, drawn(steps, count, LOOKED_AT // 8)


GOOD = rows_of(1, 30)


def test_broken_rows_are_dropped_and_counted_as_they_come(tmp_path, tokenizer):
    rows = [*GOOD[:10], GOOD[0] | {"chosen": 7}, GOOD[0] | {"rejected": GOOD[0]["chosen"]}, *GOOD[10:]]
    steps, found = behind_the_first(long_source(tmp_path, rows), tokenizer, 3)
    assert numbers(found) == [*range(96, 106), *range(108, 122)]
    (table,) = steps.account()
    assert "column 'chosen' holds int" in table and "row 106" in table and "row 107" in table
    assert steps.seen(15) == {"epoch": 0, "rows/read": 122, "rows/dropped": 2}
    with pytest.raises(UserError, match="a.jsonl, row 106 .from 0.: column 'chosen'"):
        behind_the_first(long_source(tmp_path, rows), tokenizer, 3, on_bad_row="error")


def test_more_than_one_broken_row_in_twenty_stop_a_stream(tmp_path, tokenizer):
    rows = [GOOD[0] | {"chosen": None}] * 60
    with pytest.raises(UserError) as error:
        behind_the_first(long_source(tmp_path, rows), tokenizer, 3)
    assert "are broken" in str(error.value) and "'chosen' holds nothing (null)" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GOOD[0] | {"documents": "More that was asked."}], ["row 96", "'documents'", "may be part of the question"]),
        ([GOOD[0] | {"prompt": "<|im_start|>user w3"}] * 60, ["rendered with a chat template already"]),
    ],
)
def test_what_first_comes_late_is_refused_as_it_would_be_at_once(tmp_path, tokenizer, rows, words):
    with pytest.raises(UserError) as error:
        behind_the_first(long_source(tmp_path, rows + GOOD), tokenizer, 9)
    assert all(word in str(error.value) for word in words), error.value


def test_a_column_that_first_comes_late_is_told(tmp_path, tokenizer):
    rows = [row | {"annotator": "x"} for row in GOOD]
    steps, _ = behind_the_first(long_source(tmp_path, rows), tokenizer, 3)
    assert "columns that the first rows did not have, not used: annotator" in steps.account()[0]
    told = []
    read(long_source(tmp_path, GOOD), tokenizer, told=told)
    assert any("its first 96 rows" in line for line in told) and any("Not looked for: duplicates" in t for t in told)


def test_each_step_keeps_the_contract(tmp_path, tokenizer):
    """A row that nobody has looked at before its step comes."""
    pairs = read(long_source(tmp_path, GOOD), tokenizer)
    tokenizer_of_run = SimpleNamespace(bos_id=1, end_ids={5})  # as if another token ended answers
    with pytest.raises(UserError, match="must end in exactly one end token"):
        contract.check_pairs(pairs, tokenizer_of_run)
    contract.check_pairs(pairs, tokenizer)
    (check,) = pairs.stream.checks
    with pytest.raises(UserError, match="row 9: chosen must end in exactly one end token"):
        check([SimpleNamespace(prompt=[1, 2], chosen=[4, 4], rejected=[4, 2], row=9)])


def test_memory_is_tried_with_the_longest_pair_that_may_come(tmp_path, tokenizer):
    pairs = read(long_source(tmp_path, [], behind=20), tokenizer)
    steps = Steps(pairs, 8, 4, World(torch.device("cpu"), 0, 2), seed=0)
    for micro in steps.heaviest():
        assert len(micro) == 4
        for pair in micro:
            assert (len(pair.prompt), len(pair.chosen), len(pair.rejected)) == (1, 31, 31)
            assert pair.chosen[-1] == pair.rejected[-1] == 2 and pair.chosen[0] != pair.rejected[0]
    work = choosing.work(pairs, lambda *logps: None, 32, 8, 10)
    assert work.row_length == 128 and len(work.longest.chosen) == 31


# What does not go with it


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": None}, "set max_steps"),
        ({"epochs": 3}, "epochs=3 cannot be told"),
        ({"eval_every_n_epochs": 0.5}, "eval_every_n_steps"),
        ({"dataset": {"val_fraction": 0.1}}, "eval_dataset.source"),
        ({"dataset": {"cache_dir": "x"}}, "dataset.cache_dir=x keeps no tokens"),
        ({"reference": {"name": "cached"}}, "reference=model"),
        ({"shuffle": False, "dataset": {"shuffle_buffer": 5}}, "shuffle=false"),
        ({"dataset": {"streaming": False, "shuffle_buffer": 5}}, "shuffle_buffer=5: has no effect"),
    ],
)
def test_what_a_stream_cannot_do_is_refused_before_anything_is_read(changes, words):
    cfg = {"epochs": 1, "max_steps": 100, "shuffle": True, "eval_dataset": {"source": "held_out.jsonl"}}
    dataset = {"streaming": True, "val_fraction": None, **changes.pop("dataset", {})}
    cfg["eval_dataset"] = {"source": None} if dataset["val_fraction"] else cfg["eval_dataset"]
    with pytest.raises(UserError, match=words):
        check_together(cfg | {"dataset": dataset} | changes)


def test_max_steps_ends_a_stream(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", rows_of(0, 20))
    assert count_steps(read(str(tmp_path / "a.jsonl"), tokenizer), 8, 1, 500) == 500


def test_messages_of_trees_are_refused(tmp_path, tokenizer):
    row = {"message_id": "1", "parent_id": None, "text": "Q", "role": "prompter", "rank": None}
    write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(UserError, match="dataset.streaming=false"):
        read(str(tmp_path / "a.jsonl"), tokenizer)
