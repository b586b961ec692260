"""A judge is asked both ways round, once, whatever the line does; and what it says comes to a rate with an interval."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter

import pytest
from helpers import ENVIRONMENT, save_tokenizer
from judge_server import NO_COMPLETION, completion, elsewhere, longer, serving, slow

from pairtune.cli import main
from pairtune.errors import UserError
from pairtune.hub import endpoint
from pairtune.hub.endpoint import Limits
from pairtune.hub.replies import Kept
from pairtune.making.judge import Verdict, WinRate, open_judge, scores, verdicts, win_rates
from pairtune.making.judge.endpoint import Asking

KEY = "sk-a-secret-0123456789"
ROWS = [{"prompt": f"question {n}"} for n in range(8)]
# The first model's answers are of 2 letters; the other's longer, shorter, of the same length, or the same.
COLUMNS = {"base": ["ab"] * 8, "tuned": ["abc", "abcd", "abcde", "abcdef", "a", "b", "cd", "ab"]}
WINS, LOSSES, TIES, ASKED = 4, 2, 2, 7


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0,) * 7)
    for name in ("OPENAI_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JUDGE_API_KEY", KEY)


def judge_of(server, path, **limits):
    return open_judge(server.address, Asking("tiny", Kept(path), limits=Limits(**limits)))


def counts(rate):
    return rate.wins, rate.losses, rate.ties


@pytest.fixture
def answers(tmp_path):
    lines = [{"prompt": row["prompt"], **{m: c[n] for m, c in COLUMNS.items()}} for n, row in enumerate(ROWS)]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "answers.jsonl"


def command(server, answers, *more):
    files = ["--answers", str(answers), "--verdicts", str(answers.parent / "verdicts.jsonl")]
    return ["compare", *files, "--judge", server.address, "--judge-model", "tiny", *more]


def test_each_pair_is_asked_both_ways_round_and_ties_count(tmp_path):
    with serving() as server:
        judge = judge_of(server, tmp_path / "v.jsonl")
        rate = win_rates(judge, ROWS, COLUMNS)["tuned"]
    assert counts(rate) == (WINS, LOSSES, TIES) and rate.share == (WINS + TIES / 2) / 8
    ways = [(way, way[::-1]) for way in zip(COLUMNS["tuned"], COLUMNS["base"], strict=True) if way[0] != way[1]]
    assert Counter(server.judged) == Counter(way for both in ways for way in both)  # equal answers: nobody is asked
    assert (rate.turned, len(rate.both_ways), rate.shown_first) == (0, ASKED, (6, 12))
    assert server.headers["Authorization"] == f"Bearer {KEY}"
    assert {(body["model"], body["temperature"]) for body in server.asked} == {("tiny", 0)}
    assert KEY not in (tmp_path / "v.jsonl").read_text()


def test_a_judge_that_always_names_the_first_one_decides_nothing(tmp_path):
    with serving(lambda first, second: "first") as server:
        rate = win_rates(judge_of(server, tmp_path / "v.jsonl"), ROWS, COLUMNS)["tuned"]
    assert counts(rate) == (0, 0, 8) and rate.share == 0.5
    assert rate.turned == ASKED and rate.shown_first == (2 * ASKED, 2 * ASKED)


ODD = [*NO_COMPLETION, *(completion(text) for text in ("I cannot say.", '{"winner": "both"}', ""))]
ODD += [completion("", refusal="no"), completion("", content=None), completion("", content=[{"text": "Hm"}])]


@pytest.mark.parametrize("at_once", [1, 4])
def test_whatever_the_endpoint_does_meanwhile_nothing_is_lost_or_asked_twice(tmp_path, capsys, at_once):
    with serving(odd=ODD) as server:
        server.only_when_new = True
        judge = judge_of(server, tmp_path / "v.jsonl", at_once=at_once)
        columns = {name: [f"{n} {text}" for n in range(3) for text in column] for name, column in COLUMNS.items()}
        rate = win_rates(judge, ROWS * 3, columns)
    assert counts(rate["tuned"]) == (3 * WINS, 3 * LOSSES, 3 * TIES)
    assert Counter(server.judged).most_common(1)[0][1] == 1 and len(server.judged) == 3 * 2 * ASKED
    said = capsys.readouterr().err
    assert "judge: 429: asking again in 0 s" in said and KEY not in said


def test_a_reply_that_does_not_come_is_asked_for_again(tmp_path):
    with serving(odd=[slow]) as server:
        judge = judge_of(server, tmp_path / "v.jsonl", timeout_s=0.2, at_once=1)
        (found,) = verdicts(judge, [(ROWS[0], "abc", "ab")])
    assert found.value == 1 and len(server.asked) == 3
    assert "no reply in time" in (tmp_path / "v.jsonl").read_text()


def test_what_is_refused_every_time_has_no_verdict_and_is_not_asked_again(tmp_path):
    with serving(odd=[completion("", refusal="no")] * 3) as server:
        judge = judge_of(server, tmp_path / "v.jsonl", at_once=1)
        rate = win_rates(judge, ROWS, COLUMNS)["tuned"]
        judge.kept.close()
        again = win_rates(judge_of(server, tmp_path / "v.jsonl"), ROWS, COLUMNS)["tuned"]
    assert counts(rate) == counts(again) == (WINS - 1, LOSSES, TIES)
    assert rate.missing == {"refused": 1} and len(server.asked) == 2 * ASKED + 2


def test_a_budget_holds_over_calls_and_the_next_one_goes_on(answers, capsys):
    with serving() as server:
        for budget, sent in (("3", 3), ("3", 3), ("5", 5), ("100", 2 * ASKED)):
            assert main(command(server, answers, "--judge-budget", budget)) == 0
            assert len(server.asked) == len(server.judged) == sent
            out = capsys.readouterr().out
            assert ("a larger one asks the rest" in out) == (budget != "100")
    assert f"{WINS}     {TIES}       {LOSSES}     62.5%  25.9% to 89.8%" in out
    assert "1 of the ties are equal answers" in out and "contradicts itself on 0 of 7 pairs" in out
    assert f"{2 * ASKED} requests, {20 * ASKED} tokens" in out


def test_only_what_was_under_way_is_asked_again_when_it_is_killed(answers):
    """A SIGKILL before a reply, again and again; once within a line that is written."""
    kills, process = [3, 1, 4], None

    def kill(handler):
        process.send_signal(signal.SIGKILL)
        process.wait()

    with serving() as server:
        for replies in kills:
            server.odd = [*[None] * replies, kill]
            words = command(server, answers, "--judge-at-once", "1")
            process = subprocess.Popen([sys.executable, "-m", "pairtune.cli", *words], env=ENVIRONMENT)
            assert process.wait(60) == -signal.SIGKILL
        with (answers.parent / "verdicts.jsonl").open("a") as file:
            file.write('{"key": "cut of')
        server.odd = []
        assert main(command(server, answers)) == 0
    assert len(server.judged) == len(set(server.judged)) == 2 * ASKED
    assert len((answers.parent / "verdicts.jsonl").read_text().splitlines()) == 2 * ASKED


def test_an_endpoint_that_gives_up_keeps_what_it_said(answers, capsys):
    with serving(odd=[None, None, None, *[429] * 100]) as server:
        assert main(command(server, answers, "--judge-at-once", "1")) == 2
        error = capsys.readouterr().err
        assert "answers 429 again and again: busy, Bearer ***; what was judged is in" in error and KEY not in error
        server.odd = []
        assert main(command(server, answers)) == 0
    assert len(server.judged) == 2 * ASKED


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        (401, "it does not take the key: set JUDGE_API_KEY"),
        (404, "are the address, which as a rule ends in /v1, and --judge-model right?"),
        (elsewhere, "answers 302"),
        (400, "--judge-body sets what else is sent"),
    ],
)
def test_what_no_further_try_mends_is_told_at_once(answers, capsys, odd, said):
    with serving(odd=[odd] * 20) as server:
        assert main(command(server, answers, "--judge-at-once", "1")) == 2
    error = capsys.readouterr().err
    assert said in error and KEY not in error and len(server.asked) == 1


def test_a_question_that_is_refused_for_itself_keeps_no_call_from_going_on(answers, capsys):
    with serving(odd=[None, 400, None, 400]) as server:
        for budget in ("2", "100"):
            assert main(command(server, answers, "--judge-at-once", "1", "--judge-budget", budget)) == 0
        assert len(server.judged) == 2 * ASKED - 1
    assert "answered with 400" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reply", "text", "wrong"),
    [
        (completion("", content=None, finish="length", reasoning_content="Well,"), "", endpoint.THINKS),
        (completion(" \n", finish="length"), " \n", endpoint.THINKS),
        (completion("<think>Well,</think>\n", finish="length"), "<think>Well,</think>\n", endpoint.THINKS),
        (completion("<think>Well,</think>\n\n Yes"), "Yes", ""),
        (completion("<think>Well,"), "<think>Well,", endpoint.THINKS),
        (completion("", content=None), "", ""),
        (completion("<think>Well,</think>Yes", finish="length"), "Yes", endpoint.CUT),
        (completion("", content=[{"type": "text", "text": "a"}, {"type": "image"}]), "a", ""),
        *((completion("", content=odd), None, endpoint.NO_COMPLETION) for odd in (5, 0, False, {}, ["a"])),
        (completion("", content=[{"type": "text", "text": None}]), None, endpoint.NO_COMPLETION),
        (b"[" * 100_000, None, endpoint.NO_COMPLETION),
    ],
)
def test_what_a_reply_says_or_why_it_says_nothing(reply, text, wrong):
    said, _, why = endpoint.read_completion(reply)
    assert why == wrong and said == (reply.decode()[:2000] if text is None else text)


def test_nobody_at_the_address_is_told_at_once(answers, capsys):
    with serving() as server:
        pass
    assert main(command(server, answers)) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_a_rubric_of_ones_own_compares_or_scores(answers, capsys):
    rubric = answers.parent / "rubric.txt"
    rubric.write_text("{prompt} {x} {\n[First answer]\n{first}\n\n[Second answer]\n{second}\n\n[End]")
    with serving() as server:
        how = ["--judge-at-once", "1", "--judge-body", '{"temperature": null}']
        assert main(command(server, answers, "--rubric", str(rubric), *how)) == 0
        assert server.asked[0]["messages"][0]["content"].startswith("question 0 {x} {\n[First answer]\nabc\n")
        assert server.asked[0].keys() == {"model", "messages"}
        rubric.write_text("How good is {answer} to {prompt}?")
        server.odd = [completion(f'{{"score": {n}}}') for n in (8, 6.5)]
        asking = Asking("tiny", Kept(answers.parent / "s.jsonl"), rubric.read_text(), Limits(at_once=1))
        (found,) = verdicts(open_judge(server.address, asking), [(ROWS[0], "x", "y")])
    assert found == Verdict(1.0, scores=(8.0, 6.5))


def test_two_processes_do_not_keep_verdicts_in_one_file(tmp_path):
    kept = Kept(tmp_path / "v.jsonl")
    with pytest.raises(UserError, match="another process keeps verdicts there"):
        Kept(tmp_path / "v.jsonl")
    kept.close()


# Functions and reward models

MINE = """
def exact(answer, row):
    return answer == row["expected"]

def longer(prompt, first, second):
    return len(first) - len(second)

def fails(answer):
    raise KeyError("x")

def odd(answer, other):
    return 1

def says(answer):
    return "good"

def writes(answer):
    return "0.5"

def none(answer):
    return None
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"judges_{os.getpid()}_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


def test_a_function_of_ones_own_judges(answers, mine, capsys):
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    rows = [{**row, "row": {"expected": "ab" if n < 3 else "cd"}} for n, row in enumerate(rows)]
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["compare", "--answers", str(answers), "--judge", f"{mine}.exact"]) == 0
    out = capsys.readouterr().out
    assert "tuned            1     4       3     37.5%" in out
    assert "tuned: mean score 0.125, against 0.375" in out and "contradicts" not in out
    rate = win_rates(open_judge(f"{mine}.longer"), ROWS, COLUMNS)["tuned"]
    assert counts(rate) == (WINS, LOSSES, TIES) and rate.turned == 0
    assert win_rates(open_judge(f"{mine}.none"), ROWS, COLUMNS)["tuned"].missing == {"the function gives none": 8}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("odd", "takes answer, other; a judge takes answer, or first and second"),
        ("fails", "KeyError: 'x' ("),
        ("says", "returned 'good'; a judge returns a number, higher is better, or None"),
        ("writes", "returned '0.5'; a judge returns a number, higher is better, or None"),
        ("missing", "cannot be imported: AttributeError"),
    ],
)
def test_a_function_that_is_no_judge_is_told(answers, mine, capsys, name, said):
    assert main(["compare", "--answers", str(answers), "--judge", f"{mine}.{name}"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize("kind", ["Llama", "Bert"])
def test_a_reward_model_scores_as_it_does_in_transformers(tmp_path, kind):
    """Each row alone there, without padding: by its last token, or, as a pair of texts, with their types."""
    import torch
    import transformers

    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 24, "num_labels": 1}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    peer = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    for parameter in peer.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    peer.config.pad_token_id = None
    peer.save_pretrained(tmp_path)
    save_tokenizer(tmp_path, 320)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    if kind == "Llama":
        settings["chat_template"] = "{% for m in messages %}{{ m['content'] + ' </s> ' }}{% endfor %}"
    else:
        settings["model_input_names"] = ["input_ids", "token_type_ids", "attention_mask"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    rows, columns = [{"prompt": "w5 w6"}, {"prompt": "w9"}, {"prompt": "w3"}], {
        "base": ["w7 w8 w9", "w12", "w4"], "tuned": ["w8", "w13 w14 w15 w16 w17", "w5 " * 30]
    }  # fmt: skip
    judge = open_judge(str(tmp_path))
    rate = win_rates(judge, rows, columns)["tuned"]

    def alone(prompt, answer):
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        told = (f"{prompt} </s> {answer} </s> ",) if kind == "Llama" else (prompt, answer)
        with torch.no_grad():
            inputs = tokenizer(*told, return_tensors="pt", add_special_tokens=kind == "Bert")
            return peer(**inputs).logits.item()

    found = scores(judge, [(row, columns[m][n]) for m in columns for n, row in enumerate(rows[:2])])
    expected = [alone(row["prompt"], columns[m][n]) for m in columns for n, row in enumerate(rows[:2])]
    torch.testing.assert_close(torch.tensor([s.value for s in found]), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    better = [tuned > base for base, tuned in zip(expected[:2], expected[2:], strict=True)]
    assert (rate.wins, rate.losses) == (sum(better), 2 - sum(better))
    assert rate.missing == {"longer than the reward model's 24 positions": 1}


# Rates


@pytest.mark.parametrize(("wins", "ties"), [(0.5, 0.0), (0.7, 0.0), (0.93, 0.0), (0.4, 0.3), (0.1, 0.8)])
@pytest.mark.parametrize("count", [12, 80])
def test_the_interval_holds_the_true_win_rate_as_often_as_it_says(wins, ties, count):
    """Of 400 made-up tables with a known win rate: 95 % of them, and more where answers tie or tables are small."""
    rng, held, tables = random.Random(f"{wins} {ties} {count}"), 0, 400
    for _ in range(tables):
        drawn = rng.choices((1.0, 0.0, -1.0), (wins, ties, 1 - wins - ties), k=count)
        rate = WinRate([Verdict(value, value) for value in drawn])
        assert rate.wins + rate.ties + rate.losses == count
        low, high = rate.interval
        held += low <= wins + ties / 2 <= high
    assert 0.94 <= held / tables <= (1.0 if ties or count == 12 else 0.985)


@pytest.mark.parametrize(
    ("forward", "backward", "value", "turned"),
    [
        (1, 1, 1, False),
        (1, 0, 1, False),
        (0, 0, 0, False),
        (1, -1, 0, True),
        (-1, 0, -1, False),
        (None, 1, None, False),
    ],
)
def test_a_pair_is_won_by_what_both_ways_say_together(forward, backward, value, turned):
    verdict = Verdict(forward, backward)
    assert verdict.value == value and verdict.turned == turned
    assert longer("ab", "a") == "first"
