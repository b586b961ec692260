"""What `tune` does: start recipes, list, copy, check and plan."""

from pairtune.cli.commands import main

__all__ = ["main"]
