"""`tune data sample` and `judge`: a stopped one goes on and ends the same; scores are a count's; pairs come of them."""

import fcntl
import json
import shutil
import sys
from itertools import combinations
from pathlib import Path

import pytest
from helpers import SIZES, save_llama

from pairtune.cli.commands import main
from pairtune.making.contrast import Contrast

sys.path.append(str(Path(__file__).parents[1] / "judge"))
from judge_server import serving  # noqa: E402

PROMPTS = [{"prompt": f"w{n} w{n + 1} w7", "topic": n} for n in range(5)]
HOW = ["--count", "3", "--batch-size", "6", "--max-new-tokens", "4", "dtype=fp32", "device=cpu"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def sampled(tmp_path_factory):
    """Three answers to each of five prompts, two prompts at a time."""
    folder = tmp_path_factory.mktemp("sample")
    save_llama(folder / "base", sizes=SIZES)
    write(folder / "prompts.jsonl", PROMPTS)
    assert draw(folder, folder / "s.jsonl") == 0
    return folder


def draw(folder, output, *words):
    files = ["--prompts", str(folder / "prompts.jsonl"), "--output", str(output)]
    return main(["data", "sample", str(folder / "base"), *files, *HOW, *words])


def test_each_prompt_gets_its_answers_and_another_seed_others(sampled, tmp_path, capsys):
    rows = read(sampled / "s.jsonl")
    assert [{name: row[name] for name in ("prompt", "topic")} for row in rows] == PROMPTS
    assert all(len(row["answers"]) == 3 for row in rows) and len({a for row in rows for a in row["answers"]}) > 10
    assert draw(sampled, tmp_path / "other.jsonl", "--seed", "1") == 0
    assert [row["answers"] for row in read(tmp_path / "other.jsonl")] != [row["answers"] for row in rows]
    assert "15 answers to 5 prompts" in capsys.readouterr().out


def test_a_stopped_one_goes_on_and_ends_the_same(sampled, tmp_path, capsys):
    whole = (sampled / "s.jsonl").read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for cut in (7, ends[0], ends[1] + 9, ends[2]):  # in a line, and within a batch of two prompts
        output = tmp_path / f"{cut}.jsonl"
        output.write_bytes(whole[:cut])
        assert draw(sampled, output) == 0 and output.read_bytes() == whole
    assert "2 prompts were answered there already" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--temperature", "0.5"], "line 1: was drawn with temperature 1.0, not 0.5; name another file: --output"),
        (["--temperature", "0"], "--count 3: with --temperature 0 all answers to a prompt are one"),
        (["--count", "0"], "--count 0: must be at least 1"),
        (["--prompts", "other"], "line 2: answers another prompt"),
        (["--prompts", "fewer"], "holds answers to 5 prompts, and 2 are asked"),
        (["--prompts", "long"], "prompt 2 of 2, of 201 tokens, leaves no room in the model's 128 positions"),
        (["--output", "held"], "another process writes there"),
        (["--output", "notes"], "line 1: is no row of drawn answers"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_and_left_alone(sampled, tmp_path, capsys, words, said):
    output = shutil.copy(sampled / "s.jsonl", tmp_path / "s.jsonl")
    write(tmp_path / "other", []).write_text("w0 w1 w7\nsomething else\nw2\nw3\nw4\n")
    (tmp_path / "fewer").write_text("w0 w1 w7\nw1 w2 w7\n")
    (tmp_path / "long").write_text("w0 w1 w7\n" + "w1 " * 200 + "\n")
    (tmp_path / "notes").write_text("my notes\n")
    shutil.copy(output, tmp_path / "held")
    with (tmp_path / "held").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        given = [words[0], str(tmp_path / words[1])] if words[0] in ("--prompts", "--output") else words
        assert draw(sampled, output, *given) == 2
    assert said in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


ANSWERS = [["a", "abc", "ab", "abc"], ["", "same"], ["x"], ["xy", "yx"]]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_judge.py").write_text("def length(answer):\n    return len(answer) if answer else None\n")
    rows = [{"prompt": f"q{n}", "answers": answers, "topic": n} for n, answers in enumerate(ANSWERS)]
    return write(tmp_path / "drawn.jsonl", rows)


def test_a_function_scores_each_answer_and_pairs_come_of_it(drawn, tmp_path, capsys):
    output = tmp_path / "scored.jsonl"
    assert main(["data", "judge", str(drawn), "--judge", "my_judge.length", "--output", str(output)]) == 0
    assert [row["scores"] for row in read(output)] == [[1, 3, 2, 3], [None, 4], [1], [2, 2]]
    assert read(output)[1]["topic"] == 1 and "1 without a verdict (the function gives none)" in capsys.readouterr().out
    words = ["data", "binarise", str(output), "--output", str(tmp_path / "pairs.jsonl"), "--way", "best-worst"]
    assert main(words) == 0
    (pair,) = read(tmp_path / "pairs.jsonl")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("q0", "abc", "a")
    out = capsys.readouterr().out
    assert "1 pairs of 4 questions" in out and "2 fewer than two answers with a score" in out
    assert "1 all scores are equal" in out


def test_where_a_judge_compares_each_two_meet_both_ways_round_and_nothing_is_asked_twice(drawn, tmp_path, capsys):
    with serving() as server:
        words = ["data", "judge", str(drawn), "--judge", server.address, "--judge-model", "tiny", "--output", "o.jsonl"]
        assert main([*words, "--judge-budget", "4"]) == 3
        assert "without a verdict" in capsys.readouterr().out
        assert main(words) == 0
        asked = len(server.asked)
        assert main(words) == 0 and len(server.asked) == asked
        different = [set(answers) for answers in ANSWERS]
        assert asked == 2 * sum(len(list(combinations(texts, 2))) for texts in different)
    expected = []
    for answers, texts in zip(ANSWERS, different, strict=True):
        beaten = [sum(len(a) > len(b) for b in texts) - sum(len(a) < len(b) for b in texts) for a in answers]
        expected.append(beaten)
    assert [row["scores"] for row in read(tmp_path / "o.jsonl")] == expected


# Two prompts that differ by a word


def test_the_neutral_prompt_lacks_the_word_and_has_examples_of_either_side():
    template = 'Write a {word} review of "{item}".\nExample 1: {example}\nExample 2: {example}\n{word} review:'
    how = Contrast(template, ("negative", "positive"), (("Bad {item}.", "Good."), ("Poor.", "New.")))
    asks = 'Write a negative review of "{word} x".\nExample 1: Bad {item}.\nExample 2: Poor.\nnegative review:'
    assert how.asks("{word} x", 0) == asks  # what an item says is no place
    assert how.asks("x", 1) == 'Write a positive review of "x".\nExample 1: Good.\nExample 2: New.\npositive review:'
    assert how.neutral("x") == 'Write a review of "x".\nExample 1: Bad {item}.\nExample 2: New.\nreview:'


def test_a_pair_has_the_answers_to_both_prompts_under_the_neutral_one(sampled, tmp_path, capsys):
    (tmp_path / "items").write_text("w3 w4\nw5\nw3 w4\n\nw6\n")
    files = ["--items", str(tmp_path / "items"), "--output", str(tmp_path / "pairs.jsonl")]
    words = ["data", "contrast", str(sampled / "base"), *files, "--template", "w1 {word} w2 {item}"]
    words += ["--chosen", "w8", "--rejected", "w9", *HOW[2:]]
    assert main(words) == 0
    pairs, drawn = read(tmp_path / "pairs.jsonl"), read(tmp_path / "pairs.drawn.jsonl")
    assert [row["prompt"] for row in drawn][:3] == ["w1 w8 w2 w3 w4", "w1 w9 w2 w3 w4", "w1 w8 w2 w5"]
    answers = [row["answers"][0] for row in drawn]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in pairs] == [
        (f"w1 w2 {item}", chosen, rejected)
        for item, chosen, rejected in zip(["w3 w4", "w5", "w6"], answers[::2], answers[1::2], strict=True)
    ]
    assert "3 pairs of 3 items" in capsys.readouterr().out
    assert main([*words, "--held-out", "0.5"]) == 0  # of the same answers: nothing is drawn again
    both = read(tmp_path / "pairs.jsonl") + read(tmp_path / "pairs.held_out.jsonl")
    assert sorted(both, key=str) == sorted(pairs, key=str)
    for template, said in (("w1 {word}", "has no {item}"), ("w1 {item}", "has no {word}"),
                           ("{word} {item} {example}", "1 places of an {example}, and there are 0")):  # fmt: skip
        assert main([template if word == "w1 {word} w2 {item}" else word for word in words]) == 2
        assert said in capsys.readouterr().err
    (tmp_path / "items").write_text("w3 w4\n" + "w5 " * 200 + "\n")
    assert main([word.replace("pairs.jsonl", "long.jsonl") for word in words]) == 2
    assert "prompt 2 of 4, of 20" in capsys.readouterr().err
    assert not (tmp_path / "long.drawn.jsonl").exists()
