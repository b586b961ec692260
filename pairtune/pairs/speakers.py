"""Marks by which texts say who speaks, such as "### Human:" or "User:" at the beginning of a line."""

import re
from itertools import pairwise

# "Q:" and "A:" are none, nor are customers and models: many a single question, and many a table, is written so
_USERS = ("human", "user", "prompter")
_ASSISTANTS = ("assistant", "chatbot", "ai", "bot", "gpt")
_PREFIXED = r"[ \t]*(?:#+[ \t]*|\*\*|\[|<\|?)(?i:{names})\b[^\w\n:]{{0,3}}:(?!:)"
_CAPITAL = r"(?:{capital})[ \t]*:(?!:)"  # and not "user: 1000" of a file of settings
_ANYHOW = r"[ \t]*(?i:{names})[ \t]*:(?!:)"


def _marks(names: tuple[str, ...], bare: str) -> re.Pattern:
    capital = "|".join(form for name in names for form in (name.capitalize(), name.upper()))
    return re.compile(rf"^(?:{_PREFIXED}|{bare})".format(names="|".join(names), capital=capital), re.MULTILINE)


_A_USERS_TURN = _marks(_USERS, _CAPITAL)
_OF_USERS, _OF_ASSISTANTS = _marks(_USERS, _ANYHOW), _marks(_ASSISTANTS, _ANYHOW)  # where both are there
_ANYBODY = re.compile(r"^[A-Z][a-z]{2,15}:", re.MULTILINE)
_BEFORE_AN_ANSWER = re.compile(r"\s*(?:#+[ \t]*)?(?:assistant|chatbot|ai|bot|gpt)[ \t]*:", re.IGNORECASE)
TO_AN_ANSWER = re.compile(
    r"(?:(?:###\s*)?\b(?:assistant|response|answer|output)|^[ \t]*(?:#+[ \t]*)?(?:chatbot|ai|bot|gpt|a))[ \t]*:\s*\Z",
    re.IGNORECASE | re.MULTILINE,
)


def speakers_in(text: str) -> tuple[str, str] | None:
    """Returns the first mark of a user's turn and the first of an assistant's, if a text has both; or those of two who
    take turns, such as Patient: and Nurse:."""
    asked = _first(_OF_USERS, text, _USERS)
    answered = asked and _first(_OF_ASSISTANTS, text, _ASSISTANTS)
    if answered:
        return asked, answered
    names = _ANYBODY.findall(text) if text[:1].isupper() else []
    take_turns = len(names) > 2 and len(set(names)) == 2 and all(a != b for a, b in pairwise(names))
    return (names[0], names[1]) if take_turns else None


def holds_users_turn(answer: str) -> bool:
    """Says whether an answer is, or goes on with, a turn of a user's."""
    return _first(_A_USERS_TURN, answer, _USERS) is not None


def begins_with_speaker(answer: str) -> bool:
    """Says whether an answer begins with who gives it."""
    return _BEFORE_AN_ANSWER.match(answer) is not None


def _first(mark: re.Pattern, text: str, names: tuple[str, ...]) -> str | None:
    lower = text.lower()
    if not any(name in lower for name in names):  # a tenth of the search's time
        return None
    found = mark.search(text)
    return found and found[0].strip()
