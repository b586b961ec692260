"""`tune data sample`: several answers to each prompt."""

import argparse
import re
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from pairtune.cli.ask import add_how, check_how, check_overrides, one_folder, sampling_of
from pairtune.cli.judging import BUDGET_USED, body_of, limits_of, option_of
from pairtune.cli.prompts import read_prompts_file
from pairtune.cli.words import parser_of
from pairtune.errors import UserError

BATCH_SIZE = 32
OF_ENDPOINTS = ("model", "budget", "at_once", "timeout", "body", "replies")
OF_FOLDERS = ("batch_size", "adapter", "base_dtype", "top_k")


def sample(argv: list[str]) -> int:
    """Draw several answers to each prompt from a model's folder, or from an OpenAI-compatible endpoint, for `tune data
    judge` to say which are good.

    A file of answers that is there already is gone on with; it ends the same as if it had not been stopped, and an
    endpoint is asked again only for what was under way at a kill. Where its budget is used before the end, the status
    is 3.
    """
    args = _parsed(argv)
    check_how(args)
    if args.count > 1 and not args.temperature:
        raise UserError(f"--count {args.count}: with --temperature 0 all answers to a prompt are one; give another")
    addresses = [word for word in args.words if re.match(r"\w+://", word)]
    if addresses:
        return _from_endpoint(addresses, args)
    if given := [name for name in OF_ENDPOINTS if getattr(args, name) is not None]:
        raise UserError(f"{option_of(given[0])}: has no effect but on an endpoint, https://HOST/v1")
    folder, overrides = one_folder(args.words, "data sample")
    check_overrides(args, overrides)
    from pairtune.making.sample import sample as draw

    rows = _rows(args.prompts)
    answer, drawing = drawn_from(folder, overrides, args, args.count, [row["prompt"] for row in rows])
    print(f"{args.output}: {draw(answer, rows, args.output, drawing)}")
    return 0


def _parsed(argv: list[str]) -> argparse.Namespace:
    parser = parser_of(sample, "data sample")
    parser.add_argument(
        "words",
        metavar="FOLDER",
        nargs="+",
        help="a model's or a run's, then key=value of a config; or https://HOST/v1",
    )
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="a prompt a line, or .jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL", help="prompts and answers, as they come")
    parser.add_argument("--count", type=int, default=4, metavar="N", help="answers to each prompt; default: 4")
    parser.add_argument("--batch-size", type=int, metavar="N", help=f"answers at a time; default: {BATCH_SIZE}")
    add_how(parser, temperature=1.0)
    group = parser.add_argument_group("of an endpoint")
    group.add_argument("--model", metavar="NAME", help="which of its models answers")
    group.add_argument("--budget", type=int, metavar="N", help="requests at most, those of earlier calls counted")
    group.add_argument("--at-once", type=int, metavar="N", help="requests under way at a time; default: 4")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds for a reply; default: 600")
    group.add_argument("--body", metavar="JSON", help="what else is sent, such as '{\"top_k\": 40}'; null leaves out")
    group.add_argument("--replies", type=Path, metavar="JSONL", help="as they come; default: beside --output")
    return parser.parse_intermixed_args(argv)


def _rows(path: Path) -> list[dict]:
    rows = read_prompts_file(path)
    if not rows:
        raise UserError(f"--prompts {path}: holds none")
    return rows


def _from_endpoint(addresses: list[str], args) -> int:
    others = [word for word in args.words if word not in addresses]
    if len(addresses) > 1 or others:
        word = (others or addresses[1:])[0]
        raise UserError(f"{word}: has no effect beside an endpoint, which is asked as it is; leave it out")
    for name in OF_FOLDERS:
        if getattr(args, name) is not None:
            way_out = ""
            if name == "top_k":
                way_out = f"; --body '{{\"top_k\": {args.top_k}}}' sends it to one that knows it, as vLLM's does"
            raise UserError(f"{option_of(name)}: has no effect on an endpoint{way_out}; leave it out")
    if args.model is None:
        raise UserError(f"{addresses[0]}: an endpoint is told which of its models answers: --model NAME")
    from pairtune.hub.endpoint import Limits, spent
    from pairtune.hub.replies import Kept
    from pairtune.making.from_endpoint import Request, open_endpoint, sample_from

    limits = Limits(**{"timeout_s": 600.0, **limits_of(args)})
    how = {name: getattr(args, name) for name in ("count", "seed", "max_new_tokens", "temperature", "top_p", "system")}
    request = Request(args.model, **how, body=body_of(args.body, "--body") if args.body else {})
    rows = _rows(args.prompts)
    replies = args.replies or args.output.with_name(f"{args.output.stem}.replies.jsonl")
    with closing(Kept(replies, str)) as kept:
        client = open_endpoint(addresses[0], kept, limits)
        found = sample_from(client, rows, args.output, request)
        print("\n".join([f"{args.output}: {found}", *spent(client, "--budget")]))
    return BUDGET_USED if client.is_budget_used else 0


def drawn_from(folder: Path, overrides: list[str], args, count: int, prompts: Sequence):
    """Returns what making/sample.py takes: a function that answers prompts by a model, and how it draws.

    Raises:
        UserError: One of the prompts leaves no room for an answer.
    """
    from pairtune.cli import asking  # and torch
    from pairtune.making.sample import Drawing

    model = asking.Model(asking.Asked(folder, args.adapter, args.base_dtype, overrides))
    model.check_room([model.prompt(one, args.system) for one in prompts])

    def answer(prompts: list, seed: int) -> list[str]:
        texts = [""] * len(prompts)
        tokens = [model.prompt(one, args.system) for one in prompts]
        how = {"max_new_tokens": args.max_new_tokens, "sampling": sampling_of(args), "rng": model.generator(seed)}
        for added in model.answers(tokens, **how):
            texts = [text + more for text, more in zip(texts, added, strict=True)]
        return texts

    named = str(folder) + (f" with {args.adapter}" if args.adapter else "")
    how = {name: getattr(args, name) for name in ("seed", "max_new_tokens", "temperature", "top_k", "top_p", "system")}
    return answer, Drawing(named, count, batch_size=args.batch_size or BATCH_SIZE, **how)
