"""`tune validate` finds what is wrong with a config and the files that it names, without loading a weight."""

import csv
import gzip
import json
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
from helpers import NF4_SIZES, random_pairs, save_llama, save_pairs
from safetensors.torch import load_file, save_file

from pairtune import models
from pairtune.cli.commands import main
from pairtune.cli.find import find, own
from pairtune.folders import peft as adapters
from pairtune.folders import weights as checkpoint
from pairtune.pairs.rows import read_rows

SIX = sorted(own("recipe"))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, 150 pairs and 6 held-out pairs."""
    folder = tmp_path_factory.mktemp("files")
    save_llama(folder / "base")
    save_pairs(folder / "pairs.jsonl", random_pairs(150, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(6, seed=2))
    return folder


@pytest.fixture
def work(files, tmp_path, monkeypatch):
    """A copy of the files, with a config, as the current folder."""
    shutil.copytree(files, tmp_path, dirs_exist_ok=True)
    cfg = {
        "device": "cpu",
        "model": {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES},
        "checkpointer": {"checkpoint_dir": "base", "model_type": "LLAMA3"},
        "dataset": {"source": "pairs.jsonl"},
        "eval_dataset": {"source": "held_out.jsonl"},
        "max_length": 96,
        "max_prompt_length": 64,
    }
    (tmp_path / "my.yaml").write_text(json.dumps(cfg))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune"])
    return tmp_path


def parsed(out):
    """The tables: recipe to what was asked to its answer."""
    tables = {}
    for line in out.splitlines():
        if not line.startswith(" "):
            names = line.rpartition(":")[0].split(", ")
            tables |= {name: {} for name in names}
            continue
        if line[2] != " ":
            title, _, line = line.strip().partition(" ")
        for name in names:
            tables[name][title] = tables[name].get(title, "") + line.strip()
    return tables


@pytest.fixture
def validate(capsys):
    """Runs `tune validate` with these words; returns its status and its tables."""

    def run(*words):
        status = main(["validate", *words])
        out, err = capsys.readouterr()
        assert not err
        return status, parsed(out)

    return run


LORA = "lora_dpo_single_device"


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_config_whose_files_are_right_is_ok_for_all_six(work, validate):
    status, tables = validate("my.yaml")
    assert status == 0 and sorted(tables) == SIX
    for answers in tables.values():
        assert list(answers) == ["config", "tokenizer", "model", "weights", "dataset", "eval_dataset", "steps"]
        assert all(answer.startswith("ok") for answer in answers.values())
    answers = tables[LORA]
    assert answers["tokenizer"] == "ok: 320 ids, plain text: the tokenizer has no chat template"
    assert answers["weights"] == "ok: 30 tensors, names and shapes as in the model"
    assert answers["dataset"] == "ok: the first 100 of 150 rows, prompt with answers: 100 kept"
    assert answers["eval_dataset"] == "ok: 6 rows, prompt with answers: 6 kept"
    assert answers["steps"] == "ok: 3, at most"
    assert "as in config.json" in answers["model"]
    assert not (work / "runs").exists()  # nothing is written


def test_unknown_tokens_and_a_length_beyond_the_models_positions_are_told(work, validate):
    change(work / "base" / "config.json", max_position_embeddings=80)
    with (work / "held_out.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "w7 what", "chosen": " w8", "rejected": " w9"}) + "\n")
    status, tables = validate("my.yaml", "--recipe", LORA)
    assert status == 0
    assert "max_length=96: the model was made for 80 positions" in tables[LORA]["model"]
    assert "7 kept; unknown tokens: 1 of " in tables[LORA]["eval_dataset"] and "unknown" not in tables[LORA]["dataset"]


def test_one_recipe_can_be_asked_about_and_a_copy_of_it(work, validate):
    shutil.copy(find("recipe", LORA), "mine.py")
    for name in (LORA, "mine.py"):
        status, tables = validate("my.yaml", "--recipe", name, "lora.rank=2")
        assert status == 0 and list(tables) == [name]


def test_a_published_config_is_ok_where_its_model_and_pairs_are_not(work, validate):
    status, tables = validate("llama3_8b", "checkpointer.model_type=LLAMA3")
    assert status == 0 and sorted(tables) == SIX
    for answers in tables.values():
        assert answers["config"] == "ok" and "8,0" in answers["model"]
        assert answers["tokenizer"].startswith("not here, not checked: /tmp/Meta-Llama-3-8B-Instruct")
        assert answers["weights"].startswith("not here, not checked: /tmp/Meta-Llama-3-8B-Instruct")
        assert "trl-lib/ultrafeedback_binarized is a data set of the Hugging Face Hub" in answers["dataset"]


def test_what_the_command_line_or_an_own_config_names_has_to_be_here(work, validate):
    status, tables = validate("llama3_8b", "dataset.source=piars.jsonl", "--recipe", LORA)
    assert status == 1 and "Nearest in" in tables[LORA]["dataset"] and "pairs.jsonl" in tables[LORA]["dataset"]
    status, tables = validate("my.yaml", "checkpointer.checkpoint_dir=bsae", "--recipe", LORA)
    assert status == 1 and "checkpointer.checkpoint_dir=bsae: no such folder" in tables[LORA]["weights"]
    shutil.rmtree(work / "base")
    status, tables = validate("my.yaml", "--recipe", LORA)
    assert status == 1 and "no such folder" in tables[LORA]["weights"]
    assert tables[LORA]["dataset"] == "ok: 150 rows, prompt with answers; not tokenized, for want of a tokenizer"


def test_a_config_that_is_refused_is_asked_no_more(work, validate):
    status, tables = validate("my.yaml", "loss.beta=-1")
    assert status == 1
    assert all(list(a) == ["config"] and "refused: loss.beta=-1" in a["config"] for a in tables.values())


def test_recipes_that_differ_stand_apart(work, validate):
    (work / "two.yaml").write_text((work / "my.yaml").read_text()[:-1] + ', "lora": {"modules": ["router"]}}')
    status, tables = validate("two.yaml", "model.embed_dim=64", "model.intermediate_dim=96")
    assert status == 1
    assert "lora.modules: router: this model has no such layer" in tables["qlora_dpo_single_device"]["model"]
    assert "hidden_size is 64 in `model` and 128" in tables["full_dpo_single_device"]["model"]


def test_a_reference_of_its_own_has_a_line_with_what_is_wrong_with_it(work, validate):
    save_llama(work / "other", seed=3)
    settings = ["reference=model", "reference.checkpoint_dir=other"]
    status, tables = validate("my.yaml", *settings)
    assert status == 0 and all(answers["reference"].startswith("ok: model, ") for answers in tables.values())
    for setting, says in (
        ("reference.model={_component_: torchtune.models.llama3.llama3, num_layers: 1}", "refused: "),
        ("reference.checkpoint_dir=othre", "reference.checkpoint_dir=othre: no such folder"),
        ("adapter=x", "ok"),
        ("loss=simpo", "this loss has no reference"),
    ):
        _, tables = validate("my.yaml", "--recipe", LORA, *settings, setting)
        assert says in str(tables[LORA]), setting
    save_llama(work / "other", sizes=NF4_SIZES | {"num_layers": 1})
    status, tables = validate("my.yaml", "--recipe", LORA, *settings)
    assert status == 1 and "num_hidden_layers is 3" in tables[LORA]["reference"]
    status, tables = validate("my.yaml", "--recipe", LORA, "reference=model")
    assert status == 1 and "would hold the base a second time" in tables[LORA]["reference"]


def test_an_adapter_has_a_line_with_what_is_wrong_with_it(work, validate):
    block = {"checkpoint_dir": "base", "model_type": "LLAMA3"}
    component = {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}
    settings = {"rank": 4, "alpha": 8.0, "dropout": 0.0}
    model = models.lora(component, **settings, modules=["q_proj"], dtype="fp32")
    adapter = {name: torch.ones(shape) for name, shape in models.adapter_shapes(model).items()}
    adapters.write_adapter(work / "sft", adapter, checkpoint.open_weights(block), settings)
    words = ["my.yaml", "adapter=sft", "reference=start", "lora.rank=4", "lora.alpha=8", "lora.modules=[q_proj]"]
    for recipe in (LORA, LORA.replace("lora", "qlora")):
        status, tables = validate(*words, "--recipe", recipe)
        assert status == 0 and tables[recipe]["adapter"] == "ok: 6 matrices, as in the model"
    for setting, says in (
        ("lora.rank=8", "r is 4 in its adapter_config.json, lora.rank is 8; nearest valid: lora.rank=4"),
        ("lora.modules=[v_proj]", "nearest valid: lora.modules=[q_proj]"),
        ("adapter=stf", "adapter=stf: no such folder"),
        ("checkpointer.checkpoint_dir=bsae", "no such folder"),
    ):
        status, tables = validate(*words, setting, "--recipe", LORA)
        assert status == 1 and tables[LORA]["adapter"].startswith("refused: ") and says in tables[LORA]["adapter"]
    shutil.rmtree(work / "sft")
    change(work / "my.yaml", adapter="sft", reference="start")
    assert "refused: adapter=sft: no such folder" in validate("my.yaml", "--recipe", LORA)[1][LORA]["adapter"]


def break_weights(work, edit):
    weights = {name: value.clone() for name, value in load_file(work / "base/model.safetensors").items()}
    edit(weights)
    save_file(weights, work / "base/model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("title", "damage", "says"),
    [
        ("config", lambda w: (w / "my.yaml").write_text("seed: ["), "not valid YAML"),
        ("tokenizer", lambda w: (w / "base/tokenizer.json").unlink(), "has no tokenizer.json"),
        ("tokenizer", lambda w: change(w / "base/tokenizer_config.json", chat_template="{% for %}"), "not valid Jinja"),
        ("tokenizer", lambda w: change(w / "base/tokenizer_config.json", chat_template="{{ 1 // 0 }}"), "by zero"),
        ("model", lambda w: change(w / "base/config.json", rope_theta=5e5), "rope_theta is 10000.0 in `model` and 500"),
        ("model", lambda w: change(w / "my.yaml", max_length=200), "max_length=200: the model has 128 positions"),
        ("weights", lambda w: change(w / "base/config.json", model_type="mistral"), "which is MISTRAL here"),
        ("weights", lambda w: (w / "base/model.safetensors").write_bytes(b""), "model.safetensors: cannot be read"),
        ("weights", lambda w: break_weights(w, lambda t: t.pop("lm_head.weight")), "1 weights do not fit"),
        ("weights", lambda w: break_weights(w, lambda t: t.update({"lm_head.weight": torch.ones(9, 128)})), "[9, 128]"),
        ("dataset", lambda w: (w / "pairs.jsonl").write_text("{"), "pairs.jsonl, line 1: invalid JSON"),
        ("dataset", lambda w: change(w / "my.yaml", max_length=4, max_prompt_length=2), "there is nothing left of"),
        ("eval_dataset", lambda w: (w / "held_out.jsonl").write_text('{"q": 1}'), "held_out.jsonl: no known format"),
        ("steps", lambda w: change(w / "my.yaml", lr_scheduler={"num_warmup_steps": 3}), "num_warmup_steps=3: must be"),
    ],
)
def test_what_is_broken_is_refused_in_its_line(work, validate, title, damage, says):
    damage(work)
    status, tables = validate("my.yaml", "--recipe", LORA)
    assert status == 1 and tables[LORA][title].startswith("refused: ") and says in tables[LORA][title]


def test_a_tokenizer_with_more_ids_than_the_model_embeds_is_refused(work, validate):
    content = json.loads((work / "base/tokenizer.json").read_text())
    content["model"]["vocab"]["more"] = 320
    (work / "base/tokenizer.json").write_text(json.dumps(content))
    status, tables = validate("my.yaml", "--recipe", LORA)
    assert status == 1 and "has 321 token ids, the model embeds 320" in tables[LORA]["model"]


def test_the_first_hundred_rows_are_read_and_all_when_asked(work, validate):
    lines = (work / "pairs.jsonl").read_text().splitlines()
    row = {"prompt": "w9", "chosen": " w8", "rejected": " w8"}
    for number in (5, 140):
        lines[number] = json.dumps(row)
    (work / "pairs.jsonl").write_text("\n".join(lines))
    _, tables = validate("my.yaml", "--recipe", LORA)
    assert tables[LORA]["dataset"].endswith("100 of 150 rows, prompt with answers: 99 kept, 1 dropped (identical "
                                            "answers; row 5)")  # fmt: skip
    _, tables = validate("my.yaml", "--recipe", LORA, "--all")
    assert tables[LORA]["dataset"] == (
        "ok: 150 rows, prompt with answers: 148 kept, 2 dropped (identical answers; row 5)"
    )
    lines[140] = json.dumps(row | {"chosen": 7})
    (work / "pairs.jsonl").write_text("\n".join(lines))
    assert validate("my.yaml", "--recipe", LORA)[0] == 0
    status, tables = validate("my.yaml", "--recipe", LORA, "--all")
    assert status == 0 and "1 dropped (column 'chosen' holds int; row 140)" in tables[LORA]["dataset"]
    status, tables = validate("my.yaml", "--recipe", LORA, "--all", "dataset.on_bad_row=error")
    assert status == 1 and "row 140 (from 0): column 'chosen' holds int" in tables[LORA]["dataset"]


def test_a_stream_is_looked_at_from_its_beginning_and_its_steps_are_max_steps(work, validate):
    stream = ("my.yaml", "--recipe", LORA, "dataset.streaming=true", "max_steps=70")
    status, tables = validate(*stream)
    assert status == 0 and tables[LORA]["dataset"].startswith("ok: the first 100 rows of a stream, prompt with answers")
    assert tables[LORA]["steps"] == "ok: 70"
    _, tables = validate(*stream, "dataset.source=[pairs.jsonl,{source: held_out.jsonl, share: 0.1}]", "--all")
    assert "drawn from pairs.jsonl 90.0 %, held_out.jsonl 10.0 %" in tables[LORA]["dataset"]
    assert "the first 150 rows of a stream" in tables[LORA]["dataset"]
    status, tables = validate("my.yaml", "--recipe", LORA, "dataset.streaming=true")
    assert status == 1 and "set max_steps" in tables[LORA]["config"]


@pytest.mark.parametrize(("fraction", "status"), [(0.5, 0), (0.01, 0), (0.001, 1)])
def test_a_fraction_held_out_is_of_all_rows(work, validate, fraction, status):
    found, tables = validate(
        "my.yaml", "--recipe", LORA, "eval_dataset.source=null", f"dataset.val_fraction={fraction}"
    )
    assert found == status and ("of 150 pairs leaves 150 to train on and 0" in tables[LORA]["dataset"]) == bool(status)


def test_no_weight_is_read(work, validate):
    break_weights(work, lambda tensors: tensors["lm_head.weight"].fill_(float("nan")))
    assert validate("my.yaml", "--recipe", LORA)[0] == 0  # a run finds it, when it loads


@pytest.fixture
def large(work, monkeypatch):
    """5,000 rows, of which number 4,321 is no JSON, as of a file of many megabytes."""
    monkeypatch.setattr("pairtune.pairs.sampling.LARGE", 1)
    lines = [json.dumps({"prompt": f"Q{i}", "chosen": f"good {i}", "rejected": "bad"}) for i in range(5_000)]
    lines[4_321] = "{"
    return lines


def test_of_a_large_file_the_first_rows_and_some_of_all_parts_are_looked_at(large, work, validate):
    (work / "pairs.jsonl").write_text("\n\n".join(large))
    status, tables = validate("my.yaml", "--recipe", LORA)
    said = "198 of 5,000 rows (the first, and some of all parts), prompt with answers: 198 kept"
    assert tables[LORA]["dataset"].startswith(f"ok: {said}") and not status
    assert tables[LORA]["steps"] == "ok: 79, at most"
    status, tables = validate("my.yaml", "--recipe", LORA, "--all")
    assert status == 1 and "line 8643: invalid JSON" in tables[LORA]["dataset"]
    _, tables = validate("my.yaml", "--recipe", LORA, "dataset.split=train[80%:]", "dataset.limit=700")
    assert "of 700 rows (the first, and some of all parts)" in tables[LORA]["dataset"]


def test_a_row_of_a_sample_is_told_by_its_number_and_file(large, work, tmp_path):
    rows = [json.loads(line) for line in large if line != "{"]
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "train-0.jsonl").write_bytes("\n".join(map(json.dumps, rows[:2_000])).encode())
    (folder / "train-1.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows[2_000:])).encode()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet", row_group_size=90)
    write_csv(tmp_path / "c.csv", rows)
    for name in ("shards", "p.parquet", "c.csv"):
        found = read_rows(str(tmp_path / name), sample=20)
        assert [found[i] for i in range(len(found))] == [rows[number] for number in found.numbers], name
        assert abs(found.total / len(rows) - 1) < (0 if found.is_counted else 0.2) + 1e-9, name
        assert 20 <= len(found) <= 60 and found.is_counted == (name != "c.csv")
        assert (max(found.numbers) > 4_500) == (name != "c.csv"), name
    found = read_rows(str(folder), sample=20)
    last = found.numbers[-1]
    assert found.place(len(found) - 1) == f"{folder / 'train-1.jsonl.gz'}, row {last - 2_000} (from 0)"


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
