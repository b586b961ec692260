"""A run's folder after the run, or after a kill: what `tune plot`, `report` and `pairs` read. No torch."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from pairtune.errors import UserError
from pairtune.files import read_object
from pairtune.run import places, verdict
from pairtune.run.folder import check_free
from pairtune.run.log_file import FILE, read_log
from pairtune.run.verdict import Verdict


@dataclass(frozen=True)
class Finished:
    """What a run left.

    Attributes:
        folder: Its path, as it was given.
        log: Objects of metrics.jsonl.
        config: Of config.yaml, nested; empty where it is not there.
        runs: Whether it is still running.
    """

    folder: Path
    log: list[dict]
    config: dict
    verdict: Verdict
    runs: bool

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def was_killed(self) -> bool:
        """Whether it neither ended nor could say why not."""
        return self.verdict.ended == "no" and not self.runs


def open_run(folder: Path) -> Finished:
    """Returns what a run folder holds; the verdict is made anew of its log.

    Raises:
        UserError: It is not the folder of a run, or nothing was logged there.
    """
    folder = folder.expanduser()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the output_dir of a run, such as runs/lora_dpo")
    if not (folder / FILE).is_file():
        raise UserError(f"{folder}: holds no {FILE}: it is not the folder of a run; give a run's output_dir")
    try:
        log = read_log(folder / FILE)
    except ValueError as error:
        raise UserError(f"{folder / FILE}: cannot be read: {error}; mend that line, or take it out") from None
    if not log:
        raise UserError(f"{folder}: nothing was logged yet: the run has not made its first step")
    said = read_object(folder / verdict.FILE, way_out="remove it: it is made again of metrics.jsonl")
    config = _config(folder / places.CONFIG)
    found = verdict.judge(log, ended=said.get("ended", "yes"), exports_best=bool(config.get("export_best")))
    return Finished(folder, log, config, found, _runs(folder))


def _config(path: Path) -> dict:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}; take it out of the folder") from None
    return found if isinstance(found, dict) else {}


def _runs(folder: Path) -> bool:
    try:
        check_free(places.Place(folder, folder.resolve()))
    except UserError:
        return True
    return False
