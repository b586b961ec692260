"""Where reference log-probabilities come from."""

from pairtune.reference.reference import KL_PAIRS, Reference

__all__ = ["KL_PAIRS", "Reference"]
