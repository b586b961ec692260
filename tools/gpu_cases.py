"""What gpu_check.py runs: a function a part, which is given a case's name and the settings and returns what it found.

A result's `ok` says whether it is as it must be, `note` what was found, in words; other entries are numbers.
"""

import fcntl
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import gpu_backends
import gpu_parts as parts
import gpu_speed
import measure_generation
import random_work as work
import torch
from gpu_runs import ROOT, run
from peers import matmul_tflops

from pairtune.config import keys
from pairtune.run.metrics import read_log

VERSIONS = ("torch", "torchtune", "torchao", "transformers", "trl", "peft", "triton", "bitsandbytes", "liger-kernel")
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
KERNELS = ("attention=flex", "attention=varlen")  # which have no backward on a CPU


def context_is_lost() -> bool:
    """Returns whether a mistake on the GPU has left this process no use of it."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


# machine, matmul


def machine(name: str, settings: dict) -> dict:
    """What it is: card, driver, versions."""
    found = {"python": sys.version.split()[0]}
    for package in VERSIONS:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    on_gpu = settings["device"] == "cuda"
    card = torch.cuda.get_device_name() if on_gpu else "CPU"
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30 if on_gpu else 0.0
    words = [card, *([f"{memory:.1f} GiB", f"CUDA {torch.version.cuda}"] if on_gpu else [])]
    return {"card": card, "gib": memory, "versions": found, "note": ", ".join(words)}


def matmul(name: str, settings: dict) -> dict:
    """How many operations a second a square product makes: what shares are told of."""
    tflops = matmul_tflops(settings["device"])
    return {"tflops": tflops, "note": f"{tflops:.4g} TFLOP/s"}


# recipes: ten steps of a tiny model, here and on the CPU


def write_tiny(folder: Path) -> Path:
    """Writes a tiny model and 80 pairs of mixed lengths, once, and returns the path of their config."""
    path = folder / "tiny.yaml"
    with _only_one(path):
        return path if path.exists() else _write_tiny(folder, path)


def _write_tiny(folder: Path, path: Path) -> Path:
    base, pairs = folder / "tiny", folder / "tiny.jsonl"
    work.write_model(base, work.MODELS["tiny"])
    work.write_pairs(pairs, work.draw_lengths(work.MIX, 80, scale=0.1), work.MODELS["tiny"]["vocab_size"])
    cfg = {
        "dtype": "fp32", "model": {"_component_": work.LLAMA, **work.MODELS["tiny"]},
        "checkpointer": {"checkpoint_dir": str(base), "model_type": "LLAMA3"},
        "dataset": {"source": str(pairs)}, "max_length": 256, "max_prompt_length": 128,
        "lora": {"rank": 4, "alpha": 8}, "samples": {"num_prompts": 0},
    }  # fmt: skip
    path.write_text(json.dumps(cfg))  # JSON is YAML
    return path


def recipes(name: str, settings: dict) -> dict:
    """A recipe's first ten losses on the device against the CPU's."""
    recipe, overrides, instead, tolerance = parts.RECIPES[name]
    if lacks := _lacks(overrides, settings["device"]):
        return {"left_out": lacks}
    folder = Path(settings["folder"])
    ours = _ten_steps(folder, recipe, overrides, settings["device"])
    theirs = _ten_steps(folder, *(instead or (recipe, overrides)), "cpu")
    differences = [abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)]
    exported = any((_ten_dir(folder, recipe, overrides, settings["device"]) / "export").glob("*.safetensors"))
    return {
        "ok": max(differences) <= tolerance and len(ours) == 10 and exported,
        "losses": [row["loss"] for row in ours],
        "difference": max(differences),
        "note": f"losses differ by {max(differences):.1e} at most ({tolerance:.0e} allowed)"
        + ("" if exported else "; nothing was exported"),
    }


# answers: what a tiny model says, here and on the CPU


def answers(name: str, settings: dict) -> dict:
    """Greedy answers to prompts of several lengths on the device against the CPU's; of random weights, all differ."""
    base = write_tiny(Path(settings["folder"])).with_suffix("")
    draw, vocabulary = torch.Generator().manual_seed(1), work.MODELS["tiny"]["vocab_size"]
    prompts = [torch.randint(3, vocabulary, (length,), generator=draw).tolist() for length in (40, 3, 17, 90)]
    how = parts.ANSWERS[name]
    ours = measure_generation.ours(base, "fp32", settings["device"], **how)
    theirs = measure_generation.ours(base, "fp32", "cpu", base_dtype=how.get("base_dtype"))(prompts, 64)
    # Batches of several sizes, for each of which a step is recorded
    found = [*ours(prompts[:3], 64), *ours(prompts[3:], 64)]
    same = sum(a == b for a, b in zip(found, theirs, strict=True))
    return {"ok": same == len(prompts), "note": f"{same} of {len(prompts)} answers are the same"}


def _lacks(overrides: list[str], device: str) -> str:
    """Returns what keeps a case from running here, or nothing."""
    for override in overrides:
        key, _, value = override.partition("=")
        if key == "attention" and not keys.rule(key).holds(value):
            return f"{override} is not known here: {keys.rule(key).says}"
        if override == parts.PAGED and not importlib.util.find_spec("bitsandbytes"):
            return "bitsandbytes is not installed"
        if override in (parts.PAGED, parts.OFFLOADED, *parts.AWAY, *KERNELS) and device == "cpu":
            return "needs a GPU"
    return ""


def _ten_dir(folder: Path, recipe: str, overrides: list[str], device: str) -> Path:
    told = json.dumps([recipe, overrides, device])
    return folder / f"ten_{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _ten_steps(folder: Path, recipe: str, overrides: list[str], device: str) -> list[dict]:
    """What is asked for again is read again: many cases have one CPU run."""
    run_dir = _ten_dir(folder, recipe, overrides, device)
    done = Path(f"{run_dir}.json")
    with _only_one(run_dir):
        if not done.exists():
            own = [f"reference.cache_dir={run_dir}_cache"] if "reference=cached" in overrides else []
            told = [f"output_dir={run_dir}", f"device={device}", *parts.TEN, *overrides, *own]
            run_one = _torchrun if recipe == parts.TORCHRUN else run
            done.write_text(json.dumps(run_one(recipe, [write_tiny(folder)], told)))
        return json.loads(done.read_text())


@contextmanager
def _only_one(path: Path):
    """Lets one process at a time make a file or folder."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _torchrun(recipe: str, config_paths: list[Path], overrides: list[str]) -> list[dict]:
    words = [sys.executable, "-m", "pairtune.cli", "run", "--nproc_per_node", "1"]
    words += [str(ROOT / "recipes" / "lora_dpo_distributed.py"), "--config", str(config_paths[0]), *overrides]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-800:])
    run_dir = Path(overrides[0].partition("=")[2])
    return [row for row in read_log(run_dir / "metrics.jsonl") if "loss" in row]


# resume: killed between two checkpoints, and gone on


def resume(name: str, settings: dict) -> dict:
    """A run that SIGKILL ended and resume=true continued ends as one that was left alone: log and weights."""
    from safetensors.torch import load_file

    recipe, overrides = parts.RESUMED[name]
    folder = Path(settings["folder"])
    common = [f"device={settings['device']}", *parts.TEN, *overrides, "save_every_n_steps=3"]
    straight, killed = (folder / f"resume_{name.replace(', ', '_')}_{which}" for which in ("straight", "killed"))
    rows = run(recipe, [write_tiny(folder)], [f"output_dir={straight}", *common])
    logger = "metric_logger={_component_: loggers.StopAfter, step: 8, signal: 9}"
    words = [sys.executable, "-m", "pairtune.cli", "run", str(ROOT / "recipes" / f"{recipe}.py")]
    words += ["--config", str(write_tiny(folder)), f"output_dir={killed}", *common, logger]
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    died_at = len(read_log(killed / "metrics.jsonl"))
    if ended.returncode == 0 or died_at != 8:
        return {"ok": False, "note": f"was not killed at step 8: {(ended.stdout + ended.stderr)[-500:]}"}
    again = run(recipe, [write_tiny(folder)], [f"output_dir={killed}", *common, "resume=true"])
    same_log = [_without_speed(row) for row in rows] == [_without_speed(row) for row in again]
    a, b = (load_file(run_dir / "export" / "model.safetensors") for run_dir in (straight, killed))
    difference = max(float((a[n].float() - b[n].float()).abs().max()) for n in a)
    return {
        "ok": same_log and difference == 0,
        "difference": difference,
        "note": f"log {'the same' if same_log else 'differs'}, exported weights differ by {difference:.1e}",
    }


def _without_speed(row: dict) -> dict:
    return {k: v for k, v in row.items() if k not in SPEED}


PARTS: dict[str, Callable[[str, dict], dict]] = {
    "machine": machine,
    "matmul": matmul,
    "backends": gpu_backends.compare,
    "recipes": recipes,
    "answers": answers,
    "resume": resume,
    "prepare": gpu_speed.prepare,
    "speed": gpu_speed.speed,
    "peers": gpu_speed.peers,
    "plan": gpu_speed.plan,
}
