"""Forms of rows of preference datasets: which one a source has, and what each column of it must hold.

FORMATS is the list of forms that are recognised without configuration. How a row of each is read is in readers.py and
ranked.py; published data sets whose columns have other names are in layouts.py, what stands beside a question in
context.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from pairtune.errors import UserError
from pairtune.pairs import ranked, readers
from pairtune.pairs.cells import in_words, is_empty, kind_of, says_nothing, shown
from pairtune.pairs.context import (
    ARGUMENTS,
    CONTEXT,
    NUMBERS,
    OTHER_NAMES,
    SIDES,
    TEXT,
    TOOLS,
    arguments_of,
    as_chosen,
    check_doubtful,
    check_grades,
    in_context,
    is_doubtful,
    number_of,
    tools_of,
)
from pairtune.pairs.example import BadRow, Example
from pairtune.pairs.messages import check_characters
from pairtune.pairs.names import GRADES
from pairtune.pairs.ranked import Ranked
from pairtune.pairs.speakers import speakers_in

ANSWER = "text|transcript|message|messages"
LABEL = "bool|int|float|text"  # true and false, as CSV and other tools write them too
PROMPT = "text|transcript|messages|texts"
_A_NAME = 40  # characters that a column's name has at most


@dataclass(frozen=True)
class Format:
    """A form of rows: what each column may hold (kinds, as `kind_of` names them), and how a row becomes Examples."""

    name: str
    example: Callable[[dict], Example | Ranked | list[Ranked]]
    columns: dict[str, str]  # column to kinds, separated by |; detection wants all of them
    optional: dict[str, str] = field(default_factory=dict)  # may be absent or null
    is_paired: bool = True  # two answers a row, or more; else one with a label

    def matches(self, row: dict) -> bool:
        """Says whether a row has the columns, holding what they must."""
        return all(kind_of(row.get(column)) in kinds.split("|") for column, kinds in self.columns.items())

    @property
    def beside(self) -> dict[str, str]:
        """Columns that a row may have beside those of its form: what comes before a question, and their kinds."""
        return {column: kinds for column, kinds in CONTEXT.items() if column not in self.columns | self.optional}

    def read(
        self,
        row: dict,
        *,
        worse: str = "all",
        doubtful: list[str] | None = None,
        numbers: Sequence[str] = (),
        columns: dict | None = None,
        key: str = "dataset",
    ) -> list[Example]:
        """Returns the row's Examples, one but for rows of several answers.

        Args:
            worse: Of several worse answers: all, the best or the worst.
            doubtful: Columns that are not used, and may be part of the question, or say how good answers are.
            numbers: Those of context.NUMBERS that `columns` speaks of.
            columns: Ours to theirs, where theirs are others.
            key: Where the config describes the rows.

        Raises:
            Skip: It cannot be used.
            BadRow: A column holds something else.
            UserError: A column that is not used holds part of the question.
        """
        theirs = columns or {}
        if all(row.get(name) == theirs.get(name, name) for name in self.columns):
            raise BadRow("holds its columns' names, a header once more. Remove the row.", "a header once more")
        row = _under_one_name(row | dict.fromkeys(self.says_nothing_in(row)))
        optional = {column: k for column, k in (self.optional | self.beside).items() if not is_empty(row.get(column))}
        for column, kinds in {**self.columns, **optional}.items():
            if kind_of(row.get(column)) not in kinds.split("|"):
                kind = "nothing (null)" if row.get(column) is None else kind_of(row[column])
                way_out = "Mend or remove the row."
                if column not in self.columns:
                    way_out = f"Mend it, or say what it is: {key}.columns={{{column}: null}} leaves it out"
                    way_out += f", {{prompt: {column}}} asks with it." if kind == "messages" else "."
                raise BadRow(
                    f"column {column!r} holds {shown(row.get(column))}, expected {in_words(kinds)} "
                    f"as in the first rows ({self.name}). {way_out}",
                    f"column {column!r} holds {kind}",
                )
        examples = self._examples(row, worse)
        given = {"tools": tools_of(row), "arguments": arguments_of(row)} | {n: number_of(row, n) for n in numbers}
        others = [*(doubtful or []), *(["prompt"] if self.example is readers.from_conversations else [])]
        for example in examples:
            check_doubtful(example, row, others, key)
        if not (self.is_paired or "label" in self.columns):
            check_grades(row, doubtful or [], key, theirs)
        if self.is_paired:
            sides = [name for name in doubtful or [] if name in SIDES]
            examples = [as_chosen(example, row, sides, key) for example in examples]
        read = [in_context(example, row, self.beside.keys()) for example in examples]
        return [check_characters(replace(example, **given)) for example in read]

    def says_nothing_in(self, row: dict) -> list[str]:
        """Returns the columns that a row may lack and that hold a word for nothing, which `read` leaves out."""
        names = (*self.optional, *self.beside, *OTHER_NAMES, *TOOLS, ARGUMENTS)
        return [name for name in names if says_nothing(row.get(name))]

    def _examples(self, row: dict, worse: str) -> list[Example]:
        found = self.example(row)
        listed = found if isinstance(found, list) else [found]
        return [pair for one in listed for pair in (one.pairs(worse) if isinstance(one, Ranked) else [one])]

    def unused(self, column_names: list[str]) -> list[str]:
        """Returns the columns that `read` does not look at, in their order."""
        used = {*self.columns, *self.optional, *self.read_beside(column_names)}
        return [name for name in column_names if name not in used]

    def read_beside(self, column_names: list[str]) -> list[str]:
        """Returns the columns that `read` looks at beside those of the form, in their order."""
        used = {*self.beside, *OTHER_NAMES, *TOOLS, ARGUMENTS}
        return [name for name in column_names if name in used]

    def __str__(self) -> str:
        columns = [f"{column} ({in_words(kinds)})" for column, kinds in self.columns.items()]
        optional = [f"{column} (optional)" for column in (*self.optional, "system")]
        return f"{self.name}: {', '.join(columns + optional)}"


def doubtful(names: list[str]) -> list[str]:
    """Returns those of a form's unused columns that may be part of a question, or say which answer is better, or how
    good one is, by their names."""
    return [name for name in names if is_doubtful(name) or name in (*SIDES, *GRADES)]


def no_format(
    column_names: list[str], row: dict, *, source: str, key: str, columns: dict | None = None, line: str = ""
) -> UserError:
    """Returns what is said of rows that no format fits: the columns found, and the formats known.

    Args:
        column_names, row: Under our names of columns, as far as `columns` gives some; the first row.
        source, key: Where the rows come from, and where the config describes them.
        columns: Ours to theirs.
        line: What may describe them.
    """
    if wrong := _wrong_column(row):
        column, said = wrong
        theirs = (columns or {}).get(column, column)
        way_out = f"{key}.columns={{{column}: NAME}}, with dots where it lies within another column"
        if kind_of(row.get(column)) == "texts" and isinstance(theirs, str):
            way_out = f"{key}.columns={{{column}: {theirs}.0}} takes the first of the list"
        return UserError(f"{source}, row 0 (from 0): {said}. Mend it, or say where it is: {way_out}.")
    found = "\n".join(f"  {name}: {shown(row.get(name))}" for name in column_names)
    formats = [f"  {form}" for form in FORMATS if form.is_paired]
    unpaired = "; ".join(str(form) for form in FORMATS if not form.is_paired)
    formats = "\n".join([*formats, f"  for losses of single answers: {unpaired}"])
    named = f"If a column only has another name, say so: {key}.columns.prompt=THEIR_NAME, and so on."
    several = f"If it is something like this, say so: {line}" if line else ""
    if "prompt" not in row and {kind_of(row.get(name)) for name in ("chosen", "rejected")} == {"text"}:
        named = (
            "What was asked has to be in a column: prompt. Whole conversations are lists of messages, or transcripts."
        )
        if marks := speakers_in(row["chosen"]):
            named = (
                f"The answers look like transcripts, with {marks[0]!r} and {marks[1]!r}. Those with Human: and "
                "Assistant:, each behind an empty line (\\n\\n), are read: write these in their place, or whole "
                "conversations as lists of messages."
            )
    if any(len(name) > _A_NAME and " " in name for name in column_names):
        several = (
            "It seems that the file has no header: its first row stands in place of the columns' names. Add a line "
            "before it, such as prompt,chosen,rejected."
        )
    return UserError(
        f"{source}: no known format of preference pairs. Columns found, and what the first row holds:\n{found}\n"
        f"Formats known:\n{formats}\n{several or named}"
    )


def _wrong_column(row: dict) -> tuple[str, str] | None:
    """Returns a column that holds something else than a form wants whose columns the row has; and that in words."""
    row = _under_one_name(row)
    having = [form for form in FORMATS if form.columns.keys() <= row.keys()]
    if "prompt" not in row:  # of texts, what was asked is missing
        having = [form for form in having if form.columns.keys() != {"chosen", "rejected"}]
    misfits = [
        ([name for name, kinds in form.columns.items() if kind_of(row[name]) not in kinds.split("|")], form)
        for form in having
        if not form.matches(row)
    ]
    if not misfits:
        return None
    (column, *_), nearest = max(
        misfits, key=lambda misfit: (len(misfit[1].columns) - len(misfit[0]), len(misfit[1].columns))
    )
    alike = [form for form in having if form.columns.keys() == nearest.columns.keys()]
    kinds = dict.fromkeys("|".join(form.columns[column] for form in alike).split("|"))
    kinds = "|".join(kind for kind in kinds if kind != "transcript" or "text" not in kinds)  # which is a text
    beside = " and ".join(name for name in nearest.columns if name != column)
    return column, f"column {column!r} holds {shown(row[column])}, expected {in_words(kinds)} beside {beside}"


def fitting_format(first_rows: list[dict], formats: list[Format] | None = None) -> Format | None:
    """Returns the first of the formats, FORMATS if none are given, that fits a row with nothing missing, or else the
    first row; None if none does."""
    known = {column for form in FORMATS for column in form.columns}
    full = (row for row in first_rows if all(row.get(column) is not None for column in known & set(row)))
    for row in (next(full, first_rows[0]), *first_rows):
        for form in FORMATS if formats is None else formats:
            if form.matches(_under_one_name(row)):
                return form
    return None


def _under_one_name(row: dict) -> dict:
    """Returns the row with a system message under the name that it has here."""
    for name, ours in OTHER_NAMES.items():
        if not is_empty(row.get(name)) and is_empty(row.get(ours)):
            row = {**row, ours: row[name]}
    return row


# The first that fits is taken, so the more particular form stands before the more general one.
FORMATS = [
    Format("HH transcripts", readers.from_transcripts, {"chosen": "transcript", "rejected": "transcript"}),
    Format(
        "HH prompt with answers",
        readers.from_transcript_prompt,
        {"prompt": "transcript", "chosen": TEXT, "rejected": TEXT},
    ),
    Format("prompt with answers", readers.from_texts, {"prompt": TEXT, "chosen": TEXT, "rejected": TEXT}),
    Format(
        "prompt messages with answers",
        readers.from_prompt_messages,
        {"prompt": "messages|message", "chosen": ANSWER, "rejected": ANSWER},
    ),
    Format("ShareGPT", readers.from_sharegpt, {"conversations": "messages", "chosen": ANSWER, "rejected": ANSWER}),
    Format(
        "conversations", readers.from_conversations, {"chosen": "messages", "rejected": "messages"}, {"prompt": TEXT}
    ),
    Format(
        "instruction with answers",
        readers.from_instruction,
        {"instruction": TEXT, "chosen": TEXT, "rejected": TEXT},
        {"input": TEXT},
    ),
    Format(
        "several rejected answers",
        ranked.from_rejected_list,
        {"prompt": "text|transcript|messages", "chosen": ANSWER, "rejected": "texts|conversations"},
    ),
    Format(
        "conversation and a rejected response",
        ranked.from_rejected_response,
        {"messages": "messages", "rejected_response": f"{ANSWER}|texts|conversations"},
    ),
    Format("answers with scores", ranked.from_scores, {"answers": "texts|conversations|list", "scores": "list|texts"},
           {"prompt": PROMPT}),
    Format("answers with ranks", ranked.from_ranks, {"answers": "texts|conversations|list", "ranks": "list|texts"},
           {"prompt": PROMPT}),
    Format("answers and their order", ranked.from_order, {"answers": "texts|conversations|list", "order": "list|texts"},
           {"prompt": PROMPT}),
    Format("answers and a choice", ranked.from_choice,
           {"answers": "texts|conversations|list", "choice": "bool|int|float|text|list|texts"}, {"prompt": PROMPT}),
    Format("answers and a preference", ranked.from_preference,
           {"answers": "texts|conversations|list", "preference": "int|float"}, {"prompt": PROMPT}),
    Format("tree of ranked replies", ranked.from_tree, {"message_tree_id": "text", "prompt": "dict"}),
    Format(
        "unpaired HH prompt",
        readers.from_transcript_completion,
        {"prompt": "transcript", "completion": TEXT, "label": LABEL},
        is_paired=False,
    ),
    Format(
        "unpaired",
        readers.from_completion,
        {"prompt": TEXT, "completion": TEXT, "label": LABEL},
        is_paired=False,
    ),
    Format(
        "unpaired prompt messages",
        readers.from_messages_completion,
        {"prompt": "messages", "completion": ANSWER, "label": LABEL},
        is_paired=False,
    ),
    Format(
        "unpaired conversations",
        readers.from_labelled_conversation,
        {"messages": "messages", "label": LABEL},
        is_paired=False,
    ),
    Format(
        "unpaired ShareGPT",
        readers.from_labelled_sharegpt,
        {"conversations": "messages", "label": LABEL},
        is_paired=False,
    ),
    Format(
        "unpaired instruction",
        readers.from_labelled_instruction,
        {"instruction": TEXT, "output": TEXT, "label": LABEL},
        {"input": TEXT},
        is_paired=False,
    ),
]  # fmt: skip
# One answer a row and nothing that says how good it is: good, but where the column says otherwise. Looked for last.
SINGLE = [
    Format("better answers alone", readers.from_one_answer, {"prompt": f"{TEXT}|messages", "chosen": ANSWER},
           is_paired=False),
    Format("worse answers alone", readers.from_one_answer, {"prompt": f"{TEXT}|messages", "rejected": ANSWER},
           is_paired=False),
    Format("answers alone", readers.from_one_answer, {"prompt": f"{TEXT}|messages", "completion": ANSWER},
           is_paired=False),
    Format("conversations alone", readers.from_one_conversation, {"messages": "messages"}, is_paired=False),
    Format("ShareGPT alone", readers.from_one_conversation, {"conversations": "messages"}, is_paired=False),
    Format("instruction with an answer", readers.from_one_instruction, {"instruction": TEXT, "output": TEXT},
           {"input": TEXT}, is_paired=False),
]  # fmt: skip
OUR_COLUMNS = [
    *dict.fromkeys(name for form in FORMATS for name in [*form.columns, *form.optional]),
    *CONTEXT,
    *TOOLS,
    ARGUMENTS,
    *NUMBERS,
]
