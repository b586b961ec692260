"""What a run is, so that a checkpoint is continued by the same run only: its config, pairs and base weights."""

from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from pairtune.config import keys
from pairtune.config.rules import show
from pairtune.config.short_names import current
from pairtune.errors import UserError
from pairtune.folders.digests import digest_samples
from pairtune.folders.weights import ModelFolder
from pairtune.pairs.digests import digest_in_order
from pairtune.pairs.tokenize import Pair
from pairtune.process.dist import World

BLOCKS = 256  # of pairs, each with a digest of its own, to tell where data differ


def fingerprint(
    cfg: DictConfig, train: list[Pair], held_out: list[Pair], files: ModelFolder, reference: ModelFolder | None = None
) -> dict:
    """Returns what identifies a run: `config`, `pairs`, `held_out`, `weights` and `reference`, as JSON can hold it.

    Args:
        files: From weights.open_weights.
        reference: A second model's.
    """
    return {
        "config": OmegaConf.to_container(cfg, resolve=True),
        "pairs": digest_pairs(train),
        "held_out": digest_pairs(held_out),
        "weights": digest_samples([*files.weight_files, *_adapter_files(cfg.get("adapter"))]),
        "reference": digest_samples(reference.weight_files if reference else ()),
    }


def _adapter_files(folder: str | None) -> list[Path]:
    return sorted(Path(folder).glob("adapter_model.*")) if folder else []


def digest_pairs(pairs: list[Pair]) -> dict:
    """Returns the number of pairs and a digest of every block of them: tokens, rows and order; of a stream, the first
    ones', and what it is made of."""
    size = max(1, -(-len(pairs) // BLOCKS))
    blocks = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    return {
        "num": len(pairs),
        "first_rows": [b[0].row for b in blocks],
        "digests": [digest_in_order(b) for b in blocks],
        **({"stream": stream.identity} if (stream := getattr(pairs, "stream", None)) else {}),
    }


def check_same(values: dict, now: dict, where: Path, world: World, *, total_steps: int) -> None:
    """Refuses to go on from another run's checkpoint; prints what is resumed, and the differences that do no harm.

    Args:
        values: A checkpoint's, from checkpoints.read_values.
        now: From `fingerprint`, of this run.
        where: The checkpoint, for the message.
        total_steps: Of this run.

    Raises:
        UserError: Anything differs that makes this another run; every difference is listed. Or the checkpoint lies
            behind this run's end.
    """
    saved = values["fingerprint"]
    if values["step"] > total_steps:
        raise UserError(
            f"resume: {where} is after step {values['step']}, and this run ends with step {total_steps}: raise "
            "epochs or max_steps, or name an earlier checkpoint, with another output_dir"
        )
    refused, allowed, by_result = [], [], []
    if values["torch"] != torch.__version__:
        allowed.append(f"torch: {values['torch']} then, {torch.__version__} now")
    for key, before, after in _differences(keys.with_published(saved["config"]), now["config"]):
        line = f"{key}: {show(before)} then, {show(after)} now"
        on_resume = keys.on_resume(key)
        is_new = key.partition(".")[0] not in saved["config"]  # a later version's, whose default does as before
        (refused if on_resume == "no" and not is_new else allowed).append(line)
        by_result += [line] * (on_resume == "by result")
    refused += _pair_differences(saved["pairs"], now["pairs"])
    refused += _file_differences("base weights", saved["weights"], now["weights"])
    refused += _file_differences("reference weights", saved.get("reference", now["reference"]), now["reference"])
    if refused:
        lines = "\n  ".join([*refused, *by_result])  # the latter may be what the others come from
        raise UserError(
            f"resume: {where} belongs to another run:\n  {lines}\nGo on with the "
            "config that the checkpoint was written with (config.yaml beside its folder), or start anew: resume=false"
        )
    if saved["held_out"] != now["held_out"]:
        allowed.append("held-out pairs: not the same; the best checkpoint so far is forgotten")
    world.print("\n".join([f"resuming from {where}", *(f"  changed: {line}" for line in allowed)]), "\n")


def _file_differences(what: str, saved: dict, now: dict) -> list[str]:
    names = sorted(name for name in {**saved, **now} if saved.get(name) != now.get(name))
    return [f"{what}: not the same in {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"] if names else []


def _pair_differences(saved: dict, now: dict) -> list[str]:
    if saved == now:
        return []
    if saved.get("stream") != now.get("stream"):
        return ["dataset: another stream: other sizes of files, weights, shares, limits, shuffle_buffer or streaming"]
    if saved["num"] != now["num"]:
        return [f"training pairs: {saved['num']:,} then, {now['num']:,} now"]
    block = next(i for i, digest in enumerate(saved["digests"]) if digest != now["digests"][i])
    return [f"training pairs: as many, but not the same or not so tokenized; first from row {now['first_rows'][block]}"]


def _differences(saved: dict, now: dict, prefix: str = "") -> list[tuple]:
    found = []
    for key in {**saved, **now}:
        before, after = saved.get(key), now.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after and not (key == "_component_" and before and current(before) == after):
            found.append((f"{prefix}{key}", before, after))
    return found
