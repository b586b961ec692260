"""What source tells of a component is what importing it tells, or nothing."""

import importlib
import inspect
import sys
from collections.abc import Callable
from itertools import chain
from typing import Any, Literal, Optional, Union

import pytest
import torch
import torchtune.training.metric_logging  # noqa: F401  (one of MODULES)

from pairtune.config import source
from pairtune.config.components import CLASSES, HOMES, _imported, _signature
from pairtune.config.rules import _options
from pairtune.config.signatures import ancestors, parameters_of

MODULES = (
    *("torch.optim", "torch.optim.lr_scheduler", "torchtune.rlhf.loss", "torchtune.training"),
    *(
        "torchtune.training.metric_logging",
        "torchtune.models.llama3",
        "torchtune.models.qwen2",
        "torchtune.models.phi3",
    ),
    *("torchtune.models.gemma2", "torchtune.models.mistral", "pairtune.losses", "pairtune.schedules"),
    *("pairtune.models.gemma2", "pairtune.models.gpt2", "pairtune.models.mixtral", "pairtune.tokenizer"),
)


def public(module):
    return [f"{module}.{name}" for name, value in vars(importlib.import_module(module)).items() if callable(value)]


def tells(path):
    found = source.look_up(path)
    return parameters_of(found) if isinstance(found, source.Definition) else None


@pytest.mark.parametrize("module", MODULES)
def test_source_tells_the_signature_or_nothing(module):
    """Of annotations it may tell less: that anything goes."""
    for path in public(module):
        told = tells(path)
        if told is None:
            continue
        known = _signature(_imported(path))
        assert list(told) == list(known), path
        for name, parameter in known.items():
            here = told[name]
            assert (here.kind, here.default is here.empty) == (parameter.kind, parameter.default is parameter.empty)
            simple = {option for option in _options(parameter.annotation) if option in (bool, int, float, str)}
            assert here.annotation is Any or simple <= {*_options(here.annotation)}, (path, name)


@pytest.mark.parametrize("module", MODULES)
def test_source_tells_what_is_made_or_nothing(module):
    for path in public(module):
        found, component = source.look_up(path), _imported(path)
        made = component if inspect.isclass(component) else getattr(component, "__annotations__", {}).get("return")
        classes = ancestors(found) if isinstance(found, source.Definition) and inspect.isclass(made) else None
        for kind in chain.from_iterable(CLASSES.values()):
            assert classes is None or (kind in classes) == issubclass(made, _imported(kind)), path


def test_classes_go_by_their_own_names():
    for kind in chain.from_iterable(CLASSES.values()):
        assert f"{_imported(kind).__module__}.{_imported(kind).__qualname__}" == kind


def test_what_configs_and_recipes_name_is_told_in_full():
    """Or a mistake in an argument is told after torch is imported."""
    paths = [f"torch.optim.{name}" for name in source.public_classes("torch.optim")]
    paths += [f"pairtune.losses.{name}" for name in source.public_classes("pairtune.losses.modules")]
    paths += ["torchtune.rlhf.loss.DPOLoss", "torchtune.models.llama3.llama3_8b", "pairtune.schedules.cosine"]
    paths += ["torchtune.training.FullModelHFCheckpointer", "pairtune.tokenizer.hf_tokenizer"]
    assert [path for path in paths if tells(path) is None and not path.endswith(".Loss")] == []


def is_of(module, value):
    """Whether it is written in a module, which a config may know under an earlier name, or below it."""
    return str(getattr(value, "__module__", "")).startswith(module.__name__)


@pytest.mark.parametrize("home", HOMES.values())
def test_public_classes_are_those_that_the_module_has(home):
    module = importlib.import_module(home)
    mine = {n: v for n, v in vars(module).items() if is_of(module, v) and n[0] != "_"}
    classes = [name for name, value in mine.items() if inspect.isclass(value)]
    functions = [name for name, value in mine.items() if inspect.isfunction(value)]
    assert source.public_classes(home) == (classes or functions)


@pytest.mark.parametrize(
    "path, why",
    [
        ("no_such.Loss", "there is no module no_such"),
        ("torch.optim.AdmW", "torch.optim has no AdmW"),
        ("torchtune.rlhf.losses.DPOLoss", "torchtune.rlhf has no losses"),
        ("torchtune.models.llama3.llama3_8c", "torchtune.models.llama3 has no llama3_8c"),
        ("pairtune.gemma2.gemma2_8b", "pairtune.models.gemma2 has no gemma2_8b"),  # a path of earlier runs
        ("json..loads", "names with dots between them"),
        ("", "names with dots between them"),
    ],
)
def test_what_is_not_there_is_missing_in_the_same_words(path, why):
    with pytest.raises(source.Missing, match=why):
        source.look_up(path)
    with pytest.raises(source.Missing, match=why):
        _imported(path)


@pytest.fixture
def package(tmp_path, monkeypatch):
    def write(**files):
        for name, text in files.items():
            path = tmp_path / "mine" / f"{name}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            monkeypatch.delitem(sys.modules, "mine" if name == "__init__" else f"mine.{name}", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))

    return write


@pytest.mark.parametrize(
    "text",
    [
        "from functools import partial\nmade = partial(int, base=2)",
        "def __getattr__(name):\n    return int",
        "globals()['made'] = int",
        "from os.path import *\nfrom math import *\nmade = 1",
        "if True:\n    def made(): ...\nelse:\n    def made(a): ...",
        "class made:\n    def __new__(cls, a): ...",
        "class made(type('Base', (), {})): ...",
        "import functools\n@functools.cache\ndef made(a): ...",
        "from dataclasses import InitVar, dataclass\n@dataclass\nclass made:\n    a: InitVar[int]",
        "import no_such_module\nfrom no_such_module import made",
    ],
)
def test_what_only_running_it_tells_is_unknown(package, text):
    package(__init__=text)
    assert tells("mine.made") is None


def test_names_are_followed_through_modules(package):
    package(
        __init__="from .a import made\nfrom mine import b as c\nfrom .b import *",
        a="from mine.b import inner as made",
        b="class Base:\n    def __init__(self, x: int, *, y=0.5): ...\nclass inner(Base): ...\ndef starred(z): ...",
    )
    for path in ("mine.made", "mine.a.made", "mine.b.inner", "mine.c.inner", "mine.inner"):
        assert {name: (p.annotation, p.default) for name, p in tells(path).items()} == {
            "x": (int, inspect.Parameter.empty),
            "y": (inspect.Parameter.empty, 0.5),
        }
    assert list(tells("mine.starred")) == ["z"]
    with pytest.raises(source.Missing, match=r"mine\.b has no outer"):
        source.look_up("mine.b.outer")


def test_fields_of_dataclasses_are_parameters(package):
    package(
        __init__="from dataclasses import KW_ONLY, dataclass, field\nfrom typing import ClassVar\n"
        "@dataclass\nclass Base:\n    a: int\n    kind: ClassVar[str] = 'x'\n    _: KW_ONLY\n    b: float = 1.0\n"
        "@dataclass\nclass made(Base):\n    c: list[str] = field(default_factory=list)\n"
    )
    known = inspect.signature(_imported("mine.made")).parameters
    told = tells("mine.made")
    assert list(told) == list(known) == ["a", "c", "b"]
    assert [told[name].default is inspect.Parameter.empty for name in known] == [True, False, False]
    assert told["c"].annotation == list[str]


@pytest.mark.parametrize(
    "written, told",
    [
        ("float | Tensor", float | Any),
        ("Optional[List[int]]", Optional[list[int]]),  # noqa: UP045
        ("'int'", int),
        ("Kind", Literal["a", "b"]),
        ("float | Kind", Union[float, Literal["a", "b"]]),  # noqa: UP007
        ("float | Elsewhere", Any),  # it may be text, too
        ("Mine", Any),
        ("tuple[float, Mine]", tuple[float, Any]),
        ("Callable[[int], str]", Callable),
    ],
)
def test_an_annotation_is_told_where_all_of_its_parts_are(package, written, told):
    package(
        __init__="from collections.abc import Callable\nfrom typing import List, Literal, Optional\n"
        "from torch import Tensor\nfrom elsewhere import Elsewhere\nKind = Literal['a', 'b']\nclass Mine(str): ...\n"
        f"def made(x: {written}): ..."
    )
    assert tells("mine.made")["x"].annotation == told


def test_nothing_is_imported(package):
    package(__init__="raise RuntimeError('imported')\ndef made(a): ...")
    assert list(tells("mine.made")) == ["a"]
    assert torch.optim.AdamW is _imported("torch.optim.AdamW")
