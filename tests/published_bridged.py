"""What published.py has, of models whose folder says what they are and that transformers computes.

Numbers of parameters are those that the Hub counts in a model's files, but for what no parameter of transformers' class
is made of, which is said where it is. Settings are the Hub's config.json's, as public copies of it have them.
"""

from published import _QWEN, _sizes


def _yarn(factor, original, **more):
    rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
    return rope | {"beta_fast": 32.0, "beta_slow": 1.0} | more


def _turns(full, every, count, other):
    """Kinds of layers, of which every so many-th is a full one."""
    return [full if i % every == every - 1 else other for i in range(count)]


# For predicting several tokens (MTP), which transformers leaves out; and buffers: a factor a layer, and two of a tower.
MTP = {"qwen3_5_9b": 243_290_624, "qwen3_5_35b_a3b": 844_640_768}
BUFFERS = {"gemma4_31b": 60 + 2 * 1152}

_EXPERTS = {"tie_word_embeddings": False, "output_router_logits": False}
_SLIDING = "sliding_attention"
_GPT_OSS = _EXPERTS | {
    "model_type": "gpt_oss", "vocab_size": 201_088, "head_dim": 64, "max_position_embeddings": 131_072,
    "num_experts_per_tok": 4, "sliding_window": 128, "rms_norm_eps": 1e-5, "rope_theta": 150_000.0,
    "quantization_config": {"quant_method": "mxfp4"}, "rope_scaling": _yarn(32.0, 4096, truncate=False),
}  # fmt: skip
_QWEN3_5 = {
    "vocab_size": 248_320, "head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 262_144,
    "tie_word_embeddings": False, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25,
                        "mrope_interleaved": True, "mrope_section": [11, 11, 10]},
}  # fmt: skip


def _qwen3_5(kind, width, layers, text):
    vision = {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16}
    text = _QWEN3_5 | text | {"layer_types": _turns("full_attention", 4, layers, "linear_attention")}
    return {
        "model_type": kind, "tie_word_embeddings": False, "text_config": {"model_type": f"{kind}_text"} | text,
        "vision_config": vision | {"model_type": kind, "out_hidden_size": width, "num_position_embeddings": 2304},
    }  # fmt: skip


_GEMMA3 = {
    "model_type": "gemma3_text", "vocab_size": 262_144, "head_dim": 256, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6, "sliding_window": 512, "max_position_embeddings": 32_768, "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}  # fmt: skip


def _gemma3(*sizes, **text):
    _, _, layers, *_ = sizes
    more = {"vocab_size": 262_208, "sliding_window": 1024, "max_position_embeddings": 131_072}
    more |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, **text, **_sizes(*sizes)}
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27}
    vision |= {"model_type": "siglip_vision_model", "image_size": 896, "patch_size": 14, "vision_use_head": False}
    return {
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "mm_tokens_per_image": 256,
        "text_config": _GEMMA3 | more | {"layer_types": _turns("full_attention", 6, layers, _SLIDING)},
        "vision_config": vision,
    }  # fmt: skip


_GEMMA4_31B = {
    "model_type": "gemma4", "audio_config": None, "text_config": {
        "model_type": "gemma4_text", "vocab_size": 262_144, "head_dim": 256, "global_head_dim": 512,
        "num_global_key_value_heads": 4, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0, "sliding_window": 1024, "max_position_embeddings": 262_144,
        "use_bidirectional_attention": "vision", "layer_types": _turns("full_attention", 6, 60, _SLIDING),
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    } | _sizes(5376, 21_504, 60, 32, 16),
    "vision_config": {
        "model_type": "gemma4_vision", "head_dim": 72, "standardize": True, "use_clipped_linears": False,
    } | _sizes(1152, 4304, 27, 16, 16),
}  # fmt: skip
_OLMO2 = {"model_type": "olmo2", "vocab_size": 100_352, "rope_theta": 500_000.0, "rms_norm_eps": 1e-6}
_OLMO2 |= {"max_position_embeddings": 4096, "tie_word_embeddings": False}
_OLMO3 = _OLMO2 | {
    "model_type": "olmo3", "vocab_size": 100_278, "sliding_window": 4096, "max_position_embeddings": 65_536,
    "rope_scaling": _yarn(8.0, 8192, attention_factor=1.2079441541679836),
}  # fmt: skip


def _mistral3(**text):
    vision = {"model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    vision |= {"num_attention_heads": 16, "head_dim": 64, "image_size": 1540, "patch_size": 14, "rope_theta": 1e4}
    text = {"vocab_size": 131_072, "head_dim": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False} | text
    return {"model_type": "mistral3", "tie_word_embeddings": False, "text_config": text, "vision_config": vision}


_GRANITE = {"model_type": "granite", "vocab_size": 49_159, "tie_word_embeddings": True, "rope_theta": 1e7}
_GRANITE |= {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "rms_norm_eps": 1e-5}
_GRANITE |= {"max_position_embeddings": 131_072}
_GRANITE4 = _GRANITE | {
    "model_type": "granitemoehybrid", "vocab_size": 100_352, "rope_theta": 1e4, "position_embedding_type": "nope",
    "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
    "layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)],
}  # fmt: skip
_LONG = [1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
         2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424,
         6.693110555, 7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252,
         16.37415215, 18.31155283, 20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6,
         32.61, 32.64, 32.66, 32.7, 32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77]  # fmt: skip

BRIDGED = {  # config: (parameters, config.json)
    "qwen3_30b_a3b": (
        30_532_122_624,
        _QWEN | _EXPERTS | _sizes(2048, 6144, 48, 32, 4)
        | {"model_type": "qwen3_moe", "vocab_size": 151_936, "head_dim": 128, "max_position_embeddings": 40_960}
        | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
    ),
    "qwen3_5_9b": (
        9_653_104_368 - MTP["qwen3_5_9b"], _qwen3_5("qwen3_5", 4096, 32, _sizes(4096, 12_288, 32, 16, 4)),
    ),
    "qwen3_5_35b_a3b": (
        35_951_822_704 - MTP["qwen3_5_35b_a3b"],
        _qwen3_5("qwen3_5_moe", 2048, 40, {
            "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16, "num_key_value_heads": 2,
            "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        }),
    ),
    "gemma3_270m": (268_098_176, _GEMMA3 | _sizes(640, 2048, 18, 4, 1)
                    | {"layer_types": _turns("full_attention", 6, 18, _SLIDING)}),
    "gemma3_1b": (999_885_952, _GEMMA3 | _sizes(1152, 6912, 26, 4, 1)
                  | {"layer_types": _turns("full_attention", 6, 26, _SLIDING)}),
    "gemma3_4b": (4_300_079_472, _gemma3(2560, 10_240, 34, 8, 4)),
    "gemma3_12b": (12_187_325_040, _gemma3(3840, 15_360, 48, 16, 8)),
    "gemma3_27b": (27_432_406_640, _gemma3(5376, 21_504, 62, 32, 16, head_dim=128, query_pre_attn_scalar=168)),
    "gemma4_31b": (31_273_088_876 - BUFFERS["gemma4_31b"], _GEMMA4_31B),
    "gpt_oss_20b": (20_914_757_184, _GPT_OSS | _sizes(2880, 2880, 24, 64, 8) | {"num_local_experts": 32}),
    "gpt_oss_120b": (116_829_156_672, _GPT_OSS | _sizes(2880, 2880, 36, 64, 8) | {"num_local_experts": 128}),
    "olmo2_7b": (7_298_617_344, _OLMO2 | _sizes(4096, 11_008, 32, 32, 32)),
    "olmo3_7b": (7_298_011_136, _OLMO3 | _sizes(4096, 11_008, 32, 32, 32)
                 | {"layer_types": _turns("full_attention", 4, 32, _SLIDING)}),
    "olmo3_32b": (32_233_522_176, _OLMO3 | _sizes(5120, 27_648, 64, 40, 8)
                  | {"layer_types": _turns("full_attention", 4, 64, _SLIDING)}),
    "smollm3_3b": (
        3_075_098_624,
        _sizes(2048, 11_008, 36, 16, 4)
        | {"model_type": "smollm3", "vocab_size": 128_256, "rope_theta": 5e6, "rms_norm_eps": 1e-6}
        | {"max_position_embeddings": 65_536, "tie_word_embeddings": True, "no_rope_layer_interval": 4}
    ),
    "ministral3_8b": (
        8_918_026_240,
        _mistral3(model_type="ministral3", max_position_embeddings=262_144, **_sizes(4096, 14_336, 34, 32, 8),
                  rope_parameters=_yarn(16.0, 16_384, rope_theta=1e6, mscale=1.0, mscale_all_dim=1.0,
                                        llama_4_scaling_beta=0.1)),
    ),
    "mistral_small_3_1_24b": (
        24_011_361_280,
        _mistral3(model_type="mistral", max_position_embeddings=131_072, rope_theta=1e9, sliding_window=None,
                  **_sizes(5120, 32_768, 40, 32, 8)),
    ),
    "glm4_9b": (
        9_400_279_040,
        _sizes(4096, 13_696, 40, 32, 2)
        | {"model_type": "glm4", "vocab_size": 151_552, "head_dim": 128, "partial_rotary_factor": 0.5}
        | {"rope_theta": 1e4, "rms_norm_eps": 1e-5, "attention_bias": True, "max_position_embeddings": 32_768}
        | {"tie_word_embeddings": False},
    ),
    "granite3_3_2b": (2_533_539_840, _GRANITE | _sizes(2048, 8192, 40, 32, 8)
                      | {"attention_multiplier": 0.015625, "logits_scaling": 8.0}),
    "granite3_3_8b": (8_170_864_640, _GRANITE | _sizes(4096, 12_800, 40, 32, 8)
                      | {"attention_multiplier": 0.0078125, "logits_scaling": 16.0}),
    "granite4_h_micro": (
        3_191_396_096,
        _GRANITE4 | _sizes(2048, 8192, 40, 32, 8)
        | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 8192, "mamba_n_heads": 64}
        | {"attention_multiplier": 0.015625, "logits_scaling": 8.0}
    ),
    "granite4_h_tiny": (
        6_939_037_248,
        _GRANITE4 | _sizes(1536, 512, 40, 12, 4)
        | {"num_local_experts": 64, "num_experts_per_tok": 6, "shared_intermediate_size": 1024, "mamba_n_heads": 48}
        | {"attention_multiplier": 0.0078125, "logits_scaling": 6.0}
    ),
    "phi4_mini": (
        3_836_021_760,
        _sizes(3072, 8192, 32, 24, 8)
        | {"model_type": "phi3", "vocab_size": 200_064, "tie_word_embeddings": True, "partial_rotary_factor": 0.75}
        | {"max_position_embeddings": 131_072, "original_max_position_embeddings": 4096, "rope_theta": 1e4}
        | {"sliding_window": 262_144, "rms_norm_eps": 1e-5}
        | {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": _LONG}}
    ),
    "deepseek_v2_lite": (
        15_706_484_224,
        _sizes(2048, 10_944, 27, 16, 16)
        | {"model_type": "deepseek_v2", "vocab_size": 102_400, "max_position_embeddings": 163_840, "rope_theta": 1e4}
        | {"n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408}
        | {"first_k_dense_replace": 1, "norm_topk_prob": False, "q_lora_rank": None, "kv_lora_rank": 512}
        | {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6}
        | {"tie_word_embeddings": False, "rope_scaling": _yarn(40, 4096, mscale=0.707, mscale_all_dim=0.707)}
    ),
    "nemotron3_nano_30b": (
        31_577_937_344,
        {"model_type": "nemotron_h", "vocab_size": 131_072, "hidden_size": 2688, "num_hidden_layers": 52}
        | {"hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME", "head_dim": 128}
        | {"num_attention_heads": 32, "num_key_value_heads": 2, "intermediate_size": 1856, "n_routed_experts": 128}
        | {"n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 1856}
        | {"moe_shared_expert_intermediate_size": 3712, "routed_scaling_factor": 2.5, "mamba_num_heads": 64}
        | {"mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8, "conv_kernel": 4, "tie_word_embeddings": False}
    ),
    "lfm2_1_2b": (
        1_170_340_608,
        {"model_type": "lfm2", "vocab_size": 65_536, "hidden_size": 2048, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12_288, "block_ff_dim": 12_288}
        | {"block_auto_adjust_ff_dim": True, "block_ffn_dim_multiplier": 1.0, "block_multiple_of": 256}
        | {"conv_L_cache": 3, "rope_theta": 1e6, "norm_eps": 1e-5, "max_position_embeddings": 128_000}
        | {"layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)]}
    ),
    "llama4_scout": (
        108_641_793_536,
        {"model_type": "llama4", "text_config": {
            "model_type": "llama4_text", "vocab_size": 202_048, "intermediate_size_mlp": 16_384, "head_dim": 128,
            "num_local_experts": 16, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "use_qk_norm": True,
            "attention_chunk_size": 8192, "rope_theta": 500_000.0, "max_position_embeddings": 10_485_760,
            "rope_scaling": {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0, "high_freq_factor": 1.0,
                             "original_max_position_embeddings": 8192},
        } | _sizes(5120, 8192, 48, 40, 8), "vision_config": {
            "model_type": "llama4_vision_model", "hidden_size": 1408, "intermediate_size": 5632, "image_size": 336,
            "num_hidden_layers": 34, "num_attention_heads": 16, "patch_size": 14, "vision_output_dim": 4096,
        }},
    ),
    "falcon_h1_0_5b": (
        521_411_104,
        _sizes(1024, 2048, 36, 8, 2)
        | {"model_type": "falcon_h1", "vocab_size": 32_784, "head_dim": 64, "rope_theta": 1e11, "mamba_d_ssm": 1536}
        | {"mamba_n_heads": 24, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1, "mamba_d_conv": 4}
        | {"mamba_norm_before_gate": False, "mamba_rms_norm": False, "tie_word_embeddings": False}
        | {"attention_out_multiplier": 0.9375, "embedding_multiplier": 5.656854249492381, "key_multiplier": 0.390625}
        | {"lm_head_multiplier": 0.0390625, "mlp_multipliers": [0.8838834764831844, 0.5859375]}
        | {"ssm_in_multiplier": 1.25, "ssm_out_multiplier": 0.23570226039551587, "max_position_embeddings": 16_384}
        | {"ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738]},
    ),
}  # fmt: skip
