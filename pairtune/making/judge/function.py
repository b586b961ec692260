"""A judge that is a Python function of the user's: exact match, length, tests."""

import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from pairtune.errors import UserError
from pairtune.making.judge.question import Question, Said

WAYS = (
    "a judge is an endpoint's address (https://...), a reward model's folder, implicit:FOLDER of a trained policy, or "
    "a function of yours: my_file.judge"
)
TAKES = "answer, or first and second, and of prompt and row what it wants"


class Function:
    """A function of `answer`, which scores it, or of `first` and `second`, which compares; by the names it takes."""

    def __init__(self, name: str, function: Callable):
        """
        Raises:
            UserError: It takes something else.
        """
        self.name, self._function = name, function
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise UserError(f"--judge {name}: what it takes is not known; a judge takes {TAKES}") from None
        named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        taken, needed = {p.name for p in named}, {p.name for p in named if p.default is p.empty}
        self.compares = {"first", "second"} <= taken
        known = {"prompt", "row"} | ({"first", "second"} if self.compares else {"answer"})
        self._taken = taken & known
        if needed - self._taken or not (self.compares or "answer" in taken):
            raise UserError(f"--judge {name}: takes {', '.join(sorted(taken)) or 'nothing'}; a judge takes {TAKES}")

    def judge(self, questions: Sequence[Question]) -> list[Said]:
        return [self._say(question) for question in questions]

    def _say(self, question: Question) -> Said:
        names = ("first", "second") if self.compares else ("answer",)
        given = {"prompt": question.row["prompt"], "row": question.row}
        given |= dict(zip(names, question.answers, strict=True))
        try:
            value = self._function(**{name: given[name] for name in self._taken})
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error} ({where.filename}, line {where.lineno})"
            raise UserError(f"--judge {self.name}: fails on the answer {question.answers[0][:60]!r}: {told}") from error
        if value is None:
            return Said(None, "the function gives none")
        try:
            number = math.nan if isinstance(value, str | bytes | bytearray) else float(value)  # float reads texts
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            way = "above 0 where the first is better, below where not" if self.compares else "higher is better"
            raise UserError(f"--judge {self.name}: returned {value!r}; a judge returns a number, {way}, or None")
        return Said((number > 0) - (number < 0) if self.compares else number)


def open_function(path: str) -> Function:
    """Returns the judge at an import path, such as my_file.judge, for a file where the command is run.

    Raises:
        UserError: There is none, or it is no judge.
    """
    module, _, name = path.rpartition(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it shadows no package
    try:
        function = getattr(import_module(module), name)
    except Exception as error:  # whatever a user's own module raises
        told = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"--judge {path}: cannot be imported: {told}; {WAYS}") from None
    if not callable(function):
        raise UserError(f"--judge {path}: is no function; {WAYS}")
    return Function(path, function)
