"""Which pairs a process sees in which step: a pure function of the seed and the step, so any step can be had again."""

import math
import sys
from fractions import Fraction

import torch

from pairtune.dist import World
from pairtune.pairs.tokenize import Pair


class Steps:
    """Training steps over pairs: every pair once an epoch, the last step of an epoch holding what is left.

    `steps[n]`, n from 0 over all epochs, is what `rank` does in that
    step: micro-batches, see `share`.
    """

    def __init__(
        self,
        pairs: list[Pair],
        pairs_per_step: int,
        batch_size: int,
        world: World,
        *,
        seed: int,
        shuffle: bool = True,
    ):
        self._pairs = pairs
        self._pairs_per_step = pairs_per_step
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._world = world
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch it belongs to, and indices

    def epoch(self, step: int) -> float:
        """Returns how many times all pairs have been seen after so many steps."""
        return step / self.per_epoch

    @property
    def per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return -(-len(self._pairs) // self._pairs_per_step)

    def interval(self, every_n_steps: int | None, every_n_epochs: float | None) -> int | Fraction | None:
        """Returns either as a number of steps, which may be a fraction: see state.TrainState.is_due."""
        return every_n_steps if every_n_epochs is None else exactly(every_n_epochs) * self.per_epoch

    def __getitem__(self, step: int) -> list[list[Pair]]:
        return self.share(self.pairs(step))

    def share(self, pairs: list[Pair]) -> list[list[Pair]]:
        """Returns this process's part of any pairs, as micro-batches: see the function `share`."""
        return share(pairs, self._batch_size, rank=self._world.rank, size=self._world.size)

    def pairs(self, step: int) -> list[Pair]:
        """Returns the step's pairs, of all processes."""
        return [self._pairs[i] for i in self._members(step)]

    def seen_in(self, num_steps: int) -> list[Pair]:
        """Returns the pairs that the first `num_steps` steps look at, each once."""
        return [pair for step in range(min(num_steps, self.per_epoch)) for pair in self.pairs(step)]

    def _members(self, step: int) -> list[int]:
        epoch, step_in_epoch = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        first = step_in_epoch * self._pairs_per_step
        return self._order[1][first : first + self._pairs_per_step]

    def _shuffled(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._pairs)))
        # Two numbers in one seed: epochs of one run differ, and so do equal epochs of neighbouring seeds.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._pairs), generator=generator).tolist()


def count_steps(num_pairs: int, pairs_per_step: int, epochs: float, max_steps: int | None = None) -> int:
    """Returns the number of steps in a run: `epochs` times all pairs, or `max_steps` if those are fewer.

    A fraction of an epoch is that of its steps, rounded up, as in transformers' Trainer: 0.5 of 13 steps are 7.
    """
    return min(math.ceil(exactly(epochs) * -(-num_pairs // pairs_per_step)), max_steps or sys.maxsize)


def exactly(number: float) -> Fraction:
    """Returns the number as it is written: 0.1 is a tenth, not the float that is nearest to it."""
    return Fraction(str(number))


def share(pairs: list[Pair], batch_size: int, *, rank: int = 0, size: int = 1) -> list[list[Pair]]:
    """Returns this process's pairs as micro-batches of at most `batch_size`.

    Each pair goes to one process. All processes get the same number of micro-batches, since a model that is sharded
    over them runs on all of them or on none; where the pairs do not go round, a micro-batch is smaller, or empty.
    """
    mine = pairs[rank::size]
    count = -(-len(pairs) // (batch_size * size))  # the fullest process's, rank 0's
    return [mine[i * batch_size : (i + 1) * batch_size] for i in range(count)]
