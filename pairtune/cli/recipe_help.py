"""What `tune run RECIPE --help` prints: the recipe's own words, and every key with its default and what it does."""

import ast
import io
import re
import shutil
import textwrap
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairtune.cli.recipe import top_level
from pairtune.config import keys
from pairtune.config.rules import REQUIRED, show
from pairtune.config.source import bound_by

COLUMN = 38  # where comments begin
WIDTH = 100
MARK = re.compile(r";?\s*\bdistributed only$")  # for tools/sync_recipes.py
INTRODUCTION = (
    "Every key and its default. Set one in a config, or behind it as key=value, such as samples.num_prompts=0."
)


def recipe_help(recipe: Path) -> str:
    """Returns a recipe's docstring and its DEFAULTS; of one without any, such as torchtune's, the docstring."""
    text = recipe.read_text(encoding="utf-8")
    described = ast.get_docstring(ast.parse(text)) or f"{recipe}: has no docstring"
    namespace = top_level(recipe, "DEFAULTS")
    if not isinstance(namespace.get("DEFAULTS"), dict):
        return described
    said = _Said(text, namespace)
    width = max(COLUMN + 20, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns))
    lines = [line for entry in _entries(namespace["DEFAULTS"], said) for line in entry.lines(width)]
    space = [""] * bool(lines and lines[0])
    words = [part for line in described.splitlines() for part in _wrapped(line, width)]
    return "\n".join([*words, "", *textwrap.wrap(INTRODUCTION, width), *space, *lines])


def _wrapped(line: str, width: int) -> list[str]:
    """The line in lines; as it is where it is indented, which is a command."""
    return [line] if line.startswith(" ") else textwrap.wrap(line, width) or [""]


def _entries(defaults: dict, said: "_Said", prefix: str = "", told: set[tuple] | None = None) -> Iterator["_Entry"]:
    """Comments of the keys that `dataset` and `eval_dataset` share are told once."""
    told = set() if told is None else told
    for key, default in defaults.items():
        name = f"{prefix}{key}"
        comment = said.comments.get(name) or keys.comment(name)
        yield _Entry(name, default, "" if (key, comment) in told else comment, said.headings.get(name, ""))
        told.add((key, comment))
        if isinstance(default, dict):
            yield from _entries(default, said, f"{name}.", told)


@dataclass(frozen=True)
class _Entry:
    """A key, its default, its comment, and what stands above it in the recipe as a heading."""

    name: str
    default: Any
    comment: str
    heading: str = ""

    def lines(self, width: int) -> list[str]:
        depth = self.name.count(".")
        shown = "" if isinstance(self.default, dict) and self.default else f" {_shown(self.default)}"
        line = f"{'  ' * (depth + 1)}{self.name.rpartition('.')[2]}:{shown}"
        comment = textwrap.wrap(self.comment, width - COLUMN) if self.comment else []
        if comment and len(line) < COLUMN:
            line = line.ljust(COLUMN) + comment.pop(0)
        heading = ["", *textwrap.wrap(self.heading, width)] if self.heading else []
        return [*heading, line, *(" " * COLUMN + more for more in comment)]


def _shown(default: Any) -> str:
    if default == REQUIRED:
        return "(required)"
    return "{}" if default == {} else show(default)


class _Said:
    """Comments in a recipe's DEFAULTS: behind a key's entry, or above it, where a capital makes a heading of one."""

    def __init__(self, text: str, namespace: dict):
        self.comments: dict[str, str] = {}
        self.headings: dict[str, str] = {}
        self._namespace = namespace
        self._behind: dict[int, str] = {}  # by line
        self._above: dict[int, str] = {}
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                comments = self._above if token.line.lstrip().startswith("#") else self._behind
                comments[token.start[0]] = MARK.sub("", token.string).lstrip("# ")
        for statement in ast.parse(text).body:
            if "DEFAULTS" in bound_by(statement) and isinstance(getattr(statement, "value", None), ast.Dict):
                self._read(statement.value, set())

    def _read(self, block: ast.Dict, told: set[int], prefix: str = "") -> None:
        """Reads the comments of a block, but those on lines that an entry around it has."""
        end = block.lineno
        for key, value in zip(block.keys, block.values, strict=True):
            lines = [value.end_lineno, (key or value).lineno]
            above = " ".join(self._above[line] for line in range(end, lines[1]) if line in self._above)
            is_heading = above[:1].isupper()
            names = [key.value] if isinstance(key, ast.Constant) else self._spread(value)
            if is_heading and names:
                self.headings[f"{prefix}{names[0]}"] = above
            if isinstance(key, ast.Constant):
                comments = [self._behind[line] for line in lines if line in self._behind and line not in told]
                self.comments[f"{prefix}{key.value}"] = next(iter(comments), "" if is_heading else above)
                if isinstance(value, ast.Dict):
                    self._read(value, {*told, *lines}, f"{prefix}{key.value}.")
            end = value.end_lineno

    def _spread(self, value: ast.expr) -> list[str]:
        """The keys of `**value`."""
        try:
            return list(eval(compile(ast.Expression(value), "DEFAULTS", "eval"), self._namespace))
        except Exception:  # of a copy that was only run as a whole
            return []
