"""GPT-NeoX (arXiv 2204.06745) and Pythia (arXiv 2304.01373) of torchtune's modules.

LayerNorm, biases, rotary embeddings of a quarter of each head, and attention and MLP side by side. Queries, keys and
values are layers of their own; Hugging Face's query_key_value holds all three, head by head (families.py).
"""

import torch
from torch import Tensor, nn
from torchtune.models.qwen2 import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import TiedLinear, TransformerDecoder, TransformerSelfAttentionLayer

from pairtune.models.gpt2 import gpt_layer


class ParallelResidualLayer(TransformerSelfAttentionLayer):
    """A layer whose attention and MLP read the same input: x + attn(sa_norm(x)) + mlp(mlp_norm(x))."""

    use_parallel_residual = True

    def forward(self, x: Tensor, *, mask=None, input_pos: Tensor | None = None, **_) -> Tensor:
        h = self.sa_norm(x)
        return self.mlp(self.mlp_norm(x)) + self.attn(h, h, mask=mask, input_pos=input_pos) + x


class PartialRotaryPositionalEmbeddings(Qwen2RotaryPositionalEmbeddings):
    """Rotates the first `dim` numbers of each head, first halves of pairs before second ones; the others stay."""

    def forward(self, x: Tensor, input_pos: Tensor | None = None) -> Tensor:
        return torch.cat([super().forward(x[..., : self.dim], input_pos), x[..., self.dim :]], dim=-1)


def gpt_neox(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    max_seq_len: int = 2048,
    intermediate_dim: int | None = None,
    rotary_pct: float = 0.25,
    rope_base: int = 10_000,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    use_parallel_residual: bool = True,
    tie_word_embeddings: bool = False,
) -> TransformerDecoder:
    """Returns a GPT-NeoX of these sizes.

    Args:
        intermediate_dim: Width of the MLP; None: four times embed_dim.
        rotary_pct: The share of each head that is rotated.
        use_parallel_residual: Attention and MLP side by side; false: one behind the other, as in GPT-2.
        tie_word_embeddings: The output layer is the embedding.
    """
    head_dim, hidden_dim = embed_dim // num_heads, intermediate_dim or 4 * embed_dim
    rope = PartialRotaryPositionalEmbeddings(int(head_dim * rotary_pct), max_seq_len, rope_base)
    options = {"activation": nn.GELU(), "pos_embeddings": rope, "max_seq_len": max_seq_len}
    options |= {"attn_dropout": attn_dropout, "norm_eps": norm_eps}
    if use_parallel_residual:
        options["layer_class"] = ParallelResidualLayer
    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=[gpt_layer(embed_dim, num_heads, hidden_dim, **options) for _ in range(num_layers)],
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=nn.LayerNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(tok_embeddings) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )


# Pythia. Vocabularies are padded differently, to suit the parallelism that each size was trained with.


def pythia_70m() -> TransformerDecoder:
    """Returns EleutherAI/pythia-70m."""
    return gpt_neox(50_304, num_layers=6, num_heads=8, embed_dim=512)


def pythia_160m() -> TransformerDecoder:
    """Returns EleutherAI/pythia-160m."""
    return gpt_neox(50_304, num_layers=12, num_heads=12, embed_dim=768)


def pythia_410m() -> TransformerDecoder:
    """Returns EleutherAI/pythia-410m."""
    return gpt_neox(50_304, num_layers=24, num_heads=16, embed_dim=1024)


def pythia_1b() -> TransformerDecoder:
    """Returns EleutherAI/pythia-1b."""
    return gpt_neox(50_304, num_layers=16, num_heads=8, embed_dim=2048)


def pythia_1_4b() -> TransformerDecoder:
    """Returns EleutherAI/pythia-1.4b."""
    return gpt_neox(50_304, num_layers=24, num_heads=16, embed_dim=2048)


def pythia_2_8b() -> TransformerDecoder:
    """Returns EleutherAI/pythia-2.8b."""
    return gpt_neox(50_304, num_layers=32, num_heads=32, embed_dim=2560)


def pythia_6_9b() -> TransformerDecoder:
    """Returns EleutherAI/pythia-6.9b."""
    return gpt_neox(50_432, num_layers=32, num_heads=32, embed_dim=4096)


def pythia_12b() -> TransformerDecoder:
    """Returns EleutherAI/pythia-12b."""
    return gpt_neox(50_688, num_layers=36, num_heads=40, embed_dim=5120)
