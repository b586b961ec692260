"""How a folder names and stores what a model of transformers holds, by transformers' own conversions.

Most families have one tensor in a file for each of a model's, under its name. Some rename them, and mixtures of experts
stack what a file has one by one. What is said here works on the meta device; values are converted when asked for.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pairtune.config.rules import one_line
from pairtune.models.bridge import experts
from pairtune.models.bridge.decoder import BridgedDecoder

PREFIX = "lm."  # of the decoder's names before transformers'
IGNORED = (r"(^|\.)rotary_emb\.inv_freq$", r"(^|\.)position_ids$")  # which older folders keep among the weights


@dataclass(frozen=True)
class Source:
    """Where one of a model's tensors comes from.

    Attributes:
        keys: Tensors of the folder.
        make: Returns it from their values, in this order.
    """

    keys: tuple[str, ...]
    make: Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True)
class Plan:
    """Where all of a model's tensors come from.

    Attributes:
        sources: By the decoder's names; several where a folder has one twice, as a tied output layer.
        strange: Tensors of the folder that the model has no place for, and why.
    """

    sources: dict[str, list[Source]]
    strange: dict[str, str]


class Files:
    """The conversions of one model, which are told by the first folder that it is asked about, as an export needs."""

    def __init__(self, model: BridgedDecoder):
        """
        Args:
            model: On the meta device.
        """
        self._lm = model.lm
        self._theirs = experts.their_names(model.lm)  # of what has another name here
        self._ours = {theirs: ours for ours, theirs in self._theirs.items()}
        self._shapes = {self._theirs.get(name, name): v.shape for name, v in model.lm.state_dict().items()}
        self._first = model.ties
        self._towers = tuple(f"{name}." for name in model.towers)
        self.in_towers: set[str] = set()  # of the first folder's tensors, those of what texts do not pass through

    def plan(self, tensors: Mapping[str, Tensor]) -> Plan:
        """Returns where the model's tensors come from in a folder.

        Args:
            tensors: The folder's, on the meta device.
        """
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key

        conversions = get_model_conversion_mapping(self._lm)
        converters = [c for c in conversions if isinstance(c, WeightConverter)]
        renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
        by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
        patterns = [*IGNORED, *(self._lm._keys_to_ignore_on_load_unexpected or ())]
        ignored = re.compile("|".join(f"({pattern})" for pattern in patterns))
        prefix, strange = self._lm.base_model_prefix, {}
        collected: dict[str, list[tuple[str, str | None]]] = {}  # a name in the model: keys, and their converter
        for key in sorted(tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, renamings, converters, prefix, self._shapes)
            if name not in self._shapes and key in self._shapes:
                name, pattern = key, None
            if name in self._shapes:
                collected.setdefault(name, []).append((key, pattern))
            elif not ignored.search(key):
                strange[key] = "no weight of this model"
        self._lm._weight_conversions = [c for c in conversions if c.was_used()]  # which `to_theirs` reverts
        sources: dict[str, list[Source]] = {}
        for name, found in collected.items():
            groups = [[one] for one in found] if found[0][1] is None else [found]
            for group in groups:
                converter = None if group[0][1] is None else by_pattern[group[0][1]]
                try:
                    made = self._targets(name, group, converter, tensors)
                except Exception as error:
                    strange |= dict.fromkeys((key for key, _ in group), one_line(error))
                    continue
                for target, source in made.items():
                    sources.setdefault(self.our_name(target), []).append(source)
        found = ((name, source.keys) for name, sources in sources.items() for source in sources)
        self.in_towers = {key for name, keys in found if name.startswith(self._towers) for key in keys}
        return Plan(sources, strange)

    def our_name(self, theirs: str) -> str:
        """Returns the decoder's name of one of transformers' tensors."""
        return PREFIX + self._first.get(theirs, self._ours.get(theirs, theirs))

    def their_name(self, ours: str) -> str:
        """Returns transformers' name of one of the decoder's tensors."""
        ours = ours.removeprefix(PREFIX)
        return self._theirs.get(ours, ours)

    def _targets(self, name: str, group: list, converter, tensors: Mapping[str, Tensor]) -> dict[str, Source]:
        keys = tuple(key for key, _ in group)
        if converter is None:
            return {name: Source(keys, lambda values: values[0])}
        lm, patterns = _UnderTheirNames(self._lm, self._ours), [pattern for _, pattern in group]

        def convert(values: list[Tensor]) -> dict[str, Tensor]:
            one = copy.deepcopy(converter)
            for key, pattern, value in zip(keys, patterns, values, strict=True):
                one.add_tensor(name, key, pattern, value)
            made = one.convert(name, model=lm, config=lm.config)  # some look at a parameter's shape
            return {target: v[0] if isinstance(v, list) else v for target, v in made.items()}

        targets = convert([tensors[key] for key in keys])
        return {target: Source(keys, lambda values, t=target: convert(values)[t]) for target in targets}

    def to_theirs(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns a model's tensors, under the decoder's names, as a folder has them."""
        from transformers.core_model_loading import revert_weight_conversion

        found = {self.their_name(name): value for name, value in weights.items()}
        lm = _UnderTheirNames(self._lm, self._ours)
        return {name: _on_its_own(v) for name, v in revert_weight_conversion(lm, found).items()}


class _UnderTheirNames:
    """A model for transformers' conversions, which ask for parameters by names that `experts.install` has changed."""

    def __init__(self, lm: nn.Module, ours: Mapping[str, str]):
        self._lm, self._ours = lm, ours

    def __getattr__(self, name: str):
        return getattr(self._lm, name)

    def get_parameter(self, name: str) -> nn.Parameter:
        return self._lm.get_parameter(self._ours.get(name, name))


def _on_its_own(value: Tensor) -> Tensor:
    """Returns a tensor that is no part of another, such as one expert's of a stack: which no file takes."""
    value = value.contiguous()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
