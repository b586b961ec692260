"""How many steps a run has, and after which of them it evaluates."""

import math
from fractions import Fraction
from types import SimpleNamespace

import pytest
import torch

from pairtune.pairs.steps import Steps, count_steps
from pairtune.process.dist import World
from pairtune.run.state import TrainState


@pytest.mark.parametrize(
    ("num_pairs", "epochs", "max_steps", "expected"),
    [
        (100, 1, None, 13),
        (100, 3, None, 39),
        (100, 0.5, None, 7),  # 6.5, as transformers counts it: math.ceil(num_train_epochs * steps_per_epoch)
        (100, 1.5, None, 20),
        (100, 2.0, None, 26),
        (100, 1.0e-3, None, 1),
        (80, 0.1, None, 1),  # a tenth of ten steps: 1.0000000000000001 would be 2
        (80, 0.3, None, 3),
        (100, 1.5, 5, 5),
    ],
)
def test_a_fraction_of_an_epoch_is_that_of_its_steps_rounded_up(num_pairs, epochs, max_steps, expected):
    assert count_steps(num_pairs, 8, epochs, max_steps) == expected


def due(every, total):
    return [step for step in range(total + 1) if TrainState.is_due(SimpleNamespace(step=step), every, total)]


@pytest.mark.parametrize("every", [1, 2, 3, 7, 12, 13, 100])
def test_whole_steps_are_due_at_their_multiples_and_at_the_end(every):
    assert due(every, 12) == [step for step in range(1, 13) if step % every == 0 or step == 12]
    assert due(None, 12) == [12]


@pytest.mark.parametrize(
    ("every_n_epochs", "expected"),
    [
        (1, [13, 26, 30]),
        (0.5, [7, 13, 20, 26, 30]),
        (0.25, [4, 7, 10, 13, 17, 20, 23, 26, 30]),
        (2.0, [26, 30]),
        (5, [30]),
        (0.01, list(range(1, 31))),  # less than a step is every step
    ],
)
def test_an_interval_in_epochs_is_due_after_the_first_step_that_reaches_it(every_n_epochs, expected):
    steps = Steps([None] * 100, 8, 4, World(torch.device("cpu")), seed=0)  # 13 an epoch
    every = steps.interval(None, every_n_epochs)
    assert due(every, 30) == expected
    assert expected[:-1] == sorted({math.ceil(every * k) for k in range(1, 3000)} & set(range(1, 30)))
    assert (steps.interval(7, None), steps.interval(None, None)) == (7, None) and isinstance(every, Fraction)
