"""How long a pair may be, and what becomes of one that is longer."""

from dataclasses import dataclass

from pairtune.errors import UserError
from pairtune.pairs.example import Skip

CHARACTERS_A_TOKEN = 256  # no tokenizer known has a longer token


@dataclass(frozen=True)
class Limits:
    """Most tokens of a pair, and what becomes of one that has more: see tokenize_pairs."""

    max_length: int
    max_prompt_length: int | None
    max_completion_length: int | None
    overlong: str
    key: str  # of the rows, for messages

    def __post_init__(self):
        if self.overlong not in ("drop", "trim_prompt", "error"):
            raise UserError(f"{self.key}.overlong={self.overlong!r}: must be drop, trim_prompt or error.")
        if self.max_length < 2:
            raise UserError(f"max_length={self.max_length}: must be at least 2, a token of prompt and one of answer.")
        if self.max_prompt_length is not None and not 0 < self.max_prompt_length <= self.max_length:
            raise UserError(
                f"max_prompt_length={self.max_prompt_length}: must be at least 1 and at most max_length="
                f"{self.max_length}, which counts prompt and answer together. Lower it, or raise max_length."
            )

    def check_texts(self, prompt: int, answer: int) -> None:
        """Raises Skip or UserError for so many characters that tokenizing, which takes gigabytes, is for nothing."""
        most = CHARACTERS_A_TOKEN * self.max_length
        if answer <= most and (prompt <= most or self.overlong == "trim_prompt"):
            return
        if self.overlong == "error":
            raise UserError(
                f"a prompt of {prompt:,} characters and an answer of {answer:,} do not fit max_length="
                f"{self.max_length}. Set {self.key}.overlong to drop, or remove the row."
            )
        raise Skip("too long")

    def fit(self, prompt: list[int], answer_length: int, *, bos_id: int | None) -> list[int]:
        """Returns the prompt, cut from the left if the policy says so. Raises Skip or UserError if it does not fit."""
        if self.max_completion_length is not None and answer_length > self.max_completion_length:
            if self.overlong == "error":
                raise UserError(
                    f"an answer of {answer_length} tokens does not fit max_completion_length="
                    f"{self.max_completion_length}. Raise it, or set {self.key}.overlong to drop."
                )
            raise Skip("answer too long")
        room = min(self.max_prompt_length or self.max_length, self.max_length - answer_length)
        if len(prompt) <= room:
            return prompt
        if self.overlong == "error":
            raise UserError(
                f"a prompt of {len(prompt)} tokens and an answer of {answer_length} do not fit max_length="
                f"{self.max_length}, max_prompt_length={self.max_prompt_length}. Raise them, or set "
                f"{self.key}.overlong to drop or trim_prompt."
            )
        bos = prompt[:1] if prompt[0] == bos_id else []
        if self.overlong == "drop" or room <= len(bos):  # one token of the question must remain
            raise Skip("too long")
        return bos + prompt[len(prompt) - room + len(bos) :]


def worst_pair(
    max_length: int, max_prompt_length: int | None = None, max_completion_length: int | None = None
) -> tuple[int, int]:
    """Returns how many tokens prompt and either answer have in the pair that takes most memory.

    A prompt of one token and two answers that fill max_length; where answers have to be shorter, the prompt is what
    they leave of it.
    """
    answer = min(max_length - 1, max_completion_length or max_length)
    return min(max_length - answer, max_prompt_length or max_length), answer
