"""The one error type for mistakes in what a user wrote: a config, a data file, a command."""

LISTED = 20  # of what is wrong in the same way


class UserError(ValueError):
    """A mistake that its reader can mend. The message names what, where, the rule and the way out.

    `tune` prints the message without a traceback; from Python it is an ordinary ValueError.
    """


def listed(lines: list[str]) -> str:
    """Returns a message's list, a line each; of a long one its beginning and how many there are more."""
    more = [f"  and {len(lines) - LISTED:,} more"] if len(lines) > LISTED else []
    return "\n".join([*(f"  {line}" for line in lines[:LISTED]), *more])
