"""Prompts that somebody has rendered with a chat template already: one more would write it twice."""

import re
from collections.abc import Sequence

from pairtune.errors import UserError
from pairtune.pairs.example import Example
from pairtune.pairs.messages import text_of
from pairtune.pairs.report import Report
from pairtune.pairs.speakers import TO_AN_ANSWER

# How a turn begins in the templates of one family of models or another
OPENINGS = (
    *("<|im_start|>", "<|start_header_id|>", "<|header_start|>", "<start_of_turn>", "<|turn>", "<|start|>", "[INST]"),
    *(
        "<|user|>",
        "<|system|>",
        "<|assistant|>",
        "<|prompter|>",
        "<|START_OF_TURN_TOKEN|>",
        "<｜User｜>",
        "<｜Assistant｜>",
    ),
    *("[SYSTEM_PROMPT]", "<extra_id_0>", "<|User|>", "<role>", "<|startoftext|><|im_start|>", "[gMASK]<sop>"),
)
BEGINS = ("<s>", "<bos>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "<|startoftext|>", "<BOS_TOKEN>")
MOST = 0.05  # of all rows


class AlreadyRendered:
    """Says of which prompts this is so, and what to do about it.

    Args:
        tokenizer: What it is about to write prompts with.
    """

    def __init__(self, tokenizer):
        openings = [*OPENINGS, *_own_openings(tokenizer)]
        any_of = "(?:" + "|".join(map(re.escape, openings)) + ")"
        self._pattern = re.compile(rf"\s*(?:{'|'.join(map(re.escape, BEGINS))})?\s*{any_of}")
        self._is_plain, self._as = tokenizer.is_plain, tokenizer.special_tokens_in_text
        self._is_torchtunes = tokenizer.folder is None

    def look(self, example: Example, row: int, report: Report) -> None:
        """Enters a row whose prompt is rendered in the report, by a template or in words, such as "### Response:". A
        question about a special token does not begin with it."""
        asked = text_of(example.prompt[-1])
        found = None if self._is_plain else TO_AN_ANSWER.search(asked[-40:])
        if found:
            report.in_words.append(row)
            report.examples["in_words"] = found[0].strip()
        if self._pattern.match(asked) and not (self._is_plain and self._as == "control"):
            report.rendered.append(row)

    def check(self, report: Report) -> None:
        """Refuses prompts of which more than a few are rendered.

        Raises:
            UserError: With the two settings that take them as they are.
        """
        self.check_count(report.source, len(report.rendered), report.rendered[:3], report.num_rows)

    def check_count(self, source: str, count: int, rows: Sequence[int], num_rows: int) -> None:
        """Does so for a count of them; `rows` are the first ones' numbers."""
        if count <= MOST * num_rows:
            return
        shown = ", ".join(map(str, rows)) + (", ..." if count > len(rows) else "")
        settings = "tokenizer.chat_template=plain tokenizer.special_tokens_in_text=control"
        if self._is_torchtunes:
            settings = f"tokenizer._component_=pairtune.tokenizer.hf_tokenizer {settings}"
        raise UserError(
            f"{source}: {count:,} of {num_rows:,} prompts are rendered with a chat template already (row "
            f"{shown}): its special tokens are in their text, and would be written twice, and as ordinary characters. "
            f"Take them as they are: {settings}"
        )


def _own_openings(tokenizer) -> list[str]:
    """Returns how the tokenizer's own template begins a question, if that is a special token."""
    try:
        text = tokenizer.rendered([{"role": "user", "content": "QUESTION"}]).text
    except UserError:  # which the first row will tell
        return []
    head = (text or "").partition("QUESTION")[0]
    return [token for token in tokenizer.special_texts_in(head) if token not in BEGINS]
