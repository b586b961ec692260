"""What is read of a config.json means what it does in transformers, which fills in what is left out."""

import pytest
import transformers

from pairtune.config.architectures import config_types
from pairtune.config.config_json import SETTINGS, config_key, describe_config, setting
from pairtune.folders.check_model import positions

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
# transformers keeps these elsewhere or not at all; windows are tested by test_windows.py.
ELSEWHERE = ("model_type", "rope_scaling.factor", "rope_scaling", "rope_parameters", "sliding_window", "layer_types")


@pytest.mark.parametrize("model_type", config_types())
def test_what_is_left_out_is_what_transformers_takes(model_type):
    given = {"model_type": model_type}
    given |= {config_key(name, given): value for name, value in SIZES.items()}
    theirs = transformers.AutoConfig.for_model(**given)
    ours = {name: setting(given, name) for name in SETTINGS} | describe_config(given)
    compared = []
    for name in SETTINGS.keys() - set(ELSEWHERE):
        key = config_key(name, given)
        in_rope = name in ("rope_theta", "partial_rotary_factor")
        expected = theirs.rope_parameters.get(name) if in_rope and model_type != "gpt2" else getattr(theirs, key, None)
        # Sizes that are needed for weights to fit need no default.
        if expected is not None and (name, ours[name]) not in (
            ("intermediate_size", None),
            ("max_position_embeddings", None),
        ):
            assert ours[name] == expected, name
            compared.append(name)
    assert {"rms_norm_eps", "tie_word_embeddings", "num_key_value_heads"} <= set(compared)
    assert ("rope_theta" in compared) == (model_type != "gpt2")


@pytest.mark.parametrize(
    ("config", "max_length", "reach"),
    [
        ({"max_position_embeddings": 2048}, 2048, None),
        ({"max_position_embeddings": 2048}, 2049, 2048),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
          "original_max_position_embeddings": 8192}}, 131072, None),  # Llama 3.1 says what it reaches
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0,
          "original_max_position_embeddings": 8192}}, 131073, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16384, None),
        ({"max_position_embeddings": 4096, "rope_scaling": {"type": "linear", "factor": 4.0}}, 16385, 16384),
        ({"max_position_embeddings": 4096, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, 5000, 4096),
        ({}, 10**6, None),  # nothing is said
    ],
)  # fmt: skip
def test_a_max_length_beyond_the_models_positions_is_told(config, max_length, reach):
    told = positions({"model_type": "llama", **config}, max_length)
    assert len(told) == (reach is not None)
    assert not told or (f"max_length={max_length}: " in told[0] and told[0].endswith(f"valid: max_length={reach}"))


def test_null_says_as_many_heads_or_no_cap_or_nothing():
    mistral = {"model_type": "mistral", **SIZES}
    assert describe_config(mistral)["num_key_value_heads"] == 8
    assert describe_config(mistral | {"num_key_value_heads": None})["num_key_value_heads"] == 4
    gemma2 = {"model_type": "gemma2", **SIZES, "attn_logit_softcapping": None, "tie_word_embeddings": None}
    found = describe_config(gemma2)
    assert (found["attn_logit_softcapping"], found["final_logit_softcapping"]) == (0.0, 30.0)
    assert found["tie_word_embeddings"] is True
