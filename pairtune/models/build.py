"""Full, LoRA and QLoRA models from a torchtune builder, and what prepares them for pairs.

A model is built on the meta device, where size costs nothing and mistakes show, and gets its memory in `load`.
"""

import math
import re
from collections.abc import Callable, Mapping

import torch
from omegaconf import OmegaConf
from torch import nn
from torchtune.modules import MultiHeadAttention, TransformerDecoder
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params
from torchtune.training import set_default_dtype

from pairtune.config.components import check_component, instantiate
from pairtune.config.rules import LORA_LAYERS, OUR_LAYERS
from pairtune.errors import UserError
from pairtune.models import frozen_base
from pairtune.models.adapters import add_frozen_copy
from pairtune.models.additions import additions
from pairtune.models.bridge import roles
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.models.dora import DoRALinear
from pairtune.models.grouped import ExpertsLinear, LoRAExpertsLinear
from pairtune.process.dist import World

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Layers that QLoRA keeps as they are: the last word, who has it, what a kernel reads, what texts do not pass through.
UNQUANTIZED = {"output", "mlp.router", roles.READ, roles.TOWER}


def full(component: dict, *, dtype: str, quantize: bool = False, world: World | None = None) -> TransformerDecoder:
    """Returns the builder's model on the meta device, every parameter trainable that is not quantized.

    Args:
        component: The config's `model` block: `_component_`, a torchtune builder such as
            torchtune.models.llama3.llama3_8b, and its arguments.
        dtype: bf16 or fp32.
        quantize: Weights of all linear layers in NF4, not the output layer: for a reference, which is not trained.
        world: The processes that share these.

    Raises:
        UserError: The builder refuses its arguments, or the processes cannot share a model in NF4.
    """
    model = _build(component, dtype)
    if quantize:
        num_shards = _num_shards(world, "nf4", "reference.quantize=true")
        parts = parts_of(model)

        def make(name: str, layer: nn.Module) -> nn.Module | None:
            return None if UNQUANTIZED & parts[name] else frozen_base.hold(_without_adapter(layer), "nf4", num_shards)

        _replace_linear(model, dtype, make)
    return model


def lora(
    component: dict,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: list[str],
    dtype: str,
    use_dora: bool = False,
    use_rslora: bool = False,
    quantize_base: bool = False,
    base_dtype: str = "nf4",
    frozen_copy: bool = False,
    world: World | None = None,
) -> TransformerDecoder:
    """Returns the same model with LoRA adapters (arXiv 2106.09685), on the meta device; only they are trainable.

    `model.pairtune.lora` has their settings.

    Args:
        component: As for `full`: the base builder; adapters are put into what it builds.
        modules: Which layers have adapters: keys of rules.LORA_LAYERS.
        use_dora: DoRA (arXiv 2402.09353): each row of an adapted weight has a magnitude besides.
        use_rslora: rsLoRA (arXiv 2312.03732): scaled by alpha / sqrt(rank), not alpha / rank.
        quantize_base: Base weights of all linear layers in fewer bits (QLoRA, arXiv 2305.14314) but UNQUANTIZED.
        base_dtype: In which, then: nf4, int8 or fp8.
        frozen_copy: Room for a second set of adapters, which `load` makes a copy of the first: AdapterCopy.
        world: The processes that share these.

    Raises:
        UserError: An argument or a layer that there is not in the model, or processes that cannot share a base in NF4.
    """
    _check_base(component["_component_"])
    model, scaled = _build(component, dtype), alpha * math.sqrt(rank) if use_rslora else alpha
    num_shards = _num_shards(world, base_dtype, "QLoRA") if quantize_base else 1
    parts = parts_of(model)
    adapted = _layers_of(modules, model, parts)

    def make(name: str, layer: nn.Module) -> nn.Module | None:
        packed = quantize_base and not UNQUANTIZED & parts[name]
        if name not in adapted:
            made = _without_adapter(layer) if packed else None
        else:
            kind = DoRALinear if use_dora else frozen_base.FrozenLoRALinear if packed else LoRALinear
            made = _with_adapter(kind, layer, rank, scaled, dropout)
        return frozen_base.hold(made, base_dtype, num_shards) if packed else made

    _replace_linear(model, dtype, make)
    additions(model).lora = {
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "use_dora": use_dora,
        "use_rslora": use_rslora,
        "modules": modules,
    }
    if frozen_copy:
        add_frozen_copy(model)
    set_trainable_params(model, get_adapter_params(model))
    return model


def _check_base(path: str) -> None:
    name = path.rpartition(".")[2]
    if name.startswith(("lora_", "qlora_")):
        raise UserError(
            f"model._component_={path}: name the base builder ({name.split('_', 1)[1]}); the recipe adds LoRA"
        )


def qlora(component: dict, **settings) -> TransformerDecoder:
    """Returns `lora` over a base whose linear layers are in 4 or 8 bits (QLoRA, arXiv 2305.14314)."""
    return lora(component, **settings, quantize_base=True)


def policy(
    method: str,
    component: dict,
    adapters: Mapping | None,
    *,
    dtype: str,
    base_dtype: str = "nf4",
    frozen_copy: bool = False,
    world: World | None = None,
) -> TransformerDecoder:
    """Returns the model that the recipes of a method train: of `full`, `lora` or `qlora`.

    Args:
        adapters: The config's `lora` block; None for full.
        base_dtype: Of QLoRA's base.
    """
    if method == "full":
        return full(component, dtype=dtype)
    settings = {**adapters, "dtype": dtype, "frozen_copy": frozen_copy, "world": world}
    return lora(component, **settings, quantize_base=method == "qlora", base_dtype=base_dtype)


def parts_of(model: nn.Module) -> dict[str, set[str]]:
    """Returns, by the name of each linear layer, what it computes, in the words of rules.LORA_LAYERS."""
    if isinstance(model, BridgedDecoder):
        return roles.parts_of(model)
    return {name: {without_numbers(name)} for name, m in model.named_modules() if type(m) is nn.Linear}


def _replace_linear(model: TransformerDecoder, dtype: str, make: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Puts what `make` gives for a name and a layer in the place of each linear layer; None leaves it."""
    with torch.device("meta"), set_default_dtype(DTYPES[dtype]):
        for name, layer in [(n, m) for n, m in model.named_modules() if type(m) in (nn.Linear, ExpertsLinear)]:
            made = make(name, layer)
            if made is not None:
                model.set_submodule(name, made)


def _with_adapter(kind: type, layer: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
    """Returns a layer of this kind in the place of another; experts have one of their own."""
    if not isinstance(layer, ExpertsLinear):
        return kind(layer.in_features, layer.out_features, rank, alpha, dropout, use_bias=layer.bias is not None)
    if kind is DoRALinear:
        raise UserError(
            "lora.use_dora=true: experts' matrices have no magnitudes here, nor in PEFT; nearest valid: "
            "lora.use_dora=false, or lora.modules without those of experts: [q_proj,k_proj,v_proj,output_proj]"
        )
    return LoRAExpertsLinear(layer.shape, layer.transposed, rank, alpha, dropout)


def _without_adapter(layer: nn.Module) -> nn.Module:
    if isinstance(layer, ExpertsLinear):
        return ExpertsLinear(layer.shape, layer.transposed)
    return frozen_base.FrozenLinear(layer.in_features, layer.out_features, layer.bias is not None)


def _layers_of(modules: list[str], model: nn.Module, parts: dict[str, set[str]]) -> set[str]:
    """Returns the full names of the linear layers that lora.modules means."""
    is_tied = isinstance(model, BridgedDecoder) and model.is_tied
    found, all_parts = {}, set().union(*parts.values())
    for module in modules:
        wanted = set(LORA_LAYERS[module])
        found[module] = {name for name, of_layer in parts.items() if wanted & of_layer}
        if isinstance(model, BridgedDecoder) and module == "all-linear":
            found[module] = {name for name, of_layer in parts.items() if not UNQUANTIZED & of_layer}
        if wanted == {"output"} and (is_tied or not found[module]):
            raise UserError(f"lora.modules: {module}: the output layer is the embedding (tied), which has no adapter")
        if not found[module]:
            there = [known for known in OUR_LAYERS if set(LORA_LAYERS[known]) & all_parts]
            raise UserError(f"lora.modules: {module}: this model has no such layer; it has {', '.join(there)}")
    adapted = set().union(*found.values())
    if isinstance(model, BridgedDecoder):
        roles.check_whole(modules, {name: parts[name] for name in adapted})
    return adapted


def without_numbers(layer: str) -> str:
    """Returns attn.q_proj for layers.3.attn.q_proj: what is alike in all layers; mlp.w1 for all experts' w1."""
    return re.sub(r"^layers\.(\d+|{})\.|(\.experts)?\.(\d+|{})(?=\.)", "", layer)


def _build(component: dict, dtype: str) -> TransformerDecoder:
    block = OmegaConf.to_container(component, resolve=True) if OmegaConf.is_config(component) else dict(component)
    check_component("model", block)
    with torch.device("meta"), set_default_dtype(DTYPES[dtype]):
        return instantiate(block)


def _num_shards(world: World | None, base_dtype: str, what: str) -> int:
    """Returns into how many parts FSDP2 cuts a weight in fewer bits.

    Raises:
        UserError: Some processes would hold the same part of one in NF4.
    """
    if base_dtype == "nf4" and world and world.shards and (world.num_shards == 1 or world.num_shards < world.size):
        raise UserError(
            f"{what}: NF4 weights are sharded over all processes or not at all; nearest valid: "
            "data_parallel_replicate_dim=1, and fsdp_cpu_offload=false in a run of one process"
        )
    return world.num_shards if world else 1


def disable_dropout(model: nn.Module) -> bool:
    """Sets every dropout probability to zero; returns whether any was above."""
    found = isinstance(model, BridgedDecoder) and model.disable_dropout()
    for module in model.modules():
        for name in ("p", "attn_dropout"):
            if isinstance(module, (nn.Dropout, MultiHeadAttention)) and getattr(module, name, 0.0) > 0.0:
                setattr(module, name, 0.0)
                found = True
    return found


def dtype_of(model: TransformerDecoder) -> str:
    """Returns the name, bf16 or fp32, of the dtype that a model was built with."""
    dtype = model.tok_embeddings.weight.dtype
    return next(name for name, known in DTYPES.items() if known == dtype)
