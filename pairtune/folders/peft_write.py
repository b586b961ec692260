"""Adapters out, in PEFT's layout.

PEFT adapts Hugging Face's layers, of which some hold several of ours (families.py): theirs are written as one whose
matrices are put together block by block.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pairtune.config.layout import BASE_FILE, REPO_ID_FILE, read_record
from pairtune.folders import peft_experts
from pairtune.folders.digests import digest_samples
from pairtune.folders.families import Family, Module
from pairtune.folders.weights import ModelFolder, Weights

EXPERTS_README = """\
A LoRA adapter with matrices for experts or routers of a mixture, under the Hub's names of its layers.

PEFT loads it where these are linear layers: with transformers 4. In transformers 5 a layer's experts are two tensors,
and its router is no linear layer: PEFT 0.18 leaves the experts' matrices out there, without a warning if others are
loaded, and refuses the router's; PEFT 0.20 converts them (peft.utils.transformers_weight_conversion). The merged
weights in the folder above need none of this.
"""


def write_adapter(folder: Path, adapter: dict[str, Tensor], base: ModelFolder, lora: dict) -> None:
    """Writes an adapter in PEFT's layout.

    Those of a mixture's experts are written one an expert, under the Hub's names, as PEFT saved them with transformers
    4, and so are those of its router. A README.md in the folder says what reads them.

    Args:
        folder: Is made.
        adapter: models.only_adapters of the gathered weights.
        base: What it belongs to.
        lora: rank, alpha, dropout, use_dora and use_rslora.
    """
    layers: dict[str, dict[int, str]] = {}  # their layer: our layers in it, by part
    modules: dict[str, Module] = {}
    of_experts, parameters = peft_experts.to_theirs(adapter, base.family)
    adapter = {key: value for key, value in adapter.items() if value.dim() < 3}
    for name in dict.fromkeys(re.sub(r"\.(lora_[ab]\.weight|magnitude)$", "", key) for key in adapter):
        module, i, theirs = base.family.find_ours(name)
        theirs = module.loaded or theirs
        layers.setdefault(theirs, {})[i], modules[theirs] = name, module
    tensors, ranks = of_experts, {}
    for theirs, ours in layers.items():
        parts = [(i, adapter[f"{name}.lora_a.weight"], adapter[f"{name}.lora_b.weight"]) for i, name in ours.items()]
        a, b = _put_together(parts, modules[theirs], base.config)
        tensors |= {f"base_model.model.{theirs}.lora_{part}.weight": m.contiguous() for part, m in (("A", a), ("B", b))}
        ranks[theirs] = len(a)
        if lora.get("use_dora"):
            tensors[f"base_model.model.{theirs}.lora_magnitude_vector"] = _magnitudes(
                adapter, ours, modules[theirs], base, theirs
            )
    targets = _targets(modules, base.family)
    fused = {end: next(r for t, r in ranks.items() if f".{t}".endswith(f".{end}")) for end in targets}
    special = {end: rank for end, rank in fused.items() if rank != lora["rank"]}
    power = 0.5 if lora.get("use_rslora") else 1  # a fused layer's larger rank must not change its scale
    config = {
        **_origin(base),
        "r": lora["rank"],
        "lora_alpha": lora["alpha"],
        "rank_pattern": special,
        "alpha_pattern": {end: lora["alpha"] * (rank / lora["rank"]) ** power for end, rank in special.items()},
        "target_modules": targets,
        **({"target_parameters": parameters} if parameters else {}),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "lora_dropout": 0.0 if parameters else lora["dropout"],  # PEFT has none of parameters'
        "use_dora": bool(lora.get("use_dora")),
        "use_rslora": bool(lora.get("use_rslora")),
        "bias": "none",
        "fan_in_fan_out": any(module.transposed for module in modules.values()),
        "inference_mode": True,
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    record = {"model": config["base_model_name_or_path"], "weights": digest_samples(base.weight_files)}
    (folder / BASE_FILE).write_text(json.dumps(record, indent=2) + "\n")
    if any(".block_sparse_moe." in name for name in tensors):
        (folder / "README.md").write_text(EXPERTS_README)


def _put_together(parts: list[tuple[int, Tensor, Tensor]], module: Module, config: dict) -> tuple[Tensor, Tensor]:
    """Returns A and B of one of their layers, from those of our layers in it: block by block, in their order of rows.

    Args:
        parts: Number of the part, A and B, of the parts that are adapted.
    """
    i, _, b = parts[0]
    unit = len(b) // module.shares(config)[i]
    width = sum(len(a) for _, a, _ in parts)
    blocks = [b.new_zeros(unit * share, width) for share in module.shares(config)]  # of each part, adapted or not
    start = 0
    for i, a, own in parts:
        blocks[i][:, start : start + len(a)] = own
        start += len(a)
    return torch.cat([a for _, a, _ in parts]), module.join(blocks, config)


def _magnitudes(
    adapter: dict[str, Tensor], ours: dict[int, str], module: Module, base: ModelFolder, theirs: str
) -> Tensor:
    """Returns the magnitudes [out] of one of their layers; a part without an adapter has its rows' norms."""
    weights, (_, names) = None, base.family.find_theirs(theirs)
    pieces = []
    for i, name in enumerate(names):
        if i in ours:
            values = adapter[f"{name}.magnitude"]
        else:
            weights = weights or Weights(base)
            values = torch.linalg.vector_norm(weights[f"{name}.weight"].float(), dim=1)
        pieces.append(values.to(next(iter(adapter.values())).dtype))
    return module.join(pieces, base.config).contiguous()


def _targets(modules: dict[str, Module], family: Family) -> list[str]:
    """Returns the shortest ends of names that mean these layers and no others; whole names where no end does.

    Args:
        modules: By the layers' whole names.
    """
    adapted = list(dict.fromkeys(module.adapted for module in modules.values()))
    others = [m.adapted for m in family.modules if m.adapted not in adapted]
    targets = []
    for theirs in adapted:
        pieces = theirs.split(".")
        ends = (".".join(pieces[-n:]) for n in range(1, len(pieces) + 1) if not pieces[-n].isdigit())
        end = next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others))
        whole = [name for name, of in modules.items() if of.adapted == theirs]
        targets += whole if "{}" in end else [end]  # a tower's layers have the same ends
    return list(dict.fromkeys(targets))


def _origin(base: ModelFolder) -> dict[str, str]:
    """Returns what PEFT's settings say of the base: its repository, and the commit if it is known, or its folder."""
    record = read_record(base.path / REPO_ID_FILE)
    known = {key: record[key] for key in ("repo_id", "revision") if record.get(key) and isinstance(record[key], str)}
    if "repo_id" not in known:
        return {"base_model_name_or_path": str(base.path.resolve())}
    return {"base_model_name_or_path": known.pop("repo_id")} | known
