"""The house stands: rooms use lower floors only, no circles, functions that fit a screen. Read with `ast`, not run."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top
ROOMS = (
    "cli",
    "making",
    "run",
    "reference",
    "hub",
    "losses",
    "folders",
    "models",
    "pairs",
    "config",
    "tokenizer",
)
LEAVES = ("errors.py", "files.py", "process")  # on the ground: they use each other only
LONGEST = 60  # lines of a function
RECIPE = 295  # lines of one, DEFAULTS included
DEEPEST = 3  # blocks within blocks in a recipe's main


@cache
def modules() -> dict[str, ast.Module]:
    """Returns the package's modules by name, parsed."""
    found = {}
    for path in sorted((ROOT / "pairtune").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imported(tree: ast.Module) -> set[str]:
    """Returns the package's modules that a module imports, those within functions included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"line {node.lineno}: import by the full name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in modules() else node.module for name in names}
    return found & modules().keys()


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def floor(module: str) -> int:
    """Returns 0 for a leaf, and more the higher a room is."""
    return len(ROOMS) - ROOMS.index(room(module)) if room(module) in ROOMS else 0


def test_a_room_uses_lower_floors_only():
    between = [(name, other) for name, tree in modules().items() for other in imported(tree)]
    up = {f"{a} imports {b}" for a, b in between if room(a) != room(b) and floor(b) >= max(1, floor(a))}
    assert not up


def test_no_modules_import_each_other_in_a_circle():
    above = {name: imported(tree) - {name} for name, tree in modules().items()}
    while free := [name for name, uses in above.items() if not uses & above.keys()]:
        for name in free:
            del above[name]
    assert not above  # these are in a circle, or above one


def test_the_package_shows_rooms_and_a_few_leaves():
    entries = {path.name for path in (ROOT / "pairtune").iterdir() if path.name != "__pycache__"}
    assert entries == {"__init__.py", *ROOMS, *LEAVES}
    assert len(entries) <= 15


def test_a_function_fits_a_screen():
    functions = [
        (f"{name}.{node.name}", node.end_lineno - node.lineno + 1)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert not [(name, lines) for name, lines in functions if lines > LONGEST]


def depth(node: ast.AST) -> int:
    """Returns how many blocks lie within each other below a node; an elif is no deeper than its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        blocks = (ast.If, ast.For, ast.While, ast.With, ast.Try)
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, blocks) and not is_elif))
    return deepest


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*_dpo_*.py")), ids=lambda path: path.stem)
def test_a_recipe_reads_downward(path):
    text = path.read_text()
    assert len(text.splitlines()) <= RECIPE
    tree = ast.parse(text)
    (main,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main")
    assert depth(main) <= DEEPEST
    assert not [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
