"""Mixtral (arXiv 2401.04088): torchtune's Mistral with a mixture of experts in the place of each MLP.

It has no sliding window but one that a folder's config.json gives it.
"""

from torch import nn
from torchtune.models.mistral import mistral
from torchtune.modules import FeedForward, TransformerDecoder

from pairtune.models.experts import MixtureOfExperts


def mixtral(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    num_experts: int = 8,
    experts_per_token: int = 2,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    rope_base: float = 1_000_000.0,
) -> TransformerDecoder:
    """Returns a Mixtral of these sizes.

    Args:
        intermediate_dim: Inner width of an expert.
        num_experts: Experts a layer.
        experts_per_token: How many of them a token is sent to.
    """
    model = mistral(
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
    )
    for layer in model.layers:
        router = nn.Linear(embed_dim, num_experts, bias=False)
        experts = [_expert(embed_dim, intermediate_dim) for _ in range(num_experts)]
        layer.mlp = MixtureOfExperts(router, experts, experts_per_token)
    return model


def _expert(width: int, inner: int) -> FeedForward:
    return FeedForward(
        gate_proj=nn.Linear(width, inner, bias=False),
        down_proj=nn.Linear(inner, width, bias=False),
        up_proj=nn.Linear(width, inner, bias=False),
    )


def mixtral_8x7b() -> TransformerDecoder:
    """Returns Mixtral 8x7B: 46,702,792,704 parameters, of which a token meets 12,879,925,248."""
    return mixtral(
        vocab_size=32_000,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        embed_dim=4096,
        intermediate_dim=14_336,
        max_seq_len=32_768,
    )


def mixtral_8x22b(vocab_size: int = 32_000) -> TransformerDecoder:
    """Returns Mixtral 8x22B: 140,620,634,112 parameters, of which a token meets 39,152,031,744.

    Args:
        vocab_size: 32,000 of the base model; the Instruct model has 32,768.
    """
    return mixtral(
        vocab_size=vocab_size,
        num_layers=56,
        num_heads=48,
        num_kv_heads=8,
        embed_dim=6144,
        intermediate_dim=16_384,
        max_seq_len=65_536,
    )
