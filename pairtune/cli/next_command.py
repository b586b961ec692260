"""What to do with what `tune download` brought: the command that trains it."""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pairtune.cli.find import own
from pairtune.config.auto import choose_for
from pairtune.errors import UserError


def next_command(source, folder: Path, read: Callable[[str], dict | None]) -> str:
    """Returns the command that trains what a Source brought to `folder`, in words that begin with what it is.

    The one in the comments of the config that downloads this id; else one without a config, by which config.json
    decides what is built; for an adapter, that of its base model. `read` returns a JSON file of the repository, None if
    it lacks it.
    """
    recipe = next((f"recipes/{name}" for name in own("recipe") if re.match("lora.*single", name)), "RECIPE")
    if source.repo_type == "dataset":
        line = _tune_run([recipe], ["checkpointer.checkpoint_dir=MODEL", f"dataset.source={folder}"])
        return f"Train on it, MODEL being a folder:\n{line}"
    home, examples = [f"checkpointer.checkpoint_dir={folder}"], _examples()
    if known := _example_of(source.repo_id, examples):
        return f"Train it:\n{_tune_run(known, home)}"
    config = read("config.json")
    if config is None and (adapter := read("adapter_config.json")) is not None:
        return _adapter_command(adapter, folder, examples, recipe)
    line = _tune_run([recipe], [*home, "dataset.source=PAIRS"])
    if config is None:
        return f"Train it:\n{line}"
    try:
        choose_for(config, folder / "config.json")
    except UserError as error:
        return f"It cannot be trained: {error}"
    return f"Train it; what builds it is in its config.json:\n{line}"


def _adapter_command(adapter: dict, folder: Path, examples: dict[str, "Example"], recipe: str) -> str:
    """The same for an adapter, from its adapter_config.json: its base model's recipe, if that trains adapters."""
    named = adapter.get("base_model_name_or_path")
    base = str(named or "a model that it does not name")
    known = _example_of(base, examples)
    recipe, *rest = known or [recipe, "checkpointer.checkpoint_dir=MODEL", "dataset.source=PAIRS"]
    theirs = {"rank": "r", "alpha": "lora_alpha", "use_dora": "use_dora", "use_rslora": "use_rslora"}
    shape = {f"lora.{ours}": adapter.get(name) for ours, name in theirs.items()}
    numbers = [f"{key}={str(n).lower()}" for key, n in shape.items() if n and isinstance(n, (bool, int, float))]
    line = _tune_run([recipe.replace("/full_", "/lora_"), *rest], [f"adapter={folder}", "reference=start", *numbers])
    whose = f"`tune download {shlex.quote(base)}` fetches it" if named else "MODEL is its folder"
    whose += ", to MODEL" if named and not known else ""
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
