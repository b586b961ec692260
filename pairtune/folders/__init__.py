"""A model's folder: weights in and out, the names that families give them, config.json, PEFT's adapters."""
