"""A family of transformers', as its folders name it: what families.py is for torchtune's, without a table.

transformers' names are those of our model, behind a prefix; where files have others, it converts them itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from pairtune import models
from pairtune.config.rules import LORA_LAYERS
from pairtune.folders.families import Module, Part
from pairtune.models.bridge.files import PREFIX, Files, Plan
from pairtune.models.bridge.roles import parts_of
from pairtune.models.build import UNQUANTIZED
from pairtune.models.grouped import ExpertsLinear


@dataclass(frozen=True)
class ExpertsMatrix:
    """What PEFT adapts as a parameter, and we as a layer.

    Attributes:
        leaf: The last part of its name, such as gate_up_proj.
        ours: Our layer's name.
        num_experts: Matrices in it.
        transposed: Whether it is [E, in, out], not [E, out, in].
    """

    leaf: str
    ours: str
    num_experts: int
    transposed: bool


class BridgedFamily:
    """The weights of one model of transformers.

    Attributes:
        name: A `checkpointer.model_type`: config.json's in capitals.
        ignored: Endings of tensors that hold nothing trained.
        lora_names: What lora.modules may hold for it beside torchtune's names: nothing.
    """

    ignored = ("rotary_emb.inv_freq",)
    lora_names: tuple[str, ...] = ()

    def __init__(self, component: Mapping):
        """
        Args:
            component: The config's `model` block.

        Raises:
            UserError: As models.full.
        """
        self._model = models.full(component, dtype="fp32")
        self._files = Files(self._model)
        self.name = self._model.lm.config.model_type.upper()

    @cached_property
    def modules(self) -> tuple[Module, ...]:
        """Its linear layers, with a {} for each number."""
        names = (name for name, module in self._model.named_modules() if type(module) is nn.Linear)
        return tuple(
            Module(theirs, (Part(PREFIX + theirs),))
            for theirs in dict.fromkeys(_without_numbers(name.removeprefix(PREFIX)) for name in names)
        )

    @cached_property
    def experts(self) -> dict[str, list["ExpertsMatrix"]]:
        """Its layers of experts, by transformers' name, with their matrices in transformers' order."""
        found: dict[str, list[ExpertsMatrix]] = {}
        for name, module in self._model.named_modules():
            if isinstance(module, ExpertsLinear):
                layer, _, leaf = name.removeprefix(PREFIX).rpartition(".")
                found.setdefault(layer, []).append(ExpertsMatrix(leaf, name, module.shape[0], module.transposed))
        return found

    @cached_property
    def _by_name(self) -> dict[str, Module]:
        return {module.theirs: module for module in self.modules}

    def lora_modules(self, theirs: set[str]) -> list[str]:
        """Returns what lora.modules says for these linear layers, [] where nothing says just them.

        Args:
            theirs: Names, with a {} for each number.
        """
        parts = parts_of(self._model)
        wanted = {name for name in parts if _without_numbers(name.removeprefix(PREFIX)) in theirs}
        if wanted == {name for name, of_layer in parts.items() if not UNQUANTIZED & of_layer}:
            return ["all-linear"]
        computed = set().union(*(parts[name] for name in wanted))
        named = {of[0]: module for module, of in reversed(LORA_LAYERS.items()) if len(of) == 1}
        is_said = (
            wanted == {name for name, of_layer in parts.items() if of_layer & computed} and computed <= named.keys()
        )
        return [named[part] for part in sorted(computed)] if is_said else []

    def find_theirs(self, layer: str) -> tuple[Module, list[str]] | None:
        """Returns which module one of their layers is, and our layer in it; None for an unknown one."""
        module = self._by_name.get(_without_numbers(layer))
        return None if module is None else (module, [PREFIX + layer])

    def find_ours(self, layer: str) -> tuple[Module, int, str] | None:
        """Returns in which module, as which part of it, and under which of their names one of our layers is."""
        found = self.find_theirs(layer.removeprefix(PREFIX))
        return None if found is None else (found[0], 0, layer.removeprefix(PREFIX))

    def name_of(self, weight: str) -> str:
        """Returns what one of our weights is called in transformers."""
        return self._files.their_name(weight)

    def to_ours(self, name: str, value: Tensor, config: dict) -> dict[str, Tensor]:
        """Returns what one of transformers' tensors is here.

        Raises:
            KeyError: No such tensor in this model.
        """
        if self._files.our_name(name) not in dict(self._model.named_parameters()):
            raise KeyError(f"no weight of {self.name}")
        return {self._files.our_name(name): value}

    def plan(self, tensors: Mapping[str, Tensor]) -> Plan:
        """Returns where our weights come from in a folder; see bridge.files."""
        return self._files.plan(tensors)

    def to_theirs(self, weights: Mapping[str, Tensor], config: dict) -> dict[str, Tensor]:
        """Returns whole weights of a model as its folder had them."""
        return self._files.to_theirs(weights)

    @property
    def in_towers(self) -> set[str]:
        """Those of the folder's tensors that pairs of texts leave as they are; known after `plan`."""
        return self._files.in_towers


def _without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
