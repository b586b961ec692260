"""Special tokens that stand in a text as they are written: a question about `</s>` holds four characters, not an end.

A template writes its own special tokens as text, too. To tell them apart, a mark stands inside those that a message
holds while the template runs and while the text is cut at special tokens; after that, words and merges see none.
"""

import re
from functools import cached_property
from os.path import commonprefix

import tokenizers
from tokenizers.pre_tokenizers import PreTokenizer, Sequence

from pairtune.tokenizer.template import Refusal

NOT_SPECIAL = "\ufdd0"  # Unicode keeps it for internal use: it is no character of any text
WAY_OUT = "Remove it, or let it be a token: tokenizer.special_tokens_in_text=control."


class SpecialText:
    """Finds the texts of special tokens, and encodes them as the ordinary characters that they are.

    Args:
        backend: Is not changed.
        tokens: Each special token's text, and its id; eos at least.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokens: dict[str, int]):
        self._backend, self._tokens = backend, tokens
        texts = "|".join(map(re.escape, tokens))
        self._anywhere = re.compile(texts)
        by_first = {text[0]: [other for other in tokens if other[0] == text[0]] for text in tokens}
        self._beginnings = [commonprefix(alike) for alike in by_first.values()]  # such as "<|"
        firsts = "".join(sorted({re.escape(text[0]) for text in tokens}))
        self._each_start = re.compile(f"(?=[{firsts}])(?={texts})(.)", re.DOTALL)  # overlapping ones, too

    def is_in(self, text: str) -> bool:
        """Says whether the text holds a special token's."""
        if not any(beginning in text for beginning in self._beginnings):  # a look that costs next to nothing
            return False
        return self._anywhere.search(text) is not None

    def found_in(self, text: str) -> list[str]:
        """Returns the special tokens' texts that the text holds, each once."""
        return list(dict.fromkeys(self._anywhere.findall(text)))

    def mark(self, text: str) -> str:
        """Returns the text with a mark behind the first character of every special token's text."""
        return self._each_start.sub(rf"\1{NOT_SPECIAL}", text) if self.is_in(text) else text

    def encode(self, marked: str, text: str) -> tokenizers.Encoding:
        """Returns the tokens of a marked text, with offsets into it. What has no mark becomes special tokens.

        Args:
            text: The same without marks.

        Raises:
            Refusal: It is not the same, because the template writes other things for marked messages; or the
                vocabulary makes a special token of plain characters.
        """
        if marked.replace(NOT_SPECIAL, "") != text:
            raise _refusal("the chat template changes a message that holds a special token's text")
        encoding = self._unmarking.encode(marked, add_special_tokens=False)
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            written = marked[start:stop].replace(NOT_SPECIAL, "")
            if NOT_SPECIAL in marked[start : stop + 1] and self._tokens.get(written) == token:
                raise _refusal(f"the vocabulary makes the special token {written} of plain characters, too")
        return encoding

    @cached_property
    def _unmarking(self) -> tokenizers.Tokenizer:
        """The tokenizer that takes marks out when the text has been cut at special tokens, before all else."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        steps = [PreTokenizer.custom(_Unmark()), backend.pre_tokenizer]
        backend.pre_tokenizer = Sequence([step for step in steps if step is not None])
        return backend


class _Unmark:
    def pre_tokenize(self, pretokenized: tokenizers.PreTokenizedString) -> None:
        pretokenized.normalize(lambda text: text.replace(NOT_SPECIAL, ""))


def _refusal(reason: str) -> Refusal:
    return Refusal(f"{reason[0].upper()}{reason[1:]}. {WAY_OUT}", reason)
