"""A judge, as commands name it: options, and what is told of it. Torch is imported by a reward model alone."""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from pairtune.errors import UserError

VERDICTS = Path("verdicts.jsonl")
OF_ENDPOINTS = ("judge_model", "rubric", "judge_budget", "judge_at_once", "judge_body", "verdicts")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that name a judge and how an endpoint is asked."""
    group = parser.add_argument_group("which answers are better")
    group.add_argument(
        "--judge", metavar="WHO",
        help="an OpenAI-compatible endpoint's address, a reward model's folder, or a function of yours: my_file.judge",
    )  # fmt: skip
    group.add_argument("--judge-model", metavar="NAME", help="which model of the endpoint")
    group.add_argument("--rubric", type=Path, metavar="FILE", help="what it is asked, with {prompt}, {first}, {second}")
    group.add_argument("--judge-budget", type=int, metavar="N", help="requests at most, those of earlier calls counted")
    group.add_argument("--judge-at-once", type=int, metavar="N", help="requests under way at a time; default: 4")
    group.add_argument("--judge-body", metavar="JSON", help='what else is sent; default: {"temperature": 0}')
    group.add_argument("--verdicts", type=Path, metavar="JSONL", help=f"its replies, as they come; default: {VERDICTS}")


@contextmanager
def judge_of(args: argparse.Namespace) -> Iterator:
    """Yields the judge that the options name, None for none.

    Raises:
        UserError: It cannot be asked, or an option has no effect.
    """
    given = [name for name in OF_ENDPOINTS if getattr(args, name) is not None]
    if args.judge is None:
        if given:
            raise UserError(f"{_option(given[0])}: has no effect without --judge WHO")
        yield None
        return
    from pairtune.judge import open_judge
    from pairtune.judge.endpoint import Asking
    from pairtune.judge.kept import Kept
    from pairtune.judge.rubric import read_rubric

    if "://" not in args.judge:
        if given:
            raise UserError(f"{_option(given[0])}: has no effect but on an endpoint; --judge {args.judge} is none")
        yield open_judge(args.judge)
        return
    if args.judge_model is None:
        raise UserError(f"--judge {args.judge}: an endpoint is told which of its models judges: --judge-model NAME")
    for name in ("judge_budget", "judge_at_once"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{_option(name)} {getattr(args, name)}: must be at least 1")
    how: dict[str, Any] = {"rubric": read_rubric(args.rubric), "budget": args.judge_budget}
    how |= {"at_once": args.judge_at_once} if args.judge_at_once else {}
    how |= {"body": _body(args.judge_body)} if args.judge_body else {}
    with closing(Kept(args.verdicts or VERDICTS)) as kept:
        yield open_judge(args.judge, Asking(args.judge_model, kept, **how))


def told(judge, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, Sequence[str]]) -> str:
    """Asks a judge about all columns of answers, and returns what it says in lines."""
    from pairtune.judge import table, win_rates

    lines = [f"\njudged by {judge.name}", table(win_rates(judge, rows, columns), next(iter(columns)))]
    return "\n".join([*lines, *spent(judge)])


def spent(judge) -> list[str]:
    """Returns what an endpoint was asked so far, in lines; of other judges nothing."""
    kept = getattr(judge, "kept", None)
    if kept is None:
        return []
    lines = [f"{kept.path}: {kept.requests:,} requests, {kept.tokens:,} tokens, all calls together"]
    if judge.is_budget_used:
        lines.append(f"--judge-budget {judge.budget:,} is used; the same command with a larger one asks the rest")
    return lines


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _body(text: str) -> dict:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise UserError(f"--judge-body {text}: is no JSON: {error}") from None
    if not isinstance(found, dict) or {"model", "messages", "stream"} & found.keys():
        raise UserError(f"--judge-body {text}: must be keys and values, none of them model, messages or stream")
    return {"temperature": 0, **found}
