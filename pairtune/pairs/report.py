"""What became of a source's rows, as a table and in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from pairtune.tokenizer.template import plain_text

REFUSED = "refused by the chat template"


@dataclass
class Report:
    """What became of the rows; str() is a table. Rows are given by their number in the source."""

    source: str
    format: str
    style: str  # how the tokenizer writes conversations
    num_rows: int
    num_kept: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason to rows
    trimmed: list[int] = field(default_factory=list)  # rows whose prompt was cut
    unordered: list[int] = field(default_factory=list)  # rows whose prompt does not go system, user, assistant, user
    ends_taken_off: list[int] = field(default_factory=list)  # rows with an answer that was written with an end token
    special: list[int] = field(default_factory=list)  # rows with a special token written in their text
    special_as: str = "text"  # what it became
    merges: list[int] = field(default_factory=list)  # rows where a token spans the prompt's end
    unknown: list[int] = field(default_factory=list)  # rows with a token that stands for what the vocabulary lacks
    num_unknown: int = 0  # such tokens
    turns: list[int] = field(default_factory=list)  # rows whose prompt is more than a question
    # Tokens of every row that was tokenized, before limits: what max_length would have to be
    lengths: dict[str, list[int]] = field(default_factory=lambda: {"prompt": [], "chosen": [], "rejected": []})
    notes: list[str] = field(default_factory=list)
    num_desirable: int | None = None  # of unpaired rows
    num_held_out: int | None = None
    num_overlap: int | None = None  # held-out pairs whose prompt and chosen answer are in the training part, too

    def with_split(self, train: list, held_out: list) -> "Report":
        """Returns the report with two lines more: the held-out pairs, and how many of them training sees."""
        return replace(self, num_held_out=len(held_out), num_overlap=count_overlap(train, held_out))

    def __str__(self) -> str:
        lines = [self._line("rows read", self.num_rows), self._line("kept", self.num_kept)]
        if self.num_desirable is not None:
            lines.append(self._line("of these, desirable", self.num_desirable))
            lines.append(self._line("of these, undesirable", self.num_kept - self.num_desirable))
        if self.trimmed:
            lines.append(self._line("of these, prompt trimmed", len(self.trimmed), self.trimmed))
        if self.unordered:
            lines.append(self._line("of these, roles out of order", len(self.unordered), self.unordered))
        if self.ends_taken_off:
            lines.append(self._line("end token's text taken off", len(self.ends_taken_off), self.ends_taken_off))
        if self.special:
            lines.append(self._line(f"special tokens, as {self.special_as}", len(self.special), self.special))
        if self.unknown:
            lines.append(self._line("with unknown tokens", len(self.unknown), self.unknown))
        for reason, rows in sorted(self.dropped.items(), key=lambda item: -len(item[1])):
            lines.append(self._line(f"dropped: {reason}", len(rows), rows))
        if self.merges:
            lines.append(self._line("boundary merges", len(self.merges), self.merges))
        if self.num_held_out is not None:
            lines.append(self._line("held out", self.num_held_out))
            lines.append(self._line("of these, also in training", self.num_overlap))
        if self.lengths["prompt"]:
            lines.append(f"{'tokens, before limits':32} {'median':>8} {'95 %':>8} {'max':>8}")
            lines += [self._lengths_line(name, lengths) for name, lengths in self._all_lengths().items()]
        lines += [f"format: {self.format}", self.style, *self.notes]
        return "\n".join(lines)

    def _line(self, title: str, count: int, rows: Sequence[int] = ()) -> str:
        examples = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
        return f"{title:32} {count:8,} {100 * count / self.num_rows:6.1f} %" + (f"   row {examples}" if rows else "")

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
        return f"  {name:30} {median:8,} {most:8,} {longest:8,}"


def count_overlap(train: list, held_out: list) -> int:
    """Returns how many held-out pairs have prompt and chosen (or only) answer in common with a training pair."""
    seen = {(tuple(pair.prompt), tuple(pair.chosen or pair.rejected)) for pair in train}
    return sum((tuple(pair.prompt), tuple(pair.chosen or pair.rejected)) in seen for pair in held_out)


def notes_of(report: Report, tokenizer, max_length: int, max_prompt_length: int | None) -> list[str]:
    notes = said_of_text(report, tokenizer)
    if max_prompt_length == max_length:
        notes.append(f"max_prompt_length = max_length = {max_length}: a prompt that long leaves no room to answer")
    if "strftime_now" in (tokenizer.chat_template or ""):
        day = (
            f"tokenizer.date={tokenizer.date}" if tokenizer.date else "its own; tokenizer.date=YYYY-MM-DD sets another"
        )
        notes.append(f"the day that the chat template writes: {day}")
    if report.special and report.special_as == "text":
        notes.append("special tokens in text are no tokens, unless hf_tokenizer gets special_tokens_in_text=control")
    if tokenizer.chat_template and any(reason.startswith(REFUSED) for reason in report.dropped):
        notes.append("rows refused: tokenizer.chat_template=FILE.jinja, or =plain, gives a template that takes them")
    return notes


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
