"""Full, LoRA and QLoRA models from a torchtune builder; load, merge. The only module that knows torchtune's internals.

A model is built on the meta device, where size costs nothing and mistakes show, and gets its memory in `load`.
"""

import copy
import inspect
from collections.abc import Iterator

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.config._utils import _get_component_from_path
from torchtune.modules import MultiHeadAttention, TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params
from torchtune.training import compile_model, set_activation_checkpointing, set_default_dtype

from pairtune import logps
from pairtune.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
NF4_BLOCK = 64 * 256  # torchao quantizes scales of 256 blocks of 64 weights together
_WRAPPED = "_checkpoint_wrapped_module."


def full(component: dict, *, dtype: str) -> TransformerDecoder:
    """Returns the builder's model on the meta device, every parameter trainable.

    Args:
        component: The config's `model` block: `_component_`, a torchtune builder such as
            torchtune.models.llama3.llama3_8b, and its arguments.
        dtype: bf16 or fp32.

    Raises:
        UserError: The builder refuses its arguments.
    """
    path, arguments = _split(component)
    return _build(path, arguments, dtype)


def lora(
    component: dict,
    *,
    rank: int,
    alpha: float,
    dropout: float,
    modules: list[str],
    dtype: str,
    quantize_base: bool = False,
) -> TransformerDecoder:
    """Returns the same model with LoRA adapters (arXiv 2106.09685), on the meta device; only they are trainable.

    Args:
        component: As for `full`: the base builder, whose lora_ twin is used.
        modules: From q_proj, k_proj, v_proj, output_proj, mlp (all of its linear layers) and output.
        quantize_base: Base weights of all linear layers in NF4 (QLoRA, arXiv 2305.14314); not the output layer.

    Raises:
        UserError: No lora_ twin, an argument that it does not take, or a weight whose size NF4 does not accept.
    """
    path, arguments = _split(component)
    if quantize_base:
        _check_nf4_sizes(_build(path, arguments, dtype))
    package, _, name = path.rpartition(".")
    if name.startswith(("lora_", "qlora_")):
        raise UserError(
            f"model._component_={path}: name the base builder ({name.split('_', 1)[1]}); the recipe adds LoRA"
        )
    path = f"{package}.lora_{name}"
    adapters = {
        "lora_attn_modules": [m for m in modules if m not in ("mlp", "output")],
        "apply_lora_to_mlp": "mlp" in modules,
        "lora_rank": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "quantize_base": quantize_base,
    }
    if "output" in modules:
        adapters["apply_lora_to_output"] = True
    model = _build(path, {**arguments, **adapters}, dtype)
    set_trainable_params(model, get_adapter_params(model))
    return model


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
            f"model: {path.rsplit('.', 1)[-1]} takes no {unknown[0]} (with lora.modules=[output] or tied embeddings "
            f"this is lora on the output layer); it takes {', '.join(inspect.signature(builder).parameters)}"
        )
    try:
        with torch.device("meta"), set_default_dtype(DTYPES[dtype]):
            return builder(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"model: {path.rsplit('.', 1)[-1]} refuses its arguments: {error}") from None


def _check_nf4_sizes(model: nn.Module) -> None:
    for name, module in model.layers.named_modules():
        if isinstance(module, nn.Linear) and module.weight.numel() % NF4_BLOCK:
            rows, columns = module.weight.shape
            raise UserError(
                f"QLoRA: layers.{name}.weight has {rows} x {columns} = {rows * columns} values; NF4 stores multiples "
                f"of {NF4_BLOCK}. Use a lora_ recipe for this model"
            )


def prepare(model: TransformerDecoder, *, max_length: int, vocab_size: int = 0, attention: str = "segments") -> None:
    """Makes the model return answers' log-probabilities (logps.answer_logps) and take rows longer than its positions.

    Args:
        max_length: Tokens of the longest conversation.
        vocab_size: Token ids that the tokenizer can produce.
        attention: segments, mask, or auto: segments where the model's layers can.

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
    # A row holds several documents, each with positions of its own, all below max_length.
    model.max_seq_len = 2**31
    logps.install(model, attention)


def disable_dropout(model: nn.Module) -> bool:
    """Sets every dropout probability to zero; returns whether any was above."""
    found = False
    for module in model.modules():
        for name in ("p", "attn_dropout"):
            if isinstance(module, (nn.Dropout, MultiHeadAttention)) and getattr(module, name, 0.0) > 0.0:
                setattr(module, name, 0.0)
                found = True
    return found


def load(model: TransformerDecoder, state_dict: dict[str, Tensor], *, device: torch.device) -> None:
    """Fills a model built on the meta device: base weights from `state_dict` (which is emptied), adapters afresh.

    Base weights take the model's dtype; NF4 ones are quantized from the checkpoint's values on `device`. Adapters are
    initialised from torch's global generator: seed it before.

    Raises:
        UserError: The checkpoint lacks a weight, has one too many, or one of another shape.
    """
    adapters = set(get_adapter_params(model))
    for name, parameter in list(model.named_parameters()):
        if name in adapters:
            continue
        if name not in state_dict:
            raise UserError(f"checkpointer: the checkpoint has no weight {name}, which the model needs")
        value = state_dict.pop(name)
        if value.shape != parameter.shape:
            raise UserError(
                f"checkpointer: weight {name} is {list(value.shape)} in the checkpoint and {list(parameter.shape)} in "
                "the model: `model` and `checkpointer.checkpoint_dir` do not belong together"
            )
        value = value.to(device=device, dtype=parameter.dtype, copy=True)
        if isinstance(parameter, NF4Tensor):
            value = to_nf4(value, parameter.block_size, parameter.scaler_block_size)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=parameter.requires_grad))
    if state_dict:
        names = sorted(state_dict)
        raise UserError(
            f"checkpointer: the checkpoint has {len(names)} weights that the model lacks, such as {names[0]}: "
            "`model` and `checkpointer.checkpoint_dir` do not belong together"
        )
    for module in model.modules():
        if isinstance(module, (LoRALinear, DoRALinear)):
            module.lora_a.to_empty(device=device)
            module.lora_b.to_empty(device=device)
            module.initialize_parameters()
        if hasattr(module, "rope_init"):
            with device:
                module.rope_init()


def frozen_copy(model: TransformerDecoder) -> TransformerDecoder:
    """Returns a copy that is not trained: the reference of a full fine-tuning run."""
    reference = copy.deepcopy(model).requires_grad_(False)
    return reference.eval()


def checkpoint_activations(model: nn.Module) -> None:
    """Keeps only each layer's input for backward and computes the rest again: less memory, about a third more work."""
    set_activation_checkpointing(model, auto_wrap_policy={TransformerSelfAttentionLayer})


def compile_layers(model: nn.Module) -> None:
    """Compiles layer by layer: compile time does not grow with depth."""
    compile_model(model, verbose=False)


def num_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns how many parameters the model has, and how many of them are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by their names in torchtune's checkpoints, NF4 ones as the plain values that they stand for."""
    for name, parameter in model.named_parameters():
        value = parameter.data
        yield name.replace(_WRAPPED, ""), value.get_original_weight() if isinstance(value, NF4Tensor) else value


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights on the CPU, W + (alpha / rank) B A in the place of each adapted W, summed in float32.

    QLoRA: W is what was trained on, the dequantized NF4 weight, so the merged model is the trained policy.
    """
    parameters = dict(_parameters(model))
    for name, module in model.named_modules():
        if isinstance(module, DoRALinear):
            raise UserError("model: DoRA adapters cannot be merged yet")
        if isinstance(module, LoRALinear):
            name = name.replace(_WRAPPED, "")
            a, b = parameters.pop(f"{name}.lora_a.weight"), parameters.pop(f"{name}.lora_b.weight")
            weight = parameters[f"{name}.weight"]
            merged = weight.float() + (module.alpha / module.rank) * (b.float() @ a.float())
            parameters[f"{name}.weight"] = merged.to(weight.dtype)
    return {name: value.detach().cpu() for name, value in parameters.items()}


@torch.no_grad()
def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapters' weights on the CPU under torchtune's names; empty for a model without adapters."""
    names = {name.replace(_WRAPPED, "") for name in get_adapter_params(model)}
    return {name: value.detach().cpu() for name, value in _parameters(model) if name in names}
