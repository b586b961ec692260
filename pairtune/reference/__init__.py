"""Where reference log-probabilities come from."""
