"""Several answers to each prompt, drawn from a model: what a judge is then asked about. No torch.

They are appended to a file as they come. Whoever is stopped goes on there, and ends with the same answers: what is
drawn for a batch of prompts depends on the seed and on where it stands alone. From an endpoint: from_endpoint.py.
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

from pairtune.errors import UserError
from pairtune.files import telling
from pairtune.hub.endpoint import WITHOUT
from pairtune.process.console import Progress

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
    """What was drawn: prompts in all and those that were there before, answers, and those that say nothing new.

    Attributes:
        missing: Answers that an endpoint would not give.
        unasked: Prompts for which a budget was too small.
    """

    prompts: int
    before: int
    answers: int
    equal: int
    empty: int
    missing: int = 0
    unasked: int = 0

    @classmethod
    def of(cls, found: Sequence[Sequence[str]], before: int, **more: int) -> "Drawn":
        """Returns what each prompt's answers come to."""
        equal = sum(len(answers) - len(set(answers)) for answers in found)
        empty = sum(not text.strip() for answers in found for text in answers)
        return cls(len(found), before, sum(map(len, found)), equal, empty, **more)

    def __str__(self) -> str:
        lines = [f"{self.answers:,} answers to {self.prompts:,} prompts"]
        lines += [f"  {self.before:,} prompts were answered there already"] if self.before else []
        lines += [f"  {self.equal:,} answers are equal to another one to their prompt"] if self.equal else []
        lines += [f"  {self.empty:,} are empty"] if self.empty else []
        lines += [f"  {self.missing:,} are missing: refused, or not given in {WITHOUT} tries"] if self.missing else []
        lines += [f"  {self.unasked:,} more prompts are left: the budget is used"] if self.unasked else []
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
    with held(path) as (file, known):
        done = checked(known, rows, path, asdict(drawing))
        done -= done % prompts_at_once if done < len(rows) else 0
        cut(file, done)
        found = [row["answers"] for row in known[:done]]
        with Progress("prompts", len(rows), initial=done, unit="prompts") as progress:
            for start in range(done, len(rows), prompts_at_once):
                some = rows[start : start + prompts_at_once]
                prompts = [row["prompt"] for row in some for _ in range(drawing.count)]
                texts = []
                for first in range(0, len(prompts), drawing.batch_size):
                    part = prompts[first : first + drawing.batch_size]
                    texts += answer(part, seed_of(drawing.seed, start, first))
                by_prompt = [texts[n : n + drawing.count] for n in range(0, len(texts), drawing.count)]
                how = asdict(drawing)
                append(file, [{**row, "answers": a, "drawn": how} for row, a in zip(some, by_prompt, strict=True)])
                found += by_prompt
                progress.update(len(some))
    for answers in found:
        each(answers)
    return Drawn.of(found, done)


def seed_of(seed: int, *place: int) -> int:
    """Returns the seed of what is drawn at a place."""
    digest = hashlib.blake2b(f"{seed} {place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1  # what torch takes


@contextmanager
def held(path: Path) -> Iterator[tuple[IO[bytes], list[dict]]]:
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


def checked(known: list[dict], rows: Sequence[Mapping], path: Path, drawing: Mapping) -> int:
    """Returns how many rows are answered.

    Raises:
        UserError: A row answers another prompt, or was drawn otherwise than `drawing` says; what else it says is free.
    """
    if len(known) > len(rows):
        raise UserError(f"{path}: holds answers to {len(known):,} prompts, and {len(rows):,} are asked; {WAY_OUT}")
    for number, (row, asked) in enumerate(zip(known, rows, strict=False), 1):
        if row["prompt"] != asked["prompt"]:
            raise UserError(f"{path}, line {number}: answers another prompt; {WAY_OUT}, or remove it")
        before = row["drawn"]
        if (name := next((name for name in drawing if before.get(name) != drawing[name]), None)) is not None:
            raise UserError(
                f"{path}, line {number}: was drawn with {name} {before.get(name)}, not {drawing[name]}; {WAY_OUT}, "
                "or remove it"
            )
    return len(known)


def append(file: IO[bytes], rows: Sequence[Mapping]) -> None:
    """Writes rows, which are on the disk when this returns."""
    for row in rows:
        file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
    file.flush()
    os.fsync(file.fileno())


def cut(file: IO[bytes], count: int) -> None:
    """Leaves the first lines: not one that a kill has cut, nor a batch of which it has left a part."""
    file.seek(0)
    file.truncate(sum(len(file.readline()) for _ in range(count)))
    file.seek(0, os.SEEK_END)
