"""How fast a recipe and its peers make steps at a model's full size, what they hold, and what `tune plan` counts."""

import json
import os
import resource
import statistics
import time
from pathlib import Path

import gpu_parts as parts
import random_work as work
import side_by_side
import torch
from gpu_runs import ROOT, run
from omegaconf import OmegaConf

WARM_STEPS = 2  # left out where speed is measured


def prepare(name: str, settings: dict) -> dict:
    """Writes the model and the pairs that runs of speed and of peers take."""
    folder, start = Path(settings["folder"]), time.perf_counter()
    runs = [made for name, made in settings["runs"].items() if name in settings["chosen"]]
    for shape in dict.fromkeys([settings["shape"], *(made["shape"] for made in runs)]):
        how = {"dtype": settings["dtype"], "device": settings["device"], "num_files": 8 if shape == "8b" else 1}
        told, whole = json.dumps([how, work.MODELS[shape]]), folder / f"{shape}.whole"
        if not whole.exists() or whole.read_text() != told:  # in a folder of an earlier call they may be there
            work.write_model(folder / shape, work.MODELS[shape], **how)
            whole.write_text(told)
    weights = time.perf_counter() - start
    for made in runs:
        lengths = lengths_of(made["lengths"], settings)
        work.write_pairs(_pairs(made, settings), lengths, work.MODELS[made["shape"]]["vocab_size"])
    return {"note": f"weights in {weights:.1f} s, pairs in {time.perf_counter() - start - weights:.1f} s"}


def lengths_of(kind: str, settings: dict) -> list[work.Lengths]:
    """Returns the lengths of as many pairs as a run's steps take."""
    count = settings["pairs_per_step"] * settings["steps"]
    return work.draw_lengths(kind, count, scale=settings["scale"])


def _pairs(made: dict, settings: dict) -> Path:
    return Path(settings["folder"]) / f"pairs_{made['shape']}_{made['lengths'].replace('/', '_')}.jsonl"


def config_of(name: str, settings: dict) -> tuple[str, list[Path], list[str], list[work.Lengths]]:
    """Returns a speed run's recipe, configs, overrides, and its pairs' lengths."""
    made, folder = settings["runs"][name], Path(settings["folder"])
    shape, run_dir = made["shape"], parts.run_dir(name, settings)
    lengths = lengths_of(made["lengths"], settings)
    cfg = {
        "output_dir": str(run_dir), "device": settings["device"], "dtype": settings["dtype"],
        "model": {"_component_": work.LLAMA, **work.MODELS[shape]},
        "checkpointer": {"checkpoint_dir": str(folder / shape), "model_type": "LLAMA3"},
        "dataset": {"source": str(_pairs(made, settings))}, "eval_dataset": {"source": None},
        "max_length": max(n.prompt + max(n.chosen, n.rejected) for n in lengths),
        "max_prompt_length": max(n.prompt for n in lengths),
        "max_completion_length": max(max(n.chosen, n.rejected) for n in lengths),
        "samples": {"num_prompts": 0}, "keep_last_n": 0, "pairs_per_step": settings["pairs_per_step"],
        "per_method": {"full": {"dtype": settings["dtype"]}},
        # The run is stopped, so that nothing is exported.
        "metric_logger": {"_component_": "loggers.StopAfter", "step": settings["steps"]},
    }  # fmt: skip
    overlay = Path(f"{run_dir}.yaml")
    overlay.write_text(json.dumps(cfg))
    overrides = [*made["overrides"], *settings["extra"].get("", []), *settings["extra"].get(name, [])]
    if "reference=cached" in overrides:
        overrides.append(f"reference.cache_dir={folder / 'cache'}")
    return made["recipe"], [ROOT / "configs" / "llama3_8b.yaml", overlay], overrides, lengths


def speed(name: str, settings: dict) -> dict:
    """Pairs a second that a recipe logs, the first steps left out, and the most memory that was held."""
    recipe, paths, overrides, lengths = config_of(name, settings)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    rows = run(recipe, paths, overrides)
    measured = [row["pairs_per_second"] for row in rows[WARM_STEPS:]] or [row["pairs_per_second"] for row in rows[-1:]]
    pairs = statistics.median(measured)
    sizes = work.MODELS[settings["runs"][name]["shape"]]
    full, live = recipe.startswith("full"), "reference=cached" not in overrides
    flops = sum(work.flops_of_pair(sizes, n, full=full, live=live) for n in lengths)
    on_gpu = settings["device"] == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tokens = statistics.median(row["tokens_per_second"] for row in rows[WARM_STEPS:] or rows[-1:])
    return {
        "pairs_per_second": pairs,
        "all": [row["pairs_per_second"] for row in rows],
        "tokens_per_second": tokens,
        "tflops": flops / len(lengths) * pairs / 1e12,
        "peak_gib": peak / 2**30,
        "losses": [row["loss"] for row in rows],
        "overrides": overrides,
        "recipe": recipe,
        "live": live,
        "seconds": time.perf_counter() - start,
        "ok": len(rows) == settings["steps"],
        "note": f"{pairs:.2f} pairs/s, {tokens:,.0f} tokens/s, {peak / 2**30:.2f} GiB, "
        f"losses {rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f}",
    }


# plan: what is counted


def plan(name: str, settings: dict) -> dict:
    """What `tune plan` counts of a speed run, in GiB."""
    from pairtune.cli.plan import Run, plan
    from pairtune.cli.recipe import read_recipe
    from pairtune.run import choosing

    recipe, paths, overrides, _ = config_of(name, settings)
    recorded = parts.run_dir(name, settings) / "config.yaml"  # what the run has chosen
    if recorded.is_file():
        chosen = OmegaConf.load(recorded)
        overrides = [*overrides, *(f"{key}={chosen[key]}".lower() for key in choosing.KEYS)]
    counted = plan(Run(recipe, tuple(paths), tuple(dict.fromkeys(overrides))), read_recipe)
    return {"counted_gib": counted.peak / 2**30, "note": f"{counted.peak / 2**30:.2f} GiB"}


# peers: the same step by others


def peers(name: str, settings: dict) -> dict:
    """A peer's steps, as side_by_side.py makes them, with weights drawn on the device."""
    folder = Path(settings["folder"]) / f"peer_{parts.PEERS[name].replace(':', '_').replace('=', '')}"
    folder.mkdir()
    threads = (os.cpu_count() or 1) if settings["device"] == "cuda" else 1
    steps, pairs = side_by_side.WARM_STEPS + 2, settings["peer_pairs"]
    lengths = work.draw_lengths("24/8/8" if settings["tiny"] else parts.LONG, pairs * steps)
    task = side_by_side.Task(
        folder, work.MODELS[settings["shape"]], tuple(lengths), device=settings["device"], dtype=settings["dtype"],
        rank=16, pairs_per_step=pairs, threads=threads, drawn=True, paths=tuple(map(tuple, settings["paths"])),
    )  # fmt: skip
    task.write()
    system = side_by_side.System(parts.PEERS[name], task)
    try:
        made = [system.step(is_first=n == 0) for n in range(steps)]
    except RuntimeError as error:
        if "ModuleNotFoundError" in str(error) or "ImportError" in str(error):
            return {"left_out": str(error)}
        raise
    finally:
        system.stop()
    found = side_by_side.summary(made, task, parts.PEERS[name])
    told = f"{found['pairs_per_second']:.2f} pairs/s, {found['peak_gib']:.2f} GiB, losses"
    return {**found, "note": f"{told} {found['losses'][0]:.4f} to {found['losses'][-1]:.4f}"}
