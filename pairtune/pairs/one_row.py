"""One row to its pairs, and what is told of it in a report."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from pairtune.errors import UserError
from pairtune.pairs import remarks
from pairtune.pairs.already_rendered import AlreadyRendered
from pairtune.pairs.conversation import Written, write
from pairtune.pairs.example import Answer, BadRow, Example, Skip
from pairtune.pairs.formats import Format
from pairtune.pairs.gathering import ReadRow
from pairtune.pairs.limits import Limits
from pairtune.pairs.messages import strings_in, text_of, thoughts_of
from pairtune.pairs.pair import Pair
from pairtune.pairs.report import REFUSED, Report
from pairtune.pairs.rows import Rows
from pairtune.tokenizer.hf import common_prefix
from pairtune.tokenizer.template import Refusal

# Initials of a prompt's roles, as most templates and models know them: system, user, assistant, tools' results.
USUAL_ORDER = re.compile(r"s*u(at*u|at+)*")


def row_reader(
    rows: Rows,
    form: Format,
    tokenizer,
    limits: Limits,
    rendered: AlreadyRendered,
    on_bad_row: str,
    unused: list[str],
    **asked,
) -> ReadRow:
    """Returns what reads a row by its index: see tokenize_pairs.

    Args:
        unused: Columns that nobody reads.
        asked: As of Format.read.
    """

    grades = remarks.grades_of(unused) if form.is_paired else []

    def read_row(index: int, number: int, report: Report) -> list[Pair]:
        pairs, examples, questions = [], [], []
        with _told(report, rows, index, number, on_bad_row):
            row = rows[index]
            examples = form.read(row, **asked)
            questions += remarks.of_row(row, form, grades)
        for example in examples:
            with _told(report, rows, index, number, on_bad_row):
                rendered.look(example, number, report)
                pairs.append(_tokenize(example, number, tokenizer, limits=limits, report=report))
                questions += remarks.of_example(example, tokenizer)
        for question in questions if pairs else ():
            report.remark(question, number)
        return pairs

    return read_row


@contextmanager
def _told(report: Report, rows: Rows, index: int, number: int, on_bad_row: str) -> Iterator[None]:
    """Enters what a row is dropped for in the report, under a number, and says of an error which row it is of."""
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
    more = chosen_unscored, rejected_unscored, example.weight, example.margin
    pair = Pair(fitted, chosen, rejected, number, *more)
    _tell(report, whole, example, prompt, written, pair, tokenizer)
    return pair


def _tell(report: Report, whole: Example, example: Example, prompt, written: Written, pair: Pair, tokenizer) -> None:
    """Enters in the report what is worth knowing about a pair that is kept.

    Args:
        whole: The example before end tokens' texts were taken off.
        prompt: Its tokens before they were trimmed.
    """
    unknown = 0
    if tokenizer.unknown_id is not None:
        unknown = sum(part.count(tokenizer.unknown_id) for part in (prompt, pair.chosen, pair.rejected))
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
    answers = [turns[-1]["content"] for turns in example.answers] + [text for text in (example.written or ())[1:]]
    if not any(end in text for text in answers if isinstance(text, str) for end in end_texts):
        return example
    ends = "|".join(map(re.escape, end_texts))
    pattern = re.compile(rf"(?:(?:{ends})\s*)+\Z")

    def without(text: str) -> str:
        return pattern.sub("", text) if any(end in text for end in end_texts) else text

    def take_off(answer: Answer | None) -> Answer | None:
        if isinstance(answer, list) and isinstance(answer[-1]["content"], str):
            return [*answer[:-1], {**answer[-1], "content": without(answer[-1]["content"])}]
        return without(answer) if isinstance(answer, str) else answer

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
