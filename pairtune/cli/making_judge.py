"""`tune data judge`: drawn answers get scores."""

import json
from pathlib import Path

from pairtune.cli import judging
from pairtune.cli.words import parser_of
from pairtune.errors import UserError
from pairtune.files import replacing, telling


def judge(argv: list[str]) -> int:
    """Score each prompt's answers by an endpoint, a reward model or a function of yours; `tune data binarise` then
    makes pairs of them.

    A judge that compares has each two answers meet, both ways round. What an endpoint replies is kept as it comes: the
    same command goes on after a kill, and asks again only what was under way. Where the budget is used before the end,
    the status is 3.
    """
    parser = parser_of(judge, "data judge")
    parser.add_argument("answers", type=Path, metavar="JSONL", help="rows with prompt and answers, as `sample` writes")
    parser.add_argument("--output", type=Path, required=True, metavar="JSONL", help="the same rows, with scores")
    judging.add_options(parser)
    args = parser.parse_args(argv)
    if args.judge is None:
        raise UserError("data judge: by whom? --judge ADDRESS, FOLDER or my_file.function")
    rows = _read(args.answers)
    from pairtune.making.judged import score_rows

    with judging.judge_of(args) as who:
        found = score_rows(who, rows)
        with telling(args.output, "name another file: --output"), replacing(args.output.expanduser()) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in found.rows)
        met = "meetings of two answers" if who.compares else "answers"
        lines = [f"{args.output}: {len(rows):,} prompts, {found.asked:,} {met} judged by {who.name}"]
        lines += [f"  {found.undecided:,} without a verdict ({found.why})"] if found.undecided else []
        lines += [f"  {found.turned:,} turned with the order, and are ties"] if found.turned else []
        print("\n".join([*lines, *judging.spent(who)]))
        return judging.BUDGET_USED if hasattr(who, "client") and who.client.is_budget_used else 0


def _read(path: Path) -> list[dict]:
    """Returns rows with a prompt and answers."""
    found = []
    try:
        lines = path.expanduser().read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'it is no text'}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            is_right = "prompt" in row and all(isinstance(text, str) for text in row["answers"])
        except (ValueError, TypeError, KeyError):
            is_right = False
        if not is_right:
            raise UserError(f"{path}, line {number}: must be an object with prompt and answers, a list of texts")
        found.append(row)
    return found
