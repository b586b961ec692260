"""Starting a recipe: in this process, or in several under torchrun, and what is said when one of them fails."""

import argparse
import logging
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pairtune.cli.find import find, is_torchtunes, one_process_only
from pairtune.cli.words import Words, prog
from pairtune.config.answers import check_dashes
from pairtune.errors import UserError
from pairtune.process import console


def execute(recipe: Path, args: list[str]) -> None:
    """Runs the recipe's file in this process, as `python FILE ARGS` would."""
    sys.argv = [str(recipe), *args]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a `_component_` in the user's folder; last, so that it shadows no package
    runpy.run_path(str(recipe), run_name="__main__")


def launch(options: list[str], recipe: Path, args: list[str]) -> int:
    """Runs the recipe under torchrun and returns the exit status."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size
    from torch.distributed.run import run as torchrun

    from pairtune.process.dist import ignores_hangup

    parser = torchrun_parser()
    processes = 1 if is_torchtunes(recipe) else max(1, torch.cuda.device_count())
    parser.set_defaults(nproc_per_node=os.environ.get("PET_NPROC_PER_NODE", str(processes)))
    # -P: without it -m would put the current folder before the installed packages.
    command = [sys.executable, "-u", "-P", "-m", "pairtune.cli", "worker", str(recipe), *args]
    parsed = parser.parse_args([*options, *command])
    if parsed.module or parsed.no_python or parsed.run_path:
        raise UserError("--module, --no_python, --run_path: a recipe starts by path, in Python; leave them out")
    parsed.no_python = True  # `command` names its python
    addressed = any(getattr(parsed, key) != parser.get_default(key) for key in ("master_addr", "master_port"))
    if parsed.nnodes in ("1", "1:1") and not parsed.rdzv_endpoint and not addressed:
        parsed.standalone = True  # a free port of its own: several runs fit on one machine
    # It reports a failed process by number, just before we report why it failed.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # After a signal a step in flight is finished and saved: longer than the 30 s that torchrun waits by default. What
    # hangs is ended before that, by its watchdog.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if ignores_hangup():  # which torchrun would undo
        handled = parsed.signals_to_handle.split(",")
        parsed.signals_to_handle = ",".join(name for name in handled if name.strip() != "SIGHUP")
    try:
        # Shared out: torchrun would give each process one thread, and say so in five lines.
        threads = torch.get_num_threads() // determine_local_world_size(parsed.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
        with _kept_by_the_run():
            torchrun(parsed)
    except ChildFailedError as error:
        return _report_failure(*_first(error.failures))
    except SignalException as error:
        if error.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        return 128 + error.sigval
    except ValueError as error:  # e.g. --nproc_per_node gpu where there is none
        raise UserError(f"torchrun: {error}") from None
    return 0


@contextmanager
def _kept_by_the_run() -> Iterator[None]:
    """Has what this process prints afterwards, such as why the run failed, kept in the run's console.log."""
    with tempfile.NamedTemporaryFile(prefix="tune-") as note:
        os.environ[console.WHERE] = note.name
        try:
            yield
        finally:
            console.follow(Path(note.name))


def worker(recipe: Path, args: list[str]) -> int:
    """Runs one process of a distributed run. What ends it goes to the launcher, which prints the first rank's, once.

    When one rank fails, the others fail too, at the next thing they want of it: their tracebacks are noise.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    # Until processes are connected, a Ctrl-C has to end one that waits for the others in C, where Python hears nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        execute(recipe, args)
    except UserError as error:
        get_error_handler().record_exception(UserError(str(error)))  # of a class below it, too
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        get_error_handler().record_exception(error)
        return 1
    return 0


def _first(failures: dict) -> tuple:
    """Returns the rank and failure that the others follow from: one that was killed, else the earliest noted.

    A killed process notes nothing; SIGTERM is what torchrun ends the others with.
    """

    def killed(failure) -> bool:
        return failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM and not isinstance(failure.message, dict)

    return min(failures.items(), key=lambda item: (not killed(item[1]), item[1].timestamp))


def _report_failure(rank: int, failure) -> int:
    """Says why a rank failed: a UserError's message, its traceback, or a signal."""
    noted = failure.message if isinstance(failure.message, dict) else None
    if noted and noted["message"].startswith("UserError: "):
        raise UserError(noted["message"].removeprefix("UserError: "))
    if noted:
        print(noted.get("extraInfo", {}).get("py_callstack", ""), file=sys.stderr)
    ending = failure.message if failure.exitcode < 0 and not noted else f"status {max(failure.exitcode, 1)}"
    print(f"{prog()}: rank {rank} failed: {ending}", file=sys.stderr)
    return max(failure.exitcode, 1)


def read_start(argv: list[str], command: str, description: str | None) -> tuple[list[str], Path, list[str]]:
    """Returns torchrun's options, the recipe, and the words behind it, of `tune run` and what starts recipes like it.

    Raises:
        UserError: There is no recipe, or it has no use for torchrun's options.
    """
    name, *rest = argv or [""]
    options = []  # torchrun's
    if name.startswith("-"):
        parser = torchrun_parser(description or "", command)
        check_dashes(argv, [*parser._option_string_actions, "--config"])
        parsed = parser.parse_args(argv)
        name, rest = parsed.training_script, parsed.training_script_args
        options = argv[: len(argv) - len(rest) - 1]
    if not name:
        raise UserError(f"{command}: which recipe? tune {command} RECIPE --config CONFIG; `tune ls` lists both")
    recipe = find("recipe", name)
    if options and one_process_only(recipe) and not {"-h", "--help"} & set(rest):
        twin = name.replace("_single_device", "_distributed")
        hint = f"use {twin}, or leave" if twin != name else "leave"
        raise UserError(f"{options[0]}: {recipe.stem} runs in one process; {hint} torchrun's options out")
    return options, recipe, rest


def torchrun_parser(description: str = "", command: str = "run") -> argparse.ArgumentParser:
    """Returns the parser of torchrun's options and what stands behind them."""
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.__class__ = Words  # says what is wrong as ours do
    parser.prog = f"{prog()} {command}"
    parser.usage = f"{parser.prog} [torchrun's options] RECIPE --config CONFIG [--config MORE] [key=value | ~key ...]"
    parser.description = description
    ours = {"training_script": "RECIPE", "training_script_args": "--config CONFIG key=value"}
    for action in parser._actions:
        if action.dest in ours:
            action.metavar, action.help = ours[action.dest], "`tune run RECIPE --help` tells about one recipe"
    return parser
