"""Full, LoRA and QLoRA models from a torchtune builder: build, prepare, load, shard, gather, merge.

A model is built on the meta device, where size costs nothing and mistakes show, and gets its memory in `load`.
"""

import inspect
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy

import torch
import torch.distributed as torch_dist
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.low_precision import FrozenNF4Linear
from torchtune.modules.peft import LoRALinear, disable_adapter, get_adapter_params, set_trainable_params
from torchtune.training import compile_model, set_activation_checkpointing, set_default_dtype

from pairtune.config.rules import LORA_LAYERS, OUR_LAYERS
from pairtune.dist import World
from pairtune.errors import UserError, listed
from pairtune.models import logps
from pairtune.models.dora import DoRALinear, row_norms

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NF4_BLOCK = 64 * 256  # torchao quantizes scales of 256 blocks of 64 weights together
_WRAPPED = "_checkpoint_wrapped_module."
COPIES = {  # an adapter's parameters, and where a frozen copy of them is
    "lora_a.weight": "frozen_a.weight",
    "lora_b.weight": "frozen_b.weight",
    "magnitude": "frozen_magnitude",
}
UNQUANTIZED = ("output", "mlp.router")  # layers that QLoRA keeps as they are: the last word, and who has it
_STRANGERS = "`model` and `checkpointer.checkpoint_dir` do not belong together"


def full(component: dict, *, dtype: str, quantize: bool = False, world: World | None = None) -> TransformerDecoder:
    """Returns the builder's model on the meta device, every parameter trainable that is not quantized.

    Args:
        component: The config's `model` block: `_component_`, a torchtune builder such as
            torchtune.models.llama3.llama3_8b, and its arguments.
        dtype: bf16 or fp32.
        quantize: Weights of all linear layers in NF4, not the output layer: for a reference, which is not trained.
        world: The processes that share these.

    Raises:
        UserError: The builder refuses its arguments, or a weight's size is none that NF4 accepts.
    """
    path, arguments = _split(component)
    model = _build(path, arguments, dtype)
    if quantize:
        _check_nf4(model, world, "reference.quantize=true", way_out="reference.quantize=false")
        _replace_linear(model, dtype, _quantized)
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
    frozen_copy: bool = False,
    world: World | None = None,
) -> TransformerDecoder:
    """Returns the same model with LoRA adapters (arXiv 2106.09685), on the meta device; only they are trainable.

    It keeps `lora`, their settings.

    Args:
        component: As for `full`: the base builder; adapters are put into what it builds.
        modules: Which layers have adapters: keys of rules.LORA_LAYERS.
        use_dora: DoRA (arXiv 2402.09353): each row of an adapted weight has a magnitude besides.
        use_rslora: rsLoRA (arXiv 2312.03732): scaled by alpha / sqrt(rank), not alpha / rank.
        quantize_base: Base weights of all linear layers in NF4 (QLoRA, arXiv 2305.14314) but UNQUANTIZED.
        frozen_copy: Room for a second set of adapters, which `load` makes a copy of the first: reference.AdapterCopy.
        world: The processes that share these.

    Raises:
        UserError: An argument that the builder does not take, a layer that the model does not have, or a weight whose
            size NF4 does not accept.
    """
    path, arguments = _split(component)
    name = path.rpartition(".")[2]
    if name.startswith(("lora_", "qlora_")):
        raise UserError(
            f"model._component_={path}: name the base builder ({name.split('_', 1)[1]}); the recipe adds LoRA"
        )
    model = _build(path, arguments, dtype)
    if quantize_base:
        _check_nf4(model, world, "QLoRA", way_out="a lora_ recipe")
    adapted = _layers_of(modules, model)

    def make(name: str, in_dim: int, out_dim: int, biased: bool) -> nn.Module | None:
        if name not in adapted:
            return _quantized(name, in_dim, out_dim, biased) if quantize_base else None
        options = {"use_bias": biased, "quantize_base": quantize_base and without_numbers(name) not in UNQUANTIZED}
        scaled = alpha * math.sqrt(rank) if use_rslora else alpha
        layer = (DoRALinear if use_dora else LoRALinear)(in_dim, out_dim, rank, scaled, dropout, **options)
        layer.rank, layer.alpha = rank, scaled  # DoRA's has their ratio only
        return layer

    _replace_linear(model, dtype, make)
    model.lora = {"rank": rank, "alpha": alpha, "use_dora": use_dora, "use_rslora": use_rslora, "modules": modules}
    if frozen_copy:
        _add_frozen_copy(model)
    set_trainable_params(model, get_adapter_params(model))
    return model


def _quantized(name: str, in_dim: int, out_dim: int, biased: bool) -> nn.Module | None:
    return None if without_numbers(name) in UNQUANTIZED else FrozenNF4Linear(in_dim, out_dim, bias=biased)


def _replace_linear(
    model: TransformerDecoder, dtype: str, make: Callable[[str, int, int, bool], nn.Module | None]
) -> None:
    """Puts what `make` gives for a name, sizes and bias in the place of each linear layer; None leaves it.

    Layers are alike: each kind is made once and copied, since torchao takes up to a second to quantize a weight, even
    on the meta device.
    """
    made: dict[tuple, nn.Module | None] = {}
    with torch.device("meta"), set_default_dtype(DTYPES[dtype]):
        for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
            sizes = (linear.in_features, linear.out_features, linear.bias is not None)
            kind = (without_numbers(name), *sizes)
            if kind not in made:
                made[kind] = make(name, *sizes)
            if made[kind] is not None:
                model.set_submodule(name, _copy(made[kind]))


def _copy(layer: nn.Linear | LoRALinear) -> nn.Module:
    """Returns a layer with parameters of its own; torchao's copy of an NF4 weight would quantize it again."""
    weight = layer.weight
    if not isinstance(weight, NF4Tensor):
        return deepcopy(layer)
    pieces, form = weight.__tensor_flatten__()
    pieces = {name: torch.empty_like(getattr(weight, name)) for name in pieces}
    twin = NF4Tensor.__tensor_unflatten__(pieces, form, None, None)
    return deepcopy(layer, {id(weight): nn.Parameter(twin, requires_grad=False)})


def _layers_of(modules: list[str], model: TransformerDecoder) -> set[str]:
    """Returns the full names of the linear layers that lora.modules means."""
    linear = {name: without_numbers(name) for name, m in model.named_modules() if type(m) is nn.Linear}
    found = {}
    for module in modules:
        found[module] = {name for name, plain in linear.items() if plain in LORA_LAYERS[module]}
        if found[module]:
            continue
        if module in ("output", "lm_head"):
            raise UserError(f"lora.modules: {module}: the output layer is the embedding (tied), which has no adapter")
        there = [known for known in OUR_LAYERS if set(LORA_LAYERS[known]) & set(linear.values())]
        raise UserError(f"lora.modules: {module}: this model has no such layer; it has {', '.join(there)}")
    return set().union(*found.values())


def without_numbers(layer: str) -> str:
    """Returns attn.q_proj for layers.3.attn.q_proj: what is alike in all layers; mlp.w1 for all experts' w1."""
    return re.sub(r"^layers\.(\d+|{})\.|(\.experts)?\.(\d+|{})(?=\.)", "", layer)


def _add_frozen_copy(model: nn.Module) -> None:
    """The copy's parameters are beside the trained ones: sharded and offloaded with them."""
    for _, module in adapted_modules(model):
        module.frozen_a, module.frozen_b = deepcopy(module.lora_a), deepcopy(module.lora_b)
        if isinstance(module, DoRALinear):
            module.frozen_magnitude = nn.Parameter(torch.empty_like(module.magnitude))


def copied_parameters(module: LoRALinear | DoRALinear) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yields a layer's trained parameters by name, each with its frozen copy; nothing where there is no copy."""
    if hasattr(module, "frozen_a"):
        for name in module.adapter_params():
            yield name, module.get_parameter(name), module.get_parameter(COPIES[name])


def _split(component: dict) -> tuple[str, dict]:
    arguments = OmegaConf.to_container(component) if OmegaConf.is_config(component) else dict(component)
    return arguments.pop("_component_"), arguments


def _build(path: str, arguments: dict, dtype: str) -> TransformerDecoder:
    try:
        builder = _get_component_from_path(path)
    except Exception as error:
        raise UserError(f"model._component_={path}: cannot be imported: {str(error).splitlines()[-1]}") from None
    unknown = [name for name in arguments if name not in inspect.signature(builder).parameters]
    if unknown:
        raise UserError(
            f"model: {path.rsplit('.', 1)[-1]} takes no {unknown[0]}; it takes "
            f"{', '.join(inspect.signature(builder).parameters)}"
        )
    try:
        with torch.device("meta"), set_default_dtype(DTYPES[dtype]):
            return builder(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model: {path.rsplit('.', 1)[-1]} refuses its arguments: {error}") from None


def _check_nf4(model: nn.Module, world: World | None, what: str, *, way_out: str) -> None:
    num_shards = world.num_shards if world else 1
    multiple = NF4_BLOCK * num_shards
    for name, module in model.layers.named_modules():
        quantized = isinstance(module, nn.Linear) and without_numbers(f"layers.{name}") not in UNQUANTIZED
        if quantized and module.weight.numel() % multiple:
            rows, columns = module.weight.shape
            shards = f" on each of {num_shards} processes" if num_shards > 1 else ""
            raise UserError(
                f"{what}: layers.{name}.weight has {rows} x {columns} = {rows * columns} values; NF4 stores multiples "
                f"of {NF4_BLOCK}{shards}. Use {way_out} for this model{', or fewer processes' if shards else ''}"
            )
    if world and world.shards and (num_shards == 1 or num_shards < world.size):
        raise UserError(
            f"{what}: NF4 weights are sharded over all processes or not at all; nearest valid: "
            "data_parallel_replicate_dim=1, and fsdp_cpu_offload=false in a run of one process"
        )


def prepare(
    model: TransformerDecoder,
    *,
    max_length: int,
    vocab_size: int = 0,
    attention: str = "auto",
    windows: Sequence[int | None] | None = None,
    checkpoint_activations: bool = False,
    compile_layers: bool = False,
) -> None:
    """Makes the model return answers' log-probabilities (logps.answer_logps) and take rows longer than its positions.

    Args:
        max_length: Tokens of the longest conversation.
        vocab_size: Token ids that the tokenizer can produce.
        attention: segments, mask, or auto: mask with `compile_layers`, which wants few shapes, else segments.
        windows: How far each layer looks back, from check_model.windows; None: no layer has a sliding window.
        checkpoint_activations: Keep only each layer's input for backward and compute the rest again: less memory,
            about a third more work.
        compile_layers: torch.compile layer by layer, so that compile time does not grow with depth.

    Raises:
        UserError: The model has fewer positions or embeddings than that, or cannot attend that way.
    """
    if max_length > model.max_seq_len:
        raise UserError(
            f"max_length={max_length}: the model has {model.max_seq_len} positions; "
            f"nearest valid: max_length={model.max_seq_len}"
        )
    if vocab_size > model.tok_embeddings.num_embeddings:
        raise UserError(
            f"tokenizer: has {vocab_size} token ids, the model embeds {model.tok_embeddings.num_embeddings}: "
            "`tokenizer` and `model` do not belong together"
        )
    if compile_layers and attention == "segments":
        raise UserError(
            "attention=segments: compile=true would compile anew for each batch; nearest valid: attention=auto"
        )
    # A row holds several documents, each with positions of its own, all below max_length.
    model.num_positions, model.max_seq_len = model.max_seq_len, 2**31
    logps.install(model, "mask" if attention == "mask" or compile_layers else "segments", windows)
    if checkpoint_activations:
        set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})
    if compile_layers:
        # A layer is compiled for each kind of forward: with gradients and without, adapters on and off, the first
        # layer's input, a few shapes. Beyond torch's limit of 8 it would not be compiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        compile_model(model, verbose=False)


def disable_dropout(model: nn.Module) -> bool:
    """Sets every dropout probability to zero; returns whether any was above."""
    found = False
    for module in model.modules():
        for name in ("p", "attn_dropout"):
            if isinstance(module, (nn.Dropout, MultiHeadAttention)) and getattr(module, name, 0.0) > 0.0:
                setattr(module, name, 0.0)
                found = True
    return found


def load(
    model: TransformerDecoder,
    state_dict: Mapping[str, Tensor],
    *,
    world: World,
    adapter: Mapping[str, Tensor] | None = None,
) -> None:
    """Fills a model built on the meta device, base weights from `state_dict`, and shards it.

    Weights take the model's dtype; NF4 ones are quantized from the checkpoint's values on the device. Adapters are
    `adapter`'s or, without it, initialised from torch's global generator: seed it before, alike in every process. In a
    distributed world each layer is sharded (FSDP2) as soon as it is filled, so that a process never holds more than its
    shards and one layer.

    Args:
        state_dict: The whole checkpoint under torchtune's names, in each process: checkpoint.Weights.
        adapter: What the adapters start from, whole, in each process: adapters.read_adapter.

    Raises:
        UserError: The checkpoint lacks a weight, has one too many, or one of another shape.
    """
    home = torch.device("cpu") if world.cpu_offload else world.device
    adapters = adapter_shapes(model).keys()
    assert adapter is None or adapter.keys() == adapters, "adapters.read_adapter knows the model's adapters"
    check_weights(model, state_dict)
    names = {id(module): plain_name(name) for name, module in model.named_modules()}
    for block in [*model.layers, model]:
        world.beat("loading weights")
        for module in block.modules():
            _fill(module, names[id(module)], state_dict, home, world.device)
            if isinstance(module, (LoRALinear, DoRALinear)) and module.lora_a.weight.is_meta:
                _fill_adapter(module, names[id(module)], adapter, home)
        if world.shards:
            _shard(block, world, is_root=block is model)


@contextmanager
def streamed(model: TransformerDecoder, weights: Mapping[str, Tensor], device: torch.device) -> Iterator[nn.Module]:
    """Lets a model on the meta device compute with one layer's weights in memory at a time: slow, for a forward or two.

    Args:
        model: From `full`, prepared without activation checkpointing and compilation.
        weights: As for `load`.

    Raises:
        UserError: As `load`.
    """
    check_weights(model, weights)
    names = {id(module): name for name, module in model.named_modules()}

    def fill(block: nn.Module, *_) -> None:
        for module in block.modules():
            _fill(module, names[id(module)], weights, device, device)

    def empty(block: nn.Module, *_) -> None:
        for module in block.modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))

    hooks = [layer.register_forward_pre_hook(fill) for layer in model.layers]
    hooks += [layer.register_forward_hook(empty) for layer in model.layers]
    in_layers = {id(module) for layer in model.layers for module in layer.modules()}
    for module in model.modules():
        if id(module) not in in_layers:
            _fill(module, names[id(module)], weights, device, device)
    try:
        with frozen(model):
            yield model
    finally:
        for hook in hooks:
            hook.remove()


def plain_name(name: str) -> str:
    """Returns a module's or parameter's name without what activation checkpointing wraps around it."""
    return name.replace(_WRAPPED, "").removesuffix("." + _WRAPPED[:-1])


def check_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Compares names and shapes with a model's, adapters left out; no value is read.

    Raises:
        UserError: They differ. All that does is listed, under the names of both sides.
    """
    adapters = adapter_shapes(model).keys()
    expected = {name: parameter.shape for name, parameter in _own_parameters(model) if name not in adapters}
    found = {name: value.shape for name, value in getattr(weights, "empty", weights).items()}
    lines = [f"not in the checkpoint: {_both(name, weights)}" for name in sorted(expected.keys() - found.keys())]
    lines += [f"not in the model: {_both(name, weights)}" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            shapes = f"{list(found[name])} in the checkpoint, {list(expected[name])} in the model"
            lines.append(f"{shapes}: {_both(name, weights)}")
    if lines:
        raise UserError(f"checkpointer: {len(lines)} weights do not fit: {_STRANGERS}\n{listed(lines)}")


def _both(name: str, weights: Mapping[str, Tensor]) -> str:
    theirs = weights.name_of(name) if hasattr(weights, "name_of") else name
    return name if theirs == name else f"{name} ({theirs} in the folder)"


def _fill(module: nn.Module, name: str, state_dict: Mapping[str, Tensor], home: torch.device, device: torch.device):
    """Gives one module, not its children, its memory; a module that has it already is left alone."""
    for leaf, parameter in list(module.named_parameters(recurse=False)):
        full_name = f"{name}.{leaf}" if name else leaf
        value = state_dict.get(full_name) if parameter.is_meta else None
        if value is None:
            continue
        # A transposed matrix is a view of what is on the disk; FSDP2 and NF4 want rows that lie one behind the other.
        value = value.to(device=home, dtype=parameter.dtype, copy=True, memory_format=torch.contiguous_format)
        if isinstance(parameter, NF4Tensor):
            value = to_nf4(value, parameter.block_size, parameter.scaler_block_size)
        setattr(module, leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    # A rope of Llama 3.1 and later leaves its buffers out on the meta device. They stay on the device when offloading.
    if hasattr(module, "rope_init") and all(buffer.is_meta for buffer in module.buffers()):
        with device:
            module.rope_init()


@torch.no_grad()
def _fill_adapter(
    module: LoRALinear | DoRALinear, name: str, adapter: Mapping[str, Tensor] | None, home: torch.device
) -> None:
    module.lora_a.to_empty(device=home)
    module.lora_b.to_empty(device=home)
    if isinstance(module, DoRALinear):
        module.magnitude = nn.Parameter(torch.empty_like(module.magnitude, device=home))
    if adapter is None:
        module.initialize_parameters()
        if isinstance(module, DoRALinear):
            module.initialize_dora_magnitude()
    else:
        for leaf in module.adapter_params():
            module.get_parameter(leaf).copy_(adapter[f"{name}.{leaf}"])
    if hasattr(module, "frozen_a"):
        module.frozen_a.to_empty(device=home)
        module.frozen_b.to_empty(device=home)
        if isinstance(module, DoRALinear):
            frozen = torch.empty_like(module.frozen_magnitude, device=home)
            module.frozen_magnitude = nn.Parameter(frozen, requires_grad=False)
        for _, trained, copy in copied_parameters(module):
            copy.copy_(trained)


def _shard(block: nn.Module, world: World, *, is_root: bool) -> None:
    offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if world.cpu_offload else OffloadPolicy()
    fully_shard(
        block,
        mesh=world.mesh,
        mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),
        # A layer's weights are gathered again for its backward. The root's, embedding and output, are needed at the end
        # of forward and the beginning of backward: gathering them twice would be for nothing, unless there is none.
        reshard_after_forward=not (is_root and any(p.requires_grad for p in block.parameters())),
        offload_policy=offload,
    )


@contextmanager
def reference_of(model: nn.Module):
    """Makes a LoRA model its base: adapters off, no dropout, no gradients."""
    with disable_adapter(model), frozen(model):
        yield model


@contextmanager
def frozen_copy_of(model: nn.Module):
    """Makes a LoRA model with a frozen copy the model of that copy: its adapters, no dropout, no gradients.

    Modules change places, and no number does: what autograd keeps of the policy for its backward stays as it is, and a
    checkpointed layer that is computed again in backward is the policy's. FSDP2 puts gathered parameters where it found
    them, so magnitudes, which have no module of their own, are chosen by the layer.
    """
    adapted = [module for _, module in adapted_modules(model)]
    _swap_copies(adapted)
    try:
        with frozen(model):
            yield model
    finally:
        _swap_copies(adapted)


def _swap_copies(adapted: list[nn.Module]) -> None:
    for module in adapted:
        module.lora_a, module.frozen_a = module.frozen_a, module.lora_a
        module.lora_b, module.frozen_b = module.frozen_b, module.lora_b
        if isinstance(module, DoRALinear):
            module.reads_frozen = not module.reads_frozen


@contextmanager
def frozen(model: nn.Module):
    """Makes a model one without dropout and gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


def adapted_modules(model: nn.Module) -> list[tuple[str, LoRALinear | DoRALinear]]:
    """Returns the layers that have adapters, and their names in torchtune's checkpoints."""
    found = ((plain_name(name), module) for name, module in model.named_modules())
    return [(name, module) for name, module in found if isinstance(module, (LoRALinear, DoRALinear))]


def adapter_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Returns the shapes of the adapters' parameters, by their names in torchtune's checkpoints."""
    return {plain_name(name): parameter.shape for name, parameter in get_adapter_params(model).items()}


def forget_gathered(model: nn.Module) -> None:
    """Shows shards again where FSDP2's root still shows the whole weights of the last forward."""
    if isinstance(model, FSDPModule):
        model.reshard()


def sync_gradients(model: nn.Module, sync: bool) -> None:
    """Says whether the next backward adds gradients up over processes; a step's last one has to."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scales gradients down to a norm of `max_norm` over all parameters and processes; returns what it was before."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters the model has, a frozen copy of adapters left out, and how many are trained."""
    sizes = [(p.numel(), p.requires_grad) for _, p in _own_parameters(model)]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _own_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by their names in torchtune's checkpoints, a frozen copy of adapters left out."""
    for name, parameter in model.named_parameters():
        if not plain_name(name).endswith(tuple(f".{copy}" for copy in COPIES.values())):
            yield plain_name(name), parameter


def _whole_parameters(model: nn.Module, wanted: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The same, or those that are wanted, gathered from all processes; NF4 ones as plain values."""
    for name, parameter in _own_parameters(model):
        if wanted is not None and name not in wanted:
            continue
        value = parameter.data
        if isinstance(value, DTensor):
            local = value.to_local()
            value = _gather_nf4(local, value.device_mesh) if isinstance(local, NF4Tensor) else value.full_tensor()
        yield name, value.get_original_weight() if isinstance(value, NF4Tensor) else value


def _gather_nf4(shard: NF4Tensor, mesh: DeviceMesh) -> NF4Tensor:
    """DTensor cannot gather NF4; the hooks that FSDP2 gathers it with can."""
    group = mesh.get_group("shard")
    pieces, metadata = shard.fsdp_pre_all_gather(mesh)
    whole = []
    for piece in pieces:
        gathered = piece.new_empty(piece.shape[0] * group.size(), *piece.shape[1:])
        torch_dist.all_gather_into_tensor(gathered, piece.contiguous(), group=group)
        whole.append(gathered)
    return shard.fsdp_post_all_gather(tuple(whole), metadata, shard.dtype)[0]


@torch.no_grad()
def gather_weights(model: nn.Module, world: World, *, adapters_only: bool = False) -> dict[str, Tensor]:
    """Returns the whole parameters on the CPU, in the main process; elsewhere nothing. Every process has to call it.

    NF4 weights come back dequantized: as what was trained on.
    """
    weights, wanted = {}, adapter_shapes(model).keys() if adapters_only else None
    for name, value in _whole_parameters(model, wanted):
        world.beat("gathering weights")
        if world.is_main:
            value = value.cpu()
            is_part = value.untyped_storage().nbytes() > value.nbytes  # of a padded one: gathered from uneven shards
            weights[name] = value.clone() if is_part else value
    return weights


def on_base(adapters: dict[str, Tensor], base: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Returns a base's weights, as they were before they were quantized, and gathered adapters.

    Args:
        base: checkpoint.Weights; what has this dtype stays where it is, on the disk.
    """
    return {name: base[name].to(DTYPES[dtype]) for name in base} | adapters


@torch.no_grad()
def merge_adapters(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns gathered weights with W + (alpha / rank) B A in the place of each adapted W, summed in float32.

    DoRA's rows are scaled to their magnitudes.

    QLoRA: gathered W is what was trained on, so the merged model is the trained policy; of `on_base` it is
    one that the adapters were not trained on, and W without its rounding to 4 bits. `model` tells alpha and rank only.
    """
    weights = dict(weights)
    for name, module in adapted_modules(model):
        a, b = weights.pop(f"{name}.lora_a.weight"), weights.pop(f"{name}.lora_b.weight")
        weight, scaling = weights[f"{name}.weight"], module.alpha / module.rank
        merged = weight.float() + scaling * (b.float() @ a.float())
        if isinstance(module, DoRALinear):
            magnitude = weights.pop(f"{name}.magnitude").float()
            merged *= (magnitude / row_norms(weight, a, b, scaling))[:, None]
        weights[f"{name}.weight"] = merged.to(weight.dtype)
    return weights


def only_adapters(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the adapters among gathered weights, under torchtune's names; none for a model without."""
    names = adapter_shapes(model)
    return {name: value for name, value in weights.items() if name in names}
