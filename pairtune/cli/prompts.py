"""Files of prompts, as commands take them."""

import json
import sys
from pathlib import Path

from pairtune.errors import UserError


def read_prompts_file(path: Path | None) -> list[dict]:
    """Returns rows of a file, or of standard input (-), with what is asked as `prompt`; nothing for None.

    Raises:
        UserError: It cannot be read, or a line is no prompt.
    """
    if path is None:
        return []
    if str(path) == "-":
        try:
            text = sys.stdin.read()
            text.encode()  # not the surrogates that stand for other bytes
        except UnicodeError:
            raise UserError("standard input: is no text in UTF-8") from None
        return _rows(Path("standard input"), text)
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        told = getattr(error, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"--prompts {path}: cannot be read: {told}; a text file, or - for standard input") from None
    return _rows(path, text)


def _rows(path: Path, text: str) -> list[dict]:
    """Returns rows with what is asked as `prompt`: a line each; of .jsonl, `prompt` (text or messages) or `messages`.

    Raises:
        UserError: A line that is none of these.
    """
    lines = [line for line in text.split("\n") if line.strip()]  # a text may hold other line separators
    if path.suffix not in (".jsonl", ".json"):
        return [{"prompt": line} for line in lines]
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            asked = row.get("prompt", row.get("messages")) if isinstance(row, dict) else row
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is no JSON: {error}; one object a line") from None
        is_messages = isinstance(asked, list) and asked and all(isinstance(m, dict) and "role" in m for m in asked)
        if not isinstance(asked, str) and not is_messages:
            raise UserError(f"{path}, line {number}: must have a `prompt`, text or messages, or `messages`")
        found.append({**(row if isinstance(row, dict) else {}), "prompt": asked})
    return found
