"""Where live reference log-probabilities come from: the base model, a frozen copy of the adapters, a second model.

All have one interface: `weights` gives the model to score with, `move` takes it toward the policy (TR-DPO, arXiv
2404.09656), `tensors` is what a checkpoint has to hold if it was moved. When it is moved is for the recipe to say.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pairtune import models
from pairtune.errors import UserError
from pairtune.loss_needs import needs


def check_name(name: str, loss_fn: Callable, *, known: tuple[str, ...], has_adapter: bool = False) -> None:
    """Refuses a reference that the recipe or the loss does not have, or that is not what the run starts from.

    Args:
        known: The recipe's.
        has_adapter: The run starts from an adapter.

    Raises:
        UserError: One of these.
    """
    if name not in known:
        raise UserError(
            f"reference.name={name}: this recipe has {', '.join(known)}; nearest valid: reference={known[0]}"
        )
    if not needs(loss_fn).reference and name not in (known[0], "none"):
        raise UserError(f"reference={name}: this loss has no reference, and none is loaded; use reference=none")
    if name == "cached" and "kl" in needs(loss_fn).inputs:
        raise UserError(f"reference=cached: KTO scores answers to other prompts in each step; use reference={known[0]}")
    if has_adapter and name in ("adapter_off", "cached"):
        raise UserError(
            f"reference={name}: the run starts from an adapter, and the model without it is another one: the loss "
            "would not begin at ln 2, and training would first undo what the adapter has learned. Use reference=start"
        )


class AdaptersOff:
    """The base model of LoRA and QLoRA: costs no memory and does not move."""

    def __init__(self, model: nn.Module):
        self._model = model

    def weights(self) -> AbstractContextManager[nn.Module]:
        """Makes the model the reference while the context lasts: without dropout and gradients."""
        return models.reference_of(self._model)

    def tensors(self) -> dict[str, Tensor]:
        """Returns what a checkpoint has to hold of it: nothing."""
        return {}


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
        adapted = models.adapted_modules(model)
        parts = [(f"{name}.{leaf}", m, leaf, copy) for name, m in adapted for leaf, copy in models.COPIES.items()]
        self._policy = {f"{name}.weight": getattr(m, leaf).weight for name, m, leaf, _ in parts}
        self._copy = {f"{name}.weight": getattr(m, copy).weight for name, m, _, copy in parts}

    def weights(self) -> AbstractContextManager[nn.Module]:
        """Makes the model the reference while the context lasts: without dropout and gradients."""
        return models.frozen_copy_of(self._model)

    def tensors(self) -> dict[str, Tensor]:
        """Returns this process's parts by their names in a checkpoint; to write into them is to load them."""
        return {f"reference.{name}": p.data for name, p in self._copy.items()}

    def move(self, alpha: float) -> None:
        """Moves the adapters toward the policy's: alpha policy + (1 - alpha) reference; alpha 1 copies them.

        It is A and B that are blended, not their product: in between, the reference is near the blend of both models,
        and is not it.
        """
        _blend(self._copy, self._policy, alpha)
        models.forget_gathered(self._model)


class SecondModel:
    """A model of its own: what the policy was when the run started, or moved toward it since.

    Build it before the first forward: FSDP2 shows a model's shards until then.
    """

    def __init__(self, model: nn.Module, reference: nn.Module):
        """
        Args:
            model: The policy.
            reference: Built, loaded and sharded like the policy, and frozen.
        """
        self._reference = reference
        self._policy, self._copy = (
            {models.plain_name(name): p for name, p in m.named_parameters()} for m in (model, reference)
        )

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
