"""GPT-2 (Radford et al., 2019) of torchtune's modules: learned positions, LayerNorm, biases, an output that is tied.

Queries, keys and values are layers of their own; Hugging Face's c_attn holds all three (families.py). Of GPT-2's
dropouts there is the one on attention, as in torchtune's builders.
"""

import torch
from torch import Tensor, nn
from torchtune.modules import (
    FeedForward,
    MultiHeadAttention,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)

VOCAB_SIZE = 50_257
MAX_SEQ_LEN = 1024


class LearnedPositionsDecoder(TransformerDecoder):
    """A decoder that adds a learned embedding of each token's position to that of the token.

    torchtune's own hands positions to attention only, where rotary embeddings are.
    """

    def __init__(self, *, pos_embeddings: nn.Embedding, **decoder):
        super().__init__(**decoder)
        self.pos_embeddings = pos_embeddings

    def forward(self, tokens: Tensor, *, mask=None, input_pos: Tensor | None = None) -> Tensor:
        """Returns what `unembed` makes of the last hidden states: logits [B, S, V].

        Args:
            tokens: [B, S].
            mask: As in torchtune's decoder.
            input_pos: [B, S], below the number of learned positions; while generating, torchtune gives [S] for all rows
                and [B] for one more token each. None: 0 to S - 1.
        """
        size = tokens.shape[1]
        self._validate_inputs(size, mask=mask, input_pos=input_pos)
        positions = torch.arange(size, device=tokens.device) if input_pos is None else input_pos
        h = self.tok_embeddings(tokens) + self.pos_embeddings(positions.view(-1, size))  # [B, S, D]
        for layer in self.layers:
            h = layer(h, mask=mask, input_pos=input_pos)
        return self.unembed(h)


def gpt2(
    vocab_size: int,
    num_layers: int,
    num_heads: int,
    embed_dim: int,
    max_seq_len: int,
    intermediate_dim: int | None = None,
    attn_dropout: float = 0.0,
    norm_eps: float = 1e-5,
    tie_word_embeddings: bool = True,
) -> TransformerDecoder:
    """Returns a GPT-2 of these sizes.

    Args:
        max_seq_len: How many positions have an embedding.
        intermediate_dim: Width of the MLP; None: four times embed_dim.
        tie_word_embeddings: The output layer is the embedding, as in every GPT-2 that OpenAI published.
    """
    head_dim, hidden_dim = embed_dim // num_heads, intermediate_dim or 4 * embed_dim
    options = {"activation": nn.GELU(approximate="tanh"), "max_seq_len": max_seq_len}
    options |= {"attn_dropout": attn_dropout, "norm_eps": norm_eps}
    tok_embeddings = nn.Embedding(vocab_size, embed_dim)
    return LearnedPositionsDecoder(
        tok_embeddings=tok_embeddings,
        pos_embeddings=nn.Embedding(max_seq_len, embed_dim),
        layers=[gpt_layer(embed_dim, num_heads, hidden_dim, **options) for _ in range(num_layers)],
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=nn.LayerNorm(embed_dim, eps=norm_eps),
        output=TiedLinear(tok_embeddings) if tie_word_embeddings else nn.Linear(embed_dim, vocab_size, bias=False),
    )


def gpt_layer(
    embed_dim: int,
    num_heads: int,
    hidden_dim: int,
    *,
    activation: nn.Module,
    max_seq_len: int,
    attn_dropout: float,
    norm_eps: float,
    pos_embeddings: nn.Module | None = None,
    layer_class: type[TransformerSelfAttentionLayer] = TransformerSelfAttentionLayer,
) -> TransformerSelfAttentionLayer:
    """Returns a layer of GPT-2 or GPT-NeoX: biases and LayerNorms everywhere, and an MLP without a gate."""
    return layer_class(
        attn=MultiHeadAttention(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_kv_heads=num_heads,
            head_dim=embed_dim // num_heads,
            q_proj=nn.Linear(embed_dim, embed_dim),
            k_proj=nn.Linear(embed_dim, embed_dim),
            v_proj=nn.Linear(embed_dim, embed_dim),
            output_proj=nn.Linear(embed_dim, embed_dim),
            pos_embeddings=pos_embeddings,
            max_seq_len=max_seq_len,
            attn_dropout=attn_dropout,
        ),
        mlp=FeedForward(
            gate_proj=nn.Linear(embed_dim, hidden_dim),
            down_proj=nn.Linear(hidden_dim, embed_dim),
            activation=activation,
        ),
        sa_norm=nn.LayerNorm(embed_dim, eps=norm_eps),
        mlp_norm=nn.LayerNorm(embed_dim, eps=norm_eps),
    )


def gpt2_124m() -> TransformerDecoder:
    """Returns GPT-2, openai-community/gpt2."""
    return gpt2(VOCAB_SIZE, num_layers=12, num_heads=12, embed_dim=768, max_seq_len=MAX_SEQ_LEN)


def gpt2_355m() -> TransformerDecoder:
    """Returns GPT-2 medium, openai-community/gpt2-medium."""
    return gpt2(VOCAB_SIZE, num_layers=24, num_heads=16, embed_dim=1024, max_seq_len=MAX_SEQ_LEN)


def gpt2_774m() -> TransformerDecoder:
    """Returns GPT-2 large, openai-community/gpt2-large."""
    return gpt2(VOCAB_SIZE, num_layers=36, num_heads=20, embed_dim=1280, max_seq_len=MAX_SEQ_LEN)


def gpt2_1_5b() -> TransformerDecoder:
    """Returns GPT-2 XL, openai-community/gpt2-xl."""
    return gpt2(VOCAB_SIZE, num_layers=48, num_heads=25, embed_dim=1600, max_seq_len=MAX_SEQ_LEN)
