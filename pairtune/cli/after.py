"""Commands about runs that have ended, or were killed: they read a run folder, and nothing of it is changed but its
pictures and its report. No torch."""

from pathlib import Path

from pairtune.cli.words import parser_of


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
