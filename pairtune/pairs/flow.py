"""What became of a stream's rows so far, in counts: what report.py tells of rows that are all there."""

import copy
from dataclasses import asdict, dataclass, field

from pairtune.errors import UserError
from pairtune.pairs.report import ABOVE, BELOW, is_too_many, told_of_broken

SHOWN = 3  # rows
FACTS = {**ABOVE, **BELOW, "special": "with special tokens", "rendered": ""}


@dataclass
class Flow:
    """Of one source. `told` and `of` are its way into a checkpoint and back.

    Attributes:
        read: Rows.
        pairs: That were made of them.
        times: How often the source was gone through before the last row.
        broken: Rows; `sentences` has one of each kind.
        dropped_for: By reason, how many rows, and the first ones.
        facts: How many rows of Report's lists and remarks, and the first ones.
        columns: That the first rows of the source did not have, and that nobody reads.
    """

    read: int = 0
    pairs: int = 0
    times: int = 0
    broken: int = 0
    dropped_for: dict[str, list] = field(default_factory=dict)
    sentences: dict[str, str] = field(default_factory=dict)
    facts: dict[str, list] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, told: dict) -> "Flow":
        """Returns what `told` has returned."""
        return cls(**copy.deepcopy(told))

    def told(self) -> dict:
        """Returns all of it, as JSON can hold it."""
        return asdict(self)

    @property
    def _broken_rows(self) -> list[int]:
        return sorted(row for reason in self.sentences for row in self.dropped_for[reason][1])

    @property
    def dropped(self) -> int:
        """Rows that a reason was found for."""
        return sum(count for count, _ in self.dropped_for.values())

    def add(self, note: dict, num_pairs: int, times: int) -> None:
        """Takes in a row: what is to be told of it, its pairs, and how often its source was gone through before."""
        self.read, self.pairs, self.times = self.read + 1, self.pairs + num_pairs, max(self.times, times)
        self.broken += len(note.get("broken", ()))
        for reason, rows in note.get("dropped", {}).items():
            _enter(self.dropped_for, reason, rows[0])
            for sentence in note.get("broken", {}).values():
                self.sentences.setdefault(reason, sentence)
        for name in FACTS.keys() & note.keys():
            _enter(self.facts, name, note[name][0])
        for question, rows in note.get("remarks", {}).items():
            _enter(self.facts, question, rows[0])
        self.columns += [name for name in note["columns"] if name not in self.columns]

    def check(self, source, *, at_least: int) -> None:
        """Refuses a stream of which too many rows so far are broken, or rendered already.

        Args:
            source: A streaming.StreamedSource.
            at_least: Rows that they are a share of, before so many were read.

        Raises:
            UserError: With the first of each kind, and the table.
        """
        num_rows = max(self.read, at_least)
        if is_too_many(self.broken, num_rows):
            sentences = "\n".join(self.sentences.values())
            told = told_of_broken(self._broken_rows, self.broken, self.read, source.key)
            raise UserError(f"{sentences}\n{told}\n{self.table(source.name)}")
        count, rows = self.facts.get("rendered", (0, []))
        source.rendered.check_count(source.name, count, rows, num_rows)

    def table(self, name: str) -> str:
        """Returns what has become of the rows so far."""
        times = f"   gone through {self.times:,} times" if self.times else ""
        lines = [f"Streamed: {name}", self._line("rows read", self.read) + times, self._line("pairs", self.pairs)]
        lines += [self._line(told, *found) for fact, found in self.facts.items() if (told := FACTS.get(fact, fact))]
        dropped = sorted(self.dropped_for.items(), key=lambda item: -item[1][0])
        lines += [self._line(f"dropped: {reason}", *found) for reason, found in dropped]
        if self.columns:
            lines.append(f"columns that the first rows did not have, not used: {', '.join(self.columns)}")
        return "\n".join(lines)

    @property
    def _width(self) -> int:
        return max([32, *(len(FACTS.get(fact, fact)) for fact in self.facts)])

    def _line(self, title: str, count: int, rows: list[int] = ()) -> str:
        examples = ", ".join(map(str, rows)) + (", ..." if count > len(rows) else "")
        told = f"{title:{self._width}} {count:8,} {100 * count / max(1, self.read):6.1f} %"
        return told + (f"   row {examples}" if rows else "")


def _enter(found: dict[str, list], name: str, row: int) -> None:
    entry = found.setdefault(name, [0, []])
    entry[0] += 1
    if len(entry[1]) < SHOWN and row not in entry[1]:
        entry[1].append(row)
