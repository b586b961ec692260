"""Recipes and configs by name: a user's file, ours, torchtune's."""

import ast
import functools
import importlib.util
import runpy
from pathlib import Path

from pairtune.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parents[1]
HOME = PACKAGE if (PACKAGE / "recipes").is_dir() else PACKAGE.parent  # in a wheel recipes travel inside the package
TORCHTUNE = Path(importlib.util.find_spec("torchtune").origin).resolve().parent  # found, not imported
SUFFIXES = {"recipe": (".py",), "config": (".yaml", ".yml")}


def find(kinds: str, name: str, *, files: bool = True) -> Path:
    """Returns the absolute path of a "recipe", a "config", or whichever of "recipe or config" comes first.

    A file, or else a name of ours, or else of torchtune's. The suffix may be left out, as may `recipes/` and
    `configs/`; `torchtune/NAME` means torchtune's also where ours has the name. Raises UserError with the nearest.
    """
    for kind in kinds.split(" or "):
        suffix = next((s for s in SUFFIXES[kind] if name.endswith(s)), "")
        candidates = [name] if suffix else [name + s for s in SUFFIXES[kind]]
        for path in map(Path, candidates if files else []):
            if path.expanduser().is_file():
                return path.expanduser().absolute()
        stem = name.removesuffix(suffix).removeprefix(f"{kind}s/")
        if stem in names(kind):
            return names(kind)[stem]
    if kinds == "config" and stem in names("recipe"):
        raise UserError(
            f"{name}: is a recipe, not a config; `tune validate` and `tune plan` take CONFIG --recipe {stem}"
        )
    known = [known for kind in kinds.split(" or ") for known in names(kind)]
    raise UserError(f"{name}: no such {kinds}{nearest(stem, known, num=3)}; `tune ls` lists them")


@functools.cache
def own(kind: str) -> dict[str, Path]:
    """Returns our recipes or configs, name to path, sorted."""
    return {path.stem: path for path in sorted((HOME / f"{kind}s").glob(f"[!_]*{SUFFIXES[kind][0]}"))}


@functools.cache
def torchtunes(kind: str) -> dict[str, Path]:
    """Returns torchtune's recipes or configs, name to path."""
    folder = TORCHTUNE.parent / "recipes"
    entries = torchtune_registry()
    if kind == "config":
        folder, entries = folder / "configs", [config for recipe in entries for config in recipe.configs]
    found = {entry.name: folder / entry.file_path for entry in entries}
    return {name: path for name, path in found.items() if path.is_file()}  # one config is registered and not shipped


@functools.cache
def names(kind: str) -> dict[str, Path]:
    """Returns every name that `find` knows, and its path."""
    theirs = torchtunes(kind)
    return {f"torchtune/{name}": path for name, path in theirs.items()} | theirs | own(kind)


@functools.cache
def torchtune_registry() -> list:
    """Returns torchtune's recipes, each with its configs."""
    # By path: importing it as a module would import torchtune, and with it torch (4 s).
    return runpy.run_path(str(TORCHTUNE / "_recipe_registry.py"))["_ALL_RECIPES"]


def is_torchtunes(path: Path) -> bool:
    """Returns whether a recipe or config came with torchtune."""
    return path.resolve().is_relative_to(TORCHTUNE.parent / "recipes")


def one_process_only(recipe: Path) -> bool:
    """Returns whether a recipe has no use for torchrun."""
    single = [torchtunes("recipe")[r.name] for r in torchtune_registry() if not r.supports_distributed]
    return recipe.stem.endswith("_single_device") or recipe.resolve() in single


def first_line(path: Path) -> str:
    """Returns a recipe's docstring, or a config's first comment, to its line's end."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return text.partition("\n")[0].lstrip("# ")
