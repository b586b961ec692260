"""docs/architecture.md tells the truth: its changes can be made as they stand there, and what it names is there."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import test_house
from helpers import ENVIRONMENT, ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
CHANGES = ("A loss", "A form of rows", "A family of models")
COPIED = ("pairtune", "recipes", "configs", "docs", "tests", "tools", "README.md", "pyproject.toml")


def section(title):
    """The text below a heading, up to the next one."""
    (text,) = re.findall(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return text


def block(title, language):
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", section(title), re.MULTILINE | re.DOTALL)
    return text


@pytest.fixture
def tree(tmp_path):
    """A copy of the source, and what runs a command in it."""
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    environment = ENVIRONMENT | {
        "PYTHONPATH": str(tmp_path),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `python` is this one
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),  # inside a repository, git would apply nothing, in silence
    }

    def run(*command, given=None):
        done = subprocess.run(command, cwd=tmp_path, env=environment, input=given, text=True, capture_output=True)
        assert done.returncode == 0, f"docs/architecture.md, {' '.join(command)}:\n{done.stdout}{done.stderr}"

    return run


@pytest.mark.parametrize("title", CHANGES)
def test_a_change_applies_as_it_stands_and_its_tests_pass(title, tree):
    diff = block(title, "diff")
    tree("git", "apply", "--whitespace=error-all", "-", given=diff)
    tree("sh", "-ec", block(title, "sh"))
    for words in (("check",), ("format", "--check")):
        tree("python", "-m", "ruff", *words, *re.findall(r"^\+\+\+ b/(.*\.py)$", diff, re.MULTILINE))


def definitions(path):
    """The names of a file's functions and classes, methods as Class.method."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
    return names


def test_every_file_and_function_on_a_rows_way_is_there():
    steps = re.split(r"^\d+\. ", section("From a row to a gradient"), flags=re.MULTILINE)[1:]
    assert len(steps) == 10
    for step in steps:
        named = re.findall(r"`([\w/]+\.py):([\w.]+)`", step)
        assert named, step
        assert [f"{path}:{name}" for path, name in named if name not in definitions(path)] == []


def test_the_drawing_has_every_room_on_its_floor_with_what_it_uses():
    drawn = {}
    for name, uses in re.findall(r"^\| (\w*) +\|.*?\|(.*)\|$", section("The house"), re.MULTILINE):
        drawn.setdefault(name or list(drawn)[-1], []).extend(uses.split())  # without a name it is a row's second line
    used = {name: set() for name in test_house.ROOMS}
    for module, tree in test_house.modules().items():
        if (room := test_house.room(module)) in used:
            used[room] |= {test_house.room(other) for other in test_house.imported(tree)} - {room}
    expected = {room: [other for other in used if other in used[room]] for room in used}
    expected["cli"] = ["all", "below"]
    assert list(drawn) == list(expected) and drawn == expected
