"""`tune data sample https://...`: each answer by its own seed; no reply is lost or asked for again."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from helpers import ENVIRONMENT

from pairtune.cli.commands import main
from pairtune.hub import endpoint

sys.path.append(str(Path(__file__).parents[1] / "judge"))
from judge_server import NO_COMPLETION, completion, drawn, serving  # noqa: E402

KEY = "sk-a-secret-9876543210"
PROMPTS = [{"prompt": f"q{n}", "topic": n} for n in range(4)]
PROMPTS += [{"prompt": [{"role": "user", "content": "hm"}, {"role": "assistant", "content": "?"},
                        {"role": "user", "content": "q\u2028 4"}]}]  # fmt: skip
COUNT, ANSWERS = 3, 15


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "WAITS", (0,) * 7)
    for name in ("OPENAI_API_KEY", "JUDGE_API_KEY", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SAMPLE_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return tmp_path


def words(server, *more, output="a.jsonl"):
    files = ["--prompts", "prompts.jsonl", "--output", output]
    return ["data", "sample", server.address, "--model", "tiny", *files, "--count", str(COUNT), *more]


def read(name="a.jsonl"):
    return [json.loads(line) for line in Path(name).read_text().split("\n")[:-1]]


def test_each_answer_has_a_seed_that_is_sent_and_kept(capsys):
    with serving() as server:
        assert main(words(server, "--top-p", "0.9", "--temperature", "0.7", "--system", "Be brief.")) == 0
        rows, sent = read(), {body["seed"]: body for body in server.asked}
    assert len(sent) == len(server.asked) == ANSWERS and max(sent) < 2**31
    assert server.headers["Authorization"] == f"Bearer {KEY}"
    assert [{name: row[name] for name in asked} for row, asked in zip(rows, PROMPTS, strict=True)] == PROMPTS
    for row, asked in zip(rows, PROMPTS, strict=True):
        prompt = (
            asked["prompt"] if isinstance(asked["prompt"], list) else [{"role": "user", "content": asked["prompt"]}]
        )
        messages = [{"role": "system", "content": "Be brief."}, *prompt]
        how = {"model": "tiny", "messages": messages, "temperature": 0.7, "top_p": 0.9, "max_tokens": 512}
        assert [sent[seed] for seed in row["drawn"]["seeds"]] == [{**how, "seed": n} for n in row["drawn"]["seeds"]]
        assert row["answers"] == [drawn(sent[seed]) for seed in row["drawn"]["seeds"]]
        assert (row["drawn"]["temperature"], row["drawn"]["endpoint"]) == (0.7, server.address)
    equal = sum(COUNT - len(set(row["answers"])) for row in rows)
    out = capsys.readouterr().out
    assert f"15 answers to 5 prompts\n  {equal} answers are equal" in out and "15 requests, 150 tokens" in out
    assert not [path for path in Path().iterdir() if KEY in path.read_text()]


@pytest.mark.parametrize("at_once", ["1", "4"])
def test_whatever_the_endpoint_does_meanwhile_nothing_is_lost_or_drawn_twice(capsys, at_once):
    refusals = [completion("", refusal="no"), completion("Well,", finish="content_filter")]
    refusals += [completion("<think>They ask me", finish="length")]
    with serving() as server:
        assert main(words(server, output="straight.jsonl")) == 0
        server.drawn.clear()
        server.asked.clear()
        server.odd, server.only_when_new = [*NO_COMPLETION, *refusals], True
        assert main(words(server, "--at-once", at_once)) == 0
    assert Path("a.jsonl").read_bytes() == Path("straight.jsonl").read_bytes()
    assert Counter(body["seed"] for body in server.drawn).most_common(1)[0][1] == 1 and len(server.drawn) == ANSWERS
    said = capsys.readouterr()
    (again,) = [line for line in said.out.split("\n") if line.startswith("asked again: ")]
    for told in (
        "4 (the reply is no chat completion)",
        "2 (429)",
        "2 (refused)",
        "1 (500)",
        "1 (cut short within its thoughts)",
        "2 (the line is cut (Conn",
    ):
        assert told in again
    assert "sample: 503: asking again in 0 s" in said.err
    assert KEY not in said.err + said.out


def test_a_budget_holds_over_calls_and_the_next_one_goes_on(capsys):
    with serving() as server:
        assert main(words(server, output="straight.jsonl")) == 0
        for budget, sent, whole in (("4", 4, 1), ("4", 4, 1), ("8", 8, 2), ("100", 15, 5)):
            assert main(words(server, "--budget", budget, "--at-once", "1")) == (3 if whole < 5 else 0)
            out = capsys.readouterr().out
            assert len(server.asked) == ANSWERS + sent and len(read()) == whole
            assert (f"{5 - whole} more prompts are left" in out) == (whole < 5)
            assert (f"--budget {budget} is used; the same command with a larger one" in out) == (whole < 5)
        assert Path("a.jsonl").read_bytes() == Path("straight.jsonl").read_bytes()
        Path("a.replies.jsonl").unlink()
        assert main(words(server)) == 0 and len(server.asked) == 2 * ANSWERS  # the rows are there


def test_a_server_that_moves_is_gone_on_with_and_rows_say_who_drew_them():
    with serving() as first:
        assert main(words(first, "--budget", "4", "--at-once", "1")) == 3
    with serving() as second:
        assert main(words(second)) == 0 and len(second.asked) == ANSWERS - 4
    both = [first.address, f"{first.address}, {second.address}", *[second.address] * 3]
    assert [row["drawn"]["endpoint"] for row in read()] == both


def test_a_prompt_that_is_refused_for_itself_keeps_no_call_from_going_on(capsys):
    with serving(odd=[None] * 4) as server:
        assert main(words(server, "--budget", "3", "--at-once", "1")) == 3
        server.odd = [400] * 3  # of the second row, which is too long for it
        assert main(words(server, "--at-once", "1")) == 0
    assert [len(row["answers"]) for row in read()] == [COUNT, 0, COUNT, COUNT, COUNT]
    assert "3 are missing" in capsys.readouterr().out


def test_only_what_was_under_way_is_asked_again_when_it_is_killed():
    """A SIGKILL before a reply, and once within a line that is written."""
    process = None

    def kill(handler):
        process.send_signal(signal.SIGKILL)
        process.wait()

    with serving() as server:
        for replies in (5, 4):
            server.odd = [*[None] * replies, kill]
            command = [sys.executable, "-m", "pairtune.cli", *words(server, "--at-once", "1")]
            process = subprocess.Popen(command, env=ENVIRONMENT)
            assert process.wait(60) == -signal.SIGKILL
        with Path("a.replies.jsonl").open("a") as file:
            file.write('{"key": "cut of')
        server.odd = []
        assert main(words(server)) == 0
        seeds = [body["seed"] for body in server.drawn]
        assert len(seeds) == len(set(seeds)) == ANSWERS
        assert main(words(server, output="straight.jsonl")) == 0
    assert Path("a.jsonl").read_bytes() == Path("straight.jsonl").read_bytes()


def test_what_is_refused_every_time_is_left_out_and_told(capsys):
    with serving(odd=[None, *[completion("", refusal="no")] * 3]) as server:
        assert main(words(server, "--at-once", "1")) == 0
        (first, *others), asked = read(), len(server.asked)
        assert main(words(server)) == 0 and len(server.asked) == asked == ANSWERS + 2
    seeds = [body["seed"] for body in server.asked]
    assert first["drawn"]["seeds"] == [seeds[0], seeds[4]] and first["answers"][1] == drawn(server.asked[4])
    assert {len(row["answers"]) for row in others} == {COUNT}
    assert "1 are missing: refused, or not given in 3 tries" in capsys.readouterr().out


def test_an_endpoint_that_takes_no_seed_is_asked_as_often(capsys):
    with serving() as server:
        assert main(words(server, "--body", '{"seed": null, "top_k": 40}')) == 0
    assert len(server.drawn) == ANSWERS and len({json.dumps(body) for body in server.asked}) == len(PROMPTS)
    assert all(body["top_k"] == 40 and "seed" not in body for body in server.asked)
    assert [row["answers"] for row in read()][:2] == [["q0 w3"] * 3, ["q1 w3"] * 3] and "seeds" not in read()[0][
        "drawn"
    ]
    assert "10 answers are equal to another one" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--adapter", "folder"], "--adapter: has no effect on an endpoint; leave it out"),
        (["--base-dtype", "nf4"], "--base-dtype: has no effect on an endpoint"),
        (["--batch-size", "8"], "--batch-size: has no effect on an endpoint"),
        (["--top-k", "40"], """--top-k: has no effect on an endpoint; --body '{"top_k": 40}' sends it to one that"""),
        (["dtype=fp32"], "dtype=fp32: has no effect beside an endpoint"),
        (["runs/other"], "runs/other: has no effect beside an endpoint"),
        (["--temperature", "0"], "--count 3: with --temperature 0 all answers to a prompt are one"),
        (["--budget", "0"], "--budget 0: must be at least 1"),
        (["--timeout", "nan"], "--timeout nan: must be above 0"),
        (["--body", '{"seed": 1}'], "--body: seed is set by --seed; null leaves it out: '{\"seed\": null}'"),
        (["--body", '{"n": 4}'], "none of them model, messages, stream or n"),
        (["--replies", "prompts.jsonl"], "prompts.jsonl, line 1: is no answer that was kept; name another file"),
        (["--replies", "verdicts.jsonl"], "verdicts.jsonl, line 1: is no answer that was kept"),
        (["--model", "other", "--output", "other.jsonl"], "was drawn with model tiny, not other; name another file"),
    ],
)
def test_what_an_endpoint_cannot_be_asked_for_is_told_before_it_is_asked(folder, capsys, more, said):
    Path("verdicts.jsonl").write_text('{"key": "k", "value": 1.0}\n')
    with serving() as server:
        assert main(words(server, output="other.jsonl")) == 0
        before = len(server.asked)
        assert main(words(server, *more)) == 2 and len(server.asked) == before
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["folder", "--budget", "3"], "--budget: has no effect but on an endpoint"),
        (["http://127.0.0.1:9/v1"], "an endpoint is told which of its models answers: --model NAME"),
        (["http://me:pw@host/v1", "--model", "m"], "a key is read from SAMPLE_API_KEY in the environment"),
        (["ftp://host/v1", "--model", "m"], "ftp://host/v1: is no address"),
    ],
)
def test_what_names_no_endpoint_is_told(capsys, given, said):
    assert main(["data", "sample", *given, "--prompts", "prompts.jsonl", "--output", "a.jsonl"]) == 2
    error = capsys.readouterr().err
    assert said in error and "pw" not in error
