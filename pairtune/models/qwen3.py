"""Qwen 3 (arXiv 2505.09388) from torchtune's modules: Qwen 2 with normalised queries and keys in place of biases."""

from functools import partial

from torch import nn
from torchtune.models.qwen2._positional_embeddings import Qwen2RotaryPositionalEmbeddings
from torchtune.modules import (
    FeedForward,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from pairtune.models.attention import GroupedAttention


def qwen3(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: float = 1_000_000.0,
    tie_word_embeddings: bool = False,
) -> TransformerDecoder:
    """Returns a Qwen 3 of these sizes; arguments as torchtune's qwen2, and heads of a width of their own.

    Args:
        head_dim: Width of a head, which embed_dim / num_heads need not be.
        tie_word_embeddings: The output layer is the embedding.
    """
    queries, keys = num_heads * head_dim, num_kv_heads * head_dim
    rope = Qwen2RotaryPositionalEmbeddings(dim=head_dim, max_seq_len=max_seq_len, base=rope_base)
    layers = [
        TransformerSelfAttentionLayer(
            attn=Qwen3Attention(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                q_proj=nn.Linear(embed_dim, queries, bias=False),
                k_proj=nn.Linear(embed_dim, keys, bias=False),
                v_proj=nn.Linear(embed_dim, keys, bias=False),
                output_proj=nn.Linear(queries, embed_dim, bias=False),
                q_norm=RMSNorm(head_dim, eps=norm_eps),
                k_norm=RMSNorm(head_dim, eps=norm_eps),
                pos_embeddings=rope,
                max_seq_len=max_seq_len,
                attn_dropout=attn_dropout,
            ),
            mlp=FeedForward(
                gate_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
                down_proj=nn.Linear(intermediate_dim, embed_dim, bias=False),
                up_proj=nn.Linear(embed_dim, intermediate_dim, bias=False),
            ),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )
        for _ in range(num_layers)
    ]
    embeddings = nn.Embedding(vocab_size, embed_dim)
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(embeddings) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )


class Qwen3Attention(GroupedAttention):
    """Normalises queries and keys before it rotates them."""

    normalises_first = True


# The sizes of Qwen's config.json files.
_ALL = {"vocab_size": 151_936, "num_kv_heads": 8, "head_dim": 128, "max_seq_len": 40_960}
_TIED = _ALL | {"tie_word_embeddings": True}

qwen3_0_6b = partial(qwen3, **_TIED, num_layers=28, num_heads=16, embed_dim=1024, intermediate_dim=3072)
qwen3_1_7b = partial(qwen3, **_TIED, num_layers=28, num_heads=16, embed_dim=2048, intermediate_dim=6144)
qwen3_4b = partial(qwen3, **_TIED, num_layers=36, num_heads=32, embed_dim=2560, intermediate_dim=9728)
qwen3_8b = partial(qwen3, **_ALL, num_layers=36, num_heads=32, embed_dim=4096, intermediate_dim=12_288)
qwen3_14b = partial(qwen3, **_ALL, num_layers=40, num_heads=40, embed_dim=5120, intermediate_dim=17_408)
qwen3_32b = partial(qwen3, **_ALL, num_layers=64, num_heads=64, embed_dim=5120, intermediate_dim=25_600)
