"""What a careful person looks for in preference data before anything is trained on it: `tune data FILE`.

Of texts, as the rows have them; what becomes of them as tokens is report.py's.
"""

import random
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from pairtune.errors import UserError
from pairtune.pairs import remarks
from pairtune.pairs.context import turning_columns
from pairtune.pairs.example import BadRow, Example, Skip, turns_of
from pairtune.pairs.formats import doubtful
from pairtune.pairs.messages import text_of, thoughts_of
from pairtune.pairs.near import near_duplicates
from pairtune.pairs.recognise import recognise
from pairtune.pairs.report import not_used
from pairtune.pairs.rows import Rows

MOST_NEAR = 20_000  # rows in which near-duplicates are looked for
SHOWN = 10  # rows of either kind
SEEN = 1_000  # rows: what columns hold that nobody reads
_REFUSAL = re.compile(
    r"\b(i (can't|cannot|can not|won't|will not|am not able to|'m not able to|am unable to|'m unable to)"
    r"|as an ai\b|as a language model|i do not feel comfortable|i don't feel comfortable|it would not be appropriate)",
    re.IGNORECASE,
)
_APOLOGY = re.compile(
    r"\b(i('m| am) (very |so |really )?sorry|i apologi[sz]e|my apologies|sorry, but)\b", re.IGNORECASE
)
_SPECIAL = re.compile(r"<\|[\w .-]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<[be]os>|<pad>|<unk>")
SCRIPTS = {  # by the first word of a letter's name in Unicode
    **{"LATIN": "Latin", "CYRILLIC": "Cyrillic", "GREEK": "Greek", "CJK": "Han", "HIRAGANA": "Japanese"},
    **{"KATAKANA": "Japanese", "HANGUL": "Korean", "ARABIC": "Arabic", "HEBREW": "Hebrew", "DEVANAGARI": "Devanagari"},
    **{"THAI": "Thai", "BENGALI": "Bengali", "TAMIL": "Tamil", "TELUGU": "Telugu"},
}
WORDS = {  # such as no text of some length is without
    "English": "the and of to is that you for with what how",
    "German": "der die und das ist nicht ein zu den mit wie",
    "French": "le la les et des est une pour que dans comment",
    "Spanish": "el los las una por para que del como con es",
    "Portuguese": "os uma para não com que do da como em é",
    "Italian": "il che di una per non sono della con come è",
    "Dutch": "het een van en niet is dat op voor met hoe",
}
_WORDS = {language: frozenset(words.split()) for language, words in WORDS.items()}


class Text(NamedTuple):
    """A pair in words; of an unpaired row, None for the answer that there is not."""

    row: int
    prompt: str  # without system messages, which many rows share
    chosen: str | None
    rejected: str | None

    @property
    def answers(self) -> list[str]:
        return [answer for answer in (self.chosen, self.rejected) if answer is not None]


@dataclass(frozen=True)
class Finding:
    """Rows of which something is so; `is_fault`: what nobody would want to train on unread."""

    title: str
    rows: list[int]
    is_fault: bool = True


class Read(NamedTuple):
    """What rows hold: their form, texts, what cannot be read by its reason, what is to be asked about the others, and a
    sentence about columns that nobody reads, if there are any."""

    form: str
    texts: list[Text]
    unread: dict[str, list[int]]
    questions: list[Finding]
    unused: list[str]


@dataclass(frozen=True)
class Looked:
    """What was found in a source."""

    source: str
    form: str
    num_rows: int
    texts: list[Text]
    findings: list[Finding]
    facts: list[str]
    odd: list[tuple[str, Text]]  # why, and which

    @property
    def has_faults(self) -> bool:
        return any(finding.rows and finding.is_fault for finding in self.findings)

    def __str__(self) -> str:
        width = max([42, *(len(finding.title) for finding in self.findings if finding.rows)])
        lines = [f"{'rows read':{width}} {self.num_rows:8,}", f"{'pairs':{width}} {len(self.texts):8,}"]
        for finding in self.findings:
            rows = list(dict.fromkeys(finding.rows))  # of several pairs a row is one
            if rows:
                some = ", ".join(map(str, rows[:3])) + (", ..." if len(rows) > 3 else "")
                share = 100 * len(rows) / self.num_rows
                lines.append(f"{finding.title:{width}} {len(rows):8,} {share:6.1f} %   row {some}")
        clean = [finding.title for finding in self.findings if not finding.rows and finding.is_fault]
        lines += [f"none: {', '.join(clean)}"] if clean else []
        lines += [*self.facts, f"format: {self.form}"]
        chance = random.Random(0).sample(self.texts, min(SHOWN, len(self.texts)))
        lines += ["", f"{len(chance)} rows by chance", *(line for text in chance for line in _shown("", text))]
        lines += ["", f"{len(self.odd)} odd rows", *(line for why, text in self.odd for line in _shown(why, text))]
        return "\n".join(lines)


def look(rows: Rows, key: str, *, held_out: Rows | None = None, single: bool = False) -> Looked:
    """Returns what there is to know of rows' texts.

    Args:
        held_out: Rows that evaluations use: what training has of them is found.
        single: One answer a row will do: as of recognise.

    Raises:
        UserError: The rows' form is unknown.
    """
    read = _read(rows, key, single=single)
    texts, findings = read.texts, [Finding(f"cannot be read: {why}", numbers) for why, numbers in read.unread.items()]
    findings += [
        Finding("an answer is empty", _where(texts, lambda t: not all(a.strip() for a in t.answers))),
        Finding("both answers are the same", _where(texts, _is_same)),
        *_repeated(texts),
        Finding("special tokens in text", _where(texts, lambda t: any(map(_SPECIAL.search, (t.prompt, *t.answers))))),
    ]
    scripts = [_languages(text) for text in texts]
    apart = [text.row for text, (asked, *given) in zip(texts, scripts, strict=True) if _differs(asked, given)]
    findings.append(Finding("an answer in another script than its prompt", apart, is_fault=False))
    findings += read.questions
    if held_out is not None:
        findings += _shared(texts, _read(held_out, "held-out", single=single).texts)
    facts = [*_of_lengths(texts), *_of_phrases(texts), *_of_languages([asked for asked, *_ in scripts])]
    if len(texts) > MOST_NEAR:
        facts.append(f"near-duplicates are those among the first {MOST_NEAR:,}")
    facts += read.unused
    if len(texts) >= SHOWN and len({text.prompt for text in texts}) == 1:
        facts.append("all prompts are the same")
    return Looked(rows.source, read.form, len(rows), texts, findings, facts, _odd(texts))


def _read(rows: Rows, key: str, *, single: bool) -> Read:
    form, rows = recognise(rows, key, single=single)
    unused = form.unused(rows.column_names)
    texts, unread, asked, unsaid, grades = [], {}, {}, doubtful(unused), remarks.grades_of(unused)
    for index, (number, row) in enumerate(zip(rows.numbers, rows, strict=True)):
        try:
            examples = form.read(row, doubtful=unsaid, columns=rows.columns, key=key)
            texts += [_text(number, example) for example in examples]
            questions = [*remarks.of_row(row, form, grades)]
            for question in [*questions, *chain.from_iterable(map(remarks.of_example, examples))]:
                asked.setdefault(question, []).append(number)
        except BadRow as bad:
            unread.setdefault(bad.reason, []).append(number)
        except Skip as skip:
            unread.setdefault(str(skip), []).append(number)
        except UserError as error:
            raise UserError(f"{rows.place(index)}: {error}") from error
    against = {f"{better} below {worse}" for better, worse in grades}
    findings = [Finding(question, numbers, is_fault=question in against) for question, numbers in asked.items()]
    turning = turning_columns(unused, rows.first(SEEN)) if form.is_paired else []
    unused = [name for name in unused if name not in turning]
    said = [not_used(unused, remarks.held_by(unused, rows.first(SEEN)))] if unused else []
    return Read(form.name, texts, unread, findings, said)


def _text(number: int, example: Example) -> Text:
    asked = "\n".join(text_of(message) for message in example.prompt if message["role"] != "system")
    answers = (example.chosen, example.rejected)
    return Text(number, asked, *(None if answer is None else _answer(turns_of(answer)) for answer in answers))


def _answer(turns: list[dict]) -> str:
    said = [part for turn in turns for part in (thoughts_of(turn), text_of(turn), str(turn.get("tool_calls") or ""))]
    return "\n".join(part for part in said if part)


def _where(texts: Iterable[Text], holds: Callable[[Text], bool]) -> list[int]:
    return [text.row for text in texts if holds(text)]


def _plain(text: str | None) -> str | None:
    """What is left of a text where case, white space and forms of one character do not count."""
    return text if text is None else " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _is_same(text: Text) -> bool:
    return len(text.answers) == 2 and _plain(text.chosen) == _plain(text.rejected)


def _repeated(texts: list[Text]) -> list[Finding]:
    seen: dict[tuple, int] = {}
    twice, against, first = [], [], []
    plain = [tuple(map(_plain, text[1:])) for text in texts]
    for text, (prompt, chosen, rejected) in zip(texts, plain, strict=True):
        if (prompt, chosen, rejected) in seen:
            twice.append(text.row)
            continue
        first.append((text, " ".join(part for part in (prompt, chosen, rejected) if part)))
        if (prompt, rejected, chosen) in seen and chosen != rejected:
            against.append(text.row)
        seen[prompt, chosen, rejected] = text.row
    first = first[:MOST_NEAR]
    near = [first[i][0].row for i, _ in near_duplicates([words for _, words in first])]
    return [
        Finding("duplicates of an earlier pair", twice),
        Finding("contradict an earlier pair", against),
        Finding("near-duplicates of an earlier pair", [row for row in near if row not in against], is_fault=False),
    ]


def _shared(texts: list[Text], held_out: list[Text]) -> list[Finding]:
    """Held-out prompts that training has, too; rows are those of the held-out source."""
    known = {_plain(text.prompt) for text in texts}
    same = _where(held_out, lambda text: _plain(text.prompt) in known)
    rest = [text for text in held_out if _plain(text.prompt) not in known][:MOST_NEAR]
    trained = [_plain(text.prompt) for text in texts[:MOST_NEAR]]
    near = near_duplicates([_plain(text.prompt) for text in rest], trained)
    return [
        Finding("held-out prompts that training has", same),
        Finding("held-out prompts that training nearly has", [rest[i].row for i, _ in near], is_fault=False),
    ]


def _of_lengths(texts: list[Text]) -> list[str]:
    apart = [text for text in texts if len(text.answers) == 2 and len(text.chosen) != len(text.rejected)]
    if not apart:
        return []
    longer = sum(len(text.chosen) > len(text.rejected) for text in apart) / len(apart)
    chosen, rejected = (sorted(len(getattr(text, side)) for text in apart) for side in ("chosen", "rejected"))
    return [
        f'"choose the longer" is right in {longer:.1%} of {len(apart):,} pairs; the median answer has '
        f"{chosen[len(apart) // 2]:,} characters where it is chosen, {rejected[len(apart) // 2]:,} where it is rejected"
    ]


def _of_phrases(texts: list[Text]) -> list[str]:
    said = []
    for what, pattern in (("refusals", _REFUSAL), ("apologies", _APOLOGY)):
        counts = [
            sum(bool(pattern.search(answer[:300])) for text in texts if (answer := getattr(text, side)) is not None)
            for side in ("chosen", "rejected")
        ]
        said.append(f"{what} (in English): {counts[0]:,} chosen, {counts[1]:,} rejected answers")
    return said


def _of_languages(prompts: list[str]) -> list[str]:
    counts = Counter(prompts).most_common()
    told = ", ".join(f"{name} {100 * count / len(prompts):.1f} %" for name, count in counts[:8])
    return [f"prompts are in {told}{', ...' if len(counts) > 8 else ''}"] if counts else []


def _languages(text: Text) -> list[str]:
    """Returns script, and of Latin letters language, of a prompt and of its answers; "unknown" of few letters."""
    return [_language(part) for part in (text.prompt, *text.answers)]


def _language(text: str) -> str:
    letters = Counter(_script(letter) for letter in text[:400] if letter.isalpha())
    script, count = letters.most_common(1)[0] if letters else ("unknown", 0)
    if count < 3:
        return "unknown"
    if script == "Han" and letters["Japanese"]:
        return "Japanese"
    if script != "Latin":
        return script
    words = Counter(language for word in re.findall(r"\w+", text[:400].lower()) for language in _of_word(word))
    (language, hits), *_ = words.most_common(1) or [("", 0)]
    return language if hits >= 2 else "Latin letters"


def _of_word(word: str) -> list[str]:
    return [language for language, words in _WORDS.items() if word in words]


def _script(letter: str) -> str:
    if letter.isascii():
        return "Latin"
    return SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], "another script")


def _differs(asked: str, given: list[str]) -> bool:
    def script(language: str) -> str:
        return "Latin" if language in WORDS or language == "Latin letters" else language

    return any("unknown" not in (asked, one) and script(one) != script(asked) for one in given)


def _odd(texts: list[Text]) -> list[tuple[str, Text]]:
    """Rows that a careful reader should see: the furthest ones, two of a kind."""
    kinds: dict[str, Callable[[Text], float]] = {
        "the answers' lengths are furthest apart": _ratio,
        "the shortest answer": lambda t: -min(map(len, t.answers)),
        "the longest prompt": lambda t: len(t.prompt),
        "an answer that repeats itself": lambda t: -min(map(_packs_to, t.answers)),
        "an answer with few letters": lambda t: -min(map(_letters, t.answers)),
    }
    found, seen = [], set()
    for why, how_odd in kinds.items():
        for text in sorted(texts, key=how_odd, reverse=True)[:SHOWN]:
            if text.row not in seen and sum(reason == why for reason, _ in found) < SHOWN // len(kinds):
                found.append((why, text))
                seen.add(text.row)
    return found


def _ratio(text: Text) -> float:
    lengths = [len(answer) + 1 for answer in text.answers]
    return max(lengths) / min(lengths)


def _packs_to(answer: str) -> float:
    content = answer.encode("utf-8", "replace")[:10_000]
    return len(zlib.compress(content)) / len(content) if len(content) > 200 else 1.0


def _letters(answer: str) -> float:
    return sum(map(str.isalpha, answer[:1000])) / len(answer[:1000]) if len(answer) > 20 else 1.0


def _shown(why: str, text: Text) -> list[str]:
    parts: Sequence[tuple[str, str | None]] = list(zip(("prompt", "chosen", "rejected"), text[1:], strict=True))
    head = f"  row {text.row}" + (f": {why}" if why else "")
    return [head, *(f"    {name:8} {_short(part)}" for name, part in parts if part is not None)]


def _short(text: str) -> str:
    shown = " ".join(text.split())
    return shown if len(shown) <= 100 else f"{shown[:70]} ... {shown[-25:]}"
