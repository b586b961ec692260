"""Marks by which texts say who speaks, such as "### Human:" or "User:" at the beginning of a line."""

import re

_USERS = "human|user|prompter|customer|client|student|question|q"
_ASSISTANTS = "assistant|chatbot|ai|bot|gpt|model|agent|response|answer|a"
_A_MARK = r"^[ \t]*(?P<mark>(?:#+[ \t]*|\*\*|\[|<\|?)?(?:{names})\b[^\w\n:]{{0,3}}:)"
_OF_USERS = re.compile(_A_MARK.format(names=_USERS), re.IGNORECASE | re.MULTILINE)
_OF_ASSISTANTS = re.compile(_A_MARK.format(names=_ASSISTANTS), re.IGNORECASE | re.MULTILINE)
# "Question:" and "Answer:" may be anywhere in an answer; who was asked to write a dialogue writes these, too
_A_USERS_TURN = re.compile(_A_MARK.format(names="human|user|prompter"), re.IGNORECASE | re.MULTILINE)
_BEFORE_AN_ANSWER = re.compile(r"\s*(?:#+[ \t]*)?(?:assistant|chatbot|ai|bot|gpt)[ \t]*:", re.IGNORECASE)
TO_AN_ANSWER = re.compile(
    r"(?:(?:###\s*)?\b(?:assistant|response|answer|output)|^[ \t]*(?:#+[ \t]*)?(?:chatbot|ai|bot|gpt|model|agent|a))"
    r"[ \t]*:\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def speakers_in(text: str) -> tuple[str, str] | None:
    """Returns the first mark of a user's turn and the first of an assistant's, if a text has both."""
    asked = _OF_USERS.search(text)
    answered = asked and _OF_ASSISTANTS.search(text)
    return (asked["mark"], answered["mark"]) if answered else None


def holds_users_turn(answer: str) -> bool:
    """Says whether an answer goes on with a turn of a user's."""
    return _A_USERS_TURN.search(answer) is not None


def begins_with_speaker(answer: str) -> bool:
    """Says whether an answer begins with who gives it."""
    return _BEFORE_AN_ANSWER.match(answer) is not None
