"""`tune data`: what is in a source of pairs, before anything is trained on it."""

import argparse
import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pairtune.cli.words import parser_of
from pairtune.console import Progress
from pairtune.errors import UserError
from pairtune.files import replacing, telling


def data(argv: list[str]) -> int:
    """Look at pairs before training: duplicates, contradictions, length, languages, refusals, rows to read.

    `tune data FILE` is `tune data lint FILE`; keys of `dataset` may follow, as columns={prompt: question}. With
    --tokenizer, what becomes of the rows at a budget, too. --strict: status 1 if anything should be mended first.
    `tune data binarise FILE` makes pairs of rated answers.
    """
    if argv[:1] in (["binarise"], ["binarize"]):
        return _binarise(argv[1:])
    parser = parser_of(data)
    parser.add_argument("source", metavar="[lint] FILE", nargs="+", help="a file, a folder or a Hub id; key=value")
    parser.add_argument("--held-out", metavar="FILE", help="rows that are evaluated on: which of them training has")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="a model's: counts tokens, and what is over the budget")
    parser.add_argument("--max-length", type=int, default=1024, metavar="N", help="the budget; default: %(default)s")
    parser.add_argument("--strict", action="store_true", help="status 1 if anything is wrong")
    args = parser.parse_intermixed_args(argv)
    sources = [word for word in args.source if "=" not in word]
    sources = sources[1:] if sources[:1] == ["lint"] and len(sources) > 1 else sources
    if len(sources) != 1:
        raise UserError(f"data: which rows? tune data FILE [columns=...]; {len(sources)} are named")
    return _lint(sources[0], [word for word in args.source if "=" in word], args)


def _lint(source: str, words: list[str], args: argparse.Namespace) -> int:
    from pairtune.config.keys import ROWS
    from pairtune.pairs.lint import look
    from pairtune.pairs.rows import read_rows

    block = {**ROWS, **_settings(words, ROWS), "source": source}
    rows = _rows(source, words)
    held_out = read_rows(args.held_out, columns=block["columns"], key="held-out") if args.held_out else None
    found = look(rows, "dataset", held_out=held_out, single=True)
    print(f"{source}\n{found}")
    if args.tokenizer:
        from pairtune.pairs.tokenize import read_pairs
        from pairtune.tokenizer.hf import hf_tokenizer

        _, report = read_pairs(block, hf_tokenizer(args.tokenizer), max_length=args.max_length, unpaired=True)
        print(f"\nat max_length={args.max_length}\n{report}")
    return int(args.strict and found.has_faults)


def _binarise(argv: list[str]) -> int:
    """Make pairs of questions whose answers were rated: UltraFeedback's, HelpSteer's, Nectar's, lists with scores or
    ranks. Keys of `dataset` may follow the source, as split=train columns={prompt: question}.

    zephyr: the best answer by the overall score, and a random one that scored lower. notus: the same by the mean of the
    ratings of helpfulness, honesty, instruction following and truthfulness. best-worst; best-all: the best with each
    that is worse; each: every two answers.
    """
    from pairtune.making.binarise import WAYS, Counts, binarise
    from pairtune.making.rated import read_rated

    parser = parser_of(_binarise, "data binarise")
    parser.add_argument("source", metavar="FILE", nargs="+", help="a file, a folder or a Hub id; key=value")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL", help="where the pairs go")
    parser.add_argument("--way", choices=list(WAYS), default="zephyr", help="default: zephyr")
    parser.add_argument("--score", metavar="NAME,NAME", help="whose mean is an answer's score, in place of the way's")
    parser.add_argument("--margin", type=float, default=0.0, help="how far apart two scores must be; default: unequal")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of the questions, into a file")
    parser.add_argument("--against", choices=list(WAYS), help="count how often this way would turn a pair round")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn and held out; default: 0")
    args = parser.parse_intermixed_args(argv)
    sources = [word for word in args.source if "=" not in word]
    if len(sources) != 1:
        raise UserError(
            f"data binarise: which answers? tune data binarise FILE --output PAIRS; {len(sources)} are named"
        )
    for name, value, least, most in (("--held-out", args.held_out, 0, 1), ("--margin", args.margin, 0, math.inf)):
        if not least <= value < most:
            raise UserError(f"{name} {value:g}: must be at least {least} and below {most}")
    rows = _rows(sources[0], [word for word in args.source if "=" in word])
    rated, aspects = read_rated(rows)
    way = replace(WAYS[args.way], margin=args.margin)
    way = replace(way, aspects=tuple(args.score.split(","))) if args.score else way
    against = WAYS[args.against] if args.against else None
    for option, one in (("--score" if args.score else "--way", way), ("--against", against)):
        if one and (unknown := [aspect for aspect in one.aspects if aspect not in aspects]):
            raise UserError(
                f"{option}: {sources[0]} has no score {', '.join(unknown)}; its answers are scored by "
                f"{', '.join(aspects)}: --score {aspects[0]}"
            )
    counts, output = Counts(), args.output.expanduser()
    held_out = output.with_name(f"{output.stem}.held_out{output.suffix or '.jsonl'}")
    pairs = binarise(rated, way, seed=args.seed, held_out=args.held_out, against=against, counts=counts)
    _write(pairs, output, held_out if args.held_out else None, Progress("questions", len(rows), unit="rows"), counts)
    print(f"{sources[0]}: {counts}\n{output}" + (f"\n{held_out}" if args.held_out else ""))
    return 0


def _write(pairs, output: Path, held_out: Path | None, progress: Progress, counts) -> None:
    """Writes pairs into two files, which are there whole or not at all."""
    with telling(output, "name another file: --output"), ExitStack() as stack:
        files = [stack.enter_context(replacing(path)) for path in (output, held_out) if path]
        done = 0
        for row, is_held_out in pairs:
            files[is_held_out].write(json.dumps(row, ensure_ascii=False) + "\n")
            progress.update(counts.questions - done)
            done = counts.questions
        progress.close()
        if not counts.pairs:
            raise UserError(f"no pair can be made: {counts}")


def _rows(source: str, words: list[str]):
    from pairtune.config.keys import ROWS
    from pairtune.pairs.rows import read_rows

    block = {**ROWS, **_settings(words, ROWS)}
    where = {name: block[name] for name in ("split", "name", "revision", "limit")}
    return read_rows(source, **where, columns=block["columns"])


def _settings(words: list[str], known: dict) -> dict:
    """Returns key=value of `dataset`'s keys, with or without its name before them."""
    from pairtune.config.reading import read_value
    from pairtune.errors import nearest

    found = {}
    for word in words:
        key, _, value = word.partition("=")
        name = key.removeprefix("dataset.")
        if name not in known:
            raise UserError(f"{key}: no key of dataset{nearest(name, known)}")
        found[name] = read_value(key, value, f"command line, {word}")
    return found
