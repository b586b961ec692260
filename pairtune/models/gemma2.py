"""Gemma 2 (arXiv 2408.00118) from torchtune's modules, computed as transformers does.

torchtune 0.6.1's own Gemma 2 caps hidden states in place of logits, and its attention knows rows in place of positions.
Here scores and logits are capped; sliding windows are models.prepare's, which has them from config.json.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

from pairtune.models.attention import Attention

_linear = partial(nn.Linear, bias=False)


def gemma2(
    *,
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    embed_dim: int,
    intermediate_dim: int,
    max_seq_len: int,
    query_pre_attn_scalar: float,
    attn_logit_softcapping: float | None = 50.0,
    final_logit_softcapping: float | None = 30.0,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-6,
    rope_base: int = 10_000,
) -> TransformerDecoder:
    """Returns a Gemma 2 of these sizes. What torchtune's builders have no name for is named as in config.json.

    Args:
        query_pre_attn_scalar: Scores are divided by its square root.
        attn_logit_softcapping: Scores s become c * tanh(s / c); null or 0: they stay as they are.
        final_logit_softcapping: The same for the output's logits.
    """

    def attention() -> MultiHeadAttention:
        queries, keys = num_heads * head_dim, num_kv_heads * head_dim
        layer = MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=_linear(embed_dim, queries),
            k_proj=_linear(embed_dim, keys),
            v_proj=_linear(embed_dim, keys),
            output_proj=_linear(queries, embed_dim),
            pos_embeddings=rope,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        layer._attention_call = Attention(softcap=attn_logit_softcapping or None, scale=query_pre_attn_scalar**-0.5)
        return layer

    rope = RotaryPositionalEmbeddings(dim=head_dim, max_seq_len=max_seq_len, base=rope_base)
    norm = partial(GemmaRMSNorm, embed_dim, eps=norm_eps)
    layers = [_layer(attention(), _mlp(embed_dim, intermediate_dim), norm) for _ in range(num_layers)]
    embeddings = GemmaNormEmbeddings(vocab_size, embed_dim)  # times sqrt(embed_dim), rounded to the model's dtype
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=norm(),
        output=CappedTiedLinear(embeddings, final_logit_softcapping or None),
    )


def _mlp(embed_dim: int, intermediate_dim: int) -> FeedForward:
    return FeedForward(
        gate_proj=_linear(embed_dim, intermediate_dim),
        down_proj=_linear(intermediate_dim, embed_dim),
        up_proj=_linear(embed_dim, intermediate_dim),
        activation=nn.GELU(approximate="tanh"),
    )


def _layer(attention: MultiHeadAttention, mlp: FeedForward, norm: Callable[[], nn.Module]) -> nn.Module:
    """The scales are norms, of what attention and MLP add to the residual stream."""
    return TransformerSelfAttentionLayer(
        attention, mlp, sa_norm=norm(), sa_scale=norm(), mlp_norm=norm(), mlp_scale=norm()
    )


class CappedTiedLinear(TiedLinear):
    """An output that is the embedding; its logits z become softcap * tanh(z / softcap), in float32."""

    def __init__(self, tied_module: nn.Module, softcap: float | None):
        super().__init__(tied_module)
        self.softcap = softcap  # logps reads it, and computes from the weight

    def __call__(self, x: Tensor) -> Tensor:
        logits = super().__call__(x)
        if self.softcap is None:
            return logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return self.softcap * torch.tanh(logits / self.softcap)


# The sizes of Google's config.json files.
_2B = {
    "vocab_size": 256_000, "num_layers": 26, "num_heads": 8, "num_kv_heads": 4, "head_dim": 256, "embed_dim": 2304,
    "intermediate_dim": 9216, "max_seq_len": 8192, "query_pre_attn_scalar": 256,
}  # fmt: skip
_9B = {
    "vocab_size": 256_000, "num_layers": 42, "num_heads": 16, "num_kv_heads": 8, "head_dim": 256, "embed_dim": 3584,
    "intermediate_dim": 14_336, "max_seq_len": 8192, "query_pre_attn_scalar": 256,
}  # fmt: skip
_27B = {
    "vocab_size": 256_000, "num_layers": 46, "num_heads": 32, "num_kv_heads": 16, "head_dim": 128, "embed_dim": 4608,
    "intermediate_dim": 36_864, "max_seq_len": 8192, "query_pre_attn_scalar": 144,
}  # fmt: skip

gemma2_2b = partial(gemma2, **_2B)
gemma2_9b = partial(gemma2, **_9B)
gemma2_27b = partial(gemma2, **_27B)
