"""From a conversation to tokens, as the model's folder says."""

from pairtune.tokenizer.hf import adapt, hf_tokenizer

__all__ = ["adapt", "hf_tokenizer"]
