"""What is at an import path, as far as source tells: nothing is imported, so what is wrong shows before torch loads.

Whatever does something unusual, and so is only known when it runs, is None: unknown, and not wrong.
"""

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from pairtune import MOVED

DYNAMIC = ("__getattr__", "globals()", "vars()", "locals()", "sys.modules", "setattr(", "exec(", "__dict__")


class Missing(Exception):
    """There is nothing at an import path; why, in words."""


@dataclass(frozen=True)
class Module:
    """A module or package that has a source; `folders` are where a package's modules are."""

    name: str
    file: Path | None
    folders: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Definition:
    """A function or class, where it is written."""

    module: Module
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

    @property
    def name(self) -> str:
        return f"{self.module.name}.{self.node.name}"


def split(path: str) -> list[str]:
    """Returns the names of an import path.

    Raises:
        Missing: It is none.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise Missing("an import path is names with dots between them")
    return parts


def look_up(path: str) -> Module | Definition | None:
    """Returns what is at an import path.

    Raises:
        Missing: Nothing can be there.
    """
    for old, new in MOVED.items():
        if f"{path}.".startswith(f"{old}."):
            path = new + path.removeprefix(old)
    first, *rest = split(path)
    found = _top(first)
    for part in rest:
        found = _member(found, part) if isinstance(found, Module) else None
    return found


def public_classes(module: str) -> list[str]:
    """Returns the public classes that a module or its submodules define, in order; in a module of functions, those."""
    home = look_up(module)
    if not isinstance(home, Module):
        return []
    found = {name: _member(home, name) for name in _bindings(home) if not name.startswith("_")}
    mine = {n: d for n, d in found.items() if isinstance(d, Definition) and f"{d.name}.".startswith(f"{home.name}.")}
    classes = [name for name, defined in mine.items() if isinstance(defined.node, ast.ClassDef)]
    return classes or list(mine)


def named(module: Module, expression: ast.expr | None) -> Module | Definition | None:
    """Returns what an expression such as nn.Module names within a module."""
    try:
        if isinstance(expression, ast.Name):
            return _member(module, expression.id)
        if isinstance(expression, ast.Attribute):
            above = named(module, expression.value)
            return _member(above, expression.attr) if isinstance(above, Module) else None
    except Missing:  # a builtin
        return None
    return None


def assigned(module: Module, name: str) -> tuple[Module, ast.expr] | None:
    """Returns the expression that a name within a module stands for, such as an annotation's, and where it is."""
    statements = _bindings(module).get(name, [])
    if len(statements) != 1:
        return None
    if isinstance(statements[0], ast.Assign):
        return module, statements[0].value
    if not isinstance(statements[0], ast.ImportFrom):
        return None
    alias = next(a for a in statements[0].names if name == (a.asname or a.name))
    try:
        origin = look_up(_absolute(module, statements[0]))
    except Missing:
        return None
    return assigned(origin, alias.name) if isinstance(origin, Module) and origin != module else None


# Modules


def _top(name: str) -> Module | None:
    try:
        spec = importlib.util.find_spec(name)  # of a name without dots, it imports nothing
    except (ImportError, ValueError):
        return None
    if spec is None:
        raise Missing(f"there is no module {name}")
    return _module(spec)


def _module(spec: ModuleSpec) -> Module | None:
    is_source = spec.origin is not None and spec.origin.endswith(".py")
    if not is_source and not (spec.origin is None and spec.submodule_search_locations):
        return None
    return Module(spec.name, Path(spec.origin) if is_source else None, tuple(spec.submodule_search_locations or ()))


def _submodule(package: Module, name: str) -> Module | None:
    """None also where it has no source; what cannot be there at all is for _member to say."""
    spec = PathFinder.find_spec(f"{package.name}.{name}", list(package.folders)) if package.folders else None
    return _module(spec) if spec else None


@cache
def _tree(file: Path) -> tuple[ast.Module | None, bool]:
    """A source, and whether it may have names that it does not bind."""
    try:
        text = file.read_text(encoding="utf-8")
        return ast.parse(text), any(word in text for word in DYNAMIC)
    except (OSError, ValueError, SyntaxError, RecursionError):
        return None, True


@cache
def _bindings(module: Module) -> dict[str, list[ast.stmt]]:
    """Statements by the names that they bind; "*" has the imports of whole modules."""
    bound: dict[str, list[ast.stmt]] = {}
    tree = _tree(module.file)[0] if module.file else None
    for statement in statements(tree.body if tree else []):
        for name in bound_by(statement):
            bound.setdefault(name, []).append(statement)
    return bound


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Returns the statements at a module's level, within its ifs, tries, withs and loops, too."""
    for statement in body:
        yield statement
        if not isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            for field in ("body", "orelse", "finalbody"):
                yield from statements(getattr(statement, field, []))
            for handler in getattr(statement, "handlers", []):
                yield from statements(handler.body)


def bound_by(statement: ast.stmt) -> list[str]:
    """Returns the names that a statement itself binds: not those that are within it."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [statement.name]
    if isinstance(statement, ast.Import):
        return [alias.asname or alias.name.partition(".")[0] for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    own = [getattr(statement, field, None) for field in ("targets", "target", "items")]  # assignment, loop, with
    stored = [
        node for part in own for root in (part if isinstance(part, list) else [part]) if root for node in ast.walk(root)
    ]
    return [node.id for node in stored if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]


_following: set[tuple[str, str]] = set()  # names that are being looked up: modules may import each other


def _member(module: Module, name: str) -> Module | Definition | None:
    """What `module.name` is, or would be after an import of that module."""
    statements = _bindings(module).get(name, [])
    step = (module.name, name)
    if statements:
        if len(statements) > 1 or step in _following:
            return _submodule(module, name) if step in _following else None
        _following.add(step)
        try:
            return _bound_to(module, statements[0], name)
        except Missing:  # the module itself cannot be imported, which is told when it is
            return None
        finally:
            _following.discard(step)
    if found := _submodule(module, name) or _from_star(module, name):
        return found
    if _may_have_more(module) or _is_there(module, name):
        return None
    raise Missing(f"{module.name} has no {name}")


def _bound_to(module: Module, statement: ast.stmt, name: str) -> Module | Definition | None:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return Definition(module, statement)
    if isinstance(statement, ast.Import):
        alias = next(a for a in statement.names if name == (a.asname or a.name.partition(".")[0]))
        return look_up(alias.name if alias.asname else name)
    if isinstance(statement, ast.ImportFrom):
        alias = next(a for a in statement.names if name == (a.asname or a.name))
        source = look_up(_absolute(module, statement))
        return _member(source, alias.name) if isinstance(source, Module) else None
    return None


def _absolute(module: Module, statement: ast.ImportFrom) -> str:
    """The name of the module that `from ... import` imports from."""
    if not statement.level:
        return statement.module
    package = module.name.split(".")
    package = package[: len(package) - statement.level + bool(module.folders)]
    return ".".join([*package, *([statement.module] if statement.module else [])])


def _stars(module: Module) -> list[Module | None]:
    def imported(statement: ast.ImportFrom) -> Module | None:
        try:
            found = look_up(_absolute(module, statement))
        except Missing:
            return None
        return found if isinstance(found, Module) else None

    return [imported(statement) for statement in _bindings(module).get("*", [])]


def _from_star(module: Module, name: str) -> Module | Definition | None:
    for starred in _stars(module):
        if starred and not name.startswith("_") and name in _bindings(starred):
            return _member(starred, name)
    return None


def _may_have_more(module: Module) -> bool:
    """Whether names may be in it that no statement of its own binds."""
    if module.file is None:
        return False  # a folder without __init__.py
    return _tree(module.file)[1] or any(starred is None or _may_have_more(starred) for starred in _stars(module))


def _is_there(package: Module, name: str) -> bool:
    """Whether a submodule without source is there."""
    return bool(package.folders) and PathFinder.find_spec(f"{package.name}.{name}", list(package.folders)) is not None
