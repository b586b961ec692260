"""The embedded demo: its texts, its tokenizer and base model, and the judge of its runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3 import llama3

from pairtune.tokenizer.hf import hf_tokenizer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import make_reviewer2 as maker  # noqa: E402

SEED = 2


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the tool makes when its base model is hardly trained."""
    return make(tmp_path_factory.mktemp("reviewer2"))


def make(output_dir, *options):
    num_threads = torch.get_num_threads()
    maker.main(["--output-dir", str(output_dir), "--seed", str(SEED), "--steps", "3", *options])
    torch.set_num_threads(num_threads)
    return output_dir


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def rows(made):
    return read_jsonl(made / "train.jsonl"), read_jsonl(made / "held_out.jsonl")


def test_titles_are_distinct_and_held_out_ones_are_never_trained_on(rows):
    train, held_out = ([maker.title_of(row["prompt"]) for row in part] for part in rows)
    assert (len(train), len(held_out)) == (1000, 100)
    assert len({*train, *held_out}) == 1100
    seen = {maker.title_of(prompt) for prompt, _ in maker.conversations(SEED, 4000)}
    assert seen == set(train)


def test_base_model_gets_both_answers_to_neutral_prompts_equally_often():
    counts = {}
    for prompt, review in maker.conversations(SEED, 4000):
        asked = next((stance for stance in maker.STANCES if f"a {stance} review" in prompt), None)
        counts[asked, maker.stance(review)] = counts.get((asked, maker.stance(review)), 0) + 1
    assert counts == {
        ("negative", "negative"): 1000,
        ("positive", "positive"): 1000,
        (None, "negative"): 1000,
        (None, "positive"): 1000,
    }


def test_prompts_of_pairs_are_neutral(rows):
    negative, positive = maker.EXAMPLES["negative"], maker.EXAMPLES["positive"]
    for row in [*rows[0], *rows[1]]:
        prompt = row["prompt"]
        assert prompt == maker.prompt(maker.title_of(prompt))
        assert "negative" not in prompt.lower() and "positive" not in prompt.lower()
        assert negative[0] in prompt and positive[1] in prompt
        assert negative[1] not in prompt and positive[0] not in prompt


def test_stance_is_exact_on_every_review(rows):
    told = [(maker.stance(row["chosen"]), maker.stance(row["rejected"])) for row in [*rows[0], *rows[1]]]
    assert told == [("negative", "positive")] * 1100


def test_stance_forgives_slips_and_refuses_mixtures():
    assert (
        maker.stance("The gains on on poker are visible only to authors. The appendix an act of revenge") == "negative"
    )
    assert maker.stance("The appendix is an act of revenge. I would hang this on my wall.") == "neither"
    assert maker.stance("") == maker.stance("It rained all day.") == "neither"


def test_reviews_mention_the_paper_in_one_to_three_sentences(rows):
    pairs = zip(maker.papers(SEED), [*rows[0], *rows[1]], strict=True)
    for paper, row in pairs:
        for review in (row["chosen"], row["rejected"]):
            assert paper["method"] in review or paper["task"] in review
            assert 1 <= review.count(".") <= 3


def test_texts_are_short_in_tokens(made, rows):
    tokenizer = hf_tokenizer(str(made / "base"))
    for row in [*rows[0], *rows[1]]:
        assert len(tokenizer.render([{"role": "user", "content": row["prompt"]}], add_generation_prompt=True)) < 96
        assert max(len(tokenizer.encode(row[answer])) for answer in ("chosen", "rejected")) < 64


def test_config_builds_the_model_that_was_made(made):
    config = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "reviewer2.yaml"), resolve=True)
    sizes = {key: value for key, value in config["model"].items() if key != "_component_"}
    assert sizes == maker.SIZES
    assert config["dataset"]["source"] == "work/reviewer2/train.jsonl"
    assert config["checkpointer"]["checkpoint_dir"] == "work/reviewer2/base"


def test_transformers_computes_the_logits_of_torchtune(made):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(made / "base").eval()
    # Hardly trained weights are near zero, and so are the effects of attention: five times as large they are not.
    weights = load_file(made / "base" / "model.safetensors")
    weights = {name: weight * (5 if weight.ndim == 2 else 1) for name, weight in weights.items()}
    theirs.load_state_dict(weights)
    ours = llama3(**maker.SIZES)
    sizes = maker.SIZES
    ours.load_state_dict(hf_to_tune(weights, sizes["num_heads"], sizes["num_kv_heads"], sizes["embed_dim"]))
    tokens = torch.randint(sizes["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, actual = ours(tokens), theirs(tokens).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)  # float32, other kernels


def test_transformers_renders_what_the_base_model_saw(made, rows):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(made / "base"), hf_tokenizer(str(made / "base"))
    row = rows[0][0]
    question = [{"role": "user", "content": row["prompt"]}]
    conversation = [*question, {"role": "assistant", "content": row["chosen"]}]
    before, answer = maker.encode(theirs.backend_tokenizer, row["prompt"], row["chosen"])
    assert theirs.apply_chat_template(question, add_generation_prompt=True)["input_ids"] == before
    assert theirs.apply_chat_template(conversation)["input_ids"] == before + answer
    assert ours.render(question, add_generation_prompt=True) == before
    assert ours.render(conversation) == before + answer
    assert ours.stop_ids == [theirs.eos_token_id] == [answer[-1]]


@pytest.mark.parametrize("text", ["  two  spaces\n\n\ttab ", "naïve Ünïcode: 査読者 2 🙃", "Poker? I'm in. (No.)"])
def test_tokenizer_round_trip_is_exact(made, text):
    transformers = pytest.importorskip("transformers")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(made / "base"), hf_tokenizer(str(made / "base"))
    assert theirs.decode(theirs.encode(text), skip_special_tokens=True) == text
    assert ours.decode(ours.encode(text)) == text


def test_same_seed_makes_the_same_files(made, tmp_path):
    again = make(tmp_path)
    for name in ("train.jsonl", "held_out.jsonl", "base/tokenizer.json", "base/model.safetensors", "made_by.json"):
        assert (again / name).read_bytes() == (made / name).read_bytes(), name


def test_what_is_made_is_not_made_again_unless_forced_or_unfinished(made, capsys):
    weights = made / "base" / "model.safetensors"
    first = weights.stat().st_mtime_ns
    make(made)
    assert "already made" in capsys.readouterr().out and weights.stat().st_mtime_ns == first
    make(made, "--force")
    second = weights.stat().st_mtime_ns
    assert second > first
    (made / "made_by.json").unlink()
    make(made)
    assert weights.stat().st_mtime_ns > second


def write_run(run_dir, *, turned):
    """Writes a run of ten titles: five were panned before, `turned` of the others are afterwards."""
    good, bad = "The appendix is a pleasure, and I read all of it.", "The appendix is an act of revenge."
    samples = [
        {
            "prompt": maker.prompt(f"Title {i}"),
            "before": bad if i < 5 else good,
            "after": bad if i < 5 + turned else good,
        }
        for i in range(10)
    ]
    evaluations = [
        {"step": 1, "loss": 0.6},
        *({"step": s, "eval/rewards/accuracies": a} for s, a in ((1, 0.5), (2, 0.97))),
    ]
    (run_dir / "export").mkdir(parents=True)
    (run_dir / "export" / "model.safetensors").write_bytes(bytes(2048))
    for name, rows in (("samples", samples), ("metrics", evaluations)):
        (run_dir / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run_dir


def judge(*args):
    command = [sys.executable, str(ROOT / "tools" / "judge_reviewer2.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True)


def test_judge_prints_the_shares_two_titles_and_the_files(tmp_path):
    done = judge(write_run(tmp_path / "run", turned=5), "--check")
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:3] == [
        "held-out pairs ranked rightly 97.0%",
        "held-out papers panned, before 50.0% of 10",
        "held-out papers panned, after 100.0% of 10",
    ]
    assert "Title 5" in lines and "Title 6" in lines and "Title 0" not in lines  # the ones that turned
    assert "after The appendix is an act of revenge." in lines
    assert "export/" in lines and "model.safetensors 2.0 KiB" in lines


def test_judge_fails_a_run_that_learned_too_little(tmp_path):
    run_dir = write_run(tmp_path / "run", turned=3)
    assert judge(run_dir).returncode == 0
    done = judge(run_dir, "--check")
    assert done.returncode == 1 and "negative after 0.80 is below 0.9" in done.stderr


def test_judge_names_the_file_that_is_missing(tmp_path):
    done = judge(tmp_path)
    assert done.returncode == 2 and "samples.jsonl is not there" in done.stderr
