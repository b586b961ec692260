"""Where reference log-probabilities come from."""

from pairtune.reference.reference import Reference

__all__ = ["Reference"]
