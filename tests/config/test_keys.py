"""Every key of a config has one row, and what recipes share is in it."""

import runpy

import pytest
from helpers import ROOT

from pairtune import config
from pairtune.config import keys
from pairtune.config.checks import is_component
from pairtune.errors import UserError

RECIPES = {path.stem: runpy.run_path(str(path)) for path in sorted((ROOT / "recipes").glob("[!_]*.py"))}
DEFAULTS = {name: recipe["DEFAULTS"] for name, recipe in RECIPES.items()}


def names_in(block, prefix=""):
    """Every key of nested defaults, with dots; a component's path is no key of its own."""
    for key, value in block.items():
        if key != "_component_":
            yield prefix + key
        if isinstance(value, dict):
            yield from names_in(value, f"{prefix}{key}.")


def test_every_key_of_the_six_recipes_has_a_row():
    assert {name for defaults in DEFAULTS.values() for name in names_in(defaults)} <= keys.KEYS.keys()


def test_every_row_is_a_key_or_an_argument_of_a_component():
    """An argument: the default component may take it, or another in its place."""
    known = {name for defaults in DEFAULTS.values() for name in names_in(defaults)}
    components = {key for defaults in DEFAULTS.values() for key, value in defaults.items() if is_component(value)}
    others = keys.KEYS.keys() - known
    assert {name.partition(".")[0] for name in others} <= components


def test_no_row_stands_twice():
    groups = (keys._RUN, keys._DISTRIBUTED, keys._FILES, keys._LEARNING, keys._REFERENCE, keys._PAIRS)
    assert len(keys.KEYS) == sum(map(len, groups))


@pytest.mark.parametrize("group", ["RUN", "DISTRIBUTED", "FILES"])
def test_recipes_have_the_shared_defaults(group):
    for name, defaults in DEFAULTS.items():
        if group != "DISTRIBUTED" or name.endswith("_distributed"):
            assert getattr(keys, group).items() <= defaults.items(), name


def test_recipes_have_the_shared_defaults_of_blocks():
    for defaults in DEFAULTS.values():
        assert defaults["reference"] == {**keys.REFERENCE, "name": defaults["reference"]["name"]}
        assert defaults["dataset"] == {**keys.ROWS, **keys.TOKENS, **keys.STREAM, "val_fraction": None}
        assert defaults["eval_dataset"] == {**keys.ROWS, "source": None}


def test_a_row_says_which_recipes_have_its_key():
    has = {
        "": lambda name: True,
        "distributed recipes": lambda name: name.endswith("_distributed"),
        "lora_ and qlora_ recipes": lambda name: not name.startswith("full_"),
        "full_ recipes": lambda name: name.startswith("full_"),
        "qlora_ recipes": lambda name: name.startswith("qlora_"),
    }
    for key, row in keys.KEYS.items():
        if "." not in key:
            assert {n for n in DEFAULTS if key in DEFAULTS[n]} == {n for n in DEFAULTS if has[row.recipes](n)}, key


def test_a_shared_default_has_a_comment_and_one_of_a_recipe_has_none():
    for row in keys.KEYS.values():
        assert bool(row.comment) == (row.default is not keys.IN_RECIPE), row.name


@pytest.fixture
def load(tmp_path):
    def load(*overrides, own=None):
        path = tmp_path / "config.yaml"
        path.write_text(
            "model: {_component_: torchtune.models.llama3.llama3_8b}\n"
            "checkpointer: {checkpoint_dir: /weights, model_type: LLAMA3}\ndataset: {source: pairs.jsonl}\n"
        )
        return config.load("lora", DEFAULTS["lora_dpo_single_device"] | (own or {}), [path], list(overrides))

    return load


def test_what_was_published_takes_the_place_of_null_where_it_has_an_effect(load):
    assert (load().reference.every_n_steps, load().reference.alpha) == (None, None)
    moved = load("reference=sync").reference
    assert (moved.every_n_steps, moved.alpha, moved.checkpoint_dir) == (512, 0.6, None)
    assert load("reference=sync", "reference.alpha=0.3").reference.alpha == 0.3


def test_a_saved_config_says_what_was_published(load, tmp_path):
    cfg = load("reference=sync")
    config.save(cfg, tmp_path / "saved.yaml", "lora_dpo_single_device")
    assert "every_n_steps: 512\n  alpha: 0.6\n" in (tmp_path / "saved.yaml").read_text()


def test_a_key_of_ones_own_is_typed_by_its_default_and_spell_checked(load):
    assert load("patience=5", own={"patience": 3}).patience == 5
    with pytest.raises(UserError, match="patience=soon: must be a whole number"):
        load("patience=soon", own={"patience": 3})
    with pytest.raises(UserError, match="unknown key patiense; nearest: patience"):
        load("patiense=5", own={"patience": 3})


@pytest.mark.parametrize(
    "key, expected",
    [
        ("seed", "no"),
        ("loss.beta", "no"),
        ("reference.model.num_layers", "no"),
        ("one.of.ones_own", "no"),
        ("batch_size", "yes"),
        ("samples.prompts", "yes"),  # as its block
        ("metric_logger.log_dir", "yes"),
        ("reference.cache_dir", "yes"),
        ("dataset.columns.chosen", "by result"),
        ("checkpointer.checkpoint_dir", "by result"),
        ("checkpointer.checkpoint_files", "no"),
        ("eval_dataset.limit", "yes"),
    ],
)
def test_a_row_or_its_block_says_what_may_change_on_resuming(key, expected):
    assert keys.on_resume(key) == expected
