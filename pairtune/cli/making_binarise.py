"""`tune data binarise`: rated answers become pairs."""

import json
import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pairtune.cli.data import rows_of
from pairtune.cli.words import parser_of
from pairtune.errors import UserError
from pairtune.files import replacing, telling
from pairtune.making.binarise import WAYS, Counts
from pairtune.making.binarise import binarise as choose
from pairtune.making.rated import read_rated
from pairtune.process.console import Progress


def binarise(argv: list[str]) -> int:
    """Make pairs of questions whose answers were rated: UltraFeedback's, HelpSteer's, Nectar's, lists with scores or
    ranks. Keys of `dataset` may follow the source, as split=train columns={prompt: question}.

    zephyr: the best answer by the overall score, and a random one that scored lower. notus: the same by the mean of the
    ratings of helpfulness, honesty, instruction following and truthfulness. best-worst; best-all: the best with each
    that is worse; each: every two answers.
    """
    parser = parser_of(binarise, "data binarise")
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
    rows = rows_of(sources[0], [word for word in args.source if "=" in word])
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
    counts = Counts()
    pairs = choose(rated, way, seed=args.seed, held_out=args.held_out, against=against, counts=counts)
    with Progress("questions", len(rows), unit="rows") as progress:
        files = write_pairs(_told(pairs, progress, counts), args.output, args.held_out, counts)
    print("\n".join([f"{sources[0]}: {counts}", *map(str, files)]))
    return 0


def _told(pairs, progress: Progress, counts: Counts):
    """Passes pairs on, and tells how many questions they are of."""
    done = 0
    for pair in pairs:
        progress.update(counts.questions - done)
        done = counts.questions
        yield pair
    progress.update(counts.questions - done)


def write_pairs(pairs, output: Path, share: float, counts) -> list[Path]:
    """Writes pairs, and those that are held out beside them; returns the files, which are there whole or not at all.

    Args:
        pairs: Rows, each with whether it is held out.
        share: Of what is held out: 0 for no second file.
        counts: What became of all, in words.

    Raises:
        UserError: There is no pair, or none on one of two sides, or a file cannot be written.
    """
    output = output.expanduser()
    held_out = output.with_name(f"{output.stem}.held_out{output.suffix or '.jsonl'}")
    paths = [output, held_out] if share else [output]
    with telling(output, "name another file: --output"), ExitStack() as stack:
        files, written = [stack.enter_context(replacing(path)) for path in paths], [0] * len(paths)
        for row, is_held_out in pairs:
            files[is_held_out].write(json.dumps(row, ensure_ascii=False) + "\n")
            written[is_held_out] += 1
        if not any(written):
            raise UserError(f"no pair can be made: {counts}")
        if not all(written):
            which = "none" if written[0] else "each"
            way_out = f"give another --seed, a {'larger' if written[0] else 'smaller'} share, or more rows"
            raise UserError(
                f"--held-out {share:g}: of {sum(written):,} pairs {which} is held out, and a run refuses an empty "
                f"file; {way_out}"
            )
    return paths
