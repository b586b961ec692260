"""What can be read and may be meant otherwise is told with its rows, and changes nothing."""

import json

import pytest
from test_data import one, tokenize
from test_tokenizer import CHATML, save

from pairtune.errors import UserError
from pairtune.pairs.digests import digest_each
from pairtune.pairs.files import read_file
from pairtune.pairs.flow import Flow
from pairtune.pairs.gathering import note_of
from pairtune.pairs.tokenize import read_pairs
from pairtune.tokenizer.hf import hf_tokenizer

ROW = {"prompt": "Which of these is it?", "chosen": "It is this one.", "rejected": "It is that one."}
ANSWERS = {"prompt": "Which of these is it?", "answers": ["this", "that", "neither"]}
QUESTIONS = [
    (ROW | {"chosen": "Which of these is it? It is this one."}, "one answer repeats the question"),
    (ROW | {"rejected": " N/A "}, "an answer that is none, an error or so"),
    (ROW | {"prompt": "nan"}, "a prompt that is none, an error or so"),
    (ROW | {"prompt": "User: Hi\nBot: Hello\nUser: Which is it?"}, "speakers within one message"),
    (ROW | {"prompt": "user: Which is it?\n  assistant: What?"}, "speakers within one message"),
    (ROW | {"prompt": "Patient: It hurts.\nNurse: Where?\nPatient: Here."}, "speakers within one message"),
    (ROW | {"prompt": "### Human: Which is it?\n### Assistant: What?"}, "speakers within one message"),
    (ROW | {"rejected": "That one.\n\nHuman: Are you sure?"}, "a user's turn within an answer"),
    (ROW | {"chosen": "Assistant: This one."}, "an answer begins with Assistant:"),
    (ROW | {"chosen": "This one.<|end|>"}, "another model's special tokens"),
    (ROW | {"prompt": "Which is it?<|endoftext|>"}, "another model's special tokens"),
    (ROW | {"prompt": "<image>\nWhich is it?"}, "a placeholder such as <image> or {question}"),
    (ROW | {"prompt": "Answer: {question}"}, "a placeholder such as <image> or {question}"),
    (ROW | {"prompt": "Answer {{ input }}"}, "a placeholder such as <image> or {question}"),
    (ROW | {"chosen_rating": 2, "rejected_rating": "3.5"}, "chosen_rating below rejected_rating"),
    (ROW | {"Score_Chosen": 2.0, "Score_Rejected": 3}, "Score_Chosen below Score_Rejected"),
    (ROW | {"rank_chosen": 2, "rank_rejected": 1}, "rank_rejected below rank_chosen"),
    *(
        (ROW | {"chosen": text}, "an answer that is none, an error or so")
        for text in (
            "[deleted]",
            "#REF!",
            '{"error": {"message": "Rate limit"}}',
            "Error: 429 Too many",
            "-",
            "TODO",
            "\u200b.",
        )
    ),
    *(
        (ROW | {"rejected": text}, "an answer that is a list or object as text")
        for text in ('["It is that."]', "{'text': 'that'}", "b'that'", '[{"generated_text": "that"}]')
    ),
    (ROW | {"chosen": "<think>It may be this."}, "a thought without an end"),
    (
        ROW
        | {"prompt": "Say this: It is the one that stands in the middle of all."}
        | {"chosen": "It is the one that stands in the middle of all."},
        "a prompt that holds its answer",
    ),
    (ROW | {"system_prompt": "S", "sys_prompt": "T"}, "sys_prompt beside system_prompt: not read"),
    *(
        (ROW | {"chosen": text}, "text that looks damaged, as by &amp; or Ã©")
        for text in ("this &amp; that", "cafÃ© itâ€™s", "one\\n\\ntwo", "lost \ufffd", "a_x000D_b")
    ),
    (ROW | {"chosen": "**Human**: This one."}, "a user's turn within an answer"),
    (ANSWERS | {"scores": [float("nan"), 2, -1]}, "a score of -1, read as the lowest"),
    (ANSWERS | {"scores": [4, 2, -1]}, "a score of -1, read as the lowest"),
    (ANSWERS | {"ranks": [1, 2, 0]}, "a rank of 0, read as the best"),
]
PLAIN = [
    ROW | {"rejected": "None of these."},
    ROW | {"prompt": "Who wrote: 'the user'? Explain the model: what is it?"},
    ROW | {"prompt": "Q: Which is it?\nA: This.\nQ: And now?\nA:"},
    ROW | {"prompt": "Note: answer the question: which is it?"},
    ROW | {"chosen": "The question: which is it? Answer: this one.", "rejected": "Question: no."},
    ROW | {"chosen": "<s>struck out</s> in HTML"},
    ROW | {"prompt": "What does <|im_start|> mean?"},  # the tokenizer's own, which is counted by itself
    ROW | {"chosen_rating": 3, "rejected_rating": 2},
    ROW | {"chosen_length": 3, "rejected_length": 20, "chosen_model": "a", "rejected_model": "b"},
    ROW | {"chosen_score": None, "rejected_score": 3},
    ROW | {"chosen_score": 10**400, "rejected_score": 3, "Score": 1, "score": 2},
    ROW | {"ranks": [0, 1], "scores": [-1, 5]},  # which nobody reads
    ROW | {"chosen": "services:\n    user: 1000\nUser::find(1)\nHost x\n  User: git\nuser: root"},
    ROW
    | {
        "prompt": "Insert a comma where it belongs.",
        "chosen": "Insert the key.",
        "rejected": "Error: the file is missing.",
    },
    ROW | {"chosen": "\\begin{aligned} x \\neq 3", "rejected": "C:\\new\\folder"},
    ROW | {"prompt": "What does print(f'{name}') write?", "chosen": "👍"},
    ROW | {"chosen": "Error handling matters: an error may come at any time.", "rejected": "This & that; no error 5."},
    ROW | {"chosen": "[1] is a source.", "rejected": '"Quoted," he said, "is it."'},
    ROW | {"chosen": 'print("a\\n")\nand so on', "rejected": "<think>a</think> b"},
    ROW | {"prompt": "Question: Which is the capital?\nA: Paris\nB: Rome"},
    ROW | {"prompt": "Customer: Acme\nModel: X100\nAgent: 007", "chosen": "Use the <video> tag.\n<video>"},
    ANSWERS | {"scores": [1, 0, -1]},
    ANSWERS | {"scores": [7, 2, -3]},
    ANSWERS | {"ranks": [1, 2, 3]},
]


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("chatml") / "model", chat_template=CHATML))


@pytest.mark.parametrize(("row", "question"), QUESTIONS)
def test_what_may_be_meant_otherwise_is_told_with_its_rows(chatml, row, question):
    good = {name: [1, 2, 3] for name in ("scores", "ranks") if name in row} if "answers" in row else ROW
    good = {name: None for name in row if name not in (*ROW, "answers")} | good  # no grades
    _, report = tokenize([row, row | good, row], chatml)
    assert report.remarks == {question: [0, 2]}
    (line,) = [line for line in str(report).splitlines() if line.startswith(question)]
    assert line.endswith("       2   66.7 %   row 0, 2")


@pytest.mark.parametrize("row", PLAIN)
def test_what_only_looks_like_it_is_not_told(chatml, row):
    assert tokenize([row], chatml)[1].remarks == {}


@pytest.mark.parametrize("word", ["nan", "None", " N/A", "<NA>", "<noinput>", "\\N", "(none)", "-", "n.a."])
@pytest.mark.parametrize("name", ["input", "system", "context"])
def test_a_word_for_nothing_beside_a_question_is_left_out(chatml, word, name):
    pair, report = one(ROW | {name: word}, chatml)
    assert pair == one(ROW, chatml)[0]
    assert report.remarks == {f"{name} is none, nan or so: left out": [0]}
    kept, report = one(ROW | {name: "Na"}, chatml)  # sodium
    assert kept != pair and report.remarks == {}


def test_a_word_for_nothing_hides_no_other_name_of_a_column(chatml):
    pair, report = one(
        ROW | {"system": "nan", "system_prompt": "S", "tools": "None", "chat_template_kwargs": "null"}, chatml
    )
    assert pair == one(ROW | {"system": "S"}, chatml)[0]
    left_out = ("system", "tools", "chat_template_kwargs")
    assert report.remarks == {f"{name} is none, nan or so: left out": [0] for name in left_out}
    assert list(one(ROW | {"sys_prompt": "nan"}, chatml)[1].remarks) == ["sys_prompt is none, nan or so: left out"]


def test_several_system_messages_are_told(chatml):
    prompt = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert one(ROW | {"prompt": prompt, "system": "T"}, chatml)[1].remarks == {"several system messages": [0]}
    assert one(ROW | {"prompt": prompt, "system": "S"}, chatml)[1].remarks == {}


def test_messages_that_were_text_are_told(chatml):
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    row = {"chosen": json.dumps(messages), "rejected": json.dumps([messages[0], {**messages[1], "content": "B"}])}
    row["log"] = row["chosen"]  # which nobody reads
    assert "messages that are written as text are read as messages: chosen, rejected\n" in f"{one(row, chatml)[1]}\n"


def test_remarks_are_the_same_from_many_processes_from_a_cache_and_of_a_stream(chatml, tmp_path):
    rows = [
        ROW
        | {
            "prompt": f"{ROW['prompt']} {i} " + "x" * 500,
            "rejected": "nan" if i % 7 == 0 else "No.",
            "by row": "a text",
        }
        for i in range(1200)
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    block = {"source": str(tmp_path / "a.jsonl"), "split": "train", "name": None, "revision": None, "limit": None}
    block |= {"columns": None, "on_bad_row": "drop", "rejected": "all", "overlong": "drop"}
    found = [
        read_pairs(block, chatml, max_length=2048, progress=False, cache_dir=str(tmp_path / "kept")) for _ in range(2)
    ]
    want = {"an answer that is none, an error or so": list(range(0, 1200, 7))}
    assert [report.remarks for _, report in found] == [want, want]
    assert digest_each(found[0][0]) == digest_each(found[1][0])
    flow = Flow()
    for i in range(8):
        _, report = tokenize([rows[i]], chatml)
        flow.add(note_of(report) | {"columns": []}, 1, 0)
    assert "an answer that is none, an error or so        2   25.0 %" in flow.table("a stream")


def test_transcripts_with_other_marks_and_files_of_other_kinds_are_named_for_what_they_are(chatml, tmp_path):
    row = {"chosen": "### Human: a\n### Assistant: b", "rejected": "### Human: a\n### Assistant: c"}
    with pytest.raises(UserError, match="look like transcripts, with '### Human:' and '### Assistant:'"):
        tokenize([row], chatml)
    (tmp_path / "a.jsonl").write_bytes(b"\x1f\x8b\x08\x00")
    with pytest.raises(UserError, match=r"is compressed, as .gz files are. Name it a.jsonl.gz, or unpack it"):
        read_file(tmp_path / "a.jsonl", "dataset")
    (tmp_path / "a.json").write_text('[["Q", "B", "W"]]')
    with pytest.raises(UserError, match=r"row 0 \(from 0\): holds list.* each row is an object that names its columns"):
        read_file(tmp_path / "a.json", "dataset")
    with pytest.raises(UserError, match=r"dataset.columns=\{chosen: good.0\} takes the first of the list"):
        tokenize([{"prompt": "Q", "good": ["x"], "rejected": "y"}], chatml, columns={"chosen": "good"})
    with pytest.raises(UserError, match=r"dataset.columns=\{history: turns\} writes it before the prompt"):
        tokenize([ROW | {"turns": [{"role": "user", "content": "x"}]}], chatml)
