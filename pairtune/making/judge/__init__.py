"""Which answer is better, or how good one is: said by an endpoint, a reward model or a function; and what it comes to.

A judge scores single answers, or compares two; one that compares is asked both ways round. Nothing here trains.
"""

from pairtune.making.judge.opening import open_judge
from pairtune.making.judge.question import Judge, Question, Said
from pairtune.making.judge.rates import WinRate, table, win_rates
from pairtune.making.judge.verdicts import Verdict, scores, verdicts

__all__ = [
    "Judge",
    "Question",
    "Said",
    "Verdict",
    "WinRate",
    "open_judge",
    "scores",
    "table",
    "verdicts",
    "win_rates",
]
