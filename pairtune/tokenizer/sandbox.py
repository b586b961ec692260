"""Jinja for templates of strangers: nothing of Python's inside, no loop without end, no text without bound.

Jinja's sandbox keeps a template away from Python. What it does not bound is how long a template takes and how much it
holds: 'x' * 3000000000 is an expression like another. Here each loop and call is counted, and each operation that makes
something longer than what it was given asks first.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError, safe_range

from pairtune.errors import UserError

MOST_STEPS = 1_000_000  # of loops and calls, in one conversation
CALL = 4  # steps
MOST_CHARACTERS = 2**24  # of one text, besides four times the conversation
MOST_TOGETHER = 64  # times that: of all texts that a template makes on its way
MOST_BITS = 100_000  # of a number
WITHOUT_SIZE = {"default", "d", "int", "float"}  # filters whose numbers are values, and no lengths


class Budget:
    """What a template has taken of its steps and characters, in one conversation."""

    def __init__(self):
        self.begin(0)

    def begin(self, given: int) -> None:
        """Begins a conversation of so many characters."""
        self.steps, self.together, self.most = 0, 0, MOST_CHARACTERS + 4 * given

    def step(self, count: int = 1) -> None:
        """Counts so many. Raises UserError where a template would count for ever, as a loop in a loop in a loop can."""
        self.steps += count
        if self.steps > MOST_STEPS:
            raise UserError(f"The chat template counts more than {MOST_STEPS:,} steps; give another one.")

    def ask(self, size: int) -> None:
        """Takes so many characters. Raises UserError where there are not as many."""
        self.together += size
        if size > self.most or self.together > MOST_TOGETHER * self.most:
            raise UserError(f"The chat template writes more than {self.most:,} characters; give another one.")

    def size(self, value: Any) -> int:
        """Returns about how many characters a value has when it is written, looking no further than the budget."""
        size, waiting = 0, [value]
        while waiting and size <= self.most:
            value = waiting.pop()
            if isinstance(value, (str, bytes)):
                size += len(value)
            elif isinstance(value, int):
                size += 1 + value.bit_length() // 3
            elif isinstance(value, Mapping):
                size += 16
                waiting += [*value.keys(), *value.values()]
            elif isinstance(value, (list, tuple, set, frozenset)):
                size += 16
                waiting += value
            else:
                size += 8
        return size


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own writes nothing where a template reaches for Python's inside, such as ''.__class__; here it ends."""

    intercepted_binops = frozenset(["*", "+", "%", "**"])

    def __init__(self, **options):
        self.budget = Budget()
        super().__init__(finalize=self._finalized, **options)
        self.code_generator_class = _Generator
        self.filters["tojson"] = _tojson
        self.filters = {name: self._bounded(name, plain) for name, plain in self.filters.items()}
        self.filters[_COUNTED] = lambda items: _Counted(items, self.budget)
        del self.globals["lipsum"]
        self.globals.update(range=self._range, dict=_Dict(), namespace=_Namespace)

    def unsafe_undefined(self, obj, attribute: str):
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def _parse(self, source, name, filename):
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        return tree

    def _range(self, *bounds: int) -> range:
        numbers = safe_range(*bounds)
        self.budget.step(len(numbers))
        return numbers

    def _finalized(self, value):
        """What an expression writes, before it becomes text: a list in a list in a list may be a long one."""
        if isinstance(value, str):
            return value
        if isinstance(value, (Mapping, list, tuple, set, frozenset)):
            self.budget.ask(self.budget.size(value))
        return value

    def concat(self, parts: Iterable[str]) -> str:
        """Joins what a template, a macro or a block writes; stops where it is too long."""
        whole, size = [], 0
        for part in parts:
            size += len(part)
            if size > self.budget.most:
                break
            whole.append(part)
        self.budget.ask(size)
        return "".join(whole)

    def joined(self, join, values: tuple) -> str:
        """The operator ~."""
        self.budget.ask(sum(map(self.budget.size, values)))
        return join(values)

    def call_binop(self, context, operator: str, left, right):
        """The operators that can make something long of something short."""
        size = self.budget.size
        if isinstance(left, int) and isinstance(right, int):
            bits = {"*": left.bit_length() + right.bit_length(), "**": left.bit_length() * max(0, right)}
            if bits.get(operator, 0) > MOST_BITS:
                raise UserError(
                    f"The chat template computes a number of more than {MOST_BITS:,} bits; give another one."
                )
        elif operator == "%" and isinstance(left, (str, bytes)):
            self._ask_for_format(left, "%", right if isinstance(right, tuple) else (right,))
        elif operator == "*":
            sequence, times = (right, left) if isinstance(left, int) else (left, right)
            if isinstance(times, int) and isinstance(sequence, (str, bytes, list, tuple)):
                self.budget.ask(max(0, times) * max(len(sequence), 1))
        elif operator == "+" and isinstance(left, (str, bytes, list, tuple)):
            self.budget.ask(size(left) + size(right) if isinstance(left, (str, bytes)) else len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context, obj, /, *args, **kwargs):
        """A call: a macro's, which may call itself, or a method's."""
        self.budget.step(CALL)
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, (str, bytes)):
            self.budget.ask(len(owner))
            self._ask_for_method(owner, getattr(obj, "__name__", ""), args, kwargs)
        return super().call(context, obj, *args, **kwargs)

    def part(self, value, where: slice):
        """A part of a text or a list is a copy, which takes its time."""
        if isinstance(value, (str, bytes, list, tuple)):
            self.budget.ask(len(range(len(value))[where]))
        return value[where]

    def wrap_str_format(self, value):
        """Jinja's own: what it has in place of a text's format(...), which here asks first."""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def asking(*args, **kwargs):
            self._ask_for_method(value.__self__, value.__name__, args, kwargs)
            return wrapped(*args, **kwargs)

        return asking

    def _bounded(self, name: str, plain):
        """A filter, which asks for what it will write."""

        def asks(value, args: tuple, kwargs: dict):
            given = [*args, *kwargs.values()]
            if name not in WITHOUT_SIZE:
                self._ask_for_numbers(given)
            if isinstance(value, jinja2.Undefined):
                return value
            if name == "join" and isinstance(value, Iterator):
                value = list(value)
            if isinstance(value, (str, bytes, list, tuple, Mapping)):
                self.budget.ask(len(value))  # it takes time to go over it, too
            if name in ("string", "tojson", "pprint", "escape", "e", "forceescape", "list", "center", "urlencode"):
                self.budget.ask(self.budget.size(value) * (3 if name == "urlencode" else 1))
            if name in ("tojson", "indent", "wordwrap", "urlize"):  # which put something into each line, item or word
                widths = [number if isinstance(number, int) else len(number) for number in given if number]
                written = value if isinstance(value, str) else ""
                places = written.count("\n") + 1 if name == "indent" else self.budget.size(value)
                self.budget.ask(places * max(widths, default=0) if name != "wordwrap" else len(written) * len(given))
            elif name == "join" and isinstance(value, (str, bytes, list, tuple, Mapping)):
                separator = next((text for text in given if isinstance(text, str)), "")
                self.budget.ask(self.budget.size(value) + len(separator) * len(value))
            elif name == "replace":
                self._ask_for_method(str(value), "replace", tuple(args), kwargs)
            elif name == "format":
                self._ask_for_format(str(value), "%", tuple(given))
            return value

        return _wrapped(plain, asks)

    def _ask_for_numbers(self, given: Iterable) -> None:
        """A number that is given to a filter or a method is, as a rule, a length."""
        for number in given:
            if isinstance(number, (int, float)) and abs(number) > self.budget.most:
                self.budget.ask(int(abs(number)) if number == number and abs(number) != float("inf") else 2**62)

    def _ask_for_method(self, owner: str | bytes, name: str, args: tuple, kwargs: dict) -> None:
        given = [*args, *kwargs.values()]
        if name in ("center", "ljust", "rjust", "zfill"):
            self._ask_for_numbers(given)
        elif name == "expandtabs":
            self.budget.ask(owner.count("\t" if isinstance(owner, str) else b"\t") * max([8, *filter(_is_int, given)]))
        elif name == "join" and given and isinstance(given[0], (str, bytes, Mapping, list, tuple)):
            self.budget.ask(self.budget.size(given[0]) + len(owner) * len(given[0]))
        elif name == "replace" and len(given) > 1 and isinstance(given[1], type(owner)):
            old = given[0]
            times = owner.count(old) if isinstance(old, type(owner)) and old else len(owner) + 1
            self.budget.ask(len(owner) + times * len(given[1]))
        elif name == "translate":
            longest = max((self.budget.size(v) for v in given[0].values()), default=1) if _is_mapping(given) else 1
            self.budget.ask(len(owner) * longest)
        elif name in ("format", "format_map"):
            values = [*given, *(given[0].values() if _is_mapping(given) else [])]
            self._ask_for_format(owner, "{", tuple(values))

    def _ask_for_format(self, text: str | bytes, mark: str, values: tuple) -> None:
        """Widths stand in the text, or are among the values where it says so; a value may be written often."""
        text = text if isinstance(text, str) else text.decode("latin-1")
        widths = [int(digits[:20]) for digits in re.findall(r"\d+", text)]
        if "*" in text or re.search(r"\{[^}]*\{", text):
            widths += [number for number in values if _is_int(number)]
            widths += [
                int(digits[:20]) for value in values if isinstance(value, str) for digits in re.findall(r"\d+", value)
            ]
        longest = max([0, *map(self.budget.size, values)])
        self.budget.ask(len(text) + text.count(mark) * longest)
        self._ask_for_numbers(widths)


_COUNTED = "counted in loops"  # a filter that no template can name


class _Generator(CodeGenerator):
    """Has ~ and [i:j] ask first, as the operators that Jinja lets a sandbox hear of."""

    def visit_Getitem(self, node, frame):
        if not isinstance(node.arg, nodes.Slice):
            super().visit_Getitem(node, frame)
            return
        self.write("environment.part(")
        self.visit(node.node, frame)
        self.write(", slice(")
        for bound in (node.arg.start, node.arg.stop, node.arg.step):
            self.visit(nodes.Const(None) if bound is None else bound, frame)
            self.write(", ")
        self.write("))")

    def visit_Concat(self, node, frame):
        volatile = "(markup_join if context.eval_ctx.autoescape else str_join)"
        plain = "markup_join" if frame.eval_ctx.autoescape else "str_join"
        self.write(f"environment.joined({volatile if frame.eval_ctx.volatile else plain}, (")
        for value in node.nodes:
            self.visit(value, frame)
            self.write(", ")
        self.write("))")


class _Counted:
    """What a loop goes over, counted."""

    def __init__(self, items: Iterable, budget: Budget):
        self._items, self._budget = items, budget

    def __iter__(self) -> Iterator:
        for item in self._items:
            if not isinstance(self._items, range):  # which was counted when it was made
                self._budget.step()
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Dict:
    """A template's dict(...) and dict.fromkeys(...), and nothing else that Python's class can do."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)


class _Namespace(jinja2.utils.Namespace):
    """A template's namespace(...), which takes no name of Python's inside."""

    def __init__(self, /, *args, **kwargs):
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        super().__init__(values)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _wrapped(plain, asks):
    """Returns a filter that asks first, and is given by Jinja what the plain one is given."""
    passed = getattr(plain, "jinja_pass_arg", None)
    first = 0 if passed is None else 1  # context, environment or eval_ctx stands before the value

    def bounded(*args, **kwargs):
        value = asks(args[first], args[first + 1 :], kwargs)
        return plain(*args[:first], value, *args[first + 1 :], **kwargs)

    if passed is not None:
        bounded.jinja_pass_arg = passed
    return bounded


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Jinja's own filter escapes <, > and & for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _check_name(name: str) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace's attribute {name!r} begins with an underscore")


def _is_int(value) -> bool:
    return isinstance(value, int)


def _is_mapping(given: Sequence) -> bool:
    return bool(given) and isinstance(given[0], Mapping)
