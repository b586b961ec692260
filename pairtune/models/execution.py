"""How a model computes: which attention, compiled or not, and what it keeps for backward. None of it changes a result.

`fit` first, when the model is built; `execute` when it is known for how much work, see run/choosing.py.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer
from torchtune.training import compile_model, set_activation_checkpointing

from pairtune.errors import UserError
from pairtune.models import logps, offloading, pieces
from pairtune.models.additions import additions
from pairtune.models.bridge.decoder import BridgedDecoder

SELECTIVE = "selective"
# Of what a compiled layer would keep if it computed nothing twice: half of it costs a tenth more time.
SELECTIVE_BUDGET = 0.5


@dataclass(frozen=True)
class Execution:
    """How a model computes.

    Attributes:
        attention: One of attention.BACK_ENDS.
        compile: torch.compile layer by layer, so that compile time does not grow with depth.
        checkpointing: What backward computes again. False: nothing. "selective": what costs least for the memory it
            takes, which the compiler knows. True: all of a layer but its input: about a third more work.
        offloading: Those inputs wait for backward in host memory.
    """

    attention: str = "segments"
    compile: bool = False
    checkpointing: bool | str = False
    offloading: bool = False


def fit(
    model: TransformerDecoder, *, max_length: int, vocab_size: int = 0, windows: Sequence[int | None] | None = None
) -> None:
    """Makes the model return answers' log-probabilities (logps.answer_logps) and take rows longer than its positions.

    Args:
        max_length: Tokens of the longest conversation.
        vocab_size: Token ids that the tokenizer can produce.
        windows: How far each layer looks back, from check_model.windows; None: no layer has a sliding window.

    Raises:
        UserError: The model has fewer positions or embeddings than that, or its attention cannot be told whom to see.
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
    additions(model).num_positions, model.max_seq_len = model.max_seq_len, 2**31
    logps.install(model, windows=windows)


def execute(model: TransformerDecoder, how: Execution) -> None:
    """Makes a model that `fit` prepared compute so.

    Raises:
        UserError: As `check`.
    """
    check(how.attention, how.compile, how.checkpointing)
    additions(model).back_end = how.attention
    if how.checkpointing is True:
        set_activation_checkpointing(model, {type(layer) for layer in layers_of(model)})
        if not how.compile:
            pieces.install(model)
    if how.offloading:
        offloading.offload(model)
    additions(model).is_compiled = how.compile
    if how.compile:
        # A layer is compiled for each kind of forward: with gradients and without, adapters on and off, the first
        # layer's input, a few shapes. Beyond torch's limit of 8 it would not be compiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        if additions(model).fp8:
            # Within a kernel numbers would be rounded to bf16 less often, and with gradients in other places than
            # without. One that is near the middle of two of fp8's moves by a sixteenth: the first loss was 0.681.
            torch._inductor.config.emulate_precision_casts = True
        torch._functorch.config.activation_memory_budget = SELECTIVE_BUDGET if how.checkpointing == SELECTIVE else 1.0
        if isinstance(model, BridgedDecoder):
            for layer in model.layers:
                layer.compile()
        else:
            compile_model(model, verbose=False)


@contextmanager
def plainly(*models: TransformerDecoder) -> Iterator[None]:
    """While it lasts, models compute without a compiler and document by document: two equal ones give equal numbers.

    Compiled, what one computes with gradients and the other without are two programs, which round differently.
    """
    kept = [model.pairtune.back_end for model in models]
    for model in models:
        model.pairtune.back_end = "segments"
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for model, back_end in zip(models, kept, strict=True):
            model.pairtune.back_end = back_end


def check(attention: str, compiled: bool, checkpointing: bool | str = False) -> None:
    """Refuses what would compute slowly or not at all.

    Raises:
        UserError: A back end that compiles anew for each batch, or what is nothing without a compiler.
    """
    if checkpointing == SELECTIVE and not compiled:
        raise UserError(
            "enable_activation_checkpointing=selective: it is the compiler that chooses; nearest valid: "
            "enable_activation_checkpointing=true, or compile=true"
        )
    if compiled and attention in ("segments", "varlen"):
        raise UserError(
            f"attention={attention}: compile=true would compile anew for each batch; nearest valid: attention=auto"
        )
    if attention == "flex" and not compiled:
        raise UserError(
            "attention=flex: without compile=true it computes all scores of a row, and keeps them; nearest valid: "
            "attention=auto, or compile=true"
        )


def prepare(
    model: TransformerDecoder,
    *,
    max_length: int,
    vocab_size: int = 0,
    windows: Sequence[int | None] | None = None,
    attention: str = "auto",
    checkpoint_activations: bool | str = False,
    compile_layers: bool = False,
) -> None:
    """Does both, see `fit` and Execution.

    Args:
        attention: auto: mask with `compile_layers`, else segments.
    """
    fit(model, max_length=max_length, vocab_size=vocab_size, windows=windows)
    if attention == "auto":
        attention = "mask" if compile_layers else "segments"
    execute(model, Execution(attention, compile_layers, checkpoint_activations))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Returns a decoder's layers, without what wraps them."""
    if isinstance(model, BridgedDecoder):
        return [getattr(layer, "_checkpoint_wrapped_module", layer) for layer in model.layers]
    return [m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer)]


@contextmanager
def checkpointed(model: TransformerDecoder, *, compiled: bool = False) -> Iterator[None]:
    """While it lasts, backward computes the model's layers again, as after `execute`."""
    layers = layers_of(model)
    kept = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        with nullcontext() if compiled else pieces.installed(model):
            yield
    finally:
        for layer, forward in zip(layers, kept, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward
