"""What a function or class of source.py is called with, and what it makes. None is unknown, and not wrong."""

import ast
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Literal, Optional, Union

from pairtune.config.source import Definition, Module, assigned, named

KINDS = {  # what annotations that YAML can satisfy are made of
    **{kind.__name__: kind for kind in (bool, int, float, str, list, tuple, dict, set)},
    **{kind.__name__: kind for kind in (Callable, Iterable, Mapping, Sequence)},
    **{"List": list, "Tuple": tuple, "Dict": dict, "None": NoneType},
    **dict.fromkeys(("Any", "Tensor", "Module", "Optimizer"), Any),  # what YAML cannot write
}


def parameters_of(defined: Definition) -> dict[str, inspect.Parameter] | None:
    """Returns what inspect.signature would tell; annotations as far as YAML could satisfy them, else Any."""
    if not isinstance(defined.node, ast.ClassDef):
        return None if defined.node.decorator_list else _by_name(_parameters(defined))
    if _is_dataclass(defined):
        return _fields(defined)
    made = _initializer(defined)
    return None if made is None or made.node.decorator_list else _by_name(list(_parameters(made))[1:])


def ancestors(defined: Definition) -> list[str] | None:
    """Returns the names of a class and all that it inherits from; of a function, those of what it says it returns."""
    node = defined.node
    if not isinstance(node, ast.ClassDef):
        made = named(defined.module, node.returns)
        is_class = isinstance(made, Definition) and isinstance(made.node, ast.ClassDef)
        return ancestors(made) if is_class and not node.decorator_list else None
    above = [ancestors(base) if base else None for base in _bases(defined)]
    return None if None in above else [defined.name, *(name for names in above for name in names)]


def _by_name(parameters: Iterable[inspect.Parameter]) -> dict[str, inspect.Parameter]:
    return {parameter.name: parameter for parameter in parameters}


def _methods(node: ast.ClassDef) -> dict[str, ast.FunctionDef]:
    return {inner.name: inner for inner in node.body if isinstance(inner, ast.FunctionDef)}


def _initializer(defined: Definition) -> Definition | None:
    """The __init__ that a class has or inherits; None where calling it may do something else."""
    node, methods = defined.node, _methods(defined.node)
    if node.decorator_list or node.keywords or "__new__" in methods:
        return None
    if "__init__" in methods:
        return Definition(defined.module, methods["__init__"])
    above = _bases(defined)
    return _initializer(above[0]) if len(above) == 1 and above[0] is not None else None


def _bases(defined: Definition) -> list[Definition | None]:
    """Classes that a class inherits from; None is unknown."""
    found = [named(defined.module, base) for base in defined.node.bases]
    return [d if isinstance(d, Definition) and isinstance(d.node, ast.ClassDef) else None for d in found]


# Dataclasses


def _is_dataclass(defined: Definition) -> bool:
    """Whether a class is one by its decorator, or by that of a base that makes all its subclasses dataclasses."""
    return "dataclass" in _decorators(defined) or any(base and _makes_dataclasses(base) for base in _bases(defined))


def _makes_dataclasses(defined: Definition) -> bool:
    above = any(base and _makes_dataclasses(base) for base in _bases(defined))
    return above or "dataclass_transform" in _decorators(defined)


def _decorators(defined: Definition) -> list[str]:
    calls = [d.func if isinstance(d, ast.Call) else d for d in defined.node.decorator_list]
    return [getattr(call, "attr", getattr(call, "id", "")) for call in calls]


def _fields(defined: Definition) -> dict[str, inspect.Parameter] | None:
    if "__init__" in _methods(defined.node):
        return _by_name(list(_parameters(Definition(defined.module, _methods(defined.node)["__init__"])))[1:])
    found: dict[str, inspect.Parameter] = {}
    for base in reversed(_bases(defined)):
        if base is None:
            return None
        found |= (_fields(base) or {}) if _is_dataclass(base) else {}
    kind = "POSITIONAL_OR_KEYWORD"
    for line in defined.node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            words = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(line.annotation)}
            is_called = isinstance(line.value, ast.Call)
            if "InitVar" in words or (
                is_called and any(word.arg in ("init", "kw_only") for word in line.value.keywords)
            ):
                return None
            if "KW_ONLY" in words:
                kind = "KEYWORD_ONLY"
            elif "ClassVar" not in words:
                argument = ast.arg(line.target.id, line.annotation)
                found[line.target.id] = _parameter(defined.module, argument, kind, _default(line.value))
    return _by_name(sorted(found.values(), key=lambda parameter: parameter.kind))


def _default(value: ast.expr | None) -> ast.expr | None:
    """What a field's value says of its default; that of field() is in its keywords."""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        return value if {"default", "default_factory"} & {word.arg for word in value.keywords} else None
    return value


def _parameters(function: Definition) -> Iterator[inspect.Parameter]:
    module, arguments = function.module, function.node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    for i, (argument, default) in enumerate(zip(positional, defaults, strict=True)):
        kind = "POSITIONAL_ONLY" if i < len(arguments.posonlyargs) else "POSITIONAL_OR_KEYWORD"
        yield _parameter(module, argument, kind, default)
    if arguments.vararg:
        yield _parameter(module, arguments.vararg, "VAR_POSITIONAL", None)
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(module, argument, "KEYWORD_ONLY", default)
    if arguments.kwarg:
        yield _parameter(module, arguments.kwarg, "VAR_KEYWORD", None)


def _parameter(module: Module, argument: ast.arg, kind: str, default: ast.expr | None) -> inspect.Parameter:
    return inspect.Parameter(
        argument.arg,
        getattr(inspect.Parameter, kind),
        default=inspect.Parameter.empty if default is None else _value(default),
        annotation=inspect.Parameter.empty if argument.annotation is None else _kind(argument.annotation, module),
    )


def _value(expression: ast.expr) -> Any:
    """A literal's value, or else the expression itself."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        return expression


def _kind(annotation: ast.expr, module: Module) -> Any:
    """The annotation, as far as it can be told; Any, if a part of it is neither known nor out of YAML's reach."""
    try:
        return _known_kind(annotation, module)
    except _Untold:
        return Any


class _Untold(Exception):
    pass


def _known_kind(annotation: ast.expr, module: Module) -> Any:
    if isinstance(annotation, ast.Constant):
        is_text = isinstance(annotation.value, str)
        return _known_kind(ast.parse(annotation.value, mode="eval").body, module) if is_text else NoneType
    if isinstance(annotation, (ast.Name, ast.Attribute)):
        return _named_kind(annotation, module)
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return Union[_known_kind(annotation.left, module), _known_kind(annotation.right, module)]  # noqa: UP007
    if isinstance(annotation, ast.Subscript):
        return _subscripted(annotation, module)
    raise _Untold


def _named_kind(annotation: ast.Name | ast.Attribute, module: Module) -> Any:
    name = annotation.id if isinstance(annotation, ast.Name) else annotation.attr
    if name in KINDS:
        return KINDS[name]
    alias = assigned(module, name) if isinstance(annotation, ast.Name) else None
    if alias is None:
        raise _Untold
    return _known_kind(alias[1], alias[0])


def _subscripted(annotation: ast.Subscript, module: Module) -> Any:
    name = annotation.value.attr if isinstance(annotation.value, ast.Attribute) else getattr(annotation.value, "id", "")
    inner = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    if name == "Literal":
        choices = tuple(map(_value, inner))
        if not any(isinstance(choice, ast.expr) for choice in choices):
            return Literal[choices]
    if name == "Optional":
        return Optional[_known_kind(inner[0], module)]  # noqa: UP045
    if name == "Union":
        return Union[tuple(_known_kind(part, module) for part in inner)]  # noqa: UP007
    if name in ("list", "List", "Sequence", "Iterable"):
        return KINDS[name][_kind(inner[0], module)]
    if name in ("tuple", "Tuple"):
        return tuple[tuple(... if _value(part) is ... else _kind(part, module) for part in inner)]
    if name in KINDS:
        return KINDS[name]
    raise _Untold
