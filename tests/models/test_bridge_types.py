"""The table of every decoder of transformers (docs/transformers_types.md) is what tools/sweep_transformers.py finds."""

import importlib.metadata
import logging
import random
import re
import runpy
from collections import defaultdict

import pytest
import torch
from helpers import ROOT
from published_bridged import BRIDGED
from test_bridge import component

from pairtune import models
from pairtune.errors import UserError
from pairtune.models.bridge.build import import_transformers

TRAINED = ("shared", "dense", "apart")
ROW = re.compile(r"\| (?P<type>[\w.-]+) \| (?P<way>[\w ]+) \| (?P<logps>\S*) \| (?P<gradients>\S*) \| (?P<said>.*) \|")
# Routers that draw, masks that are cut, tables of experts, layers before the output, settings in blocks, other caps;
# and, around text models, one whose own forward has a factor, and one whose text model is whole inside.
ODD = ("phimoe", "axk2", "deepseek_v4", "modernbert-decoder", "mpt", "recurrent_gemma", "granite4_vision", "llama4")


@pytest.fixture(scope="module")
def sweep():
    return runpy.run_path(str(ROOT / "tools" / "sweep_transformers.py"))


@pytest.fixture(scope="module")
def rows():
    page = (ROOT / "docs" / "transformers_types.md").read_text()
    if f"with transformers\n{importlib.metadata.version('transformers')}:" not in page:
        pytest.skip("the table is of another transformers")
    return {row["type"]: row for row in map(ROW.fullmatch, page.splitlines()) if row}


def test_every_type_is_right_or_refused(sweep, rows):
    from transformers.models.auto import modeling_auto as auto

    known = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() | auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.keys()
    assert rows.keys() == known
    assert {row["way"] for row in rows.values()} <= {*TRAINED, "refused", "not made"}
    trained = [row for row in rows.values() if row["way"] in TRAINED]
    assert len(trained) >= 110
    for row in trained:
        assert float(row["logps"]) <= sweep["LOGPS"] and float(row["gradients"]) <= sweep["GRADIENTS"], row[0]


def test_the_table_of_configs_says_how_each_takes_a_prompt(rows):
    page = (ROOT / "docs" / "transformers.md").read_text()
    for name, (size, content) in BRIDGED.items():
        kind = content["model_type"]
        assert f"| `{name}` | {kind} | {size:,} | {rows[kind]['way']} |" in page


def test_some_types_of_each_outcome_are_found_as_the_table_has_them(sweep, rows, tmp_path):
    by_way = defaultdict(list)
    for name, row in rows.items():
        by_way[row["way"]].append(name)
    rng = random.Random(0)
    for name in dict.fromkeys([*ODD, *(name for names in by_way.values() for name in rng.sample(names, 1))]):
        found = sweep["try_type"](name, tmp_path / name)
        assert found.way == rows[name]["way"], found
        assert not found.is_wrong, found


def test_an_encoder_is_refused(sweep, tmp_path):
    """BERT sees the answer that it is to predict, unless its config makes a decoder of it."""
    sweep["MORE"]["bert"] = {"is_decoder": False}
    found = sweep["try_type"]("bert", tmp_path)
    assert found.way == "refused" and "sees the tokens that it is to predict" in found.said


def test_what_transformers_cannot_compute_is_told_in_its_words(sweep, tmp_path):
    sweep["MORE"]["xlstm"] |= {"mode": "train"}  # takes multiples of its chunks only
    sweep["save"]("xlstm", tmp_path)
    with pytest.raises(UserError, match="xLSTMForCausalLM does not compute a conversation of .* tokens: .*chunk"):
        sweep["opened"](tmp_path, sweep["random_pairs"]())


@pytest.mark.parametrize(("name", "told"), [("jetmoe", r"\d\d% of them are in .*experts"), ("llama4_text", "")])
def test_experts_that_adapters_do_not_reach_are_told(sweep, name, told, tmp_path):
    sweep["save"](name, tmp_path)
    lora = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["all-linear"], "dtype": "fp32"}
    for make in (models.lora, models.qlora):
        words = models.sizes(make(component(tmp_path), **lora))
        assert re.search(told, words) if told else "of them are in" not in words


def test_only_errors_of_transformers_and_slow_kernels_on_a_gpu_are_shown():
    import_transformers()
    handler, *_ = logging.getLogger("transformers").handlers
    shown = {
        (level, text): bool(handler.filter(logging.LogRecord("transformers.x", level, "", 1, text, (), None)))
        for level, text in ((logging.WARNING, "pad_token_id"), (logging.WARNING, "k is falling back"), (40, "broken"))
    }
    assert list(shown.values()) == [False, torch.cuda.is_available(), True]
