"""Marks by which texts say who speaks, such as "### Human:" or "User:" at the beginning of a line."""

import re

# "Q:" and "A:" are none, nor are customers and models: many a single question, and many a table, is written so
_USERS = ("human", "user", "prompter")
_ASSISTANTS = ("assistant", "chatbot", "ai", "bot", "gpt")
_MARKS = {
    names: re.compile(
        rf"^(?P<mark>[ \t]*(?:#+[ \t]*|\*\*|\[|<\|?)(?i:{'|'.join(names)})\b[^\w\n:]{{0,3}}:(?!:)"
        rf"|(?:{'|'.join(form for name in names for form in (name.capitalize(), name.upper()))})[ \t]*:(?!:))",
        re.MULTILINE,
    )
    for names in (_USERS, _ASSISTANTS)
}
_BEFORE_AN_ANSWER = re.compile(r"\s*(?:#+[ \t]*)?(?:assistant|chatbot|ai|bot|gpt)[ \t]*:", re.IGNORECASE)
TO_AN_ANSWER = re.compile(
    r"(?:(?:###\s*)?\b(?:assistant|response|answer|output)|^[ \t]*(?:#+[ \t]*)?(?:chatbot|ai|bot|gpt|a))[ \t]*:\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def speakers_in(text: str) -> tuple[str, str] | None:
    """Returns the first mark of a user's turn and the first of an assistant's, if a text has both."""
    asked = _first_mark(text, _USERS)
    answered = asked and _first_mark(text, _ASSISTANTS)
    return (asked, answered) if answered else None


def holds_users_turn(answer: str) -> bool:
    """Says whether an answer is, or goes on with, a turn of a user's."""
    return _first_mark(answer, _USERS) is not None


def begins_with_speaker(answer: str) -> bool:
    """Says whether an answer begins with who gives it."""
    return _BEFORE_AN_ANSWER.match(answer) is not None


def _first_mark(text: str, names: tuple[str, ...]) -> str | None:
    lower = text.lower()
    if not any(name in lower for name in names):  # a tenth of the search's time
        return None
    found = _MARKS[names].search(text)
    return found and found["mark"].strip()
