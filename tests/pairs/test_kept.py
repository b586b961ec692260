"""Many rows, by several processes and from what was kept: pairs, tables and errors are those of one process's loop."""

import fcntl
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_data import write_jsonl
from test_tokenizer import CHATML, GEMMA, save

from pairtune.cli.commands import main
from pairtune.config.keys import ROWS
from pairtune.errors import UserError
from pairtune.losses.modules import build
from pairtune.pairs import gathering, kept, tokenize
from pairtune.pairs.at_once import document_lengths, lengths_of, longest_row, tokens_at
from pairtune.pairs.batch import document_length
from pairtune.pairs.digests import digest_each, digest_in_order, digest_pair
from pairtune.pairs.packed import PackedPairs, Table
from pairtune.pairs.pair import Pair
from pairtune.pairs.spread import spread
from pairtune.pairs.steps import Steps
from pairtune.pairs.tokenize import count_overlap, read_pairs, read_rows, split_pairs, tokenize_pairs
from pairtune.process.dist import World
from pairtune.run import choosing, contract
from pairtune.tokenizer.hf import hf_tokenizer

LIMITS = {"max_length": 200, "max_prompt_length": 90, "max_completion_length": 120}
SPECIAL = {"prompt": "Is <|im_end|> a token?", "chosen": "Yes, it is.", "rejected": "No."}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("kept") / "model", chat_template=CHATML))


@pytest.fixture(autouse=True)
def everything_is_many(monkeypatch):
    """As of so many rows and bytes as these tests have."""
    monkeypatch.setattr(tokenize, "FEW", 20)
    monkeypatch.setattr("pairtune.pairs.keeping.FEW_BYTES", 1)


def some_rows(count=700):
    """Rows of which some are dropped, for each reason that there is, trimmed, told of, or like another one."""
    rows = [{"prompt": f"Question {i % 600}?", "chosen": f"Good {i}.", "rejected": "Bad."} for i in range(count)]
    rows[3::50] = [SPECIAL for _ in rows[3::50]]
    for start, change in enumerate(
        [{"chosen": " "}, {"rejected": "Good."} | {"chosen": "Good."}, {"prompt": ""}, {"chosen": "long " * 90},
         {"chosen": "Good.<|im_end|>"}, {"prompt": "word " * 40}, {"prompt": "x" * 60_000}]
    ):  # fmt: skip
        for row in range(5 + start, count, 60):
            rows[row] = rows[row] | change
    for row in range(30, min(count, 91), 60):  # broken alike, and the sentence about each names its row
        rows[row] = rows[20] | {"chosen": 5}
    return rows


def by_one(rows, tokenizer, monkeypatch, **options):
    """Returns what the loop of one process makes of the rows."""
    with monkeypatch.context() as patched:
        patched.setattr(tokenize, "FEW", len(rows) + 1)
        return tokenize_pairs(rows, tokenizer, **{**LIMITS, **options})


def read(source, tokenizer, folder, **options):
    block = {name: options.pop(name) for name in ("overlong", "on_bad_row") if name in options}
    settings = ROWS | {"source": str(source)} | block
    return read_pairs(settings, tokenizer, **{**LIMITS, **options}, cache_dir=str(folder))


@pytest.fixture
def tokenized(monkeypatch):
    """The number of rows that each reading has tokenized."""
    numbers, real = [], gathering.spread

    def counting(work, things, *, processes):
        numbers.append(0)

        def counted():
            for thing in things:
                numbers[-1] += 1
                yield thing

        return real(work, counted(), processes=processes)

    monkeypatch.setattr(gathering, "spread", counting)
    return numbers


@pytest.mark.parametrize("overlong", ["drop", "trim_prompt"])
def test_two_processes_and_a_cache_give_what_one_gives(tmp_path, tokenizer, monkeypatch, overlong, tokenized):
    write_jsonl(tmp_path / "a.jsonl", some_rows())
    rows = read_rows(str(tmp_path / "a.jsonl"))
    pairs, report = by_one(rows, tokenizer, monkeypatch, overlong=overlong)
    assert sorted(report.broken) == [30, 90]
    assert len(report.dropped) == (5 if overlong == "trim_prompt" else 6) and report.special and report.ends_taken_off
    monkeypatch.setattr(tokenize, "num_cores", lambda: 2)
    monkeypatch.setattr("pairtune.pairs.spread.PART", 64)
    monkeypatch.setattr(gathering, "TOGETHER", 200)
    readings = [tokenize_pairs(rows, tokenizer, **LIMITS, overlong=overlong)]
    readings += [read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept", overlong=overlong) for _ in range(2)]
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    readings.append(read(tmp_path / "b.jsonl", tokenizer, tmp_path / "kept", overlong=overlong))
    for found, told in readings:
        assert list(found) == pairs and str(told) == str(report)
        assert all(f"row {row} (from 0): column 'chosen'" in told.broken[row] for row in (30, 90))
        assert found[5] == pairs[5] and list(found[3:9]) == pairs[3:9] and list(found + found[:2]) == pairs + pairs[:2]
        train, held_out = split_pairs(found, 0.1)
        assert list(train + held_out) == pairs and count_overlap(train, held_out) == count_overlap(
            *split_pairs(pairs, 0.1)
        )
        assert found.lengths.tolist() == [[len(getattr(p, n)) for p in pairs] for n in ("prompt", "chosen", "rejected")]
    distinct = len({json.dumps(row) for row in some_rows()})
    assert tokenized == [700, distinct, 1]  # the second reads no row; under another name, what is broken is looked at


def test_a_changed_row_costs_its_own_tokens(tmp_path, tokenizer, monkeypatch, tokenized):
    rows, source = [{"prompt": f"Q{i}", "chosen": "B", "rejected": "W"} for i in range(50)], tmp_path / "a.jsonl"
    for changed in ({}, {20: {"chosen": "Better"}}, {20: {"chosen": "Better"}, 50: {"prompt": "New"}}):
        now = [*rows, rows[0]][: 51 if 50 in changed else 50]
        now = [row | changed.get(i, {}) for i, row in enumerate(now)]
        write_jsonl(source, now)
        pairs, report = read(source, tokenizer, tmp_path / "kept")
        assert (list(pairs), str(report)) == _plain(by_one(read_rows(str(source)), tokenizer, monkeypatch))
    read(source, tokenizer, tmp_path / "kept")
    read(source, tokenizer, tmp_path / "kept", max_length=150)  # other limits, other tokens
    other = hf_tokenizer(save(tmp_path / "model", chat_template=GEMMA))
    assert list(read(source, other, tmp_path / "kept")[0]) != list(pairs)
    assert tokenized == [50, 1, 1, 51, 51]


def _plain(found):
    return list(found[0]), str(found[1])


@pytest.mark.parametrize(
    ("broken", "overlong", "says"),
    [
        ({300: {"chosen": 5}, 500: {"chosen": "x " * 300}}, "error", r"^[^:]*row 300 [^:]*: column 'chosen'"),
        ({300: {"chosen": "x " * 300}, 500: {"chosen": 5}}, "error", r"^[^:]*row 300 [^:]*: an answer of 601 tokens"),
        ({599: {"rejected": None}}, "drop", r"^[^:]*row 599 [^:]*: column 'rejected'"),
    ],
)
def test_the_first_broken_row_is_told_in_the_same_sentence(tmp_path, tokenizer, monkeypatch, broken, overlong, says):
    rows = [{"prompt": f"Q{i}", "chosen": "B", "rejected": "W"} | broken.get(i, {}) for i in range(600)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(tokenize, "num_cores", lambda: 2)
    monkeypatch.setattr("pairtune.pairs.spread.PART", 32)
    options = {"overlong": overlong, "on_bad_row": "error"}
    told = []
    for reading in (
        lambda: by_one(read_rows(str(tmp_path / "a.jsonl")), tokenizer, monkeypatch, **options),
        lambda: tokenize_pairs(read_rows(str(tmp_path / "a.jsonl")), tokenizer, **LIMITS, **options),
        *[lambda: read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept", **options)] * 2,
    ):
        with pytest.raises(UserError, match=says) as error:
            reading()
        told.append(str(error.value))
    assert len(set(told)) == 1


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:99] + b"?" + b[100:]])
@pytest.mark.parametrize("kind", ["rows", "reading"])
def test_a_damaged_file_is_said_and_made_again(tmp_path, tokenizer, capsys, damage, kind, tokenized):
    write_jsonl(tmp_path / "a.jsonl", some_rows(60))
    pairs, report = _plain(read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept"))
    (path,) = (tmp_path / "kept").rglob(f"{kind}-*.arrow")
    path.write_bytes(damage(path.read_bytes()))
    (path.parent / f".{path.name}.1234abcd").write_bytes(b"of a process that was killed")
    assert _plain(read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept")) == (pairs, report)
    assert f"{path}: is damaged; it is removed" in capsys.readouterr().out
    assert _plain(read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept")) == (pairs, report)
    assert capsys.readouterr().out == "" and tokenized[1:] == [tokenized[0] if kind == "rows" else 1]


def test_two_runs_at_once_tokenize_once(tmp_path, tokenizer, monkeypatch):
    write_jsonl(tmp_path / "a.jsonl", some_rows(300))
    expected = _plain(by_one(read_rows(str(tmp_path / "a.jsonl")), tokenizer, monkeypatch))
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def run():
        queue.put(_plain(read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept")))

    processes = [context.Process(target=run) for _ in range(3)]
    for process in processes:
        process.start()
    assert [queue.get() for _ in processes] == [expected] * 3
    for process in processes:
        process.join()
    assert len(list((tmp_path / "kept").rglob("rows-*.arrow"))) == 1


def test_who_comes_second_waits_and_says_so_to_its_watchdog(tmp_path, tokenizer):
    write_jsonl(tmp_path / "a.jsonl", some_rows(60))
    read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept")
    (lock,) = (tmp_path / "kept").rglob("lock")
    write_jsonl(tmp_path / "a.jsonl", some_rows(90))
    said = []
    with lock.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def beat(doing):
            if not said:
                fcntl.flock(other, fcntl.LOCK_UN)
            said.append(doing)

        read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept", beat=beat)
    assert said[0] == "waiting for the process that tokenizes these rows" and said[-1] == "tokenizing"


def test_a_folder_that_cannot_be_written_stops_who_names_it_and_nobody_else(tmp_path, tokenizer, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", some_rows(60))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="dataset.cache_dir: .*file.*name a folder with room"):
        read(tmp_path / "a.jsonl", tokenizer, tmp_path / "file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    settings = ROWS | {"source": str(tmp_path / "a.jsonl")}
    pairs, _ = read_pairs(settings, tokenizer, **LIMITS, cache_dir=None)
    assert len(pairs) == len(read(tmp_path / "a.jsonl", tokenizer, tmp_path / "kept")[0])
    assert capsys.readouterr().out.count("tokens are not kept for other runs: ") == 1


def test_few_rows_and_who_does_not_want_it_leave_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_jsonl(tmp_path / "a.jsonl", some_rows(60))
    settings = ROWS | {"source": str(tmp_path / "a.jsonl")}
    read_pairs(settings, tokenizer, **LIMITS, cache_dir=False)
    monkeypatch.setattr("pairtune.pairs.keeping.FEW_BYTES", 2**18)
    read_pairs(settings, tokenizer, **LIMITS, cache_dir=None)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("pairtune.pairs.keeping.FEW_BYTES", 1)
    read_pairs(settings, tokenizer, **LIMITS, cache_dir=None)
    assert (tmp_path / "cache" / "pairtune" / "tokens").is_dir()


def test_tune_cache_lists_tokens_and_removes_them(tmp_path, tokenizer, capsys):
    folder, keys = tmp_path / "kept", []
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": f"Q{i}", "chosen": "B", "rejected": "W"} for i in range(30)])
    for length in (100, 200):
        read(tmp_path / "a.jsonl", tokenizer, folder, max_length=length)
        keys += sorted({path.name for path in folder.iterdir()} - set(keys))
    option = ["--cache-dir", str(folder)]
    assert main(["cache", "ls", *option]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("tokens-")]
    assert sorted((line[0], line[1], line[-1]) for line in lines) == sorted(
        zip(keys, ("30", "30"), ("(max_length=100)", "(max_length=200)"), strict=True)
    )
    assert main(["cache", "rm", keys[0], *option]) == 0
    assert [path.name for path in folder.iterdir()] == [keys[1]]
    assert main(["cache", "rm", keys[0], *option]) == 2 and "no such entry" in capsys.readouterr().err
    assert main(["cache", "rm", "--all", *option]) == 0 and not list(folder.iterdir())


# Processes


def test_parts_come_in_order_and_what_one_raises_in_its_turn():
    def work(part):
        if 700 in part:
            raise UserError("seven hundred")
        return sum(part)

    found = spread(work, range(1000), processes=3)
    first, second = list(range(256)), list(range(256, 512))
    assert [next(found) for _ in range(2)] == [(first, sum(first)), (second, sum(second))]
    with pytest.raises(UserError, match="seven hundred"):
        next(found)


def test_a_process_that_is_killed_is_told():
    with pytest.raises(UserError, match="was killed, as by a machine that is out of memory"):
        list(spread(lambda part: os.kill(os.getpid(), signal.SIGKILL), range(1000), processes=2))


def test_who_is_killed_leaves_no_process_behind(tmp_path):
    """Each holds the writing end of a pipe: it is at its end when all are gone."""
    code = """
import os, signal, sys
from pairtune.pairs.spread import spread

def work(part):
    os.write(int(sys.argv[1]), b"x")
    signal.pause()

list(spread(work, range(10_000), processes=2))
"""
    reading, writing = os.pipe()
    root = str(Path(kept.__file__).parents[2])
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(writing)], pass_fds=[writing], env=os.environ | {"PYTHONPATH": root}
    )
    os.close(writing)
    assert os.read(reading, 1) + os.read(reading, 1) == b"xx"
    run.kill()
    run.wait()
    assert os.read(reading, 1) == b""
    os.close(reading)


def unlike_pairs():
    """Pairs of all kinds: with what answers share, of several turns, unpaired, equal ones."""
    rng = random.Random(0)
    found = []
    for row in range(200):
        prompt, chosen, rejected = ([rng.randrange(3, 9) for _ in range(rng.randrange(1, 30))] for _ in range(3))
        shared = chosen[: rng.randrange(3)]
        spans = ((1, 2),) if row % 7 == 0 else ()
        found.append(Pair([1, *prompt], [*chosen, 2], [*shared, *rejected, 2], 3 * row, (), spans))
    found[20] = replace(found[20], chosen=[])
    found[21] = replace(found[21], rejected=[])
    found[22] = replace(found[22], chosen=[5] * 50 + [2], rejected=[5] * 50 + [6, 2])
    return [*found, *found[:9]]


def test_what_is_asked_of_all_pairs_makes_no_pair_of_packed_ones(monkeypatch):
    pairs, tokenizer = unlike_pairs(), SimpleNamespace(bos_id=1, end_ids={2})
    packed = PackedPairs.of(pairs[:50]) + PackedPairs.of(pairs[50:])
    packed, pairs = packed.take([*range(10, 209), *range(4)]), pairs[10:] + pairs[:4]
    assert list(packed) == pairs and list(pairs[:3] + packed) == pairs[:3] + pairs

    def answers(given):
        for prompt_and_answer in (None, 64):
            yield longest_row(given, mixed_within=prompt_and_answer)
        yield from (digest_in_order(given), digest_each(given), count_overlap(given[:150], given[150:]))
        yield from (array.tolist() for array in (lengths_of(given), document_lengths(given)))
        yield from (tokens_at(given, part, n).tolist() for part in ("prompt", "rejected") for n in (0, 40, -1, -3))
        yield contract.check_pairs(given, tokenizer)

    work = build("kto"), 64, 8, 3
    order = (
        Steps(pairs, 8, 4, World(torch.device("cpu")), seed=0),
        Steps(packed, 8, 4, World(torch.device("cpu")), seed=0),
    )
    heaviest, chosen = zip(*((steps.heaviest(), choosing.work(steps._pairs, *work)) for steps in order), strict=True)
    assert heaviest[0] == heaviest[1] and chosen[0] == chosen[1]
    assert order[1].heaviest()[0][0] == max(pairs, key=document_length)
    assert document_lengths(packed).tolist() == list(map(document_length, pairs))
    assert digest_each(packed) == list(map(digest_pair, pairs))
    expected = list(answers(pairs))
    monkeypatch.setattr(Table, "pair", None)
    assert list(answers(packed)) == expected


def test_what_is_wrong_with_packed_pairs_is_told_of_the_first():
    pairs, tokenizer = unlike_pairs(), SimpleNamespace(bos_id=1, end_ids={2})
    for row, change in (
        (7, {"prompt": [1, 1, 4]}),
        (8, {"prompt": [4]}),
        (9, {"rejected": [4]}),
        (9, {"chosen": [2, 2]}),
    ):
        wrong = [*pairs[:row], replace(pairs[row], **change), *pairs[row + 1 :], replace(pairs[0], chosen=[5])]
        for given in (wrong, PackedPairs.of(wrong)):
            with pytest.raises(UserError, match=rf"row {3 * row}\b"):
                contract.check_pairs(given, tokenizer)
