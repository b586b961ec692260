"""What a row of preference data says: an Example; and the two ways in which a row says nothing that can be used."""

from dataclasses import dataclass

from pairtune.errors import UserError

Answer = str | list[dict]  # text, or the turns of an answer that is more than text: tool calls, thoughts, several turns


@dataclass(frozen=True, slots=True)
class Example:
    """One preference: prompt messages and two answers; of an unpaired row, one and None.

    A message is `{"role", "content"}` and what else chat templates read of it: see messages.py.

    Attributes:
        written: Prompt, chosen and rejected as they stand in the row where these are texts to be joined: plain-text
            tokenization uses it, so that a transcript is reproduced byte by byte.
        tools: Descriptions of what may be called, as the chat template takes them.
        arguments: What else the row gives to the chat template, such as enable_thinking.
        weight, margin: See pair.py.
    """

    prompt: list[dict]
    chosen: Answer | None
    rejected: Answer | None
    written: tuple[str, str | None, str | None] | None = None
    tools: list | None = None
    arguments: dict | None = None
    weight: float = 1.0
    margin: float = 0.0

    @property
    def answers(self) -> list[list[dict]]:
        """The turns of the answers that there are."""
        return [turns_of(answer) for answer in (self.chosen, self.rejected) if answer is not None]


class Skip(Exception):
    """A row that cannot be used, for a reason that is counted and reported."""


class BadRow(UserError):
    """A row that is broken: not what the others are. `reason` is the same for all that are broken in the same way."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def turns_of(answer: Answer) -> list[dict]:
    """Returns an answer's messages."""
    return [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
