"""How the program calls itself, and the parser of a command's words."""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pairtune.errors import UserError, nearest


def prog() -> str:
    """Returns the program's name: it has two."""
    stem = Path(sys.argv[0]).stem
    return stem if stem in ("tune", "pairtune") else "tune"


def parser_of(command: Callable, name: str = "") -> argparse.ArgumentParser:
    """Returns a parser of what follows a command's name; the command's docstring is its help."""
    return Words(prog=f"{prog()} {name or command.__name__}", description=command.__doc__)


class Words(argparse.ArgumentParser):
    """argparse's parser, which says what is wrong in a sentence, with the option that may be meant."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        """An option that there is none of comes first: without it, it would be another word that is wrong."""
        words = before_the_end(sys.argv[1:] if args is None else args)
        if any(
            action.nargs == argparse.REMAINDER for action in self._actions
        ):  # torchrun's, with a recipe's behind them
            words = ()
        for n, word in enumerate(words):
            if re.match(r"-\D", word) and " " not in word and not self._is_option(word):
                self._refuse(words[n:])
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        """
        Raises:
            UserError: Always.
        """
        raise UserError(f"{self.prog}: {self._in_words(message)}; {self.prog} --help tells more")

    def _is_option(self, word: str) -> bool:
        """Whether it is an option, or the beginning of one, or short options in one word, as -nv."""
        option, known = word.partition("=")[0], self._option_string_actions
        if option.startswith("--"):
            return any(name.startswith(option) for name in known)
        return option[:2] in known or option in known

    def _refuse(self, words: Sequence[str]) -> None:
        if any("key=value" in f"{action.metavar} {action.help}" for action in self._actions):
            from pairtune.config.answers import check_dashes

            check_dashes(words, self._option_string_actions)
        raise UserError(self._no_such_option(words[0]))

    def _no_such_option(self, word: str) -> str:
        option = word.partition("=")[0]
        known = [name for name in self._option_string_actions if name.startswith("--") and name != "--help"]
        near = nearest(option, known) or (f"; it has {', '.join(known)}" if known else "; it has none")
        return f"{option}: {self.prog} has no such option{near}"

    def _in_words(self, message: str) -> str:
        if found := re.fullmatch(r"unrecognized arguments: (.*)", message):
            options = [word for word in found[1].split() if word.startswith("-")]
            return self._no_such_option(options[0]) if options else f"{found[1]}: more than it takes"
        if found := re.fullmatch(r"the following arguments are required: (.*)", message):
            optional = {str(action.metavar) for action in self._actions if action.nargs in ("*", "?")}
            return f"{', '.join(name for name in found[1].split(', ') if name not in optional)} is missing"
        if found := re.fullmatch(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message):
            known = [word.strip("' ") for word in found[3].split(",")]
            return f"{found[1]} {found[2]}: must be {' or '.join(known)}{nearest(found[2], known)}"
        if found := re.fullmatch(r"argument (\S+): invalid (int|float) value: '(.*)'", message):
            return f"{found[1]} {found[3]}: must be a {'whole ' if found[2] == 'int' else ''}number"
        if found := re.fullmatch(r"argument (\S+): expected (.*)", message):
            return f"{found[1]}: needs {found[2].replace('argument', 'value')}"
        return message


def before_the_end(words: Sequence[str]) -> Sequence[str]:
    """Returns the words before a `--`, behind which nothing is an option."""
    return words[: words.index("--")] if "--" in words else words
