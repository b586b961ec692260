"""Published data sets in their own columns, choices, ranks, scores and trees: which pairs they make, and what is said
where nobody can tell. Expected pairs are counted by hand."""

import json

import pytest
import yaml
from test_data import one, text, tokenize
from test_tokenizer import CHATML, save

from pairtune.errors import UserError
from pairtune.pairs.example import BadRow, Skip
from pairtune.pairs.recognise import recognise
from pairtune.pairs.rows import Rows, read_rows
from pairtune.tokenizer.hf import hf_tokenizer

USER = {"role": "user", "content": "Q"}


def says(content):
    return {"role": "assistant", "content": content}


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return hf_tokenizer(save(tmp_path_factory.mktemp("chatml") / "model", chat_template=CHATML))


def read(rows, columns=None, **options):
    """Returns the rows' pairs as (last question, chosen, rejected), and the form's name."""
    form, rows = recognise(Rows(rows, columns=columns), "dataset")
    examples = [example for row in rows for example in form.read(row, **options)]
    return [(e.prompt[-1]["content"], e.chosen, e.rejected) for e in examples], form.name


PUBLISHED = {
    "LLMBar": (
        [{"input": "Q", "output_1": "B", "output_2": "W", "label": 1}, {"input": "Q", "output_1": "W", "output_2": "B",
         "label": 2}],
        2,
    ),
    "AlpacaFarm": (
        [{"instruction": "Q", "input": "", "output_1": "W", "output_2": "B", "preference": 2},
         {"instruction": "Q", "input": "", "output_1": "B", "output_2": "W", "preference": 1}],
        2,
    ),
    "PandaLM": (
        [{"idx": 0, "motivation_app": "a", "cmp_key": "k", "instruction": "Q", "input": "", "response1": "W",
          "response2": "B", "annotator1": 2, "annotator2": 2, "annotator3": 0}],
        1,
    ),
    "SHP": (
        [{"post_id": "x", "domain": "d", "history": "Q", "human_ref_A": "B", "human_ref_B": "W", "labels": 1,
          "score_A": 4, "score_B": 2},
         {"post_id": "y", "domain": "d", "history": "Q", "human_ref_A": "W", "human_ref_B": "B", "labels": 0,
          "score_A": 2, "score_B": 4}],
        2,
    ),
    "Arena's conversations": (
        [{"model_a": "m", "model_b": "n", "winner": "model_b", "judge": "j", "turn": 1,
          "conversation_a": [USER, says("W")], "conversation_b": [USER, says("B")]}],
        1,
    ),
    "Arena's battles": (
        [{"id": 1, "model_a": "m", "model_b": "n", "prompt": '["Q"]', "response_a": '["B"]', "response_b": '["W"]',
          "winner_model_a": "1", "winner_model_b": "0", "winner_tie": "0"}],
        1,
    ),
    "PKU-SafeRLHF": (
        [{"prompt": "Q", "response_0": "W", "response_1": "B", "better_response_id": 1, "safer_response_id": 0},
         {"prompt": "Q", "response_0": "B", "response_1": "W", "better_response_id": 0, "safer_response_id": 0}],
        2,
    ),
    "HelpSteer's preferences": (
        [{"domain": "d", "language": "e", "context": [USER], "response1": "B", "response2": "W",
          "overall_preference": -2}],
        1,
    ),
    "NeMo's ranked completions": (
        [{"context": [USER], "completions": [{"rank": 1, "completion": [says("W")]},
                                             {"rank": 0, "completion": [says("B")]}]}],
        1,
    ),
    "prompt with chosen_response and rejected_response": (
        [{"prompt": "Q", "chosen_response": "B", "rejected_response": "W", "chosen_reward": 1.0}],
        1,
    ),
    "OpenAI's preferences": (
        [{"input": {"messages": [USER], "tools": [], "parallel_tool_calls": True}, "preferred_output": [says("B")],
          "non_preferred_output": [says("W")]}],
        1,
    ),
    "UltraFeedback, rated completions": (
        [{"source": "s", "instruction": "Q", "models": ["m", "n"], "correct_answers": ["x"], "incorrect_answers": [],
          "completions": [{"model": "m", "response": "W", "overall_score": 3.0},
                          {"model": "n", "response": "B", "overall_score": 8.5}]}],
        1,
    ),
    "Nectar's ranked answers": (
        [{"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": [{"answer": "B", "model": "m", "rank": 1.0},
                                                                {"answer": "W", "model": "n", "rank": 2.0}]}],
        1,
    ),
    "Stack Exchange's rated answers": (
        [{"question": "Q", "answers": [{"text": "W", "pm_score": 0}, {"text": "B", "pm_score": 3}]}],
        1,
    ),
    "WebGPT": (
        [{"question": {"full_text": "Q", "id": "1"}, "answer_0": "B", "answer_1": "W", "score_0": 0.5,
          "score_1": -0.5}],
        1,
    ),
    "HelpSteer 2's preferences": (
        [{"prompt": "Q", "response_1": "W", "response_2": "B", "preference_strength": 3, "split": "train"}],
        1,
    ),
    "messages and rejected_messages": (
        [{"messages": [USER, says("B")], "rejected_messages": [USER, says("W")]}],
        1,
    ),
    "instruction with preferred and dispreferred": (
        [{"instruction": "Q", "input": "", "preferred": "B", "dispreferred": "W"}],
        1,
    ),
    "distilabel's rated generations": (
        [{"instruction": "Q", "generations": ["W", "B"], "ratings": [2.0, 5.0], "generation_models": ["m", "n"]}],
        1,
    ),
    "a list of answers and one of scores": (
        [{"prompt": "Q", "responses": ["W", "B"], "reward_scores": [-1.0, 5.0]}],
        1,
    ),
    "a list of answers that have a rank each": (
        [{"question": "Q", "candidates": [{"text": "W", "model": "m", "rank": 2}, {"text": "B", "rank": 1}]}],
        1,
    ),
    "a list of answers and one of scores as text": (
        [{"prompt": "Q", "completions": ["W", "B"], "scores": ["4", "10"]}],
        1,
    ),
    "messages with chosen and rejected": (
        [{"messages": [USER], "chosen": says("B"), "rejected": says("W")}],
        1,
    ),
    "a prompt that is one message": ([{"prompt": USER, "chosen": says("B"), "rejected": says("W")}], 1),
    "conversations and rejected": (
        [{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "B"}], "rejected": "W"}],
        1,
    ),
    "Human and Assistant without a line before them": (
        [{"prompt": "Human: Q\n\nAssistant:", "chosen": " B", "rejected": " W"}],
        1,
    ),
    "question with chosen and rejected": ([{"system": "", "question": "Q", "chosen": "B", "rejected": "W"}], 1),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_published_data_sets_are_read_as_they_are(name, kind, tmp_path):
    import datasets

    rows, count = PUBLISHED[name]
    if kind == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    else:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    form, found = recognise(read_rows(str(tmp_path / f"a.{kind}")), "dataset")
    examples = [example for row in found for example in form.read(row)]
    assert [(e.prompt[-1]["content"], e.chosen, e.rejected) for e in examples] == [("Q", "B", "W")] * count


TREE = {
    "message_tree_id": "t",
    "tree_state": "ready_for_export",
    "prompt": {
        "message_id": "1", "text": "Q", "role": "prompter", "lang": "en", "replies": [
            {"text": "W", "role": "assistant", "rank": 1, "replies": []},
            {"text": "B", "role": "assistant", "rank": 0, "replies": [
                {"text": "Q2", "role": "prompter", "replies": [
                    {"text": "W2", "role": "assistant", "rank": 2}, {"text": "B2", "role": "assistant", "rank": 0},
                    {"text": "M2", "role": "assistant", "rank": 1}, {"text": "X", "role": "assistant", "rank": None},
                ]},
            ]},
        ],
    },
}  # fmt: skip


def test_a_tree_makes_a_pair_of_the_best_reply_with_each_other_at_every_question():
    pairs, _ = read([TREE])
    assert pairs == [("Q", "B", "W"), ("Q2", "B2", "M2"), ("Q2", "B2", "W2")]
    assert read([TREE], worse="best")[0] == [("Q", "B", "W"), ("Q2", "B2", "M2")]
    assert read([TREE], worse="worst")[0] == [("Q", "B", "W"), ("Q2", "B2", "W2")]
    form, rows = recognise(Rows([TREE]), "dataset")
    turns = [[turn["role"] for turn in example.prompt] for example in form.read(rows[0])]
    assert turns == [["user"], ["user", "assistant", "user"], ["user", "assistant", "user"]]


def messages_of(tree):
    """A tree as Open Assistant's files of messages have it: a message a row."""
    rows = []

    def visit(node, parent):
        number = f"m{len(rows)}"
        rows.append({"message_id": number, "parent_id": parent, "message_tree_id": "t", "text": node["text"],
                     "role": node["role"], "rank": node.get("rank"), "lang": "en", "deleted": False})  # fmt: skip
        for reply in node.get("replies", []):
            visit(reply, number)

    visit(tree["prompt"], None)
    return rows


def test_a_tree_that_is_written_a_message_a_row_makes_the_same_pairs(chatml):
    rows = messages_of(TREE)
    assert len(rows) == 8
    assert read(rows)[0] == read([TREE])[0]
    other = [{**row, **{k: f"x{row[k]}" for k in ("message_id", "parent_id") if row[k]}} for row in rows]
    pairs, report = tokenize([*rows, *other], chatml)
    assert [pair.row for pair in pairs] == [0, 0, 0, 8, 8, 8] and report.num_rows == 2


@pytest.mark.parametrize(
    ("row", "chosen", "rejected"),
    [
        ({"prompt": "Q", "completion": "B"}, "B", None),
        ({"prompt": [USER], "chosen": [says("B")]}, "B", None),
        ({"prompt": "Q", "rejected": "W"}, None, "W"),
        ({"messages": [USER, says("B")]}, "B", None),
        ({"instruction": "Q", "input": "", "output": "B"}, "B", None),
    ],
)
def test_rows_of_one_answer_without_a_label_are_for_losses_of_single_answers(chatml, row, chosen, rejected):
    (pair,), report = tokenize([row], chatml, unpaired=True)
    label = {"prompt": "Q", "completion": chosen or rejected, "label": rejected is None}
    assert pair == tokenize([label], chatml, unpaired=True)[0][0]
    assert report.num_desirable == int(rejected is None)
    with pytest.raises(UserError, match="no known format"):
        tokenize([row], chatml)


def test_several_rejected_answers_make_a_pair_each_or_the_best_or_the_worst():
    row = {"prompt": "Q", "chosen": "B", "rejected": ["W", "X", "Y"]}
    assert read([row])[0] == [("Q", "B", "W"), ("Q", "B", "X"), ("Q", "B", "Y")]
    assert read([row], worse="best")[0] == [("Q", "B", "W")]
    assert read([row], worse="worst")[0] == [("Q", "B", "Y")]


def test_pairs_of_one_row_are_counted_and_bear_its_number(chatml):
    rows = [
        {"prompt": "Q", "chosen": "B", "rejected": ["W", "B", "Y"]},
        {"prompt": "R", "chosen": "B", "rejected": ["W"]},
    ]
    pairs, report = tokenize(rows, chatml)
    assert [pair.row for pair in pairs] == [0, 0, 1] and report.num_kept == 3
    assert report.dropped == {"identical answers": [0]}


ARENA = PUBLISHED["Arena's conversations"][0][0]


@pytest.mark.parametrize(
    ("row", "change"),
    [
        (ARENA, {"winner": "tie"}),
        (ARENA, {"winner": "tie (bothbad)"}),
        (PUBLISHED["Arena's battles"][0][0], {"winner_model_a": "0", "winner_tie": "1"}),
        (PUBLISHED["PandaLM"][0][0], {"annotator1": 1, "annotator2": 2, "annotator3": 0}),
        (PUBLISHED["PandaLM"][0][0], {"annotator1": 0, "annotator2": 2, "annotator3": 0}),
        (PUBLISHED["HelpSteer's preferences"][0][0], {"overall_preference": 0}),
        (PUBLISHED["UltraFeedback, rated completions"][0][0],
         {"completions": [{"response": "a", "overall_score": 4.0}, {"response": "b", "overall_score": 4.0}]}),
    ],
)  # fmt: skip
def test_a_tie_is_dropped_and_counted(chatml, row, change):
    pairs, report = tokenize([row, {**row, **change}, row], chatml)
    assert len(pairs) == 2 and report.dropped == {"a tie": [1]}


# What is described in a line

TWO = {"prompt": "q", "answers": ["x", "y"]}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"q": "Q", "x": "W", "y": "B", "won": "y"}, {**TWO, "choice": "won"}),
        ({"q": "Q", "x": "B", "y": "W", "won": "L"}, {**TWO, "choice": {"won": ["L", "R"]}}),
        ({"q": "Q", "x": "B", "y": "W", "w": True}, {**TWO, "choice": {"w": [True, False]}}),
        ({"q": "Q", "x": "W", "y": "B", "sx": 1, "sy": 2}, {**TWO, "scores": ["sx", "sy"]}),
        ({"q": "Q", "x": "W", "y": "B", "sx": 2, "sy": 1}, {**TWO, "ranks": ["sx", "sy"]}),
        ({"q": "Q", "all": [{"t": "W", "s": 1}, {"t": "B", "s": 3}]},
         {"prompt": "q", "answers": "all.*.t", "scores": "all.*.s"}),
        ({"in": {"q": ["x", "Q"]}, "out": {"good": "B", "bad": "W"}},
         {"prompt": "in.q.-1", "chosen": "out.good", "rejected": "out.bad"}),
        ({"q": "Q", "x": "W", "y": "B", "v1": "y", "v2": None, "v3": "y"}, {**TWO, "choice": {"v*": ["x", "y"]}}),
        ({"q": "Q", "out": json.dumps({"good": "B", "bad": "W"})},
         {"prompt": "q", "chosen": "out.good", "rejected": "out.bad"}),
    ],
)  # fmt: skip
def test_one_line_of_columns_describes_what_is_not_recognised(row, columns):
    assert read([row], columns)[0] == [("Q", "B", "W")]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ([{"question": "Q", "left": "a", "right": "b", "verdict": "L"}, {"question": "R", "left": "c", "right": "d",
          "verdict": "R"}],
         "dataset.columns={prompt: question, answers: [left, right], choice: {verdict: [l, r]}}"),
        ([{"q": "Which?", "m": {"x": {"t": "It is so."}, "y": {"t": "It is not so."}}, "won": won}
          for won in ("[[A]]", "[[B]]", "[[A]]")],
         'dataset.columns={prompt: q, answers: [m.x.t, m.y.t], choice: {won: ["[[a]]", "[[b]]"]}}'),
        ([{"prompt": "Q", "reply_a": "x", "reply_b": "y", "score_a": 4.5, "score_b": 2.0 + n} for n in range(2)],
         "dataset.columns={prompt: prompt, answers: [reply_a, reply_b], scores: [score_a, score_b]}"),
        ([{"question": "Q", "answer_1": "x", "answer_2": "y", "is_first_better": n != 1} for n in range(3)],
         "dataset.columns={prompt: question, answers: [answer_1, answer_2], choice: {is_first_better: [true, false]}}"),
        ([{"prompt": "Q", "original": "a", "revised": "b"}, {"prompt": "R", "original": "c", "revised": "d"}],
         "dataset.columns={prompt: prompt, chosen: revised, rejected: original}"),
        ([{"prompt": "Q", "final_draft": "a", "first_draft": "b"}],
         "dataset.columns={prompt: prompt, chosen: final_draft, rejected: first_draft}"),
        ([{"prompt": "Q", "answer_a": "x", "answer_b": "y", "worse": worse} for worse in "ab"],
         "dataset.columns={prompt: prompt, answers: [answer_a, answer_b], choice: {worse: [b, a]}}"),
        ([{"prompt": "Q", "response_1": "x", "response_2": "y", "loser": f"response_{i}"} for i in (1, 2)],
         "answers: [response_1, response_2], choice: {loser: [response_2, response_1]}}"),
        ([{"prompt": "Q", "responses": ["x", "y"], "penalties": [3.0, 1.0]}],
         "dataset.columns={prompt: prompt, answers: responses, ranks: penalties} (scores are better where they are"),
        ([{"prompt": "Q", "answers": [{"text": "x", "perplexity": 3.0}, {"text": "y", "perplexity": 1.0}]}],
         "dataset.columns={prompt: prompt, answers: answers.*.text, ranks: answers.*.perplexity} (scores are"),
        ([{"question": "Q", "answers": [{"text": "x", "votes": 3}, {"text": "y", "votes": "7"}]}],
         "dataset.columns={prompt: question, answers: answers.*.text, scores: answers.*.votes} (scores are"),
        ([{"prompt": "Q", "responses": ["x", "y"], "toxicity_scores": [0.1, 0.9]}],
         "dataset.columns={prompt: prompt, answers: responses, ranks: toxicity_scores} (scores are"),
        ([{"question": "Q", "answers": ["x", "y", "z"], "best": best} for best in (1, 0, 2)],
         "dataset.columns={prompt: question, answers: answers, choice: {best: [0, 1, 2]}}; no score found where Stack"),
        ([{"problem": f"Is it {n}, or another number?", "good": f"It is {n}, I think.", "bad": f"It is not {n}."}
          for n in range(9)],
         "dataset.columns={prompt: problem, chosen: good, rejected: bad}"),
        ([{"prompt": "Q", "reply_a": "x", "reply_b": "y", "said": [{"user": f"u{i}", "vote": vote} for i, vote in
           enumerate(votes)]} for votes in (("A", "A", "tie"), ("B",))],
         "answers: [reply_a, reply_b], choice: said.*.vote}"),
        ([{"prompt": "Q", "reply_a": "x", "reply_b": "y", "votes": {"ann": "A", "bob": "A"}}],
         "answers: [reply_a, reply_b], choice: votes.*}"),
        ([{"prompt": "Q", "reply_a": "x", "reply_b": "y", "meta": {"lang": "en", "kind": "chat"},
           "sources": [{"lang": "de"}, {"lang": "en"}], "history": [USER, says("x")], "pick": pick}
          for pick in ("left", "right")],
         "answers: [reply_a, reply_b], choice: {pick: [left, right]}}"),
        ([{"prompt": "Q", "reply_a": "x", "reply_b": "y", "ranking_a": 1, "ranking_b": 2}],
         "answers: [reply_a, reply_b], ranks: [ranking_a, ranking_b]}"),
        ([{"prompt": "Q", "reply_a": "x", "reply_b": "y", "rater_1": "a", "rater_2": "b", "rater_3": "b"}],
         "answers: [reply_a, reply_b], choice: rater_*}"),
    ],
)  # fmt: skip
def test_the_error_shows_the_line_filled_in_where_values_do_not_name_an_answer(rows, line):
    with pytest.raises(UserError) as refused:
        read(rows)
    assert line in str(refused.value)
    line = line if "columns=" in line else f"dataset.columns={{prompt: prompt, {line}"
    form, renamed = recognise(Rows(rows, columns=_columns(line)), "dataset")
    assert form.read(renamed[0])  # the line as it stands is one that works


@pytest.mark.parametrize("order", [[2, 0, 1], ["3", "1", "2"]])
def test_an_order_is_of_places_with_the_best_first_and_no_rank(order):
    row = {"prompt": "Q", "responses": ["x", "y", "z"], "ranking": order}
    with pytest.raises(UserError, match="answers: responses, RANKS_OR_ORDER: ranking}, with ranks in place of"):
        read([row] * 3)
    columns = {"answers": "responses", "order": "ranking"}
    assert read([row], columns)[0] == [("Q", "z", "x"), ("Q", "z", "y")]
    with pytest.raises(BadRow, match="expected the places of 3 answers, each once"):
        read([row | {"ranking": [1, 1, 2]}], columns)


@pytest.mark.parametrize(
    "grades", [{"order": [1, 0]}, {"scores": [1, 2]}, {"ranks": [2, 1]}, {"preference": 1}, {"choice": "right"}]
)
def test_what_columns_name_grades_the_answers_and_an_order_only_then(grades):
    row = {"prompt": "Q", "left": "B", "right": "W", "vote": "L", **grades}
    assert read([row], {"answers": ["left", "right"], "choice": {"vote": ["L", "R"]}})[0] == [("Q", "B", "W")]
    assert read([{"prompt": "Q", "answers": ["W", "B"], "preference": 3, "order": [0, 1]}])[0] == [("Q", "B", "W")]
    with pytest.raises(UserError, match="RANKS_OR_ORDER: order}"):
        read([{"prompt": "Q", "answers": ["x", "y"], "order": [1, 0]}] * 3)


def test_whose_an_answer_is_stands_for_no_answer():
    """Two columns of names beside two of answers, in any order; two of names alone are none."""
    winners = [{"winner": name} for name in ("model_b", "model_a", "tie")]
    answers = {"response_a": "It is.", "response_b": "It is not."}
    for names in ({"model_a": "gpt", "model_b": "llama"}, {"annotator_1": "x", "annotator_2": "y"}):
        for beside in ({**names, **answers}, {**answers, **names}):
            form, rows = recognise(Rows([{"prompt": "Q", **beside, **winner} for winner in winners]), "dataset")
            pairs = [(pair.chosen, pair.rejected) for row in (rows[0], rows[1]) for pair in form.read(row)]
            assert pairs == [("It is not.", "It is."), ("It is.", "It is not.")]
        with pytest.raises(UserError, match="no known format"):
            recognise(Rows([{"prompt": "Q", **names, **winner} for winner in winners]), "dataset")
    two = {**answers, "reply_a": "So it is.", "reply_b": "No."}  # which of these?
    with pytest.raises(UserError, match="no known format"):
        recognise(Rows([{"prompt": "Q", **two, **winner} for winner in winners]), "dataset")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"system": "Be kind.", "user": "Q", "good": "g", "bad": "b"}, "{prompt: user, chosen: good, rejected: bad}"),
        ({"info": {"id": "t3", "post": "A post.", "title": "T"}, "summaries": [{"text": "W", "policy": "p"},
          {"text": "B", "policy": "q"}], "verdict": 1, "worker": "x"},
         "{prompt: info.post, answers: [summaries.0.text, summaries.1.text], choice: {verdict: [FIRST, SECOND]}}"),
        ({"Question": "Q", "Response A": "a", "Response B": "b", "Human Choice": "A"},
         "{prompt: Question, answers: [Response A, Response B], choice: Human Choice}"),
        ({"prompt": "Q", "reply_a": "x", "reply_b": "y", "preference_score": 0.9},
         "{prompt: prompt, answers: [reply_a, reply_b], preference: {preference_score: MIDDLE}}, with the number"),
        ({"prompt": "What is it?", "response": "It is so.", "is_safe": False},
         "{prompt: prompt, completion: response, label: is_safe}, for losses of single answers"),
        ({"instruction": "Which?", "input": "", "output": ["It is so, I think.", "It is not so."]},
         "{prompt: instruction, chosen: CHOSEN, rejected: REJECTED}, with the better"),
        ({"prompt": "Q", "alice": "It is so, I think.", "bob": "No, it is not so."},
         "{prompt: prompt, chosen: CHOSEN, rejected: REJECTED}"),
        ({"prompt": "Q", "responses": ["x", "y"], "n": [3, 1]},
         "{prompt: prompt, answers: responses, SCORES_OR_RANKS: n}, with scores in place of SCORES_OR_RANKS where"),
        ({"conversation": [{"human": "Q", "assistant": "A"}, {"human": "R"}], "good": "g", "bad": "b"}, None),
    ],
)  # fmt: skip
def test_a_line_that_is_shown_names_the_question_and_the_answers_or_none(row, line):
    """Not a system message, a number, an id, or the first of several turns."""
    other = {"verdict": 0, "Human Choice": "B", "preference_score": 0.2}
    with pytest.raises(UserError) as refused:
        read([row, row | {name: value for name, value in other.items() if name in row}])
    said = str(refused.value)
    assert f"dataset.columns={line}" in said if line else "dataset.columns={" not in said


@pytest.mark.parametrize("beside", [{"preferred": "x"}, {"batch": "a"}, {}])
def test_a_choice_that_nobody_can_guess_is_left_to_be_filled_in(beside):
    with pytest.raises(UserError, match=r"answers: \[reply_a, reply_b\], choice: \{\w+: \[FIRST, SECOND\]\}\}"):
        read([{"prompt": "Q", "reply_a": "x", "reply_b": "y", **beside}])


UNSAID = [  # what names no better answer: whose a flag is, words by the alphabet, something else of two values
    ({"response_1": "x", "response_2": "y"}, {"is_response_1_safe": True, "is_response_2_safe": False},
     "SCORES_OR_RANKS: [is_response_1_safe, is_response_2_safe]"),
    ({"reply_a": "x", "reply_b": "y"}, {"b_wins": True}, "choice: {b_wins: [false, true]}"),
    ({"reply_a": "x", "reply_b": "y"}, {"better_is_swapped": "yes"}, "choice: {better_is_swapped: [FIRST, SECOND]}"),
    ({"reply_a": "x", "reply_b": "y"}, {"cohort": "a"}, "choice: {cohort: [FIRST, SECOND]}"),
    ({"reply_a": "x", "reply_b": "y"}, {"discarded": "a"}, "choice: {discarded: [b, a]}"),
    ({"reply_a": "x", "reply_b": "y"}, {"verdict": "not a"}, "choice: {verdict: [FIRST, SECOND]}"),
    ({"reply_a": "x", "reply_b": "y"}, {"verdict": "good"}, "choice: {verdict: [FIRST, SECOND]}"),
    ({"response_1": "x", "response_2": "y"}, {"label": 0}, "choice: {label: [FIRST, SECOND, TIE]}"),
    ({"reply_a": "x", "reply_b": "y", "reply_c": "z"}, {"picked": 0}, "choice: {picked: [FIRST, SECOND, THIRD]}"),
]  # fmt: skip
OTHERS = {True: False, "yes": "no", "a": "b", "not a": "not b", "good": "bad", 0: 1}


@pytest.mark.parametrize(("answers", "beside", "line"), UNSAID)
def test_a_line_that_is_shown_takes_no_side_that_nobody_knows(answers, beside, line):
    rows = [{"prompt": "Q", **answers, **beside} for _ in range(3)]
    rows += [{**row, **{name: OTHERS[cell] for name, cell in beside.items()}} for row in rows]
    rows += [rows[0] | {"label": 2}] if "TIE" in line else []
    with pytest.raises(UserError) as refused:
        read(rows)
    assert f"answers: [{', '.join(answers)}], {line}}}" in str(refused.value)


def test_three_answers_are_all_read_and_what_is_beyond_them_is_a_tie():
    rows = [
        {"prompt": "Q", "reply_a": "x", "reply_b": "y", "reply_c": "z", "winner": winner} for winner in ("b", "tie")
    ]
    with pytest.raises(Skip, match="a tie"):
        read(rows)
    assert read(rows[:1])[0] == [("Q", "y", "x"), ("Q", "y", "z")]
    two = [{"prompt": "Q", "left": "B", "right": "W", "label": label} for label in (0, 2)]
    columns = {"answers": ["left", "right"], "choice": {"label": [0, 1, 2]}}
    assert read(two[:1], columns)[0] == [("Q", "B", "W")]
    with pytest.raises(Skip, match="a tie"):
        read(two[1:], columns)


def test_a_preference_has_its_middle_where_columns_say_or_at_0():
    rows = [{"context": "Q", "response1": "A", "response2": "B", "overall_preference": 1 + i % 7} for i in range(14)]
    with pytest.raises(UserError, match=r"holds 1 to 7; .*preference: \{overall_preference: MIDDLE\}\}"):
        read(rows)
    columns = {"prompt": "context", "answers": ["response1", "response2"], "preference": {"overall_preference": 4}}
    rows = [row for row in rows if row["overall_preference"] != 4]
    assert [better for _, better, _ in read(rows, columns)[0]] == list("AAABBB" * 2)
    for row in rows:
        row["overall_preference"] -= 4
    assert [better for _, better, _ in read(rows)[0]] == list("AAABBB" * 2)


def test_a_star_puts_the_entries_of_two_objects_together_by_their_keys():
    row = {"prompt": "Q", "responses": {"z": "B", "a": "W", "m": "x"}, "scores": {"a": 1, "z": 2, "n": 9}}
    with pytest.raises(UserError, match=r"answers: responses.\*, scores: scores.\*\}"):
        read([row])
    assert read([row], {"answers": "responses.*", "scores": "scores.*"})[0] == [("Q", "B", "W")]  # nobody has scored m
    listed = {"prompt": "Q", "responses": {"z": "B", "a": "W"}, "stars": [5, 1]}
    assert read([listed], {"answers": "responses.*", "scores": "stars"})[0] == [("Q", "B", "W")]  # as they stand
    with pytest.raises(UserError) as refused:
        read([listed])
    assert "responses.*" not in str(refused.value)


def test_a_choice_among_answers_of_a_column_of_that_name():
    rows = [
        {"prompt": "Q", "answers": ["B", "W"], "winner": "a"},
        {"prompt": "Q", "answers": ["W", "B"], "winner": "b"},
    ]
    assert read(rows, {"choice": {"winner": ["a", "b"]}})[0] == [("Q", "B", "W")] * 2
    with pytest.raises(UserError, match="2 values for 3 answers"):
        read(
            [{"prompt": "Q", "a1": "x", "a2": "y", "a3": "z", "p": 0}],
            {"answers": ["a1", "a2", "a3"], "choice": {"p": [0, 1]}},
        )


def test_what_is_left_out_by_columns_grades_nothing():
    rows = [{"prompt": "Q", "answers": ["B", "W"], "preference": -1, "choice": "a"}] * 3
    assert read(rows, {"choice": None})[0] == [("Q", "B", "W")] * 3
    both = {"prompt": "Q", "chosen": "c", "rejected": "r", "left": "W", "right": "B", "vote": "R"}
    assert read([both], {"answers": ["left", "right"], "choice": {"vote": ["L", "R"]}})[0] == [("Q", "B", "W")]


def test_an_answer_that_a_row_lacks_is_none_of_its_answers():
    rows = [
        {"prompt": "Q", "output_1": "B", "output_2": "W", "output_3": None if i else "x", "label": 1} for i in range(3)
    ]
    assert read(rows)[0] == [("Q", "B", "W"), ("Q", "B", "x"), ("Q", "B", "W"), ("Q", "B", "W")]
    with pytest.raises(BadRow, match="holds nothing"):
        read([rows[0], {**rows[1], "label": 3}])


def test_the_first_row_may_lack_its_question_and_an_answer_may_be_a_number(chatml):
    rows = [
        {"prompt": None, "chosen": "B", "rejected": "W"},
        *({"prompt": f"Q{i}", "chosen": "B", "rejected": "W"} for i in range(30)),
    ]
    _, report = tokenize(rows, chatml)
    assert report.dropped == {"column 'prompt' holds nothing (null)": [0]}
    two = [{"prompt": f"Q{i}", "response_1": "B", "response_2": "W" if i else 5, "label": 1} for i in range(30)]
    _, report = tokenize(two[1:] + two[:1], chatml)
    assert report.dropped == {"column 'answers' holds int": [29]}


def test_a_place_in_a_list_goes_before_numbers_of_something_else():
    rows = [
        {"prompt": "Q", "completions": ["x", "y", "z"], "temperatures": [0.1, 0.5, 1.0], "picked": i % 3}
        for i in range(6)
    ]
    with pytest.raises(UserError, match=r"answers: completions, choice: \{picked: \[0, 1, 2\]\}\}"):
        read(rows)
    with pytest.raises(UserError, match=r"choice: \{picked: \[0, 1, 2\]\}\}"):
        read(rows, {"answers": "completions", "choice": "picked"})
    lists = [{"question": "Q", "answers": {"a_id": ["1", "2"], "text": ["x", "y"], "score": [1, 5]}}]
    assert read(lists, {"prompt": "question", "answers": "answers.text", "scores": "answers.score"})[0] == [
        ("Q", "y", "x")
    ]
    assert read(lists)[0] == [("Q", "y", "x")]


def test_who_has_voted_is_no_answer_and_what_names_answers_goes_before_what_does_not():
    answers = {"question": "Q?", "physician_answer": "It is so.", "chatbot_answer": "It is not."}
    rows = [answers | {f"evaluator_{n}": vote for n in "123"} for vote in ("Physician", "Chatbot", "Similar")]
    with pytest.raises(UserError) as refused:
        read(rows)
    assert "answers: [evaluator" not in str(refused.value)
    answers = {"question": "Q?", "Reply 1": "It is so.", "Reply 2": "It is not."}
    rows = [
        answers | {"Which breaks the guide?": f"Reply {1 + i % 2}", "Reviewer": ("MK", "JL")[i % 2]} for i in range(4)
    ]
    with pytest.raises(UserError, match=r"choice: \{\"Which breaks the guide\?\": \[FIRST, SECOND\]\}"):
        read(rows)


def test_rejected_answers_with_numbers_are_several():
    row = {"prompt": "Q", "chosen": "B", "rejected_1": "W", "rejected_2": "x"}
    assert read([row])[0] == [("Q", "B", "W"), ("Q", "B", "x")]


def test_answers_that_nobody_has_scored_hide_no_form():
    rows = [{"prompt": "Q", "responses": ["x", "B", "W"], "scores": [None, 3, 1]}]
    assert read(rows)[0] == [("Q", "B", "W")]


def test_files_of_columns_and_of_other_marks_are_named_for_what_they_are(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"prompt": ["Q"], "chosen": ["B"], "rejected": ["W"]}))
    with pytest.raises(UserError, match="one object of columns, prompt, chosen, rejected, .*orient='records'"):
        read_rows(str(tmp_path / "a.json"))
    for mark in (";", "\t"):
        (tmp_path / "b.csv").write_text(f"prompt{mark}chosen{mark}rejected\nQ{mark}B{mark}W\n")
        with pytest.raises(UserError, match="line 1: columns are separated by .*, expected commas"):
            read_rows(str(tmp_path / "b.csv"))


def _columns(line):
    import yaml

    return yaml.safe_load(line.partition("=")[2].rpartition("}")[0] + "}")


@pytest.mark.parametrize("name", ["chosen", "rejected"])
@pytest.mark.parametrize(("first", "second"), [("A", "B"), ("model_1", "model_2"), ("so", "not so")])
def test_an_answer_that_names_another_column_is_a_choice_and_no_answer(name, first, second):
    rows = [{"prompt": "Q", name: said, first: "It is so.", second: "It is not so."} for said in (first, second)]
    with pytest.raises(UserError) as refused:
        recognise(Rows(rows), "dataset", single=True)
    line = str(refused.value).partition("Say so: ")[2].partition("; or")[0]
    better, worse = ("It is so.", "It is not so.")[:: 1 if name == "chosen" else -1]
    assert read(rows, _columns(line))[0] == [("Q", better, worse), ("Q", worse, better)]
    both = [row | {"chosen": first, "rejected": second} for row in rows]
    with pytest.raises(UserError, match="column 'chosen' holds .* which name other columns.*FIRST, SECOND"):
        recognise(Rows(both), "dataset")
    assert read(both, {"chosen": "chosen"})[0] == [("Q", first, second)] * 2  # a question of several choices


def test_answers_without_a_score_are_no_tie(chatml):
    row = {"q": "Q", "all": [{"t": "B", "s": 1}, {"t": "W", "s": 0}]}
    columns = {"prompt": "q", "answers": "all.*.t", "scores": "all.*.s"}
    _, report = tokenize([row, {**row, "all": [{"t": "B"}, {"t": "W"}]}], chatml, columns=columns)
    assert report.dropped == {"no score found": [1]}


def test_a_choice_whose_values_say_nothing_is_asked_for(chatml):
    columns = {"prompt": "q", "answers": ["x", "y"], "choice": "won"}
    with pytest.raises(
        UserError, match=r"columns.choice=won: its values, l, r, do not say .*choice: \{won: \[l, r\]\}"
    ):
        read([{"q": "Q", "x": "B", "y": "W", "won": "L"}, {"q": "Q", "x": "B", "y": "W", "won": "R"}], columns)
    with pytest.raises(UserError, match=r"columns.choice=loser: its name .* choice: \{loser: \[FIRST, SECOND\]\}"):
        read([{"q": "Q", "x": "B", "y": "W", "loser": "y"}], {**columns, "choice": "loser"})
    good = {"q": "Q", "x": "B", "y": "W", "won": "x"}
    with pytest.raises(
        UserError, match=r"row 1 \(from 0\): column 'choice' holds text, 'z', expected x or y, or a tie"
    ):
        tokenize([good, {**good, "won": "z"}], chatml, columns={**columns, "choice": {"won": ["x", "y"]}})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": ["q", "x"]}, "columns.prompt=.*no such column"),
        ({"prompt": "qq.text"}, "columns.prompt=qq.text: .*no such column. Did you mean q"),
        ({"answers": ["x", "z"]}, r"columns.answers=\['x', 'z'\]: .*no such column"),
        ({"choice": {"won": "x"}, "answers": ["x", "y"], "prompt": "q"}, "must be a column and the values"),
    ],
)
def test_a_line_that_does_not_fit_is_refused(columns, message):
    with pytest.raises(UserError, match=message):
        read([{"q": "Q", "x": "B", "y": "W", "won": "x"}], columns)


def test_a_policy_that_is_none_is_refused(chatml):
    for option in ("rejected", "on_bad_row"):
        with pytest.raises(UserError, match=rf"dataset.{option}='some': must be"):
            tokenize([{"prompt": "Q", "chosen": "B", "rejected": "W"}], chatml, **{option: "some"})


def test_the_tokens_of_a_choice_are_those_of_the_same_pair_written_out(chatml):
    rows, _ = PUBLISHED["LLMBar"]
    written, _ = one({"prompt": "Q", "chosen": "B", "rejected": "W"}, chatml)
    for pair in tokenize(rows, chatml)[0]:
        assert (pair.prompt, pair.chosen, pair.rejected) == (written.prompt, written.chosen, written.rejected)
    assert text(chatml, written.chosen) == "B<|im_end|>"


POINTERS = [  # of chosen and rejected, beside what holds the answers, and the line that says so, if there can be one
    ({"responses": {"A": "W", "B": "B"}}, "B", "A", "answers: [responses.A, responses.B], choice: {chosen: [A, B]}"),
    ({"responses": ["W", "B"]}, "1", "0", "answers: [responses.0, responses.1], choice: {chosen: [0, 1]}"),
    ({"responses": ["W", "B"]}, "2", "1", "answers: [responses.0, responses.1], choice: {chosen: [1, 2]}"),
    ({"outputs": [{"model": "gpt4", "text": "W"}, {"model": "llama", "text": "B"}]}, "llama", "gpt4", ""),
    ({"response_a": "W", "response_b": "B"}, "Response B", "Response A", "answers: [response_a, response_b]"),
]


@pytest.mark.parametrize(("beside", "chosen", "rejected", "line"), POINTERS)
def test_what_says_where_an_answer_is_is_no_answer(beside, chosen, rejected, line):
    rows = [{"prompt": "Q", **beside, "chosen": chosen, "rejected": rejected}]
    rows += [{"prompt": "R", **beside, "chosen": rejected, "rejected": chosen}]
    with pytest.raises(UserError, match="no answer") as refused:
        read(rows)
    said = str(refused.value)
    assert line in said and ("Write the answers themselves" in said) == (not line)
    if "responses" in beside:  # the line is right as it stands
        columns = yaml.safe_load(said.partition("columns=")[2].partition("; or,")[0])
        assert read(rows, columns)[0] == [("Q", "B", "W"), ("R", "W", "B")]


def test_an_answer_that_stands_in_a_list_of_all_is_an_answer():
    row = {"prompt": "Q", "all": [{"text": "W", "score": 1}, {"text": "B", "score": 2}], "chosen": "B", "rejected": "W"}
    assert read([row])[0] == [("Q", "B", "W")]


TWO_ANSWERS = {"prompt": "Q", "response_1": "one", "response_2": "two"}
GUESSED = [  # columns beside two answers, and what the line that is shown must say, and must not
    ([{"score_1": "9", "score_2": "10"}, {"score_1": "10", "score_2": "9"}], "scores: [score_1, score_2]", "choice"),
    ([{"label": 1}, {"label": 0}], "choice: {label: [FIRST, SECOND]}", "[0, 1]"),
    ([{"label": 1}, {"label": -1}], "choice: {label: [FIRST, SECOND]}", "[-1, 1]"),
    ([{"more_harmful": "A"}, {"more_harmful": "B"}], "choice: {more_harmful: [FIRST, SECOND]}", "[a, b]"),
    ([{"model_1": "m", "model_2": "n", "winner": "m"}, {"model_1": "n", "model_2": "m", "winner": "n"}],
     "[FIRST, SECOND]", "winner: [m, n]"),
    ([{"winner": "both bad"}, {"winner": "x"}, {"winner": "y"}], "choice: {winner: [x, y]}", "both bad"),
]  # fmt: skip


@pytest.mark.parametrize(("beside", "said", "unsaid"), GUESSED)
def test_a_line_that_is_shown_does_not_say_what_nobody_knows(beside, said, unsaid):
    with pytest.raises(UserError) as refused:
        read([{**TWO_ANSWERS, **row} for row in beside])
    line = str(refused.value).partition("say so: ")[2]
    assert said in line and unsaid not in line
