"""Which pairs a process sees in which step: a pure function of the seed and the step, so any step can be had again."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from operator import add

import numpy as np
import torch

from pairtune.pairs import packing
from pairtune.pairs.at_once import document_lengths, take
from pairtune.pairs.batch import document_length
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World


class Steps:
    """Training steps over pairs: every pair once an epoch, the last step of an epoch holding what is left.

    `steps[n]`, n from 0 over all epochs, is what this process does in that step: micro-batches, see `share`. Those of a
    stream are asked for in their order, and `state` says where it is.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        pairs_per_step: int,
        batch_size: int,
        world: World,
        *,
        seed: int,
        shuffle: bool = True,
        rows: int | None = None,
    ):
        """
        Args:
            batch_size, rows: As for `share`.
        """
        self._pairs = pairs
        self._pairs_per_step = pairs_per_step
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._world = world
        self._rows = rows
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch it belongs to, and indices
        stream = getattr(pairs, "stream", None)
        self._stream = stream and stream.in_steps(pairs_per_step, seed=seed, shuffle=shuffle)

    def epoch(self, step: int) -> float:
        """Returns how many times all pairs have been seen after so many steps; of a stream, as far as it has come."""
        return self._stream.epoch if self._stream else step / self.per_epoch

    def seen(self, step: int) -> dict[str, float]:
        """Returns what metrics.jsonl says of pairs after so many steps: `epoch`; of a stream, rows, too."""
        return {"epoch": self.epoch(step), **(self._stream.seen() if self._stream else {})}

    def account(self) -> list[str]:
        """Returns, of a stream, what became of its rows, a table for each source."""
        return self._stream.account() if self._stream else []

    def state(self) -> dict | None:
        """Returns where a stream is, as JSON can hold it; of other pairs the step says that."""
        return self._stream.state() if self._stream else None

    def load(self, state: dict | None) -> None:
        """Goes on from where a stream was.

        Raises:
            UserError: Its sources are not as they were.
        """
        if self._stream and state:
            self._stream.load(state)

    @property
    def per_epoch(self) -> int:
        """The number of steps in an epoch."""
        return -(-len(self._pairs) // self._pairs_per_step)

    def interval(self, every_n_steps: int | None, every_n_epochs: float | None) -> int | Fraction | None:
        """Returns either as a number of steps, which may be a fraction: see state.TrainState.is_due."""
        return every_n_steps if every_n_epochs is None else exactly(every_n_epochs) * self.per_epoch

    def __getitem__(self, step: int) -> list[list[Pair]]:
        return self.share(self.pairs(step))

    def share(self, pairs: list[Pair], times: int = 1) -> list[list[Pair]]:
        """Returns this process's part of any pairs, as micro-batches: see the function `share`.

        Args:
            times: So many times batch_size, where gradients take no memory; rows keep their length.
        """
        rank, size = self._world.rank, self._world.size
        return share(pairs, times * self._batch_size, rank=rank, size=size, rows=self._rows)

    def is_shared_out(self, micro: list[list[Pair]]) -> bool:
        """Returns whether these micro-batches of a step, this process's, leave something of it to others."""
        return self._world.size > 1 or len(micro) != 1

    def heaviest(self) -> list[list[Pair]]:
        """Returns a micro-batch for each process: of the pairs with most tokens, as many as a device holds."""
        pairs = self._longest() if self._stream else self._pairs
        batches: list[list[Pair]] = [[] for _ in range(self._world.size)]
        room = [self._rows or sys.maxsize] * len(batches)
        most = sys.maxsize if self._rows else self._batch_size
        lengths = document_lengths(pairs)
        shortest = int(lengths.min(initial=sys.maxsize))
        for i in np.argsort(-lengths, kind="stable").tolist():
            length = int(lengths[i])
            n = next((n for n, b in enumerate(batches) if room[n] >= length and len(b) < most), None)
            if n is not None:
                batches[n].append(pairs[i])
                room[n] -= length
            elif max(room) < shortest or all(len(b) == most for b in batches):
                break
        return batches

    def _longest(self) -> list[Pair]:
        """The longest pair that a stream may bring, as often as devices hold it."""
        pair = self._pairs.stream.longest
        return [pair] * self._world.size * (self._rows // document_length(pair) if self._rows else self._batch_size)

    def some(self, pairs: list[Pair], count: int = 4) -> list[Pair]:
        """Returns the first of any pairs, at most `count`, that fit one micro-batch: the same in every process."""
        count = min(count, self._batch_size)
        while self._rows and sum(map(document_length, pairs[:count])) > self._rows:
            count -= 1
        return pairs[:count]

    def pairs(self, step: int) -> list[Pair]:
        """Returns the step's pairs, of all processes."""
        if self._stream:
            return self._stream.pairs(step)
        return [self._pairs[i] for i in self._members(step)]

    def seen_in(self, num_steps: int, *others: Sequence[Pair]) -> Sequence[Pair]:
        """Returns the pairs that the first `num_steps` steps look at, each once, and then others; none of a stream."""
        if self._stream:
            return reduce(add, others, self._pairs[:0])
        members = [i for step in range(min(num_steps, self.per_epoch)) for i in self._members(step)]
        return reduce(add, others, take(self._pairs, members))

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


def count_steps(pairs: int | Sequence[Pair], pairs_per_step: int, epochs: float, max_steps: int | None = None) -> int:
    """Returns the number of steps in a run: `epochs` times all pairs, or `max_steps` if those are fewer; of a stream
    `max_steps`.

    A fraction of an epoch is that of its steps, rounded up, as in transformers' Trainer: 0.5 of 13 steps are 7.

    Args:
        pairs: Those of an epoch, or how many they are.
    """
    if max_steps and getattr(pairs, "stream", None):
        return max_steps
    num_pairs = pairs if isinstance(pairs, int) else len(pairs)
    return min(math.ceil(exactly(epochs) * -(-num_pairs // pairs_per_step)), max_steps or sys.maxsize)


def exactly(number: float) -> Fraction:
    """Returns the number as it is written: 0.1 is a tenth, not the float that is nearest to it."""
    return Fraction(str(number))


def share(
    pairs: list[Pair], batch_size: int, *, rank: int = 0, size: int = 1, rows: int | None = None
) -> list[list[Pair]]:
    """Returns this process's pairs as micro-batches: of at most `batch_size`, or of as many as fill a row.

    Each pair goes to one process. All processes get the same number of micro-batches, since a model that is sharded
    over them runs on all of them or on none, and each process's n-th takes about as long; where the pairs do not go
    round, some are empty. One process without rows of a length keeps the pairs' order.

    Args:
        rows: Tokens of a row that every micro-batch is laid out in; `batch_size` has no effect then.
    """
    pairs = list(pairs)  # which may lie in a file so far
    if rows is None and size == 1:
        return [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    if not pairs:
        return []
    costs = [cost(pair) for pair in pairs]
    if rows is None:
        bins = packing.balance(costs, batch_size, size * -(-len(pairs) // (batch_size * size)))
    else:
        bins = packing.pack([document_length(pair) for pair in pairs], rows, size)
    return [[pairs[i] for i in members] for members in packing.deal(bins, costs, rank, size)]


def cost(pair: Pair) -> float:
    """Returns what a pair's forward and backward cost, in tokens of a long row.

    A token takes 2 FLOPs a parameter; attention over n tokens before it takes as much again where 4 n times layers
    times width are as many, which is at about 25,000 tokens in models of 1 to 70 billion parameters; a scored token
    takes the output layer, too, about a tenth of such a model.
    """
    scored = len(pair.chosen) + len(pair.rejected)
    length = document_length(pair)
    return length + length**2 / 2 / 25_000 + scored / 10
