"""`tune`: starts recipes by path, in one process or several, and does what torchtune's own `tune` does.

    tune run recipes/lora_dpo_single_device --config configs/reviewer2.yaml lora.rank=4

torch and torchtune are imported only by the commands that need them, so that `tune ls` and `--help` answer at once.
What a recipe's config may hold is checked in pairtune.config, by the recipe itself.
"""

import argparse
import ast
import difflib
import functools
import importlib.util
import logging
import os
import re
import runpy
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

from pairtune.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]
HOME = PACKAGE if (PACKAGE / "recipes").is_dir() else PACKAGE.parent  # in a wheel recipes travel inside the package
TORCHTUNE = Path(importlib.util.find_spec("torchtune").origin).resolve().parent  # found, not imported
SUFFIXES = {"recipe": (".py",), "config": (".yaml", ".yml")}
LAID_ON_TOP = "a further config, such as a published run's, whose keys win; may be given again"


# Commands: each takes the words after its name and returns the exit status. The docstring is its help.


def run(argv: list[str]) -> int:
    """Run a recipe (ours, torchtune's, or a file) with a config and key=value overrides.

    A *_distributed recipe gets one process for each visible GPU. torchrun's options stand before RECIPE.
    """
    name, *rest = argv or [""]
    options = []  # torchrun's
    if name.startswith("-"):
        parsed = _torchrun_parser().parse_args(argv)
        name, rest = parsed.training_script, parsed.training_script_args
        options = argv[: len(argv) - len(rest) - 1]
    if not name:
        raise UserError("run: which recipe? tune run RECIPE --config CONFIG; `tune ls` lists both")
    recipe = find("recipe", name)
    if {"-h", "--help"} & set(rest):
        return _show_recipe(recipe)
    if options and _one_process_only(recipe):
        twin = name.replace("_single_device", "_distributed")
        hint = f"use {twin}, or leave" if twin != name else "leave"
        raise UserError(f"{options[0]}: {recipe.stem} runs in one process; {hint} torchrun's options out")
    args = _recipe_argv(recipe, rest)
    spreads = recipe.stem.endswith("_distributed") and not _is_torchtunes(recipe)
    if options or (spreads and "LOCAL_RANK" not in os.environ):  # LOCAL_RANK: a torchrun of the user's started us
        return _launch(options, recipe, args)
    _execute(recipe, args)
    return 0


def ls(argv: list[str]) -> int:
    """List recipes and configs: ours, then torchtune's."""
    _parser(ls).parse_args(argv)
    lines = []
    for title, kind in (("PAIRTUNE RECIPE", "recipe"), ("PAIRTUNE CONFIG (each serves every recipe above)", "config")):
        lines += [title, *(f"{name:<40} {_first_line(path)}" for name, path in own(kind).items()), ""]
    lines.append(f"{'TORCHTUNE RECIPE':<40} CONFIG")
    for recipe in _torchtune_registry():
        name = f"torchtune/{recipe.name}" if recipe.name in own("recipe") else recipe.name
        for config in [c.name for c in recipe.configs if c.name in torchtunes("config")] or [""]:
            lines.append(f"{name:<40} {config}".rstrip())
            name = ""
    print("\n".join(lines))
    return 0


def cp(argv: list[str]) -> int:
    """Copy a recipe or a config, to edit it; a recipe's copy runs from any folder."""
    parser = _parser(cp)
    parser.add_argument("name", metavar="NAME", help="a recipe or config of `tune ls`")
    parser.add_argument("destination", metavar="DEST", help="a file or a folder; a missing suffix is added")
    parser.add_argument("-n", "--no-clobber", action="store_true", help="keep a file that exists")
    parser.add_argument("--make-parents", action="store_true", help="make DEST's folder where it is missing")
    args = parser.parse_args(argv)
    source = find("recipe or config", args.name, files=False)
    target = Path(args.destination).expanduser()
    if target.is_dir() or args.destination.endswith(os.sep):
        target /= source.name
    elif target.suffix not in SUFFIXES["recipe" if source.suffix == ".py" else "config"]:
        target = target.with_name(target.name + source.suffix)
    existed = target.exists()
    if existed and args.no_clobber:
        print(f"Kept {target}, which exists")
        return 0
    if args.make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; --make-parents makes it")
    try:
        shutil.copyfile(source, target)
    except OSError as error:  # a folder that is read-only, a target that is the source
        raise UserError(f"{target}: cannot be written: {error}") from None
    print(f"{'Replaced' if existed else 'Copied to'} {target}")
    return 0


def cat(argv: list[str]) -> int:
    """Print a config or a recipe as it is, comments included."""
    parser = _parser(cat)
    parser.add_argument("name", metavar="NAME", help="a name of `tune ls`, or a file")
    parser.add_argument("--sort", action="store_true", help="print a config's keys in order, without its comments")
    args = parser.parse_args(argv)
    path = find("config or recipe", args.name)
    if args.sort and path.suffix == ".py":
        raise UserError(f"--sort: orders the keys of a config; {path.name} is a recipe")
    print(yaml.safe_dump(_load_yaml(path), allow_unicode=True) if args.sort else path.read_text(), end="")
    return 0


def validate(argv: list[str]) -> int:
    """Check a config with its model's files and its pairs, for every recipe of ours or the one named.

    Loads no weights. What is not on this machine is not checked, and named. Status 1 if anything is refused.
    """
    parser = _parser(validate)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--config", dest="more", action="append", default=[], metavar="FILE", help=LAID_ON_TOP)
    parser.add_argument("--recipe", help="check for this one only")
    parser.add_argument("--all", action="store_true", help="tokenize all rows; default: the first 100")
    parser.add_argument("--torchtune", action="store_true", help="the config is for a recipe of torchtune's")
    args = parser.parse_intermixed_args(argv)
    paths = [find("config", config) for config in (args.config, *args.more)]
    if args.torchtune or (_is_torchtunes(paths[0]) and not args.recipe):
        if args.more:
            raise UserError(f"--config {args.more[0]}: a recipe of torchtune's takes one config")
        return _validate_torchtunes(paths[0], args.overrides)
    recipes = {name: _read_recipe(name) for name in ([args.recipe] if args.recipe else own("recipe"))}
    from pairtune.cli.validate import Validation, alike, table

    may_be_absent = all(path in own("config").values() for path in paths)  # ours name files that not every machine has
    validation = Validation(paths, args.overrides, None if args.all else 100, may_be_absent)
    answers = {name: validation.check(*recipe) for name, recipe in recipes.items()}
    for names in alike(answers):
        print(table(names, answers[names[0]]))
    return 1 if any(answer.refused for found in answers.values() for answer in found.values()) else 0


def plan(argv: list[str]) -> int:
    """Tell what a run takes: memory, steps, disk; and whether it fits. Loads nothing. Status 1 if it does not fit.

    Without --recipe: lora_dpo_distributed on several GPUs, else lora_dpo_single_device.
    """
    parser = _parser(plan)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--config", dest="more", action="append", default=[], metavar="FILE", help=LAID_ON_TOP)
    parser.add_argument("--recipe", help="a name of `tune ls`, or a file")
    parser.add_argument("--gpus", type=int, metavar="N", help="default: those that are visible, or one")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each; default: that of the visible ones")
    args = parser.parse_intermixed_args(argv)
    for option, value in (("--gpus", args.gpus), ("--gpu-memory", args.gpu_memory)):
        if value is not None and value <= 0:
            raise UserError(f"{option} {value}: must be above 0")
    from pairtune.cli import plan as plans

    recipe = args.recipe or f"lora_dpo_{'distributed' if (args.gpus or 1) > 1 else 'single_device'}"
    run = plans.Run(recipe, tuple(find("config", c) for c in (args.config, *args.more)), tuple(args.overrides))
    run = plans.on_devices(run, _read_recipe, gpus=args.gpus, gpu_memory=args.gpu_memory)
    planned = plans.plan(run, _read_recipe)
    print(planned)
    if planned.fits is not False:
        return 0
    print(plans.advice(plans.smallest_change(run, _read_recipe)))
    return 1


def download(argv: list[str]) -> int:
    """Fetch a model or a data set from the Hugging Face Hub, or a model from Kaggle, and say how to train it.

    The same command again goes on where it stopped, and fetches anew what is not the repository's. Another revision
    takes the place of the first; files that this command did not fetch stay.
    """
    parser = _parser(download)
    parser.add_argument("repo_id", metavar="REPO_ID", help="owner/name, or a Kaggle model handle")
    parser.add_argument("--repo-type", choices=["model", "dataset"], default="model")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="default: /tmp/NAME")
    parser.add_argument("--revision", help="a branch, tag or commit; default: main")
    endpoint_help = (
        "a mirror that speaks the Hub's protocol (it gets your token, too); default: HF_ENDPOINT, else the Hub"
    )
    parser.add_argument("--endpoint", metavar="URL", help=endpoint_help)
    parser.add_argument("--hf-token", metavar="TOKEN", help="for gated models; default: HF_TOKEN, else `hf auth login`")
    ignore_help = "leave out just these files (no pattern: none); default: what DPO does not read"
    parser.add_argument("--ignore-patterns", nargs="*", action="extend", metavar="PATTERN", help=ignore_help)
    parser.add_argument("--dry-run", action="store_true", help="say what would be fetched, and fetch nothing")
    parser.add_argument("--source", choices=["huggingface", "kaggle"], default="huggingface")
    parser.add_argument("--kaggle-username", metavar="NAME")
    parser.add_argument("--kaggle-api-key", metavar="KEY")
    args = parser.parse_args(argv)
    if args.source == "kaggle":
        return _download_from_kaggle(args)
    from pairtune.hub.choice import rules
    from pairtune.hub.download import fetch, fetch_json
    from pairtune.hub.http import Source, Unreachable
    from pairtune.hub.plan import plan_download

    folder = args.output_dir or Path("/tmp") / args.repo_id.rpartition("/")[2]
    source = Source(args.repo_id, args.repo_type, args.revision, args.endpoint, args.hf_token)
    try:
        planned = plan_download(source, folder, ignore_patterns=args.ignore_patterns)
    except Unreachable:
        if args.dry_run:  # what follows from the id alone
            print(f"{source}, to {folder.expanduser().absolute()}; its files are not known")
            if args.repo_type == "model" and args.ignore_patterns is None:
                print(f"Left out: {rules()}")
            print(_next_command(source, folder.expanduser().absolute(), lambda name: None))
        raise
    print(planned)
    if not args.dry_run:
        fetch(planned)
        print(f"{planned.folder} is complete, every file as the repository states it")
    print(_next_command(source, planned.folder, lambda name: fetch_json(planned, name)))
    return 0


def cache(argv: list[str]) -> int:
    """List or remove what references said of pairs: tune cache ls; tune cache rm KEY, or --all.

    Runs with the same reference weights and pairs share it; what is removed is computed again when it is needed.
    """
    parser = _parser(cache)
    parser.add_argument("action", choices=["ls", "rm"])
    parser.add_argument("keys", metavar="KEY", nargs="*", help="for rm: as ls shows them")
    parser.add_argument("--all", action="store_true", help="for rm: every entry")
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="default: ~/.cache/pairtune/reference")
    args = parser.parse_args(argv)
    if args.action == "ls" and (args.keys or args.all):
        raise UserError("cache ls: takes no key and no --all; it lists every entry")
    if args.action == "rm" and bool(args.keys) == args.all:
        raise UserError("cache rm: takes keys, or --all; `tune cache ls` lists them")
    from pairtune.reference import cache as reference_cache

    folder = reference_cache.find_folder(args.cache_dir)
    if args.action == "ls":
        print(reference_cache.table(folder))
    else:
        print("\n".join(f"Removed {key}" for key in reference_cache.remove(folder, args.keys)))
    return 0


COMMANDS = {command.__name__: command for command in (download, ls, cp, cat, validate, plan, run, cache)}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of one command line; a mistake in it is one line on stderr and status 2."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    quiet_torchao()
    try:
        if name in ("-h", "--help"):
            print(f"usage: {_prog()} COMMAND ...  (COMMAND --help tells more)\n")
            for command in COMMANDS.values():
                print(f"  {command.__name__:<10} {command.__doc__.splitlines()[0]}")
            print(f"  {'--version':<10} Print the versions of pairtune, torchtune and torch.")
            return 0
        if name == "--version":
            print(", ".join(f"{package} {version(package)}" for package in ("pairtune", "torchtune", "torch")))
            return 0
        if name == "worker":  # what _launch starts; not for people
            return _worker(Path(rest[0]), rest[1:])
        if name not in COMMANDS:
            raise UserError(f"{name}: no such command{_nearest(name, COMMANDS)}; known: {', '.join(COMMANDS)}")
        return COMMANDS[name](rest)
    except UserError as error:
        print(f"{_prog()}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{_prog()}: interrupted", file=sys.stderr)
        return 130


def quiet_torchao() -> None:
    """Drops the line that torchao logs when its C++ kernels were built for another torch; nothing here uses them."""
    line = "Skipping import of cpp extensions due to incompatible torch version"
    logging.getLogger("torchao").addFilter(lambda record: not record.getMessage().startswith(line))


# Finding recipes and configs


def find(kinds: str, name: str, *, files: bool = True) -> Path:
    """Returns the absolute path of a "recipe", a "config", or whichever of "recipe or config" comes first.

    A file, or else a name of ours, or else of torchtune's. The suffix may be left out, as may `recipes/` and
    `configs/`; `torchtune/NAME` means torchtune's also where ours has the name. Raises UserError with the nearest.
    """
    for kind in kinds.split(" or "):
        suffix = next((s for s in SUFFIXES[kind] if name.endswith(s)), "")
        candidates = [name] if suffix else [name + s for s in SUFFIXES[kind]]
        for path in map(Path, candidates if files else []):
            if path.expanduser().is_file():
                return path.expanduser().absolute()
        stem = name.removesuffix(suffix).removeprefix(f"{kind}s/")
        if stem in _names(kind):
            return _names(kind)[stem]
    nearest = _nearest(stem, [known for kind in kinds.split(" or ") for known in _names(kind)])
    raise UserError(f"{name}: no such {kinds}{nearest}; `tune ls` lists them")


@functools.cache
def own(kind: str) -> dict[str, Path]:
    """Returns our recipes or configs, name to path, sorted."""
    return {path.stem: path for path in sorted((HOME / f"{kind}s").glob(f"[!_]*{SUFFIXES[kind][0]}"))}


@functools.cache
def torchtunes(kind: str) -> dict[str, Path]:
    """Returns torchtune's recipes or configs, name to path."""
    folder = TORCHTUNE.parent / "recipes"
    entries = _torchtune_registry()
    if kind == "config":
        folder, entries = folder / "configs", [config for recipe in entries for config in recipe.configs]
    found = {entry.name: folder / entry.file_path for entry in entries}
    return {name: path for name, path in found.items() if path.is_file()}  # one config is registered and not shipped


@functools.cache
def _names(kind: str) -> dict[str, Path]:
    theirs = torchtunes(kind)
    return {f"torchtune/{name}": path for name, path in theirs.items()} | theirs | own(kind)


@functools.cache
def _torchtune_registry() -> list:
    # By path: importing it as a module would import torchtune, and with it torch (4 s).
    return runpy.run_path(str(TORCHTUNE / "_recipe_registry.py"))["_ALL_RECIPES"]


def _is_torchtunes(path: Path) -> bool:
    return path.resolve().is_relative_to(TORCHTUNE.parent / "recipes")


def _one_process_only(recipe: Path) -> bool:
    single = [torchtunes("recipe")[r.name] for r in _torchtune_registry() if not r.supports_distributed]
    return recipe.stem.endswith("_single_device") or recipe.resolve() in single


# Starting a recipe


def _recipe_argv(recipe: Path, words: list[str]) -> list[str]:
    """Returns the recipe's own command line: what follows RECIPE, with every config as an absolute path."""
    configs, overrides, rest = [], [], iter(words)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            configs.append(word.partition("=")[2] or next(rest, ""))
        elif word.startswith("-"):
            raise UserError(
                f"{word}: after RECIPE the only option is --config; a key is set without dashes, as key=value, "
                "and torchrun's options stand before RECIPE"
            )
        elif word.startswith("~") or "=" in word:
            overrides.append(word)
        else:
            raise UserError(f"{word}: neither key=value nor ~key; a config is given as --config {word}")
    if not configs or "" in configs:
        known = "`tune ls` lists them" if _is_torchtunes(recipe) else f"known: {', '.join(own('config'))}"
        raise UserError(f"{recipe.stem}: --config CONFIG must say which weights and data; {known}; or a YAML of yours")
    if _is_torchtunes(recipe) and len(configs) > 1:
        raise UserError(f"--config {configs[1]}: a recipe of torchtune's takes one config")
    paths = [find("config", config) for config in configs]
    not_for_dpo = [path for path in paths if _is_torchtunes(path) and "dpo" not in path.stem]
    if recipe in own("recipe").values() and not_for_dpo:
        theirs = f"torchtune/{recipe.stem}"
        hint = f", such as {theirs}" if theirs in _names("recipe") else ""
        raise UserError(f"--config {configs[0]}: is for torchtune recipes{hint}; for ours: {', '.join(own('config'))}")
    return [word for path in paths for word in ("--config", str(path))] + overrides


def _execute(recipe: Path, args: list[str]) -> None:
    """Runs the recipe's file in this process, as `python FILE ARGS` would."""
    sys.argv = [str(recipe), *args]
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # for a `_component_` in the user's folder; last, so that it shadows no package
    runpy.run_path(str(recipe), run_name="__main__")


def _launch(options: list[str], recipe: Path, args: list[str]) -> int:
    """Runs the recipe under torchrun and returns the exit status."""
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import determine_local_world_size
    from torch.distributed.run import run as torchrun

    parser = _torchrun_parser()
    processes = 1 if _is_torchtunes(recipe) else max(1, torch.cuda.device_count())
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
    try:
        # Shared out: torchrun would give each process one thread, and say so in five lines.
        threads = torch.get_num_threads() // determine_local_world_size(parsed.nproc_per_node)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, threads)))
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


def _worker(recipe: Path, args: list[str]) -> int:
    """One process of a distributed run. What ends it goes to the launcher, which prints the first rank's, once.

    When one rank fails, the others fail too, at the next thing they want of it: their tracebacks are noise.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    # Until processes are connected, a Ctrl-C has to end one that waits for the others in C, where Python hears nothing.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        _execute(recipe, args)
    except UserError as error:
        get_error_handler().record_exception(error)
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
    print(f"{_prog()}: rank {rank} failed: {ending}", file=sys.stderr)
    return max(failure.exitcode, 1)


def _torchrun_parser() -> argparse.ArgumentParser:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = f"{_prog()} run"
    parser.usage = f"{parser.prog} [torchrun's options] RECIPE --config CONFIG [--config MORE] [key=value | ~key ...]"
    parser.description = run.__doc__
    ours = {"training_script": "RECIPE", "training_script_args": "--config CONFIG key=value"}
    for action in parser._actions:
        if action.dest in ours:
            action.metavar, action.help = ours[action.dest], "`tune run RECIPE --help` tells about one recipe"
    return parser


# Words


def _parser(command) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=f"{_prog()} {command.__name__}", description=command.__doc__)


def _prog() -> str:
    stem = Path(sys.argv[0]).stem
    return stem if stem in ("tune", "pairtune") else "tune"


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    return f"; nearest: {', '.join(close)}" if close else ""


def _first_line(path: Path) -> str:
    """A recipe's docstring, or a config's first comment, to its line's end."""
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    return text.partition("\n")[0].lstrip("# ")


def _read_recipe(name: str) -> tuple[str, dict]:
    """Returns a recipe's METHOD and DEFAULTS without running it."""
    names = runpy.run_path(str(find("recipe", name)), run_name="pairtune_recipe")  # a recipe runs only as __main__
    if not {"METHOD", "DEFAULTS"} <= set(names):
        raise UserError(f"{name}: sets no METHOD and DEFAULTS")
    return names["METHOD"], names["DEFAULTS"]


def _show_recipe(recipe: Path) -> int:
    """Prints a recipe's docstring and its DEFAULTS with their comments, without running it."""
    text = recipe.read_text()
    tree = ast.parse(text)
    shown = [ast.get_docstring(tree) or f"{recipe}: has no docstring"]
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "DEFAULTS":
            shown += ["", "Every key, to be set in a config or as key=value:", ast.get_source_segment(text, node)]
    print("\n".join(shown))
    return 0


def _load_yaml(path: Path):
    try:
        return yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from None


def _validate_torchtunes(path: Path, overrides: list[str]) -> int:
    from omegaconf import OmegaConf
    from torchtune.config import validate as check
    from torchtune.config._errors import ConfigError

    try:
        check(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(overrides)))
    except ConfigError as error:
        print(f"{path.name}: {error}")
        return 1
    print(f"{path.name}: ok")
    return 0


def _download_from_kaggle(args: argparse.Namespace) -> int:
    if args.revision:
        raise UserError("--revision: on Kaggle the handle ends with the version: owner/model/framework/variation/1")
    hubs = {"--endpoint": args.endpoint, "--dry-run": args.dry_run, "--repo-type": args.repo_type != "model"}
    if given := [option for option, value in hubs.items() if value]:
        raise UserError(f"{given[0]}: has no effect on --source kaggle; leave it out")
    from torchtune._cli.download import Download

    Download(argparse.ArgumentParser(prog=_prog()).add_subparsers())._download_cmd(args)
    return 0


def _next_command(source, folder: Path, read: Callable[[str], dict | None]) -> str:
    """Returns the command that trains what a Source brought to `folder`, in words that begin with what it is.

    The one in the comments of the config that downloads this id, else that of the config whose model config.json is
    nearest to; for an adapter, that of its base model. `read` returns a JSON file of the repository, None if it lacks
    it.
    """
    recipe = next((f"recipes/{name}" for name in own("recipe") if re.match("lora.*single", name)), "RECIPE")
    unnamed = [recipe, "--config", "CONFIG"]
    if source.repo_type == "dataset":
        return f"Train on it:\n{_tune_run(unnamed, [f'dataset.source={folder}'])}"
    home, examples = [f"checkpointer.checkpoint_dir={folder}"], _examples()
    if known := _example_of(source.repo_id, examples):
        return f"Train it:\n{_tune_run(known, home)}"
    config = read("config.json")
    if config is None and (adapter := read("adapter_config.json")) is not None:
        return _adapter_command(adapter, folder, examples, unnamed)
    unknown = f"Train it, with a CONFIG of yours (none here names it):\n{_tune_run(unnamed, home)}"
    if config is None:
        return unknown
    from pairtune.hub import fitting

    try:
        fit = fitting.nearest(config, {name: own("config")[name] for name in examples})
    except UserError as error:
        return f"{unknown}\nNo config here fits: {error}"
    line = _tune_run(examples[fit.config].run, home)
    if not fit.different:
        return f"Train it, with a config of its architecture and sizes:\n{line}"
    changed = " \\\n    ".join([line, *fit.overrides])
    return f"Train it, with the nearest config and what it needs set ({'; '.join(fit.different)}):\n{changed}"


def _adapter_command(adapter: dict, folder: Path, examples: dict[str, "Example"], unnamed: list[str]) -> str:
    """The same for an adapter, from its adapter_config.json: its base model's recipe, if that trains adapters."""
    base = str(adapter.get("base_model_name_or_path") or "a model that it does not name")
    known = _example_of(base, examples)
    recipe, *rest = known or unnamed
    theirs = {"rank": "r", "alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}
    shape = {f"lora.{ours}": adapter.get(name) for ours, name in theirs.items()}
    numbers = [f"{key}={str(n).lower()}" for key, n in shape.items() if n and isinstance(n, (bool, int, float))]
    line = _tune_run([recipe.replace("/full_", "/lora_"), *rest], [f"adapter={folder}", "reference=start", *numbers])
    whose = f"`tune download {shlex.quote(base)}` fetches it" if known else "which CONFIG, of yours, must be for"
    return f"Train on from this adapter of {base} ({whose}):\n{line}"


@dataclass(frozen=True)
class Example:
    """What a config's comments show: the ids that they download, and the words after `tune run`."""

    ids: list[str]
    run: list[str]


def _examples() -> dict[str, Example]:
    """Returns each config's example, for configs that download something."""
    download_line = re.compile(r"^#.*\btune download ([\w.-]+/[\w.-]*\w)", re.MULTILINE)
    run_lines = re.compile(r"^#\s+tune run ((?:.*\\\n#)*.*)$", re.MULTILINE)
    found = {}
    for name, path in own("config").items():
        text = path.read_text()
        if ids := download_line.findall(text):
            found[name] = Example(ids, shlex.split(run_lines.search(text)[1].replace("\\\n#", " ")))
    return found


def _example_of(repo_id: str, examples: dict[str, Example]) -> list[str] | None:
    """Returns the words after `tune run` for an id, None where no config downloads it."""
    return next((e.run for e in examples.values() if repo_id.lower() in map(str.lower, e.ids)), None)


def _tune_run(words: list[str], changes: list[str]) -> str:
    """Returns a line of `tune run` with `changes` in the place of what `words` says of the same keys."""
    changed = {word.partition("=")[0] for word in changes}
    return f"  tune run {shlex.join([*(w for w in words if w.partition('=')[0] not in changed), *changes])}"
