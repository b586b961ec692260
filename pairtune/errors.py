"""The one error type for mistakes in what a user wrote: a config, a data file, a command."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

LISTED = 20  # of what is wrong in the same way


class UserError(ValueError):
    """A mistake that its reader can mend. The message names what, where, the rule and the way out.

    `tune` prints the message without a traceback; from Python it is an ordinary ValueError.
    """


def listed(lines: list[str]) -> str:
    """Returns a message's list, a line each; of a long one its beginning and how many there are more."""
    more = [f"  and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
    return "\n".join([*(f"  {line}" for line in lines[:LISTED]), *more])


def nearest(name: Any, known: Iterable[str], *, prefix: str = "", num: int = 1) -> str:
    """Returns "; nearest: NAME, ..." of at most `num` known names, each behind `prefix`; "" where none is near."""
    close = get_close_matches(str(name), list(known), n=num)
    return "; nearest: " + ", ".join(prefix + word for word in close) if close else ""


def close_to(name: Any, known: Iterable[str]) -> str:
    """Returns the known name that is nearest, however far; the first of equals."""
    known = list(known)
    return next(iter(get_close_matches(str(name), known, n=1, cutoff=0.0)), known[0])
