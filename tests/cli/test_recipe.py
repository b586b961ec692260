"""METHOD and DEFAULTS of a recipe are what they would be if it ran, and reading them does not run it."""

import runpy
import sys

import pytest

from pairtune.cli.find import own
from pairtune.cli.recipe import does_as_ours, parses_defaults, read_recipe, top_level
from pairtune.errors import UserError


@pytest.mark.parametrize("name", own("recipe"))
def test_a_recipe_of_ours_is_read_as_it_runs(name):
    ran = runpy.run_path(str(own("recipe")[name]), run_name="as_a_module")
    assert read_recipe(name) == (ran["METHOD"], ran["DEFAULTS"])
    assert "torch" not in top_level(own("recipe")[name], "METHOD", "DEFAULTS")
    assert parses_defaults(own("recipe")[name]) and does_as_ours(own("recipe")[name])


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.py"
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    "text",
    [
        "METHOD: str = 'full'\nDEFAULTS = dict(a=1)",
        "from math import pi as near, tau\nMETHOD = 'full'\nDEFAULTS = {'a': near}",
        "METHOD = 'full'\nDEFAULTS = {}\nDEFAULTS['a'] = 1\nDEFAULTS |= {'b': 2}\nDEFAULTS.update(c=3)",
        "METHOD = 'full'\ndef half(x):\n    return x / TWO\nTWO = 2\nDEFAULTS = {'a': half(3)}",
        "METHOD, SIZE = 'full', 3\nBIG = SIZE * 2\nDEFAULTS = {'a': BIG, **{f'k{i}': i for i in range(SIZE)}}",
        "METHOD = 'full'\nNAMES = []\nfor name in 'ab':\n    NAMES.append(name)\nDEFAULTS = dict.fromkeys(NAMES)",
        "try:\n    import no_such_module\nexcept ImportError:\n    SIZE = 1\nMETHOD = 'full'\nDEFAULTS = {'a': SIZE}",
        "if True:\n    METHOD, DEFAULTS = 'full', {'a': 1}",
        "import sys\nMETHOD = 'full'\nsys.modules[__name__] if False else None\nDEFAULTS = {'a': 1}",
        "METHOD = 'full'\nDEFAULTS = {'a': 1}\ndef more():\n    DEFAULTS['b'] = 2\nmore()",
    ],
)
def test_they_may_be_made_of_anything_at_the_top_level(recipe, text):
    path = recipe(f"import json as unused\n{text}\ndef main(cfg):\n    pass\n")
    ran = runpy.run_path(str(path), run_name="as_a_module")
    assert read_recipe(str(path)) == (ran["METHOD"], ran["DEFAULTS"])


def test_what_they_do_not_need_is_not_run(recipe):
    path = recipe(
        "import no_such_module, math\nfrom os import sep, no_such_name\nMETHOD = 'full'\nDEFAULTS = {'a': math.pi}\n"
        "no_such_name()\nif __name__ == '__main__':\n    DEFAULTS = 1 / 0\n"
    )
    assert read_recipe(str(path)) == ("full", {"a": pytest.approx(3.14, abs=0.01)})


def test_a_recipe_that_cannot_be_read_in_parts_is_run_as_a_module(recipe):
    path = recipe("METHOD = 'full'\nexec('SIZE = 3')\nDEFAULTS = {'a': SIZE}\nassert __name__ != '__main__'\n")
    assert read_recipe(str(path)) == ("full", {"a": 3})


def test_what_sets_neither_is_no_recipe_of_this_kind(recipe):
    for text in ("import no_such_module\n", "METHOD = 'full'\n"):
        with pytest.raises(UserError, match="sets no METHOD and DEFAULTS"):
            read_recipe(str(recipe(text)))


@pytest.mark.parametrize(
    "call, expected",
    [
        ("main(config.parse(METHOD, DEFAULTS))", True),
        ("cfg = parse(METHOD, DEFAULTS)", True),
        ("main(config.parse(METHOD, DEFAULTS | MORE))", False),
        ("main(config.parse(METHOD, DEFAULTS, sys.argv[2:]))", False),
        ("main(json.loads(sys.argv[1]))", False),
        ("sys.path.insert(0, 'losses')\n    main(config.parse(METHOD, DEFAULTS))", False),
    ],
)
def test_a_recipe_that_parses_its_words_as_ours_do_is_known(recipe, call, expected):
    assert parses_defaults(recipe(f"if __name__ == '__main__':\n    {call}\n")) == expected


def test_a_copy_does_as_ours_until_what_it_does_is_edited(recipe):
    text = own("recipe")["lora_dpo_single_device"].read_text()
    assert does_as_ours(recipe(text.replace("DEFAULTS = {", 'DEFAULTS = {\n    "mine": 1,')))
    assert does_as_ours(recipe(text.replace("optimizer.step()", "optimizer.step()  # says no more")))
    assert not does_as_ours(recipe(text.replace("optimizer.step()", "optimizer.step(None)")))
    assert not does_as_ours(recipe(text.replace("from pairtune.pairs.tokenize import", "from my_rows import")))
    assert sys.modules.get("pairtune_recipe") is None
