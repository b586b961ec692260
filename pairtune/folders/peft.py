"""Adapters to start from and to give back: PEFT's layout, as PEFT, TRL and we write it, or torchtune's names.

PEFT adapts Hugging Face's layers, of which some hold several of ours (families.py): a fused one's adapter is read as
one for each of them, and theirs are written as one whose matrices are put together block by block.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchtune.modules import TiedLinear

from pairtune import models
from pairtune.config.rules import LORA_LAYERS, fits, kind_words, show
from pairtune.errors import UserError
from pairtune.folders.digests import digest_samples
from pairtune.folders.families import Family, Module
from pairtune.folders.weights import ModelFolder, Weights, read_json, read_shard

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
BASE_FILE = "base_weights.json"  # ours: which weights an adapter was trained on
REPO_ID_FILE = "original_repo_id.json"  # of `tune download`
# PEFT saves magnitudes with and without ".weight", by its version.
_PEFT_NAME = re.compile(r"base_model\.model\.(?P<layer>.+)\.lora_(?P<part>A|B|magnitude_vector)(\.weight)?")
_BASE_WEIGHT = re.compile(r"base_model\.model\.(?P<layer>.+?)(\.base_layer)?\.weight")
MERGE = "merge it into the base model (PEFT's merge_and_unload) and start from that"

# Of adapter_config.json: what changes the adapted model in a way that ours cannot follow. Absent, null, false or empty
# is as it should be, and so is what stands here.
CANNOT = {
    "lora_bias": "biases of adapters",
    "bias": "trained biases",
    "modules_to_save": "whole layers that were trained",
    "trainable_token_indices": "trained embeddings",
    "target_parameters": "adapters of parameters that are no layers",
    "layers_to_transform": "adapters in some layers only",
    "layer_replication": "layers used twice",
    "use_qalora": "QA-LoRA, with pooled inputs",
    "alora_invocation_tokens": "adapters that are on for a part of the tokens",
    "arrow_config": "a mixture of adapters",
    "megatron_config": "Megatron's layers",
}
EXPERTS_README = """\
A LoRA adapter with matrices for experts or routers of a mixture, under the Hub's names of its layers.

PEFT loads it where these are linear layers: with transformers 4. In transformers 5 a layer's experts are two tensors,
and its router is no linear layer: PEFT 0.18 leaves the experts' matrices out there, without a warning if others are
loaded, and refuses the router's; PEFT 0.20 converts them (peft.utils.transformers_weight_conversion). The merged
weights in the folder above need none of this.
"""
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")  # other init_lora_weights change the base weights


def read_adapter(folder: str | Path, model: nn.Module, base: ModelFolder, *, key: str = "adapter") -> dict[str, Tensor]:
    """Returns an adapter's matrices under torchtune's names and in its rotary order: what models.load starts from.

    Args:
        folder: Holds adapter_config.json and adapter_model.safetensors (or .bin) in PEFT's layout, or adapter_model.pt
            or .safetensors under torchtune's names; the latter say nothing about alpha, which is taken as it is.
        model: From models.lora; may be on the meta device. It tells rank, alpha, adapted layers and shapes.
        base: From checkpoint.open_weights.
        key: The config's name for `folder`, for messages.

    Raises:
        UserError: No adapter there, a damaged file, another base, rank, alpha or choice of layers than the model's,
            something that LoRA as it is here cannot do, or matrices that are missing, too many, misshapen or not
            finite.
    """
    folder = Path(folder)
    key = f"{key}={folder}"
    path = find_weights(folder, key=key)
    found = read_shard(path)
    has_peft_names = any(name.startswith("base_model.") for name in found)
    if has_peft_names or (folder / "adapter_config.json").is_file():
        config = _read_config(folder, key)
        _check_kind(config, key)
        _check_layers(config.get("target_modules"), model, base.family, key)
        layers = (
            [_cut(*layer, config, model, base, path) for layer in _by_layer(found, base, path)]
            if has_peft_names
            else []
        )
        _check_settings(config | _shared_scale(layers, config, key), model, key)
        found = _join(layers, config) if has_peft_names else found
    _check_tensors(found, models.adapter_shapes(model), path)
    _check_base(folder, base, key)
    return found


def find_weights(folder: str | Path, *, key: str = "adapter") -> Path:
    """Returns the file of an adapter's matrices.

    Raises:
        UserError: There is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder; `tune download REPO_ID --output-dir {folder}` fetches one")
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    inside = [file.parent for name in WEIGHT_FILES for file in folder.glob(f"*/{name}")]
    hint = f"; nearest valid: {key.partition('=')[0]}={inside[0]}" if inside else ""
    raise UserError(f"{key}: holds no adapter; looked for {', '.join(WEIGHT_FILES)}{hint}")


def _read_config(folder: Path, key: str) -> dict:
    path = folder / "adapter_config.json"
    if not path.is_file():
        raise UserError(f"{key}: lacks adapter_config.json, which says how its matrices are scaled")
    content = read_json(path, way_out="write or download it again")
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not an adapter's settings")
    return content


def _check_settings(config: dict, model: nn.Module, key: str) -> None:
    for setting, ours in (
        ("use_dora", "use_dora"),
        ("use_rslora", "use_rslora"),
        ("r", "rank"),
        ("lora_alpha", "alpha"),
    ):
        value = config.get(setting) or False
        if value != model.lora[ours]:
            raise UserError(
                f"{key}: {setting} is {value} in its adapter_config.json, lora.{ours} is {model.lora[ours]}; "
                f"nearest valid: lora.{ours}={show(value)}"
            )


def _check_kind(config: dict, key: str) -> None:
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{key}: peft_type is {config['peft_type']}; recipes train LORA adapters only")
    for setting, what in CANNOT.items():
        if config.get(setting) and config[setting] != "none":
            raise UserError(f"{key}: {setting}={config[setting]} ({what}) is not available here; {MERGE}")
    for setting, kind in (("r", int), ("lora_alpha", float)):
        value = config.get(setting)
        if not fits(value, kind) or value <= 0:
            raise UserError(
                f"{key}: {setting} is {show(value)} in its adapter_config.json, must be {kind_words(kind)} above 0; "
                "write or download it again"
            )
    for setting in ("rank_pattern", "alpha_pattern"):
        if not _are_patterns(config.get(setting) or {}):
            raise UserError(
                f"{key}: {setting}={show(config[setting])} must be numbers by patterns of layers' names; write or "
                "download it again"
            )
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise UserError(
            f"{key}: init_lora_weights={start} changes the base weights, too; convert it to plain LoRA (PEFT's "
            f"save_pretrained with path_initial_model_for_weight_conversion), or {MERGE}"
        )


def _are_patterns(values) -> bool:
    try:
        return all(re.compile(pattern) and fits(value, float) and value > 0 for pattern, value in values.items())
    except (AttributeError, re.error):
        return False


def _check_layers(targets, model: nn.Module, family: Family, key: str) -> None:
    """`targets` may be endings of layers' names; a pattern is left to the matrices' names."""
    if not isinstance(targets, list):
        return
    modules = {target: _modules_of(target, family) for target in map(str, targets)}
    strange = sorted(target for target, found in modules.items() if not found)
    if strange:
        known = dict.fromkeys(m.theirs.rpartition(".")[2] for m in family.modules if m.is_adaptable)
        raise UserError(
            f"{key}: target_modules has {', '.join(strange)}; layers that can be adapted here are {', '.join(known)}"
        )
    found = [m for of_target in modules.values() for m in of_target]
    wanted = {models.without_numbers(part.name) for m in found for part in m.parts}
    if "output" in wanted and isinstance(model.output, TiedLinear):
        raise UserError(
            f"{key}: target_modules has the output layer, which is the embedding here (tied) and has no adapter; train "
            "one of other layers"
        )
    ours = {models.without_numbers(name) for name, _ in models.adapted_modules(model)}
    # Of a fused layer some parts may have no adapter: rows of zero, which are looked at later.
    untouched = [m for m in found if not ours & {models.without_numbers(part.name) for part in m.parts}]
    if untouched or not ours <= wanted:
        raise UserError(
            f"{key}: target_modules is {', '.join(sorted(modules))}, lora.modules is {_as_modules(ours, family)}; "
            f"nearest valid: lora.modules={_as_modules(wanted, family)}"
        )


def _modules_of(target: str, family: Family) -> list[Module]:
    """Returns the modules that a target, the end of a layer's name or the whole of it, stands for."""
    target = re.sub(r"\.\d+\.", ".{}.", target)
    found = [m for m in family.modules if any(f".{name}".endswith(f".{target}") for name in (m.theirs, m.adapted))]
    return [m for m in found if m.is_adaptable]


def _as_modules(layers: set[str], family: Family) -> str:
    """Returns what lora.modules says for these layers, the shortest way."""
    names = []
    for name in family.lora_names:
        if (ours := set(LORA_LAYERS[name])) <= layers:
            names.append(name)
            layers = layers - ours
    return f"[{', '.join([*names, *sorted(layers)])}]"


def _by_layer(found: dict[str, Tensor], base: ModelFolder, path: Path) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields PEFT's layers with their matrices, A and B, and magnitudes; weights of the base are compared with it."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, value in found.items():
        if match := _PEFT_NAME.fullmatch(name):
            layers.setdefault(match["layer"], {})[match["part"]] = value
        else:
            _check_base_weight(name, value, base, path)
    for layer, matrices in layers.items():
        if base.family.find_theirs(layer) is None:
            raise UserError(f"{path}: {layer} is no layer of {base.family.name}, which the base is")
        yield layer, matrices


@dataclass(frozen=True)
class _Layer:
    """One of PEFT's layers, cut into ours.

    Attributes:
        name: PEFT's.
        parts: Our layers in it that are adapted.
        a: [rank, in].
        rows: Of B, [out, rank], those of each part.
        magnitudes: Of each part, or nothing.
        rank, alpha: What adapter_config.json says of it.
    """

    name: str
    parts: list[str]
    a: Tensor
    rows: list[Tensor]
    magnitudes: list[Tensor]
    rank: int
    alpha: float


def _cut(
    layer: str, matrices: dict[str, Tensor], config: dict, model: nn.Module, base: ModelFolder, path: Path
) -> _Layer:
    """Returns one of PEFT's layers in parts.

    Raises:
        UserError: A matrix is missing or misshapen, or rows are adapted that the model has no adapter for.
    """
    module, ours = base.family.find_theirs(layer)
    rank, alpha = _scale_of(layer, config)
    if lacking := {"A", "B"} - matrices.keys():
        raise UserError(
            f"{path}: {layer}.lora_{lacking.pop()} is not in it, and the other matrix is; write or download it again"
        )
    a, b, magnitude = matrices["A"], matrices["B"], matrices.get("magnitude_vector")
    shapes = [list(a.shape), list(b.shape)]
    if [len(shape) for shape in shapes] != [2, 2] or not rank == shapes[0][0] == shapes[1][1]:
        raise UserError(
            f"{path}: {layer}.lora_A is {shapes[0]} and {layer}.lora_B {shapes[1]}, which is not rank {rank}, as "
            "adapter_config.json says; write or download the adapter again"
        )
    try:
        rows = module.split(b, base.config)
        magnitudes = [] if magnitude is None else module.split(magnitude.flatten(), base.config)
    except RuntimeError:
        also = "" if magnitude is None else f", or its magnitude {list(magnitude.shape)}"
        raise UserError(f"{path}: {layer}.lora_B is {shapes[1]}{also}: not rows of this base's heads") from None
    adapted = {name for name, _ in models.adapted_modules(model)}
    kept = [i for i, name in enumerate(ours) if name in adapted] or range(len(ours))  # what none adapts is told later
    if also := [name for i, name in enumerate(ours) if i not in kept and rows[i].any()]:
        raise UserError(f"{path}: {layer} adapts {', '.join(also)}, too; nearest valid: add it to lora.modules")
    return _Layer(
        layer,
        [ours[i] for i in kept],
        a,
        [rows[i] for i in kept],
        [magnitudes[i] for i in kept if magnitudes],
        rank,
        alpha,
    )


def _shared_scale(layers: list[_Layer], config: dict, key: str) -> dict:
    """Returns the `r` and `lora_alpha` that all layers have, which patterns may give to all of them.

    Raises:
        UserError: They differ between layers.
    """
    scales = {_in_blocks(layer, config) or (layer.rank, layer.alpha): layer.name for layer in layers}
    if len(scales) > 1:
        told = [f"{name} has rank {rank} and alpha {alpha:g}" for (rank, alpha), name in scales.items()]
        raise UserError(
            f"{key}: {', '.join(told[:2])} (rank_pattern, alpha_pattern); ranks and scales that differ between layers "
            f"are not available here; {MERGE}"
        )
    return dict(zip(("r", "lora_alpha"), *scales, strict=True)) if scales else {}


def _in_blocks(layer: _Layer, config: dict) -> tuple[int, float] | None:
    """Returns rank and alpha of each of our layers in a fused one where each has a block of its own, as we write it."""
    rank, alpha, power = config["r"], config["lora_alpha"], 0.5 if config.get("use_rslora") else 1
    same_scale = math.isclose(layer.alpha / layer.rank**power, alpha / rank**power, rel_tol=1e-6)
    return (rank, alpha) if layer.rank != rank and same_scale and _take_apart(layer, rank) else None


def _join(layers: list[_Layer], config: dict) -> dict[str, Tensor]:
    """Returns the matrices under our names."""
    converted = {}
    for layer in layers:
        rank, _ = _in_blocks(layer, config) or (layer.rank, layer.alpha)
        for name, (a, b) in zip(layer.parts, _take_apart(layer, rank), strict=True):
            converted |= {f"{name}.lora_a.weight": a, f"{name}.lora_b.weight": b}
        converted |= {f"{name}.magnitude": m for name, m in zip(layer.parts, layer.magnitudes, strict=False)}
    return converted


def _scale_of(layer: str, config: dict) -> tuple[int, float]:
    """Returns a layer's rank and alpha; PEFT's patterns are ends of its name, as regular expressions."""
    values = []
    for setting, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        special = (v for end, v in (config.get(pattern) or {}).items() if re.fullmatch(rf"(.*\.)?({end})", layer))
        values.append(next(special, config[setting]))
    return values[0], values[1]


def _take_apart(layer: _Layer, rank: int) -> list[tuple[Tensor, Tensor]] | None:
    """Returns A and B of this rank for each part; None if they are of another.

    Of a fused layer all may share A, which each then has a copy of; or each has a block of its own, as we write it.
    """
    a, rows = layer.a, layer.rows
    if len(a) == rank:
        return [(a, r) for r in rows]
    blocks = [slice(i * rank, (i + 1) * rank) for i in range(len(rows))]
    if len(a) != rank * len(rows):
        return None
    for r, own in zip(rows, blocks, strict=True):
        rest = r.clone()
        rest[:, own] = 0
        if rest.any():  # a part reads another one's A
            return None
    return [(a[own], r[:, own].contiguous()) for r, own in zip(rows, blocks, strict=True)]


def _check_base(folder: Path, base: ModelFolder, key: str) -> None:
    """Compares the base's weights with those that the adapter was trained on, if it is one of ours.

    Only files of the same names: a base that was cut into other shards may be the same one.
    """
    then = _read_record(folder / BASE_FILE).get("weights")
    if not isinstance(then, dict):
        return
    now = digest_samples(base.weight_files)
    if then.keys() == now.keys() and then != now:
        raise UserError(
            f"{key}: was trained on other weights than {base.path} holds, though under the same file names "
            f"({BASE_FILE}); name the folder that it was trained on as checkpointer.checkpoint_dir"
        )


def _check_base_weight(name: str, value: Tensor, base: ModelFolder, path: Path) -> None:
    """PEFT saves an output layer that it adapts, and if asked to embedding and output: they tell the base."""
    match = _BASE_WEIGHT.fullmatch(name)
    try:
        saved = base.family.to_ours(f"{match['layer']}.weight", value, base.config) if match else None
    except (KeyError, RuntimeError):
        saved = None
    if saved is None:
        raise UserError(f"{path}: {name} is no matrix of a LoRA adapter, and no weight of its base; {MERGE}")
    own = Weights(base)
    if not all(ours in own and _is_rounded(part, own[ours]) for ours, part in saved.items()):
        raise UserError(
            f"{path}: {match['layer']} is not the base model's layer; the adapter is of another base, or trained that "
            f"layer, too: {MERGE}"
        )


def _is_rounded(one: Tensor, other: Tensor) -> bool:
    """Returns whether they are the same but for one having been rounded to the other's dtype."""
    return torch.equal(one, other.to(one.dtype)) or torch.equal(one.to(other.dtype), other)


def _check_tensors(found: dict[str, Tensor], expected: dict[str, torch.Size], path: Path) -> None:
    for names, what in (
        (expected.keys() - found.keys(), "of the model's adapters are not in it"),
        (found.keys() - expected.keys(), "of its matrices are not in the model's adapters"),
    ):
        if names:
            raise UserError(
                f"{path}: {len(names)} {what}, such as {min(names)}: `model`, lora.modules and it do not "
                "belong together"
            )
    for name, value in found.items():
        if value.shape != expected[name]:
            raise UserError(
                f"{path}: {name} is {list(value.shape)} there and {list(expected[name])} in the model; lora.rank, or a "
                "base of another size"
            )
        if not value.isfinite().all():
            raise UserError(f"{path}: {name} holds NaN or infinite values; write or download it again")


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
    for name in dict.fromkeys(re.sub(r"\.(lora_[ab]\.weight|magnitude)$", "", key) for key in adapter):
        module, i, theirs = base.family.find_ours(name)
        theirs = module.loaded or theirs
        layers.setdefault(theirs, {})[i], modules[theirs] = name, module
    tensors, ranks = {}, {}
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
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "lora_dropout": lora["dropout"],
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
    """Returns the shortest ends of names that mean these layers and no others."""
    adapted = list(dict.fromkeys(module.adapted for module in modules.values()))
    others = [m.adapted for m in family.modules if m.adapted not in adapted]
    targets = []
    for theirs in adapted:
        pieces = theirs.split(".")
        ends = (".".join(pieces[-n:]) for n in range(1, len(pieces) + 1))
        targets.append(next(end for end in ends if not any(f".{other}".endswith(f".{end}") for other in others)))
    return list(dict.fromkeys(targets))


def _origin(base: ModelFolder) -> dict[str, str]:
    """Returns what PEFT's settings say of the base: its repository, and the commit if it is known, or its folder."""
    record = _read_record(base.path / REPO_ID_FILE)
    known = {key: record[key] for key in ("repo_id", "revision") if record.get(key) and isinstance(record[key], str)}
    if "repo_id" not in known:
        return {"base_model_name_or_path": str(base.path.resolve())}
    return {"base_model_name_or_path": known.pop("repo_id")} | known


def _read_record(path: Path) -> dict:
    """Returns what a file that no model needs says; nothing if it is not there, or none that we know."""
    try:
        content = read_json(path)
    except UserError:
        return {}
    return content if isinstance(content, dict) else {}
