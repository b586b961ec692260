"""What a recipe says of itself, ours or a copy: read without running it or what it imports, as far as is possible.

METHOD and DEFAULTS may be made of anything at a recipe's top level. Of its statements those are executed that the two
need, and of its imports the names that those need.
"""

import ast
import runpy
from pathlib import Path
from typing import Any

from pairtune.cli.find import find, own
from pairtune.config.source import bound_by, statements
from pairtune.errors import UserError

DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def read_recipe(name: str) -> tuple[str, dict]:
    """Returns a recipe's METHOD and DEFAULTS.

    Raises:
        UserError: There is no such recipe, or it has no METHOD or no DEFAULTS.
    """
    found = top_level(find("recipe", name), "METHOD", "DEFAULTS")
    if not {"METHOD", "DEFAULTS"} <= found.keys():
        raise UserError(f"{name}: sets no METHOD and DEFAULTS")
    return found["METHOD"], found["DEFAULTS"]


def top_level(path: Path, *names: str) -> dict[str, Any]:
    """Returns what a recipe's top level sets these names to, and what it needs for that; nothing if it sets none."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if not any({*names} & _bound(statement) for statement in tree.body):
        return {}
    namespace = {"__name__": "pairtune_recipe", "__file__": str(path)}  # a recipe runs only as __main__
    try:
        exec(compile(ast.Module(_needed(tree.body, {*names}), []), str(path), "exec"), namespace)
    except Exception:  # it needs more than can be told from its names
        namespace = runpy.run_path(str(path), run_name="pairtune_recipe")
    return namespace


def parses_defaults(path: Path) -> bool:
    """Returns whether a recipe comes to its config as ours do: config.parse(METHOD, DEFAULTS), from the same places."""
    text = path.read_text(encoding="utf-8")
    if "sys.path" in text:
        return False
    return any(
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", None)) == "parse"
        and [getattr(argument, "id", None) for argument in node.args] == ["METHOD", "DEFAULTS"]
        for node in ast.walk(ast.parse(text))
    )


def does_as_ours(path: Path) -> bool:
    """Returns whether a recipe is one of ours, or a copy that differs in its docstring, METHOD and DEFAULTS only."""
    return _without_defaults(path) in {_without_defaults(ours) for ours in own("recipe").values()}


def _without_defaults(path: Path) -> str:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    body = body[1:] if isinstance(body[0], ast.Expr) else body  # the docstring
    return ast.dump(ast.Module([s for s in body if not {"METHOD", "DEFAULTS"} & _bound(s)], []))


def _needed(body: list[ast.stmt], asked: set[str]) -> list[ast.stmt]:
    """The statements that give these names their values, in order."""
    functions = [s for s in body if isinstance(s, DEFINITIONS)]
    changing = {function.name for function in functions if asked & _mentioned(function)}  # if they are called
    names, chosen = {*asked}, set()
    while more := [s for s in body if s not in chosen and _has_part_in(s, names, changing)]:
        chosen.update(more)
        names |= {name for statement in more for name in _mentioned(statement)}
    return [_narrowed(statement, names) for statement in body if statement in chosen]


def _has_part_in(statement: ast.stmt, names: set[str], changing: set[str]) -> bool:
    """Whether a statement binds one of these names, or may change what it holds: DEFAULTS["lr"] = 1."""
    if isinstance(statement, ast.If) and "__name__" in _mentioned(statement.test):
        return False  # what runs it
    if names & _bound(statement):
        return True
    is_another = isinstance(statement, (ast.Import, ast.ImportFrom, *DEFINITIONS)) or _binds_whole_names(statement)
    return not is_another and bool((names | changing) & _mentioned(statement))


def _bound(statement: ast.stmt) -> set[str]:
    return {name for inner in statements([statement]) for name in bound_by(inner)}


def _mentioned(node: ast.AST) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def _binds_whole_names(statement: ast.stmt) -> bool:
    targets = getattr(statement, "targets", None) or [getattr(statement, "target", None)]
    return isinstance(statement, (ast.Assign, ast.AnnAssign)) and all(isinstance(t, ast.Name) for t in targets)


def _narrowed(statement: ast.stmt, names: set[str]) -> ast.stmt:
    if not isinstance(statement, (ast.Import, ast.ImportFrom)):
        return statement
    kept = [alias for alias in statement.names if (alias.asname or alias.name.partition(".")[0]) in (*names, "*")]
    fields = {"module": statement.module, "level": statement.level} if isinstance(statement, ast.ImportFrom) else {}
    return ast.copy_location(type(statement)(names=kept, **fields), statement)
