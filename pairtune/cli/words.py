"""How the program calls itself, and the parser of a command's words."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path


def prog() -> str:
    """Returns the program's name: it has two."""
    stem = Path(sys.argv[0]).stem
    return stem if stem in ("tune", "pairtune") else "tune"


def parser_of(command: Callable, name: str = "") -> argparse.ArgumentParser:
    """Returns a parser of what follows a command's name; the command's docstring is its help."""
    return argparse.ArgumentParser(prog=f"{prog()} {name or command.__name__}", description=command.__doc__)
