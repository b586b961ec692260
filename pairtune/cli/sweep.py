"""`tune sweep`: a run for each combination of alternatives, one after the other, and what they came to.

Each is a `tune run` in a process of its own, so that nothing of one is left in the next. What they share is on the
disk: tokens and cached references, which are found by content. sweep.jsonl has a line a run, and what each was made
with.
"""

import fcntl
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from pairtune.cli import sweep_table
from pairtune.cli.alternatives import Combination, combinations
from pairtune.cli.children import Children
from pairtune.cli.words import prog
from pairtune.errors import UserError
from pairtune.files import read_object, telling, write_text
from pairtune.run import places, verdict
from pairtune.run.folder import check_free

LOCK, LINES, PICTURE = ".sweep.lock", "sweep.jsonl", "sweep.png"
ENDED = ("yes", "early")  # as verdict.json says
KEEPING = ("adapter_off", "start", "model")  # references that reference=cached can keep for all runs
SAFE_TO_DIFFER = ("output_dir", "resume")
WAY_OUT = "name another output_dir"


@dataclass
class Run:
    """A run of the sweep, and what is known of it: `status` is one of sweep_table.Row."""

    of: Combination
    folder: Path
    words: list[str]
    made_with: dict  # key to value, "recipe" to its digest
    status: str = "not started"
    line: dict = field(default_factory=dict)  # what sweep.jsonl said of it before

    @property
    def has_ended(self) -> bool:
        said = read_object(
            self.folder / verdict.FILE, way_out="remove it: the run goes on from its last checkpoint then"
        )
        return said.get("ended") in ENDED and (
            self.line.get("status") == "ended" or (self.folder / places.EXPORT).is_dir()
        )


def sweep(argv: list[str]) -> int:
    """Run a recipe for every combination of values: key=a,b,c; a table, curves and the best one at the end.

    One run after the other; the same command again goes on. torchrun's options stand before RECIPE.
    """
    from pairtune.cli.check import check_run, read_words
    from pairtune.cli.launch import read_start

    options, recipe, rest = read_start(argv, "sweep", sweep.__doc__)
    _check_machines(options)
    if {"-h", "--help"} & set(rest):
        print(f"usage: {prog()} sweep [torchrun's options] RECIPE --config CONFIG key=a,b,c ...\n\n{sweep.__doc__}")
        return 0
    configs, overrides = read_words(recipe, rest)
    config_words = [word for path in configs for word in ("--config", str(path))]
    folder, runs = _plan(recipe, configs, overrides)
    with _hold(folder):
        _take_over(folder, runs)
        for run in runs:
            if run.status != "ended":
                with _naming(run):
                    check_run(recipe, configs, run.words)
        _write(folder, runs)
        print(_told(folder, runs), flush=True)
        command = [sys.executable, "-u", "-P", "-m", "pairtune.cli", "run", *options, str(recipe), *config_words]
        stopped = _run_all(folder, runs, command)
        if stopped:
            ended = sum(run.status == "ended" for run in runs)
            again = shlex.join([prog(), "sweep", *argv])
            print(f"\nstopped: {ended} of {len(runs)} runs have ended; the same command goes on:\n  {again}")
            return 128 + stopped
        return _conclude(folder, runs)


# Before the first run


def _check_machines(options: Sequence[str]) -> None:
    if "LOCAL_RANK" in os.environ:
        raise UserError("sweep: starts torchrun for each run by itself; give torchrun's options before RECIPE")
    if not options:
        return
    from pairtune.cli.launch import torchrun_parser

    nodes = torchrun_parser().parse_args([*options, "RECIPE"]).nnodes
    if nodes not in ("1", "1:1"):
        raise UserError(f"--nnodes {nodes}: a sweep runs on one machine; start each run by `tune run` on all of them")


def _plan(recipe: Path, configs: list[Path], overrides: list[str]) -> tuple[Path, list[Run]]:
    """Returns the sweep's folder and its runs; every config is right.

    Raises:
        UserError: As config.check, or the sweep is none.
    """
    from pairtune import config
    from pairtune.cli.recipe import parses_defaults, top_level

    read = top_level(recipe, "METHOD", "DEFAULTS") if parses_defaults(recipe) else {}
    if not {"METHOD", "DEFAULTS"} <= read.keys():
        raise UserError(
            f"{recipe.name}: a sweep checks all configs first: of recipes with METHOD and DEFAULTS, as ours"
        )
    digest = sha256(recipe.read_bytes()).hexdigest()[:16]
    found, folder = [], None
    for one in combinations(overrides):
        with _naming(one):
            cfg = config.check(read["METHOD"], read["DEFAULTS"], configs, one.words)
        if cfg.get("resume") not in (None, False, "auto"):
            raise UserError(f"resume={cfg['resume']}: each run of a sweep goes on where it was; leave it out")
        if folder is None:
            is_given = any(word.startswith("output_dir=") for word in one.words)
            folder = Path(cfg["output_dir"] if is_given else f"{cfg['output_dir'].rstrip('/')}_sweep").expanduser()
        of_run = folder / one.name
        words = [word for word in one.words if not word.startswith("output_dir=")]
        words += [f"output_dir={_json(str(of_run))}", "resume=auto"]
        found.append(Run(one, of_run, words, _flat(cfg) | {"recipe": digest}))
    if places.look(folder).is_run or (folder / places.LOG).is_file():
        raise UserError(f"output_dir={folder}: is the folder of a run, and a sweep's holds one for each; {WAY_OUT}")
    return folder, found


@contextmanager
def _naming(run: Run | Combination) -> Iterator[None]:
    """Around what is checked of a run: says which."""
    try:
        yield
    except UserError as error:
        name = run.name if isinstance(run, Combination) else run.of.name
        raise UserError(f"run {name}: {error}") from None


def _flat(node: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in node.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)  # YAML knows dates


@contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Holds a sweep's folder: two sweeps at a time would start the same runs."""
    with telling(folder, WAY_OUT):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"output_dir={folder}: another sweep runs there; wait until it has ended") from None
        except OSError:  # a disk without locks
            pass
        yield


def _take_over(folder: Path, runs: list[Run]) -> None:
    """Notes which runs have ended, by an earlier call; one that a killed sweep has left running is waited for.

    Raises:
        UserError: One that has ended was made with something else.
    """
    before = _read(folder / LINES)
    for run in runs:
        run.line = before.get(run.of.name, {})
        _wait_until_free(run.folder)
        if run.has_ended:
            run.status = "ended"
            _check_same(run)


def _read(path: Path) -> dict[str, dict]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        return {line["run"]: line for line in map(json.loads, lines)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {error}; remove it: it is written again") from None


def _wait_until_free(folder: Path) -> None:
    told = False
    while True:
        try:
            return check_free(places.look(folder))
        except UserError:
            if not told:
                print(f"{folder}: a run is still writing there; waiting for its end", flush=True)
            told = True
            time.sleep(0.5)


def _check_same(run: Run) -> None:
    from pairtune.config import keys
    from pairtune.config.rules import show

    before = run.line.get("made_with", {})
    for key in sorted({*before, *run.made_with} if before else ()):
        old, new = before.get(key), json.loads(_json(run.made_with.get(key)))
        if old == new or key in SAFE_TO_DIFFER or keys.on_resume(key) == "yes":
            continue
        what = "another text of the recipe" if key == "recipe" else f"{key}={show(old)}, which is {show(new)} now"
        raise UserError(f"{run.folder}: this run has ended, and was made with {what}; {WAY_OUT}, or remove that folder")


def _told(folder: Path, runs: list[Run]) -> str:
    """Returns what is going to happen."""
    lines = [f"{len(runs)} runs in {folder}, one after the other:"]
    width = max(len(run.of.name) for run in runs)
    for run in runs:
        states = {"ended": "has ended"}
        state = states.get(run.status, "goes on" if (run.folder / places.LOG).is_file() else "")
        words = " ".join(f"{key}={value}" for key, value in run.of.differs.items())
        lines.append(f"  {run.of.name:<{width}}  {words}{f'  ({state})' if state else ''}")
    names = {run.made_with.get("reference.name") for run in runs}
    if len(names) == 1 and names <= {*KEEPING}:
        lines.append("advice: reference=cached computes the reference once for all runs, and not in every step of each")
    return "\n".join(lines)


# The runs


def _run_all(folder: Path, runs: list[Run], command: list[str]) -> int:
    """Runs what has not ended. Returns the signal that stopped it, 0 for none."""
    with Children() as children:
        for place, run in enumerate(runs, 1):
            if children.heard:
                break
            if run.status == "ended":
                continue
            print(f"\n===== run {place} of {len(runs)}: {run.of.name} =====\n", flush=True)
            status = children.run([*command, *run.words])
            run.status = "ended" if status == 0 else "stopped" if children.heard else "failed"
            _write(folder, runs)
    return children.heard


# What they came to


def _rows(runs: list[Run]) -> list[sweep_table.Row]:
    return [sweep_table.row_of(run.of.name, run.of.differs, run.status, run.folder) for run in runs]


def _write(folder: Path, runs: list[Run]) -> None:
    """Writes sweep.jsonl: each run's numbers, and what it was made with."""
    lines = _read(folder / LINES)  # of another call's alternatives, too
    for run, row in zip(runs, _rows(runs), strict=True):
        lines[run.of.name] = (
            {"run": run.of.name, "folder": str(run.folder)}
            | {"differs": run.of.differs, **row.numbers()}
            | {"made_with": run.made_with}
        )
    text = "".join(_json(line) + "\n" for line in lines.values())
    with telling(folder / LINES, WAY_OUT):
        write_text(folder / LINES, text)


def _conclude(folder: Path, runs: list[Run]) -> int:
    rows = _rows(runs)
    said = sweep_table.best(rows)
    print(f"\n{sweep_table.table(rows)}\n\n{said}")
    drawn = {row.name: row.run.log for row in rows if row.run}
    if drawn:
        from pairtune.run import curves

        with telling(folder / PICTURE, WAY_OUT):
            curves.save(curves.draw_runs(drawn, said), folder / PICTURE)
        print(f"\n{folder / PICTURE}, {folder / LINES}")
    failed = [run.of.name for run in runs if run.status == "failed"]
    if failed:
        print(f"failed: {', '.join(failed)}; what each said is above; the same command tries these again")
    return 1 if failed else 0
