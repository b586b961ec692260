"""A causal language model of transformers with the face that torchtune's decoders have.

B rows, S row length, N scored tokens, V vocabulary, D width.
"""

import re

import torch
from torch import Tensor, nn

from pairtune.models.additions import additions
from pairtune.models.bridge import head, visible
from pairtune.pairs.batch import PairBatch

_DROPOUT = re.compile(r"drop(out|_prob|$)|layerdrop")  # attributes of transformers' modules that hold a probability


class BridgedDecoder(nn.Module):
    """What recipes use of a model: its layers, embeddings, output and positions; called with tokens and positions.

    While a batch is scored (`model.pairtune.batch`), it returns what `unembed` makes of the scored positions' hidden
    states; else logits.

    Attributes:
        lm: transformers' model.
        max_seq_len: Positions that it was made for.
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        self.lm = lm
        self.max_seq_len = getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 2**31
        self._layers = _names_of_layers(lm)

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
    def backbone(self) -> nn.Module:
        """All of it but the output layer."""
        base = self.lm.base_model
        return self.lm.model if base is self.lm else base

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, input_pos: Tensor | None = None, cache=None
    ) -> Tensor:
        """Returns what `unembed` makes of a batch, [N]; without one logits [B, S, V], with a cache the last ones.

        Args:
            tokens: [B, S] int64.
            mask: [B, all positions], 0 for padding; a batch needs none.
            input_pos: [B, S] int64.
            cache: transformers' past_key_values, which is added to.
        """
        batch = additions(self).batch
        if batch is not None:
            return self.unembed(self.hidden(batch))
        settings = {"use_cache": cache is not None} | ({} if cache is None else {"past_key_values": cache})
        out = self.backbone(input_ids=tokens, attention_mask=mask, position_ids=input_pos, **settings)
        hidden = out.last_hidden_state
        logits = self.output(hidden if cache is None else hidden[:, -1:]) * head.scale_of(self.lm.config)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def hidden(self, batch: PairBatch) -> Tensor:
        """Returns the scored positions' hidden states [N, D], such that their product with the output is logits."""
        with visible.scoring(batch, additions(self).back_end):
            # With a mask of ones, transformers does not look for documents at positions that begin anew.
            out = self.backbone(
                input_ids=batch.tokens,
                position_ids=batch.input_pos,
                attention_mask=torch.ones_like(batch.tokens),
                use_cache=False,
            )
        hidden = out.last_hidden_state.flatten(0, 1)[batch.source]
        scale = head.scale_of(self.lm.config)
        return hidden if scale == 1 else hidden * scale

    def new_cache(self):
        """Returns an empty cache of transformers for generation."""
        from transformers import DynamicCache

        return DynamicCache(config=self.lm.config)

    @property
    def softcap(self) -> float | None:
        """Of its logits; None: they have no cap."""
        return head.softcap_of(self.lm.config)

    def disable_dropout(self) -> bool:
        """Sets every dropout probability to zero; returns whether any was above. nn.Dropout's are not looked at."""
        found = False
        for module in self.modules():
            for name, value in vars(module).items():
                if _DROPOUT.search(name) and isinstance(value, float) and value > 0.0:
                    setattr(module, name, 0.0)
                    found = True
        return found

    def retie(self) -> None:
        """Makes weights one again that are one, after the first of them was given its memory."""
        self.lm.tie_weights()

    def fill_buffers(self, module: nn.Module, device: torch.device) -> None:
        """Gives one module, not its children, the buffers that no file holds, such as a rotary embedding's angles.

        transformers computes them where it initializes weights, which from_pretrained relies on for every architecture.
        """
        empty = [name for name in module._non_persistent_buffers_set if getattr(module, name) is not None]
        empty = [name for name in empty if getattr(module, name).is_meta]
        if not empty:
            return
        for name in empty:
            setattr(module, name, torch.empty_like(getattr(module, name), device=device))
        for tensor in (*module.parameters(recurse=False), *_persistent(module)):
            tensor._is_hf_initialized = True  # and is left as it is
        with torch.no_grad():
            self.lm._init_weights(module)


def _persistent(module: nn.Module) -> list[Tensor]:
    buffers = module.named_buffers(recurse=False)
    return [buffer for name, buffer in buffers if name not in module._non_persistent_buffers_set]


def _names_of_layers(lm: nn.Module) -> list[str]:
    """Returns the outermost modules that transformers does not split between devices: a model's layers."""
    kinds, found = lm._no_split_modules or (), []
    for name, module in lm.named_modules():
        if type(module).__name__ in kinds and not any(name.startswith(f"{other}.") for other in found):
            found.append(name)
    return [f"lm.{name}" for name in found]
