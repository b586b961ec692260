"""A model's folder in the place of a config: `tune validate FOLDER`, `tune plan FOLDER`. The defaults are the rest."""

from collections.abc import Callable
from pathlib import Path

from pairtune.cli.find import SUFFIXES, names
from pairtune.cli.recipe import read_recipe
from pairtune.errors import UserError

METHODS = ("full", "lora", "qlora")


def folder_of(config: str) -> Path | None:
    """Returns the folder that a command's CONFIG is, None where it is a config's name or file."""
    folder = Path(config).expanduser()
    if not folder.is_dir():
        return None
    is_file = any(Path(f"{config}{suffix}").expanduser().is_file() for suffix in SUFFIXES["config"])
    return None if is_file or config.removeprefix("configs/") in names("config") else folder


def overrides_of(folder: Path) -> list[str]:
    """Returns what says on a command line that this is the model."""
    return [f"checkpointer.checkpoint_dir={folder}"]


def without_pairs(name: str) -> tuple[str, dict]:
    """Returns a recipe's METHOD and DEFAULTS, by which a run without pairs is no mistake.

    Raises:
        UserError: As read_recipe.
    """
    method, defaults = read_recipe(name)
    if isinstance(defaults.get("dataset"), dict):
        defaults = defaults | {"dataset": defaults["dataset"] | {"source": None}}
    return method, defaults


def plan_all(folder: Path, plan_of: Callable, *, gpus: int | None) -> tuple[str, bool]:
    """Returns a line for each method, and whether one of them fits or nobody knows.

    Args:
        plan_of: Returns a recipe's plan by its name.
        gpus: None: those that are visible, or one.

    Raises:
        UserError: What every method is refused for.
    """
    place = "distributed" if (gpus or 1) > 1 else "single_device"
    plans, errors = {}, {}
    for recipe in (f"{method}_dpo_{place}" for method in METHODS):
        try:
            plans[recipe] = plan_of(recipe)
        except UserError as error:
            errors[recipe] = error
    if not plans:
        raise next(iter(errors.values()))
    first = next(iter(plans.values()))
    lines = [
        f"{folder}: {first.num_parameters:,} parameters, {first.model}, on {first.devices()}",
        f"Assumed: the recipes' defaults, such as pairs of {first.max_tokens:,} tokens, {first.pairs_per_step} a step; "
        "key=value sets others",
        "",
    ]
    for recipe in (*plans, *errors):
        if recipe in errors:
            lines.append(f"  {recipe:<26}refused: {errors[recipe]}")
            continue
        fits = plans[recipe].fits
        verdict = "" if fits is None else "fits" if fits else "does not fit"
        lines.append(f"  {recipe:<26}{plans[recipe].size():>12} a device   {verdict}".rstrip())
    lines += ["", f"`tune plan {folder} --recipe RECIPE` tells what it consists of, and what makes it fit."]
    return "\n".join(lines), any(plan.fits is not False for plan in plans.values())
