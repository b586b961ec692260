"""What a judge is asked, and what it says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol


def in_words(prompt: str | Sequence[Mapping], between: str = "\n\n") -> str:
    """Returns a prompt as a text: of messages, each behind its role, with `between` between them."""
    if isinstance(prompt, str):
        return prompt
    return between.join(f"{message['role']}: {message.get('content')}" for message in prompt)


@dataclass(frozen=True)
class Question:
    """One answer to be scored, or two to be compared in this order.

    Attributes:
        row: `prompt`, a text or messages, and whatever else its row has.
        answers: One, or two.
    """

    row: Mapping[str, Any]
    answers: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The prompt as a text."""
        return in_words(self.row["prompt"])


@dataclass(frozen=True)
class Said:
    """What a judge says to a question.

    Attributes:
        value: Of one answer its score; of two, 1 where the first is better, -1 where the second is, 0 where neither.
            None: it gave no verdict.
        why: In a few words, where it gave none.
    """

    value: float | None
    why: str = ""


class Judge(Protocol):
    """Whoever says which answer is better.

    Attributes:
        name: For people.
        compares: It is asked of two answers, both ways round; else of one.
    """

    name: str
    compares: bool

    def judge(self, questions: Sequence[Question]) -> list[Said]:
        """Returns what it says to each question."""
        ...
