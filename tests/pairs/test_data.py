"""Rows to pairs: every source, every format, every reason to drop a row, and the real datasets against naive counts."""

import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import tokenizers
from test_tokenizer import CHATML, GEMMA, LLAMA_2, LLAMA_3, SHARED, byte_level_bpe, chat, needs_shared, save
from tokenizers import models

from pairtune.errors import UserError
from pairtune.pairs.example import Example
from pairtune.pairs.formats import FORMATS, fitting_format
from pairtune.pairs.recognise import recognise
from pairtune.pairs.tokenize import Pair, Rows, count_overlap, read_rows, split_pairs, tokenize_pairs
from pairtune.tokenizer.hf import hf_tokenizer

PREFERENCE = SHARED / "preference"
HH, RASBT = (
    PREFERENCE / "hh-rlhf/harmless-base-test.jsonl.gz",
    "llms-from-scratch/instruction-data-with-preference.json",
)
ROWS = [{"prompt": f"Question {i}?", "chosen": f"Good {i}.", "rejected": f"Bad {i}, in more words."} for i in range(20)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("plain") / "model"))


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("chatml") / "model", chat_template=CHATML))


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("llama_3") / "model", chat_template=LLAMA_3))


def tokenize(rows, tokenizer, *, max_length=100_000, **options):
    return tokenize_pairs(rows, tokenizer, max_length=max_length, **options)


def text(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=False)


def one(row, tokenizer, **options):
    (pair,), report = tokenize([row], tokenizer, **options)
    return pair, report


# Sources


def write_json(path, rows):
    path.write_text(json.dumps(rows))


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n\n" for row in rows))


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_gz(write):
    def write_compressed(path, rows):
        write(path, rows)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_compressed


WRITERS = {
    "a.json": write_json,
    "lines.json": write_jsonl,
    "a.jsonl": write_jsonl,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "a.json.gz": write_gz(write_json),
    "a.jsonl.gz": write_gz(write_jsonl),
    "a.csv.gz": write_gz(write_csv),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_type_gives_the_same_rows(tmp_path, name):
    rows = ROWS + [{"prompt": 'Lines\nand, "quotes" 🙂', "chosen": "NA", "rejected": "12"}]
    WRITERS[name](tmp_path / name, rows)
    read = read_rows(str(tmp_path / name))
    assert list(read) == rows and [read[i] for i in range(len(read))] == rows
    assert read.column_names == ["prompt", "chosen", "rejected"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train", range(20)),
        ("train[:90%]", range(18)),
        ("train[90%:]", range(18, 20)),
        ("train[5:8]", range(5, 8)),
        ("train[-3:]", range(17, 20)),
        ("train[:2]+train[-1:]", [0, 1, 19]),
    ],
)
def test_splits_take_slices_and_rows_keep_their_number(tmp_path, chatml, name, split, numbers):
    WRITERS[name](tmp_path / name, ROWS)
    rows = read_rows(str(tmp_path / name), split=split)
    assert list(rows) == [ROWS[i] for i in numbers]
    pairs, _ = tokenize(rows, chatml)
    assert [pair.row for pair in pairs] == list(numbers)
    assert list(read_rows(str(tmp_path / name), split=split, limit=2)) == [ROWS[i] for i in numbers][:2]


def test_a_folder_has_the_splits_that_its_files_name(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:15])
    write_jsonl(tmp_path / "test.jsonl", ROWS[15:])
    (tmp_path / "README.md").write_text("Pairs.")
    assert list(read_rows(str(tmp_path))) == ROWS[:15]
    assert list(read_rows(str(tmp_path), split="test[1:]")) == ROWS[16:]
    with pytest.raises(UserError, match=r"split='validation' does not fit .*train \(15 rows\), test \(5 rows\)"):
        read_rows(str(tmp_path), split="validation")


def test_no_bar_is_drawn_for_what_is_read(tmp_path, capfd):
    for name in ("train", "test"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:2])
    assert len(read_rows(str(tmp_path))) == 2
    assert capfd.readouterr() == ("", "") and datasets.is_progress_bar_enabled()  # for a loop of the user's own


def test_a_folder_of_save_to_disk_is_read(tmp_path):
    data = datasets.Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=data, test=data.select([3])).save_to_disk(tmp_path / "several")
    assert list(read_rows(str(tmp_path / "one"), split="train[:3]")) == ROWS[:3]
    assert list(read_rows(str(tmp_path / "several"), split="test")) == [ROWS[3]]


def test_columns_that_are_not_needed_may_hold_anything(tmp_path, chatml):
    rows = [{**row, "meta": i if i % 2 else {"score": [i]}} for i, row in enumerate(ROWS)]
    rows[7]["note"] = "only here"
    write_jsonl(tmp_path / "a.jsonl", rows)
    pairs, _ = tokenize(read_rows(str(tmp_path / "a.jsonl")), chatml)
    assert len(pairs) == 20


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "folder"])
def test_a_changed_file_is_read_anew_and_nothing_is_cached(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    source = tmp_path / "data" / name
    source.parent.mkdir()
    for rows in (ROWS, ROWS[3:9]):
        if name == "folder":
            source.mkdir(exist_ok=True)
            write_parquet(source / "train.parquet", rows)
        else:
            WRITERS[name](source, rows)
        assert list(read_rows(str(source))) == rows
    assert not (tmp_path / "cache").exists()


def test_local_files_need_no_network_and_the_hub_says_what_to_do(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "folder.jsonl", ROWS)
    script = f"""
from pairtune.pairs.tokenize import read_rows
assert len(read_rows({str(tmp_path / "a.jsonl")!r})) == 20
assert len(read_rows({str(tmp_path)!r}, split="train[:10]")) == 10
try:
    read_rows("nobody/no-such-dataset", name="main", revision="v1")
except ValueError as error:
    print(error)
"""
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("dataset.source=nobody/no-such-dataset: read from the Hugging Face Hub, or from")
    assert "dataset.source=nobody/no-such-dataset, name=main, revision=v1" in done.stdout
    assert "hf auth login" in done.stdout


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("piars.jsonl", r"no such file. Nearest in .*: pairs\.jsonl"),
        ("empty/pairs.jsonl", "no such file. .*empty has no file that could hold rows"),
        ("absent/pairs.jsonl", "there is no folder .*absent"),
        ("notes.txt", "of files, .json, .jsonl, .csv, .parquet are read"),
        ("broken.jsonl", r"broken.jsonl, line 3: invalid JSON, .* \(column 12\)"),
        ("broken.json", "broken.json, line 2: invalid JSON"),
        ("list.jsonl", "list.jsonl, line 1: holds list, expected an object"),
        ("number.json", r"number.json, row 1 \(from 0\): holds int"),
        ("text.json", "holds str, expected a list of objects"),
        ("object.json", "one object.*: data, tags. Keep just the list of rows in the file"),
        ("twice.jsonl", r"twice.jsonl, line 2: .*the key 'chosen' stands twice in one object \(column 29\)"),
        ("twice.json", r"twice.json, line 3: .*the key 'content' stands twice"),
        ("twice.csv", "twice.csv, line 1: columns of one name, chosen"),
        ("folder", "train.csv, line 1: columns of one name, chosen"),
        ("broken.csv", "broken.csv, line 3: not as many cells"),
        ("broken.jsonl.gz", "broken.jsonl.gz cannot be read"),
        ("broken.parquet", "broken.parquet cannot be read"),
        ("latin.jsonl", "latin.jsonl cannot be read.*utf-8"),
        ("empty", "empty: the folder cannot be read as a dataset"),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_by_file_and_line(tmp_path, source, message):
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "broken.jsonl").write_text('{"prompt": 1}\n\n{"prompt": "a\n')
    (tmp_path / "broken.json").write_text('[{"prompt": 1},\n{"prompt"}]')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "number.json").write_text("[{}, 2]")
    (tmp_path / "text.json").write_text('"rows"')
    write_json(tmp_path / "object.json", {"version": 1, "data": ROWS, "tags": []})
    (tmp_path / "twice.jsonl").write_text('{"chosen": "}"}\n{"chosen": "", "chosen": "}"}\n')
    (tmp_path / "twice.json").write_text(
        '[{"chosen": {}, "rejected": "\\\\\\"}"},\n{},\n{"chosen": [{"content": "B", "content": ""}]},\n{}]'
    )
    (tmp_path / "twice.csv").write_text("prompt,chosen,chosen\na,b,c\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/train.csv").write_text("prompt,chosen,chosen\na,b,c\n")
    (tmp_path / "broken.csv").write_text("prompt,chosen\na,b\nc\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-3])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / source))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"split='test' does not fit .*train \(20 rows\)"),
        ({"split": "train[:x]"}, "split='train"),
        ({"limit": 0}, "limit=0: must be at least 1"),
        ({"name": "main"}, "dataset.name=main has no effect"),
        ({"revision": "v1"}, "dataset.revision=v1 has no effect"),
        ({"columns": {"promt": "prompt"}}, "dataset.columns.promt: no column of ours. Did you mean prompt"),
        (
            {"columns": {"prompt": "promtp"}},
            "has no such column. Did you mean prompt.* found: prompt, chosen, rejected. ~dataset.columns takes",
        ),
        ({"columns": {"system": None}}, "dataset.columns.system=system: .* has no such column"),
    ],
)
def test_a_setting_that_does_not_fit_the_source_is_refused(tmp_path, options, message):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / "a.jsonl"), **options)
    with pytest.raises(UserError, match=message.replace("dataset", "eval_dataset")):
        read_rows(str(tmp_path / "a.jsonl"), key="eval_dataset", **options)


@pytest.mark.parametrize("source", ["piars.jsonl", "absent/a.jsonl", "a.txt", "broken.parquet", "empty"])
def test_a_source_that_cannot_be_read_is_named_by_its_key(tmp_path, source):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^eval_dataset\.source="):
        read_rows(str(tmp_path / source), key="eval_dataset")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([], {}, "eval_dataset: rows has no rows"),
        ([{"a": 1}], {}, "say so: eval_dataset.columns.prompt="),
        (ROWS, {"columns": {"promt": "prompt"}}, "eval_dataset.columns.promt"),
        (ROWS, {"overlong": "cut"}, "eval_dataset.overlong='cut'"),
        (ROWS, {"overlong": "error", "max_length": 9}, "eval_dataset.overlong to drop"),
        (ROWS, {"max_length": 9}, "eval_dataset: there is nothing left of rows"),
    ],
)
def test_errors_of_pairs_name_the_key_of_their_rows(chatml, rows, options, message):
    with pytest.raises(UserError, match=message):
        tokenize(rows, chatml, key="eval_dataset", **options)


# Formats

USER = {"role": "user", "content": "Q"}
BETTER, WORSE = ({"role": "assistant", "content": text} for text in "BW")
CONVERSATIONS = {"chosen": [USER, BETTER], "rejected": [USER, WORSE]}
MULTI = chat("a", "b", "Q", system="S")
SHAREGPT = [
    {"from": "system", "value": "S"},
    {"from": "human", "value": "a"},
    {"from": "gpt", "value": "b"},
    {"from": "observation", "value": "T"},
]
EXAMPLES = {
    "HH transcripts": (
        {
            "chosen": "\n\nHuman: a \n\nAssistant: b\n\nHuman: Q\n\nAssistant: B\n\nmore ",
            "rejected": "\n\nHuman: a \n\nAssistant: b\n\nHuman: Q\n\nAssistant: W",
        },
        (chat("a", "b", "Q"), "B\n\nmore", "W"),
    ),
    "HH prompt with answers": (
        {"prompt": "\n\nHuman: a\n\nHuman: Q\n\nAssistant:", "chosen": " B", "rejected": " W"},
        (chat("a\n\nQ"), "B", "W"),
    ),
    "prompt with answers": ({"prompt": "Q", "chosen": "B", "rejected": "W", "score": 1}, ([USER], "B", "W")),
    "prompt with answers, system": (
        {"prompt": "Q", "chosen": "B", "rejected": "W", "system": "S"},
        (chat("Q", system="S"), "B", "W"),
    ),
    "HH transcripts, system": (
        {"chosen": "\n\nHuman: Q\n\nAssistant: B", "rejected": "\n\nHuman: Q\n\nAssistant: W", "system": "S"},
        (chat("Q", system="S"), "B", "W"),
    ),
    "prompt with answers, history": (
        {"prompt": "Q", "chosen": "B", "rejected": "W", "history": [["a", "b"]]},
        (chat("a", "b", "Q"), "B", "W"),
    ),
    "prompt messages with answers, system repeated": (
        {"prompt": [USER], "chosen": [*chat("Q", system="S"), BETTER], "rejected": [USER, WORSE], "system": "S"},
        (chat("Q", system="S"), "B", "W"),
    ),
    "prompt messages with answers": (
        {"prompt": MULTI, "chosen": [BETTER], "rejected": WORSE},
        (MULTI, "B", "W"),
    ),
    "prompt messages with answers, texts": ({"prompt": MULTI, "chosen": "B", "rejected": "W"}, (MULTI, "B", "W")),
    "prompt messages with answers, repeated": (
        {"prompt": MULTI, "chosen": [*MULTI, BETTER], "rejected": [*MULTI, WORSE]},
        (MULTI, "B", "W"),
    ),
    "conversations": ({"chosen": [*MULTI, BETTER], "rejected": [*MULTI, WORSE]}, (MULTI, "B", "W")),
    "conversations, UltraFeedback": (
        {
            "prompt": "Q",
            "chosen": [USER, {**BETTER, "score": 9}],
            "rejected": [USER, {**WORSE, "score": 2}],
            "messages": [USER, BETTER],
            "score_chosen": 9.0,
        },
        ([USER], "B", "W"),
    ),
    "conversations, system": ({**CONVERSATIONS, "system": "S"}, (chat("Q", system="S"), "B", "W")),
    "conversations, the same system": (
        {"system": "S", "chosen": [*MULTI, BETTER], "rejected": [*MULTI, WORSE]},
        (MULTI, "B", "W"),
    ),
    "conversations, history": (
        {**CONVERSATIONS, "system": "S", "history": [["a", "b"]]},
        (chat("a", "b", "Q", system="S"), "B", "W"),
    ),
    "conversations, answers only": ({"prompt": "Q", "chosen": [BETTER], "rejected": [WORSE]}, ([USER], "B", "W")),
    "ShareGPT": (
        {"conversations": SHAREGPT, "chosen": {"from": "gpt", "value": "B"}, "rejected": {"from": "gpt", "value": "W"}},
        ([*chat("a", "b", system="S"), {"role": "tool", "content": "T"}], "B", "W"),
    ),
    "instruction with answers": (
        {"instruction": "Q", "input": "", "output": "B", "chosen": "B", "rejected": "W"},
        ([USER], "B", "W"),
    ),
    "instruction with answers, input": (
        {"instruction": "Q", "input": "i", "chosen": "B", "rejected": "W", "system": "S"},
        (chat("Q\ni", system="S"), "B", "W"),
    ),
    "instruction with answers, history": (
        {
            "instruction": "Q",
            "input": "i",
            "chosen": "B",
            "rejected": "W",
            "history": [["a", "b"], ["c", "d"]],
            "system": "S",
        },
        (chat("a", "b", "c", "d", "Q\ni", system="S"), "B", "W"),
    ),
    "instruction with answers, no history": (
        {"instruction": "Q", "chosen": "B", "rejected": "W", "history": [], "system": "", "tools": "[]"},
        ([USER], "B", "W"),
    ),
    "several rejected answers": ({"prompt": "Q", "chosen": "B", "rejected": ["W"]}, ([USER], "B", "W")),
    "several rejected answers, of messages": (
        {"prompt": MULTI, "chosen": [BETTER], "rejected": [[WORSE]]},
        (MULTI, "B", "W"),
    ),
    "conversation and a rejected response": (
        {"messages": [*MULTI, BETTER], "rejected_response": "W"},
        (MULTI, "B", "W"),
    ),
    "unpaired": ({"prompt": "Q", "completion": "B", "label": True}, ([USER], "B", None)),
    "unpaired, undesirable": ({"prompt": "Q", "completion": "W", "label": False}, ([USER], None, "W")),
    "unpaired, a number": ({"prompt": "Q", "completion": "W", "label": 0}, ([USER], None, "W")),
    "unpaired, a text": ({"prompt": "Q", "completion": "B", "label": "True"}, ([USER], "B", None)),
    "unpaired HH prompt": (
        {"prompt": "\n\nHuman: a\n\nHuman: Q\n\nAssistant:", "completion": " W", "label": False},
        (chat("a\n\nQ"), None, "W"),
    ),
    "unpaired prompt messages": ({"prompt": MULTI, "completion": [BETTER], "label": True}, (MULTI, "B", None)),
    "unpaired prompt messages, text": (
        {"prompt": [USER], "completion": "B", "label": True, "system": "S"},
        (chat("Q", system="S"), "B", None),
    ),
    "unpaired conversations": ({"messages": [*MULTI, WORSE], "label": False}, (MULTI, None, "W")),
    "unpaired ShareGPT": (
        {"conversations": [*SHAREGPT, {"from": "gpt", "value": "B"}], "label": 1},
        ([*chat("a", "b", system="S"), {"role": "tool", "content": "T"}], "B", None),
    ),
    "unpaired instruction": (
        {"instruction": "Q", "input": "i", "output": "W", "label": False},
        (chat("Q\ni"), None, "W"),
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_format_is_recognised_and_read(name):
    row, (prompt, chosen, rejected) = EXAMPLES[name]
    form, rows = recognise(Rows([row]), "dataset")
    assert form.name == name.partition(", ")[0]
    (example,) = form.read(rows[0])
    assert (example.prompt, example.chosen, example.rejected) == (prompt, chosen, rejected)


def test_every_format_has_an_example_here():
    of_forms_py = {form.name for form in FORMATS if "answers" in form.columns or "message_tree_id" in form.columns}
    assert {name.partition(", ")[0] for name in EXAMPLES} == {form.name for form in FORMATS} - of_forms_py


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_row_through_arrow_is_the_same_row(tmp_path, name, chatml):
    row, _ = EXAMPLES[name]
    write_parquet(tmp_path / "a.parquet", [row])
    write_json(tmp_path / "a.json", [row])
    (from_arrow,), _ = tokenize(read_rows(str(tmp_path / "a.parquet")), chatml, unpaired=True)
    (from_json,), _ = tokenize(read_rows(str(tmp_path / "a.json")), chatml, unpaired=True)
    assert from_arrow == from_json


# Unpaired rows


def unpaired(rows):
    """The rows' answers, each with its label."""
    return [
        {"prompt": row["prompt"], "completion": row[answer], "label": answer == "chosen"}
        for row in rows
        for answer in ("chosen", "rejected")
    ]


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_an_unpaired_answer_has_the_tokens_that_it_has_in_a_pair(template, request):
    tokenizer = request.getfixturevalue(template)
    pairs, _ = tokenize(ROWS, tokenizer)
    answers, report = tokenize(unpaired(ROWS), tokenizer, unpaired=True)
    assert (report.num_kept, report.num_desirable) == (2 * len(ROWS), len(ROWS))
    for pair, desirable, undesirable in zip(pairs, answers[::2], answers[1::2], strict=True):
        assert (pair.prompt, pair.chosen, []) == (desirable.prompt, desirable.chosen, desirable.rejected)
        assert (pair.prompt, [], pair.rejected) == (undesirable.prompt, undesirable.chosen, undesirable.rejected)


def test_the_report_of_unpaired_rows_counts_labels(chatml):
    _, report = tokenize(
        [*unpaired(ROWS[:2]), {"prompt": "Q", "completion": " ", "label": True}], chatml, unpaired=True
    )
    shown = str(report)
    assert re.search(r"of these, desirable +2 ", shown) and re.search(r"of these, undesirable +2 ", shown)
    assert re.search(r"dropped: empty answer +1 .* row 4", shown)
    assert re.search(r"\n  desirable ", shown) and "prompt + answer" in shown


@pytest.mark.parametrize("label", ["fine", None, 2, 0.5, ""])
def test_a_label_that_is_neither_true_nor_false_is_an_error_with_its_row(chatml, label):
    rows = [*unpaired(ROWS[:2]), {"prompt": "Q", "completion": "B", "label": label}]
    with pytest.raises(UserError, match=r"row 4 \(from 0\): column 'label' holds .*, expected"):
        tokenize(rows, chatml, unpaired=True)


def test_a_loss_of_pairs_refuses_unpaired_rows(chatml):
    with pytest.raises(UserError, match=r"rows holds answers with a label .* loss=kto takes each answer for itself"):
        tokenize(unpaired(ROWS), chatml)


def test_held_out_rows_that_training_sees_are_counted_by_their_only_answer(chatml):
    answers, _ = tokenize(unpaired(ROWS), chatml, unpaired=True)
    assert count_overlap(answers[:3], answers) == 3


def test_llama_factorys_unpaired_demo_is_read_whole(chatml):
    source = SHARED / "preference/llamafactory/kto_en_demo.json"
    if not source.exists():
        pytest.skip(f"{source} is not here")
    answers, report = tokenize(read_rows(str(source)), chatml, max_length=20_000, unpaired=True)
    raw = json.loads(source.read_text())
    assert report.num_kept == len(answers) == len(raw) == 300
    assert [bool(answer.chosen) for answer in answers] == [row["label"] for row in raw]


def test_a_null_in_the_first_row_does_not_hide_the_format(chatml):
    rows = [{**ROWS[0], "prompt": None}, ROWS[1]]
    assert fitting_format(rows).name == "prompt with answers"
    with pytest.raises(
        UserError, match=r"rows, row 0 \(from 0\): column 'prompt' holds nothing \(null\), expected text"
    ):
        tokenize(rows, chatml)


def test_an_unknown_format_is_refused_with_the_columns_found_and_the_formats_known(chatml):
    with pytest.raises(UserError) as refused:
        tokenize([{"question": "Q", "chosen": 3, "score": None}], chatml)
    message = str(refused.value)
    assert "question: text, 'Q'" in message and "chosen: int, 3" in message and "score: nothing" in message
    assert all(form.name in message for form in FORMATS)
    assert "prompt (text), chosen (text), rejected (text), system (optional)" in message
    assert "dataset.columns.prompt=THEIR_NAME" in message


@pytest.mark.parametrize(
    ("good", "broken", "message"),
    [
        (ROWS[0], {"prompt": "Q", "chosen": 7, "rejected": "W"}, "column 'chosen' holds int, 7, expected text"),
        (ROWS[0], {"prompt": "Q", "chosen": "B"}, r"column 'rejected' holds nothing \(null\)"),
        (ROWS[0], {**ROWS[0], "system": 5}, "column 'system' holds int"),
        (
            ROWS[0],
            {**ROWS[0], "history": "a"},
            r"column 'history' holds text, 'a', expected list of \[question, answer\]",
        ),
        (ROWS[0], {**ROWS[0], "prompt": [USER]}, "column 'prompt' holds messages"),
        (
            {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
            {"chosen": [USER, {"role": "critic", "content": "B"}], "rejected": [USER, WORSE]},
            "role 'critic'; known are system, user",
        ),
        (
            {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
            {"chosen": [USER, {"role": "assistant", "content": ["B"]}], "rejected": [USER, WORSE]},
            "content is list, expected text",
        ),
        (
            {"chosen": [USER, BETTER], "rejected": [USER, WORSE]},
            {"chosen": [BETTER], "rejected": [WORSE]},
            "an answer only, and there is no column 'prompt'",
        ),
        (
            {"prompt": [USER], "chosen": [BETTER], "rejected": [WORSE]},
            {"prompt": [USER], "chosen": [BETTER, USER], "rejected": [WORSE]},
            r"continues the prompt with \(assistant, user\)",
        ),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            {"chosen": "Hello", "rejected": "\n\nHuman: a\n\nAssistant: c"},
            "column 'chosen' holds text, 'Hello', expected text that starts with",
        ),
    ],
)
def test_a_broken_row_is_refused_by_source_number_and_column(tmp_path, chatml, good, broken, message):
    path = tmp_path / "a.json"
    write_json(path, [good, good, broken])
    rows = read_rows(str(path), split="train[1:]")
    with pytest.raises(UserError, match=rf"a\.json, row 2 \(from 0\): .*{message}"):
        tokenize(rows, chatml)


@needs_shared
def test_columns_of_other_names_are_mapped(chatml):
    source = str(PREFERENCE / "torchtune/stack_exchange_paired_tiny.json")
    columns = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    raw = json.loads(Path(source).read_text())
    rows = read_rows(source, columns=columns)
    assert rows.column_names[:3] == ["prompt", "chosen", "rejected"] and "question" not in rows.column_names
    pairs, report = tokenize(rows, chatml)
    assert len(pairs) == report.num_kept == 25
    assert text(chatml, pairs[9].chosen) == raw[9]["response_j"] + "<|im_end|>"
    assert text(chatml, pairs[9].prompt).endswith(raw[9]["question"] + "<|im_end|>\n<|im_start|>assistant\n")
    assert tokenize(raw, chatml, columns=columns)[0] == pairs


def test_a_column_mapped_to_nothing_is_left_out(tmp_path):
    row = {**ROWS[0], "history": "of the row"}
    write_json(tmp_path / "a.json", [row])
    rows = read_rows(str(tmp_path / "a.json"), columns={"history": None})
    assert list(rows) == ROWS[:1] and rows.column_names == list(ROWS[0])


def test_a_mapped_column_wins_over_one_that_has_our_name():
    row = {"prompt": "old", "question": "new", "chosen": "B", "rejected": "W"}
    assert list(Rows([row], columns={"prompt": "question"})) == [{"prompt": "new", "chosen": "B", "rejected": "W"}]


# Tokens


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, LLAMA_2, GEMMA])
@pytest.mark.parametrize(("better", "worse"), [("Yes, it is.", "Yes, it is not."), ("Ja", "🙂"), ("e", "ee")])
def test_prompt_and_answer_are_the_whole_conversation_split_at_the_generation_prompt(tmp_path, template, better, worse):
    transformers = pytest.importorskip("transformers")
    folder = save(tmp_path / "model", chat_template=template)
    tokenizer, peer = hf_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    pair, _ = one({"prompt": chat("a", "b", "Q"), "chosen": better, "rejected": worse}, tokenizer)

    def peers(messages, **options):
        return peer.apply_chat_template(messages, return_dict=False, **options)

    assert pair.prompt == peers(chat("a", "b", "Q"), add_generation_prompt=True)
    for answer, ids in ((better, pair.chosen), (worse, pair.rejected)):
        whole = peers(chat("a", "b", "Q", answer))
        assert pair.prompt + ids == whole[: len(pair.prompt + ids)]
        assert text(tokenizer, ids[:-1]).strip() == answer
        assert ids[-1] in tokenizer.stop_ids and not set(ids[:-1]) & tokenizer.end_ids


def test_a_token_that_spans_the_prompts_end_belongs_to_the_answers(tmp_path):
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", "a", "b", "c", "d", "bc"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [("b", "c")]))
    backend.add_special_tokens(["<s>", "</s>"])
    tokenizer = hf_tokenizer(save(tmp_path, backend=backend, adds_bos=False))
    rows = [{"prompt": "ab", "chosen": chosen, "rejected": "d"} for chosen in ("c", "a")]
    (merged, clean), report = tokenize(rows, tokenizer)
    assert merged == Pair(prompt=[2], chosen=[6, 1], rejected=[3, 5, 1], row=0)
    assert clean == Pair(prompt=[2, 3], chosen=[2, 1], rejected=[5, 1], row=1)
    assert report.merges == [0] and re.search(r"boundary merges +1 +50.0 %   row 0", str(report))
    with pytest.raises(UserError, match="empty prompt"):
        tokenize([{"prompt": "b", "chosen": "c", "rejected": "d"}], tokenizer)


def test_plain_texts_are_joined_as_they_are(plain):
    pair, report = one({"prompt": "Q:", "chosen": " B", "rejected": "\nW"}, plain)
    assert text(plain, pair.prompt + pair.chosen) == "<s>Q: B</s>"
    assert text(plain, pair.prompt + pair.rejected) == "<s>Q:\nW</s>"
    assert "plain text: the tokenizer has no chat template" in str(report)


@pytest.mark.parametrize(
    ("name", "prompt", "chosen"),
    [
        ("prompt with answers, system", "S\n\nHuman: Q\n\nAssistant:", " B"),
        ("instruction with answers, input", "S\n\nHuman: Q\ni\n\nAssistant:", " B"),
        ("instruction with answers", "Q\n", "B"),
        ("prompt with answers, history", "\n\nHuman: a\n\nAssistant: b\n\nHuman: Q\n\nAssistant:", " B"),
        ("conversations", "S\n\nHuman: a\n\nAssistant: b\n\nHuman: Q\n\nAssistant:", " B"),
        ("HH prompt with answers", "\n\nHuman: a\n\nHuman: Q\n\nAssistant:", " B"),
        ("HH transcripts", "\n\nHuman: a \n\nAssistant: b\n\nHuman: Q\n\nAssistant:", " B\n\nmore "),
    ],
)
def test_plain_messages_are_written_as_text(plain, name, prompt, chosen):
    pair, _ = one(EXAMPLES[name][0], plain)
    assert text(plain, pair.prompt) == "<s>" + prompt
    assert text(plain, pair.chosen) == chosen + "</s>"


def test_a_pad_token_that_is_eos_changes_no_pair(tmp_path, plain):
    padded = hf_tokenizer(save(tmp_path, pad_token="</s>"))
    assert tokenize(ROWS, padded)[0] == tokenize(ROWS, plain)[0]


def test_a_doubled_bos_is_refused(tmp_path):
    bare = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    folder, rows = save(tmp_path, chat_template=bare), [ROWS[0], {**ROWS[1], "prompt": "<s>Q"}]
    with pytest.raises(UserError, match=r"row 1 \(from 0\): .*two BOS"):
        tokenize(rows, hf_tokenizer(folder, special_tokens_in_text="control"))
    tokenizer = hf_tokenizer(folder)
    assert [pair.prompt.count(tokenizer.bos_id) for pair in tokenize(rows, tokenizer)[0]] == [1, 1]


# Rows that are dropped

KEPT = CONVERSATIONS
CALL = [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}]

TOOL = {"role": "tool", "content": "12"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": [USER, {**BETTER, "content": " \n"}], "rejected": [USER, WORSE]}, "empty answer"),
        ({"chosen": [USER, BETTER], "rejected": [USER, BETTER]}, "identical answers"),
        ({"chosen": [USER, BETTER], "rejected": [USER, {**BETTER, "content": "B "}]}, "identical answers"),
        ({"chosen": [USER, BETTER], "rejected": [*chat("Other"), WORSE]}, "prompts differ"),
        ({"chosen": [USER, BETTER, USER], "rejected": [USER, WORSE]}, "no answer at the end"),
        ({"chosen": [USER, {**BETTER, "content": "B" * 99}], "rejected": [USER, WORSE]}, "too long"),
        ({"chosen": [USER, {**BETTER, "content": "</s>"}], "rejected": [USER, WORSE]}, "empty answer"),
        ({"chosen": [USER, {**BETTER, "content": "W</s>"}], "rejected": [USER, WORSE]}, "identical answers"),
        ({"chosen": [*CALL, TOOL, BETTER], "rejected": [*CALL, TOOL, WORSE]}, "tool calls"),
        ({"chosen": [USER, BETTER], "rejected": CALL}, "tool calls"),
        ({"chosen": [USER, BETTER], "rejected": [USER, {**WORSE, "function_call": {"name": "f"}}]}, "tool calls"),
        ({**CONVERSATIONS, "tools": '[{"name": "f"}]'}, "tool descriptions"),
    ],
)
def test_a_row_that_cannot_be_used_is_dropped_and_counted_by_reason(llama_3, row, reason):
    pairs, report = tokenize([KEPT, row, KEPT, row, row, row, KEPT], llama_3, max_length=80)
    assert [pair.row for pair in pairs] == [0, 2, 6]
    ((counted, rows),) = report.dropped.items()
    assert reason in counted and rows == [1, 3, 4, 5]
    assert re.search(rf"dropped: .*{reason} +4 +57.1 %   row 1, 3, 4, \.\.\.", str(report))
    with pytest.raises(
        UserError, match=rf"dataset: there is nothing left of rows(.|\n)*dropped: .*{reason} +1 +100.0 %"
    ):
        tokenize([row], llama_3, max_length=80)


def test_hh_rows_without_a_last_answer_or_with_another_prompt_are_dropped(chatml):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    rows = [row, {**row, "chosen": "\n\nHuman: x\n\nAssistant: b"}, {**row, "chosen": row["chosen"] + "\n\nHuman: d"}]
    _, report = tokenize(rows, chatml)
    assert report.dropped == {"prompts differ": [1], "no answer at the end": [2]}


def test_rows_that_the_template_refuses_are_dropped_by_its_first_line(tmp_path):
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=GEMMA.replace("no system role", "no system role\\nsorry")))
    refused = {**ROWS[1], "system": "S"}
    pairs, report = tokenize([ROWS[0], refused, ROWS[2], refused], tokenizer)
    assert [pair.row for pair in pairs] == [0, 2]
    assert report.dropped == {"refused by the chat template: no system role": [1, 3]}
    assert "rows refused: tokenizer.chat_template=FILE.jinja" in str(report)
    with pytest.raises(UserError, match=r"nothing left of rows(.|\n)*dropped: refused by the chat template: no system"):
        tokenize([refused], tokenizer)


@needs_shared
def test_rows_that_torchtunes_template_refuses_are_dropped():
    from torchtune.models.mistral import mistral_tokenizer

    theirs = mistral_tokenizer(str(SHARED / "tokenizers/mistral/tokenizer.model.v1"))
    pairs, report = tokenize([ROWS[0], {**ROWS[1], "system": "S"}], theirs)
    ((reason, rows),) = report.dropped.items()
    assert len(pairs) == 1 and rows == [1] and reason.startswith("refused by the chat template: ValueError('System")


@pytest.mark.parametrize("name", ["plain", "chatml", "llama_3"])
@pytest.mark.parametrize("end", ["</s>", "<|im_end|>", "<|eot_id|>\n", "</s></s>", "<|im_end|>\n</s>"])
def test_an_end_tokens_text_is_taken_off_an_answer_and_counted(request, name, end):
    tokenizer = request.getfixturevalue(name)
    clean = {"prompt": "Q", "chosen": "Write </s> to end", "rejected": "W"}
    ended = {**clean, "chosen": clean["chosen"] + end}
    (first, second, third), report = tokenize([clean, ended, {**ended, "rejected": "W" + end}], tokenizer)
    assert (first.prompt, first.chosen, first.rejected) == (second.prompt, second.chosen, second.rejected)
    assert (first.prompt, first.chosen, first.rejected) == (third.prompt, third.chosen, third.rejected)
    assert first.rejected[-1] in tokenizer.end_ids and first.rejected[-2] not in tokenizer.end_ids
    assert report.ends_taken_off == [1, 2] and not report.dropped
    assert re.search(r"end token's text taken off +2 +66.7 %   row 1, 2\n", str(report))


@pytest.mark.parametrize("template", [CHATML, None])
@pytest.mark.parametrize(("policy", "ends"), [("text", 1), ("control", 2)])
def test_rows_with_special_tokens_in_their_text_are_counted_and_kept(tmp_path, template, policy, ends):
    tokenizer = hf_tokenizer(save(tmp_path, chat_template=template), special_tokens_in_text=policy)
    row = {"prompt": "Q", "chosen": "B", "rejected": "W"}
    rows = [row, {**row, "prompt": "What does </s> do?"}, {**row, "chosen": "</s> ends."}, {**row, "chosen": "B</s>"}]
    pairs, report = tokenize(rows, tokenizer)
    assert len(pairs) == 4 and report.special == [1, 2] and report.ends_taken_off == [3]
    assert re.search(rf"special tokens, as {policy} +2 +50.0 %   row 1, 2\n", str(report))
    assert ("unless hf_tokenizer gets special_tokens_in_text=control" in str(report)) == (policy == "text")
    asked, answered = (pairs[1].prompt + pairs[1].chosen, pairs[2].chosen)
    for ids, usual in ((asked, pairs[0].prompt + pairs[0].chosen), (answered, pairs[0].chosen)):
        assert sum(i in tokenizer.end_ids for i in ids) == sum(i in tokenizer.end_ids for i in usual) + ends - 1
    assert "What does </s> do?" in text(tokenizer, asked) and text(tokenizer, answered).startswith("</s> ends.")


def test_an_end_tokens_text_is_taken_off_a_transcript_alone(plain):
    row = EXAMPLES["HH transcripts"][0]
    (clean, ended), report = tokenize([row, {name: text + "</s>" for name, text in row.items()}], plain)
    assert (clean.prompt, clean.chosen, clean.rejected) == (ended.prompt, ended.chosen, ended.rejected)
    assert report.ends_taken_off == [1]


@needs_shared
def test_an_end_tokens_text_is_taken_off_with_torchtunes_tokenizers():
    from torchtune.models.llama2 import llama2_tokenizer
    from torchtune.models.llama3 import llama3_tokenizer

    files = SHARED / "tokenizers/torchtune"
    for theirs, end in (
        (llama2_tokenizer(str(files / "m.model")), "</s>"),
        (llama3_tokenizer(str(files / "tiktoken_small.model")), "<|eot_id|>"),
    ):
        (clean, ended), report = tokenize([ROWS[0], {**ROWS[0], "chosen": ROWS[0]["chosen"] + end}], theirs)
        assert clean.chosen == ended.chosen and report.ends_taken_off == [1]


def test_no_rows_are_refused(chatml):
    with pytest.raises(UserError, match="rows has no rows"):
        tokenize([], chatml)


# Limits


def lengths(pair):
    return len(pair.prompt), len(pair.chosen), len(pair.rejected)


@pytest.mark.parametrize("slack", [0, -1])
def test_a_pair_is_dropped_from_the_first_token_over_a_limit(llama_3, slack):
    whole, _ = one(ROWS[0], llama_3)
    prompt, _, rejected = lengths(whole)
    for limits in (
        {"max_length": prompt + rejected + slack},
        {"max_length": 1000, "max_prompt_length": prompt + slack},
    ):
        if slack == 0:
            assert one(ROWS[0], llama_3, **limits)[0] == whole
        else:
            with pytest.raises(UserError, match="dropped: too long"):
                one(ROWS[0], llama_3, **limits)


@pytest.mark.parametrize("name", ["llama_3", "chatml"])
@pytest.mark.parametrize("by_prompt", [True, False])
def test_trimming_cuts_the_prompts_left_keeps_bos_and_no_answer_loses_a_token(request, name, by_prompt):
    tokenizer = request.getfixturevalue(name)
    whole, _ = one(ROWS[0], tokenizer)
    prompt, _, rejected = lengths(whole)
    limits = (
        {"max_length": 1000, "max_prompt_length": prompt - 3} if by_prompt else {"max_length": prompt + rejected - 3}
    )
    pair, report = one(ROWS[0], tokenizer, overlong="trim_prompt", **limits)
    assert (pair.chosen, pair.rejected) == (whole.chosen, whole.rejected)
    bos = [tokenizer.bos_id] if name == "llama_3" else []
    assert pair.prompt == bos + whole.prompt[3 + len(bos) :] and len(pair.prompt) == prompt - 3
    assert report.trimmed == [0] and re.search(r"of these, prompt trimmed +1 +100.0 %   row 0", str(report))
    assert report.lengths["prompt"] == [prompt]


@pytest.mark.parametrize(("name", "smallest"), [("llama_3", 2), ("chatml", 1)])
def test_trimming_leaves_a_token_of_the_prompt_besides_bos_or_drops_the_row(request, name, smallest):
    tokenizer = request.getfixturevalue(name)
    longest = lengths(one(ROWS[0], tokenizer)[0])[2]
    pair, _ = one(ROWS[0], tokenizer, overlong="trim_prompt", max_length=longest + smallest)
    assert len(pair.prompt) == smallest
    for room in (smallest - 1, 0, -1):
        with pytest.raises(UserError, match="dropped: too long"):
            one(ROWS[0], tokenizer, overlong="trim_prompt", max_length=longest + room)


def test_overlong_error_names_the_row_and_the_lengths(llama_3):
    prompt, _, rejected = lengths(one(ROWS[0], llama_3)[0])
    with pytest.raises(
        UserError, match=rf"row 0 \(from 0\): a prompt of {prompt} tokens and an answer of {rejected} do"
    ):
        one(ROWS[0], llama_3, overlong="error", max_length=prompt + rejected - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 128, "max_prompt_length": 256}, "max_prompt_length=256.* at most max_length=128"),
        ({"max_length": 128, "max_prompt_length": 0}, "max_prompt_length=0"),
        ({"max_length": 1}, "max_length=1"),
        ({"max_length": 9, "overlong": "truncate"}, "overlong='truncate': must be drop, trim_prompt or error"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(chatml, options, message):
    with pytest.raises(UserError, match=message):
        tokenize_pairs(ROWS, chatml, **options)


def test_answers_have_a_budget_of_their_own_and_are_never_cut(chatml):
    prompt, chosen, rejected = lengths(one(ROWS[0], chatml)[0])
    most = max(chosen, rejected)
    for overlong in ("drop", "trim_prompt", "error"):
        pair, _ = one(ROWS[0], chatml, overlong=overlong, max_completion_length=most)
        assert lengths(pair) == (prompt, chosen, rejected)
    for overlong in ("drop", "trim_prompt"):
        with pytest.raises(UserError, match="dropped: answer too long"):
            one(ROWS[0], chatml, overlong=overlong, max_completion_length=most - 1)
    words = rf"row 0 \(from 0\): an answer of {most} tokens does not fit max_completion_length={most - 1}"
    with pytest.raises(UserError, match=words):
        one(ROWS[0], chatml, overlong="error", max_completion_length=most - 1)


def test_a_prompt_budget_that_takes_all_is_reported(chatml):
    _, report = tokenize(ROWS, chatml, max_length=512, max_prompt_length=512)
    assert "max_prompt_length = max_length = 512" in str(report)


# The report and the split


def test_a_template_that_writes_the_date_is_noted(chatml, tmp_path):
    template = "{{ strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' }}" + CHATML
    folder, noted = save(tmp_path, chat_template=template), "the day that the chat template writes: "
    assert f"{noted}its own; tokenizer.date=" in str(tokenize(ROWS, hf_tokenizer(folder))[1])
    assert f"{noted}tokenizer.date=2025-11-20" in str(tokenize(ROWS, hf_tokenizer(folder, date="2025-11-20"))[1])
    assert noted not in str(tokenize(ROWS, chatml)[1])


def test_the_report_gives_lengths_as_numpy_counts_them(plain):
    np = pytest.importorskip("numpy")
    rows = [{"prompt": "a" * i, "chosen": "b" * (i % 7 + 1), "rejected": "c" * 9} for i in range(1, 90)]
    pairs, report = tokenize(rows, plain)
    table = {"prompt": [len(p.prompt) for p in pairs], "chosen": [len(p.chosen) for p in pairs]}
    for name, counts in table.items():
        expected = [int(np.percentile(counts, q, method="inverted_cdf")) for q in (50, 95, 100)]
        assert list(map(int, re.search(rf"  {name} +(\d+) +(\d+) +(\d+)\n", str(report)).groups())) == expected


@pytest.mark.parametrize(("fraction", "num_held_out"), [(0.1, 2), (0.5, 10), (0.26, 5), (0.95, 19)])
def test_held_out_are_the_last_pairs_in_order(chatml, fraction, num_held_out):
    pairs, _ = tokenize(ROWS, chatml)
    train, held_out = split_pairs(pairs, fraction)
    assert train + held_out == pairs and len(held_out) == num_held_out


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, 0.001, 0.999])
def test_a_fraction_that_leaves_a_part_empty_is_refused(chatml, fraction):
    with pytest.raises(UserError, match=f"val_fraction={fraction}"):
        split_pairs(tokenize(ROWS, chatml)[0], fraction)


def test_held_out_pairs_that_training_sees_are_counted(chatml):
    other_rejected = {**ROWS[2], "rejected": "Something else."}
    other_chosen = {**ROWS[3], "chosen": "Something else."}
    pairs, report = tokenize([*ROWS[:6], ROWS[1], other_rejected, other_chosen, ROWS[9]], chatml)
    train, held_out = split_pairs(pairs, 0.4)
    assert count_overlap(train, held_out) == 2
    assert re.search(
        r"held out +4 +40.0 %\nof these, also in training +2 +20.0 %", str(report.with_split(train, held_out))
    )


# The real data


@pytest.fixture(scope="module")
def stories():
    return hf_tokenizer(str(SHARED / "models" / "stories260K-hf"))


@needs_shared
def test_hh_rows_are_kept_and_dropped_as_a_naive_recount_says(stories):
    pairs, report = tokenize(read_rows(str(HH)), stories)
    differ, empty = [], []
    for number, line in enumerate(gzip.decompress(HH.read_bytes()).decode().splitlines()):
        chosen, rejected = (json.loads(line)[name].rsplit("\n\nAssistant:", 1) for name in ("chosen", "rejected"))
        if chosen[0] != rejected[0]:
            differ.append(number)
        elif not chosen[1].strip() or not rejected[1].strip():
            empty.append(number)
    assert report.dropped == {"prompts differ": differ, "empty answer": empty}
    assert (len(differ), len(empty), report.num_rows, len(pairs)) == (5, 4, 2312, 2303)
    assert report.format == "HH transcripts"


@needs_shared
def test_hh_transcripts_in_plain_text_are_reproduced_byte_by_byte(plain):
    rows = read_rows(str(HH), limit=300)
    pairs, _ = tokenize(rows, plain)
    for pair in pairs:
        for name in ("chosen", "rejected"):
            assert text(plain, pair.prompt + getattr(pair, name)) == f"<s>{rows[pair.row][name]}</s>"
        assert text(plain, pair.prompt).endswith("\n\nAssistant:")


@needs_shared
def test_hh_transcripts_alternate_for_templates_that_want_it():
    form = next(form for form in FORMATS if form.name == "HH transcripts")
    read = [
        example
        for i, row in enumerate(read_rows(str(HH)))
        if i not in {1254, 1688, 1950, 1952, 2036}
        for example in form.read(row)
    ]
    for example in read:
        roles = [message["role"] for message in example.prompt]
        assert roles == (["user", "assistant"] * len(roles))[: len(roles)] and roles[-1] == "user"


@needs_shared
def test_the_instruction_rows_lose_the_six_identical_ones(stories):
    source = PREFERENCE / RASBT
    pairs, report = tokenize(read_rows(str(source)), stories)
    same = [i for i, row in enumerate(json.loads(source.read_text())) if row["chosen"] == row["rejected"]]
    assert report.dropped == {"identical answers": same} and len(same) == 6 and len(pairs) == 1094


@needs_shared
def test_llama_factorys_conversations_keep_their_turns_and_system_messages():
    source = PREFERENCE / "llamafactory/dpo_en_demo.json"
    raw, rows = json.loads(source.read_text()), read_rows(str(source))
    form = fitting_format([rows[0]])
    examples = [example for row in rows for example in form.read(row)]
    assert form.name == "ShareGPT" and max(len(example.prompt) for example in examples) == 13
    role = {"human": "user", "gpt": "assistant", "system": "system"}
    assert examples == [
        Example(
            [{"role": role[m["from"]], "content": m["value"]} for m in row["conversations"]],
            row["chosen"]["value"],
            row["rejected"]["value"],
        )
        for row in raw
    ]


@needs_shared
@pytest.mark.parametrize("source", ["llamafactory/dpo_en_demo.json", "torchtune/hh_rlhf_tiny.json", RASBT, None])
def test_real_pairs_are_whole_conversations_with_torchtunes_llama3_tokenizer(source):
    from torchtune.data import Message
    from torchtune.models.llama3 import llama3_tokenizer

    theirs = llama3_tokenizer(str(SHARED / "tokenizers/torchtune/tiktoken_small.model"))
    rows = read_rows(str(PREFERENCE / source if source else HH), limit=25)
    pairs, report = tokenize(rows, theirs)
    assert report.style == "torchtune's Llama3Tokenizer" and not report.merges
    form = fitting_format([rows[0]])
    header = [theirs.start_header_id, *theirs.encode("assistant", False, False), theirs.end_header_id]
    header += theirs.encode("\n\n", False, False)
    for pair in pairs:
        (example,) = form.read(rows[pair.row])
        assert pair.prompt[-len(header) :] == header and pair.prompt.count(theirs.bos_id) == 1
        for answer, ids in ((example.chosen, pair.chosen), (example.rejected, pair.rejected)):
            messages = [*example.prompt, {"role": "assistant", "content": answer}]
            whole = theirs.tokenize_messages([Message(m["role"], m["content"]) for m in messages])[0]
            assert pair.prompt + ids == whole[:-1] and ids[-1] == theirs.eot_id


@needs_shared
def test_sentencepiece_tokenizers_of_torchtune_tokenize_real_pairs():
    from torchtune.models.llama2 import llama2_tokenizer
    from torchtune.models.mistral import mistral_tokenizer

    files = SHARED / "tokenizers"
    rows = read_rows(str(PREFERENCE / RASBT), limit=30)
    for theirs in (
        llama2_tokenizer(str(files / "torchtune/m.model")),
        mistral_tokenizer(str(files / "mistral/tokenizer.model.v1")),
    ):
        pairs, _ = tokenize(rows, theirs)
        assert all(pair.prompt[0] == theirs.bos_id and pair.prompt.count(theirs.bos_id) == 1 for pair in pairs)
        assert all(ids[-1] == theirs.eos_id not in ids[:-1] for p in pairs for ids in (p.chosen, p.rejected))
        assert all(theirs.decode(pair.chosen[:-1]).strip() for pair in pairs)


def test_the_byte_level_tokenizer_of_these_tests_loses_nothing():
    backend = byte_level_bpe()
    assert backend.decode(backend.encode(" two  spaces\n🙂 ").ids) == " two  spaces\n🙂 "


def words(tmp_path, template=None):
    """A tokenizer of four words and one for all others."""
    vocabulary = {"[UNK]": 0, "</s>": 1, "one": 2, "two": 3, "three": 4, "four": 5}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "unk_token": "[UNK]"}))
    return hf_tokenizer(str(tmp_path), template)


def test_unknown_tokens_are_counted_by_row_and_by_token(tmp_path):
    rows = [
        {"prompt": "one two", "chosen": " three", "rejected": " four"},
        {"prompt": "one zwei", "chosen": " drei three", "rejected": " four vier"},
    ]
    _, report = tokenize(rows, words(tmp_path))
    # 2 + 2 + 2 tokens and 2 + 3 + 3, the ends among them
    assert "with unknown tokens                     1   50.0 %   row 1" in str(report)
    assert "unknown tokens: 3 of 14, 21 %: the vocabulary has none for what is written there" in str(report)
    _, report = tokenize(rows[:1], words(tmp_path))
    assert "unknown" not in str(report)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:", True),
        ([chat("one")[0], {"role": "assistant", "content": "two"}, chat("three")[0]], True),
        ("one", False),
    ],
)
def test_that_turns_become_a_transcript_or_a_transcript_turns_is_told(plain, chatml, prompt, told):
    row = {"prompt": prompt, "chosen": " three", "rejected": " four"}
    form = r"'\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...\n\nAssistant:'"
    _, report = tokenize([row], plain)
    assert (f"prompts of several turns, 1 rows, are written as a transcript: {form}" in str(report)) == told
    _, report = tokenize([row], chatml)
    as_turns = "transcripts are read as turns, which the tokenizer writes in its own form"
    assert (as_turns in str(report)) == (told and isinstance(prompt, str)) and "as a transcript" not in str(report)
