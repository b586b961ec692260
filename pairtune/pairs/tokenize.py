"""Preference pairs: rows tokenized once, limited and counted. No shuffling, no batches: see steps.py and batch.py.

Where rows come from is in rows.py, what a row may look like in formats.py, how a conversation becomes tokens in
tokenizer/.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

from pairtune import console
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.pairs.formats import Example, Format, Skip, detect_format
from pairtune.pairs.report import REFUSED, Report, count_overlap, notes_of
from pairtune.pairs.rows import Rows, read_rows
from pairtune.tokenizer.hf import adapt, common_prefix
from pairtune.tokenizer.template import Refusal

__all__ = [
    "Pair",
    "Report",
    "Rows",
    "count_overlap",
    "read_pairs",
    "read_rows",
    "read_train_and_held_out",
    "split_pairs",
    "tokenize_pairs",
]

CHARACTERS_A_TOKEN = 256  # no tokenizer known has a longer token
# Initials of a prompt's roles, as most templates and models know them: system, user, assistant, tools' results.
USUAL_ORDER = re.compile(r"s*u(at*u|at+)*")


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with two answers, as tokens; of an unpaired row, with one, and no token of the other.

    Attributes:
        prompt: Starts with the template's BOS, if it has one.
        chosen, rejected: Continue the prompt and end in exactly one end token. An unpaired row's desirable answer is
            chosen, its undesirable one rejected.
        row: Index of its row in the source, from 0.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: int


@dataclass(frozen=True)
class _Limits:
    max_length: int
    max_prompt_length: int | None
    max_completion_length: int | None
    overlong: str
    key: str

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


def read_pairs(
    block: dict,
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    unpaired: bool = False,
    progress: bool = True,
    beat: Callable[[str], None] | None = None,
    key: str = "dataset",
) -> tuple[list[Pair], Report]:
    """Returns read_rows and then tokenize_pairs of a config's `dataset` or `eval_dataset` block, all but its split.

    Args:
        unpaired, beat: See `tokenize_pairs`.
        key: The block's name, for messages.
    """
    where = {name: block[name] for name in ("split", "name", "revision", "limit")}
    rows = read_rows(block["source"], **where, columns=dict(block["columns"]), key=key)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": block["overlong"]}
    limits["max_completion_length"] = max_completion_length
    return tokenize_pairs(rows, tokenizer, **limits, unpaired=unpaired, progress=progress, beat=beat, key=key)


def read_train_and_held_out(
    dataset: dict,
    eval_dataset: dict,
    tokenizer,
    world: World,
    max_length: int,
    max_prompt_length: int | None,
    unpaired: bool = False,
    max_completion_length: int | None = None,
) -> tuple[list[Pair], list[Pair]]:
    """Returns the pairs to train on and the held-out ones, and prints the table of what became of the rows.

    Held out are those of `eval_dataset`, or the last `val_fraction` of `dataset`, or none.

    Args:
        dataset, eval_dataset: The config's blocks.
        world: The main process prints and shows progress.
        max_length, max_prompt_length, unpaired, max_completion_length: See `tokenize_pairs`.
    """
    read = partial(
        read_pairs,
        tokenizer=tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        max_completion_length=max_completion_length,
        unpaired=unpaired,
        progress=world.is_main,
        beat=world.beat,
    )
    train, report = read(dataset)
    held_out: list[Pair] = []
    if dataset["val_fraction"]:
        train, held_out = split_pairs(train, dataset["val_fraction"])
        report = report.with_split(train, held_out)
    world.print(f"Training pairs: {dataset['source']}\n{report}\n")
    if eval_dataset["source"]:
        held_out, report = read(eval_dataset, key="eval_dataset")
        world.print(f"Held-out pairs: {eval_dataset['source']}\n{report.with_split(train, held_out)}\n")
    return train, held_out


def tokenize_pairs(
    rows: Sequence[dict],
    tokenizer,
    *,
    max_length: int,
    max_prompt_length: int | None = None,
    max_completion_length: int | None = None,
    overlong: str = "drop",
    columns: dict[str, str | None] | None = None,
    unpaired: bool = False,
    progress: bool = True,
    beat: Callable[[str], None] | None = None,
    key: str = "dataset",
) -> tuple[list[Pair], Report]:
    """Returns the rows' pairs in order, and a report of what was dropped, why, and how long the pairs are.

    Each of the two conversations is rendered once, whole. The prompt is what they share with each other and with the
    prompt rendered alone, generation prompt included: a token that spans the prompt's end belongs to the answers.
    Dropped are rows whose prompts differ, end with an answer, or are empty; with an empty answer, identical answers or
    tool calls; too long; or refused by the chat template. From an answer that ends in an end token's text, that text is
    taken off; a special token's text elsewhere stays, as the tokenizer's special_tokens_in_text says.

    Args:
        rows: From `read_rows`, or a list of dicts.
        tokenizer: From tokenizer.hf_tokenizer, or one of torchtune's.
        max_length: Most tokens of prompt + longer answer.
        max_prompt_length, max_completion_length: Of the prompt, and of the longer answer; None leaves it to max_length.
        overlong: What becomes of a pair over one of them: drop, trim_prompt (from the left, BOS stays) or error.
            Answers are never cut.
        columns: Our names to theirs, for rows that `read_rows` has not renamed.
        unpaired: The loss takes rows of one answer and a label, too: needs(loss_fn).takes_unpaired.
        beat: Called with a word before each row, as dist.World.beat: a long data set is no standstill.
        key: Where the config describes the rows, for messages.

    Raises:
        UserError: A row is broken (source, row and column are named), its format is unknown or not one that the loss
            takes, or nothing is left.
    """
    limits = _Limits(max_length, max_prompt_length, max_completion_length, overlong, key)
    if columns or not isinstance(rows, Rows):
        source, numbers = getattr(rows, "source", "rows"), getattr(rows, "numbers", None)
        rows = Rows(rows, source=source, columns=columns, numbers=numbers, key=key)
    if not len(rows):
        raise UserError(f"{key}: {rows.source} has no rows in this split.")
    tokenizer = adapt(tokenizer)
    form = _format_of(rows, key, unpaired=unpaired)
    special = tokenizer.special_tokens_in_text
    report, pairs = Report(rows.source, form.name, tokenizer.style, len(rows), special_as=special), []
    told = console.progress(rows, "tokenizing", shown=progress and len(rows) >= 500)
    for number, row in zip(rows.numbers, told, strict=True):
        if beat:
            beat("tokenizing")
        with _told(report, number):
            pairs.append(_tokenize(form.read(row), number, tokenizer, limits=limits, report=report))
    report.num_kept = len(pairs)
    report.num_desirable = None if form.is_paired else sum(bool(pair.chosen) for pair in pairs)
    report.notes = notes_of(report, tokenizer, max_length, max_prompt_length)
    if not pairs:
        raise UserError(f"{key}: there is nothing left of {rows.source}.\n{report}")
    return pairs, report


def _format_of(rows: Rows, key: str, *, unpaired: bool) -> Format:
    form = detect_format(rows.column_names, list(islice(rows, 10)), source=rows.source, key=key)
    if not (form.is_paired or unpaired):
        raise UserError(
            f"{key}: {rows.source} holds answers with a label ({', '.join(form.columns)}), and this loss compares the "
            "two answers of a pair; loss=kto takes each answer for itself"
        )
    return form


@contextmanager
def _told(report: Report, number: int) -> Iterator[None]:
    """Enters what a row is dropped for in the report, and says of an error which row it is of."""
    try:
        yield
    except Skip as skip:
        report.dropped.setdefault(str(skip), []).append(number)
    except Refusal as refusal:
        report.dropped.setdefault(f"{REFUSED}: {refusal.reason}", []).append(number)
    except UserError as error:
        raise UserError(f"{report.source}, row {number} (from 0): {error}") from error


def split_pairs(pairs: list[Pair], val_fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Returns training and held-out pairs: held out are the last round(val_fraction * len(pairs)), in order.

    Raises:
        UserError: `val_fraction` is not between 0 and 1, or leaves either part empty.
    """
    if not 0 < val_fraction < 1:
        raise UserError(f"dataset.val_fraction={val_fraction}: must be between 0 and 1, such as 0.1, or null.")
    num_train = len(pairs) - round(val_fraction * len(pairs))
    train, held_out = pairs[:num_train], pairs[num_train:]
    if not train or not held_out:
        raise UserError(
            f"dataset.val_fraction={val_fraction} of {len(pairs)} pairs leaves {len(train)} to train on and "
            f"{len(held_out)} held out; both need one at least."
        )
    return train, held_out


def _tokenize(example: Example, number: int, tokenizer, *, limits: _Limits, report: Report) -> Pair:
    whole, example = example, _without_end_texts(example, tokenizer.end_texts)
    texts = [text for text in (example.chosen, example.rejected) if text is not None]
    if not all(text.strip() for text in texts):
        raise Skip("empty answer")
    _check_prompt(example.prompt)
    limits.check_texts(sum(len(message["content"]) for message in example.prompt), max(map(len, texts)))
    asked, *conversations = _sequences(example, tokenizer)
    if len(conversations) == 2 and conversations[0] == conversations[1]:  # also texts that a template makes alike
        raise Skip("identical answers")
    prompt = common_prefix(asked, *conversations)
    answers = [conversation[len(prompt) :] for conversation in conversations]
    _check_ends(prompt, answers, tokenizer)
    chosen = [] if example.chosen is None else answers[0]
    rejected = [] if example.rejected is None else answers[-1]
    for name, tokens in zip(report.lengths, (prompt, chosen, rejected), strict=True):
        report.lengths[name].append(len(tokens))
    fitted = limits.fit(prompt, max(len(chosen), len(rejected)), bos_id=tokenizer.bos_id)
    if unknown := [*prompt, *chosen, *rejected].count(tokenizer.unknown_id):
        report.num_unknown += unknown
        report.unknown.append(number)
    if len(example.prompt) > 1:
        report.turns.append(number)
    if len(fitted) < len(prompt):
        report.trimmed.append(number)
    if not USUAL_ORDER.fullmatch("".join(message["role"][0] for message in example.prompt)):
        report.unordered.append(number)
    if example != whole:
        report.ends_taken_off.append(number)
    if any(map(tokenizer.holds_special, [*(message["content"] for message in example.prompt), *texts])):
        report.special.append(number)
    if len(prompt) < len(asked):
        report.merges.append(number)
    return Pair(fitted, chosen, rejected, number)


def _check_prompt(messages: list[dict]) -> None:
    if messages[-1]["role"] == "assistant":
        raise Skip("the prompt ends with an answer")
    if messages[-1]["role"] != "tool" and not messages[-1]["content"].strip():  # a tool may have nothing to say
        raise Skip("empty prompt")


def _without_end_texts(example: Example, end_texts: list[str]) -> Example:
    """Returns the example with answers that do not end in an end token's text: rendering appends the token itself."""
    ends = "|".join(map(re.escape, end_texts))
    pattern = re.compile(rf"(?:(?:{ends})\s*)+\Z")

    def take_off(text: str | None) -> str | None:
        return text and pattern.sub("", text)

    written = example.written and (example.written[0], *map(take_off, example.written[1:]))
    return replace(example, chosen=take_off(example.chosen), rejected=take_off(example.rejected), written=written)


def _sequences(example: Example, tokenizer) -> list[list[int]]:
    """Returns the tokens of the prompt alone, and of each whole conversation: chosen, rejected, as far as there are."""
    if tokenizer.is_plain and example.written:
        prompt, *answers = example.written
        return [tokenizer.render_text(prompt, text) for text in (None, *(text for text in answers if text is not None))]
    asked = tokenizer.render(example.prompt, add_generation_prompt=True)
    texts = [text for text in (example.chosen, example.rejected) if text is not None]
    return [asked, *(tokenizer.render([*example.prompt, {"role": "assistant", "content": text}]) for text in texts)]


def _check_ends(prompt: list[int], answers: list[list[int]], tokenizer) -> None:
    if not prompt:  # nothing would predict the answer's first token
        raise Skip("empty prompt")
    if len(prompt) > 1 and prompt[0] == prompt[1] == tokenizer.bos_id:
        raise UserError(
            "the conversation begins with two BOS tokens; the template writes one, and so does the text, or the "
            "template again. Take one of them out."
        )
    for answer in answers:
        assert answer[-1] in tokenizer.end_ids, "render() ends an answer in an end token"
        if len(answer) > 1 and answer[-2] in tokenizer.end_ids:
            raise Skip("answer ends in an end token")  # not written as in the vocabulary, but normalized to it
