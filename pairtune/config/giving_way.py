"""Where a later place contradicts an earlier one, the earlier gives way, and a sentence says so.

A place is a file, a per_method block of it, or the command line. What contradicts itself within one place is left as it
is, to be refused by checks.py.
"""

import re
from pathlib import Path
from typing import Any

from pairtune.config import keys
from pairtune.config.checks import holds_component, is_component
from pairtune.config.merging import REMOVED, Layer
from pairtune.config.rules import AUTO, show
from pairtune.errors import UserError
from pairtune.files import ROW_FILES


def said_twice(layers: list[Layer]) -> list[str]:
    """Returns what the command line says and takes back, in sentences: the later word wins.

    Raises:
        UserError: A component is switched off behind arguments for it.
    """
    words = [(layer.where.partition(", ")[2], dict(_leaves(layer.values))) for layer in layers if _is_word(layer)]
    told = []
    for i, (later, above) in enumerate(words):
        for earlier, below in words[:i]:
            for name in below:
                over = next((key for key in above if key == name or name.startswith(f"{key}.")), None)
                if over is None:
                    continue
                if above[over] is None and keys.may_hold_component(over) and earlier.startswith(f"{over}."):
                    raise UserError(
                        f"command line, {later}: leaves out what {earlier} is an argument of; keep one of the two"
                    )
                told.append(f"{earlier} has no effect: {later} stands behind it on the command line")
    return list(dict.fromkeys(told))


def give_way(cfg: dict, defaults: dict, layers: list[Layer]) -> tuple[dict, list[str]]:
    """Returns the resolved config without what gave way, and what that is, in sentences."""
    settled = _Settled(cfg, _given(layers))
    for check in (_source, _prompt, _held_out, _evaluation, _interval, _best, _reference, _warmup, _divergence):
        check(settled)
    return settled.cfg, _no_evaluation(settled, layers) + settled.told + _carried(cfg, defaults, layers)


class _Settled:
    """A config, who gave what of it, and what has given way so far."""

    def __init__(self, cfg: dict, given: dict[str, tuple[int, str]]):
        self.cfg, self._given, self.told = cfg, given, []

    def get(self, name: str) -> Any:
        node = self.cfg
        for part in name.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def rank(self, name: str) -> int:
        """How late the place is that gave the key; -1 for a default."""
        return self._place(name)[0]

    def written(self, name: str) -> str:
        """key=value (place), as a sentence names it."""
        return f"{name}={show(self.get(name))} ({self._place(name)[1]})"

    def yields(self, name: str, to: str, why: str, off: Any = None) -> bool:
        """Sets a key to `off`, if it holds more than that and `to` was given in a later place."""
        held = self.get(name)  # a 0 counts
        if held is None or held is False or held == off or not 0 <= self.rank(name) < self.rank(to):
            return False
        self.told.append(f"{self.written(name)} has no effect: {self.written(to)} {why}")
        self.cfg = _with(self.cfg, name.split("."), off)
        self._given[name] = self._place(to)
        return True

    def _place(self, name: str) -> tuple[int, str]:
        found = [p for key, p in self._given.items() if name.startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")]
        return max(found, default=(-1, "default"))


def _source(settled: _Settled) -> None:
    """What was said of a data set of the Hub, in whose place files came: a file is all `train`."""
    for block in ("dataset", "eval_dataset"):
        source, split = settled.get(f"{block}.source"), settled.get(f"{block}.split")
        if not source or not _is_of_files(source):
            continue
        if isinstance(split, str) and not re.fullmatch(r"train(\[.*\])?", split):
            settled.yields(f"{block}.split", f"{block}.source", "is of files", "train")
        for name in ("name", "revision"):
            settled.yields(f"{block}.{name}", f"{block}.source", "is of files")


def _is_of_files(source: Any) -> bool:
    """Whether a source, each of a list, or each of those with names, is one file and no data set or folder."""
    if isinstance(source, dict):
        return _is_of_files(source["source"] if "source" in source else [*source.values()])
    if isinstance(source, list):
        return all(map(_is_of_files, source))
    return isinstance(source, str) and Path(source.removesuffix(".gz")).suffix in ROW_FILES


def _prompt(settled: _Settled) -> None:
    """A default of the prompt's length that a shorter max_length leaves no room for."""
    prompt, total = (settled.get(name) for name in ("max_prompt_length", "max_length"))
    if isinstance(prompt, int) and isinstance(total, int) and prompt >= total and settled.rank("max_prompt_length") < 0:
        told = f"{settled.written('max_prompt_length')} gives way: {settled.written('max_length')} alone decides"
        settled.told.append(told)
        settled.cfg = _with(settled.cfg, ["max_prompt_length"], None)


def _held_out(settled: _Settled) -> None:
    source, fraction = "eval_dataset.source", "dataset.val_fraction"
    if settled.get(source) and settled.get(fraction):
        for earlier, later in ((source, fraction), (fraction, source)):
            if settled.yields(earlier, later, "says what is held out"):
                return


def _evaluation(settled: _Settled) -> None:
    off = max(("eval_dataset.source", "dataset.val_fraction"), key=settled.rank)
    if settled.get("eval_dataset.source") or settled.get("dataset.val_fraction") or settled.rank(off) < 0:
        return
    for name in ("eval_every_n_steps", "eval_every_n_epochs", "keep_best", "early_stop"):
        settled.yields(name, off, "leaves nothing to evaluate on")


def _no_evaluation(settled: _Settled, layers: list[Layer]) -> list[str]:
    """Says that nothing is evaluated where an earlier place would have it."""
    named = ("eval_dataset.source", "dataset.val_fraction")
    earlier = any(value for layer in layers for name, value in _leaves(layer.values) if name in named)
    if any(map(settled.get, named)) or not earlier:
        return []
    return [f"evaluation is off: {settled.written(max(named, key=settled.rank))}"]


def _interval(settled: _Settled) -> None:
    steps, epochs = "eval_every_n_steps", "eval_every_n_epochs"
    if settled.get(steps) and settled.get(epochs):
        for earlier, later in ((steps, epochs), (epochs, steps)):
            if settled.yields(earlier, later, "says when to evaluate"):
                return


def _best(settled: _Settled) -> None:
    if settled.get("keep_last_n") == 0:
        settled.yields("keep_best", "keep_last_n", "writes no checkpoint")
    if not settled.get("keep_best"):
        settled.yields("export_best", "keep_best", "keeps no best checkpoint", False)


def _reference(settled: _Settled) -> None:
    for key, names in keys.by_reference().items():
        if settled.get("reference.name") not in names:
            settled.yields(f"reference.{key}", "reference.name", "does without it")
    if settled.get("reference.model") and not settled.get("reference.checkpoint_dir"):
        settled.yields("reference.model", "reference.checkpoint_dir", "takes the run's own weights")


def _warmup(settled: _Settled) -> None:
    steps, ratio = "lr_scheduler.num_warmup_steps", "lr_scheduler.warmup_ratio"
    if settled.get(steps) is not None and settled.get(ratio) is not None:
        for earlier, later in ((steps, ratio), (ratio, steps)):
            if settled.yields(earlier, later, "says how long the warm-up is"):
                return


def _divergence(settled: _Settled) -> None:
    if settled.get("loss.f_divergence") != "alpha":
        settled.yields("loss.f_alpha", "loss.f_divergence", "does without it")


def _carried(cfg: dict, defaults: dict, layers: list[Layer]) -> list[str]:
    """Arguments that were given where another component was in effect, and that the last one has taken over."""
    told = []
    for key, block in cfg.items():
        if not (holds_component(key, defaults.get(key)) and is_component(block)):
            continue
        path = (defaults.get(key) or {}).get("_component_")
        meant: dict[str, tuple[str, str]] = {}  # argument: where it was given, and for what
        for layer in layers:
            given = layer.values.get(key)
            path = given.get("_component_", path) if isinstance(given, dict) else path
            arguments = given if isinstance(given, dict) else {}
            meant |= {
                name: (layer.place, path)
                for name, value in arguments.items()
                if name != "_component_" and value not in (None, REMOVED)
            }
        for name, (place, before) in meant.items():
            is_last = place == layers[-1].place  # on one command line the order is free
            if before not in (None, AUTO, block["_component_"]) and not is_last and block.get(name) is not None:
                short, now = before.rpartition(".")[2], block["_component_"].rpartition(".")[2]
                told.append(f"{key}.{name}={show(block[name])} ({place}, there for {short}) is now {now}'s")
    return told


def _is_word(layer: Layer) -> bool:
    return layer.where.startswith(f"{layer.place}, ") and layer.method is None


def _given(layers: list[Layer]) -> dict[str, tuple[int, str]]:
    """By key, how late the last place is that gave it, and its name."""
    places = list(dict.fromkeys(layer.place for layer in layers))
    return {name: (places.index(layer.place), layer.place) for layer in layers for name, _ in _leaves(layer.values)}


def _leaves(values: dict, prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _with(node: dict, parts: list[str], value: Any) -> dict:
    first, *rest = parts
    return {**node, first: _with(node[first], rest, value) if rest else value}
