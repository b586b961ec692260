"""`tune`: starts recipes by path, in one process or several, and does what torchtune's own `tune` does.

    tune run recipes/lora_dpo_single_device --config configs/reviewer2.yaml lora.rank=4

torch and torchtune are imported only by commands that need them, and when what they were told is right as far as can be
told without: check.py.
"""

import argparse
import os
import signal
import sys
from importlib.metadata import version
from pathlib import Path

import yaml

from pairtune.cli.after import evaluate, pairs, plot, report
from pairtune.cli.ask import chat, compare, generate
from pairtune.cli.copies import cp, diff, update
from pairtune.cli.data import data
from pairtune.cli.find import (
    find,
    first_line,
    is_torchtunes,
    own,
    torchtune_registry,
    torchtunes,
)
from pairtune.cli.iterate import iterate
from pairtune.cli.push import push
from pairtune.cli.sweep import sweep
from pairtune.cli.words import parser_of, prog
from pairtune.errors import UserError, nearest
from pairtune.process import console, torchao_names

LAID_ON_TOP = "a further config, such as a published run's, whose keys win; may be given again"


# Commands: each takes the words after its name and returns the exit status. The docstring is its help.


def run(argv: list[str]) -> int:
    """Run a recipe (ours, torchtune's, or a file) with a config and key=value overrides.

    A *_distributed recipe gets one process for each visible GPU. torchrun's options stand before RECIPE.
    """
    from pairtune.cli.check import check_run, read_words
    from pairtune.cli.launch import execute, launch, read_start

    options, recipe, rest = read_start(argv, "run", run.__doc__)
    if {"-h", "--help"} & set(rest):
        from pairtune.cli.recipe_help import recipe_help

        print(recipe_help(recipe))
        return 0
    configs, overrides = read_words(recipe, rest)
    check_run(recipe, configs, overrides)
    args = [word for path in configs for word in ("--config", str(path))] + overrides
    spreads = recipe.stem.endswith("_distributed") and not is_torchtunes(recipe)
    if options or (spreads and "LOCAL_RANK" not in os.environ):  # LOCAL_RANK: a torchrun of the user's started us
        return launch(options, recipe, args)
    execute(recipe, args)
    return 0


def ls(argv: list[str]) -> int:
    """List recipes and configs: ours, then torchtune's."""
    parser_of(ls).parse_args(argv)
    lines = []
    for title, kind in (("PAIRTUNE RECIPE", "recipe"), ("PAIRTUNE CONFIG (each serves every recipe above)", "config")):
        lines += [title, *(f"{name:<40} {first_line(path)}" for name, path in own(kind).items()), ""]
    lines.append(f"{'TORCHTUNE RECIPE':<40} CONFIG")
    for recipe in torchtune_registry():
        name = f"torchtune/{recipe.name}" if recipe.name in own("recipe") else recipe.name
        for config in [c.name for c in recipe.configs if c.name in torchtunes("config")] or [""]:
            lines.append(f"{name:<40} {config}".rstrip())
            name = ""
    print("\n".join(lines))
    return 0


def cat(argv: list[str]) -> int:
    """Print a config or a recipe as it is, comments included."""
    parser = parser_of(cat)
    parser.add_argument("name", metavar="NAME", help="a name of `tune ls`, or a file")
    parser.add_argument("--sort", action="store_true", help="print a config's keys in order, without its comments")
    args = parser.parse_args(argv)
    path = find("config or recipe", args.name)
    if args.sort and path.suffix == ".py":
        raise UserError(f"--sort: orders the keys of a config; {path.name} is a recipe")
    print(yaml.safe_dump(load_yaml(path), allow_unicode=True) if args.sort else path.read_text(), end="")
    return 0


def validate(argv: list[str]) -> int:
    """Check a config with its model's files and its pairs, or a model's folder alone, for every recipe or one.

    Loads no weights. What is not on this machine is not checked, and named. Status 1 if anything is refused.
    """
    parser = parser_of(validate)
    parser.add_argument("config", metavar="CONFIG", help="a config, or a model's folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--config", dest="more", action="append", default=[], metavar="FILE", help=LAID_ON_TOP)
    parser.add_argument("--recipe", help="check for this one only")
    parser.add_argument(
        "--all", action="store_true", help="tokenize all rows; default: the first 100, and of a large file 100 more"
    )
    parser.add_argument("--torchtune", action="store_true", help="the config is for a recipe of torchtune's")
    args = parser.parse_intermixed_args(argv)
    from pairtune.cli import alone

    folder = alone.folder_of(args.config)
    paths = [find("config", config) for config in (*([] if folder else [args.config]), *args.more)]
    if not folder and (args.torchtune or (is_torchtunes(paths[0]) and not args.recipe)):
        if args.more:
            raise UserError(f"--config {args.more[0]}: a recipe of torchtune's takes one config")
        return _validate_torchtunes(paths[0], args.overrides)
    from pairtune.cli.recipe import read_recipe

    read = alone.without_pairs if folder else read_recipe
    recipes = {name: read(name) for name in ([args.recipe] if args.recipe else own("recipe"))}
    from pairtune.cli.validate import Validation, alike, table

    # Ours name files that not every machine has
    may_be_absent = not folder and all(path in own("config").values() for path in paths)
    overrides = (alone.overrides_of(folder) if folder else []) + args.overrides
    validation = Validation(paths, overrides, None if args.all else 100, may_be_absent)
    answers = {name: validation.check(*recipe) for name, recipe in recipes.items()}
    for names in alike(answers):
        print(table(names, answers[names[0]]))
    return 1 if any(answer.refused for found in answers.values() for answer in found.values()) else 0


def plan(argv: list[str]) -> int:
    """Tell what a run takes: memory, steps, disk; and whether it fits. Loads nothing. Status 1 if it does not fit.

    Without --recipe: lora_dpo_distributed on several GPUs, else lora_dpo_single_device; of a model's folder in the
    place of a config, every method's, a line each.
    """
    parser = parser_of(plan)
    parser.add_argument("config", metavar="CONFIG", help="a config, or a model's folder")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument("--config", dest="more", action="append", default=[], metavar="FILE", help=LAID_ON_TOP)
    parser.add_argument("--recipe", help="a name of `tune ls`, or a file")
    parser.add_argument("--gpus", type=int, metavar="N", help="default: those that are visible, or one")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="of each; default: that of the visible ones")
    args = parser.parse_intermixed_args(argv)
    for option, value in (("--gpus", args.gpus), ("--gpu-memory", args.gpu_memory)):
        if value is not None and value <= 0:
            raise UserError(f"{option} {value}: must be above 0")
    from pairtune import config
    from pairtune.cli import alone
    from pairtune.cli.recipe import read_recipe

    recipe = args.recipe or f"lora_dpo_{'distributed' if (args.gpus or 1) > 1 else 'single_device'}"
    folder = alone.folder_of(args.config)
    read = alone.without_pairs if folder else read_recipe
    paths = [find("config", path) for path in (*([] if folder else [args.config]), *args.more)]
    overrides = (alone.overrides_of(folder) if folder else []) + args.overrides
    config.check(*read(recipe), paths, overrides)
    from pairtune.cli import plan as plans  # and torch

    def run_of(recipe: str):
        run = plans.Run(recipe, tuple(paths), tuple(overrides))
        return plans.on_devices(run, read, gpus=args.gpus, gpu_memory=args.gpu_memory)

    if folder and not args.recipe:
        text, fits = alone.plan_all(folder, lambda name: plans.plan(run_of(name), read), gpus=args.gpus)
        print(text)
        return 0 if fits else 1
    run = run_of(recipe)
    planned = plans.plan(run, read)
    for note in config.notes(*read(recipe), paths, overrides):
        print(f"config: {note}")
    print(planned)
    if planned.fits is not False:
        return 0
    print(plans.advice(plans.smallest_change(run, read)))
    return 1


def download(argv: list[str]) -> int:
    """Fetch a model or a data set from the Hugging Face Hub, or a model from Kaggle, and say how to train it.

    The same command again goes on where it stopped, and fetches anew what is not the repository's. Another revision
    takes the place of the first; files that this command did not fetch stay.
    """
    parser = parser_of(download)
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
    from pairtune.cli.next_command import next_command
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
            print(next_command(source, folder.expanduser().absolute(), lambda name: None))
        raise
    print(planned)
    if not args.dry_run:
        fetch(planned)
        print(f"{planned.folder} is complete, every file as the repository states it")
    print(next_command(source, planned.folder, lambda name: fetch_json(planned, name)))
    return 0


def cache(argv: list[str]) -> int:
    """List or remove what runs keep for others: tune cache ls; tune cache rm KEY, or --all.

    Tokens of rows, and what references said of pairs. What is removed is computed again when it is needed.
    """
    parser = parser_of(cache)
    parser.add_argument("action", choices=["ls", "rm"])
    parser.add_argument("keys", metavar="KEY", nargs="*", help="for rm: as ls shows them")
    parser.add_argument("--all", action="store_true", help="for rm: every entry")
    where = "of both; default: reference and tokens in ~/.cache/pairtune"
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help=where)
    args = parser.parse_args(argv)
    if args.action == "ls" and (args.keys or args.all):
        raise UserError("cache ls: takes no key and no --all; it lists every entry")
    if args.action == "rm" and bool(args.keys) == args.all:
        raise UserError("cache rm: takes keys, or --all; `tune cache ls` lists them")
    from pairtune.pairs import kept
    from pairtune.reference import cache as reference_cache

    for found in (reference_cache, kept):
        folder = found.find_folder(args.cache_dir)
        keys = [key for key in args.keys if key.startswith(kept.PREFIX) == (found is kept)]
        if args.action == "ls":
            print(found.table(folder))
        elif keys or args.all:
            print("\n".join(f"Removed {key}" for key in found.remove(folder, keys)))
    return 0


COMMANDS = {
    command.__name__: command
    for command in (
        *(download, push, ls, cp, cat, diff, update, validate, data, plan, run, sweep, iterate),
        *(plot, pairs, report, generate, chat, compare, cache),
    )
}
COMMANDS["eval"] = evaluate  # a name of Python's own


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of one command line; a mistake in it is one line on stderr and status 2."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    torchao_names.quiet()
    if name in ("run", "worker"):
        console.survive()
    try:
        try:
            return _command(name, rest)
        finally:  # a pipe that is closed shows here, not when Python exits
            if sys.stdout is not None:
                sys.stdout.flush()
    except UserError as error:
        print(f"{prog()}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog()}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `tune ls | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to say at exit
        return 128 + signal.SIGPIPE


def _command(name: str, rest: list[str]) -> int:
    if name in ("-h", "--help"):
        print(f"usage: {prog()} COMMAND ...  (COMMAND --help tells more)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {command.__doc__.splitlines()[0]}")
        print(f"  {'--version':<10} Print the versions of pairtune, torchtune, torchao and torch.")
        return 0
    if name == "--version":
        print(", ".join(f"{package} {version(package)}" for package in ("pairtune", "torchtune", "torchao", "torch")))
        return 0
    if name == "worker":  # what `launch` starts; not for people
        from pairtune.cli.launch import worker

        return worker(Path(rest[0]), rest[1:])
    if name not in COMMANDS:
        raise UserError(f"{name}: no such command{nearest(name, COMMANDS, num=3)}; known: {', '.join(COMMANDS)}")
    return COMMANDS[name](rest)


def load_yaml(path: Path) -> dict:
    from pairtune.config.reading import read_file

    read_file(path)  # for what it refuses
    return yaml.safe_load(path.read_text())


def _validate_torchtunes(path: Path, overrides: list[str]) -> int:
    from omegaconf import OmegaConf
    from torchtune.config import validate as check
    from torchtune.config._errors import ConfigError

    from pairtune.config.reading import read_file

    try:
        check(OmegaConf.merge(OmegaConf.create(read_file(path)), OmegaConf.from_dotlist(overrides)))
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

    Download(argparse.ArgumentParser(prog=prog()).add_subparsers())._download_cmd(args)
    return 0
