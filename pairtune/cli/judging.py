"""A judge, as commands name it: options, and what is told of it. Torch is imported by a reward model alone."""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pairtune.errors import UserError

VERDICTS = Path("verdicts.jsonl")
IMPLICIT = "implicit:"
BUDGET_USED = 3  # the status of a command whose endpoint has more to be asked than its budget allows
OF_ENDPOINTS = ("judge_model", "rubric", "judge_budget", "judge_at_once", "judge_timeout", "judge_body", "verdicts")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a judge and how an endpoint is asked."""
    group = parser.add_argument_group("which answers are better")
    group.add_argument(
        "--judge", metavar="WHO",
        help="an OpenAI-compatible endpoint's address, a reward model's folder, a function of yours (my_file.judge), "
        "or implicit:FOLDER of a trained policy",
    )  # fmt: skip
    group.add_argument("--judge-model", metavar="NAME", help="which model of the endpoint")
    group.add_argument("--judge-reference", type=Path, metavar="FOLDER", help="of implicit:FOLDER; default: the run's")
    group.add_argument("--rubric", type=Path, metavar="FILE", help="what it is asked, with {prompt}, {first}, {second}")
    group.add_argument("--judge-budget", type=int, metavar="N", help="requests at most, those of earlier calls counted")
    group.add_argument("--judge-at-once", type=int, metavar="N", help="requests under way at a time; default: 4")
    group.add_argument("--judge-timeout", type=float, metavar="S", help="seconds for a reply; default: 120")
    group.add_argument("--judge-body", metavar="JSON", help='what else is sent; default: {"temperature": 0}')
    group.add_argument("--verdicts", type=Path, metavar="JSONL", help=f"its replies, as they come; default: {VERDICTS}")


@contextmanager
def judge_of(args: argparse.Namespace) -> Iterator:
    """Yields the judge that the options name, None for none.

    Raises:
        UserError: It cannot be asked, or an option has no effect.
    """
    given = [name for name in OF_ENDPOINTS if getattr(args, name) is not None]
    is_implicit = (args.judge or "").startswith(IMPLICIT)
    if args.judge is None:
        given += ["judge_reference"] if args.judge_reference else []
        if given:
            raise UserError(f"{option_of(given[0])}: has no effect without --judge WHO")
        yield None
        return
    if args.judge_reference and not is_implicit:
        raise UserError(f"--judge-reference: has no effect but on {IMPLICIT}FOLDER; --judge {args.judge} is none")
    from pairtune.hub.endpoint import Limits
    from pairtune.hub.replies import Kept
    from pairtune.making.judge import open_judge
    from pairtune.making.judge.endpoint import Asking
    from pairtune.making.judge.rubric import read_rubric

    if is_implicit or "://" not in args.judge:
        if given:
            raise UserError(f"{option_of(given[0])}: has no effect but on an endpoint; --judge {args.judge} is none")
        yield _implicit(args) if is_implicit else open_judge(args.judge)
        return
    if args.judge_model is None:
        raise UserError(f"--judge {args.judge}: an endpoint is told which of its models judges: --judge-model NAME")
    how: dict[str, Any] = {"rubric": read_rubric(args.rubric), "limits": Limits(**limits_of(args, "judge_"))}
    how |= {"body": {"temperature": 0, **body_of(args.judge_body, "--judge-body")}} if args.judge_body else {}
    with closing(Kept(args.verdicts or VERDICTS)) as kept:
        yield open_judge(args.judge, Asking(args.judge_model, kept, **how))


def _implicit(args: argparse.Namespace):
    from pairtune.cli.implicit import ImplicitReward

    return ImplicitReward(args.judge, args.judge_reference)


def told(judge, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[str]]) -> str:
    """Asks a judge about all columns of answers, and returns what it says in lines."""
    from pairtune.making.judge import table, win_rates

    lines = [f"\njudged by {judge.name}", table(win_rates(judge, rows, columns), next(iter(columns)))]
    return "\n".join([*lines, *spent(judge)])


def spent(judge) -> list[str]:
    """Returns what an endpoint was asked so far, in lines; of other judges nothing."""
    from pairtune.hub.endpoint import spent as told_of

    return told_of(judge.client, "--judge-budget") if hasattr(judge, "client") else []


def option_of(name: str) -> str:
    """Returns an option, of the name that its value has."""
    return f"--{name.replace('_', '-')}"


def limits_of(args: argparse.Namespace, prefix: str = "") -> dict[str, Any]:
    """Returns those of an endpoint's limits that options set, by the names of hub.endpoint.Limits.

    Raises:
        UserError: One of them is no limit.
    """
    found = {}
    for name, holds, says in (
        ("budget", lambda v: v >= 1, "at least 1"),
        ("at_once", lambda v: v >= 1, "at least 1"),
        ("timeout", lambda v: 0 < v < math.inf, "above 0"),
    ):
        value = getattr(args, f"{prefix}{name}")
        if value is None:
            continue
        if not holds(value):
            raise UserError(f"{option_of(f'{prefix}{name}')} {value}: must be {says}")
        found["timeout_s" if name == "timeout" else name] = value
    return found


def body_of(text: str, option: str) -> dict:
    """Returns the keys and values that an option says are sent, too; null for what is not to be sent.

    Raises:
        UserError: It is something else, or says what the command says.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"{option} {text}: is no JSON: {error}") from None
    if not isinstance(found, dict) or {"model", "messages", "stream", "n"} & found.keys():
        raise UserError(f"{option} {text}: must be keys and values, none of them model, messages, stream or n")
    return found
