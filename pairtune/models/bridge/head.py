"""What families make of hidden states times the output layer: a factor, and a cap.

By the names that transformers' configurations have for them; a run compares the result with the model's own logits.
"""


def scale_of(config) -> float:
    """Returns the factor of a model's logits."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere; ...; Falcon-H1
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    scaling = getattr(config, "logits_scaling", None)  # Granite divides by it
    if scaling is not None:
        return scaling if config.model_type == "hyperclovax" else 1 / scaling
    return 1.0


def softcap_of(config) -> float | None:
    """Returns c where logits are c tanh(logits / c); None for a model without."""
    return getattr(config, "final_logit_softcapping", None)
