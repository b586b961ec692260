"""Where live reference log-probabilities come from: the base model, a frozen copy of the adapters, a second model.

`weights` gives the model to score with. What can be moved toward the policy (TR-DPO, arXiv 2404.09656) has `move`, and
`tensors`, which a checkpoint has to hold then. When it is moved is for the recipe to say.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.errors import UserError
from pairtune.folders.opening import check_model, make_ready
from pairtune.folders.weights import ModelFolder, Weights, open_like
from pairtune.losses.calling import needs
from pairtune.process.dist import World
from pairtune.tokenizer.hf import check_vocabulary

KNOWN = {  # by method, the default first
    "full": ("model", "cached", "sync", "none"),
    **dict.fromkeys(("lora", "qlora"), ("adapter_off", "cached", "start", "model", "sync", "none")),
}


def is_own(reference: Mapping, method: str, dtype: str) -> bool:
    """Returns whether the reference has the weights that the run starts from, its dtype and its quantization.

    Args:
        reference: The config's block.
        method: full, lora or qlora.
        dtype: The run's.
    """
    return (
        reference.get("checkpoint_dir") is None
        and reference.get("dtype") in (None, dtype)
        and reference.get("quantize") in (None, method == "qlora")
    )


def has_second_model(reference: Mapping, method: str, dtype: str) -> bool:
    """Returns whether a second model is loaded: for the whole run, or with `cached` until every pair has its values."""
    in_every_run = ("model", "sync") if method == "full" else ("model",)
    return reference.get("name") in in_every_run or not is_own(reference, method, dtype)


def check_reference(
    reference: Mapping, loss_fn: Callable, method: str, *, dtype: str, has_adapter: bool = False
) -> None:
    """Refuses a reference that the recipe or the loss does not have, or that the run would first have to undo.

    Args:
        reference, method, dtype: As for `is_own`.
        has_adapter: The run starts from an adapter.

    Raises:
        UserError: One of these.
    """
    name, known, own = reference.get("name"), KNOWN[method], is_own(reference, method, dtype)
    live = "start" if has_adapter else known[0]
    if name not in known:
        raise UserError(
            f"reference.name={name}: this recipe has {', '.join(known)}; nearest valid: reference={known[0]}"
        )
    if not needs(loss_fn).reference and (name not in (known[0], "none") or not own):
        raise UserError(f"reference={name}: this loss has no reference, and none is loaded; use reference=none")
    if name == "cached" and "kl" in needs(loss_fn).inputs:
        raise UserError(f"reference=cached: KTO scores answers to other prompts in each step; use reference={live}")
    is_base = (name in ("adapter_off", "model") or not own) and reference.get("checkpoint_dir") is None
    if has_adapter and is_base and needs(loss_fn).reference:
        raise UserError(
            f"reference={name}: the run starts from an adapter, and the model without it is another one: the loss "
            "would not begin at ln 2, and training would first undo what the adapter has learned. Use reference=start, "
            "or name another model's folder with reference=model reference.checkpoint_dir=..."
        )
    if method != "full" and name == "model" and own:
        raise UserError(
            "reference=model: would hold the base a second time, which is here already; use reference=adapter_off, or "
            "say what differs: reference.checkpoint_dir, reference.dtype or reference.quantize"
        )


@dataclass(frozen=True)
class FrozenModel:
    """A reference that is a model of its own: frozen, and without memory until `load`.

    Attributes:
        model: On the meta device first.
        component: Its builder and arguments.
        files: From weights.open_weights.
        block: The config's.
    """

    model: TransformerDecoder
    component: Mapping
    files: ModelFolder
    block: Mapping

    def make_ready(self, max_length: int, vocab_size: int = 0) -> None:
        """Makes it ready to compute, with the sliding windows of its own folder."""
        with _told_of(self.block):
            make_ready(self.model, self.files.config, max_length, vocab_size)

    def load(self, world: World) -> None:
        """Gives it its weights, sharded where the policy is."""
        with _told_of(self.block):
            models.load(self.model, Weights(self.files), world=world)

    @property
    def source(self) -> dict:
        """What reference_cache.identify takes of it."""
        return {"component": self.component, "weight_files": self.files.weight_files}


def frozen_model(
    reference: Mapping, method: str, *, component: Mapping, dtype: str, world: World | None = None
) -> TransformerDecoder:
    """Returns a second model on the meta device, frozen.

    Args:
        reference, method, dtype: As for `is_own`; null in `reference` is what the run has.
        component: The run's `model` block.
        world: The processes that share it.

    Raises:
        UserError: As models.full.
    """
    quantize = reference.get("quantize")
    quantize = method == "qlora" if quantize is None else quantize
    settings = {"dtype": reference.get("dtype") or dtype, "quantize": quantize, "world": world}
    with _told_of(reference):
        return models.full(reference.get("model") or component, **settings).requires_grad_(False).eval()


def open_second_model(
    reference: Mapping,
    method: str,
    *,
    component: Mapping,
    dtype: str,
    files: ModelFolder,
    tokenizer,
    world: World | None = None,
) -> FrozenModel:
    """Returns a second model and its files, which belong together: no value of a weight is read yet.

    Args:
        reference, method, component, dtype, world: As for `frozen_model`.
        files: The run's, from weights.open_weights.
        tokenizer: The run's, from tokenizer.adapt: the reference reads its tokens.

    Raises:
        UserError: As frozen_model, weights.open_weights, check_model, check_vocabulary and models.load.
    """
    model = frozen_model(reference, method, component=component, dtype=dtype, world=world)
    folder = reference.get("checkpoint_dir")
    if folder:
        with _told_of(reference):
            files = open_like(files, folder, reference.get("model") or component)
            check_model(model, files.config)
            check_vocabulary(tokenizer, Path(folder))
            whole = models.full(reference.get("model") or component, dtype=dtype)  # NF4 changes no name or shape
            models.check_weights(whole, Weights(files))
    return FrozenModel(model, reference.get("model") or component, files, reference)


@contextmanager
def _told_of(reference: Mapping) -> Iterator[None]:
    """Errors of functions that the policy shares name the reference's keys."""
    builder = "`reference.model`" if reference.get("model") else "`model` (reference.model is null)"
    try:
        yield
    except UserError as error:
        text = str(error).removeprefix("checkpointer: ")
        if reference.get("checkpoint_dir"):
            text = text.replace("checkpointer.checkpoint_dir", "reference.checkpoint_dir").replace("`model`", builder)
        raise UserError(text if text.startswith("reference") else f"reference: {text}") from None


class AsItStarts:
    """The policy itself, before it is trained: what a cache is filled with."""

    def __init__(self, policy: nn.Module):
        self._policy = policy

    def weights(self) -> AbstractContextManager[nn.Module]:
        """Makes the policy the reference while the context lasts: without dropout and gradients."""
        return models.frozen(self._policy)


class AdaptersOff:
    """The base model of LoRA and QLoRA: costs no memory and does not move."""

    def __init__(self, policy: nn.Module):
        self._policy = policy

    def weights(self) -> AbstractContextManager[nn.Module]:
        """Makes it the reference while the context lasts: without dropout and gradients."""
        return models.reference_of(self._policy)


class AdapterCopy:
    """The base model with adapters of its own: the policy's of when the run started, or moved toward it since.

    The policy may be between its forward and its backward. Build it before the first forward: FSDP2 shows a model's
    shards until then.
    """

    def __init__(self, model: nn.Module):
        """
        Args:
            model: From models.lora(frozen_copy=True) and models.load.
        """
        self._model = model
        self._policy, self._copy = {}, {}
        for layer, module in models.adapted_modules(model):
            for name, trained, copy in models.copied_parameters(module):
                self._policy[f"{layer}.{name}"], self._copy[f"{layer}.{name}"] = trained, copy

    def weights(self) -> AbstractContextManager[nn.Module]:
        """Makes the model the reference while the context lasts: without dropout and gradients."""
        return models.frozen_copy_of(self._model)

    def tensors(self) -> dict[str, Tensor]:
        """Returns this process's parts by their names in a checkpoint; to write into them is to load them."""
        return {f"reference.{name}": p.data for name, p in self._copy.items()}

    def move(self, alpha: float) -> None:
        """Moves the adapters toward the policy's: alpha policy + (1 - alpha) reference; alpha 1 copies them.

        It is A and B (and DoRA's magnitudes) that are blended, not their product: in between, the reference is near the
        blend of both models, and is not it.
        """
        _blend(self._copy, self._policy, alpha)
        models.forget_gathered(self._model)


class SecondModel:
    """A model of its own: any, or what the policy was when the run started and moved toward it since.

    Build it before the first forward: FSDP2 shows a model's shards until then.
    """

    def __init__(self, policy: nn.Module | None, reference: nn.Module):
        """
        Args:
            policy: What it can be moved toward; then they have the same architecture.
            reference: Loaded and sharded like the policy, and frozen.
        """
        self._reference = reference
        self._copy = {models.plain_name(name): p for name, p in reference.named_parameters()}
        trained = policy.named_parameters() if policy is not None else ()
        self._policy = {models.plain_name(name): p for name, p in trained}

    @contextmanager
    def weights(self):
        """Gives the reference, without gradients, while the context lasts."""
        with torch.no_grad():
            yield self._reference

    def tensors(self) -> dict[str, Tensor]:
        """Returns this process's parts by their names in a checkpoint; to write into them is to load them."""
        return {f"reference.{name}": p.data for name, p in self._copy.items()}

    def move(self, alpha: float) -> None:
        """Moves the weights toward the policy's: alpha policy + (1 - alpha) reference; alpha 1 copies them."""
        _blend(self._copy, self._policy, alpha)
        models.forget_gathered(self._reference)


@torch.no_grad()
def _blend(reference: dict[str, Tensor], policy: dict[str, Tensor], alpha: float) -> None:
    """TR-DPO's soft update, with alpha 1 the hard one; each process blends its shards in place."""
    assert reference.keys() == policy.keys() and 0.0 < alpha <= 1.0
    for name, tensor in reference.items():
        _local(tensor).lerp_(_local(policy[name]), alpha)  # alpha 1 gives the policy's values exactly


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
