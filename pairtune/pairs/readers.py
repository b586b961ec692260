"""Rows of two answers, or of one and a label, to Examples: a function for each form of row. Which of them reads a row
is formats.py's to say; rows of several answers are read in ranked.py."""

import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from pairtune.pairs.cells import as_word, is_empty, kind_of, shown
from pairtune.pairs.example import Answer, BadRow, Example, Skip
from pairtune.pairs.messages import is_text_alone, read_message, text_of

_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
_LABELS |= {"thumbs_up": True, "thumbs up": True, "👍": True, "thumbs_down": False, "thumbs down": False, "👎": False}
_LABELS |= dict.fromkeys(("chosen", "good", "yes", "desirable", "up", "like", "accepted", "accept", "pass"), True)
_LABELS |= dict.fromkeys(("rejected", "bad", "no", "undesirable", "down", "dislike", "reject", "fail"), False)
_A_QUESTION = 8  # characters: what is shorter may be a greeting


def user(text: str) -> list[dict]:
    """Returns a prompt that is one question."""
    return [{"role": "user", "content": text}]


def system(row: dict) -> list[dict]:
    """Returns the row's system message, if it has one."""
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def as_answer(turns: list[dict]) -> Answer:
    """Returns an answer's turns as text, if that is all that they are."""
    return turns[0]["content"] if len(turns) == 1 and is_text_alone(turns[0]) else turns


def is_answer(turns: list[dict]) -> bool:
    """Says whether turns are an assistant's, with what tools return between them."""
    roles = "".join(turn["role"][0] for turn in turns)
    return re.fullmatch(r"a(t+a)*", roles) is not None


def answer_of(cell, column: str, prompt: list[dict], context: list[dict]) -> Answer:
    """Returns the answer of a text, a message, or messages that may repeat the prompt.

    Args:
        context: The row's system message, which may be repeated, too.
    """
    if isinstance(cell, str):
        return cell
    raws = cell if isinstance(cell, list) else [cell]
    if not all(isinstance(raw, dict) for raw in raws):
        raise BadRow(
            f"column {column!r} holds {shown(cell)}, expected text or messages. Mend or remove the row.",
            f"column {column!r} holds {kind_of(cell)}",
        )
    turns = [read_message(raw) for raw in raws]
    for repeated in (prompt, context + prompt):
        if turns[: len(repeated)] == repeated:
            turns = turns[len(repeated) :]
            break
    if not is_answer(turns):
        roles = ", ".join(turn["role"] for turn in turns)
        raise BadRow(
            f"column {column!r} continues the prompt with ({roles}), expected one assistant message, or several with "
            "what tools return between them. Mend or remove the row.",
            f"column {column!r} continues the prompt with ({roles})",
        )
    return as_answer(turns)


def from_texts(row: dict) -> Example:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    return Example(user(prompt), chosen, rejected, (prompt, chosen, rejected))


def from_instruction(row: dict) -> Example:
    return Example(instruction(row), row["chosen"], row["rejected"])


def instruction(row: dict) -> list[dict]:
    return user("\n".join(part for part in (row["instruction"], row.get("input")) if part))


def from_prompt_messages(row: dict, column: str = "prompt") -> Example:
    cell = row[column]
    prompt = [read_message(raw) for raw in (cell if isinstance(cell, list) else [cell])]
    return Example(prompt, *(answer_of(row[name], name, prompt, system(row)) for name in ("chosen", "rejected")))


def from_sharegpt(row: dict) -> Example:
    return from_prompt_messages(row, "conversations")


def from_conversations(row: dict) -> Example:
    chosen, rejected = ([read_message(raw) for raw in row[name]] for name in ("chosen", "rejected"))
    return split(chosen, rejected, row)


def split(chosen: list[dict], rejected: list[dict], row: dict) -> Example:
    """Returns two whole conversations as what they share and how each goes on from there."""
    if any(turns[-1]["role"] != "assistant" for turns in (chosen, rejected)):
        raise Skip("no answer at the end")
    most = min(len(chosen), len(rejected)) - 1
    shared = next((i for i in range(most) if chosen[i] != rejected[i]), most)
    while shared and not (chosen[shared]["role"] == rejected[shared]["role"] == "assistant"):
        shared -= 1
    prompt, answers = chosen[:shared], (chosen[shared:], rejected[shared:])
    if not all(map(is_answer, answers)):
        raise Skip("prompts differ")
    if not prompt and not row.get("prompt"):
        raise BadRow(
            "columns 'chosen' and 'rejected' hold an answer only, and there is no column 'prompt'. "
            "Add it, or remove the row.",
            "columns 'chosen' and 'rejected' hold an answer only",
        )
    return Example(prompt or user(row["prompt"]), *map(as_answer, answers))


def from_transcripts(row: dict) -> Example:
    (prompt, chosen), (other_prompt, rejected) = (_last_turn(row[name]) for name in ("chosen", "rejected"))
    if prompt != other_prompt:
        raise Skip("prompts differ")
    return Example(transcript_turns(prompt), chosen.strip(), rejected.strip(), (prompt, chosen, rejected))


def from_transcript_prompt(row: dict) -> Example:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    if prompt.rstrip().endswith("\n\nAssistant:"):
        return Example(transcript_turns(prompt), chosen.strip(), rejected.strip(), (prompt, chosen, rejected))
    return Example(transcript_turns(prompt), _without_speaker(chosen), _without_speaker(rejected))


def _without_speaker(answer: str) -> str:
    """Returns an answer that may begin with its speaker, where the prompt does not end with it."""
    return answer.strip().removeprefix("Assistant:").strip()


def labelled(row: dict, prompt: list[dict], answer: Answer, written: tuple[str, str] | None = None) -> Example:
    """Returns an unpaired row's example: its answer stands where its label puts it."""
    if _is_true(row["label"]):
        return Example(prompt, answer, None, written and (*written, None))
    return Example(prompt, None, answer, written and (written[0], None, written[1]))


def _is_true(label) -> bool:
    """Returns whether the answer is desirable."""
    found = as_label(label)
    if found is None:
        raise BadRow(
            f"column 'label' holds {shown(label)}, expected true or false (or 1 or 0). Mend or remove the row.",
            "column 'label' holds neither true nor false",
        )
    return found


def as_label(value) -> bool | None:
    """Returns what a label says: whether the answer is desirable; None where it says neither."""
    return _LABELS.get(str(value).strip().lower())


def with_words(read: Callable[[dict], Example], words: Sequence[str], row: dict) -> Example:
    """Returns the example of a row whose label is one of two words: of a good answer, and of a bad one.

    Args:
        read: Returns it where the label is true or false.
    """
    word = as_word(row.get("label"))
    return read({**row, "label": word == words[0] if word in words else row.get("label")})


def from_completion(row: dict) -> Example:
    return labelled(row, user(row["prompt"]), row["completion"], (row["prompt"], row["completion"]))


def from_transcript_completion(row: dict) -> Example:
    prompt, answer = row["prompt"], row["completion"]
    if prompt.rstrip().endswith("\n\nAssistant:"):
        return labelled(row, transcript_turns(prompt), answer.strip(), (prompt, answer))
    return labelled(row, transcript_turns(prompt), _without_speaker(answer))


def from_messages_completion(row: dict) -> Example:
    prompt = [read_message(raw) for raw in row["prompt"]]
    return labelled(row, prompt, answer_of(row["completion"], "completion", prompt, system(row)))


def from_labelled_conversation(row: dict, column: str = "messages") -> Example:
    *prompt, answer = (read_message(raw) for raw in row[column])
    if answer["role"] != "assistant":
        raise Skip("no answer at the end")
    if not prompt:
        raise Skip("empty prompt")
    return labelled(row, prompt, as_answer([answer]))


def from_labelled_sharegpt(row: dict) -> Example:
    return from_labelled_conversation(row, "conversations")


def from_labelled_instruction(row: dict) -> Example:
    return labelled(row, instruction(row), row["output"])


def without_question(read: Callable[[dict], Example], row: dict) -> Example:
    """Returns the example of a row whose answers are texts that begin with its question, without that.

    Args:
        read: Returns it with that.
    """
    example = read(row)
    if not repeats_question(example):
        return example
    asked = text_of(example.prompt[-1])

    def rest(text: str | None) -> str | None:
        return text and text.lstrip()[len(asked.strip()) :]

    answers = [text and rest(text).strip() for text in (example.chosen, example.rejected)]
    written = example.written and (example.written[0], *map(rest, example.written[1:]))
    return replace(example, chosen=answers[0], rejected=answers[1], written=written)


def repeats_question(example: Example) -> bool:
    """Says whether all answers are texts that begin with the question, which is all of the prompt."""
    answers = [answer for answer in (example.chosen, example.rejected) if answer is not None]
    asked = text_of(example.prompt[-1]) if len(example.prompt) == 1 else ""
    return all(isinstance(text, str) and begins_with(text, asked) for text in answers)


def begins_with(text: str, asked: str) -> bool:
    """Says whether a text begins with a question, and goes on behind a space. What is short may be a greeting."""
    asked, text = asked.strip(), text.strip()
    return len(asked) >= _A_QUESTION and text.startswith(asked) and text[len(asked) :][:1].isspace()


def from_one_answer(row: dict) -> Example:
    named = [name for name in ("chosen", "rejected", "completion") if not is_empty(row.get(name))]
    if len(named) != 1:
        said = " and ".join(named) or "no answer"
        raise BadRow(f"holds {said} where others have one answer. Mend or remove the row.", f"{said}: not one answer")
    (column,), prompt = named, row["prompt"]
    if isinstance(prompt, list):
        messages = [read_message(raw) for raw in prompt]
    else:
        messages = transcript_turns(prompt) if kind_of(prompt) == "transcript" else user(prompt)
    answer = answer_of(row[column], column, messages, system(row))
    written = (prompt, answer) if isinstance(prompt, str) and isinstance(answer, str) else None
    return labelled({"label": column != "rejected"}, messages, answer, written)


def from_one_conversation(row: dict) -> Example:
    column = "messages" if "messages" in row else "conversations"
    return from_labelled_conversation({**row, "label": True}, column)


def from_one_instruction(row: dict) -> Example:
    return from_labelled_instruction({**row, "label": True})


def _last_turn(transcript: str) -> tuple[str, str]:
    """Returns the text up to and with the last "Assistant:", and the text after it."""
    before, opening, answer = transcript.rpartition("\n\nAssistant:")
    if re.search(r"\n\nhuman:", answer, re.IGNORECASE) or not opening:
        raise Skip("no answer at the end")
    return before + opening, answer


def transcript_turns(transcript: str) -> list[dict]:
    """Returns a prompt's messages, stripped. Neighbours of one speaker are joined: many templates want alternation."""
    asked = "\n\n" + transcript.rstrip().removesuffix("\n\nAssistant:").lstrip("\n")
    _, *pieces = re.split(r"\n\n(Human|Assistant):", asked)
    messages = []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages
