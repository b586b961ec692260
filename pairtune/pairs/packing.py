"""Which pairs share a micro-batch, so that rows are full and no process waits for another.

What a step computes does not depend on it, but for rounding: its loss is a mean over pairs.
"""

from collections.abc import Callable, Sequence

Bins = list[list[int]]  # indices


def pack(lengths: Sequence[int], capacity: int, multiple: int = 1) -> Bins:
    """Returns the indices of lengths in bins of this capacity, as few as a multiple of `multiple` allows.

    Longest first, each into the emptiest bin; where one finds no room so, each into the fullest that has room (best
    fit decreasing); then with more bins. Some may be empty.

    Args:
        lengths: None above the capacity.
    """
    count = multiple * -(-max(1, sum(lengths)) // (capacity * multiple))
    while True:
        for choose in (max, min):
            bins = _fill(lengths, [capacity] * count, choose)
            if bins is not None:
                return bins
        count += multiple


def balance(costs: Sequence[float], most: int, count: int) -> Bins:
    """Returns the indices of costs in `count` bins of at most `most` members that cost about the same.

    Dearest first, each into the bin that costs least so far (Graham 1969).
    """
    bins, total = [[] for _ in range(count)], [0.0] * count
    for i in _descending(costs):
        b = min((b for b in range(count) if len(bins[b]) < most), key=total.__getitem__)
        bins[b].append(i)
        total[b] += costs[i]
    return bins


def _fill(lengths: Sequence[int], room: list[int], choose: Callable) -> Bins | None:
    """Longest first; of the bins with room for it `choose` takes the one that has most (max) or least (min)."""
    bins = [[] for _ in room]
    for i in _descending(lengths):
        roomy = [b for b in range(len(room)) if room[b] >= lengths[i]]
        if not roomy:
            return None
        b = choose(roomy, key=room.__getitem__)
        bins[b].append(i)
        room[b] -= lengths[i]
    return bins


def deal(bins: Bins, costs: Sequence[float], rank: int, size: int) -> Bins:
    """Returns a process's bins, the dearest first: the processes' n-th ones cost about the same.

    Args:
        bins: A multiple of `size`.
    """
    sums = {id(members): sum(costs[i] for i in members) for members in bins}
    dearest_first = sorted(bins, key=lambda members: -sums[id(members)])
    return [sorted(members) for members in dearest_first[rank::size]]


def _descending(numbers: Sequence[float]) -> list[int]:
    return sorted(range(len(numbers)), key=lambda i: -numbers[i])
