"""Rows are full, processes have the same to do, and no pair is lost; what a step computes does not depend on it."""

import random
from types import SimpleNamespace

import pytest
import torch

from pairtune.pairs.batch import document_length
from pairtune.pairs.steps import Steps, cost, share
from pairtune.process.dist import World


def real_pairs(count, seed=0):
    """Lengths as chats have them: log-normal, from a line to a page."""
    rng = random.Random(seed)

    def length(median, most):
        return max(1, min(most, round(rng.lognormvariate(0, 0.8) * median)))

    return [
        SimpleNamespace(prompt=[0] * length(150, 1000), chosen=[1] * length(250, 900), rejected=[2] * length(230, 900))
        for _ in range(count)
    ]


def tokens(batches):
    return [sum(map(document_length, pairs)) for pairs in batches]


@pytest.mark.parametrize("rows", [None, 4096, 8192])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_each_pair_goes_to_one_micro_batch_of_one_process(size, rows):
    for num_pairs in (0, 1, 3, 64, 131):
        pairs = real_pairs(num_pairs, seed=num_pairs)
        shares = [share(pairs, 4, rank=rank, size=size, rows=rows) for rank in range(size)]
        found = [id(pair) for mine in shares for micro in mine for pair in micro]
        assert sorted(found) == sorted(map(id, pairs)) and len({len(mine) for mine in shares}) == 1
        for mine in shares:
            assert all(len(micro) <= 4 for micro in mine) if rows is None else max(tokens(mine), default=0) <= rows


def test_rows_are_full_and_four_processes_have_the_same_to_do():
    spent, room, dearest, total = 0, 0, 0.0, 0.0
    for step in range(20):
        pairs = real_pairs(128, seed=step)
        shares = [share(pairs, 1, rank=rank, size=4, rows=7168) for rank in range(4)]
        spent, room = spent + sum(map(sum, map(tokens, shares))), room + 7168 * sum(map(len, shares))
        costs = [sum(cost(pair) for micro in mine for pair in micro) for mine in shares]
        dearest, total = dearest + 4 * max(costs), total + sum(costs)
    assert spent / room > 0.9
    assert dearest / total < 1.03


def test_processes_without_rows_have_the_same_to_do():
    for step in range(20):
        shares = [share(real_pairs(64, seed=step), 4, rank=rank, size=4) for rank in range(4)]
        costs = [sum(cost(pair) for micro in mine for pair in micro) for mine in shares]
        assert max(costs) / (sum(costs) / 4) < 1.03


def test_the_heaviest_micro_batches_hold_the_longest_pairs():
    pairs = real_pairs(200)
    longest = sorted(map(document_length, pairs), reverse=True)
    worlds = World(torch.device("cpu")), World(torch.device("cpu"), size=3)
    for world in worlds:
        steps = Steps(pairs, 8, 4, world, seed=0)
        assert [document_length(p) for b in steps.heaviest() for p in b] == longest[: 4 * world.size]
        packed = Steps(pairs, 8, 4, world, seed=0, rows=4096).heaviest()
        assert [document_length(packed[0][0]), len(packed)] == [longest[0], world.size]
        assert all(2048 < n <= 4096 for n in tokens(packed))
    by_length = sorted(pairs, key=document_length)
    assert Steps(pairs, 8, 4, worlds[0], seed=0, rows=longest[0]).some(by_length[::-1]) == by_length[:-2:-1]
    assert Steps(pairs, 8, 4, worlds[0], seed=0, rows=longest[0]).some(by_length) == by_length[:4]
