"""What the config.json of each model says on the Hugging Face Hub, as far as it decides what the model is.

And its number of parameters, each counted once: what some repositories store besides, such as a tied output layer, is
not among them. Keys are transformers' own, so that transformers builds the same model.
"""


def _sizes(width, mlp, layers, heads, kv_heads):
    return {
        "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }  # fmt: skip


def _llama3_rope(factor):
    return {
        "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }  # fmt: skip


_LLAMA2 = {"model_type": "llama", "vocab_size": 32_000, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
_LLAMA2 |= {"max_position_embeddings": 4096, "rope_theta": 10_000.0}
_LLAMA3 = _LLAMA2 | {"vocab_size": 128_256, "rope_theta": 500_000.0, "max_position_embeddings": 8192}
_LLAMA3_1 = _LLAMA3 | {"rope_scaling": _llama3_rope(8.0), "max_position_embeddings": 131_072}
_LLAMA3_2 = _LLAMA3_1 | {"rope_scaling": _llama3_rope(32.0), "tie_word_embeddings": True}
_TULU3 = _LLAMA3_1 | {"vocab_size": 128_264}
_SMOLLM2 = _LLAMA2 | {"vocab_size": 49_152, "tie_word_embeddings": True, "max_position_embeddings": 8192}
_MISTRAL = _LLAMA2 | _sizes(4096, 14_336, 32, 32, 8) | {"model_type": "mistral", "max_position_embeddings": 32_768}
_GEMMA = {"model_type": "gemma", "vocab_size": 256_000, "rms_norm_eps": 1e-6, "head_dim": 256, "rope_theta": 10_000.0}
_GEMMA |= {"max_position_embeddings": 8192}  # and no tie_word_embeddings: it is true
_GEMMA2 = _GEMMA | {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
_GEMMA2 |= {"sliding_window": 4096, "query_pre_attn_scalar": 256}
_PHI3 = _LLAMA2 | {"model_type": "phi3"}
_QWEN = {"rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "use_sliding_window": False}
_QWEN2 = _QWEN | {"model_type": "qwen2", "max_position_embeddings": 32_768}
_QWEN2_TIED = _QWEN2 | {"vocab_size": 151_936, "tie_word_embeddings": True}
_QWEN2_UNTIED = _QWEN2 | {"vocab_size": 152_064, "tie_word_embeddings": False}
_QWEN3 = _QWEN | {"model_type": "qwen3", "vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960}
_QWEN3 |= {"tie_word_embeddings": False}
_QWEN3_TIED = _QWEN3 | {"tie_word_embeddings": True}
_GPT2 = {"model_type": "gpt2", "vocab_size": 50_257, "n_positions": 1024, "n_ctx": 1024, "layer_norm_epsilon": 1e-5}
_PYTHIA = _sizes(2560, 10_240, 32, 32, 32) | {"model_type": "gpt_neox", "vocab_size": 50_304, "rotary_pct": 0.25}
_PYTHIA |= {"rotary_emb_base": 10_000, "layer_norm_eps": 1e-5, "use_parallel_residual": True, "hidden_act": "gelu"}
_PYTHIA |= {"max_position_embeddings": 2048, "tie_word_embeddings": False}

MODELS = {  # config: (parameters, config.json)
    "llama2_7b": (6_738_415_616, _LLAMA2 | _sizes(4096, 11_008, 32, 32, 32)),
    "llama2_13b": (13_015_864_320, _LLAMA2 | _sizes(5120, 13_824, 40, 40, 40)),
    "llama2_70b": (68_976_648_192, _LLAMA2 | _sizes(8192, 28_672, 80, 64, 8)),
    "llama3_8b": (8_030_261_248, _LLAMA3 | _sizes(4096, 14_336, 32, 32, 8)),
    "llama3_70b": (70_553_706_496, _LLAMA3 | _sizes(8192, 28_672, 80, 64, 8)),
    "llama3_1_8b": (8_030_261_248, _LLAMA3_1 | _sizes(4096, 14_336, 32, 32, 8)),
    "llama3_1_70b": (70_553_706_496, _LLAMA3_1 | _sizes(8192, 28_672, 80, 64, 8)),
    "llama3_1_405b": (405_853_388_800, _LLAMA3_1 | _sizes(16_384, 53_248, 126, 128, 8)),
    "llama3_2_1b": (1_235_814_400, _LLAMA3_2 | _sizes(2048, 8192, 16, 32, 8) | {"head_dim": 64}),
    "llama3_2_3b": (3_212_749_824, _LLAMA3_2 | _sizes(3072, 8192, 28, 24, 8) | {"head_dim": 128}),
    "llama3_3_70b": (70_553_706_496, _LLAMA3_1 | _sizes(8192, 28_672, 80, 64, 8) | {"head_dim": 128}),
    "tinyllama_1_1b": (1_100_048_384, _LLAMA2 | _sizes(2048, 5632, 22, 32, 4) | {"max_position_embeddings": 2048}),
    "tulu3_8b_sft": (8_030_326_784, _TULU3 | _sizes(4096, 14_336, 32, 32, 8)),
    "tulu3_70b_sft": (70_553_837_568, _TULU3 | _sizes(8192, 28_672, 80, 64, 8)),
    "smollm2_135m": (134_515_008, _SMOLLM2 | _sizes(576, 1536, 30, 9, 3) | {"rope_theta": 100_000}),
    "smollm2_360m": (361_821_120, _SMOLLM2 | _sizes(960, 2560, 32, 15, 5) | {"rope_theta": 100_000}),
    "smollm2_1_7b": (1_711_376_384, _SMOLLM2 | _sizes(2048, 8192, 24, 32, 32) | {"rope_theta": 130_000}),
    "mistral_7b_v0_1": (7_241_732_096, _MISTRAL | {"sliding_window": 4096}),
    "mistral_7b_v0_2": (7_241_732_096, _MISTRAL | {"rope_theta": 1_000_000.0, "sliding_window": None}),
    "mistral_7b_v0_3": (
        7_248_023_552,
        _MISTRAL | {"vocab_size": 32_768, "rope_theta": 1_000_000.0, "sliding_window": None},
    ),
    "zephyr_7b_sft": (7_241_732_096, _MISTRAL | {"sliding_window": 4096}),
    "gemma_2b": (2_506_172_416, _GEMMA | _sizes(2048, 16_384, 18, 8, 1)),
    "gemma_7b": (8_537_680_896, _GEMMA | _sizes(3072, 24_576, 28, 16, 16)),
    "gemma2_2b": (2_614_341_888, _GEMMA2 | _sizes(2304, 9216, 26, 8, 4)),
    "gemma2_9b": (9_241_705_984, _GEMMA2 | _sizes(3584, 14_336, 42, 16, 8)),
    "gemma2_27b": (
        27_227_128_320,
        _GEMMA2 | _sizes(4608, 36_864, 46, 32, 16) | {"head_dim": 128, "query_pre_attn_scalar": 144},
    ),
    "phi3_mini": (
        3_821_079_552,
        _PHI3 | _sizes(3072, 8192, 32, 32, 32) | {"vocab_size": 32_064, "sliding_window": 2047},
    ),
    "phi4_14b": (
        14_659_507_200,
        _PHI3
        | _sizes(5120, 17_920, 40, 40, 10)
        | {"vocab_size": 100_352, "rope_theta": 250_000}
        | {"max_position_embeddings": 16_384, "sliding_window": None},
    ),
    "qwen2_0_5b": (494_032_768, _QWEN2_TIED | _sizes(896, 4864, 24, 14, 2)),
    "qwen2_1_5b": (1_543_714_304, _QWEN2_TIED | _sizes(1536, 8960, 28, 12, 2)),
    "qwen2_7b": (7_615_616_512, _QWEN2_UNTIED | _sizes(3584, 18_944, 28, 28, 4)),
    "qwen2_5_0_5b": (494_032_768, _QWEN2_TIED | _sizes(896, 4864, 24, 14, 2)),
    "qwen2_5_1_5b": (1_543_714_304, _QWEN2_TIED | _sizes(1536, 8960, 28, 12, 2)),
    "qwen2_5_3b": (3_085_938_688, _QWEN2_TIED | _sizes(2048, 11_008, 36, 16, 2)),
    "qwen2_5_7b": (7_615_616_512, _QWEN2_UNTIED | _sizes(3584, 18_944, 28, 28, 4)),
    "qwen2_5_14b": (14_770_033_664, _QWEN2_UNTIED | _sizes(5120, 13_824, 48, 40, 8)),
    "qwen2_5_32b": (32_763_876_352, _QWEN2_UNTIED | _sizes(5120, 27_648, 64, 40, 8)),
    "qwen2_5_72b": (72_706_203_648, _QWEN2_UNTIED | _sizes(8192, 29_568, 80, 64, 8)),
    "qwen3_0_6b": (596_049_920, _QWEN3_TIED | _sizes(1024, 3072, 28, 16, 8)),
    "qwen3_1_7b": (1_720_574_976, _QWEN3_TIED | _sizes(2048, 6144, 28, 16, 8)),
    "qwen3_4b": (4_022_468_096, _QWEN3_TIED | _sizes(2560, 9728, 36, 32, 8)),
    "qwen3_8b": (8_190_735_360, _QWEN3 | _sizes(4096, 12_288, 36, 32, 8)),
    "qwen3_14b": (14_768_307_200, _QWEN3 | _sizes(5120, 17_408, 40, 40, 8)),
    "qwen3_32b": (32_762_123_264, _QWEN3 | _sizes(5120, 25_600, 64, 64, 8)),
    "mixtral_8x7b": (
        46_702_792_704,
        _MISTRAL
        | {"model_type": "mixtral", "rope_theta": 1_000_000.0, "sliding_window": None}
        | {"num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "gpt2_124m": (124_439_808, _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "gpt2_355m": (354_823_168, _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2_774m": (774_030_080, _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2_1_5b": (1_557_611_200, _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt2_tutorial": (124_439_808, _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "pythia_2_8b_hh": (2_775_208_960, _PYTHIA),
    "reviewer2": (  # made on the user's machine, by tools/make_reviewer2.py
        918_144,
        _LLAMA2 | _sizes(128, 512, 2, 4, 4) | {"vocab_size": 1536, "max_position_embeddings": 1024},
    ),
}
