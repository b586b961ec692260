"""Several answers to each prompt, drawn from a model: what a judge is then asked about. No torch.

They are appended to a file as they come. Whoever is stopped goes on there, and ends with the same answers: what is
drawn for a batch of prompts depends on the seed and on where it stands alone.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from pairtune.console import Progress
from pairtune.errors import UserError
from pairtune.files import telling

WAY_OUT = "name another file: --output"


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn. Rows keep it, and a file goes on with the same one only.

    Attributes:
        model: Who answers, in words.
        count: Answers to each prompt.
        seed: Of what is drawn.
        batch_size: Answers at a time.
        max_new_tokens, temperature, top_k, top_p: As in models/generation.py.
        system: A message before each prompt.
    """

    model: str
    count: int
    seed: int
    batch_size: int
    max_new_tokens: int
    temperature: float
    top_k: int | None = None
    top_p: float | None = None
    system: str | None = None


@dataclass(frozen=True)
class Drawn:
    """What was drawn: prompts in all and those that were there before, answers, and those that say nothing new."""

    prompts: int
    before: int
    answers: int
    equal: int
    empty: int

    def __str__(self) -> str:
        lines = [f"{self.answers:,} answers to {self.prompts:,} prompts"]
        lines += [f"  {self.before:,} prompts were answered there already"] if self.before else []
        lines += [f"  {self.equal:,} answers are equal to another one to their prompt"] if self.equal else []
        lines += [f"  {self.empty:,} are empty"] if self.empty else []
        return "\n".join(lines)


def sample(
    answer: Callable[[Sequence, int], list[str]],
    rows: Sequence[Mapping],
    path: Path,
    drawing: Drawing,
    *,
    each: Callable[[list[str]], None] = lambda answers: None,
) -> Drawn:
    """Draws `drawing.count` answers to each row's prompt and appends each row, with `answers`, to a JSONL file.

    Args:
        answer: Gives an answer to each of some prompts, drawn by a seed: the same again for the same ones.
        rows: With `prompt`, a text or messages; what else they have is kept.
        each: Is given each row's answers, in the rows' order.

    Raises:
        UserError: The file holds something else, or answers that were drawn otherwise; or another process has it.
    """
    prompts_at_once = max(1, drawing.batch_size // drawing.count)
    with _held(path) as (file, known):
        done = _checked(known, rows, path, drawing)
        done -= done % prompts_at_once if done < len(rows) else 0
        _cut(file, done)
        found = [row["answers"] for row in known[:done]]
        with Progress("prompts", len(rows), initial=done, unit="prompts") as progress:
            for start in range(done, len(rows), prompts_at_once):
                some = rows[start : start + prompts_at_once]
                prompts = [row["prompt"] for row in some for _ in range(drawing.count)]
                texts = []
                for first in range(0, len(prompts), drawing.batch_size):
                    part = prompts[first : first + drawing.batch_size]
                    texts += answer(part, _seed(drawing.seed, start, first))
                by_prompt = [texts[n : n + drawing.count] for n in range(0, len(texts), drawing.count)]
                for row, answers in zip(some, by_prompt, strict=True):
                    line = {**row, "answers": answers, "drawn": asdict(drawing)}
                    file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
                found += by_prompt
                progress.update(len(some))
    for answers in found:
        each(answers)
    equal = sum(len(answers) - len(set(answers)) for answers in found)
    empty = sum(not text.strip() for answers in found for text in answers)
    return Drawn(len(rows), done, sum(map(len, found)), equal, empty)


def _seed(seed: int, *place: int) -> int:
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # what torch takes


@contextmanager
def _held(path: Path) -> Iterator[tuple[IO[bytes], list[dict]]]:
    """Gives a file of rows that no other process appends to meanwhile, and its whole rows."""
    path = path.expanduser()
    with telling(path, WAY_OUT):
        file = path.open("a+b")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another process writes there; let it end, or {WAY_OUT}") from None
        file.seek(0)
        content, rows = file.read(), []
        for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
            try:
                row = json.loads(line)
                row["answers"], row["drawn"], row["prompt"]
            except (ValueError, TypeError, KeyError):
                raise UserError(f"{path}, line {number}: is no row of drawn answers; {WAY_OUT}") from None
            rows.append(row)
        with telling(path, "make room, and the same command goes on"):
            yield file, rows


def _checked(known: list[dict], rows: Sequence[Mapping], path: Path, drawing: Drawing) -> int:
    """Returns how many rows are answered."""
    if len(known) > len(rows):
        raise UserError(f"{path}: holds answers to {len(known):,} prompts, and {len(rows):,} are asked; {WAY_OUT}")
    for number, (row, asked) in enumerate(zip(known, rows, strict=False), 1):
        if row["prompt"] != asked["prompt"]:
            raise UserError(f"{path}, line {number}: answers another prompt; {WAY_OUT}, or remove it")
        if row["drawn"] != asdict(drawing):
            now = asdict(drawing)
            name = next(name for name in now if row["drawn"].get(name) != now[name])
            raise UserError(
                f"{path}, line {number}: was drawn with {name} {row['drawn'].get(name)}, not {now[name]}; {WAY_OUT}, "
                "or remove it"
            )
    return len(known)


def _cut(file: IO[bytes], count: int) -> None:
    """Leaves the first lines: not one that a kill has cut, nor a batch of which it has left a part."""
    file.seek(0)
    file.truncate(sum(len(file.readline()) for _ in range(count)))
    file.seek(0, os.SEEK_END)
