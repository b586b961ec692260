"""Rows of preference datasets to Examples: a question, the better answer, the worse one; or one answer with a label.

FORMATS is the list of forms that are recognised without configuration, and what each of their columns must hold.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from pairtune.errors import UserError

ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
TEXT = "text|transcript"
ANSWER = "text|transcript|message|messages"
LABEL = "bool|int|float|text"  # true and false, as CSV and other tools write them too
CONTEXT = {"system": TEXT, "history": "pairs"}  # columns that any format may have: what comes before the prompt
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write "\ud83d", half of an emoji; UTF-8 cannot
TOOLS = "tools"  # a column of tool descriptions, which are not rendered


@dataclass(frozen=True, slots=True)
class Example:
    """One preference: prompt messages, `{"role", "content"}`, and two answers; of an unpaired row, one and None.

    `written` is prompt, chosen and rejected as they stand in the row where these are texts to be joined: plain-text
    tokenization uses it, so that a transcript is reproduced byte by byte.
    """

    prompt: list[dict]
    chosen: str | None
    rejected: str | None
    written: tuple[str, str | None, str | None] | None = None


class Skip(Exception):
    """A row that cannot be used, for a reason that is counted and reported."""


@dataclass(frozen=True)
class Format:
    """A form of rows: what each column may hold (kinds, as `kind_of` names them), and how a row becomes an Example."""

    name: str
    example: Callable[[dict], Example]
    columns: dict[str, str]  # column to kinds, separated by |; detection wants all of them
    optional: dict[str, str] = field(default_factory=dict)  # may be absent or null

    @property
    def is_paired(self) -> bool:
        """Two answers a row; else one with a label."""
        return "label" not in self.columns

    def matches(self, row: dict) -> bool:
        """Says whether a row has the columns, holding what they must."""
        return all(kind_of(row.get(column)) in kinds.split("|") for column, kinds in self.columns.items())

    def read(self, row: dict) -> Example:
        """Returns the row's Example. Raises Skip, or UserError for a column that holds something else."""
        optional = {column: kinds for column, kinds in (self.optional | CONTEXT).items() if not _is_empty(row, column)}
        for column, kinds in {**self.columns, **optional}.items():
            if kind_of(row.get(column)) not in kinds.split("|"):
                raise UserError(
                    f"column {column!r} holds {_shown(row.get(column))}, expected {_in_words(kinds)} "
                    f"as in the first rows ({self.name}). Mend or remove the row."
                )
        if not _is_empty(row, TOOLS):
            raise Skip("tool descriptions")
        return _writable(_in_context(self.example(row), row))

    def __str__(self) -> str:
        columns = [f"{column} ({_in_words(kinds)})" for column, kinds in self.columns.items()]
        optional = [f"{column} (optional)" for column in self.optional | CONTEXT]
        return f"{self.name}: {', '.join(columns + optional)}"


def detect_format(
    column_names: list[str], first_rows: list[dict], *, source: str = "rows", key: str = "dataset"
) -> Format:
    """Returns the first of FORMATS that fits a row with nothing missing, or else the first row.

    Args:
        source, key: Where the rows come from, and where the config describes them, for messages.

    Raises:
        UserError: None fits. The message lists the columns found and the formats known.
    """
    known = {column for form in FORMATS for column in form.columns}
    full = (row for row in first_rows if all(row.get(column) is not None for column in known & set(row)))
    row = next(full, first_rows[0])
    for form in FORMATS:
        if form.matches(row):
            return form
    found = "\n".join(f"  {name}: {_shown(row.get(name))}" for name in column_names)
    formats = "\n".join(f"  {form}" for form in FORMATS)
    raise UserError(
        f"{source}: no known format of preference pairs. Columns found, and what the first row holds:\n{found}\n"
        f"Formats known:\n{formats}\n"
        f"If a column only has another name, say so: {key}.columns.prompt=THEIR_NAME, and so on."
    )


def kind_of(value) -> str:
    """Returns what a cell holds: transcript, text, message, messages, pairs of texts, or the name of a Python type."""
    if isinstance(value, str):
        return "transcript" if value.startswith("\n\nHuman:") else "text"
    if _is_message(value):
        return "message"
    if isinstance(value, list) and value:
        for kind, belongs in (("messages", _is_message), ("pairs", _is_pair)):
            if all(map(belongs, value)):
                return kind
    return type(value).__name__


def _is_message(value) -> bool:
    if not isinstance(value, dict) or not _either(value, "role", "from"):
        return False
    return _calls_tools(value) or _either(value, "content", "value") is not None


def _is_pair(value) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _calls_tools(message: dict) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _is_empty(row: dict, column: str) -> bool:
    return row.get(column) in (None, "", "[]", [], {})  # JSON in a text, too


def _either(message: dict, name: str, other_name: str):
    """Arrow fills the keys that a message lacks with None."""
    return message[name] if message.get(name) is not None else message.get(other_name)


def _in_words(kinds: str) -> str:
    words = {"transcript": r"text that starts with \n\nHuman:", "messages": "list of messages"}
    words["pairs"] = "list of [question, answer]"
    return " or ".join(words.get(kind, kind) for kind in kinds.replace("text|transcript", "text").split("|"))


def _shown(value) -> str:
    if value is None:
        return "nothing (null)"
    text = repr(value)
    return f"{kind_of(value)}, {text if len(text) <= 60 else text[:57] + '...'}"


def _message(raw: dict) -> dict:
    if _calls_tools(raw):  # templates write them in ways of their own; role and content alone would be another turn
        raise Skip("tool calls")
    role, content = _either(raw, "role", "from"), _either(raw, "content", "value")
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"a message has the role {role!r}; known are {', '.join(ROLES)}. Rename it, or remove the row.")
    if not isinstance(content, str):
        raise UserError(f"a message's content is {type(content).__name__}, expected text. Mend or remove the row.")
    return {"role": ROLES[role], "content": content}


def _user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def _system(row: dict) -> list[dict]:
    return [{"role": "system", "content": row["system"]}] if row.get("system") else []


def _in_context(example: Example, row: dict) -> Example:
    """Returns the example behind the row's system message, which it may bring already, and earlier turns."""
    context, prompt = _system(row), example.prompt
    if prompt[:1] == context:
        prompt = prompt[1:]
    for question, answer in () if _is_empty(row, "history") else row["history"]:
        context += [*_user(question), {"role": "assistant", "content": answer}]
    return replace(example, prompt=context + prompt, written=None) if context else example


def _writable(example: Example) -> Example:
    """Returns the example. Raises Skip where a text holds what tokenizers cannot take, or what ends texts in C."""
    texts = [("prompt", message["content"]) for message in example.prompt]
    for name, text in (*texts, ("chosen", example.chosen or ""), ("rejected", example.rejected or "")):
        if "\0" in text:
            raise Skip(f"{name} holds a NUL character")
        if _SURROGATE.search(text):
            raise Skip(f"{name} holds half a surrogate pair")
    return example


def _answer(row: dict, column: str, prompt: list[dict]) -> str:
    """Returns the answer's text from a text, a message, or messages that may repeat the prompt."""
    cell = row[column]
    if isinstance(cell, str):
        return cell
    turns = [_message(raw) for raw in (cell if isinstance(cell, list) else [cell])]
    for repeated in (prompt, _system(row) + prompt):
        if turns[: len(repeated)] == repeated:
            turns = turns[len(repeated) :]
            break
    if [turn["role"] for turn in turns] != ["assistant"]:
        roles = ", ".join(turn["role"] for turn in turns)
        raise UserError(
            f"column {column!r} continues the prompt with ({roles}), expected one assistant message. "
            "Mend or remove the row."
        )
    return turns[0]["content"]


def _from_texts(row: dict) -> Example:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    return Example(_user(prompt), chosen, rejected, (prompt, chosen, rejected))


def _from_instruction(row: dict) -> Example:
    return Example(_instruction(row), row["chosen"], row["rejected"])


def _instruction(row: dict) -> list[dict]:
    return _user("\n".join(part for part in (row["instruction"], row.get("input")) if part))


def _from_prompt_messages(row: dict, column: str = "prompt") -> Example:
    prompt = [_message(raw) for raw in row[column]]
    return Example(prompt, *(_answer(row, name, prompt) for name in ("chosen", "rejected")))


def _from_sharegpt(row: dict) -> Example:
    return _from_prompt_messages(row, "conversations")


def _from_conversations(row: dict) -> Example:
    conversations = [[_message(raw) for raw in row[name]] for name in ("chosen", "rejected")]
    if any(turns[-1]["role"] != "assistant" for turns in conversations):
        raise Skip("no answer at the end")
    (*prompt, chosen), (*other_prompt, rejected) = conversations
    if prompt != other_prompt:
        raise Skip("prompts differ")
    if not prompt and not row.get("prompt"):
        raise UserError(
            "columns 'chosen' and 'rejected' hold an answer only, and there is no column 'prompt'. "
            "Add it, or remove the row."
        )
    return Example(prompt or _user(row["prompt"]), chosen["content"], rejected["content"])


def _from_transcripts(row: dict) -> Example:
    (prompt, chosen), (other_prompt, rejected) = (_last_turn(row[name]) for name in ("chosen", "rejected"))
    if prompt != other_prompt:
        raise Skip("prompts differ")
    return Example(_turns(prompt), chosen.strip(), rejected.strip(), (prompt, chosen, rejected))


def _from_transcript_prompt(row: dict) -> Example:
    prompt, chosen, rejected = row["prompt"], row["chosen"], row["rejected"]
    written = (prompt, chosen, rejected) if prompt.rstrip().endswith("\n\nAssistant:") else None
    return Example(_turns(prompt), chosen.strip(), rejected.strip(), written)


def _labelled(row: dict, prompt: list[dict], answer: str, written: tuple[str, str] | None = None) -> Example:
    """Returns an unpaired row's example: its answer stands where its label puts it."""
    if _is_true(row["label"]):
        return Example(prompt, answer, None, written and (*written, None))
    return Example(prompt, None, answer, written and (written[0], None, written[1]))


def _is_true(label) -> bool:
    """Returns whether the answer is desirable."""
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if str(label).strip().lower() not in known:
        raise UserError(
            f"column 'label' holds {_shown(label)}, expected true or false (or 1 or 0). Mend or remove the row."
        )
    return known[str(label).strip().lower()]


def _from_completion(row: dict) -> Example:
    return _labelled(row, _user(row["prompt"]), row["completion"], (row["prompt"], row["completion"]))


def _from_transcript_completion(row: dict) -> Example:
    prompt, answer = row["prompt"], row["completion"]
    written = (prompt, answer) if prompt.rstrip().endswith("\n\nAssistant:") else None
    return _labelled(row, _turns(prompt), answer.strip(), written)


def _from_messages_completion(row: dict) -> Example:
    prompt = [_message(raw) for raw in row["prompt"]]
    return _labelled(row, prompt, _answer(row, "completion", prompt))


def _from_labelled_conversation(row: dict, column: str = "messages") -> Example:
    *prompt, answer = (_message(raw) for raw in row[column])
    if answer["role"] != "assistant":
        raise Skip("no answer at the end")
    if not prompt:
        raise Skip("empty prompt")
    return _labelled(row, prompt, answer["content"])


def _from_labelled_sharegpt(row: dict) -> Example:
    return _from_labelled_conversation(row, "conversations")


def _from_labelled_instruction(row: dict) -> Example:
    return _labelled(row, _instruction(row), row["output"])


def _last_turn(transcript: str) -> tuple[str, str]:
    """Returns the text up to and with the last "Assistant:", and the text after it."""
    before, opening, answer = transcript.rpartition("\n\nAssistant:")
    if "\n\nHuman:" in answer or not opening:
        raise Skip("no answer at the end")
    return before + opening, answer


def _turns(transcript: str) -> list[dict]:
    """Returns a prompt's messages, stripped. Neighbours of one speaker are joined: many templates want alternation."""
    _, *pieces = re.split(r"\n\n(Human|Assistant):", transcript.rstrip().removesuffix("\n\nAssistant:"))
    messages = []
    for speaker, text in zip(pieces[::2], pieces[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


# The first that fits is taken, so the more particular form stands before the more general one.
FORMATS = [
    Format("HH transcripts", _from_transcripts, {"chosen": "transcript", "rejected": "transcript"}),
    Format(
        "HH prompt with answers", _from_transcript_prompt, {"prompt": "transcript", "chosen": TEXT, "rejected": TEXT}
    ),
    Format("prompt with answers", _from_texts, {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    Format(
        "prompt messages with answers",
        _from_prompt_messages,
        {"prompt": "messages", "chosen": ANSWER, "rejected": ANSWER},
    ),
    Format("ShareGPT", _from_sharegpt, {"conversations": "messages", "chosen": ANSWER, "rejected": ANSWER}),
    Format("conversations", _from_conversations, {"chosen": "messages", "rejected": "messages"}, {"prompt": TEXT}),
    Format(
        "instruction with answers",
        _from_instruction,
        {"instruction": TEXT, "chosen": TEXT, "rejected": TEXT},
        {"input": TEXT},
    ),
    Format(
        "unpaired HH prompt",
        _from_transcript_completion,
        {"prompt": "transcript", "completion": TEXT, "label": LABEL},
    ),
    Format("unpaired", _from_completion, {"prompt": TEXT, "completion": TEXT, "label": LABEL}),
    Format(
        "unpaired prompt messages",
        _from_messages_completion,
        {"prompt": "messages", "completion": ANSWER, "label": LABEL},
    ),
    Format("unpaired conversations", _from_labelled_conversation, {"messages": "messages", "label": LABEL}),
    Format("unpaired ShareGPT", _from_labelled_sharegpt, {"conversations": "messages", "label": LABEL}),
    Format(
        "unpaired instruction",
        _from_labelled_instruction,
        {"instruction": TEXT, "output": TEXT, "label": LABEL},
        {"input": TEXT},
    ),
]
