"""Columns of data sets that are published under names of their own, as `dataset.columns` would describe them.

A description maps our columns to theirs: a name, a dotted one (`input.messages`, `answers.0.text`), one with a star
for each entry of a list or an object (`completions.*.response`), a list of names, and for `choice` a column with the
values that stand for each answer, in their order.
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """A published data set's columns. It is recognised by having all of `needs`."""

    name: str
    needs: tuple[str, ...]
    columns: dict


def _two(first: str, second: str) -> list[str]:
    return [first, second]


LAYOUTS = (
    Layout(
        "OpenAI's preferences",
        ("input", "preferred_output", "non_preferred_output"),
        {"prompt": "input.messages", "tools": "input.tools", "chosen": "preferred_output",
         "rejected": "non_preferred_output"},
    ),
    Layout(
        "UltraFeedback, rated completions",
        ("instruction", "completions"),
        {"prompt": "instruction", "answers": "completions.*.response", "scores": "completions.*.overall_score"},
    ),
    Layout(
        "NeMo's ranked completions",
        ("context", "completions"),
        {"prompt": "context", "answers": "completions.*.completion", "ranks": "completions.*.rank"},
    ),
    Layout(
        "HelpSteer's preferences",
        ("context", "response1", "response2", "overall_preference"),
        {"prompt": "context", "answers": _two("response1", "response2"), "preference": "overall_preference"},
    ),
    Layout(
        "HelpSteer 2's preferences",
        ("prompt", "response_1", "response_2", "preference_strength"),
        {"prompt": "prompt", "answers": _two("response_1", "response_2"), "preference": "preference_strength"},
    ),
    Layout("Nectar's ranked answers", ("prompt", "answers"),
           {"prompt": "prompt", "answers": "answers.*.answer", "ranks": "answers.*.rank"}),
    Layout("distilabel's rated generations", ("instruction", "generations", "ratings"),
           {"prompt": "instruction", "answers": "generations", "scores": "ratings"}),
    Layout("messages with chosen and rejected", ("messages", "chosen", "rejected"), {"prompt": "messages"}),
    Layout("messages and rejected", ("messages", "rejected"), {"rejected_response": "rejected"}),
    Layout("conversations and rejected", ("conversations", "rejected"),
           {"messages": "conversations", "rejected_response": "rejected"}),
    Layout("Stack Exchange's rated answers", ("question", "answers"),
           {"prompt": "question", "answers": "answers.*.text", "scores": "answers.*.pm_score"}),
    Layout(
        "SHP",
        ("history", "human_ref_A", "human_ref_B", "labels"),
        {"prompt": "history", "answers": _two("human_ref_A", "human_ref_B"), "choice": {"labels": [1, 0]}},
    ),
    Layout(
        "PandaLM",
        ("instruction", "input", "response1", "response2", "annotator1"),
        {"prompt": "instruction", "input": "input", "answers": _two("response1", "response2"),
         "choice": {"annotator*": [1, 2]}},
    ),
    Layout(
        "Arena's battles",
        ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b"),
        {"prompt": "prompt", "answers": _two("response_a", "response_b"),
         "scores": _two("winner_model_a", "winner_model_b")},
    ),
    Layout("Arena's conversations", ("conversation_a", "conversation_b", "winner"),
           {"answers": _two("conversation_a", "conversation_b"), "choice": {"winner": ["model_a", "model_b"]}}),
    Layout(
        "WebGPT",
        ("question", "answer_0", "answer_1", "score_0", "score_1"),
        {"prompt": "question.full_text", "answers": _two("answer_0", "answer_1"), "scores": _two("score_0", "score_1")},
    ),
)  # fmt: skip
# Two answers under other names, of which it is plain which is better; and a question beside them
_BETTER_AND_WORSE = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"), ("chosen_answer", "rejected_answer"),
    ("response_chosen", "response_rejected"), ("chosen_messages", "rejected_messages"), ("preferred", "dispreferred"),
    ("preferred_response", "dispreferred_response"), ("preferred_output", "non_preferred_output"),
    ("messages", "rejected_messages"), ("accepted", "rejected"), ("chosen_conversations", "rejected_conversations"),
    ("real", "generated"),
)  # fmt: skip
_ASKED = ("prompt", "instruction", "question", "query", "input")
LAYOUTS += tuple(
    Layout(
        f"{question} with {better} and {worse}" if question else f"{better} and {worse}",
        (*((question,) if question else ()), better, worse),
        {"chosen": better, "rejected": worse} | ({"prompt": question} if question in _ASKED[2:] else {}),
    )
    for better, worse in _BETTER_AND_WORSE
    for question in (*_ASKED, "")
)


def known_layouts(column_names: Iterable[str]) -> list[Layout]:
    """Returns the published layouts that have no other columns than these."""
    names = set(column_names)
    return [layout for layout in LAYOUTS if names.issuperset(layout.needs)]
