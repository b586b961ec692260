"""`tune data binarise`: pairs, ties, drops and flips are those of an independent count over the raw layouts."""

import json
import math
import random
import statistics

import pytest

from pairtune.cli.commands import main
from pairtune.making.binarise import WAYS, binarise, is_held_out
from pairtune.making.rated import read_rated
from pairtune.pairs.recognise import recognise
from pairtune.pairs.rows import Rows, read_rows

ASPECTS = ("helpfulness", "honesty", "instruction_following", "truthfulness")
ODD = ("N/A", None, "", "5 out of 5", math.nan)


def completion(rng, n):
    ratings = {a: {"Rating": str(rng.randint(1, 5)), "Rationale": "words"} for a in ASPECTS}
    for aspect in ASPECTS:
        if rng.random() < 0.15:
            ratings[aspect]["Rating"] = rng.choice(ODD)
        elif rng.random() < 0.05:
            del ratings[aspect]
    annotations = None if rng.random() < 0.03 else ratings
    response = rng.choice(["", "  \n"]) if rng.random() < 0.05 else f"answer {n} {rng.randint(0, 9)}"
    overall = rng.choice([1.0, 4.5, 6.0, 7.5, 8.0, 8.5, 10.0, None])
    return {"annotations": annotations, "model": f"m{n}", "response": response, "overall_score": overall,
            "critique": "words", "fine-grained_score": 3.25, "principle": "honesty"}  # fmt: skip


def ultrafeedback(count=400, seed=1):
    """Rows of openbmb/UltraFeedback's layout, with what it has of odd values."""
    rng = random.Random(seed)
    rows = []
    for n in range(count):
        size = rng.choice([0, 1, 4, 4, 4, 4, 4, 4])
        row = {"source": rng.choice(["evol_instruct", "flan"]), "instruction": f"question {n % (count - 20)}"}
        row |= {"models": [f"m{i}" for i in range(size)], "completions": [completion(rng, i) for i in range(size)]}
        if rng.random() < 0.1:
            for one in row["completions"]:
                one |= {key: row["completions"][0][key] for key in ("annotations", "overall_score")}
        rows.append(row | {"correct_answers": ["None"], "incorrect_answers": ["None"]})
    return rows


def rating(value):
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return None if math.isnan(number) else number


def score_of(answer, way):
    """An answer's score by Zephyr's or Notus's rule; None where it has none."""
    if way == "zephyr":
        return rating(answer["overall_score"])
    ratings = [rating((answer["annotations"] or {}).get(a, {}).get("Rating")) for a in ASPECTS]
    known = [value for value in ratings if value is not None]
    return statistics.fmean(known) if known else None


def usable(row, way):
    found = [(score_of(a, way), a["response"]) for a in row["completions"]]
    return [(score, text) for score, text in found if score is not None and text.strip()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("way", ["zephyr", "notus"])
def test_ultrafeedbacks_raw_layout_gives_the_pairs_ties_and_drops_of_a_count(tmp_path, capsys, way):
    rows = ultrafeedback()
    source = write(tmp_path / "raw.jsonl", rows)
    words = ["data", "binarise", str(source), "--way", way, "--output", str(tmp_path / "pairs.jsonl"), "--seed", "7"]
    assert main(words) == 0
    out, pairs = capsys.readouterr().out, {row["row"]: row for row in read(tmp_path / "pairs.jsonl")}
    few = ties = 0
    for number, row in enumerate(rows):
        answers = usable(row, way)
        if len(answers) < 2:
            few += 1
        elif len({score for score, _ in answers}) == 1:
            ties += 1
        else:
            best = max(score for score, _ in answers)
            pair = pairs.pop(number)
            first = next(text for score, text in answers if score == best)
            assert (pair["prompt"], pair["chosen"], pair["chosen_score"]) == (row["instruction"], first, best)
            worse = {text: score for score, text in answers if score < best}
            assert pair["rejected_score"] == pytest.approx(worse[pair["rejected"]]) and pair["source"] == row["source"]
            assert pair["chosen_model"] in row["models"]
    assert not pairs and few and ties
    made = len(rows) - few - ties
    assert f"{made} pairs of 400 questions" in out and f"{ties} all scores are equal" in out
    assert f"{few} fewer than two answers with a score" in out
    if way == "notus":
        missing = sum(
            rating((a["annotations"] or {}).get("honesty", {}).get("Rating")) is None
            for row in rows for a in row["completions"]
        )  # fmt: skip
        assert f"{missing} answers have no rating of honesty" in out
    again = tmp_path / "again.jsonl"
    main([*words[:-3], str(again), "--seed", "7"])
    other = tmp_path / "other.jsonl"
    main([*words[:-3], str(other), "--seed", "8"])
    assert again.read_bytes() == (tmp_path / "pairs.jsonl").read_bytes() != other.read_bytes()


def test_the_random_answer_is_each_of_the_worse_ones_as_often():
    scores = [2.0, 9.0, 4.0, 9.0, 4.0]
    answers = [{"response": f"a{n}", "annotations": {}, "overall_score": score} for n, score in enumerate(scores)]
    row = {"instruction": "q", "completions": answers}
    rated, _ = read_rated(Rows([row] * 3000))
    drawn = [pair["rejected"] for pair, _ in binarise(rated, WAYS["zephyr"], seed=1)]
    assert {answer: round(drawn.count(answer) / 1000, 1) for answer in set(drawn)} == {"a0": 1.0, "a2": 1.0, "a4": 1.0}


def test_flips_between_two_ways_are_those_of_a_count(tmp_path, capsys):
    rows = ultrafeedback(seed=3)
    source = write(tmp_path / "raw.jsonl", rows)
    words = ["data", "binarise", str(source), "--output", str(tmp_path / "pairs.jsonl"), "--against", "notus"]
    assert main(words) == 0
    compared = flipped = other = 0
    for pair in read(tmp_path / "pairs.jsonl"):
        completions = rows[pair["row"]]["completions"]
        means = {(a["response"], a["model"]): score_of(a, "notus") for a in completions}
        better = means[pair["chosen"], pair["chosen_model"]]
        worse = means[pair["rejected"], pair["rejected_model"]]
        if better is not None and worse is not None:
            compared, flipped = compared + 1, flipped + (better < worse)
            other += better < max(value for value in means.values() if value is not None)
    out = " ".join(capsys.readouterr().out.split())
    assert compared > 200 and flipped > 20
    assert f"the answers of {flipped} of {compared} pairs the other way round" in out
    assert f"another best answer in {other} (" in out


def test_questions_are_held_out_whole_and_about_as_many_as_asked(tmp_path, capsys):
    source = write(tmp_path / "raw.jsonl", ultrafeedback(1000))
    words = [
        "data",
        "binarise",
        str(source),
        "--way",
        "each",
        "--output",
        str(tmp_path / "p.jsonl"),
        "--held-out",
        "0.2",
    ]
    assert main(words) == 0
    trained = {row["prompt"] for row in read(tmp_path / "p.jsonl")}
    held_out = {row["prompt"] for row in read(tmp_path / "p.held_out.jsonl")}
    assert not trained & held_out and 0.15 < len(held_out) / (len(trained) + len(held_out)) < 0.25
    assert is_held_out("a  question\n", 0.5, 1) == is_held_out("a question", 0.5, 1)


HELPSTEER = [
    {"prompt": p, "response": f"{p}{n}", "helpfulness": h, "correctness": c, "coherence": 4, "complexity": 1,
     "verbosity": 1}
    for p, n, h, c in [("x", 1, 4, 0), ("x", 2, 1, 4), ("y", 1, 2, 2), ("y", 2, 2, 3), ("x", 3, 3, 3)]
]  # fmt: skip
OTHERS = {  # name: rows, words, (prompt, chosen, rejected) of each pair
    "HelpSteer's attributes": (
        HELPSTEER, ["--way", "best-worst", "--score", "helpfulness"], [("x", "x1", "x2")],
    ),
    "the mean of two of them": (
        HELPSTEER, ["--way", "best-all", "--score", "helpfulness,correctness"],
        [("x", "x3", "x2"), ("x", "x3", "x1"), ("y", "y2", "y1")],
    ),
    "Nectar's ranks": (
        [{"prompt": "\n\nHuman: q\n\nAssistant: ", "answers": [
            {"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}, {"answer": "c", "rank": 7.0}]}],
        ["--way", "best-worst"], [([{"role": "user", "content": "q"}], "a", "c")],
    ),
    "lists of scores, far enough apart": (
        [{"prompt": "q", "answers": ["a", "b", "c", "d"], "scores": [1, 2, 2.5, 4]}],
        ["--way", "each", "--margin", "1.5"], [("q", "d", "c"), ("q", "d", "b"), ("q", "d", "a"), ("q", "c", "a")],
    ),
    "prompts of pairs that were answered again": (
        [{"prompt": "q", "chosen": "x", "rejected": "y", "answers": ["a", "b"], "scores": [1, 2]}], [],
        [("q", "b", "a")],
    ),
    "columns by other names": (
        [{"ask": "q", "replies": ["a", "b"], "stars": [1, 2]}],
        ["columns={prompt: ask, answers: replies, scores: stars}"], [("q", "b", "a")],
    ),
    "answers that are the same": (
        [{"prompt": "q", "answers": ["a", "a", "b"], "scores": [3, 1, 2]}], ["--way", "best-all"], [("q", "a", "b")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_layouts_are_read_and_what_is_written_are_pairs(tmp_path, name):
    rows, words, expected = OTHERS[name]
    source, output = write(tmp_path / "raw.jsonl", rows), tmp_path / "pairs.jsonl"
    assert main(["data", "binarise", str(source), "--output", str(output), *words]) == 0
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in read(output)] == expected
    form, found = recognise(read_rows(str(output)), "dataset")  # as training does
    examples = [example for row in found for example in form.read(row)]
    assert [(example.chosen, example.rejected) for example in examples] == [pair[1:] for pair in expected]


@pytest.mark.parametrize(
    ("rows", "words", "said"),
    [
        (HELPSTEER, [], "--way: {source} has no score overall; its answers are scored by helpfulness, correctness"),
        (HELPSTEER, ["--score", "help"], "--score: {source} has no score help;"),
        ([{"prompt": "q", "chosen": "a", "rejected": "b"}], [], "hold no scores or ranks of several"),
        (HELPSTEER, ["--held-out", "1"], "--held-out 1: must be at least 0 and below 1"),
        (
            ultrafeedback(4),
            ["--held-out", "0.0001"],
            "none is held out, and a run refuses an empty file; give another --seed",
        ),
        (ultrafeedback(4), ["--against", "best"], "--against"),
        ([{"prompt": "q", "answers": ["a", "b"], "scores": [1, 1]}], [], "no pair can be made: 0 pairs of 1 questions"),
    ],
)
def test_what_cannot_be_binarised_is_told_in_a_sentence(tmp_path, capsys, rows, words, said):
    source = write(tmp_path / "raw.jsonl", rows)
    output = tmp_path / "pairs.jsonl"
    assert main(["data", "binarise", str(source), "--output", str(output), *words]) == 2
    assert said.format(source=source) in capsys.readouterr().err and not output.exists()
