"""Which files and folders a config names."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

NOT_READ = ("output_dir", "metric_logger", "samples", "checkpointer.model_type")


def paths(cfg: Mapping) -> list[tuple[str, Path]]:
    """Returns the files and folders that a config names to be read, and that are there, each behind its key.

    Keys of files are known; of others, such as a component's arguments, what has a separator in it may be a path. What
    a run writes is left out: output_dir, and where a logger writes.
    """
    plain = OmegaConf.to_container(cfg) if OmegaConf.is_config(cfg) else cfg
    folder, found = plain.get("checkpointer", {}).get("checkpoint_dir") or "", []
    for key, value in _texts(plain):
        is_known = key.startswith(("checkpointer.", "tokenizer.")) or key.endswith((".source", "_dir"))
        is_known = is_known or key in ("adapter", "resume")
        if key.startswith(NOT_READ) or key.endswith("._component_") or not (is_known or os.sep in value):
            continue
        inside = [Path(folder) / value] if key.startswith("checkpointer.checkpoint_files") else []
        found += [(key, path) for path in (Path(value).expanduser(), *inside) if os.path.lexists(path)]
    return found


def _texts(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _texts(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for value in node:
            yield from _texts(value, key)
