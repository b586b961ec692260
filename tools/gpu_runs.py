"""A recipe's main in this process, several times, each time as if it were the first."""

import gc
import os
import runpy
import socket
from pathlib import Path

import torch

from pairtune import config
from pairtune.process import torchao_names
from pairtune.run.metrics import read_log

torchao_names.quiet()

ROOT = Path(__file__).resolve().parents[1]


def run(recipe: str, config_paths: list[Path], overrides: list[str]) -> list[dict]:
    """Runs a recipe's main in this process and returns its metrics.jsonl; a logger may have stopped it."""
    module = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))
    cfg = config.load(module["METHOD"], module["DEFAULTS"], list(config_paths), list(overrides))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    os.environ.update(alone if recipe.endswith("_distributed") else {})
    try:
        module["main"](cfg)
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise RuntimeError(end.code) from None
    finally:
        for name in alone:
            os.environ.pop(name, None)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        free()
    return [row for row in read_log(Path(cfg.output_dir) / "metrics.jsonl") if "loss" in row]


def free() -> None:
    """Leaves nothing of an earlier case: no memory, no compiled graph, no peak."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])
