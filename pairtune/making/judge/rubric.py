"""What an endpoint is asked, in words, and the verdict that is read off its reply."""

import json
import math
import re
from pathlib import Path

from pairtune.errors import UserError
from pairtune.making.judge.question import Question

RUBRIC = """\
Two assistants answered the same prompt. Say which answer serves the person who asked better: whether it does what was
asked, is right, complete and clear, and wastes no words. That an answer is longer, or shown first, says nothing.

[Prompt]
{prompt}

[First answer]
{first}

[Second answer]
{second}

[End]
"""
COMPARES = (
    'End with a line of JSON alone: {"winner": "first"}, {"winner": "second"}, or {"winner": "tie"} where neither is '
    "better."
)
SCORES = 'End with a line of JSON alone that gives the score as a number: {"score": 7}.'
WINNERS = {"first": 1.0, "second": -1.0, "tie": 0.0}
PLACES = {"compares": {"first", "second"}, "scores": {"answer"}}


def read_rubric(path: Path | None) -> str:
    """Returns a rubric file's text, with {prompt} and either {first} and {second}, or {answer}; ours for None.

    Raises:
        UserError: It cannot be read, or lacks a place.
    """
    if path is None:
        return RUBRIC
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"--rubric {path}: cannot be read: {told}") from None
    places = {"prompt", "first", "second", "answer"} & set(re.findall(r"\{(\w+)\}", text))
    if places - {"prompt"} not in PLACES.values() or "prompt" not in places:
        raise UserError(
            f"--rubric {path}: must say where texts go: {{prompt}}, and {{first}} and {{second}} to have two answers "
            f"compared, or {{answer}} to have one scored; it has {', '.join(sorted(places)) or 'none of them'}"
        )
    return text


def compares(rubric: str) -> bool:
    """Returns whether a rubric is about two answers."""
    return "{first}" in rubric


def fill(rubric: str, question: Question) -> str:
    """Returns the rubric with the question's texts in their places, and how the reply is to end."""
    names = ("first", "second") if compares(rubric) else ("answer",)
    texts = {"prompt": question.prompt, **dict(zip(names, question.answers, strict=True))}
    places = "|".join(texts)
    filled = re.sub(rf"\{{({places})\}}", lambda match: texts[match[1]], rubric)  # at once: texts may have braces
    return f"{filled.rstrip()}\n\n{COMPARES if compares(rubric) else SCORES}"


def read_reply(rubric: str, reply: str) -> float | None:
    """Returns the verdict that a reply ends with, None where there is none: the last object with the key counts."""
    key = "winner" if compares(rubric) else "score"
    for written in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            said = json.loads(written)
        except ValueError:
            continue
        if isinstance(said, dict) and key in said:
            return _value(said[key]) if key == "score" else WINNERS.get(str(said[key]).strip().lower())
    return None


def _value(said) -> float | None:
    try:
        number = float(said)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
