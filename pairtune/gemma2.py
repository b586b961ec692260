"""Gemma 2 (arXiv 2408.00118) from torchtune's modules, computed as transformers does, and the names of its weights.

torchtune 0.6.1's own Gemma 2 caps hidden states in place of logits, and its attention knows rows in place of positions.
Here scores and logits are capped; sliding windows are models.prepare's, which has them from config.json.
"""

from functools import partial

import torch
from torch import Tensor, nn
from torchtune.models.convert_weights import get_mapped_key
from torchtune.models.gemma.gemma_norm_embedding import GemmaNormEmbeddings
from torchtune.models.gemma.rms_norm import GemmaRMSNorm
from torchtune.modules import (
    FeedForward,
    FrozenNF4Linear,
    MultiHeadAttention,
    RotaryPositionalEmbeddings,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from torchtune.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear

from pairtune.attention import Attention


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
        attn_logit_softcapping: Scores s become c * tanh(s / c); null: they stay as they are.
        final_logit_softcapping: The same for the output's logits.
    """
    return lora_gemma2(
        [],
        vocab_size=vocab_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        embed_dim=embed_dim,
        intermediate_dim=intermediate_dim,
        max_seq_len=max_seq_len,
        query_pre_attn_scalar=query_pre_attn_scalar,
        attn_logit_softcapping=attn_logit_softcapping,
        final_logit_softcapping=final_logit_softcapping,
        attn_dropout=attn_dropout,
        norm_eps=norm_eps,
        rope_base=rope_base,
    )


def lora_gemma2(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
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
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> TransformerDecoder:
    """Returns the same with adapters on the named projections; the output is the embedding and takes none.

    Args:
        quantize_base: All linear layers in NF4, those without adapters too.
    """

    def linear(in_dim: int, out_dim: int, adapted: bool) -> nn.Module:
        if adapted:
            adapter = DoRALinear if use_dora else LoRALinear
            return adapter(in_dim, out_dim, lora_rank, lora_alpha, lora_dropout, quantize_base=quantize_base)
        return (FrozenNF4Linear if quantize_base else nn.Linear)(in_dim, out_dim, bias=False)

    def attention() -> MultiHeadAttention:
        queries, keys = num_heads * head_dim, num_kv_heads * head_dim
        layer = MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q_proj=linear(embed_dim, queries, "q_proj" in lora_attn_modules),
            k_proj=linear(embed_dim, keys, "k_proj" in lora_attn_modules),
            v_proj=linear(embed_dim, keys, "v_proj" in lora_attn_modules),
            output_proj=linear(queries, embed_dim, "output_proj" in lora_attn_modules),
            pos_embeddings=rope,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        )
        layer._attention_call = Attention(softcap=attn_logit_softcapping, scale=query_pre_attn_scalar**-0.5)
        return layer

    def mlp() -> FeedForward:
        return FeedForward(
            gate_proj=linear(embed_dim, intermediate_dim, apply_lora_to_mlp),
            down_proj=linear(intermediate_dim, embed_dim, apply_lora_to_mlp),
            up_proj=linear(embed_dim, intermediate_dim, apply_lora_to_mlp),
            activation=nn.GELU(approximate="tanh"),
        )

    rope = RotaryPositionalEmbeddings(dim=head_dim, max_seq_len=max_seq_len, base=rope_base)
    norm = partial(GemmaRMSNorm, embed_dim, eps=norm_eps)
    layers = [
        # The scales are norms, of what attention and MLP add to the residual stream.
        TransformerSelfAttentionLayer(
            attention(), mlp(), sa_norm=norm(), sa_scale=norm(), mlp_norm=norm(), mlp_scale=norm()
        )
        for _ in range(num_layers)
    ]
    embeddings = GemmaNormEmbeddings(vocab_size, embed_dim)  # times sqrt(embed_dim), rounded to the model's dtype
    return TransformerDecoder(
        tok_embeddings=embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=norm(),
        output=CappedTiedLinear(embeddings, final_logit_softcapping),
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

gemma2_2b, lora_gemma2_2b = partial(gemma2, **_2B), partial(lora_gemma2, **_2B)
gemma2_9b, lora_gemma2_9b = partial(gemma2, **_9B), partial(lora_gemma2, **_9B)
gemma2_27b, lora_gemma2_27b = partial(gemma2, **_27B), partial(lora_gemma2, **_27B)


_FROM_HF = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.layers.{}.input_layernorm.weight": "layers.{}.sa_norm.scale",
    "model.layers.{}.self_attn.q_proj.weight": "layers.{}.attn.q_proj.weight",
    "model.layers.{}.self_attn.k_proj.weight": "layers.{}.attn.k_proj.weight",
    "model.layers.{}.self_attn.v_proj.weight": "layers.{}.attn.v_proj.weight",
    "model.layers.{}.self_attn.o_proj.weight": "layers.{}.attn.output_proj.weight",
    "model.layers.{}.post_attention_layernorm.weight": "layers.{}.sa_scale.scale",
    "model.layers.{}.pre_feedforward_layernorm.weight": "layers.{}.mlp_norm.scale",
    "model.layers.{}.mlp.gate_proj.weight": "layers.{}.mlp.w1.weight",
    "model.layers.{}.mlp.up_proj.weight": "layers.{}.mlp.w3.weight",
    "model.layers.{}.mlp.down_proj.weight": "layers.{}.mlp.w2.weight",
    "model.layers.{}.post_feedforward_layernorm.weight": "layers.{}.mlp_scale.scale",
    "model.norm.weight": "norm.scale",
}
_TO_HF = {tune: theirs for theirs, tune in _FROM_HF.items()}


def to_tune(name: str, value: Tensor, config: dict) -> dict[str, Tensor]:
    """Returns one weight of a Hugging Face Gemma 2 under the decoder's name; nothing for what the decoder has not.

    Args:
        config: The folder's config.json.

    Raises:
        Exception: The name is of no weight of Gemma 2.
    """
    if name == "lm_head.weight" or name.endswith("rotary_emb.inv_freq"):  # the embedding again; computed
        return {}
    heads = _rotated_heads(name, config)
    if heads:  # Hugging Face keeps a head's first halves of rotated pairs before its second ones, torchtune pairs
        value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
    return {get_mapped_key(name, _FROM_HF): value}


def to_hf(name: str, value: Tensor, config: dict) -> dict[str, Tensor]:
    """Returns one of the decoder's weights under its Hugging Face name; the inverse of `to_tune`."""
    heads = _rotated_heads(name, config)
    if heads:
        value = value.view(heads, -1, 2, value.shape[1]).transpose(1, 2).reshape(value.shape)
    return {get_mapped_key(name, _TO_HF): value}


def _rotated_heads(name: str, config: dict) -> int | None:
    """The heads of a projection whose output is rotated by position."""
    if name.endswith("q_proj.weight"):
        return config["num_attention_heads"]
    return config["num_key_value_heads"] if name.endswith("k_proj.weight") else None
