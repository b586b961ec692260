"""`tune data contrast`: pairs of two prompts that differ by a word."""

import json
from pathlib import Path

from pairtune.cli.ask import add_how, check_how, check_overrides, one_folder
from pairtune.cli.making_binarise import write_pairs
from pairtune.cli.words import parser_of
from pairtune.errors import UserError


def contrast(argv: list[str]) -> int:
    """Make pairs without a judge: a model answers two prompts that differ by a word; the pair's prompt is without it.

    The template has {item}, {word}, and {example} for each line of --examples: 'Write a {word} review of {item}.'
    """
    parser = parser_of(contrast, "data contrast")
    parser.add_argument("words", metavar="FOLDER", nargs="+", help="a model's or a run's; then key=value of a config")
    parser.add_argument("--template", required=True, metavar="TEXT", help="the prompt; or @FILE, whose text it is")
    parser.add_argument("--chosen", required=True, metavar="WORD", help="on the side of the chosen answer")
    parser.add_argument("--rejected", required=True, metavar="WORD", help="on the side of the rejected one")
    parser.add_argument("--items", type=Path, required=True, metavar="FILE", help="what is asked about, a line each")
    parser.add_argument("--examples", type=Path, metavar="JSONL", help="chosen and rejected, in the {example}'s order")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL", help="where the pairs go")
    parser.add_argument("--held-out", type=float, default=0.0, metavar="SHARE", help="of the items, into a second file")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="answers at a time; default: 32")
    add_how(parser, temperature=1.0)
    args = parser.parse_intermixed_args(argv)
    check_how(args)
    folder, overrides = one_folder(args.words, "data contrast")
    check_overrides(args, overrides)
    if not 0 <= args.held_out < 1:
        raise UserError(f"--held-out {args.held_out:g}: must be at least 0 and below 1")
    from pairtune.making.contrast import Contrast
    from pairtune.making.contrast import contrast as draw

    template = _text(Path(args.template[1:])).rstrip("\n") if args.template.startswith("@") else args.template
    how = Contrast(template, (args.chosen, args.rejected), tuple(_examples(args.examples)))
    items = list(dict.fromkeys(line.strip() for line in _text(args.items).split("\n") if line.strip()))
    if not items:
        raise UserError(f"--items {args.items}: holds none")
    from pairtune.cli.making_sample import drawn_from

    asked = [how.asks(item, side) for side in (0, 1) for item in items]
    answer, drawing = drawn_from(folder, overrides, args, 1, asked)
    drawn = args.output.with_name(f"{args.output.stem}.drawn.jsonl")
    found = draw(answer, items, how, drawing, drawn=drawn, held_out=args.held_out)
    files = write_pairs(found.pairs, args.output, args.held_out, found)
    print("\n".join([f"{args.items}: {found}", f"the neutral prompt: {how.neutral(items[0])!r}", *map(str, files)]))
    print(f"{drawn}: the answers under their own prompts")
    return 0


def _text(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None


def _examples(path: Path | None) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(_text(path).split("\n") if path else [], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            both = row["chosen"], row["rejected"]
        except (ValueError, TypeError, KeyError):
            both = ()
        if len(both) != 2 or not all(isinstance(text, str) for text in both):
            raise UserError(f"{path}, line {number}: must be an object with chosen and rejected, both texts")
        found.append(both)
    return found
