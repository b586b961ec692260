"""How Hugging Face folders name and order the weights of a family of models: a table for each, read in both directions.

A table serves whole weights and PEFT's adapters alike: which of our layers lie in which of theirs, in what rows, in
what order. Ours are torchtune's names.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pairtune.config.config_json import setting
from pairtune.config.rules import LORA_LAYERS, OUR_LAYERS


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
        interleaved: Its parts take turns, a head each, as in GPT-NeoX's query_key_value.
        loaded: What transformers 5 calls it in memory, and PEFT after it, where files have another name.
    """

    theirs: str
    parts: tuple[Part, ...]
    leaves: Mapping[str, str] = field(default_factory=lambda: {"weight": "weight", "bias": "bias"})
    transposed: bool = False
    interleaved: bool = False
    loaded: str | None = None

    @property
    def adapted(self) -> str:
        """What an adapter calls it."""
        return self.loaded or self.theirs

    @property
    def is_linear(self) -> bool:
        """A matrix and perhaps a bias, not a norm's scale."""
        return self.leaves["weight"] == "weight" and "norm" not in self.parts[0].name

    @property
    def is_adaptable(self) -> bool:
        """A linear layer, which LoRA adapts; an embedding is none."""
        return self.is_linear and not self.parts[0].name.endswith("_embeddings")

    def sizes(self, rows: int, config: dict) -> list[int]:
        """Returns how many of a matrix's rows each part has."""
        shares = self.shares(config)
        return [rows * share // sum(shares) for share in shares]

    def shares(self, config: dict) -> list[int]:
        """Returns how its rows are shared out: how many each part has, of as many as they add up to."""
        if self.parts[0].rows == "equal":
            return [1] * len(self.parts)
        return [num_heads(config, part.rows) for part in self.parts]

    def split(self, tensor: Tensor, config: dict) -> list[Tensor]:
        """Returns the rows [rows] or [rows, n] of each part, in our order.

        Raises:
            RuntimeError: They cannot be cut so.
        """
        if self.interleaved:  # [heads, parts, rows a head, ...] to [parts, heads, rows a head, ...]
            tensor = tensor.unflatten(0, (num_heads(config, "q"), len(self.parts), -1)).transpose(0, 1).flatten(0, 2)
        pieces = tensor.split(self.sizes(len(tensor), config)) if len(self.parts) > 1 else [tensor]
        return [order_as_ours(piece, part, config) for piece, part in zip(pieces, self.parts, strict=True)]

    def join(self, pieces: list[Tensor], config: dict) -> Tensor:
        """Returns the rows of all parts as theirs: what `split` takes apart."""
        pieces = [order_as_theirs(piece, part, config) for piece, part in zip(pieces, self.parts, strict=True)]
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if self.interleaved:
            whole = whole.unflatten(0, (len(self.parts), num_heads(config, "q"), -1)).transpose(0, 1).flatten(0, 2)
        return whole


@dataclass(frozen=True)
class Family:
    """The weights of one `checkpointer.model_type`.

    Attributes:
        name: The model_type.
        ignored: Endings of their tensors that hold nothing trained.
        prefix: Of all other layers; a folder that was saved without an output layer lacks it.
        other_names: Gives what is in a tensor of a folder under the names of `modules`, where some name it otherwise.
    """

    name: str
    modules: tuple[Module, ...]
    ignored: tuple[str, ...] = ("rotary_emb.inv_freq",)
    prefix: str = "model."
    other_names: Callable[[str, Tensor], dict[str, Tensor]] | None = None

    @cached_property
    def _theirs(self) -> list[tuple[re.Pattern, Module]]:
        return [(_pattern(name), m) for m in self.modules for name in dict.fromkeys((m.theirs, m.adapted))]

    @cached_property
    def _ours(self) -> list[tuple[re.Pattern, Module, int]]:
        return [(_pattern(part.name), m, i) for m in self.modules for i, part in enumerate(m.parts)]

    @property
    def lora_names(self) -> list[str]:
        """What lora.modules may hold for it: torchtune's names and its own."""
        adaptable = [m for m in self.modules if m.is_adaptable]
        names = {*OUR_LAYERS, *(name.rpartition(".")[2] for m in adaptable for name in (m.theirs, m.adapted))}
        layers = {re.sub(r"^layers\.{}\.|experts\.{}\.", "", part.name) for m in adaptable for part in m.parts}
        return [name for name, ours in LORA_LAYERS.items() if name in names and layers & set(ours)]

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

    def name_of(self, weight: str) -> str | None:
        """Returns what one of our weights is called there; None for an unknown one."""
        layer, _, our_leaf = weight.rpartition(".")
        module, _, theirs = self.find_ours(layer) or (None, 0, "")
        leaves = {ours: leaf for leaf, ours in module.leaves.items()} if module else {}
        return f"{theirs}.{leaves[our_leaf]}" if our_leaf in leaves else None

    def to_ours(self, name: str, value: Tensor, config: dict) -> dict[str, Tensor]:
        """Returns what one of their tensors is here; nothing for one that is ignored. A tied output is the embedding.

        Raises:
            KeyError: No such tensor in this family.
            RuntimeError: A shape that does not go with config.json.
        """
        if self.other_names:
            renamed = self.other_names(name, value)
            if name not in renamed:
                return {ours: v for theirs in renamed.items() for ours, v in self.to_ours(*theirs, config).items()}
        layer, _, leaf = name.rpartition(".")
        if name.endswith(self.ignored):
            return {}
        module, ours = self.find_theirs(layer) or self.find_theirs(self.prefix + layer) or (None, [])
        if ours == ["output"] and setting(config, "tie_word_embeddings"):
            ours = ["tok_embeddings"]
        if module is None or leaf not in module.leaves:
            raise KeyError(f"no weight of {self.name}")
        if module.is_linear and leaf == "weight" and value.dim() != 2:
            raise RuntimeError("it is no matrix")
        value = value.T if module.transposed and value.dim() == 2 else value
        pieces = module.split(value, config)
        return {f"{name}.{module.leaves[leaf]}": piece for name, piece in zip(ours, pieces, strict=True)}

    def to_theirs(self, weights: Mapping[str, Tensor], config: dict) -> dict[str, Tensor]:
        """Returns whole weights of a model under their names.

        Raises:
            KeyError: A weight that this family does not have, or a fused matrix with a part missing.
        """
        converted = {}
        for name in weights:
            theirs = self.name_of(name)
            if theirs is None:
                raise KeyError(f"{name}: no weight of {self.name}")
            if theirs in converted:  # with an earlier part of it
                continue
            layer, _, leaf = theirs.rpartition(".")
            module, ours = self.find_theirs(layer)
            whole = module.join([weights[f"{part_name}.{module.leaves[leaf]}"] for part_name in ours], config)
            converted[theirs] = (whole.T if module.transposed and whole.dim() == 2 else whole).contiguous()
        return converted


def num_heads(config: dict, kind: str) -> int:
    """Returns how many heads the rows of queries (q) or of keys and values (kv) belong to."""
    heads = setting(config, "num_attention_heads")
    return heads if kind == "q" else setting(config, "num_key_value_heads") or heads


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
GEMMA2_NORMS = tuple(
    Module(f"{LAYER}{theirs}", (Part(f"layers.{{}}.{ours}"),), NORM)
    for theirs, ours in (
        ("input_layernorm", "sa_norm"),
        ("post_attention_layernorm", "sa_scale"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_scale"),
    )
)
LLAMA = (*_attention(rotary=True), *MLP, *NORMS, *ENDS)
QWEN2 = (*_attention(rotary=False), *MLP, *NORMS, *ENDS)
MIXTRAL = (
    *_attention(rotary=True),
    Module(f"{LAYER}block_sparse_moe.gate", (Part("layers.{}.mlp.router"),)),
    *(
        Module(f"{LAYER}block_sparse_moe.experts.{{}}.{name}", (Part(f"layers.{{}}.mlp.experts.{{}}.{name}"),))
        for name in ("w1", "w3", "w2")
    ),
    *NORMS,
    *ENDS,
)
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

H = "transformer.h.{}."
GPT2 = (
    Module(f"{H}attn.c_attn", tuple(Part(f"layers.{{}}.attn.{n}_proj") for n in "qkv"), transposed=True),
    Module(f"{H}attn.c_proj", (Part("layers.{}.attn.output_proj"),), transposed=True),
    Module(f"{H}mlp.c_fc", (Part("layers.{}.mlp.w1"),), transposed=True),
    Module(f"{H}mlp.c_proj", (Part("layers.{}.mlp.w2"),), transposed=True),
    Module(f"{H}ln_1", (Part("layers.{}.sa_norm"),)),
    Module(f"{H}ln_2", (Part("layers.{}.mlp_norm"),)),
    Module("transformer.wte", (Part("tok_embeddings"),)),
    Module("transformer.wpe", (Part("pos_embeddings"),)),
    Module("transformer.ln_f", (Part("norm"),)),
    Module("lm_head", (Part("output"),)),
)
NEOX_LAYER = "gpt_neox.layers.{}."
GPT_NEOX = (
    Module(
        f"{NEOX_LAYER}attention.query_key_value",
        tuple(Part(f"layers.{{}}.attn.{n}_proj") for n in "qkv"),
        interleaved=True,
    ),
    Module(f"{NEOX_LAYER}attention.dense", (Part("layers.{}.attn.output_proj"),)),
    Module(f"{NEOX_LAYER}mlp.dense_h_to_4h", (Part("layers.{}.mlp.w1"),)),
    Module(f"{NEOX_LAYER}mlp.dense_4h_to_h", (Part("layers.{}.mlp.w2"),)),
    Module(f"{NEOX_LAYER}input_layernorm", (Part("layers.{}.sa_norm"),)),
    Module(f"{NEOX_LAYER}post_attention_layernorm", (Part("layers.{}.mlp_norm"),)),
    Module("gpt_neox.embed_in", (Part("tok_embeddings"),)),
    Module("gpt_neox.final_layer_norm", (Part("norm"),)),
    Module("embed_out", (Part("output"),), loaded="lm_head"),
)

# Masks and angles that older folders keep among the weights.
GPT2_BUFFERS = (".attn.bias", ".attn.masked_bias")
GPT_NEOX_BUFFERS = (".attention.bias", ".attention.masked_bias", "rotary_emb.inv_freq")


def _unstack_experts(name: str, value: Tensor) -> dict[str, Tensor]:
    """Returns Mixtral's weights under the Hub's names from those that transformers 5 computes with.

    There a layer's experts are one tensor [experts, rows, columns], w1 above w3; save_pretrained writes the Hub's names
    unless save_original_format=False.
    """
    name = name.replace(".mlp.", ".block_sparse_moe.")
    experts, _, leaf = name.rpartition(".")
    parts = {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)}.get(leaf)
    if parts is None:
        return {name: value}
    return {
        f"{experts}.{number}.{part}.weight": matrix
        for number, expert in enumerate(value)
        for part, matrix in zip(parts, expert.chunk(len(parts)), strict=True)
    }


FAMILIES = {
    family.name: family
    for family in (
        Family("LLAMA2", LLAMA),
        Family("LLAMA3", LLAMA),
        Family("LLAMA3_2", LLAMA),
        Family("MISTRAL", LLAMA),
        Family("MIXTRAL", MIXTRAL, other_names=_unstack_experts),
        Family("GEMMA", LLAMA),
        Family("GEMMA2", (*_attention(rotary=True), *MLP, *GEMMA2_NORMS, *ENDS)),
        Family("QWEN2", QWEN2),
        Family("QWEN3", QWEN3),
        Family("PHI3_MINI", PHI),
        Family("PHI4", PHI),
        Family("GPT2", GPT2, GPT2_BUFFERS, prefix="transformer."),
        Family("GPT_NEOX", GPT_NEOX, GPT_NEOX_BUFFERS, prefix="gpt_neox."),
    )
}
