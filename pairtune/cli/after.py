"""Commands about runs that have ended, or were killed: they read a run folder, and nothing of it is changed but its
pictures and its report."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path

from pairtune.cli.words import parser_of
from pairtune.errors import UserError
from pairtune.files import write_text


def plot(argv: list[str]) -> int:
    """Draw a run's curves anew (curves.png in its folder), or several runs' over each other."""
    parser = parser_of(plot)
    parser.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a run folder")
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: RUN/curves.png; of several ./curves.png")
    args = parser.parse_args(argv)
    from pairtune.files import telling
    from pairtune.run import curves
    from pairtune.run.finished import open_run

    found = [open_run(run) for run in args.runs]
    target = args.output or (args.runs[0].expanduser() if len(found) == 1 else Path()) / "curves.png"
    if len(found) == 1:
        figure = curves.draw_curves(found[0].log, f"{found[0].name}: {found[0].verdict.headline}")
    else:
        names = [run.name for run in found]
        names = [n if names.count(n) == 1 else str(run.folder) for n, run in zip(names, found, strict=True)]
        logs = {name: run.log for name, run in zip(names, found, strict=True)}
        title = "; ".join(f"{name}: {run.verdict.name}" for name, run in zip(names, found, strict=True))
        figure = curves.draw_runs(logs, title)
    with telling(target, "name another file: --output"):
        curves.save(figure, target.expanduser())
    for run in found:
        print(f"{run.name}: {run.verdict.headline}")
    print(target)
    return 0


def pairs(argv: list[str]) -> int:
    """List a run's pairs whose label may be wrong, those that it forgot, and those that contradict each other."""
    parser = parser_of(pairs)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="of each kind; default: 20")
    parser.add_argument("--held-out", action="store_true", help="of the held-out pairs, not of the training pairs")
    parser.add_argument("--output", type=Path, metavar="JSONL", help="all pairs, in the same order, an object a line")
    args = parser.parse_args(argv)
    if args.top < 1:
        raise UserError(f"--top {args.top}: must be at least 1")
    from pairtune.run import pair_log
    from pairtune.run.dynamics import courses
    from pairtune.run.finished import open_run

    run = open_run(args.run)
    found = courses(pair_log.read(run.folder / pair_log.FILE), held_out=args.held_out)
    if not found:
        kind = "held-out pairs" if args.held_out else "training pairs"
        raise UserError(
            f"{run.folder / pair_log.FILE}: has no {kind}; unpaired rows have no margin, and are not listed"
        )
    texts = _texts(run.config, held_out=args.held_out)
    print(_listed(run.name, found, texts, args.top))
    if args.output:
        write_text(args.output.expanduser(), "".join(_as_line(course, texts) for course in found))
        print(f"\n{args.output}: {len(found):,} pairs")
    return 0


def _texts(config: dict, *, held_out: bool) -> dict[int, list[tuple]]:
    from pairtune.run.pair_texts import read_texts  # and torch

    try:
        return read_texts(config, held_out=held_out)
    except UserError as error:
        print(f"texts are not shown: {error}\n")
        return {}


def _listed(name: str, found: list, texts: dict, top: int) -> str:
    from pairtune.run.dynamics import contradictions

    lines = [f"{name}: {len(found):,} pairs, those first that lie furthest behind the others of their stage"]
    wrong = [course for course in found if course.behind > 0 and course.margins[-1] <= 0]
    late = [course for course in found if course.behind > 0 and course.margins[-1] > 0]
    lines += ["", f"label may be wrong: {len(wrong):,} whose margin was not positive when last seen"]
    for course in [*wrong, *late][:top]:
        learned = f"positive from step {course.learned} on" if course.learned is not None else "not positive at the end"
        where = f"margin {course.margins[-1]:+.3f} at step {course.steps[-1]}, {learned}"
        lines += [f"  row {course.row}: {course.behind:.1f} spreads behind; {where}", *_shown(texts.get(course.row))]
    forgotten = [course for course in found if course.was_forgotten]
    lines += ["", f"forgotten: {len(forgotten):,} that were ranked rightly once, and not when last seen"]
    lines += [
        f"  row {course.row}: margins {', '.join(f'{m:+.3f}' for m in course.margins)}" for course in forgotten[:top]
    ]
    if texts:
        against = contradictions({row: of_row[0] for row, of_row in texts.items() if of_row})
        lines += ["", f"contradicting: {len(against):,} pairs of rows, one of which chose what the other rejected"]
        lines += [f"  rows {one} and {other}" for one, other in against[:top]]
    return "\n".join(lines)


def _shown(of_row: list[tuple] | None) -> list[str]:
    names = ("prompt", "chosen", "rejected")
    return [
        f"    {name + ':':<9} {textwrap.shorten(text, 100, placeholder=' ...')}"
        for text in (of_row or [])[:1]
        for name, text in zip(names, text, strict=True)
    ]


def _as_line(course, texts: dict) -> str:
    of_row = (texts.get(course.row) or [("", "", "")])[0]
    told = dict(zip(("prompt", "chosen", "rejected"), of_row, strict=True))
    return json.dumps(asdict(course) | told, ensure_ascii=False) + "\n"


def evaluate(argv: list[str]) -> int:
    """Score pairs with a model's folder (an export, one of the Hub's, or a run's), against a reference; no training."""
    parser = parser_of(evaluate, "eval")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a model's folder; of a run's, its export is taken")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="of a config: dtype=fp32, loss=ipo, ...")
    parser.add_argument("--dataset", metavar="ROWS", help="as in a config; default: a run's held-out pairs")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="default: a run's base, else none")
    parser.add_argument("--output", type=Path, metavar="JSONL", help="each pair's numbers, an object a line")
    args = parser.parse_intermixed_args(argv)
    from pairtune.cli import evaluate as evaluating  # and torch

    asked = evaluating.Asked(args.folder, args.dataset, args.reference, args.overrides)
    cfg, compared = evaluating.settle(asked)
    results, table = evaluating.evaluate(cfg)
    print(f"{args.folder}, {compared}: {evaluating.report(cfg, results, table)}")
    if args.output:
        evaluating.save(args.output.expanduser(), table)
        print(args.output)
    return 0


def report(argv: list[str]) -> int:
    """Write a run's report.html: verdict, curves, hardest pairs, answers before and after, config, in one file."""
    parser = parser_of(report)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder, of a run that was killed, too")
    parser.add_argument("--output", type=Path, metavar="HTML", help="default: RUN/report.html")
    args = parser.parse_args(argv)
    from pairtune.files import telling
    from pairtune.run import report as page
    from pairtune.run.finished import open_run

    run = open_run(args.run)
    target = (args.output or run.folder / page.FILE).expanduser()
    with telling(target, "name another file: --output"):
        texts = _texts(run.config, held_out=True)

        def only(of_row):  # which of several pairs of a row it is, a row does not say
            return of_row[0] if of_row and len(of_row) == 1 else None

        write_text(target, page.write(run, lambda row, _: only(texts.get(row))))
    print(f"{run.name}: {run.verdict.headline}\n{target}")
    return 0
