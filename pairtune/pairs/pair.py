"""A pair: what is left of a row once it is tokens."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with two answers, as tokens; of an unpaired row, with one, and no token of the other.

    Attributes:
        prompt: Starts with the template's BOS, if it has one.
        chosen, rejected: Continue the prompt and end in exactly one end token. An unpaired row's desirable answer is
            chosen, its undesirable one rejected.
        row: Index of its row in the source, from 0.
        chosen_unscored, rejected_unscored: Spans [start, stop) of these answers that are not the assistant's, such as
            what tools return: read, and neither scored nor learned.
        weight, margin: How much it counts in its step, and by how much its rewards have to differ: losses/base.py.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: int
    chosen_unscored: tuple[tuple[int, int], ...] = ()
    rejected_unscored: tuple[tuple[int, int], ...] = ()
    weight: float = 1.0
    margin: float = 0.0
