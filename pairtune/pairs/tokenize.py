"""Preference pairs: rows tokenized once, limited and counted. No shuffling, no batches: see steps.py and batch.py.

Where rows come from is in rows.py, what a row may look like in formats.py, how a conversation becomes tokens in
tokenizer/.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

from pairtune import console
from pairtune.dist import World
from pairtune.errors import UserError
from pairtune.pairs.already_rendered import AlreadyRendered
from pairtune.pairs.columns import as_plain
from pairtune.pairs.conversation import Written, write
from pairtune.pairs.example import Answer, BadRow, Example, Skip
from pairtune.pairs.formats import Format, doubtful
from pairtune.pairs.limits import Limits
from pairtune.pairs.messages import strings_in, text_of, thoughts_of
from pairtune.pairs.ranked import check_worse
from pairtune.pairs.recognise import recognise
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
        chosen_unscored, rejected_unscored: Spans [start, stop) of these answers that are not the assistant's, such as
            what tools return: read, and neither scored nor learned.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    row: int
    chosen_unscored: tuple[tuple[int, int], ...] = ()
    rejected_unscored: tuple[tuple[int, int], ...] = ()


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
    rows = read_rows(block["source"], **where, columns=as_plain(block["columns"]), key=key)
    limits = {"max_length": max_length, "max_prompt_length": max_prompt_length, "overlong": block["overlong"]}
    limits |= {"max_completion_length": max_completion_length, "on_bad_row": block["on_bad_row"]}
    limits["rejected"] = block["rejected"]
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
    on_bad_row: str = "drop",
    rejected: str = "all",
    columns: dict | None = None,
    unpaired: bool = False,
    progress: bool = True,
    beat: Callable[[str], None] | None = None,
    key: str = "dataset",
) -> tuple[list[Pair], Report]:
    """Returns the rows' pairs in order, and a report of what was dropped, why, and how long the pairs are.

    Each of the two conversations is rendered once, whole. The prompt is what they share with each other and with the
    prompt rendered alone, generation prompt included: a token that spans the prompt's end belongs to the answers.
    An end token's text is taken off an answer's end.

    Args:
        rows: From `read_rows`, or a list of dicts.
        tokenizer: From tokenizer.hf_tokenizer, or one of torchtune's.
        max_length: Most tokens of prompt + longer answer.
        max_prompt_length, max_completion_length: Of the prompt, and of the longer answer; None leaves it to max_length.
        overlong: What becomes of a pair over one of them: drop, trim_prompt (from the left, BOS stays) or error.
            Answers are never cut.
        on_bad_row: Broken, or an answer that the template cuts: drop, if at most one in twenty rows is, or error.
        rejected: Of several worse answers, which make a pair: all, the best or the worst.
        columns: Our names to theirs, for rows that `read_rows` has not renamed.
        unpaired: The loss takes rows of one answer and a label, too: needs(loss_fn).takes_unpaired.
        beat: Called with a word before each row, as dist.World.beat: a long data set is no standstill.
        key: Where the config describes the rows, for messages.

    Raises:
        UserError: Too many rows are broken (source, row and column are named), of an unknown format or of none that the
            loss takes, part of a question may be in a column that is not read, or nothing is left.
    """
    limits = Limits(max_length, max_prompt_length, max_completion_length, overlong, key)
    _check_policies(on_bad_row, rejected, key)
    tokenizer, (form, rows) = adapt(tokenizer), _format_of(_as_rows(rows, columns, key), key, unpaired=unpaired)
    report, pairs = _report_of(rows, form, tokenizer), []
    rendered = AlreadyRendered(tokenizer)
    asked = {"worse": rejected, "doubtful": doubtful(report.unused), "key": key}
    for index, row in enumerate(console.progress(rows, "tokenizing", shown=progress and len(rows) >= 500)):
        if beat:
            beat("tokenizing")
        with _told(report, rows, index, on_bad_row):
            for example in form.read(row, **asked):
                with _told(report, rows, index, on_bad_row):
                    rendered.look(example, rows.numbers[index])
                    pairs.append(_tokenize(example, rows.numbers[index], tokenizer, limits=limits, report=report))
    report.num_kept = len(pairs)
    report.num_desirable = None if form.is_paired else sum(bool(pair.chosen) for pair in pairs)
    report.notes = notes_of(report, tokenizer, max_length, max_prompt_length)
    rendered.check(rows.source, len(rows))
    report.check(key)
    return pairs, report


def _as_rows(rows: Sequence[dict], columns: dict | None, key: str) -> Rows:
    if columns or not isinstance(rows, Rows):
        source, numbers = getattr(rows, "source", "rows"), getattr(rows, "numbers", None)
        rows = Rows(rows, source=source, columns=columns, numbers=numbers, key=key)
    if not len(rows):
        raise UserError(f"{key}: {rows.source} has no rows in this split.")
    return rows


def _check_policies(on_bad_row: str, rejected: str, key: str) -> None:
    if on_bad_row not in ("drop", "error"):
        raise UserError(f"{key}.on_bad_row={on_bad_row!r}: must be drop or error.")
    check_worse(rejected, key)


def _format_of(rows: Rows, key: str, *, unpaired: bool) -> tuple[Format, Rows]:
    form, rows = recognise(rows, key, single=unpaired)
    if not (form.is_paired or unpaired):
        raise UserError(
            f"{key}: {rows.source} holds answers with a label ({', '.join(form.columns)}), and this loss compares the "
            "two answers of a pair; loss=kto takes each answer for itself"
        )
    return form, rows


def _report_of(rows: Rows, form: Format, tokenizer) -> Report:
    report = Report(rows.source, form.name, tokenizer.style, len(rows), special_as=tokenizer.special_tokens_in_text)
    report.unused = form.unused(rows.column_names)
    report.beside = form.read_beside(rows.column_names)
    return report


@contextmanager
def _told(report: Report, rows: Rows, index: int, on_bad_row: str) -> Iterator[None]:
    """Enters what a row is dropped for in the report, and says of an error which row it is of."""
    number = rows.numbers[index]
    try:
        yield
    except Skip as skip:
        report.drop(str(skip), number)
    except Refusal as refusal:
        report.drop(f"{REFUSED}: {refusal.reason}", number)
    except BadRow as bad:
        message = f"{rows.place(index)}: {bad}"
        if on_bad_row == "error":
            raise UserError(message) from bad
        report.drop(bad.reason, number, broken=message)
    except UserError as error:
        raise UserError(f"{rows.place(index)}: {error}") from error


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


def _tokenize(example: Example, number: int, tokenizer, *, limits: Limits, report: Report) -> Pair:
    whole, example = example, _without_end_texts(example, tokenizer.end_texts)
    if any(_is_empty(turns) for turns in example.answers):
        raise Skip("empty answer")
    _check_prompt(example.prompt)
    limits.check_texts(_characters(example.prompt), max(map(_characters, example.answers)))
    written = write(example, tokenizer)
    if len(written.wholes) == 2 and written.wholes[0] == written.wholes[1]:  # also texts that a template makes alike
        raise Skip("identical answers")
    prompt = common_prefix(written.asked, *written.wholes)
    answers = [conversation[len(prompt) :] for conversation in written.wholes]
    unscored = [tuple((a - len(prompt), b - len(prompt)) for a, b in spans) for spans in written.unscored]
    _check_ends(prompt, answers, tokenizer)
    chosen, chosen_unscored = ([], ()) if example.chosen is None else (answers[0], unscored[0])
    rejected, rejected_unscored = ([], ()) if example.rejected is None else (answers[-1], unscored[-1])
    for name, tokens in zip(report.lengths, (prompt, chosen, rejected), strict=True):
        report.lengths[name].append(len(tokens))
    fitted = limits.fit(prompt, max(len(chosen), len(rejected)), bos_id=tokenizer.bos_id)
    pair = Pair(fitted, chosen, rejected, number, chosen_unscored, rejected_unscored)
    _tell(report, whole, example, prompt, written, pair, tokenizer)
    return pair


def _tell(report: Report, whole: Example, example: Example, prompt, written: Written, pair: Pair, tokenizer) -> None:
    """Enters in the report what is worth knowing about a pair that is kept.

    Args:
        whole: The example before end tokens' texts were taken off.
        prompt: Its tokens before they were trimmed.
    """
    if unknown := [*prompt, *pair.chosen, *pair.rejected].count(tokenizer.unknown_id):
        report.num_unknown += unknown
    texts = list(
        strings_in([[turn.get("content", "") for turn in turns] for turns in (example.prompt, *example.answers)])
    )
    facts = {
        "unknown": unknown > 0,
        "turns": len(example.prompt) > 1,
        "trimmed": len(pair.prompt) < len(prompt),
        "unordered": not USUAL_ORDER.fullmatch("".join(message["role"][0] for message in example.prompt)),
        "ends_taken_off": example != whole,
        "special": any(map(tokenizer.holds_special, texts)),
        "merges": len(prompt) < len(written.asked) and not written.served_apart,
        "served_apart": bool(written.served_apart),
        "opened": bool(written.opened),
        "respaced": written.respaced,
        "left_out": bool(written.left_out),
        "thoughts": any(thoughts_of(turn) for turns in example.answers for turn in turns),
        "several_turns": any(pair.chosen_unscored + pair.rejected_unscored),
    }
    for name, holds in facts.items():
        if holds:
            getattr(report, name).append(pair.row)
    report.examples |= {
        name: text for name in ("served_apart", "opened", "left_out") if (text := getattr(written, name))
    }


def _characters(turns: list[dict]) -> int:
    return sum(map(len, strings_in([[value for key, value in turn.items() if key != "role"] for turn in turns])))


def _is_empty(turns: list[dict]) -> bool:
    """Says whether an answer's last turn says nothing: no text, no call."""
    return not (text_of(turns[-1]).strip() or turns[-1].get("tool_calls"))


def _check_prompt(messages: list[dict]) -> None:
    if messages[-1]["role"] == "assistant":
        raise Skip("the prompt ends with an answer")
    if messages[-1]["role"] != "tool" and not text_of(messages[-1]).strip():  # a tool may have nothing to say
        raise Skip("empty prompt")


def _without_end_texts(example: Example, end_texts: list[str]) -> Example:
    """Returns the example with answers that do not end in an end token's text: rendering appends the token itself."""
    ends = "|".join(map(re.escape, end_texts))
    pattern = re.compile(rf"(?:(?:{ends})\s*)+\Z")

    def take_off(answer: Answer | None) -> Answer | None:
        if isinstance(answer, list) and isinstance(answer[-1]["content"], str):
            return [*answer[:-1], {**answer[-1], "content": pattern.sub("", answer[-1]["content"])}]
        return pattern.sub("", answer) if isinstance(answer, str) else answer

    written = example.written and (example.written[0], *map(take_off, example.written[1:]))
    return replace(example, chosen=take_off(example.chosen), rejected=take_off(example.rejected), written=written)


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
