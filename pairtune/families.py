"""How Hugging Face folders name and order the weights of a family of models: a table for each, read in both directions.

A table serves whole weights and PEFT's adapters alike: which of our layers lie in which of theirs, in what rows, in
what order. Ours are torchtune's names.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """One of our layers in one of theirs.

    Attributes:
        name: With a {} for each number: layers.{}.attn.q_proj.
        rows: Of a fused matrix: q or kv, that many heads; or "equal", as many as its other parts.
        rotary: q or kv where their rows keep the first halves of a head's rotated pairs before the second ones, while
            ours keep pairs together.
    """

    name: str
    rows: str = "equal"
    rotary: str | None = None


@dataclass(frozen=True)
class Module:
    """One of their layers and what it is here.

    Attributes:
        theirs: model.layers.{}.self_attn.qkv_proj.
        parts: In the order of its rows.
        leaves: Their names of its tensors to ours.
        transposed: Its matrix is [in, out], as in GPT-2's Conv1D.
    """

    theirs: str
    parts: tuple[Part, ...]
    leaves: Mapping[str, str] = field(default_factory=lambda: {"weight": "weight", "bias": "bias"})
    transposed: bool = False

    @property
    def is_linear(self) -> bool:
        """A matrix and perhaps a bias, not a norm's scale."""
        return "norm" not in self.parts[0].name

    def sizes(self, rows: int, config: dict) -> list[int]:
        """Returns how many of a matrix's rows each part has."""
        if len(self.parts) == 1:
            return [rows]
        heads = {"q": num_heads(config, "q"), "kv": num_heads(config, "kv")}
        if self.parts[0].rows == "equal":
            return [rows // len(self.parts)] * len(self.parts)
        total = sum(heads[part.rows] for part in self.parts)
        return [rows * heads[part.rows] // total for part in self.parts]


@dataclass(frozen=True)
class Family:
    """The weights of one `checkpointer.model_type`.

    Attributes:
        name: The model_type.
        config_types: What config.json calls it.
        ignored: Endings of their tensors that hold nothing trained.
        tied: Whether the output layer is the embedding where config.json does not say.
        output: Their name of the output layer, left out of folders whose embedding is tied.
        prefix: Of all other layers; a folder that was saved without an output layer lacks it.
    """

    name: str
    config_types: tuple[str, ...]
    modules: tuple[Module, ...]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    tied: bool = False
    output: str = "lm_head"
    prefix: str = "model."

    @cached_property
    def _theirs(self) -> list[tuple[re.Pattern, Module]]:
        return [(_pattern(module.theirs), module) for module in self.modules]

    @cached_property
    def _ours(self) -> list[tuple[re.Pattern, Module, int]]:
        return [(_pattern(part.name), m, i) for m in self.modules for i, part in enumerate(m.parts)]

    def is_tied(self, config: dict) -> bool:
        """Returns whether the output layer is the embedding."""
        said = config.get("tie_word_embeddings")
        return self.tied if said is None else said

    def find_theirs(self, layer: str) -> tuple[Module, list[str]] | None:
        """Returns which module one of their layers is, and our layers in it; None for an unknown one."""
        for pattern, module in self._theirs:
            if match := pattern.fullmatch(layer):
                return module, [part.name.format(*match.groups()) for part in module.parts]
        return None

    def find_ours(self, layer: str) -> tuple[Module, int, str] | None:
        """Returns in which module, as which part of it, and under which of their names one of our layers is."""
        for pattern, module, i in self._ours:
            if match := pattern.fullmatch(layer):
                return module, i, module.theirs.format(*match.groups())
        return None

    def to_ours(self, name: str, value: Tensor, config: dict) -> dict[str, Tensor]:
        """Returns what one of their tensors is here; nothing for one that is ignored or tied.

        Raises:
            KeyError: No such tensor in this family.
            RuntimeError: A shape that does not go with config.json.
        """
        layer, _, leaf = name.rpartition(".")
        if name.endswith(self.ignored) or (layer == self.output and self.is_tied(config)):
            return {}
        module, ours = self.find_theirs(layer) or self.find_theirs(self.prefix + layer) or (None, [])
        if module is None or leaf not in module.leaves:
            raise KeyError(f"no weight of {self.name}")
        if module.is_linear and leaf == "weight" and value.dim() != 2:
            raise RuntimeError("it is no matrix")
        value = value.T if module.transposed and value.dim() == 2 else value
        sizes = module.sizes(value.shape[0], config)
        pieces = value.split(sizes) if len(sizes) > 1 else [value]
        return {
            f"{name}.{module.leaves[leaf]}": order_as_ours(piece, part, config)
            for name, piece, part in zip(ours, pieces, module.parts, strict=True)
        }

    def to_theirs(self, weights: Mapping[str, Tensor], config: dict) -> dict[str, Tensor]:
        """Returns whole weights of a model under their names.

        Raises:
            KeyError: A weight that this family does not have, or a fused matrix with a part missing.
        """
        converted = {}
        for name in weights:
            layer, _, our_leaf = name.rpartition(".")
            module, i, theirs = self.find_ours(layer) or (None, 0, "")
            leaf = next((t for t, ours in module.leaves.items() if ours == our_leaf), None) if module else None
            if leaf is None:
                raise KeyError(f"{name}: no weight of {self.name}")
            if i:  # is taken along with the first part
                continue
            _, ours = self.find_theirs(theirs)
            pieces = [
                order_as_theirs(weights[f"{part_name}.{our_leaf}"], part, config)
                for part_name, part in zip(ours, module.parts, strict=True)
            ]
            whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
            converted[f"{theirs}.{leaf}"] = (whole.T if module.transposed and whole.dim() == 2 else whole).contiguous()
        return converted


def num_heads(config: dict, kind: str) -> int:
    """Returns how many heads the rows of queries (q) or of keys and values (kv) belong to."""
    heads = config.get("num_attention_heads") or config["n_head"]
    return heads if kind == "q" else config.get("num_key_value_heads") or heads


def order_as_ours(tensor: Tensor, part: Part, config: dict) -> Tensor:
    """Returns rows [rows] or [rows, n] as torchtune's rotary embedding wants them: rotated pairs together."""
    return tensor if part.rotary is None else _reorder(tensor, num_heads(config, part.rotary), halves_first=True)


def order_as_theirs(tensor: Tensor, part: Part, config: dict) -> Tensor:
    """Returns rows [rows] or [rows, n] as Hugging Face's rotary embedding wants them: first halves before second."""
    return tensor if part.rotary is None else _reorder(tensor, num_heads(config, part.rotary), halves_first=False)


def _reorder(tensor: Tensor, heads: int, *, halves_first: bool) -> Tensor:
    half = tensor.shape[0] // heads // 2
    shape = (heads, 2, half) if halves_first else (heads, half, 2)
    return tensor.reshape(*shape, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\{\}", r"(\d+)"))


# The tables

NORM = {"weight": "scale"}
LAYER = "model.layers.{}."


def _attention(*, rotary: bool) -> tuple[Module, ...]:
    """Separate projections; `rotary`: torchtune's model wants pairs together."""
    return (
        Module(f"{LAYER}self_attn.q_proj", (Part("layers.{}.attn.q_proj", rotary="q" if rotary else None),)),
        Module(f"{LAYER}self_attn.k_proj", (Part("layers.{}.attn.k_proj", rotary="kv" if rotary else None),)),
        Module(f"{LAYER}self_attn.v_proj", (Part("layers.{}.attn.v_proj"),)),
        Module(f"{LAYER}self_attn.o_proj", (Part("layers.{}.attn.output_proj"),)),
    )


MLP = (
    Module(f"{LAYER}mlp.gate_proj", (Part("layers.{}.mlp.w1"),)),
    Module(f"{LAYER}mlp.up_proj", (Part("layers.{}.mlp.w3"),)),
    Module(f"{LAYER}mlp.down_proj", (Part("layers.{}.mlp.w2"),)),
)
NORMS = (
    Module(f"{LAYER}input_layernorm", (Part("layers.{}.sa_norm"),), NORM),
    Module(f"{LAYER}post_attention_layernorm", (Part("layers.{}.mlp_norm"),), NORM),
)
ENDS = (
    Module("model.embed_tokens", (Part("tok_embeddings"),)),
    Module("model.norm", (Part("norm"),), NORM),
    Module("lm_head", (Part("output"),)),
)
LLAMA = (*_attention(rotary=True), *MLP, *NORMS, *ENDS)
QWEN2 = (*_attention(rotary=False), *MLP, *NORMS, *ENDS)
QWEN3 = (
    *QWEN2,
    Module(f"{LAYER}self_attn.q_norm", (Part("layers.{}.attn.q_norm"),), NORM),
    Module(f"{LAYER}self_attn.k_norm", (Part("layers.{}.attn.k_norm"),), NORM),
)
PHI = (
    Module(
        f"{LAYER}self_attn.qkv_proj",
        tuple(Part(f"layers.{{}}.attn.{n}_proj", rows="q" if n == "q" else "kv") for n in "qkv"),
    ),
    Module(f"{LAYER}self_attn.o_proj", (Part("layers.{}.attn.output_proj"),)),
    Module(f"{LAYER}mlp.gate_up_proj", (Part("layers.{}.mlp.w1"), Part("layers.{}.mlp.w3"))),
    Module(f"{LAYER}mlp.down_proj", (Part("layers.{}.mlp.w2"),)),
    *NORMS,
    *ENDS,
)

FAMILIES = {
    family.name: family
    for family in (
        Family("LLAMA2", ("llama",), LLAMA),
        Family("LLAMA3", ("llama",), LLAMA),
        Family("LLAMA3_2", ("llama",), LLAMA),
        Family("MISTRAL", ("mistral",), LLAMA),
        Family("GEMMA", ("gemma",), LLAMA, tied=True),
        Family("QWEN2", ("qwen2",), QWEN2),
        Family("QWEN3", ("qwen3",), QWEN3),
        Family("PHI3_MINI", ("phi3",), PHI),
        Family("PHI4", ("phi3",), PHI),
    )
}


def of_config_type(config_type: str) -> list[str]:
    """Returns the families that a config.json of this model_type may be of."""
    return [name for name, family in FAMILIES.items() if config_type in family.config_types]


def config_types() -> Iterable[str]:
    """Returns every model_type of a config.json that is known."""
    return dict.fromkeys(kind for family in FAMILIES.values() for kind in family.config_types)
