"""Nothing of a row is left out in silence: columns beside the question, messages that are written as text, prompts that
are rendered already, rows that are broken, and a folder's files of different columns."""

import csv
import json
import re
from dataclasses import replace

import datasets
import pytest
from test_data import ROWS, one, read_rows, text, tokenize
from test_tokenizer import CHATML, LLAMA_3, chat, save

from pairtune.errors import UserError
from pairtune.pairs.digests import digest_each, digest_in_order
from pairtune.pairs.lint import look
from pairtune.pairs.packed import PackedPairs
from pairtune.pairs.rows import Rows
from pairtune.tokenizer.hf import hf_tokenizer

ROW = {"prompt": "Q", "chosen": "B", "rejected": "W"}
NEUTRAL = ("passed_check", "x", "class", "outcome")  # columns that may say that an answer is good


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("chatml") / "model", chat_template=CHATML))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("plain") / "model"))


# Columns


@pytest.mark.parametrize(
    ("beside", "prompt"),
    [
        ({"input": "i"}, chat("Q\ni")),
        ({"context": "c"}, chat("c\n\nQ")),
        ({"context": "c", "input": "i", "system_prompt": "s"}, chat("c\n\nQ\ni", system="s")),
        ({"system_message": "s", "system": ""}, chat("Q", system="s")),
        ({"sys": "s", "system_instruction": ""}, chat("Q", system="s")),
        ({"history": chat("a", "b")}, chat("a", "b", "Q")),
        ({"history": json.dumps(chat("a", "b"))}, chat("a", "b", "Q")),
        ({"context": "the Q", "input": ""}, chat("the Q\n\nQ")),
    ],
)
def test_what_stands_beside_a_question_is_read_with_it(chatml, beside, prompt):
    pair, report = one({**ROW, **beside}, chatml)
    whole = {"prompt": prompt, "chosen": "B", "rejected": "W"}
    assert pair == one(whole, chatml)[0]
    assert f"columns read beside these: {', '.join(beside)}" in str(report)
    messages = {"prompt": chat("Q"), "chosen": "B", "rejected": "W", **beside}
    assert one(messages, chatml)[0] == pair


def test_plain_texts_have_their_context_before_them(plain):
    pair, _ = one({"prompt": "Q:", "chosen": " B", "rejected": " W", "context": "c"}, plain)
    assert text(plain, pair.prompt + pair.chosen) == "<s>c\n\nQ: B</s>"


def test_what_an_object_holds_beside_the_part_that_is_read_is_told(chatml):
    rows = [{"messages": chat("Q", "A"), "feedback": {"message_index": 1 + i % 2, "thumbs": "up"}} for i in range(6)]
    _, report = tokenize(rows, chatml, columns={"label": "feedback.thumbs"}, unpaired=True)
    assert "columns not used: feedback.message_index (1, 2)" in str(report)


def test_a_list_of_texts_is_written_as_paragraphs(chatml):
    row = {**ROW, "sources": [{"title": "A", "text": "one"}, {"title": "B", "text": "two"}]}
    _, report = tokenize([row], chatml)
    assert "columns not used: sources ([{'title': 'A', 'text': 'one'...)" in str(report)
    pair, _ = one(row, chatml, columns={"context": "sources.*.text"})
    assert pair == one({**ROW, "prompt": "one\n\ntwo\n\nQ"}, chatml)[0]


def test_a_context_that_the_prompt_holds_is_not_written_twice(chatml):
    row = {"prompt": "Text: a line of some length\nQ 15\ni", "chosen": "B", "rejected": "W"}
    assert one({**row, "context": "a line of some length", "input": "i"}, chatml)[0] == one(row, chatml)[0]
    assert (
        one({**row, "input": "5"}, chatml)[0] == one({**row, "prompt": f"{row['prompt']}\n5"}, chatml)[0]
    )  # by chance
    earlier = {"prompt": chat("a", "b", "Q", system="S"), "chosen": "B", "rejected": "W"}
    for history in (chat("a", "b"), [["a", "b"]]):
        assert one({**earlier, "history": history, "system": "S"}, chatml)[0] == one(earlier, chatml)[0]


def test_columns_that_nobody_reads_are_named(chatml):
    _, report = tokenize([{**ROW, "id": 1, "score_chosen": 3.0}, {**ROW, "prompt": "R", "note": "n"}], chatml)
    assert "columns not used: id, score_chosen, note" in str(report)
    _, report = tokenize([ROW], chatml)
    assert "columns" not in str(report)


def test_what_unused_columns_hold_is_shown_where_it_tells_what_they_are_for(chatml):
    beside = [
        {"status": "tie" if i % 3 else "OK", "note": "say it in  three words, please, or more", "id": f"x{i}"}
        for i in range(9)
    ]
    _, report = tokenize(
        [{**ROW, "prompt": f"Q{i}", **beside[i], "meta": [1], "odd": "\x1b[31m"} for i in range(9)], chatml
    )
    said = "columns not used: status (OK, tie), note ('say it in three words, please...'), id, meta ([1]), "
    assert said + r"odd ('\x1b[31m')" in str(report).splitlines()


def test_weights_and_margins_are_read_where_columns_name_them_and_only_there(chatml, tmp_path):
    rows = [{**ROW, "prompt": f"Q{i}", "weight": 0.5 + i, "score": {"gap": str(i)}} for i in range(40)]
    pairs, report = tokenize(rows, chatml)
    assert {(pair.weight, pair.margin) for pair in pairs} == {(1.0, 0.0)}
    assert (
        "columns not used: weight, score ({'gap': '0'})\ndataset.columns={weight: weight} would take the column"
        in str(report)
    )
    columns = {"weight": "weight", "margin": "score.gap"}
    rows[3], rows[7], rows[9] = ({**rows[i], "weight": weight} for i, weight in ((3, 0), (7, -1), (9, None)))
    pairs, report = tokenize(rows, chatml, columns=columns)
    assert [(pair.weight, pair.margin) for pair in pairs] == [(i + 0.5, i) for i in range(40) if i not in (3, 7, 9)]
    assert "columns read beside these: weight, margin" in str(report) and report.unused == []
    assert report.dropped == {"weight of 0": [3], "weight: no finite number, at least 0": [7, 9]}
    lines = [line.partition("   row ")[0] for line in str(report).splitlines() if " %" in line and "95 %" not in line]
    assert len(lines) > 3 and len({len(line) for line in lines}) == 1  # a long reason shifts no column of the table
    packed = PackedPairs.of(pairs)
    assert list(packed) == pairs and digest_in_order(packed) == digest_in_order(pairs)
    other = [replace(pairs[0], weight=9.0), *pairs[1:]]
    assert digest_in_order(other) != digest_in_order(pairs) and digest_each(other) == digest_each(packed)


@pytest.mark.parametrize("name", ["query", "question", "documents", "persona", "conversations"])
def test_a_column_that_may_be_part_of_the_question_is_refused_until_columns_say_what_it_is(chatml, name):
    rows = [{**ROW, name: ""}, {**ROW, name: "Part of it."}]
    with pytest.raises(UserError) as refused:
        tokenize(rows, chatml)
    message = str(refused.value)
    assert f"row 1 (from 0): column '{name}' holds text, 'Part of it.'" in message
    for columns, prompt in (
        ({"input": name}, chat("Q\nPart of it.")),
        ({"context": name}, chat("Part of it.\n\nQ")),
        ({name: None}, chat("Q")),
        ({"system": name}, chat("Q", system="Part of it.")),
    ):
        line = "{" + ", ".join(f"{ours}: {theirs or 'null'}" for ours, theirs in columns.items()) + "}"
        assert line in message or "system" in columns  # which it does not think of
        pairs, _ = tokenize(rows, chatml, columns=columns)
        assert pairs[1].prompt == one({**ROW, "prompt": prompt}, chatml)[0].prompt


@pytest.mark.parametrize("name", ["label", "vote", "verdict", "selected"])
def test_a_column_that_may_say_that_a_pair_is_rejected_is_refused(chatml, name):
    rows = [ROW | {"prompt": f"Q{i}", name: ("chosen", "rejected")[i % 2]} for i in range(30)]
    with pytest.raises(UserError, match=rf"row 1 .*column '{name}' holds text, 'rejected', and may say which"):
        tokenize(rows, chatml)


@pytest.mark.parametrize("name", ["winner", "choice", "preference", "preferred", "better_response_id"])
def test_a_column_that_says_which_answer_is_better_is_used_or_refused_until_columns_say_what_it_is(chatml, name):
    """Beside chosen and rejected answers, or two of which another column says so."""
    rows = [ROW | {"prompt": f"Q{i}", name: ("chosen", "rejected", "tie")[i % 3]} for i in range(30)]
    pairs, report = tokenize(rows, chatml)
    turned = {**ROW, "chosen": "W", "rejected": "B"}
    written, _ = tokenize([(ROW, turned)[i % 3] | {"prompt": f"Q{i}"} for i in range(30) if i % 3 < 2], chatml)
    assert digest_each(pairs) == digest_each(written) and "dropped: a tie" in str(report)
    assert report.remarks == {f"turned round, as {name} says": list(range(1, 30, 3))}
    assert f"columns read beside these: {name}\n" in str(report) and "not used" not in str(report)
    for value in (0, 1, 2, True, "a", "B", "1", "response_1", "model_b", "Left"):
        with pytest.raises(UserError, match=f"row 0 .*column '{name}' holds .*answers: .FIRST, SECOND.*{name}: null"):
            tokenize([ROW | {name: value}], chatml)
    said = {"answers": ["chosen", "rejected"], "choice": {name: [1, 0]}}
    pair, _ = one(ROW | {name: 0}, chatml, columns=said)
    assert digest_each([pair]) == digest_each([one(turned, chatml)[0]])
    assert one(ROW | {name: 0}, chatml, columns={name: None})[0] == one(ROW, chatml)[0]
    for value in ("helpfulness", 7, 0.91, "a long text about it", None):  # of what it is, and not which
        assert one(ROW | {name: value}, chatml)[0] == one(ROW, chatml)[0]


def test_a_prompt_beside_whole_conversations_is_refused_where_they_lack_part_of_it(chatml):
    """The contract would be left out."""
    two = {
        name: [*chat("When is rent due?"), *chat("", text)[1:]] for name, text in (("chosen", "B"), ("rejected", "W"))
    }
    with pytest.raises(UserError, match=r"column 'prompt' holds .*\{context: prompt\} before it"):
        one({"prompt": "Rent is due on May 1.\n\nWhen is rent due?", **two}, chatml)
    for prompt in ("When is rent due?", " When is rent due?\n", "\n\nHuman: When is rent due?\n\nAssistant:"):
        assert one({"prompt": prompt, **two}, chatml)[0] == one(two, chatml)[0]


@pytest.mark.parametrize("name", ["document_2", "Article", "sql_schema", "options", "Context"])
def test_a_columns_number_and_capitals_hide_no_part_of_a_question(chatml, name):
    with pytest.raises(UserError, match=f"column '{name}' holds text, 'a whole text', which the prompt does not hold"):
        one({**ROW, name: "a whole text"}, chatml)
    assert one({**ROW, "prompt": "a whole text: Q", name: "a whole text"}, chatml)


def test_images_in_a_message_and_by_a_path_are_no_text(chatml):
    rows = [
        {**ROW, "prompt": [{"role": "user", "content": "Q", "images": ["cat.png"]}]},
        {**ROW, "image_path": "a.png"},
    ]
    for row, said in zip(rows, ("a message holds images", "column 'image_path'"), strict=True):
        with pytest.raises(UserError, match=f"{said}.*pairs are text"):
            tokenize([row], chatml, on_bad_row="error")


@pytest.mark.parametrize("rest", [{}, {"label": True}])
def test_an_answer_is_without_its_speaker_where_the_prompt_does_not_end_with_it(chatml, rest):
    prompt = "\n\nHuman: Q"
    answers = {"completion": "\n\nAssistant: B"} if rest else {"chosen": "\n\nAssistant: B", "rejected": "Assistant: W"}
    pair, _ = one({"prompt": prompt, **answers, **rest}, chatml, unpaired=bool(rest))
    bare = {"completion": "B"} if rest else {"chosen": "B", "rejected": "W"}
    assert pair == one({"prompt": prompt + "\n\nAssistant:", **bare, **rest}, chatml, unpaired=bool(rest))[0]


def test_a_users_turn_is_no_part_of_an_answer_however_its_speaker_is_written(chatml):
    later = "\n\nHuman: Q\n\nAssistant: Tell me more.\n\nHUMAN: It is urgent.\n\nAI: "
    with pytest.raises(UserError, match="no answer at the end"):
        one({"chosen": later + "B", "rejected": later + "W"}, chatml)


def test_a_row_without_one_of_its_answers_is_told_where_others_have_one(chatml):
    """Files of one answer a row, by which column it is in; both columns are there, and one is null."""
    rows = [{"prompt": "Q", "chosen": "B", "rejected": None}, {"prompt": "Q", "chosen": None, "rejected": "W"}]
    ((pair,), _) = tokenize(rows[:1], chatml, unpaired=True)
    assert (text(chatml, pair.chosen), pair.rejected) == ("B<|im_end|>", [])
    with pytest.raises(UserError, match=r"row 1 .*column 'chosen' holds nothing \(null\)"):
        tokenize(rows, chatml, unpaired=True)
    with pytest.raises(UserError, match="row 12 .*holds chosen and rejected where others have one answer"):
        tokenize([*rows[:1] * 12, ROW], chatml, unpaired=True, on_bad_row="error")


def test_answers_that_were_swapped_are_refused_until_columns_say_what_that_means(chatml):
    for name, is_so in (("swapped", True), ("is_flipped", 1), ("reversed", "true")):
        with pytest.raises(UserError, match=f"row 0 .*column '{name}' holds"):
            tokenize([ROW | {name: is_so}], chatml)
        assert one(ROW | {name: False}, chatml)[0] == one(ROW, chatml)[0]
    two = {"prompt": "Q", "answer_a": "B", "answer_b": "W", "winner": "a"}
    with pytest.raises(UserError, match="column 'swapped'"):
        tokenize([two | {"swapped": True}], chatml)
    with pytest.raises(UserError, match="column 'label' holds int, 1"):
        tokenize([{"messages": chat("Q", "B"), "rejected_response": "W", "label": 1}], chatml)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("feedback", ("thumbs_up", "thumbs_down")),
        ("is_good", (True, False)),
        ("reward", (1, 0)),
        ("liked", ("👍", "👎")),
    ],
)
def test_a_column_that_may_say_how_good_a_single_answer_is_is_refused_until_columns_say_so(chatml, name, values):
    good, bad = ({"messages": chat("Q", answer), name: value} for answer, value in zip("BW", values, strict=True))
    says = rf"row 0 .*column '{name}' holds .*columns=.label: {name}.*columns=.{name}: null"
    for rows in ([good, bad], [{"prompt": "Q", "completion": "W", name: values[1]}]):
        with pytest.raises(UserError, match=says):
            tokenize(rows, chatml, unpaired=True)
    found, _ = tokenize([good, bad], chatml, unpaired=True, columns={"label": name})
    assert [bool(pair.chosen) for pair in found] == [True, False]
    alone, _ = tokenize([good, bad], chatml, unpaired=True, columns={name: None})
    assert all(pair.chosen for pair in alone)
    assert one({**ROW, name: values[0]}, chatml)[0] == one(ROW, chatml)[0]  # beside a better and a worse one


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("toxic", (False, True)),
        ("harmful", (0, 1)),
        ("is_spam", ("false", "true")),
        ("toxicity_score", (0.1, 0.9)),
        ("is_bad", (False, True)),
        ("passed_check", (True, False)),
        ("x", (1, 0)),
        ("class", ("accept", "reject")),
        ("outcome", ("pass", "fail")),
    ],
)
def test_a_column_that_may_say_that_a_single_answer_is_bad_is_refused_and_never_taken_for_its_label(name, values):
    rows = [{"prompt": f"Q{i}", "completion": "B", name: values[i % 2]} for i in range(4)]
    with pytest.raises(UserError) as refused:
        look(Rows(rows), "dataset", single=True)
    said = str(refused.value)
    assert f"column '{name}' holds" in said and f"dataset.columns={{{name}: null}} leaves it out" in said
    assert (f"label: {name}" in said) == (name in NEUTRAL)  # which may say that it is good
    left = look(Rows(rows, columns={name: None}), "dataset", single=True)
    assert all(text.chosen for text in left.texts) and len(left.texts) == 4
    other = [row | {"has_code": i > 1} for i, row in enumerate(rows)]  # one of several marks is no label by its kind
    if name in NEUTRAL:
        assert len(look(Rows(other), "dataset", single=True).texts) == 4


@pytest.mark.parametrize("between", ["\n", " ", "\n\nAnswer: "])
def test_answers_that_all_begin_with_their_question_are_read_without_it(chatml, plain, between):
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No."} for i in range(5)]
    whole = [row | {name: row["prompt"] + between + row[name] for name in ("chosen", "rejected")} for row in rows]
    apart = [row | {name: between.strip() + " " * bool(between.strip()) + row[name] for name in ("chosen", "rejected")}
             for row in rows]  # fmt: skip
    found, report = tokenize(whole, chatml)
    assert digest_each(found) == digest_each(tokenize(apart, chatml)[0]) and "that begin with it" in report.format
    texts = [plain.decode([*pair.prompt, *pair.chosen]) for pair in tokenize(whole, plain)[0]]
    assert texts == [row["chosen"] for row in whole]
    single = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i < 3} for i, row in enumerate(whole)]
    assert [pair.chosen for pair in tokenize(single, chatml, unpaired=True)[0][:3]] == [p.chosen for p in found[:3]]
    some = [*rows[:1], *whole[1:]]  # where not all do, an answer may want to
    assert tokenize(some, chatml)[1].format == "prompt with answers"


def test_a_column_that_repeats_the_question_harms_nothing(chatml):
    repeated = {"question": "Q", "messages": [*chat("Q"), {"role": "assistant", "content": "B"}], "instruction": " Q "}
    assert one({**ROW, **repeated}, chatml)[0] == one(ROW, chatml)[0]


# Messages as text


def as_numpy_prints(messages):
    return "[" + "\n ".join(map(repr, messages)) + "]"


@pytest.mark.parametrize("write", [json.dumps, repr, as_numpy_prints, lambda m: json.dumps(m, indent=2)])
@pytest.mark.parametrize("columns", [("prompt",), ("prompt", "chosen", "rejected")])
def test_messages_that_are_written_as_text_are_messages(tmp_path, chatml, write, columns):
    row = {
        "prompt": chat("it's", 'a "b"\n{c}', "Q", system="S"),
        "chosen": [{"role": "assistant", "content": "B"}],
        "rejected": [{"role": "assistant", "content": "W"}],
    }
    written = {name: write(cell) if name in columns else cell[0]["content"] for name, cell in row.items()}
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerow(written)
    assert tokenize(read_rows(str(tmp_path / "a.csv")), chatml)[0] == [one(row, chatml)[0]]


def test_a_text_that_begins_like_messages_and_is_cut_is_a_broken_row(chatml):
    good = {"prompt": json.dumps(chat("Q")), "chosen": "B", "rejected": "W"}
    with pytest.raises(UserError, match=r"row 1 \(from 0\): column 'prompt' holds text, .* expected list of messages"):
        tokenize([good, {**good, "prompt": good["prompt"][:-3]}], chatml)


@pytest.mark.parametrize("prompt", ["[1, 2, 3] in words?", '{"a": 1}', "[]", '["a", "b"]', "[{'x': 1}]"])
def test_other_texts_in_brackets_are_texts(chatml, prompt):
    pair, _ = one({**ROW, "prompt": prompt}, chatml)
    assert f"user\n{prompt}<|im_end|>" in text(chatml, pair.prompt)


# Prompts that are rendered already

RENDERED = {
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "the test's own": "<s><|start|>user<|head|>\n\nQ<|eot_id|><|start|>assistant<|head|>\n\n",
    "Llama 3": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>",
    "Llama 2": "<s>[INST] Q [/INST]",
    "Gemma": "<bos><start_of_turn>user\nQ<end_of_turn>\n<start_of_turn>model\n",
    "Zephyr": "<|user|>\nQ</s>\n<|assistant|>\n",
}


@pytest.mark.parametrize("name", RENDERED)
@pytest.mark.parametrize("template", [CHATML, LLAMA_3])
def test_prompts_that_are_rendered_already_are_refused_with_the_two_settings(tmp_path, name, template):
    folder = save(tmp_path, chat_template=template)
    rows = [{**ROW, "prompt": RENDERED[name]}, {**ROW, "prompt": RENDERED[name].replace("Q", "R")}]
    settings = {"chat_template": "plain", "special_tokens_in_text": "control"}
    words = " ".join(f"tokenizer.{key}={value}" for key, value in settings.items())
    for wrong in ({}, {"chat_template": "plain"}, {"special_tokens_in_text": "control"}):
        with pytest.raises(UserError, match=f"2 of 2 prompts are rendered.*row 0, 1.*{words}"):
            tokenize(rows, hf_tokenizer(folder, **wrong))
    tokenizer = hf_tokenizer(folder, **settings)
    pairs, _ = tokenize(rows, tokenizer)
    written = text(tokenizer, pairs[0].prompt + pairs[0].chosen)
    assert written.removeprefix("<s>") == RENDERED[name].removeprefix("<s>") + "B</s>"


def test_a_question_about_special_tokens_is_a_question(chatml):
    prompts = ["What is <|im_start|>?", "Is it </s> or <|im_end|>", "</s> ends what?", "user: <|im_start|>user"]
    pairs, report = tokenize([{**ROW, "prompt": prompt} for prompt in prompts], chatml)
    assert len(pairs) == 4 and report.special == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "prompt", ["USER: Q ASSISTANT:", "Below is a task.\n\n### Response:\n", "Question: Q\nAnswer: "]
)
def test_prompts_that_are_written_out_in_words_are_told(chatml, plain, prompt):
    told = f"1 prompts end in {prompt.split()[-1] if '###' not in prompt else '### Response:'!r}"
    row = {"prompt": prompt, "chosen": "B", "rejected": "W"}
    assert told in str(tokenize([ROW, row], chatml)[1]) and "in words" not in str(tokenize([ROW], chatml)[1])
    assert "prompts end in" not in str(tokenize([ROW, row], plain)[1])


# Broken rows


@pytest.mark.parametrize("broken", [{"chosen": None}, {"rejected": 7}, {"prompt": chat("Q", "A")[:0]}, {"chosen": [1]}])
def test_broken_rows_are_dropped_and_counted_up_to_one_in_twenty(chatml, broken):
    rows = [*ROWS, *ROWS]
    rows[3], rows[17] = {**ROWS[3], **broken}, {**ROWS[17], **broken}
    pairs, report = tokenize(rows, chatml)
    ((reason, numbers),) = report.dropped.items()
    (column,) = broken
    assert numbers == [3, 17] and f"column '{column}' holds" in reason and len(pairs) == 38
    assert f"dropped: {reason}" in str(report) and "5.0 %   row 3, 17" in str(report)
    rows[30] = {**ROWS[0], **broken}
    with pytest.raises(UserError) as refused:
        tokenize(rows, chatml)
    message = str(refused.value)
    assert "3 rows of 40 are broken, 7.5 %: row 3, 17, 30" in message and "row 3 (from 0): column" in message
    assert re.search(r"kept +37 ", message)
    with pytest.raises(UserError, match=rf"row 3 \(from 0\): column '{column}' holds"):
        tokenize(rows, chatml, on_bad_row="error")


@pytest.mark.parametrize(
    ("row", "column", "holds", "expected"),
    [
        (ROW | {"chosen": 5}, "chosen", "int, 5", "text or message or list of messages beside prompt and rejected"),
        (ROW | {"rejected": None}, "rejected", "nothing (null)", "text or message"),
        (ROW | {"prompt": {"text": "Q"}}, "prompt", "dict, {'text': 'Q'}", "text or list of messages"),
        (ROW | {"prompt": ["Q"]}, "prompt", "texts, ['Q']", "text or list of messages"),
        ({"conversations": "Q", "chosen": "B", "rejected": "W"}, "conversations", "text, 'Q'", "list of messages"),
        ({"instruction": 3, "chosen": "B", "rejected": "W"}, "instruction", "int, 3", "text beside chosen"),
        ({"prompt": "Q", "completion": 1.5, "label": True}, "completion", "float, 1.5", "text"),
        ({"prompt": "Q", "chosen": "B", "rejected": {"a": [1]}}, "rejected", "dict, {'a': [1]}", "list of texts"),
    ],
)
def test_a_type_that_no_row_has_right_is_told_in_a_sentence(chatml, row, column, holds, expected):
    with pytest.raises(UserError) as error:
        tokenize([row] * 3, chatml)
    said = str(error.value)
    assert "\n" not in said and f"row 0 (from 0): column {column!r} holds {holds}, expected " in said
    place = f"{column}.0" if holds.startswith("texts") else "NAME"
    assert expected in said and f"dataset.columns={{{column}: {place}}}" in said


def test_a_header_within_the_rows_is_no_pair(chatml):
    header = {name: name for name in ROW}
    rows = [*ROWS, *ROWS, *ROWS, header]
    pairs, report = tokenize(rows, chatml)
    assert len(pairs) == len(rows) - 1 and report.dropped == {"a header once more": [len(rows) - 1]}
    theirs = [{"question": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in ROWS * 3]
    columns = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    _, report = tokenize([*theirs, {name: name for name in theirs[0]}], chatml, columns=columns)
    assert report.dropped == {"a header once more": [len(theirs)]}


@pytest.mark.parametrize("mark", [{"rating": "thumbs_down"}, {"annotation": {"rating": "thumbs_down"}}])
def test_a_grade_within_a_message_is_no_unread_label(chatml, mark):
    row = {"messages": [*chat("Q"), {"role": "assistant", "content": "A", **mark}]}
    path = "messages.-1." + ("rating" if "rating" in mark else "annotation.rating")
    with pytest.raises(UserError, match=rf"column '{path}' holds .*columns=\{{messages: messages, label: {path}\}}"):
        tokenize([row] * 3, chatml, unpaired=True)
    pairs, _ = tokenize([row], chatml, columns={"messages": "messages", "label": path}, unpaired=True)
    assert not pairs[0].chosen and pairs[0].rejected
    with pytest.raises(
        UserError, match=rf"column '{path.replace('messages', 'chat')}' .*messages: chat, label: chat.-1"
    ):
        tokenize([{"chat": row["messages"]}] * 3, chatml, columns={"messages": "chat"}, unpaired=True)
    fine = {"messages": [*chat("Q"), {"role": "assistant", "content": "A", "toxic": False}]}
    assert tokenize([fine], chatml, unpaired=True)[0][0].chosen


def test_words_of_a_label_are_those_that_columns_give(chatml):
    rows = [{"prompt": f"Q{i}", "completion": "A", "review": ("ok to send", "needs rewrite")[i % 2]} for i in range(4)]
    columns = {"label": {"review": ["ok to send", "needs rewrite"]}}
    pairs, report = tokenize(rows, chatml, columns=columns, unpaired=True)
    assert [bool(pair.chosen) for pair in pairs] == [True, False] * 2 and report.num_desirable == 2
    for grade, line in (
        (("high", "low"), r"label: \{quality: \[GOOD, BAD\]\}\}, with"),
        (([1], [2]), "Add a column label"),
    ):
        with pytest.raises(UserError, match=rf"column 'quality' holds .*{line}"):
            tokenize([{**row, "quality": grade[0]} for row in rows], chatml, unpaired=True)
    with pytest.raises(UserError, match="must be a column with what it holds for a good answer and for a bad one"):
        tokenize(rows, chatml, columns={"label": {"review": ["ok"]}}, unpaired=True)
    rows[1]["review"] = "?"
    with pytest.raises(UserError, match="column 'label' holds text, .*expected true or false"):
        tokenize(rows, chatml, columns=columns, unpaired=True)
    _, report = tokenize([{"prompt": "Q", "completion": "A"}], chatml, unpaired=True)
    assert "no label: every answer is taken for a good one" in str(report)


def test_a_check_of_two_words_has_a_line_that_works(chatml):
    rows = [{"prompt": f"Q{i}", "completion": "A", "check": ("correct", "incorrect")[i % 2]} for i in range(4)]
    with pytest.raises(UserError, match=r"columns=\{label: \{check: \[correct, incorrect\]\}\}"):
        tokenize(rows, chatml, unpaired=True)
    pairs, _ = tokenize(rows, chatml, unpaired=True, columns={"label": {"check": ["correct", "incorrect"]}})
    assert [bool(pair.chosen) for pair in pairs] == [True, False] * 2


@pytest.mark.parametrize("content", [[{"type": "text", "text": "Q"}], {"parts": ["Q"]}, 5])
def test_messages_that_nobody_reads_may_hold_anything(chatml, content):
    rows = [{**ROW, "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "B"}]}]
    if isinstance(content, list):
        assert tokenize(rows, chatml)[0] == [one(ROW, chatml)[0]]
    else:
        with pytest.raises(UserError, match="column 'messages' holds messages"):
            tokenize(rows, chatml)


def test_rows_that_are_broken_in_several_ways_are_each_named(chatml):
    rows = [*ROWS[:4], {**ROWS[4], "chosen": None}, {**ROWS[5], "rejected": 7}, {**ROWS[6], "system": 5}]
    with pytest.raises(UserError) as refused:
        tokenize(rows, chatml)
    for number, column in ((4, "chosen"), (5, "rejected"), (6, "system")):
        assert f"row {number} (from 0): column '{column}' holds" in str(refused.value)


# Folders


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def table(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def arrow(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(path)


SHARDS = {
    "an optional column is null in one": [[{**ROW, "system": None}], [{**ROW, "system": "S"}]],
    "a column of two types": [[{**ROW, "id": 1}], [{**ROW, "id": "x1"}]],
    "a column more": [[ROW], [{**ROW, "source": "forum"}]],
    "dates and numbers as text": [[{**ROW, "chosen": "2024-01-01", "rejected": "12"}], [{**ROW, "chosen": "NA"}]],
}


@pytest.mark.parametrize("name", SHARDS)
@pytest.mark.parametrize(("kind", "write"), [("jsonl", lines), ("csv", table), ("parquet", arrow)])
def test_a_folder_gives_the_rows_that_its_files_give_alone(tmp_path, chatml, name, kind, write):
    alone = []
    for number, rows in enumerate(SHARDS[name]):
        write(tmp_path / f"part-{number}.{kind}", rows)
        alone += tokenize(read_rows(str(tmp_path / f"part-{number}.{kind}")), chatml)[0]
    pairs, report = tokenize(read_rows(str(tmp_path)), chatml)
    assert [(p.prompt, p.chosen, p.rejected) for p in pairs] == [(p.prompt, p.chosen, p.rejected) for p in alone]
    assert [pair.row for pair in pairs] == [0, 1] and not report.dropped
    (second,) = read_rows(str(tmp_path), split="train[1:]")
    assert second == read_rows(str(tmp_path))[1]


def test_what_does_not_fit_names_its_file_and_column(tmp_path, chatml):
    lines(tmp_path / "a.jsonl", ROWS[:3])
    lines(tmp_path / "b.jsonl", [ROWS[3], {**ROWS[4], "chosen": 5}])
    for split in ("train", "train[2:]"):
        with pytest.raises(UserError, match=r"/b\.jsonl, row 1 \(from 0\): column 'chosen' holds int, 5"):
            tokenize(read_rows(str(tmp_path), split=split), chatml)
