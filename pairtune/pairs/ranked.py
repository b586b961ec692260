"""Rows of several answers to one question: which is better is a choice between two, votes, ranks or scores. Each worse
answer makes a pair with the best one; a tie makes none."""

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from pairtune.errors import UserError
from pairtune.pairs.cells import as_word, kind_of, read_literal, shown
from pairtune.pairs.example import Answer, BadRow, Example, Skip
from pairtune.pairs.messages import read_message
from pairtune.pairs.readers import answer_of, split, system, transcript_turns, user

WORSE = ("all", "best", "worst")
TIE_WORDS = (
    "tie",
    "tie (bothbad)",
    "tie (both bad)",
    "bothbad",
    "both_bad",
    "both",
    "neither",
    "none",
    "equal",
    "same",
)
TIE_WORDS += ("draw", "tied", "both bad", "both good", "both_good", "equally good", "equally bad", "about the same")
TIE_WORDS += ("no preference", "no_preference", "a=b", "a = b", "0.5", "")


@dataclass(frozen=True)
class Choice:
    """What the cells of a choice say: `names` holds, for each answer, the values that stand for it; `ties` others."""

    names: tuple[tuple[str, ...], ...]
    ties: tuple[str, ...] = TIE_WORDS

    def scores(self, cell) -> list[float] | None:
        """Returns 1 for the answer that is chosen and 0 for the others; None for a tie.

        Args:
            cell: A value; or a list of votes, null where there is none. What has most votes is taken, a tie among it;
                as many for one as for another are a tie.
        """
        values = cell if isinstance(cell, list) else [cell]
        votes = Counter(self._voted(value) for value in values if value is not None)
        (best, count), *others = votes.most_common() or [(None, 0)]
        if best is None or (others and others[0][1] == count):
            return None
        return [float(i == best) for i in range(len(self.names))]

    def _voted(self, value) -> int | None:
        word = as_word(value)
        for i, names in enumerate(self.names):
            if word in names:
                return i
        if word in self.ties:
            return None
        known = " or ".join(names[0] for names in self.names)
        raise BadRow(
            f"column 'choice' holds {shown(value)}, expected {known}, or a tie. Mend or remove the row.",
            "column 'choice' names none of the answers",
        )


@dataclass(frozen=True)
class Ranked:
    """A question and its answers, each with a score: higher is better."""

    prompt: list[dict]
    answers: list[Answer]
    scores: list[float]
    written: str | None = None  # the prompt, if it is a text

    def pairs(self, worse: str) -> list[Example]:
        """Returns the best answer with each that is worse; with the best or the worst of these only, if so wished.

        Raises:
            Skip: No answer is worse than another.
        """
        order = sorted(range(len(self.answers)), key=lambda i: -self.scores[i])
        best = order[0] if order else 0
        rest = [i for i in order[1:] if self.scores[i] < self.scores[best]]
        if not rest:
            raise Skip("a tie")
        kept = {"all": rest, "best": rest[:1], "worst": rest[-1:]}[worse]
        return [self._example(best, i) for i in kept]

    def _example(self, better: int, worse: int) -> Example:
        answers = self.answers[better], self.answers[worse]
        written = None if self.written is None else (self.written, *answers)
        return Example(self.prompt, *answers, written if all(isinstance(a, str) for a in answers) else None)


def from_choice(row: dict, choice: Choice) -> list[Ranked] | Ranked | Example:
    """Reads `answers` and a `choice` among them; answers may be whole conversations, without a prompt."""
    scores = choice.scores(row.get("choice"))
    if scores is None:
        raise Skip("a tie")
    return _read(row, scores)


def from_scores(row: dict) -> Ranked | Example:
    return _read(row, _numbers(row["scores"], "scores"))


def from_ranks(row: dict) -> Ranked | Example:
    return _read(row, [-number for number in _numbers(row["ranks"], "ranks")])


def from_order(row: dict) -> Ranked | Example:
    """`order` says where the answers are, the best one's place first: from 0, or from 1."""
    places, answers = _numbers(row["order"], "order"), row["answers"]
    first = 0 if 0 in places else 1
    if sorted(places) != [first + i for i in range(len(answers))]:
        raise BadRow(
            f"column 'order' holds {shown(row['order'])}, expected the places of {len(answers)} answers, each once. "
            "Mend or remove the row.",
            "column 'order' does not hold each answer's place",
        )
    return _read(row, [-places.index(first + i) for i in range(len(answers))])


def from_preference(row: dict, middle: float = 0.0) -> Ranked | Example:
    """Of two answers: a number above the middle prefers the second, one below it the first, as HelpSteer's about 0."""
    (number,) = _numbers([row["preference"]], "preference")
    return _read(row, [middle - number, number - middle])


def from_rejected_list(row: dict) -> Ranked:
    """One better answer and several worse ones, the best of them first."""
    prompt = row["prompt"]
    messages = _prompt(prompt)
    answers = [answer_of(cell, "rejected", messages, system(row)) for cell in row["rejected"]]
    chosen = answer_of(row["chosen"], "chosen", messages, system(row))
    scores = [float(-i) for i in range(len(answers) + 1)]
    return Ranked(messages, [chosen, *answers], scores, prompt if kind_of(prompt) == "text" else None)


def from_rejected_response(row: dict) -> Ranked:
    """A conversation that ends in the better answer, and one or several worse last ones."""
    *prompt, chosen = (read_message(raw) for raw in row["messages"])
    if chosen["role"] != "assistant":
        raise Skip("no answer at the end")
    cells = row["rejected_response"]
    cells = cells if kind_of(cells) in ("texts", "conversations") else [cells]
    answers = [answer_of(cell, "rejected_response", prompt, system(row)) for cell in cells]
    better = answer_of([chosen], "messages", prompt, system(row))
    return Ranked(prompt, [better, *answers], [float(-i) for i in range(len(answers) + 1)])


def from_tree(row: dict) -> list[Ranked]:
    """Open Assistant's: below each question its replies, ranked from 0, the best; each may be gone on from."""
    found: list[Ranked] = []

    def visit(message: dict, before: list[dict]) -> None:
        here = [*before, read_message({"role": message.get("role"), "content": message.get("text")})]
        replies = message.get("replies") or []
        if here[-1]["role"] == "user":
            ranked = [reply for reply in replies if reply.get("rank") is not None and not reply.get("deleted")]
            if len(ranked) > 1:
                texts, ranks = [reply["text"] for reply in ranked], [-float(reply["rank"]) for reply in ranked]
                found.append(Ranked(here, texts, ranks, here[0]["content"] if len(here) == 1 else None))
        for reply in replies:
            visit(reply, here)

    visit(row["prompt"], [])
    if not found:
        raise Skip("no ranked replies")
    return found


def trees_of(messages: Iterable[dict]) -> tuple[list[dict], list[int]]:
    """Returns Open Assistant's trees of its messages, which are a row each and name their parents; and the number of
    each tree's first message."""
    nodes = {row["message_id"]: {**row, "replies": []} for row in messages}
    trees, numbers = [], []
    for number, node in enumerate(nodes.values()):
        if node.get("parent_id") is None:
            trees.append({"message_tree_id": node.get("message_tree_id") or node["message_id"], "prompt": node})
            numbers.append(number)
        elif node["parent_id"] in nodes:
            nodes[node["parent_id"]]["replies"].append(node)
    return trees, numbers


def _read(row: dict, scores: list[float]) -> Ranked | Example:
    answers = row["answers"]
    if len(answers) != len(scores):
        raise BadRow(
            f"{len(answers)} answers, and {len(scores)} values that say how good they are. Mend or remove the row.",
            "not as many values as answers",
        )
    known = [(answer, score) for answer, score in zip(answers, scores, strict=True) if not math.isnan(score)]
    if not known:
        raise Skip("no score found")
    present = [(answer, score) for answer, score in known if answer is not None]
    best = max(score for _, score in known)
    if len(present) < len(known) and (len(present) < 2 or all(score < best for _, score in present)):
        raise BadRow("column 'answers' holds nothing (null). Mend or remove the row.", "an answer is null")
    answers, scores = [answer for answer, _ in present], [score for _, score in present]
    if "prompt" not in row:
        return _of_conversations(row, answers, scores)
    prompt, answers = _of_one_turn(row["prompt"], answers)
    messages = _prompt(prompt)
    answers = [answer_of(answer, "answers", messages, system(row)) for answer in answers]
    return Ranked(messages, answers, scores, prompt if kind_of(prompt) == "text" else None)


def _prompt(prompt) -> list[dict]:
    if kind_of(prompt) == "messages":
        return [read_message(raw) for raw in prompt]
    if kind_of(prompt) == "transcript":
        return transcript_turns(prompt)
    if isinstance(prompt, str):
        return user(prompt)
    raise BadRow(
        f"column 'prompt' holds {shown(prompt)}, expected text or list of messages. Mend or remove the row.",
        f"column 'prompt' holds {kind_of(prompt) if prompt is not None else 'nothing (null)'}",
    )


def _of_conversations(row: dict, answers: list, scores: list[float]) -> Example:
    """Two whole conversations of which one is better."""
    if len(answers) != 2 or not all(kind_of(answer) == "messages" for answer in answers):
        raise BadRow(
            "there is no column 'prompt', and the answers are no two lists of messages. Mend or remove the row.",
            "no column 'prompt', and answers that are no conversations",
        )
    if scores[0] == scores[1]:
        raise Skip("a tie")
    conversations = [[read_message(raw) for raw in answer] for answer in answers]
    better = int(scores[1] > scores[0])
    return split(conversations[better], conversations[1 - better], row)


def _of_one_turn(prompt, answers: list):
    """Arena's files hold a list of questions and lists of answers; of one turn they are question and answers."""
    turns = [read_literal(cell) if isinstance(cell, str) else cell for cell in (prompt, *answers)]
    if not all(isinstance(cell, list) and all(isinstance(t, str) or t is None for t in cell) for cell in turns):
        return prompt, answers
    if any(len(cell) != 1 for cell in turns):
        raise Skip("prompts differ")  # the second question follows another first answer
    if any(cell[0] is None for cell in turns):
        raise BadRow("an answer is null. Mend or remove the row.", "an answer is null")
    prompt, *answers = (cell[0] for cell in turns)
    return prompt, answers


def _numbers(cells, column: str) -> list[float]:
    """Returns numbers; NaN, or null, is an answer that nobody has judged."""
    if not isinstance(cells, list):
        raise BadRow(
            f"column {column!r} holds {shown(cells)}, expected a list of numbers. Mend or remove the row.",
            f"column {column!r} is no list of numbers",
        )
    try:
        return [math.nan if cell is None or cell == "N/A" else _number(cell) for cell in cells]
    except (TypeError, ValueError, OverflowError):
        raise BadRow(
            f"column {column!r} holds {shown(cells)}, expected numbers. Mend or remove the row.",
            f"column {column!r} holds other than numbers",
        ) from None


def _number(cell) -> float:
    return float(cell.strip().removesuffix("%") if isinstance(cell, str) else cell)


def check_worse(worse: str, key: str) -> None:
    if worse not in WORSE:
        raise UserError(f"{key}.rejected={worse!r}: must be {', '.join(WORSE[:-1])} or {WORSE[-1]}.")
