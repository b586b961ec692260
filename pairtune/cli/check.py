"""What of a run is checked before it starts, and before torch is imported: its words, its config, places it names."""

from pathlib import Path

from pairtune import config
from pairtune.cli.find import find, is_torchtunes, names, own
from pairtune.cli.recipe import does_as_ours, parses_defaults, top_level
from pairtune.config import keys
from pairtune.config.answers import check_dashes
from pairtune.config.architectures import read_config
from pairtune.config.layout import check_folder, find_adapter, find_weights
from pairtune.config.uses import check_installed, is_bridged
from pairtune.errors import UserError
from pairtune.pairs.mixture import sources_of
from pairtune.pairs.sources import check_source
from pairtune.run.folder import check_free
from pairtune.run.places import CHECKPOINTS, check, is_saved_config, look
from pairtune.tokenizer.files import find_files


def read_words(recipe: Path, words: list[str]) -> tuple[list[Path], list[str]]:
    """Returns what follows RECIPE: its configs and its overrides.

    Raises:
        UserError: A word is neither, or a config is not there, or is for other recipes.
    """
    if parses_defaults(recipe):
        check_dashes(words, ["--config"])
    configs, overrides, rest = [], [], iter(words)
    for word in rest:
        if word == "--config" or word.startswith("--config="):
            configs.append(word.partition("=")[2] or next(rest, ""))
        elif word.startswith("-"):
            raise UserError(
                f"{word}: after RECIPE the only option is --config; a key is set without dashes, as key=value, "
                "and torchrun's options stand before RECIPE"
            )
        elif word.startswith("~") or ("=" in word and word[0] not in "=\u2013\u2014"):
            overrides.append(word)
        elif any(one.startswith("=") for one in words):
            raise UserError(f"{word}: a key is set as key=value, with no blanks around =")
        elif word.startswith(("\u2013", "\u2014")):  # typographic dashes, pasted
            raise UserError(f"{word}: begins with a typographic dash; options have -, as --config; a key is key=value")
        else:
            raise UserError(f"{word}: neither key=value nor ~key; a config is given as --config {word}")
    if "" in configs or not (configs or (overrides and parses_defaults(recipe))):
        known = "`tune ls` lists them" if is_torchtunes(recipe) else f"known: {', '.join(own('config'))}"
        without = "" if is_torchtunes(recipe) else "; or checkpointer.checkpoint_dir=FOLDER dataset.source=PAIRS"
        raise UserError(
            f"{recipe.stem}: --config CONFIG must say which weights and data; {known}; or a YAML of yours{without}"
        )
    if is_torchtunes(recipe) and len(configs) > 1:
        raise UserError(f"--config {configs[1]}: a recipe of torchtune's takes one config")
    paths = [find("config", name) for name in configs]
    not_for_dpo = [path for path in paths if is_torchtunes(path) and "dpo" not in path.stem]
    if recipe in own("recipe").values() and not_for_dpo:
        theirs = f"torchtune/{recipe.stem}"
        hint = f", such as {theirs}" if theirs in names("recipe") else ""
        raise UserError(f"--config {configs[0]}: is for torchtune recipes{hint}; for ours: {', '.join(own('config'))}")
    return paths, overrides


def check_run(recipe: Path, configs: list[Path], overrides: list[str]) -> None:
    """Refuses what the recipe would refuse, as far as that can be told without what it imports.

    A recipe that reads its command line in another way is left alone, and one that does something of its own may do
    without the folders and files that its config names.

    Raises:
        UserError: As config.check, folders.layout and pairs.sources.
    """
    read = top_level(recipe, "METHOD", "DEFAULTS") if parses_defaults(recipe) else {}
    if not {"METHOD", "DEFAULTS"} <= read.keys():
        return
    cfg = config.check(read["METHOD"], read["DEFAULTS"], configs, overrides)
    check_installed(cfg)
    if does_as_ours(recipe):
        _check_run_dir(cfg, configs)
    if does_as_ours(recipe) and {*keys.FILES, "reference", "dataset", "eval_dataset"} <= cfg.keys():
        _check_places(cfg)


def _check_run_dir(cfg: dict, configs: list[Path]) -> None:
    """The run folder may be written, and nothing is lost by it, as far as that is known before checkpoints are read."""
    place = look(Path(cfg["output_dir"]).expanduser())
    check_free(place)
    has_checkpoint = any((place.real / CHECKPOINTS).glob("step_*/COMPLETE"))
    if cfg["resume"] is not False and (has_checkpoint or cfg["resume"] is True):
        return  # what the run goes on from has to be found first
    check(place, continues=False, reads=config.paths(cfg))
    for path in configs:
        if not is_saved_config(path, place):
            check(place, continues=False, reads=[("--config", path)])


def _check_places(cfg: dict) -> None:
    """Folders and files of a model, a tokenizer, an adapter, a reference and pairs are there."""
    checkpointer, tokenizer = cfg["checkpointer"], cfg["tokenizer"]
    if checkpointer["_component_"].endswith("HFCheckpointer") and not checkpointer.get("checkpoint_files"):
        find_weights(checkpointer["checkpoint_dir"])
        if not is_bridged(cfg["model"]):
            read_config(checkpointer["checkpoint_dir"])
    else:
        check_folder(checkpointer["checkpoint_dir"])
    if tokenizer["_component_"].endswith(".hf_tokenizer") and isinstance(tokenizer.get("path"), str):
        find_files(Path(tokenizer["path"]).expanduser())
    if cfg.get("adapter"):
        find_adapter(cfg["adapter"])
    if cfg["reference"].get("checkpoint_dir"):
        find_weights(cfg["reference"]["checkpoint_dir"], key="reference.checkpoint_dir")
        if not is_bridged(cfg["reference"].get("model") or cfg["model"]):
            read_config(cfg["reference"]["checkpoint_dir"], key="reference.checkpoint_dir")
    for key in ("dataset", "eval_dataset"):
        if cfg[key]["source"]:
            for where, block in sources_of(cfg[key], key):
                check_source(block["source"], where)
