"""`tune data` finds what is wrong with rows, and each finding is that of rows in which it was put."""

import json
import random

import pytest
from test_data import write_jsonl

from pairtune.cli.commands import main
from pairtune.pairs.glance import glance
from pairtune.pairs.lint import look
from pairtune.pairs.near import SHINGLE, near_duplicates
from pairtune.pairs.packed import PackedPairs
from pairtune.pairs.pair import Pair
from pairtune.pairs.rows import Rows

WORDS = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in "lmnr"]


def words(rng, count):
    return " ".join(rng.choices(WORDS, k=count))


@pytest.fixture
def rows():
    """60 rows without a fault, all unlike."""
    rng = random.Random(0)
    return [{"prompt": words(rng, 12), "chosen": words(rng, 20), "rejected": words(rng, 15)} for _ in range(60)]


def found(rows, held_out=None):
    """Returns the rows of each finding that has any, and the page."""
    looked = look(Rows(rows), "dataset", held_out=held_out and Rows(held_out))
    return {finding.title: finding.rows for finding in looked.findings if finding.rows}, looked


def test_rows_without_a_fault_are_said_to_have_none(rows):
    findings, looked = found(rows)
    assert not findings and not looked.has_faults
    assert '"choose the longer" is right in 100.0% of 60 pairs' in str(looked)
    assert "none: an answer is empty, both answers are the same, duplicates" in str(looked)


def test_each_fault_is_found_in_the_rows_that_have_it(rows):
    rows[10] = {**rows[3], "prompt": rows[3]["prompt"].upper() + "  "}
    rows[12] = {"prompt": rows[5]["prompt"], "chosen": rows[5]["rejected"], "rejected": rows[5]["chosen"]}
    rows[13] = {**rows[6], "chosen": rows[6]["chosen"] + " bal"}
    rows[14]["chosen"], rows[40]["rejected"] = "I'm sorry, but I cannot help with that.", "As an AI, no."
    rows[15]["rejected"], rows[16]["rejected"] = " ", rows[16]["chosen"].title()
    rows[17]["prompt"], rows[18]["prompt"] = "Что это такое?", "Wie ist das Wetter und was ist mit den Kindern?"
    rows[19]["chosen"], rows[20]["chosen"], rows[21]["rejected"] = "Yes.<|im_end|>", "ha " * 300, 5
    findings, looked = found(rows)
    assert findings == {
        "cannot be read: column 'rejected' holds int": [21],
        "an answer is empty": [15],
        "both answers are the same": [16],
        "duplicates of an earlier pair": [10],
        "contradict an earlier pair": [12],
        "near-duplicates of an earlier pair": [13],
        "special tokens in text": [19],
        "an answer in another script than its prompt": [17],
    }
    page = str(looked)
    assert "refusals (in English): 1 chosen, 1 rejected" in page and "apologies (in English): 1 chosen, 0 rej" in page
    assert "German" in page and "Cyrillic 1.7 %" in page and looked.has_faults
    assert {15, 20} <= {text.row for _, text in looked.odd} and len(looked.odd) == 10
    assert page.count("\n  row ") == 20


def test_rows_of_several_pairs_are_counted_once(rows):
    several = [{**row, "rejected": [row["rejected"] + f" {n}" for n in range(3)]} for row in rows[:4]]
    findings, looked = found(several)
    assert len(findings["near-duplicates of an earlier pair"]) > 4
    assert "near-duplicates of an earlier pair                4  100.0 %   row 0, 1, 2, ..." in str(looked)


def test_what_may_be_meant_otherwise_and_what_nobody_reads_is_told(rows):
    rows = [{**row, "score_chosen": 5.0, "score_rejected": float(n), "rank_chosen": 1, "rank_rejected": 2}
            for n, row in enumerate(rows)]  # fmt: skip
    rows[3]["rejected"], rows[4]["note"] = "N/A", "seen"
    findings, looked = found(rows[:8])
    assert findings == {"score_chosen below score_rejected": [6, 7], "an answer that is none, an error or so": [3]}
    assert "columns not used: score_chosen (5), score_rejected, rank_chosen (1), rank_rejected (2), note" in str(looked)


def test_a_page_of_an_answer_without_a_question_and_of_a_header_once_more(rows):
    answers = [{"role": "assistant", "content": row["chosen"]} for row in rows]
    rows = [{"messages": [{"role": "user", "content": row["prompt"]}, answers[i]], "rejected_response": row["rejected"]}
            for i, row in enumerate(rows[:9])]  # fmt: skip
    rows += [{"messages": [answers[30]], "rejected_response": "W"}, {name: name for name in rows[0]}]
    assert found(rows)[0] == {"cannot be read: a header once more": [10]}


def test_what_training_has_of_held_out_prompts_is_found(rows):
    like = {**rows[4], "prompt": rows[4]["prompt"] + " ok"}
    held_out = [{**rows[2], "chosen": "x"}, like, {**rows[0], "prompt": "new"}]
    findings, _ = found(rows, held_out)
    assert findings == {"held-out prompts that training has": [0], "held-out prompts that training nearly has": [1]}


def test_near_duplicates_are_those_whose_shingles_are_alike():
    rng, texts = random.Random(1), []
    for _ in range(60):
        kept = words(rng, 60).split()
        texts.append(" ".join(kept))
        for _ in range(rng.choice([0, 1, 2, 30, 40])):
            kept[rng.randrange(60)] = rng.choice(WORDS)
        texts.append(" ".join(kept))

    def alike(a, b):
        a, b = ({text[i : i + SHINGLE] for i in range(len(text) - SHINGLE + 1)} for text in (a, b))
        return len(a & b) / len(a | b)

    got = dict(near_duplicates(texts))
    for i in range(1, 120, 2):
        exact = alike(texts[i], texts[i - 1])
        assert exact > 0.7 if i in got else exact < 0.9, exact
    assert 20 < len(got) < 60 and all(j == i - 1 for i, j in got.items())


def test_the_command_has_a_status_and_takes_columns(rows, tmp_path, capsys):
    path = str(tmp_path / "a.jsonl")
    write_jsonl(tmp_path / "a.jsonl", [{"question": row["prompt"], **row, "prompt": None} for row in rows])
    columns = "columns={prompt: question}"
    assert main(["data", path, columns, "--strict"]) == 0
    assert main(["data", "lint", path, columns, "dataset.limit=7"]) == 0
    assert "rows read                                         7" in capsys.readouterr().out
    write_jsonl(tmp_path / "a.jsonl", [*rows, rows[0]])
    assert main(["data", path]) == 0 and main(["data", path, "--strict"]) == 1
    wrong = {"limt=3": "limt: no key of dataset; nearest: limit", path: "2 are named"}
    for word, said in wrong.items():
        assert main(["data", path, word]) == 2
        assert said in capsys.readouterr().err


def test_pairs_at_a_glance():
    pairs = [Pair([1, i], [5, 6, 2], [7, 2], i) for i in range(8)] + [Pair([1, 9], [5, 2], [7, 8, 2], 8)]
    pairs += [Pair([1, 0], [5, 6, 2], [7, 2], 9), Pair([1, 1], [7, 2], [5, 6, 2], 10)]
    said = (
        "1 duplicates (9.1 %), 2 pairs that contradict another, of answers that differ in length the longer is chosen"
    )
    assert f"{said} in 81.8%" in glance(pairs) and glance(PackedPairs.of(pairs)) == glance(pairs)
    assert json.dumps(glance(pairs)).count("\\n") == 1
