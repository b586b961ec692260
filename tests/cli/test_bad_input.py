"""Broken inputs, as a table: each ends in a sentence that says where and what, or is dropped and counted by its row.

Nothing may end in a traceback, a hang or a silent success. Rows go through read_rows and tokenize_pairs, model files
from open_weights to models.load, configs through config.load and rehearse: as a recipe takes them.
"""

import gzip
import json
import os
import pickle
import re
import runpy
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import ROOT, SHARED, SIZES, save_llama
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from test_tokenizer import CHATML, GEMMA, save

from pairtune import config, models
from pairtune.cli import commands as cli
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint
from pairtune.folders.check_model import check_model
from pairtune.pairs.tokenize import read_rows, split_pairs, tokenize_pairs
from pairtune.process.dist import World
from pairtune.run import rehearsal
from pairtune.tokenizer.hf import adapt, hf_tokenizer

GOOD = {"prompt": "Is it good?", "chosen": "It is.", "rejected": "It is not."}
USER, BETTER, WORSE = ({"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "B"), ("assistant", "W")))
TALK = {"chosen": [USER, BETTER], "rejected": [USER, WORSE]}
SHAREGPT = {
    "conversations": [{"from": "human", "value": "Q"}],
    "chosen": {"from": "gpt", "value": "B"},
    "rejected": {"from": "gpt", "value": "W"},
}
HH = {"chosen": "\n\nHuman: Q\n\nAssistant: B", "rejected": "\n\nHuman: Q\n\nAssistant: W"}
INSTRUCTION = {"instruction": "Q", "input": "", "chosen": "B", "rejected": "W"}


def talk(*prompt):
    """A row of the form of TALK behind other messages."""
    return {"chosen": [*prompt, BETTER], "rejected": [*prompt, WORSE]}


def says(role, content="x"):
    return {"role": role, "content": content}


# Rows: one good row, the broken one, one good row. Its number is 1.

ROWS = [
    # name, good rows, the broken one, what is said of it
    ("a column is missing", GOOD, {"prompt": "Q", "chosen": "B"}, ["row 1", "'rejected' holds nothing (null)"]),
    ("null", GOOD, GOOD | {"chosen": None}, ["row 1", "'chosen' holds nothing (null)", "expected text"]),
    ("a number", GOOD, GOOD | {"chosen": 7}, ["row 1", "'chosen' holds int, 7", "Mend or remove the row"]),
    ("NaN", GOOD, GOOD | {"chosen": float("nan")}, ["row 1", "'chosen' holds float, nan"]),
    ("a list of numbers", GOOD, GOOD | {"rejected": [1, 2]}, ["row 1", "'rejected' holds list, [1, 2]"]),
    ("an object", GOOD, GOOD | {"prompt": {"text": "Q"}}, ["row 1", "'prompt' holds dict, {'text': 'Q'}"]),
    ("a truth value", GOOD, GOOD | {"chosen": True}, ["row 1", "'chosen' holds bool, True"]),
    ("empty prompt", GOOD, GOOD | {"prompt": ""}, ["dropped: empty prompt", "row 1"]),
    ("a prompt of spaces", GOOD, GOOD | {"prompt": " \n\t"}, ["dropped: empty prompt", "row 1"]),
    ("empty answer", GOOD, GOOD | {"rejected": ""}, ["dropped: empty answer", "row 1"]),
    ("an answer of spaces", GOOD, GOOD | {"chosen": "\u3000 \n"}, ["dropped: empty answer", "row 1"]),
    ("an answer of 10 MB", GOOD, GOOD | {"chosen": "word " * 2_000_000}, ["dropped: too long", "row 1"]),
    ("a prompt of 10 MB", GOOD, GOOD | {"prompt": "x" * 10_000_000}, ["dropped: too long", "row 1"]),
    ("identical answers", GOOD, GOOD | {"rejected": "It is."}, ["dropped: identical answers", "row 1"]),
    ("half a surrogate pair", GOOD, GOOD | {"chosen": "\ud800"}, ["dropped: chosen holds half a surrogate", "row 1"]),
    ("the same in a message", TALK, talk(says("user", "a\udfff")), ["dropped: prompt holds half a surrog", "row 1"]),
    ("a NUL character", GOOD, GOOD | {"rejected": "a\0b"}, ["dropped: rejected holds a NUL character", "row 1"]),
    ("text among messages", TALK, TALK | {"chosen": "B"}, ["row 1", "'chosen' holds text, 'B'", "list of messages"]),
    ("messages among text", GOOD, TALK | {"prompt": "Q"}, ["row 1", "'chosen' holds messages"]),
    ("system is a number", GOOD, GOOD | {"system": 5}, ["row 1", "'system' holds int, 5"]),
    ("history is a text", GOOD, GOOD | {"history": "a"}, ["row 1", "'history' holds text", "[question, answer]"]),
    ("history of three", GOOD, GOOD | {"history": [["a", "b", "c"]]}, ["row 1", "'history' holds list"]),
    ("an empty row", GOOD, {}, ["row 1", "'prompt' holds nothing"]),
    ("no message", TALK, TALK | {"chosen": []}, ["row 1", "'chosen' holds list, []", "expected list of messages"]),
    ("a message without content", TALK, talk({"role": "user"}), ["row 1", "'chosen'", "list of messages"]),
    ("content null", TALK, talk(says("user", None)), ["row 1", "'chosen'", "expected list of messages"]),
    ("content a list", TALK, talk(says("user", ["a"])), ["row 1", "content is list, expected text"]),
    ("a message without role", TALK, talk({"content": "Q"}), ["row 1", "'chosen' holds list"]),
    ("an unknown role", TALK, talk(says("critic")), ["row 1", "role 'critic'; known are system, user"]),
    ("a role that is a number", TALK, talk(says(5)), ["row 1", "role 5; known are"]),
    ("a role that is a list", TALK, talk(says(["user"])), ["row 1", "role ['user']; known are"]),
    ("a role that is an object", TALK, talk(says({"name": "user"})), ["row 1", "role {'name': 'user'}; known are"]),
    ("assistant first", TALK, talk(says("assistant"), USER), ["roles out of order", "row 1"]),
    ("two users", TALK, talk(USER, USER), ["roles out of order", "row 1"]),
    ("system in the middle", TALK, talk(USER, says("system"), USER), ["roles out of order", "row 1"]),
    ("two assistants", TALK, talk(USER, says("assistant")), ["dropped: the prompt ends with an answer", "row 1"]),
    ("ends with the user", TALK, TALK | {"chosen": [USER, BETTER, USER]}, ["dropped: no answer at the end", "row 1"]),
    ("answers alone", TALK, talk(), ["row 1", "hold an answer only, and there is no column 'prompt'"]),
    ("prompts differ", TALK, TALK | {"chosen": [says("user", "O"), BETTER]}, ["dropped: prompts differ", "row 1"]),
    ("one prompt is longer", TALK, TALK | {"chosen": [USER, BETTER, USER, BETTER]}, ["dropped: prompts differ"]),
    ("a tool call", TALK, talk(USER, {"role": "assistant", "tool_calls": [{}]}, USER), ["row 1", "no list of calls"]),
    ("ShareGPT, wrong keys", SHAREGPT, SHAREGPT | {"chosen": {"who": "gpt", "text": "B"}}, ["row 1", "'chosen'"]),
    ("ShareGPT, a wrong turn", SHAREGPT, SHAREGPT | {"conversations": [{"human": "Q"}]}, ["row 1", "'conversations'"]),
    ("ShareGPT, the user answers", SHAREGPT, SHAREGPT | {"chosen": {"from": "human", "value": "B"}},
     ["row 1", "'chosen' continues the prompt with (user), expected one assistant message"]),
    ("HH without an Assistant turn", HH, HH | {"chosen": "\n\nHuman: Q"}, ["dropped: no answer at the end", "row 1"]),
    ("HH that ends with Human", HH, HH | {"chosen": HH["chosen"] + "\n\nHuman: R"}, ["dropped: no answer", "row 1"]),
    ("HH with another prompt", HH, HH | {"chosen": "\n\nHuman: R\n\nAssistant: B"}, ["dropped: prompts differ"]),
    ("HH among text", HH, HH | {"chosen": "Hello"}, ["row 1", "'chosen' holds text, 'Hello'", "starts with"]),
    ("no instruction", INSTRUCTION, INSTRUCTION | {"instruction": ""}, ["dropped: empty prompt", "row 1"]),
    ("input is a number", INSTRUCTION, INSTRUCTION | {"input": 3}, ["row 1", "'input' holds int, 3"]),
]  # fmt: skip


def read(path, request, *, val_fraction=None, **options):
    """Returns what the report of a source says, as a recipe comes to it; with every tokenizer there is here."""
    said = []
    for tokenizer in request.getfixturevalue("tokenizers_here"):
        rows = read_rows(str(path), **options)
        pairs, report = tokenize_pairs(rows, tokenizer, max_length=512, progress=False)
        if val_fraction:
            split_pairs(pairs, val_fraction)
        said.append(str(report))
    return min(said)  # what is looked for has to be in each; these are of equal content but for lengths


def row_case(good, broken):
    def attempt(tmp_path, request):
        path = tmp_path / "pairs.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in (good, broken, good)))
        return read(path, request)

    return attempt


@pytest.fixture(scope="module")
def tokenizers_here(tmp_path_factory):
    """One with a chat template; and, where the real one is, one that writes plain text."""
    made = hf_tokenizer(save(tmp_path_factory.mktemp("tokenizer") / "chatml", chat_template=CHATML))
    stories = SHARED / "models/stories260K-hf"
    return [made, hf_tokenizer(str(stories))] if stories.is_dir() else [made]


# Files and folders of rows

LINES = "".join(json.dumps(GOOD) + "\n" for _ in range(4))
COMMAS = "prompt,chosen,rejected\nQ,B,W\n"
CORRUPT = bytearray(gzip.compress(LINES.encode() * 50))
CORRUPT[20:40] = b"\xff" * 20
NOT_UTF_8 = pyarrow.array([b"\xff"]).view(pyarrow.string())


def parquet(**columns):
    def write(path):
        names, values = zip(*((name.rstrip("_"), pyarrow.array(value)) for name, value in columns.items()), strict=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(list(values), list(names)), path)

    return write


def folder(**files):
    """A folder of files, `a__jsonl` for a.jsonl; None is a folder within."""

    def write(path):
        path.mkdir()
        for name, text in files.items():
            inside = path / name.replace("__", ".")
            inside.mkdir() if text is None else inside.write_text(text)

    return write


def unreadable(path):
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    path.write_text(LINES)
    path.chmod(0)


FILES = [
    # name, file, its content, options of read_rows, what is said
    ("no such file", "piars.jsonl", None, {}, ["dataset.source=", "piars.jsonl: there is no such file"]),
    ("a name too long", "n" * 300 + ".jsonl", None, {}, ["dataset.source=", "cannot be read", "File name too long"]),
    ("a suffix that nobody reads", "a.txt", "hello", {}, ["a.txt: of files, .json, .jsonl, .csv, .parquet are read"]),
    ("an archive", "a.zip", b"PK\3\4", {}, ["a.zip: of files, .json, .jsonl, .csv, .parquet are read"]),
    ("unreadable", "a.jsonl", unreadable, {}, ["a.jsonl cannot be read", "Permission denied"]),
    ("neither a file nor a folder", "a.jsonl", os.mkfifo, {}, ["a.jsonl: is neither a file nor a folder"]),
    ("empty", "a.jsonl", "", {}, ["a.jsonl has no rows"]),
    ("empty JSON", "a.json", "", {}, ["a.json, line 1: invalid JSON"]),
    ("an empty list", "a.json", "[]", {}, ["a.json has no rows"]),
    ("empty CSV", "a.csv", "", {}, ["a.csv has no rows"]),
    ("a header alone", "a.csv", "prompt,chosen,rejected\n", {}, ["a.csv has no rows"]),
    ("an empty gzip", "a.jsonl.gz", b"", {}, ["a.jsonl.gz has no rows"]),
    ("gzip, truncated", "a.jsonl.gz", gzip.compress(LINES.encode())[:-9], {}, ["a.jsonl.gz cannot be read"]),
    ("gzip, corrupt", "a.jsonl.gz", bytes(CORRUPT), {}, ["a.jsonl.gz cannot be read"]),
    ("gzip that is none", "a.jsonl.gz", LINES, {}, ["a.jsonl.gz cannot be read", "Not a gzipped file"]),
    ("gzip without its suffix", "a.jsonl", gzip.compress(LINES.encode()), {}, ["a.jsonl is compressed", "a.jsonl.gz"]),
    ("invalid UTF-8", "a.jsonl", LINES.replace("good", "gööd").encode("latin-1"), {}, ["a.jsonl cannot be", "UTF-8"]),
    ("UTF-16", "a.jsonl", LINES.encode("utf-16"), {}, ["a.jsonl cannot be read", "save it as UTF-8"]),
    ("a line cut short", "a.jsonl", LINES + '{"prompt": "Q', {}, ["a.jsonl, line 5: invalid JSON", "column 12"]),
    ("two objects a line", "a.jsonl", LINES + "{}{}", {}, ["a.jsonl, line 5: invalid JSON, Extra data"]),
    ("a number of 5,000 digits", "a.jsonl", LINES + '{"a": ' + "1" * 5000 + "}", {}, ["a.jsonl, line 5: invalid JSON"]),
    ("10,000 brackets", "a.jsonl", LINES + "[" * 10_000, {}, ["a.jsonl, line 5: invalid JSON", "recursion depth"]),
    ("10,000 brackets first", "a.json", "[" * 10_000, {}, ["a.json, line 1: invalid JSON", "recursion depth"]),
    ("a list in JSON Lines", "a.jsonl", json.dumps([GOOD]), {}, ["a.jsonl, line 1: holds list", ".json file"]),
    ("a list over lines", "a.jsonl", json.dumps([GOOD], indent=1), {}, ["a.jsonl, line 1: holds list", ".json file"]),
    ("lines of text", "a.jsonl", LINES + '"Q"\n', {}, ["a.jsonl, line 5: holds str, expected an object"]),
    ("JSON cut short", "a.json", json.dumps([GOOD])[:-9], {}, ["a.json, line 1: invalid JSON"]),
    ("a list of lists", "a.json", '[["Q", "B", "W"]]', {}, ["a.json, row 0 (from 0): holds list"]),
    ("one object", "a.json", json.dumps({"rows": [GOOD]}), {}, ["a.json is one object", "that hold a list: rows"]),
    ("a key twice", "a.jsonl", LINES + '{"chosen": "a", "chosen": "b"}', {}, ["line 5", "'chosen' stands twice"]),
    ("CSV, a cell too few", "a.csv", COMMAS + "Q,B\n", {}, ["a.csv, line 3: not as many cells"]),
    ("CSV, a cell too many", "a.csv", COMMAS + "Q,B,W,X\n", {}, ["a.csv, line 3: not as many cells"]),
    ("CSV, an open quote", "a.csv", COMMAS + '"Q,B,W\n', {}, ["a.csv, line 3: invalid CSV", "unexpected end"]),
    ("CSV, text behind a quote", "a.csv", COMMAS + '"Q"x,B,W\n', {}, ["a.csv, line 3: invalid CSV"]),
    ("CSV without header", "a.csv", "Q,B,W\nQ2,B2,W2\n", {},
     ["a.csv: no known format", "Q: text, 'Q2'", "columns={prompt: Q, chosen: CHOSEN"]),
    ("CSV without header, of sentences", "a.csv", f"{'What is it? ' * 4},It is this.,No.\n" * 2, {},
     ["has no header: its first row stands", "such as prompt,chosen,rejected"]),
    ("CSV, a column twice", "a.csv", "prompt,chosen,chosen\nQ,B,W\n", {}, ["a.csv, line 1: columns of one name"]),
    ("CSV, semicolons", "a.csv", COMMAS.replace(",", ";"), {}, ["a.csv, line 1: columns are separated by", "commas"]),
    ("parquet, zero bytes", "a.parquet", b"", {}, ["a.parquet cannot be read"]),
    ("parquet, garbage", "a.parquet", b"PAR1" + b"\0" * 40 + b"PAR1", {}, ["a.parquet cannot be read"]),
    ("parquet, a column twice", "a.parquet", parquet(prompt=["Q"], chosen=["B"], chosen_=["C"], rejected=["W"]), {},
     ["a.parquet", "columns of one name, chosen"]),
    ("parquet of bytes", "a.parquet", parquet(prompt=[b"Q"], chosen=[b"B"], rejected=[b"W"]), {},
     ["a.parquet, row 0 (from 0): column 'prompt' holds bytes", "expected text or list of messages"]),
    ("parquet, a null", "a.parquet", parquet(prompt=["Q", None], chosen=["B"] * 2, rejected=["W"] * 2), {},
     ["a.parquet, row 1", "'prompt' holds nothing"]),
    ("parquet, not UTF-8", "a.parquet", parquet(prompt=NOT_UTF_8, chosen=["B"], rejected=["W"]), {},
     ["a.parquet cannot be read", "UTF8"]),
    ("no known columns", "a.jsonl", '{"question": "Q", "good": "B", "bad": "W"}', {},
     ["a.jsonl: no known format", "question: text, 'Q'", "{prompt: question, chosen: good, rejected: bad}"]),
    ("rows without columns", "a.jsonl", "{}\n{}", {}, ["a.jsonl: no known format"]),
    ("an empty folder", "data", folder(), {}, ["data: the folder cannot be read as a dataset"]),
    ("a folder named like a file", "a.jsonl", folder(), {}, ["a.jsonl: the folder cannot be read as a dataset"]),
    ("a folder of other files", "data", folder(readme__md="Pairs."), {}, ["data: the folder cannot be read"]),
    ("a folder with a broken file", "data", folder(train__jsonl=LINES + "{"), {}, ["train.jsonl, line 5: invalid"]),
    ("a folder with a folder.csv", "data", folder(a__jsonl=LINES, b__csv=None), {}, ["b.csv cannot be read"]),
    ("a folder of two forms", "data", folder(a__jsonl=LINES, b__jsonl='{"x": 1}\n'), {},
     ["b.jsonl, row 0 (from 0): column 'prompt' holds nothing", "1 rows of 5 are broken, 20.0 %"]),
    ("an unknown split", "a.jsonl", LINES, {"split": "test"}, ["split='test' does not fit", "train (4 rows)"]),
    ("an empty slice", "a.jsonl", LINES, {"split": "train[2:2]"}, ["a.jsonl has no rows in this split"]),
    ("a slice backwards", "a.jsonl", LINES, {"split": "train[3:1]"}, ["a.jsonl has no rows in this split"]),
    ("a slice beyond the end", "a.jsonl", LINES, {"split": "train[200%:]"}, ["split='train[200%:]' does not fit"]),
    ("a slice past the last row", "a.jsonl", LINES, {"split": "train[90:]"}, ["a.jsonl has no rows in this split"]),
    ("a slice without end", "a.jsonl", LINES, {"split": "train[:10%"}, ["split='train[:10%'"]),
    ("a slice with a step", "a.jsonl", LINES, {"split": "train[::2]"}, ["split='train[::2]'"]),
    ("no split", "a.jsonl", LINES, {"split": ""}, ["split=''"]),
    ("limit 0", "a.jsonl", LINES, {"limit": 0}, ["dataset.limit=0: must be at least 1"]),
    ("a name of a file", "a.jsonl", LINES, {"name": "main"}, ["dataset.name=main has no effect"]),
    ("a revision of a file", "a.jsonl", LINES, {"revision": "v1"}, ["dataset.revision=v1 has no effect"]),
    ("nothing held out", "a.jsonl", LINES, {"val_fraction": 0.01}, ["dataset.val_fraction=0.01 of 4 pairs"]),
    ("all held out", "a.jsonl", LINES, {"val_fraction": 0.99}, ["dataset.val_fraction=0.99 of 4 pairs"]),
    ("a column that is not there", "a.jsonl", LINES, {"columns": {"chosen": "choosen"}},
     ["dataset.columns.chosen=choosen: ", "has no such column", "Did you mean chosen"]),
    ("a column of no use", "a.jsonl", LINES, {"columns": {"answer": "chosen"}},
     ["dataset.columns.answer: no column of"]),
    ("a column named by a number", "a.jsonl", LINES, {"columns": {1: "chosen"}}, ["dataset.columns.1: no column of"]),
    ("a column that is a list", "a.jsonl", LINES, {"columns": {"chosen": ["a"]}}, ["columns.chosen=['a']", "no such"]),
    ("two columns from one", "a.jsonl", LINES, {"columns": dict.fromkeys(("chosen", "rejected"), "rejected")},
     ["there is nothing left", "identical answers"]),
]  # fmt: skip


def file_case(name, content, options):
    def attempt(tmp_path, request):
        path = tmp_path / name
        if callable(content):
            content(path)
        elif content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read(path, request, **options)

    return attempt


# Model files: each case breaks a copy of a good folder, two shards with an index

INDEX, FIRST = "model.safetensors.index.json", "model-00001-of-00002.safetensors"
EMBEDDING, QUERY = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "llama"
    save_llama(path, sizes=SIZES)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shards = [FIRST if "layers.0" in name or "embed" in name else FIRST.replace("1-", "2-") for name in weights]
    for shard in set(shards):
        part = {name: value for (name, value), home in zip(weights.items(), shards, strict=True) if home == shard}
        save_file(part, path / shard, {"format": "pt"})
    (path / INDEX).write_text(json.dumps({"weight_map": dict(zip(weights, shards, strict=True))}))
    return path


def load_model(path, model_type="LLAMA3"):
    """What a recipe does with a model's files, up to the filled model."""
    block = {"_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(path)}
    files = checkpoint.open_weights(OmegaConf.create(block | {"model_type": model_type}))
    tokenizer = adapt(hf_tokenizer(str(path)))
    model = models.full({"_component_": "torchtune.models.llama3.llama3", **SIZES}, dtype="fp32")
    models.prepare(model, max_length=128, vocab_size=tokenizer.vocab_size)
    check_model(model, checkpoint.read_config(str(path)))
    tokenize_pairs([GOOD], tokenizer, max_length=128)
    models.load(model, checkpoint.Weights(files), world=World(torch.device("cpu")))


def edit(name, **values):
    """Sets keys of a JSON file; None takes a key out."""

    def change(path):
        content = json.loads((path / name).read_text()) | values
        (path / name).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return change


def write(name, content):
    return lambda path: (path / name).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(name):
    return lambda path: (path / name).unlink()


def cut(name, keep):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:keep])


def tensors(change, shard=FIRST):
    """Changes the tensors of a shard in place."""

    def apply(path):
        weights = {name: value.clone() for name, value in load_file(path / shard).items()}
        change(weights)
        save_file(weights, path / shard, {"format": "pt"})

    return apply


def index(change):
    def apply(path):
        content = json.loads((path / INDEX).read_text())
        change(content["weight_map"])
        (path / INDEX).write_text(json.dumps(content))

    return apply


def broken_value(value):
    def change(weights):
        weights[QUERY][3, 4] = value

    return tensors(change)


def end_token(text, number):
    def change(path):
        edit("tokenizer_config.json", eos_token=text)(path)
        edit("config.json", eos_token_id=number)(path)

    return change


def template(text):
    return edit("tokenizer_config.json", chat_template=text)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


def pickled(make):
    """The folder's weights are one pickle."""

    def change(path):
        for file in path.glob("model*"):
            file.unlink()
        make(path / "pytorch_model.bin")

    return change


def no_unknown(path):
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["unk_token"] = "absent"
    (path / "tokenizer.json").write_text(json.dumps(content))


def tokenizer_of_another_model(path):
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 400)}}
    content = json.loads((path / "tokenizer.json").read_text())
    content["model"]["vocab"] = words
    (path / "tokenizer.json").write_text(json.dumps(content))


LOOP = "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
MODELS = [
    # name, how to break the folder, what is said
    ("no folder", shutil.rmtree, ["checkpointer.checkpoint_dir=", "no such folder", "tune download"]),
    ("no config.json", remove("config.json"), ["holds no config.json"]),
    ("config.json, broken", write("config.json", "{"), ["config.json", "cannot be read", "line 1"]),
    ("config.json, empty", write("config.json", ""), ["config.json", "cannot be read"]),
    ("config.json, a list", write("config.json", "[1]"), ["config.json: must hold keys and values, holds [1]"]),
    ("config.json, not UTF-8", write("config.json", b"\xff\xfe{}"), ["config.json", "cannot be read", "utf-8"]),
    *(
        (f"config.json without {key}", edit("config.json", **{key: None}), [f"config.json: {key}: is missing"])
        for key in ("model_type", "hidden_size", "num_attention_heads", "num_hidden_layers")
    ),
    *(
        (f"config.json, {key}={value!r}", edit("config.json", **{key: value}), [f"config.json: {key}=", says])
        for key, value, says in (
            ("num_attention_heads", "4", "must be a whole number"),
            ("num_attention_heads", 0, "must be above 0"),
            ("num_key_value_heads", 1.5, "must be a whole number"),
            ("hidden_size", [64], "must be a whole number"),
            ("vocab_size", "many", "must be a whole number"),
            ("num_hidden_layers", True, "must be a whole number"),
            ("head_dim", -16, "must be above 0"),
            ("rope_theta", "10000", "must be a number"),
            ("rope_theta", float("nan"), "above 0 and finite"),
            ("rope_scaling", "linear", "must be a block of keys"),
            ("rms_norm_eps", {}, "must be a number"),
            ("tie_word_embeddings", "false", "must be true or false"),
            ("model_type", 5, "must be text"),
        )
    ),
    ("config.json, rope_scaling.factor", edit("config.json", rope_scaling={"factor": "8"}),
     ["config.json: rope_scaling.factor='8': must be a number"]),
    *(
        (f"config.json, {key}", edit("config.json", rope_scaling=rope), [f"config.json: rope_scaling.{key}", says])
        for rope, key, says in (
            ({"type": "linear", "factor": 4.0}, "type=linear", "must be default or llama3"),
            ({"rope_type": "yarn", "factor": 4.0}, "rope_type=yarn", "the builder of model_type=llama"),
            ({"rope_type": "longrope", "long_factor": [1.0]}, "rope_type=longrope", "must be default or llama3"),
            ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 4096},
             "original_max_position_embeddings=4096", "must be 8192"),
        )
    ),
    ("another vocabulary", edit("config.json", vocab_size=999),
     ["vocab_size is 320 in `model` and 999 in config.json"]),
    ("another depth", edit("config.json", num_hidden_layers=9), ["num_hidden_layers is 3", "do not belong together"]),
    ("another rope", edit("config.json", rope_theta=5e5), ["rope_theta is 10000.0 in `model` and 500000.0"]),
    ("another architecture", edit("config.json", model_type="mistral"), ["model_type=LLAMA3", "which is MISTRAL here"]),
    ("an unknown architecture", edit("config.json", model_type="mamba"),
     ["config.json: model_type=mamba (LlamaForCausalLM): torchtune has no builder for it, only for llama, mistral"]),
    ("quantized", edit("config.json", quantization_config={"quant_method": "gptq"}), ["quantization_config", "gptq"]),
    ("no weights", lambda path: [file.unlink() for file in path.glob("model*")], ["holds no weights; looked for"]),
    ("a missing shard", remove(FIRST), [INDEX, "names 2 shards, 1 of them are missing", FIRST]),
    ("the index, broken", write(INDEX, "{"), [INDEX, "cannot be read", "download it again"]),
    ("the index, a list", write(INDEX, "[]"), [INDEX, "has no weight_map"]),
    ("the index without weight_map", write(INDEX, "{}"), [INDEX, "has no weight_map"]),
    ("the index, weight_map a list", write(INDEX, '{"weight_map": []}'), [INDEX, "has no weight_map"]),
    ("the index, files as numbers", write(INDEX, '{"weight_map": {"a": 1}}'), [INDEX, "has no weight_map"]),
    ("the index names a file elsewhere", index(lambda names: names.update(a="../a.bin")), [INDEX, "../a.bin"]),
    ("the index names a tensor too many", index(lambda names: names.update(ghost=FIRST)), [INDEX, "ghost", FIRST]),
    ("a shard lacks a tensor", tensors(lambda weights: weights.pop(QUERY)), [QUERY, FIRST, "download"]),
    ("a shard has one that no index names", tensors(lambda w: w.update(extra=torch.ones(1))), ["extra", FIRST]),
    ("a tensor in two shards", tensors(lambda w: w.update({"lm_head.weight": torch.ones(320, 64)})),
     ["lm_head.weight", FIRST, "model-00002-of-00002.safetensors", "twice"]),
    ("zero bytes", cut(FIRST, 0), [FIRST, "cannot be read", "download it again"]),
    ("garbage", write(FIRST, b"\xff" * 4096), [FIRST, "cannot be read", "download it again"]),
    ("the header cut short", cut(FIRST, 40), [FIRST, "cannot be read", "download it again"]),
    ("the tensors cut short", cut(FIRST, 20_000), [FIRST, "cannot be read", "download it again"]),
    ("a wrong shape", tensors(lambda w: w.update({EMBEDDING: torch.ones(300, 64)})),
     ["[300, 64] in the checkpoint, [320, 64] in the model: tok_embeddings.weight (model.embed_tokens.weight"]),
    ("a wrong shape of a query", tensors(lambda w: w.update({QUERY: torch.ones(63, 64)})), [FIRST, QUERY, "[63, 64]"]),
    ("a vector for a matrix", tensors(lambda w: w.update({QUERY: torch.ones(64)})), [FIRST, QUERY, "[64]"]),
    ("int8 weights", tensors(lambda w: w.update({QUERY: w[QUERY].to(torch.int8)})),
     [FIRST, QUERY, "int8", "quantized"]),
    ("float8 weights", tensors(lambda w: w.update({QUERY: w[QUERY].to(torch.float8_e4m3fn)})),
     [FIRST, QUERY, "float8"]),
    ("a tensor of another model", tensors(lambda w: w.update({"transformer.h.0": w.pop(QUERY)})), [QUERY, FIRST]),
    ("NaN weights", broken_value(float("nan")), [FIRST, QUERY, "NaN or infinite"]),
    ("infinite weights", broken_value(float("-inf")), [FIRST, QUERY, "NaN or infinite"]),
    ("a pickle that runs code", pickled(lambda file: torch.save({"a": Code()}, file)),
     ["pytorch_model.bin", "safetensors"]),
    ("an old pickle that runs code", pickled(lambda file: file.write_bytes(pickle.dumps(Code()))),
     ["pytorch_model.bin"]),
    ("a pickle of a list", pickled(lambda file: torch.save([torch.ones(1)], file)), ["pytorch_model.bin", "by name"]),
    ("a pickle of numbers", pickled(lambda file: torch.save({QUERY: 3}, file)),
     ["pytorch_model.bin", QUERY, "by name"]),
    ("a pickle of zero bytes", pickled(lambda file: file.touch()), ["pytorch_model.bin", "cannot be read"]),
    ("a page for a pickle", pickled(lambda file: file.write_text("<html>")), ["pytorch_model.bin", "cannot be read"]),
    ("no tokenizer", remove("tokenizer.json"), ["tokenizer.path", "has no tokenizer.json"]),
    ("tokenizer.json, broken", write("tokenizer.json", "{"), ["tokenizer.json cannot be read"]),
    ("tokenizer.json, a page", write("tokenizer.json", "<html>"), ["tokenizer.json cannot be read"]),
    ("tokenizer.json, empty", write("tokenizer.json", ""), ["tokenizer.json cannot be read"]),
    ("tokenizer.json without what an unknown word becomes", no_unknown,
     ["row 0", "tokenizer.json cannot write this text as tokens"]),
    ("another model's tokenizer", tokenizer_of_another_model, ["tokenizer: has 400 token ids, the model embeds 320"]),
    ("tokenizer_config.json, a list", write("tokenizer_config.json", "[]"), ["tokenizer_config.json: must hold keys"]),
    ("tokenizer_config.json, broken", write("tokenizer_config.json", "{"), ["tokenizer_config.json: cannot be read"]),
    ("no end token", end_token(None, None), ["eos_token is 'not set'"]),
    ("an end token that is none", end_token("<end>", 2), ["eos_token is '<end>'"]),
    ("an end token that is a number", end_token(2, 2), ["eos_token is 2"]),
    ("an end token without content", end_token({"a": 1}, 2), ["eos_token is {'a': 1}"]),
    ("an end token beyond the last", end_token(None, 5000), ["eos_token is 'token 5000', which is no token"]),
    ("an end token's number as text", end_token("</s>", "2"), ["config.json: eos_token_id=['2']: must be"]),
    ("a template, syntax", template("{% for %}"), ["tokenizer.path=", "The chat template is not valid Jinja (line 1)"]),
    ("a template, an unknown filter", template("{{ messages | no }}"), ["not valid Jinja", "no"]),
    ("a template that is a number", template(5), ["chat_template", "must be text"]),
    ("a template list without names", template([{"text": "x"}]), ["chat_template", "name", "template"]),
    ("a template, not UTF-8", write("chat_template.jinja", b"\xff{{ x }}"), ["chat_template.jinja", "UTF-8"]),
    ("a template that refuses all", template(GEMMA.replace("m.role == 'system'", "true")),
     ["nothing left", "no system"]),
    ("a template that raises", template("{{ 1 // 0 }}"), ["nothing left", "refused by the chat template", "zero"]),
    ("a template past a list's end", template("{{ messages[9].content }}"),
     ["nothing left", "refused", "no element 9"]),
    ("a template that calls itself", template("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
     ["nothing", "recursion"]),
    ("a template that counts far", template("{% for i in range(10**9) %}{% endfor %}"), ["nothing left", "too big"]),
    ("a template without end", template(LOOP), ["row 0", "The chat template counts more than 1,000,000 steps"]),
    ("a template for Python's inside", template("{{ ''.__class__ }}"), ["nothing left", "'__class__'", "unsafe"]),
    ("the same by another way", template("{{ raise_exception.__globals__ }}"), ["nothing left", "unsafe"]),
    ("a template that imports", template("{% include '/etc/passwd' %}"), ["nothing left", "refused by the chat"]),
    ("a template that writes nothing", template("{{ '' }}"), ["does not write the last assistant message"]),
    ("a template that drops the answer", template("{{ messages[0].content }}"), ["does not write the last assistant"]),
]  # fmt: skip


def model_case(change):
    def attempt(tmp_path, request):
        path = tmp_path / "model"
        shutil.copytree(request.getfixturevalue("llama"), path)
        change(path)
        load_model(path)

    return attempt


# Configs: YAML behind one that is good, or a key=value

RECIPE = runpy.run_path(str(ROOT / "recipes" / "lora_dpo_single_device.py"))
BASE = """
model: {_component_: torchtune.models.llama3.llama3_8b}
checkpointer: {checkpoint_dir: /weights, model_type: LLAMA3}
dataset: {source: pairs.jsonl}
"""
LOSSES = """
class Loss:
    def __call__(self, chosen, rejected, ref_chosen, ref_rejected):
        return self.result(chosen, rejected)

class Nothing(Loss):
    def result(self, chosen, rejected):
        pass

class Detached(Loss):
    def result(self, chosen, rejected):
        return chosen.detach(), chosen, rejected

class Mean(Loss):
    def result(self, chosen, rejected):
        return (chosen - rejected).mean(), chosen, rejected

class Words(Loss):
    def result(self, chosen, rejected):
        return "a", "b", "c"

class Raises(Loss):
    def result(self, chosen, rejected):
        raise KeyError("beta")

def plain(chosen, rejected, ref_chosen, ref_rejected):
    return chosen - rejected, chosen, rejected
"""
TEXTS = [
    # name, the file, what is said
    ("a file with nothing in it", "", ["checkpointer.checkpoint_dir: has no default", "; nor have "]),
    ("comments only", "# later\n", ["checkpointer.checkpoint_dir: has no default", "dataset.source"]),
    ("a list", "- 1\n", ["broken.yaml: must hold keys and values"]),
    ("a text", "hello\n", ["broken.yaml: unknown key hello"]),
    ("a bracket open", BASE + "seed: [1", ["broken.yaml: not valid YAML", "line 6"]),
    ("a tab", BASE + "loss:\n\tbeta: 1\n", ["broken.yaml: not valid YAML", "line 6"]),
    ("a key twice", BASE + "seed: 1\nseed: 2\n", ["broken.yaml: seed stands twice, in lines 5 and 6"]),
    ("a key twice within", BASE + "loss: {beta: 1, beta: 2}\n", ["loss.beta stands twice, in line 5"]),
    ("not UTF-8", b"seed: \xff", ["broken.yaml: not valid YAML", "utf-8"]),
    ("NUL characters", b"seed: 1\0", ["broken.yaml: not valid YAML"]),
    ("two documents", BASE + "---\nseed: 1\n", ["broken.yaml: not valid YAML"]),
    ("Python in YAML", BASE + "seed: !!python/object/apply:os.getcwd []\n", ["broken.yaml: not valid YAML", "python"]),
    ("an anchor in itself", BASE + "samples: &a {prompts: [*a]}\n", ["broken.yaml: not valid YAML"]),
    ("a key that is a list", BASE + "[1]: 2\n", ["broken.yaml: not valid YAML"]),
    ("a key that is a number", BASE + "1: 2\n", ["broken.yaml: unknown key 1"]),
    ("a key that is null", BASE + "null: 2\n", ["broken.yaml"]),
    ("a typo", BASE + "lose: {beta: 1}\n", ["broken.yaml: unknown key lose", "nearest: loss"]),
    ("a typo within", BASE + "lora: {rnak: 1}\n", ["broken.yaml: unknown key lora.rnak", "nearest: lora.rank"]),
    ("TRL's name", BASE + "learning_rate: 1\n", ["unknown key learning_rate", "here it is called optimizer.lr"]),
    ("a block for a number", BASE + "seed: {a: 1}\n", ["seed={a: 1}: must be a whole number, is a block of keys"]),
    ("a number for a block", BASE + "lora: 8\n", ["lora=8: must be a block of keys"]),
    ("another method", BASE + "per_method: {dora: {seed: 1}}\n", ["per_method.dora: must be one of full, lora, qlora"]),
    ("per_method in per_method", BASE + "per_method: {lora: {per_method: {}}}\n", ["unknown key per_method"]),
    ("for another method", BASE + "per_method: {full: {epochs: 0}}\n", ["with per_method.full: epochs=0"]),
    ("no model", "checkpointer: {checkpoint_dir: /w, model_type: LLAMA3}\ndataset: {source: a}", ["no such folder"]),
    ("no weights", "model: {_component_: a.b}\ndataset: {source: a}", ["checkpointer.checkpoint_dir: has no default"]),
    ("no pairs", BASE.replace("{source: pairs.jsonl}", "{}"), ["dataset.source: has no default"]),
    ("offloading on a CPU", BASE + "enable_activation_offloading: true\ndevice: cpu\n",
     ["enable_activation_offloading=true: keeps", "where a CPU has them; nearest valid: enable_activation_offload"]),
    ("offloading what is kept", BASE + "enable_activation_offloading: true\nenable_activation_checkpointing: false\n",
     ["with enable_activation_checkpointing=false a layer keeps more", "valid: enable_activation_checkpointing=true"]),
]  # fmt: skip
OPTIONS = [
    # key=value, what is said
    ('seed="1"', ["seed=1: must be a whole number, is text"]),
    ('compile="true"', ["compile=true: must be true, false or auto; nearest valid: compile=true"]),
    (
        "enable_activation_checkpointing=selectiv",
        ["selective or auto; nearest valid: enable_activation_checkpointing=selective"],
    ),
    ("compile=1", ["compile=1: must be true, false or auto; nearest valid: compile=true"]),
    ('loss.beta="0.1"', ["loss.beta=0.1: must be a number, is text"]),
    ("epochs=true", ["epochs=true: must be a number"]),
    ("epochs=0", ["epochs=0: must be above 0", "epochs=1"]),
    ("epochs=-0.5", ["epochs=-0.5: must be above 0", "epochs=1"]),
    ("eval_every_n_epochs=0.5", ["eval_every_n_epochs=0.5: there is nothing to evaluate on"]),
    ("max_completion_length=0", ["max_completion_length=0: must be at least 1"]),
    ("max_completion_length=1024", ["max_completion_length=1024: must be below max_length=1024"]),
    ("seed=null", ["seed=null: must be a whole number"]),
    ("seed=-1", ["seed=-1: must be at least 0"]),
    ('output_dir=""', ["output_dir=: must be text, and not empty"]),
    ("output_dir=null", ["output_dir=null: must be text"]),
    ('dataset.source=" "', ["dataset.source= : must be text, and not empty"]),
    ("dataset.limit=0", ["dataset.limit=0: must be at least 1"]),
    ("dataset.val_fraction=1", ["dataset.val_fraction=1: must be above 0 and below 1"]),
    ("dataset.val_fraction=.nan", ["dataset.val_fraction=nan: must be a finite number"]),
    ("dataset.overlong=cut", ["dataset.overlong=cut: must be one of drop, trim_prompt, error"]),
    ("optimizer.lr=-1", ["optimizer.lr=-1: must be greater than 0"]),
    ("optimizer.lr=0", ["optimizer.lr=0: must be greater than 0"]),
    ("optimizer.lr=.nan", ["optimizer.lr=nan: must be a finite number"]),
    ("optimizer.lr=fast", ["optimizer.lr=fast: must be a number"]),
    ("optimizer.eps=.inf", ["optimizer.eps=inf: must be a finite number"]),
    ("optimizer.weight_decay=-1", ["optimizer.weight_decay=-1", "torch.optim.AdamW refuses"]),
    ("optimizer.betas=[.nan,0.9]", ["optimizer.betas=[nan,0.9]"]),
    ("optimizer.betas=[2,0.9]", ["optimizer.betas=[2,0.9]", "torch.optim.AdamW refuses"]),
    ("loss.beta=.inf", ["loss.beta=inf: must be a finite number"]),
    ("loss.beta=1e400", ["loss.beta=inf: must be a finite number"]),
    ("loss.beta=0", ["loss.beta=0: must be greater than 0"]),
    ("loss.label_smoothing=1", ["loss.label_smoothing=1: must be at least 0 and below 0.5"]),
    ("lora.alpha=.nan", ["lora.alpha=nan: must be a finite number"]),
    ("lora.rank=1000000000000", ["lora.rank=1000000000000: must be"]),
    ("lora.dropout=1", ["lora.dropout=1: must be at least 0 and below 1"]),
    ("lora.modules=[]", ["lora.modules=[]: must be a list of at least one of q_proj"]),
    ("max_length=1", ["max_length=1: must be at least 2"]),
    ("max_prompt_length=1024", ["max_prompt_length=1024: must be below max_length=1024"]),
    ("batch_size=5", ["batch_size=5: must divide pairs_per_step=64"]),
    ("batch_size=0", ["batch_size=0: must be auto, or a whole number, at least 1; nearest valid: batch_size=1"]),
    ("pairs_per_step=1000000000007", ["pairs_per_step=1000000000007: must be"]),
    ("clip_grad_norm=.inf", ["clip_grad_norm=inf: must be a finite number", "clip_grad_norm=null"]),
    ("device=tpu", ["device=tpu: must be auto, cpu, cuda or cuda:N"]),
    ("device=cuda:²", ["device=cuda:²: must be auto, cpu, cuda or cuda:N"]),
    ("dtype=fp16", ["dtype=fp16: must be one of bf16, fp32"]),
    ("samples.prompts=[1]", ["samples.prompts=[1]: must be a list of text"]),
    ("samples.temperature=-1", ["samples.temperature=-1: must be at least 0"]),
    ("eval_every_n_steps=5", ["eval_every_n_steps=5: there is nothing to evaluate on"]),
    ("lr_scheduler.warmup_ratio=2", ["lr_scheduler.warmup_ratio=2: must be at least 0 and below 1"]),
    ("lr_scheduler.num_warmup_steps=99", ["lr_scheduler.num_warmup_steps=99: must be at least 0 and below the run's"]),
    ("output_dir=${nowhere}", ["output_dir", "'nowhere' not found"]),
    ("output_dir=${output_dir}", ["output_dir", "Recursive interpolation"]),
    ("output_dir=${oc.env:NOT_SET_ANYWHERE}", ["output_dir", "NOT_SET_ANYWHERE"]),
    ("output_dir=${nothing:x}", ["output_dir", "Unsupported interpolation type nothing"]),
    ("output_dir=${seed", ["output_dir"]),
    ("seed=[", ["command line, seed=[", "not valid YAML"]),
    ("seed", ["command line, seed: must be key=value"]),
    ("=5", ["command line, =5: must be key=value"]),
    ("~seed", ["seed cannot be removed"]),
    ("model=null", ["model=null: must be a component"]),
    ("model=llama3_8b", ["model._component_=llama3_8b: cannot be imported", "full import path"]),
    ("model=torchtune.models.llama9.llama9_8b", ["model._component_=torchtune.models.llama9", "cannot be imported"]),
    ("model=torch.nn.Identity", ["model._component_=torch.nn.Identity", "makes no model"]),
    ("model.rope_base=1", ["model.rope_base: llama3_8b has no such argument"]),
    ("tokenizer=torchtune.models.llama3.llama3_8b",
     ["tokenizer._component_=", "llama3_8b: makes a TransformerDecoder"]),
    ("tokenizer.paht=x", ["tokenizer.paht: hf_tokenizer has no such argument", "nearest: path"]),
    ("~tokenizer.path", ["tokenizer.path: hf_tokenizer needs it"]),
    ("tokenizer.path=5", ["tokenizer.path=5: must be text"]),
    ("tokenizer={_component_: torchtune.models.llama3.llama3_tokenizer, path: /no}", ["llama3_tokenizer(path=/no)"]),
    ("tokenizer=torch.nn.Identity", ["tokenizer._component_=torch.nn.Identity: has no tokenize_messages"]),
    ("loss=torchtune.rlhf.loss", ["loss._component_=torchtune.rlhf.loss: is not a class or function"]),
    ("loss=DPOLoss", ["loss.name=DPOLoss: no such loss", "loss=torchtune.rlhf.loss.DPOLoss"]),
    ("loss=torch.nn.MSELoss", ["loss._component_=torch.nn.MSELoss: must map policy chosen"]),
    ("loss=my_losses.Nothing", ["loss._component_=my_losses.Nothing", "it returns a NoneType"]),
    ("loss=my_losses.Detached", ["loss._component_=my_losses.Detached", "do not depend on the policy"]),
    ("loss=my_losses.Mean", ["loss._component_=my_losses.Mean", "for two pairs it returns []"]),
    ("loss=my_losses.Words", ["loss._component_=my_losses.Words", "for two pairs it returns str, str, str"]),
    ("loss=my_losses.Raises", ["loss._component_=my_losses.Raises", "called so, it fails", "beta"]),
    ("loss=my_losses.plain", ["loss.chosen: plain needs it"]),
    ("loss=my_losses.Absent", ["loss._component_=my_losses.Absent: cannot be imported"]),
    ("optimizer=torch.optim.Adamw", ["cannot be imported", "nearest: optimizer=torch.optim.AdamW"]),
    ("optimizer=torch.nn.Linear", ["optimizer._component_=torch.nn.Linear", "makes no optimizer"]),
    ("optimizer={_component_: torch.optim.LBFGS, lr: 1}", ["optimizer._component_=torch.optim.LBFGS", "closure"]),
    ("lr_scheduler=torch.optim.lr_scheduler.StepLR", ["lr_scheduler._component_", "no num_training_steps"]),
    ("metric_logger=true", ["metric_logger=true: must be a component"]),
]  # fmt: skip


def config_case(text=BASE, override=None):
    def attempt(tmp_path, request):
        request.getfixturevalue("monkeypatch").chdir(tmp_path)
        (tmp_path / "my_losses.py").write_text(LOSSES)
        path = tmp_path / "broken.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        cfg = config.load("lora", RECIPE["DEFAULTS"], [path], [override] if override else [])
        rehearsal.rehearse(cfg.optimizer, cfg.lr_scheduler, cfg.loss, num_training_steps=10)
        adapt(config.instantiate(cfg.tokenizer))

    return attempt


# Models that cannot be built

LLAMA = "torchtune.models.llama3.llama3"
LORA = {"rank": 2, "alpha": 4.0, "dropout": 0.0, "modules": ["q_proj"]}
BUILDS = [
    # name, the model's block, what differs from a LoRA model, its max_length, what is said
    ("max_length over the positions", {}, {}, 129, ["max_length=129: the model has 128 positions", "max_length=128"]),
    ("a builder with adapters", {"_component_": "torchtune.models.llama3.lora_llama3"}, {}, 64,
     ["name the base builder (llama3)"]),
    ("a class for a builder", {"_component_": "torchtune.modules.TransformerDecoder"}, {}, 64,
     ["model.vocab_size: TransformerDecoder has no such argument"]),
    ("heads that do not divide the width", {"num_heads": 5}, {}, 64, ["llama3(", "num_heads=5", "cannot be made"]),
    ("an argument too many", {"window": 5}, {}, 64, ["model.window: llama3 has no such", "it takes vocab_size"]),
    ("segments, compiled", {}, {"compile_layers": True, "attention": "segments"}, 64, ["attention=segments: compile"]),
]  # fmt: skip


def build_case(block, options, max_length):
    def attempt(tmp_path, request):
        prepared = {name: options[name] for name in options if name in ("compile_layers", "attention")}
        built = {name: options[name] for name in options if name not in prepared}
        model = models.lora({"_component_": LLAMA, **SIZES, **block}, **LORA, **built, dtype="fp32")
        models.prepare(model, max_length=max_length, **prepared)

    return attempt


CASES = [
    *((f"row: {name}", row_case(good, broken), words) for name, good, broken, words in ROWS),
    *((f"file: {name}", file_case(file, content, options), words) for name, file, content, options, words in FILES),
    *((f"model: {name}", model_case(change), words) for name, change, words in MODELS),
    *((f"build: {name}", build_case(*how), words) for name, *how, words in BUILDS),
    *((f"config: {name}", config_case(text), words) for name, text, words in TEXTS),
    *((f"config: {override}", config_case(override=override), words) for override, words in OPTIONS),
]


@pytest.mark.parametrize(("attempt", "words"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_a_broken_input_ends_in_a_sentence(tmp_path, request, attempt, words):
    try:
        said = attempt(tmp_path, request)
    except UserError as error:
        said = str(error)
        if request.node.callspec.id.startswith(("row", "file")) and re.search(r"(line|row) \d+( \(from 0\))?:", said):
            assert re.search("Mend|[Rr]emove|Rename|Take|belongs in|Set |Put all", said), "no way out"
    assert said, "a silent success"
    for word in words:
        assert word in said
    assert len(said.splitlines()) < 25 and len(said) < 4000 and "Traceback" not in said
    if os.environ.get("SHOW"):
        print(f"\n### {request.node.callspec.id}\n{said}")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.jsonl.gz"])
def test_a_byte_order_mark_is_no_part_of_the_pairs(tmp_path, name):
    text = {"a.json": json.dumps([GOOD]), "a.csv": ",".join(GOOD) + "\n" + ",".join(GOOD.values())}
    content = b"\xef\xbb\xbf" + text.get(name, json.dumps(GOOD)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert list(read_rows(str(tmp_path / name))) == [GOOD]


# The same through `tune run`: what a user sees


def in_model(change):
    return lambda work: change(work / "model")


def in_pairs(broken):
    return lambda work: (work / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (GOOD, broken)))


RUNS = [
    # name, how to break the folder, key=value, what is said
    ("a broken row", in_pairs(GOOD | {"chosen": 7}), [], ["pairs.jsonl, row 1 (from 0): column 'chosen' holds int, 7"]),
    ("a broken line", lambda work: (work / "pairs.jsonl").write_text("{"), [], ["pairs.jsonl, line 1: invalid JSON"]),
    ("no pairs", lambda work: (work / "pairs.jsonl").unlink(), [], ["dataset.source=pairs.jsonl: there is no such"]),
    ("pairs of one answer", in_pairs(GOOD), ["dataset.columns.chosen=rejected", "dataset.columns.rejected=rejected"],
     ["there is nothing left of pairs.jsonl", "identical answers"]),
    ("config.json without a key", in_model(edit("config.json", num_hidden_layers=None)), [],
     ["model/config.json: num_hidden_layers: is missing"]),
    ("a shard cut short", in_model(cut(FIRST, 20_000)), [], [f"model/{FIRST}: cannot be read"]),
    ("NaN weights", in_model(broken_value(float("nan"))), [], [f"model/{FIRST}: {QUERY} holds NaN"]),
    ("code in the weights", in_model(pickled(lambda file: torch.save({"a": Code()}, file))), [], ["pytorch_model.bin"]),
    ("a broken tokenizer", in_model(write("tokenizer.json", "{")), [], ["tokenizer.json cannot be read"]),
    ("a broken template", in_model(template("{{ 1 // 0 }}")), [], ["there is nothing left of pairs.jsonl", "by zero"]),
    ("broken YAML", lambda work: (work / "my.yaml").write_text("seed: ["), [], ["my.yaml: not valid YAML"]),
    ("a mistaken key", in_model(write("x", "")), ["lose.beta=1"], ["unknown key lose", "nearest: loss"]),
    ("a loss of nothing", in_model(write("x", "")), ["loss=my_losses.Nothing"], ["it returns a NoneType"]),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "overrides", "words"), [pytest.param(*case[1:], id=case[0]) for case in RUNS])
def test_tune_run_ends_in_the_same_sentence(tmp_path, llama, monkeypatch, capsys, damage, overrides, words):
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "pairs.jsonl").write_text(LINES)
    (tmp_path / "my_losses.py").write_text(LOSSES)
    cfg = {
        "device": "cpu",
        "dtype": "fp32",
        "model": {"_component_": LLAMA, **SIZES},
        "checkpointer": {"checkpoint_dir": "model", "model_type": "LLAMA3"},
        "dataset": {"source": "pairs.jsonl"},
        "max_length": 128,
        "max_prompt_length": 64,
    }
    (tmp_path / "my.yaml").write_text(json.dumps(cfg))
    damage(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune"])
    assert cli.main(["run", "lora_dpo_single_device", "--config", "my.yaml", *overrides]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tune: error: ") and "Traceback" not in err
    for word in words:
        assert word in err
    assert not (tmp_path / "executed").exists()
