"""Markdown that a run writes and its user may edit: whether a file is as it was written. No torch."""

import hashlib
from pathlib import Path

LINE = "<!-- written by pairtune, and written anew as long as nobody edits it: {} -->"


def signed(text: str) -> str:
    """Returns a text with a last line that tells whether it was edited, which no reader sees."""
    return f"{text}\n\n{LINE.format(_digest(text))}\n"


def is_unedited(path: Path) -> bool:
    """Returns whether a file is what `signed` gave."""
    text, _, last = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").rpartition("\n\n")
    return last == LINE.format(_digest(text))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
