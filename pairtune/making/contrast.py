"""Pairs without a judge: a model answers two prompts that differ by a word, and is trained on the prompt without it.

As in "Aligning LLMs without Reinforcement Learning" (Shion Honda, 2024), whose Reviewer #2 is asked for negative and
for positive reviews. To get a preference from two prompts that contrast is RLCD's idea (arXiv 2307.12950). No torch.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pairtune.errors import UserError
from pairtune.making.held_out import is_held_out
from pairtune.making.sample import Drawing, Drawn, sample

SIDES = ("chosen", "rejected")
ITEM, WORD, EXAMPLE = "{item}", "{word}", "{example}"


@dataclass(frozen=True)
class Contrast:
    """How two prompts differ.

    Attributes:
        template: A prompt with {item}, what is asked about; {word}, which differs; and any number of {example}.
        words: The word on the side of the chosen answer, and on the other.
        examples: The texts in the places of {example}, in their order, of either side.
    """

    template: str
    words: tuple[str, str]
    examples: tuple[tuple[str, str], ...] = ()

    def __post_init__(self):
        """
        Raises:
            UserError: The template lacks a place, or examples do not go round.
        """
        places = self.template.count(EXAMPLE)
        if ITEM not in self.template:
            raise UserError(f"template: has no {ITEM}, the place of what is asked about")
        if WORD not in self.template and not places:
            raise UserError(f"template: has no {WORD}: both prompts would be the same")
        if places != len(self.examples):
            raise UserError(
                f"template: has {places} places of an {EXAMPLE}, and there are {len(self.examples)} examples: one "
                "object a line, with chosen and rejected"
            )
        if self.words[0] == self.words[1] and not any(a != b for a, b in self.examples):
            raise UserError(f"both words are {self.words[0]!r}: both prompts would be the same")

    def asks(self, item: str, side: int) -> str:
        """Returns the prompt of a side: 0 the chosen answer's, 1 the other's."""
        return self._filled(item, self.words[side], [both[side] for both in self.examples])

    def neutral(self, item: str) -> str:
        """Returns the prompt that is trained on: without the word, the examples from either side in turn."""
        return self._filled(item, "", [both[n % 2] for n, both in enumerate(self.examples)])

    def _filled(self, item: str, word: str, examples: Sequence[str]) -> str:
        text = self.template if word else re.sub(r"(?m)^\{word\} *| *\{word\}", "", self.template)
        left = iter(examples)
        values = {WORD: lambda: word, ITEM: lambda: item, EXAMPLE: lambda: next(left)}
        return re.sub(r"\{(?:item|word|example)\}", lambda place: values[place[0]](), text)


@dataclass(frozen=True)
class Contrasted:
    """The pairs, each with whether it is held out, and what was left out."""

    pairs: list[tuple[dict, bool]]
    drawn: Drawn
    equal: int
    empty: int
    naming: int

    def __str__(self) -> str:
        held_out = sum(away for _, away in self.pairs)
        lines = [f"{len(self.pairs):,} pairs of {self.drawn.prompts // 2:,} items, {held_out:,} of them held out"]
        lines += [f"  left out: {self.equal:,} with the same answer on both sides"] if self.equal else []
        lines += [f"  left out: {self.empty:,} with an empty answer"] if self.empty else []
        lines += [f"  in {self.naming:,} an answer says the word that it was asked for"] if self.naming else []
        return "\n".join(lines)


def contrast(
    answer: Callable[[Sequence, int], list[str]],
    items: Sequence[str],
    how: Contrast,
    drawing: Drawing,
    *,
    drawn: Path,
    held_out: float = 0.0,
) -> Contrasted:
    """Draws an answer to both prompts of each item, and returns pairs of them under the neutral prompt.

    Args:
        answer, drawing: As for `sample`; one answer a prompt.
        drawn: Where the answers are appended as they come; one that was stopped goes on there.
        held_out: The share of items.

    Raises:
        UserError: See `sample`.
    """
    rows = [{"prompt": how.asks(item, side), "item": item, "side": SIDES[side]} for item in items for side in (0, 1)]
    texts: list[str] = []
    told = sample(answer, rows, drawn, drawing, each=lambda answers: texts.extend(answers))
    pairs, equal, empty, naming = [], 0, 0, 0
    for item, chosen, rejected in zip(items, texts[::2], texts[1::2], strict=True):
        if not (chosen.strip() and rejected.strip()):
            empty += 1
        elif chosen == rejected:
            equal += 1
        else:
            naming += any(says(text, word) for text, word in zip((chosen, rejected), how.words, strict=True))
            prompt = how.neutral(item)
            row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "item": item}
            pairs.append((row, held_out > 0 and is_held_out(prompt, held_out, drawing.seed)))
    return Contrasted(pairs, told, equal, empty, naming)


def says(text: str, word: str) -> bool:
    """Returns whether a text has the word."""
    return bool(word) and re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None
