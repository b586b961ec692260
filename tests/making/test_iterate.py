"""`tune iterate`: a round is the commands that it prints, what is missing is done again the same, and rounds add up."""

import json

import pytest
from helpers import SIZES, run_config, save_llama

from pairtune.cli.commands import main

PROMPTS = "".join(f"w{n} w{n + 1} w7\n" for n in range(24))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_llama(tmp_path / "base", sizes=SIZES)
    cfg = run_config(tmp_path, sizes=SIZES, pairs_per_step=4, log_every_n_steps=1, samples={"num_prompts": 0})
    for name in ("output_dir", "dataset", "eval_dataset", "max_steps"):
        cfg.pop(name, None)
    (tmp_path / "c.yaml").write_text(json.dumps(cfg))
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    (tmp_path / "my_judge.py").write_text("def fewest(answer):\n    return -len(answer)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_round_draws_judges_pairs_and_trains_and_what_is_missing_is_done_again_the_same(folder, capfd):
    words = ["iterate", "lora_dpo_single_device", "--config", "c.yaml", "--prompts", "prompts.txt"]
    words += ["--judge", "my_judge.fewest", "--output-dir", "rounds", "--held-out", "0.3", "--max-new-tokens", "6"]
    assert main([*words, "--rounds", "2"]) == 0
    out, rounds = capfd.readouterr().out, folder / "rounds"
    asked = [row["prompt"] for name in ("prompts", "held_out_prompts") for row in lines(rounds / f"{name}.jsonl")]
    assert sorted(asked) == sorted(PROMPTS.splitlines())
    scored = lines(rounds / "round_1" / "scored.jsonl")
    assert all(row["scores"] == [-len(text) for text in row["answers"]] for row in scored)
    pairs = [*lines(rounds / "round_1" / "pairs.jsonl"), *lines(rounds / "round_1" / "pairs.held_out.jsonl")]
    by_prompt = {row["prompt"]: [text for text in row["answers"] if text.strip()] for row in scored}
    for pair in pairs:
        texts = by_prompt[pair["prompt"]]
        assert (len(pair["chosen"]), len(pair["rejected"])) == (min(map(len, texts)), max(map(len, texts)))
    zero, one, _ = before = lines(rounds / "rounds.jsonl")
    met = lines(rounds / "round_1" / "held_out_scored.jsonl")
    assert one["judged"] == len(met) == zero["prompts"] and zero["wins"] == 0.5
    wins = sum((now > first) + (now == first) / 2 for first, now in (row["scores"] for row in met))
    assert one["wins"] == pytest.approx(wins / len(met)) and one["pairs"] == len(lines(rounds / "round_1/pairs.jsonl"))
    assert "\n$ " in out and "data binarise rounds/round_1/scored.jsonl" in out
    kept = {name: (rounds / "round_1" / name).read_bytes() for name in ("answers.jsonl", "scored.jsonl", "pairs.jsonl")}
    for name in ("scored.jsonl", "pairs.jsonl"):
        (rounds / "round_1" / name).unlink()
    log = (rounds / "round_1" / "run" / "metrics.jsonl").read_bytes()
    assert main([*words, "--rounds", "2"]) == 0 and "data sample" not in capfd.readouterr().out
    assert {name: (rounds / "round_1" / name).read_bytes() for name in kept} == kept
    assert (rounds / "round_1" / "run" / "metrics.jsonl").read_bytes() == log  # it had ended
    assert lines(rounds / "rounds.jsonl") == before
    second = json.loads((rounds / "round_2" / "answers.jsonl").read_text().splitlines()[0])["drawn"]
    assert second["model"] == "rounds/round_1/run/export"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "by whom are answers judged?"),
        (["--judge", "m.f", "--rounds", "0"], "--rounds 1 or more"),
        (["--judge", "m.f", "--held-out", "0"], "--held-out 0: must be above 0 and below 1"),
        (["--judge", "m.f", "dataset=x.jsonl"], "dataset=x.jsonl: rounds have pairs and run folders of their own"),
        (["--judge", "m.f", "--held-out", "0.0001"], "of 24 prompts 0 are held out, and both kinds are needed"),
        (["--judge", "m.f", "lr=1"], "unknown key lr; here it is called optimizer.lr"),
        (["--judge", "m.f", "--output-dir", "."], "holds something else; name another --output-dir"),
    ],
)
def test_what_cannot_be_iterated_is_told_before_the_first_round(folder, capsys, words, said):
    start = ["iterate", "lora_dpo_single_device", "--config", "c.yaml", "--prompts", "prompts.txt"]
    assert main([*start, "--output-dir", "rounds", *words]) == 2
    assert said in capsys.readouterr().err and not (folder / "rounds" / "round_0").exists()
