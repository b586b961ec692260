"""metrics.jsonl: an object a logged step, in lines; what a kill has cut short is no line. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path

from pairtune.files import write_text

FILE = "metrics.jsonl"


def read_log(path: Path) -> list[dict]:
    """Returns the objects of a metrics.jsonl; none where it is not there."""
    return [json.loads(line) for line in _lines(path)]


def keep_lines(path: Path, step: int, evaluated: int) -> None:
    """Leaves what was logged of training up to a step, and held-out results up to another."""
    rows = ((line, json.loads(line)) for line in _lines(path))
    kept = [line for line, row in rows if row["step"] <= (evaluated if "eval/loss" in row else step)]
    write_text(path, "".join(kept))


def set_names(row: Mapping, prefix: str = "eval/") -> list[str]:
    """Returns the names of the held-out sets that an evaluation tells of, each by itself: eval/NAME/loss."""
    ends = [key.removeprefix(prefix) for key in row if prefix and key.startswith(prefix) and key.endswith("/loss")]
    return [end.removesuffix("/loss") for end in ends if "/" in end]


def _lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return lines if not lines or lines[-1].endswith("\n") else lines[:-1]
