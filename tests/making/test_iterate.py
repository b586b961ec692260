"""`tune iterate`: a round is the commands that it prints, what is missing is done again the same, and rounds add up."""

import argparse
import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from helpers import ROOT, SIZES, run_config, save_llama

from pairtune.cli import judging
from pairtune.cli.children import Children
from pairtune.cli.commands import main
from pairtune.cli.iterate import Stages, Stopped

sys.path.append(str(Path(__file__).parents[1] / "judge"))
from judge_server import NO_COMPLETION, completion, longer, serving, slow  # noqa: E402

PROMPTS = [{"prompt": f"w{n} w{n + 1} w7", "note": "a\u2028b"} for n in range(24)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_llama(tmp_path / "base", sizes=SIZES)
    cfg = run_config(tmp_path, sizes=SIZES, pairs_per_step=4, log_every_n_steps=1, samples={"num_prompts": 0})
    for name in ("output_dir", "dataset", "eval_dataset", "max_steps"):
        cfg.pop(name, None)
    (tmp_path / "c.yaml").write_text(json.dumps(cfg))
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in PROMPTS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return tmp_path


def lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def shorter(first, second):
    return longer(second, first)


def test_a_round_draws_judges_pairs_and_trains_and_a_budget_that_ends_is_gone_on_with(folder, capfd):
    """By an endpoint that misbehaves: no verdict is lost, none asked for twice, and what is missing is done again."""
    words = ["iterate", "lora_dpo_single_device", "--config", "c.yaml", "--prompts", "prompts.jsonl"]
    words += ["--output-dir", "rounds", "--held-out", "0.3", "--max-new-tokens", "6", "--judge-model", "tiny"]
    rounds = folder / "rounds"
    rounds.mkdir()
    (rounds / ".iterate.json.0a1b2c3d").write_text("{")  # a kill's, in the first moment
    with serving(shorter, [*NO_COMPLETION, completion("", refusal="no"), slow]) as server:
        server.only_when_new = True
        words += ["--judge", server.address, "--judge-timeout", "3", "--rounds"]
        assert main([*words, "2", "--judge-budget", "20"]) == 3
        out = capfd.readouterr().out
        assert "stopped in round 1; the same command with a larger --judge-budget goes on" in out
        assert "asked again: " in out and "(refused)" in out and "1 (no reply in time)" in out
        assert len(lines(rounds / "verdicts.jsonl")) == 20 and not (rounds / "round_1" / "scored.jsonl").exists()
        answers, held_out = lines(rounds / "round_1" / "answers.jsonl"), lines(rounds / "held_out_prompts.jsonl")
        meetings = [len(list(combinations(set(row["answers"]), 2))) for row in answers]
        budget = 2 * sum(meetings) + 2 * len(held_out) + 20  # it ends among round 2's
        assert main([*words, "2", "--judge-budget", str(budget)]) == 3
        out = capfd.readouterr().out
        assert "stopped in round 2; the same command with a larger --judge-budget goes on" in out
        assert "data binarise rounds/round_1/scored.jsonl" in out
        assert len(server.questions) == len(set(server.questions)) <= len(lines(rounds / "verdicts.jsonl")) == budget
        kept = {f: (rounds / "round_1" / f).read_bytes() for f in ("answers.jsonl", "scored.jsonl", "pairs.jsonl")}
        for name in ("scored.jsonl", "pairs.jsonl"):
            (rounds / "round_1" / name).unlink()
        log, asked = (rounds / "round_1" / "run" / "metrics.jsonl").read_bytes(), len(server.asked)
        assert main([*words, "1"]) == 0 and "data sample" not in capfd.readouterr().out
        assert len(server.asked) == asked
    assert {name: (rounds / "round_1" / name).read_bytes() for name in kept} == kept
    assert (rounds / "round_1" / "run" / "metrics.jsonl").read_bytes() == log  # it had ended
    check_rounds(rounds)


@pytest.mark.parametrize(
    ("judge", "is_budget_used"),
    [
        (["--judge-model", "tiny", "--judge-budget", "1"], True),
        (["--judge-model", "tiny", "--judge-budget", "1", "--rubric", "none.txt"], False),
        (["--judge", "my_judge.fails"], False),
        (["--judge", "my_judge.exits"], False),
    ],
)
def test_a_larger_budget_is_the_way_out_only_where_one_has_ended(tmp_path, monkeypatch, judge, is_budget_used):
    monkeypatch.chdir(tmp_path)
    Path("my_judge.py").write_text(
        "def fails(answer):\n    raise MemoryError\n\ndef exits(answer):\n    raise SystemExit(3)\n"
    )
    Path("answers.jsonl").write_text('{"prompt": "q", "answers": ["a", "bc"]}\n')
    parser = argparse.ArgumentParser()
    judging.add_options(parser)
    cfg = {"checkpointer": {"checkpoint_dir": "base"}, "device": "cpu", "dtype": "fp32", "tokenizer": {}}
    with serving() as server, Children() as children, pytest.raises(Stopped) as stopped:
        args = parser.parse_args(["--judge", server.address, *judge])
        Stages(args, tmp_path, cfg, children).judge(Path("answers.jsonl"), Path("scored.jsonl"))
    assert stopped.value.is_budget_used is is_budget_used


def check_rounds(rounds):
    asked = [row for name in ("prompts", "held_out_prompts") for row in lines(rounds / f"{name}.jsonl")]
    assert sorted(asked, key=str) == sorted(PROMPTS, key=str)
    scored = lines(rounds / "round_1" / "scored.jsonl")
    for row in scored:
        texts = set(row["answers"])
        beaten = [sum(len(a) < len(b) for b in texts) - sum(len(a) > len(b) for b in texts) for a in row["answers"]]
        assert row["scores"] == beaten and row["note"] == "a\u2028b"
    pairs = [*lines(rounds / "round_1" / "pairs.jsonl"), *lines(rounds / "round_1" / "pairs.held_out.jsonl")]
    by_prompt = {row["prompt"]: [text for text in row["answers"] if text.strip()] for row in scored}
    for pair in pairs:
        texts = by_prompt[pair["prompt"]]
        assert (len(pair["chosen"]), len(pair["rejected"])) == (min(map(len, texts)), max(map(len, texts)))
    zero, one = lines(rounds / "rounds.jsonl")
    met = lines(rounds / "round_1" / "held_out_scored.jsonl")
    assert one["judged"] == len(met) == zero["prompts"] and zero["wins"] == 0.5
    wins = sum((now > first) + (now == first) / 2 for first, now in (row["scores"] for row in met))
    assert one["wins"] == pytest.approx(wins / len(met)) and one["pairs"] == len(lines(rounds / "round_1/pairs.jsonl"))
    assert lines(rounds / "round_2" / "answers.jsonl")[0]["drawn"]["model"] == "rounds/round_1/run/export"


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
    start = ["iterate", "lora_dpo_single_device", "--config", "c.yaml", "--prompts", "prompts.jsonl"]
    assert main([*start, "--output-dir", "rounds", *words]) == 2
    assert said in capsys.readouterr().err and not (folder / "rounds" / "round_0").exists()


def test_commands_that_are_killed_at_random_end_as_if_they_had_been_left_alone():
    """Those that are fast; the script kills all of them."""
    stages = ["--stages", "draw,judge", "--kills", "2"]
    command = [sys.executable, str(ROOT / "tests" / "kill_making.py"), *stages]
    done = subprocess.run(command, text=True, capture_output=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills (" in done.stdout and " 0 losses" in done.stdout
