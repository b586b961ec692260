"""The one error type for mistakes in what a user wrote: a config, a data file, a command."""


class UserError(ValueError):
    """A mistake that its reader can mend. The message names what, where, the rule and the way out.

    `tune` prints the message without a traceback; from Python it is an ordinary ValueError.
    """
