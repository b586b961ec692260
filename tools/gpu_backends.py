"""Attention's back ends against the dense mask on one device: log-probabilities and all gradients, family by family."""

import random
import traceback
from types import SimpleNamespace

import torch
from gpu_parts import BACK_ENDS

from pairtune import models
from pairtune.config import keys
from pairtune.models.logps import answer_logps
from pairtune.pairs.at_once import longest_row
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

SIZES = {
    "vocab_size": 320, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 256, "max_seq_len": 512,
    "intermediate_dim": 256,
}  # fmt: skip
LLAMA = {"_component_": "torchtune.models.llama3.llama3", **SIZES, "rope_base": 10_000}
GEMMA2 = {"_component_": "pairtune.gemma2.gemma2", **SIZES, "head_dim": 64, "query_pre_attn_scalar": 64}
MIXTURE = {"_component_": "pairtune.mixtral.mixtral", **SIZES, "num_experts": 4, "rope_base": 10_000}
FAMILIES = {  # component, each layer's window
    "grouped heads": (LLAMA, None),
    "windows": (LLAMA, [24, None, 24]),
    "softcaps and windows": (GEMMA2, [24, None, 24]),
    "mixture of experts": (MIXTURE, None),
}
ROWS = {"mask": 128, "flex": 128}  # the multiple that a row's length is of; else a row is as long as its pairs
LOW_ONLY = ("varlen",)  # its kernel takes no float32
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# How far an answer's log-probability and the gradients may be off, relatively, in float32; in bf16 twice what the mask
# in bf16 is off from float32.
LOGPS, GRADIENTS, TIMES = 1e-5, 1e-4, 2.0


def pairs(count: int = 8, seed: int = 0) -> list:
    """Pairs of mixed lengths, some of whose answers begin alike; one prompt is longer than any window."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(3, SIZES["vocab_size"]) for _ in range(rng.randint(low, high))]

    made = []
    for row in range(count):
        shared = tokens(0, 3)
        chosen, rejected = ([*shared, first, *tokens(3, 60)] for first in (1, 2))
        made.append(SimpleNamespace(prompt=[0, *tokens(5, 90)], chosen=chosen, rejected=rejected, row=row))
    return made


def compare(name: str, settings: dict) -> dict:
    """A back end's errors from the dense mask in float32, over families and dtypes."""
    attention, compiled = BACK_ENDS[name]
    rule = keys.rule("attention")
    if not rule.holds(attention):
        return {"left_out": f"attention={attention} is not known here: {rule.says}"}
    if attention in ("flex", "varlen") and settings["device"] == "cpu":
        return {"left_out": "needs a GPU"}
    failed, errors = [], {}
    for family, dtype in combinations(attention, compiled):
        where = f"{family}, {dtype}"
        try:
            component, windows = FAMILIES[family]
            good, errors[where], note = _compare(component, windows, attention, compiled, dtype, settings["device"])
        except Exception as error:
            traceback.print_exc()
            good, note = False, f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        failed += [] if good else [f"{where}: {note}"]
    worst = {dtype: max((max(e) for w, e in errors.items() if w.endswith(dtype)), default=None) for dtype in DTYPES}
    told = ", ".join(f"{dtype} {error:.1e}" for dtype, error in worst.items() if error is not None)
    return {"ok": not failed, "errors": errors, "note": "; ".join(failed) or f"off from the mask in fp32: {told}"}


def combinations(attention: str, compiled: bool) -> list[tuple[str, str]]:
    """Returns families and dtypes; compiled layers, which take time, in the dtype that runs have.

    In bf16 rounding decides which expert a token goes to: there is nothing to compare with.
    """
    return [
        (family, dtype)
        for family in FAMILIES
        for dtype in DTYPES
        if not (dtype == "fp32" and (attention in LOW_ONLY or compiled))
        and not (dtype == "bf16" and family == "mixture of experts")
    ]


def _compare(component, windows, attention, compiled, dtype, device) -> tuple[bool, tuple[float, float], str]:
    weights = _weights(component, dtype)
    oracle = _step(component, windows, weights, "mask", False, "fp32", device)
    error = _error(_step(component, windows, weights, attention, compiled, dtype, device), oracle)
    allowed = (LOGPS, GRADIENTS)
    if dtype == "bf16":
        rounding = _error(_step(component, windows, weights, "mask", False, dtype, device), oracle)
        allowed = tuple(TIMES * off for off in rounding)
    good = all(off <= most for off, most in zip(error, allowed, strict=True))
    told = [f"{a:.1e} off ({b:.1e} allowed)" for a, b in zip(error, allowed, strict=True)]
    return good, error, f"log-probabilities {told[0]}, gradients {told[1]}"


def _weights(component: dict, dtype: str) -> dict:
    """Random ones of the model's width, rounded to the dtype, in float32."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, parameter in models.full(component, dtype="fp32").named_parameters():
        value = torch.randn(parameter.shape, generator=generator) * SIZES["embed_dim"] ** -0.5
        made[name] = (value if parameter.ndim > 1 else 1 + value).to(DTYPES[dtype]).float()
    return made


def _step(component, windows, weights, attention, compiled, dtype, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns all answers' log-probabilities and all parameters' gradients of their random sum, in float64."""
    torch.compiler.reset()
    device = torch.device(device)
    model = models.full(component, dtype=dtype)
    how = {"attention": attention, "windows": windows, "compile_layers": compiled}
    models.prepare(model, max_length=256, **how)
    models.load(model, weights, world=World(device))
    batch_of = pairs()
    dense = model.pairtune.takes_fixed_rows or attention in ROWS
    batch = lay_out(batch_of, longest_row(batch_of, ROWS.get(attention, 128)) if dense else None).to(device)
    values = torch.cat(answer_logps(model, batch))
    upstream = torch.randn(len(values), generator=torch.Generator().manual_seed(1)).to(values)
    (values * upstream).sum().backward()
    gradients = torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])
    return values.detach().double().cpu(), gradients.cpu()


def _error(found, oracle) -> tuple[float, float]:
    """The largest error of a log-probability, of their mean size, and the gradients' error, of their norm."""
    logps = (found[0] - oracle[0]).abs().max() / oracle[0].abs().mean()
    return float(logps), float((found[1] - oracle[1]).norm() / oracle[1].norm())
