"""Which pairs a training step sees: a pure function of the seed and the step's number, so any step can be had again."""

import torch

from pairtune.data import Pair


class Steps:
    """Training steps over pairs: every pair once an epoch, the last step of an epoch holding what is left.

    `len(steps)` is the number of steps in an epoch; `steps[n]`, n from 0 over all epochs, is that step's micro-batches,
    lists of at most `batch_size` pairs.
    """

    def __init__(self, pairs: list[Pair], *, pairs_per_step: int, batch_size: int, seed: int, shuffle: bool = True):
        self._pairs = pairs
        self._pairs_per_step = pairs_per_step
        self._batch_size = batch_size
        self._seed = seed
        self._shuffle = shuffle
        self._order: tuple[int, list[int]] = (-1, [])  # the epoch it belongs to, and indices

    def __len__(self) -> int:
        return -(-len(self._pairs) // self._pairs_per_step)

    def __getitem__(self, step: int) -> list[list[Pair]]:
        epoch, step_in_epoch = divmod(step, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, self._shuffled(epoch))
        first = step_in_epoch * self._pairs_per_step
        members = [self._pairs[i] for i in self._order[1][first : first + self._pairs_per_step]]
        return micro_batches(members, self._batch_size)

    def _shuffled(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._pairs)))
        # Two numbers in one seed: epochs of one run differ, and so do equal epochs of neighbouring seeds.
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(len(self._pairs), generator=generator).tolist()


def micro_batches(pairs: list[Pair], batch_size: int) -> list[list[Pair]]:
    """Returns the pairs in lists of `batch_size`, in order; the last may be shorter."""
    return [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
