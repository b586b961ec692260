"""A text's tokens by its pieces: what stands between special tokens is encoded once, and remembered for a while.

A pair's two conversations and its prompt begin alike, and a library that cuts a text at special tokens before all else
encodes what lies between them without a look at the rest. So a piece gives the same tokens wherever it stands, but in
vocabularies that `PieceEncoder` knows of: there it leaves the text whole.
"""

import json
import os
import re
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import tokenizers

REMEMBERED = 64  # pieces: those of a few conversations
WORDS = 2**16  # whose tokens the library remembers: behind its own 10,000 it would cut each new one again
# What looks at a word alone. Metaspace may look at where a text begins, see _is_local.
PRE_TOKENIZERS = (
    *("ByteLevel", "Split", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "Metaspace", "BertPreTokenizer"),
    *("CharDelimiterSplit", "UnicodeScripts"),
)
Offsets = Callable[[], list[tuple[int, int]]]  # of a piece's tokens, the characters [start, stop) of it
# Rows are shared out to processes. Threads would help no single text, and a fork would warn of them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Encoded:
    """A text's tokens, piece by piece.

    Attributes:
        ids: The tokens.
    """

    def __init__(self):
        self.ids: list[int] = []
        # Each piece's first token, first and last character, and offsets; None of a special token
        self._pieces: list[tuple[int, int, int, Offsets | None]] = []

    def add(self, ids: list[int], start: int, stop: int, offsets: Offsets | None = None) -> None:
        """Adds the tokens of a piece by the characters [start, stop) that it stands for."""
        self._pieces.append((len(self.ids), start, stop, offsets))
        self.ids += ids

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """For each token the characters [start, stop) of the text that it stands for."""
        found = []
        for _, start, stop, offsets in self._pieces:
            found += [(a + start, b + start) for a, b in offsets()] if offsets else [(start, stop)]
        return found

    def num_before(self, at: int) -> int:
        """Returns how many tokens end at this character or before it."""
        behind = len(self.ids)
        for first, start, stop, offsets in reversed(self._pieces):
            if stop <= at:
                return behind
            if start <= at and offsets:
                return first + bisect_right([end for _, end in offsets()], at - start)
            behind = first
        return behind


class PieceEncoder:
    """Encodes texts as a backend does without the tokens that it adds at their ends.

    Args:
        backend: Must not be changed. It gives the tokens that it gave.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        if resize := getattr(backend.model, "_resize_cache", None):  # no other tokens
            resize(WORDS)
        added = backend.get_added_tokens_decoder()
        self._ids = {token.content: i for i, token in added.items()}
        # As the library finds them: the first, and of those that begin there the longest.
        longest_first = sorted(self._ids, key=len, reverse=True)
        self._cut = re.compile("|".join(map(re.escape, longest_first))) if added and _is_local(backend) else None
        self._known: OrderedDict[str, tuple[list[int], tokenizers.Encoding | None]] = OrderedDict()
        self._with_offsets = False  # since somebody has asked for them: they take a fifth of the time

    def encode(self, text: str) -> Encoded:
        """Returns the text's tokens and their offsets."""
        encoded, start = Encoded(), 0
        for found in self._cut.finditer(text) if self._cut else ():
            self._add(text[start : found.start()], start, encoded)
            encoded.add([self._ids[found[0]]], *found.span())
            start = found.end()
        self._add(text[start:], start, encoded)
        return encoded

    def _add(self, piece: str, start: int, encoded: Encoded) -> None:
        if not piece:
            return
        known = self._known.get(piece)
        if known is None:
            known = self._known[piece] = self._encode(piece)
            if len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(piece)
        ids, encoding = known
        encoded.add(ids, start, start + len(piece), partial(self._offsets, piece, encoding))

    def _encode(self, piece: str) -> tuple[list[int], tokenizers.Encoding | None]:
        if self._with_offsets:
            encoding = self._backend.encode(piece, add_special_tokens=False)
            return encoding.ids, encoding
        (encoding,) = self._backend.encode_batch_fast([piece], add_special_tokens=False)
        return encoding.ids, None

    def _offsets(self, piece: str, encoding: tokenizers.Encoding | None) -> list[tuple[int, int]]:
        self._with_offsets = True
        return (encoding or self._backend.encode(piece, add_special_tokens=False)).offsets


def _is_local(backend: tokenizers.Tokenizer) -> bool:
    """Says whether a piece between added tokens gives the same tokens alone as within its text."""
    if backend.truncation or backend.padding or backend.encode_special_tokens:
        return False
    if getattr(backend.model, "dropout", None):  # another cut each time
        return False
    added = backend.get_added_tokens_decoder().values()
    if any(token.lstrip or token.rstrip or token.single_word for token in added):
        return False
    normalized = {token.normalized for token in added}  # these are looked for in the text that normalizing has left
    if len(normalized) > 1 or (True in normalized and backend.normalizer is not None):
        return False
    return backend.pre_tokenizer is None or _looks_at_words(backend.pre_tokenizer)


def _looks_at_words(pre_tokenizer) -> bool:
    try:
        state = json.loads(pre_tokenizer.__getstate__())
    except Exception:  # one written in Python has none
        return False
    steps = state["pretokenizers"] if state["type"] == "Sequence" else [state]
    return all(step["type"] in PRE_TOKENIZERS and step.get("prepend_scheme") != "first" for step in steps)
