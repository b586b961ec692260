"""A causal language model of transformers with the face that torchtune's decoders have.

B rows, S row length, N scored tokens, V vocabulary, D width.
"""

import copy
import inspect
import re

import torch
from torch import Tensor, nn

from pairtune.models.additions import Sharing, additions
from pairtune.models.bridge import head, towers, visible
from pairtune.pairs.batch import ROW_MULTIPLE, PairBatch, apart

_DROPOUT = re.compile(r"drop(out|_prob|$)|layerdrop")  # attributes of transformers' modules that hold a probability
_JITTER = re.compile("jitter")  # of routers that choose by chance while they are trained, and by another rule then


class BridgedDecoder(nn.Module):
    """What recipes use of a model: its layers, embeddings, output and positions; called with tokens and positions.

    While a batch is scored (`model.pairtune.batch`), it returns what `unembed` makes of the scored positions' hidden
    states; else logits.

    Attributes:
        lm: transformers' model.
        max_seq_len: Positions that it was made for.
        ties: Of weights of `lm` that have several names, the first one by each other.
        towers: Names of what it has for images and sound, which is not trained.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.max_seq_len = _num_positions(lm.config.get_text_config())
        self.towers = [f"lm.{name}" for name in towers.outermost(lm)]
        self._layers = [f"lm.{name}" for name in _names_of_layers(lm)]
        text = {id(p) for module in towers.text_modules(lm) for p in module.parameters(recurse=False)}
        for parameter in lm.parameters():
            parameter.requires_grad_(parameter.requires_grad and id(parameter) in text)
        self._takes_functions = lm.config._attn_implementation == visible.NAME
        self.ties = _ties(lm)
        children = [child for child in lm.children() if any(True for _ in child.parameters())]
        self._is_plain = len(children) == 2 and any(child is self.output for child in children)

    @property
    def layers(self) -> list[nn.Module]:
        """Its decoder layers."""
        return [self.get_submodule(name) for name in self._layers]

    @property
    def tok_embeddings(self) -> nn.Embedding:
        """Its embedding of tokens."""
        return self.lm.get_input_embeddings()

    @property
    def output(self) -> nn.Module:
        """Its output layer, whose weight is the embedding's where `is_tied`."""
        return self.lm.get_output_embeddings()

    @property
    def is_tied(self) -> bool:
        """Whether embedding and output layer are one weight."""
        return self.output.weight is self.tok_embeddings.weight

    @property
    def ways(self) -> list[Sharing]:
        """How it may take a pair's answers, the fastest first; what comes of each is for a run to compare."""
        ways = [Sharing(prompts, dense) for prompts in (True, False) for dense in (False, True)]
        return [way for way in ways if (way.dense or self._takes_functions) and not (way.prompts and self.is_stateful)]

    def share(self, how: Sharing) -> None:
        """Makes it take a pair's answers in one of `ways`."""
        additions(self).sharing = how
        for config in _configs(self.lm):
            config._attn_implementation = visible.DENSE if how.dense else visible.NAME

    @property
    def is_stateful(self) -> bool:
        """Whether layers of it go by what stands before a token in its row, and no mask tells them otherwise."""
        return bool(getattr(self.lm, "_is_stateful", False))

    @property
    def backbone(self) -> nn.Module:
        """All of it but the output layer."""
        base = self.lm.base_model
        return self.lm.model if base is self.lm else base

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        input_pos: Tensor | None = None,
        cache=None,
        published: Tensor | None = None,
    ) -> Tensor:
        """Returns what `unembed` makes of a batch, [N]; without one logits [B, S, V], with a cache the last ones.

        Args:
            tokens: [B, S] int64.
            mask: [B, all positions], 0 for padding; a batch needs none.
            input_pos: [B, S] int64.
            cache: transformers' past_key_values, which is added to.
            published: Columns [C] whose logits [B, C, V] are to be those of transformers' own forward and attention.
        """
        if published is not None:
            return self._published(tokens, published)
        batch = additions(self).batch
        if batch is not None:
            return self.unembed(self.hidden(batch))
        settings = {"use_cache": cache is not None} | ({} if cache is None else {"past_key_values": cache})
        hidden = self._before_output(input_ids=tokens, attention_mask=mask, position_ids=input_pos, **settings)
        logits = self.output(hidden if cache is None else hidden[:, -1:]) * head.scale_of(self.lm.config)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def hidden(self, batch: PairBatch) -> Tensor:
        """Returns the scored positions' hidden states [N, D], such that their product with the output is logits."""
        if not additions(self).sharing.prompts:
            batch = apart(batch, ROW_MULTIPLE if additions(self).takes_fixed_rows else 1)
        with visible.scoring(batch, additions(self).back_end):
            # With a mask of ones, transformers does not look for documents at positions that begin anew.
            hidden = self._before_output(
                input_ids=batch.tokens,
                position_ids=batch.input_pos,
                attention_mask=torch.ones_like(batch.tokens),
                use_cache=False,
            )
        hidden = hidden.flatten(0, 1)[batch.source]
        scale = head.scale_of(self.lm.config)
        return hidden if scale == 1 else hidden * scale

    def _before_output(self, **inputs) -> Tensor:
        """Returns what the output layer is given, [B, S, D]: with layers between it and the backbone, theirs."""
        if self._is_plain:
            return self.backbone(**inputs).last_hidden_state
        found: list[Tensor] = []
        self.output.forward = lambda hidden: found.append(hidden) or hidden
        try:
            self.lm(**inputs)
        finally:
            del self.output.forward
        return found[0]

    def new_cache(self):
        """Returns an empty cache of transformers for generation."""
        from transformers import DynamicCache

        return DynamicCache(config=self.lm.config)

    def _published(self, tokens: Tensor, columns: Tensor) -> Tensor:
        """Returns logits as transformers computes them, without a function of ours."""
        takes_columns = "logits_to_keep" in inspect.signature(self.lm.forward).parameters
        how = {"logits_to_keep": columns} if takes_columns else {}
        configs = _configs(self.lm)
        kept = [config._attn_implementation for config in configs]
        for config in configs:
            config._attn_implementation = "eager"
        try:
            logits = self.lm(input_ids=tokens, use_cache=False, **how).logits
        finally:
            for config, before in zip(configs, kept, strict=True):
                config._attn_implementation = before
        return logits if takes_columns else logits[:, columns]

    @property
    def softcap(self) -> float | None:
        """Of its logits; None: they have no cap."""
        return head.softcap_of(self.lm.config)

    def disable_dropout(self) -> bool:
        """Sets every dropout probability to zero; returns whether any was above. nn.Dropout's are not looked at.

        Routers that choose experts by chance while they are trained choose as they do later.
        """
        found = False
        for module in self.modules():
            drawn = [name for name, value in vars(module).items() if isinstance(value, float) and value > 0.0]
            for name in filter(_DROPOUT.search, drawn):
                setattr(module, name, 0.0)
                found = True
            if any(map(_JITTER.search, drawn)):
                module.eval()
                module.train = lambda mode=True, module=module: module
                found = True
        return found

    def retie(self) -> None:
        """Makes weights one again that are one, after the first of them was given its memory."""
        for name, first in self.ties.items():
            path, _, leaf = name.rpartition(".")
            setattr(self.lm.get_submodule(path), leaf, self.lm.get_parameter(first))

    def computed_buffers(self) -> dict[str, Tensor]:
        """Returns the buffers that no file holds, such as a rotary embedding's angles, on the CPU by their names.

        transformers computes them where it initializes weights, which its own loading relies on for every architecture:
        that of a model is done here to a twin whose weights take no memory.
        """
        from transformers import PreTrainedModel

        with torch.device("meta"):
            twin = type(self.lm)._from_config(copy.deepcopy(self.lm.config))
        found = {}
        for path, module in twin.named_modules():
            for leaf in module._non_persistent_buffers_set:
                if (buffer := getattr(module, leaf)) is not None:
                    setattr(module, leaf, torch.empty_like(buffer, device="cpu"))
                    found[f"{path}.{leaf}"] = module, leaf
        owners: dict[nn.Module, nn.Module] = {}  # the innermost of transformers' models that each module is of
        for model in (module for module in twin.modules() if isinstance(module, PreTrainedModel)):
            owners |= dict.fromkeys(model.modules(), model)
        with torch.no_grad():
            for module in reversed([*twin.modules()]):  # a model may set its layers' buffers
                owners[module]._init_weights(module)
        return {f"lm.{name}": getattr(module, leaf) for name, (module, leaf) in found.items()}


def _configs(lm: nn.Module) -> list:
    """Returns the configurations that its modules ask how to attend."""
    found = (getattr(module, "config", None) for module in lm.modules())
    return [*{id(config): config for config in found if hasattr(config, "_attn_implementation")}.values()]


def _ties(lm: nn.Module) -> dict[str, str]:
    """Returns, of parameters that a model has under several names, the first name by each other one."""
    by_tensor: dict[int, str] = {}
    named = lm.named_parameters(remove_duplicate=False)
    first = {name: by_tensor.setdefault(id(parameter), name) for name, parameter in named}
    return {name: other for name, other in first.items() if name != other}


def _num_positions(config) -> int:
    """Returns how many positions a model was made for; 2^31 where it has no limit.

    LongRoPE takes other angles for a whole row where one of its positions is beyond the first training's: shorter
    conversations in that row would have angles that they have not alone.
    """
    most = getattr(config, "max_position_embeddings", None) or 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        most = min(most, rope.get("original_max_position_embeddings") or most)
    return most


def _names_of_layers(lm: nn.Module) -> list[str]:
    """Returns the outermost modules that transformers does not split between devices: a text model's layers."""
    kinds, text, found = lm._no_split_modules or (), towers.text_modules(lm), []
    for name, module in lm.named_modules():
        is_layer = type(module).__name__ in kinds and module in text
        if is_layer and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return found
