"""What became of a source's rows, as a table and in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pairtune.errors import UserError
from pairtune.pairs.context import NUMBERS
from pairtune.pairs.digests import digest_questions
from pairtune.tokenizer.template import plain_text

REFUSED = "refused by the chat template"
MOST_BROKEN = 0.05  # of all rows
# Forms of one answer a row, of which no column says how good it is
UNLABELLED = (
    "better answers alone",
    "answers alone",
    "conversations alone",
    "ShareGPT alone",
    "instruction with an answer",
)
# Report's lists that its table has a line for: above those of what was dropped, and below them
ABOVE = {
    "trimmed": "of these, prompt trimmed",
    "unordered": "of these, roles out of order",
    "ends_taken_off": "end token's text taken off",
    "special": "special tokens, as {special_as}",
    "unknown": "with unknown tokens",
    "thoughts": "with reasoning_content",
    "several_turns": "tools' results, not scored",
}
BELOW = {
    "respaced": "white space as the template's",
    "left_out": "prompt not written whole",
    "served_apart": "served with another prompt",
    "opened": "begun by the template",
    "merges": "boundary merges",
}


@dataclass
class Report:
    """What became of the rows; str() is a table. Rows are given by their number in the source."""

    source: str
    format: str
    style: str  # how the tokenizer writes conversations
    num_rows: int
    num_kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason to rows
    broken: dict[int, str] = field(default_factory=dict)  # rows that are broken, and in a sentence how
    unused: list[str] = field(default_factory=list)  # columns that nobody reads
    beside: list[str] = field(default_factory=list)  # columns that are read beside those of the form
    trimmed: list[int] = field(default_factory=list)  # rows whose prompt was cut
    unordered: list[int] = field(default_factory=list)  # rows whose prompt does not go system, user, assistant, user
    ends_taken_off: list[int] = field(default_factory=list)  # rows with an answer that was written with an end token
    special: list[int] = field(default_factory=list)  # rows with a special token written in their text
    special_as: str = "text"  # what it became
    merges: list[int] = field(default_factory=list)  # rows where a token spans the prompt's end
    unknown: list[int] = field(default_factory=list)  # rows with a token that stands for what the vocabulary lacks
    num_unknown: int = 0  # such tokens
    turns: list[int] = field(default_factory=list)  # rows whose prompt is more than a question
    thoughts: list[int] = field(default_factory=list)  # rows whose answers hold thoughts beside their text
    several_turns: list[int] = field(default_factory=list)  # rows whose answers hold what tools return
    rendered: list[int] = field(default_factory=list)  # rows whose prompt a template has been through already
    in_words: list[int] = field(default_factory=list)  # rows whose prompt is written out to the mark of an answer
    respaced: list[int] = field(default_factory=list)  # rows whose answers the template writes with other white space
    served_apart: list[int] = field(default_factory=list)  # rows whose conversation does not begin as it is served
    opened: list[int] = field(default_factory=list)  # rows whose answers the template begins with words of its own
    left_out: list[int] = field(default_factory=list)  # rows of whose prompt the template leaves something out
    remarks: dict[str, list[int]] = field(
        default_factory=dict
    )  # what is to be asked about rows that are kept: remarks.py
    holds: dict[str, str] = field(default_factory=dict)  # what columns that nobody reads hold
    examples: dict[str, str] = field(default_factory=dict)  # of some of these, what is written, or whose it is
    # Tokens of every row that was tokenized, before limits: what max_length would have to be
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "chosen": [], "rejected": []})
    notes: list[str] = field(default_factory=list)
    num_desirable: int | None = None  # of unpaired rows
    num_held_out: int | None = None
    num_overlap: int | None = None  # held-out pairs whose prompt and chosen answer are in the training part, too

    def drop(self, reason: str, row: int, *, broken: str = "") -> None:
        """Enters a row that is dropped; of a broken one, the sentence that says so."""
        rows = self.dropped.setdefault(reason, [])
        if row not in rows[-1:]:
            rows.append(row)
        if broken:
            self.broken.setdefault(row, broken)

    def remark(self, question: str, row: int) -> None:
        """Enters what is to be asked about a row."""
        rows = self.remarks.setdefault(question, [])
        if row not in rows[-1:]:
            rows.append(row)

    def check(self, key: str) -> None:
        """Refuses rows of which more than one in twenty are broken, or none makes a pair.

        Raises:
            UserError: With the first of each kind that is broken, and the table.
        """
        if not is_too_many(len(self.broken), self.num_rows):
            if not self.num_kept:
                raise UserError(f"{key}: there is nothing left of {self.source}.\n{self}")
            return
        reasons = [rows[0] for rows in self.dropped.values() if rows[0] in self.broken]
        sentences = "\n".join(dict.fromkeys(self.broken[row] for row in reasons))
        told = told_of_broken(list(self.broken), len(self.broken), self.num_rows, key)
        raise UserError(f"{sentences}\n{told}\n{self}")

    def with_split(self, train: list, held_out: list) -> "Report":
        """Returns the report with two lines more: the held-out pairs, and how many of them training sees."""
        return replace(self, num_held_out=len(held_out), num_overlap=count_overlap(train, held_out))

    def __str__(self) -> str:
        lines = [self._line("rows read", self.num_rows), self._line("kept", self.num_kept)]
        if self.num_desirable is not None:
            lines.append(self._line("of these, desirable", self.num_desirable))
            lines.append(self._line("of these, undesirable", self.num_kept - self.num_desirable))
        lines += self._counted(ABOVE)
        for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1])):
            lines.append(self._line(f"dropped: {reason}", len(rows), rows))
        lines += self._counted(BELOW)
        lines += [self._line(question, len(rows), rows) for question, rows in self.remarks.items()]
        if self.num_held_out is not None:
            lines.append(self._line("held out", self.num_held_out))
            lines.append(self._line("of these, also in training", self.num_overlap))
        if self.lengths["prompt"]:
            lines.append(f"{'tokens, before limits':{self._width}} {'median':>8} {'95 %':>8} {'max':>8}")
            lines += [self._lengths_line(name, lengths) for name, lengths in self._all_lengths().items()]
        lines += [f"format: {self.format}", *self.columns(), self.style, *self.notes]
        return "\n".join(lines)

    def columns(self) -> list[str]:
        """Returns sentences about the columns that are read beside those of the form, and those that are not."""
        said = []
        if self.beside:
            said.append(f"columns read beside these: {', '.join(self.beside)}")
        if self.unused:
            said.append(not_used(self.unused, self.holds))
        for name in NUMBERS:
            if name in self.unused:
                said.append(f"dataset.columns={{{name}: {name}}} would take the column {name!r} for each pair's {name}")
        return said

    @property
    def _width(self) -> int:
        """Of the first column: what rows were dropped for may be longer than its other words."""
        return max([32, *(len(f"dropped: {reason}") for reason in self.dropped), *map(len, self.remarks)])

    def _counted(self, facts: dict[str, str]) -> list[str]:
        found = [(title.format(special_as=self.special_as), getattr(self, name)) for name, title in facts.items()]
        return [self._line(title, len(rows), rows) for title, rows in found if rows]

    def _line(self, title: str, count: int, rows: Sequence[int] = ()) -> str:
        examples = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
        told = f"{title:{self._width}} {count:8,} {100 * count / self.num_rows:6.1f} %"
        return told + (f"   row {examples}" if rows else "")

    def _all_lengths(self) -> dict[str, list[int]]:
        total = [prompt + max(answers) for prompt, *answers in zip(*self.lengths.values(), strict=True)]
        if self.num_desirable is None:
            return {**self.lengths, "prompt + longer answer": total}
        answers = {"desirable": self.lengths["chosen"], "undesirable": self.lengths["rejected"]}
        present = {name: [length for length in lengths if length] for name, lengths in answers.items()}
        return {
            "prompt": self.lengths["prompt"],
            **{name: lengths for name, lengths in present.items() if lengths},
            "prompt + answer": total,
        }

    def _lengths_line(self, name: str, lengths: list[int]) -> str:
        ranked = sorted(lengths)
        median, most, longest = (ranked[-(-len(ranked) * percent // 100) - 1] for percent in (50, 95, 100))
        return f"  {name:{self._width - 2}} {median:8,} {most:8,} {longest:8,}"


def not_used(names: Sequence[str], held: dict[str, str]) -> str:
    """Returns a sentence about columns that nobody reads; `held`: what they hold, from remarks.held_by."""
    told = [(name or repr(name)) + (f" ({held[name]})" if name in held else "") for name in names]
    return f"columns not used: {', '.join(told)}"


def is_too_many(num_broken: int, num_rows: int) -> bool:
    """Says whether more than one in twenty rows are broken."""
    return num_broken > MOST_BROKEN * num_rows


def told_of_broken(first: Sequence[int], num_broken: int, num_rows: int, key: str) -> str:
    """Returns two sentences about more broken rows than are dropped; `first` are numbers of some."""
    numbers = ", ".join(map(str, first[:10])) + (", ..." if num_broken > len(first[:10]) else "")
    percent = 100 * num_broken / num_rows
    return (
        f"{key}: {num_broken:,} rows of {num_rows:,} are broken, {percent:.1f} %: row {numbers}. Up to "
        f"{100 * MOST_BROKEN:.0f} % are dropped ({key}.on_bad_row=drop), more are a mistake."
    )


def count_overlap(train: list, held_out: list) -> int:
    """Returns how many held-out pairs have prompt and chosen (or only) answer in common with a training pair."""

    if not len(held_out):
        return 0
    seen = set(digest_questions(train))
    return sum(digest in seen for digest in digest_questions(held_out))


def notes_of(report: Report, tokenizer, max_length: int, max_prompt_length: int | None) -> list[str]:
    notes = [*said_of_template(report), *said_of_text(report, tokenizer)]
    if max_prompt_length == max_length:
        notes.append(f"max_prompt_length = max_length = {max_length}: a prompt that long leaves no room to answer")
    if "strftime_now" in (tokenizer.chat_template or ""):
        day = (
            f"tokenizer.date={tokenizer.date}" if tokenizer.date else "its own; tokenizer.date=YYYY-MM-DD sets another"
        )
        notes.append(f"the day that the chat template writes: {day}")
    if report.format in UNLABELLED:
        notes.append(
            "no label: every answer is taken for a good one; dataset.columns={label: COLUMN} names one that says it"
        )
    if report.special and report.special_as == "text":
        notes.append("special tokens in text are no tokens, unless hf_tokenizer gets special_tokens_in_text=control")
    if tokenizer.chat_template and any(reason.startswith(REFUSED) for reason in report.dropped):
        notes.append("rows refused: tokenizer.chat_template=FILE.jinja, or =plain, gives a template that takes them")
    return notes


def said_of_template(report: Report) -> list[str]:
    """Returns a sentence about each thing that the chat template does with a conversation of its own accord."""
    said, examples = [], report.examples
    if report.served_apart:
        said.append(
            f"a served prompt goes on with {examples['served_apart']}: {len(report.served_apart):,} rows are trained "
            "behind another prompt than the template serves"
        )
    if report.opened:
        said.append(
            f"the template writes {examples['opened']!r} before {len(report.opened):,} rows' answers, which is trained "
            "with them, unless its generation prompt has it: tokenizer.template_arguments"
        )
    if report.in_words:
        said.append(
            f"{len(report.in_words):,} prompts end in {examples['in_words']!r}, as if somebody had written out whose "
            "turn it is, and the chat template does so again; tokenizer.chat_template=plain takes them as they are"
        )
    if report.left_out:
        said.append(f"the template does not write all that the prompt's {examples['left_out']} says")
    return said


def said_of_text(report: Report, tokenizer) -> list[str]:
    """Returns a sentence about what the texts became: unknown tokens, and turns that are written as a transcript."""
    said = []
    if report.num_unknown:
        total = sum(map(sum, report.lengths.values()))
        said.append(
            f"unknown tokens: {report.num_unknown:,} of {total:,}, {100 * report.num_unknown / total:.2g} %: the "
            "vocabulary has none for what is written there"
        )
    if report.turns and tokenizer.is_plain:
        form = plain_text([{"role": role, "content": "..."} for role in ("user", "assistant", "user")],
                          add_generation_prompt=True)[0]  # fmt: skip
        said.append(f"prompts of several turns, {len(report.turns):,} rows, are written as a transcript: {form!r}")
    elif report.format.startswith("HH"):
        said.append("transcripts are read as turns, which the tokenizer writes in its own form")
    return said
