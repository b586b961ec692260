"""What families make of hidden states times the output layer: a factor, and a cap.

By the names that transformers' configurations have for them; a run compares the result with the model's own logits.
"""

# Whose text model has a factor that the model around it leaves out.
_WITHOUT = ("aya_vision", "cohere2_vision", "granite_speech", "granite_speech_plus")


def scale_of(config) -> float:
    """Returns the factor of a model's logits."""
    if config.model_type in _WITHOUT:
        return 1.0
    config = config.get_text_config()
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; ...; Falcon-H1
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    for name in ("logits_scaling", "logits_mup_width_multiplier"):  # Granite and Inkling divide by it
        if getattr(config, name, None) is not None:
            scaling = getattr(config, name)
            return scaling if config.model_type == "hyperclovax" else 1 / scaling
    return 1.0


def softcap_of(config) -> float | None:
    """Returns c where logits are c tanh(logits / c); None for a model without."""
    config = config.get_text_config()
    names = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma; Griffin; xLSTM
    return next((cap for name in names if (cap := getattr(config, name, None)) is not None), None)
