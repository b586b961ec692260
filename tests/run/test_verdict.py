"""Every run says whether it was good: small runs that end in each way are called by its name, on two seeds."""

import json
import math
import random

import numpy as np
import pytest
from helpers import SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs

from pairtune.errors import UserError
from pairtune.reference import Reference
from pairtune.run import pair_log
from pairtune.run.evaluations import interval
from pairtune.run.metrics import read_log
from pairtune.run.verdict import judge

MODEL = SIZES | {"num_layers": 2}


def with_noise(pairs, rng):
    """Which answer was chosen is a coin's say: there is nothing to learn but the pairs themselves."""
    for pair in pairs:
        if rng.random() < 0.5:
            pair.chosen, pair.rejected = pair.rejected, pair.chosen
    return pairs


def by_length(pairs, rng):
    """Answers say nothing, and the longer one is chosen."""
    for pair in pairs:
        short, long = sorted(rng.sample(range(3, 21), 2))
        pair.chosen, pair.rejected = [5] * long + [2], [5] * short + [2]
    return pairs


# Verdict: what happens to the labels, and settings
WAYS = {
    "learned": (None, ["optimizer.lr=1e-3", "epochs=3"]),
    "memorised": (with_noise, ["optimizer.lr=2e-3", "epochs=5"]),
    "drifted": (None, ["optimizer.lr=3e-3", "epochs=3", "loss=apo_down"]),
    "did not move": (None, ["optimizer.lr=1e-9", "max_steps=3"]),
    "length only": (by_length, ["optimizer.lr=2e-3", "epochs=4"]),
    "too few held-out pairs": (None, ["optimizer.lr=1e-3", "epochs=2", "eval_dataset.limit=4"]),
    "none held out": (None, ["optimizer.lr=1e-3", "max_steps=3", "eval_dataset=null"]),
    "diverged": (None, ["optimizer.lr=100", "max_steps=4", "clip_grad_norm=null"]),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_llama(folder, sizes=MODEL)
    return folder


def write_inputs(folder, base, seed, labels=None, **changes):
    """Writes 48 training pairs, 64 held-out ones and a config."""
    for name, count, own in (("train", 48, 10), ("held_out", 64, 20)):
        pairs, rng = random_pairs(count, seed=own + seed), random.Random(f"{name} {seed}")
        save_pairs(folder / f"{name}.jsonl", labels(pairs, rng) if labels else pairs)
    cfg = run_config(folder, sizes=MODEL, samples={"num_prompts": 0}, batch_size=8, lr_scheduler=None, seed=seed)
    cfg["checkpointer"]["checkpoint_dir"] = str(base)
    (folder / "config.yaml").write_text(json.dumps(cfg | changes))


def run(folder, *overrides, recipe="full_dpo_single_device"):
    return run_recipe(recipe, *overrides, config_paths=[folder / "config.yaml"])


def verdict_of(folder, name="run"):
    return json.loads((folder / name / "verdict.json").read_text())


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", WAYS)
def test_a_run_is_called_by_the_way_it_ended(base, tmp_path, capsys, name, seed):
    labels, settings = WAYS[name]
    write_inputs(tmp_path, base, seed, labels, keep_last_n=0)
    run(tmp_path, *settings)
    found, log = verdict_of(tmp_path), read_log(tmp_path / "run" / "metrics.jsonl")
    assert found["name"] == name, found["text"]
    assert capsys.readouterr().out.endswith(f"{found['text']}\n")
    assert judge(log).name == name  # and of the rows alone
    assert (tmp_path / "run" / "curves.png").exists()
    assert f"<strong>{name}</strong>: " in (tmp_path / "run" / "report.html").read_text()
    if name != "none held out":
        # Scripts read where a loss starts in the first line
        assert log[0]["step"] == 1 and log[0]["loss"] > 0
        assert log[1]["step"] == 0 and log[1]["eval/rewards/margins"] == 0


# The function


def rows(*, losses, held, pairs=200, stderr=0.01, **columns):
    """Rows of training losses, and evaluations as {step: (loss, accuracy)}."""
    held_out = [
        {"step": step, "eval/loss": loss, "eval/rewards/accuracies": accuracy, "eval/rewards/margins": float(step > 0),
         "eval/pairs": pairs, "eval/loss_stderr": stderr * (step > 0), "eval/answers": pairs,
         **{f"eval/{key.replace('__', '/')}": value for key, value in columns.items()}}
        for step, (loss, accuracy) in held.items()
    ]  # fmt: skip
    return [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)] + held_out


FALLING = [math.log(2) * 0.97**n for n in range(100)]
FLAT = [math.log(2)] * 100
START = (math.log(2), 0.0)


@pytest.mark.parametrize(
    ("name", "log"),
    [
        ("memorised", rows(losses=FALLING, held={0: START, 50: (0.9, 0.4), 100: (2.79, 0.39)})),  # never was better
        ("memorised", rows(losses=FALLING, held={0: START, 50: (0.40, 0.85), 100: (0.55, 0.8)})),  # was better
        ("memorised", rows(losses=[math.log(2), *[0.0014] * 99], held={0: START, 100: (0.6912, 0.5)})),
        ("learned", rows(losses=FALLING, held={0: START, 50: (0.40, 0.85), 100: (0.405, 0.85)})),
        ("learned", rows(losses=FALLING, held={100: (0.3, 0.9)})),  # nothing was evaluated before
        ("drifted", rows(losses=FALLING, held={0: START, 100: (0.4, 0.9)}, chosen_lost__nats_per_token=0.6,
                         chosen_lost__share=0.9)),
        ("learned", rows(losses=FALLING, held={0: START, 100: (0.4, 0.9)}, chosen_lost__nats_per_token=0.1,
                         chosen_lost__share=0.9)),  # as DPO does
        ("did not move", rows(losses=FLAT, held={0: START, 100: (0.6925, 0.9)})),
        ("did not move", rows(losses=FLAT, held={0: START, 100: (0.66, 0.53)})),
        ("too few held-out pairs", rows(losses=FALLING, held={0: START, 100: (0.5, 0.6)}, pairs=30)),
        ("diverged", rows(losses=[*FALLING[:50], None], held={0: START})),
        ("diverged", rows(losses=FALLING, held={0: START, 100: (None, 0.5)})),
        ("diverged", rows(losses=[0.69, 0.7, *[8.0] * 98], held={0: START, 100: (9.0, 0.5)})),
        ("none held out", rows(losses=FALLING, held={})),
        ("did not move", rows(losses=[], held={0: START})),  # it was killed in its first step
        # Without a reference: held-out pairs were ranked as well before training
        ("did not move", rows(losses=FLAT, held={0: (1.0, 0.8), 100: (0.999, 0.81)})),
        ("length only", rows(losses=FALLING, held={0: START, 100: (0.4, 0.8)}, length_baseline=0.82,
                             length_correlation=0.7, length_controlled__margins=0.1, length_controlled__stderr=0.1)),
        ("learned", rows(losses=FALLING, held={0: START, 100: (0.4, 0.8)}, length_baseline=0.82,
                         length_correlation=0.7, length_controlled__margins=0.9, length_controlled__stderr=0.1)),
    ],
)  # fmt: skip
def test_rows_are_judged(name, log):
    log = [{k: v if k != "eval/rewards/margins" or log[-1].get("eval/loss") != 0.999 else 0.5 for k, v in row.items()}
           for row in log]  # fmt: skip
    verdict = judge(log)
    assert verdict.name == name, str(verdict)


def test_nothing_is_learned_whose_interval_includes_one_half():
    for pairs in range(1, 160):
        for right in range(pairs // 2, pairs + 1):
            log = rows(losses=FALLING, held={0: START, 100: (0.4, right / pairs)}, pairs=pairs)
            assert (judge(log).name == "learned") == (interval(right / pairs, pairs)[0] > 0.5)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),  # Newcombe 1998, Statistics in Medicine 17, table I, method 4
    [(81, 263, 0.2535, 0.3682), (15, 148, 0.0598, 0.1644), (0, 20, 0.0, 0.2005), (1, 29, 0.0018, 0.1963)],
)
def test_an_interval_is_the_published_one(right, count, low, high):
    assert interval(right / count, count) == pytest.approx((low, high), abs=1e-4)


def test_unpaired_rows_are_judged_by_how_desirable_answers_rank():
    table = np.zeros(40, pair_log.RECORD)
    table["chosen_length"][:20] = table["rejected_length"][20:] = 5
    table["chosen_reward"][:20], table["rejected_reward"][20:] = np.arange(20), np.arange(-10, 10)
    found = pair_log.held_out_numbers(table, table[:0])
    above = [float(d > u) + (d == u) / 2 for d in range(20) for u in range(-10, 10)]
    assert found["eval/auc"] == pytest.approx(np.mean(above)) and found["eval/pairs"] == 0
    log = rows(losses=FALLING, held={0: START, 100: (0.4, None)}, pairs=0)
    log[-1] |= found | {"eval/loss": 0.4}
    assert judge(log).name == "learned"


def test_numbers_of_held_out_pairs_are_those_of_a_naive_computation():
    rng = random.Random(3)
    table, start = np.zeros(50, pair_log.RECORD), np.zeros(50, pair_log.RECORD)
    for name in ("loss", "chosen_reward", "rejected_reward", "chosen_logp"):
        table[name] = [rng.gauss(0, 1) for _ in table]
    for name in ("chosen_length", "rejected_length"):
        table[name] = [rng.randint(4, 20) for _ in table]
    table["row"] = start["row"] = range(50)
    found = pair_log.held_out_numbers(table, start[::-1])
    margins = [float(c) - float(r) for c, r in zip(table["chosen_reward"], table["rejected_reward"], strict=True)]
    lengths = [(int(r["chosen_length"]), int(r["rejected_length"])) for r in table]
    alike = [m > 0 for m, (c, r) in zip(margins, lengths, strict=True) if abs(c - r) <= 0.2 * max(c, r)]
    lost = [-float(r["chosen_logp"]) for r in table]
    expected = {
        "pairs": 50,
        "loss_stderr": np.std(table["loss"].astype(float), ddof=1) / 50**0.5,
        "length_baseline": max(sum(c > r for c, r in lengths), sum(c < r for c, r in lengths)) / 50,
        "like_length/pairs": len(alike),
        "like_length/accuracies": sum(alike) / len(alike),
        "length_correlation": np.corrcoef(margins, [c - r for c, r in lengths])[0, 1],
        "length_controlled/margins": np.polyfit([c - r for c, r in lengths], margins, 1)[1],
        "length_controlled/stderr": np.polyfit([c - r for c, r in lengths], margins, 1, cov=True)[1][1, 1] ** 0.5,
        "answers": 50,
        "chosen_lost/share": sum(value > 0.01 for value in lost) / 50,
        "chosen_lost/nats_per_token": sum(v / c for v, (c, _) in zip(lost, lengths, strict=True)) / 50,
    }
    assert found == pytest.approx({f"eval/{name}": value for name, value in expected.items()}, rel=1e-6)


# The run


def test_a_run_ends_early_and_what_it_exports_is_the_best(base, tmp_path, capsys):
    write_inputs(tmp_path, base, 1, with_noise)
    settings = ["optimizer.lr=2e-3", "epochs=5", "eval_every_n_steps=2", "early_stop=3", "keep_best=loss"]
    settings.append("log_every_n_steps=5")  # what came after the last of these is logged where the run ends
    log = run(tmp_path, *settings, "export_best=true")
    out, found = capsys.readouterr().out, verdict_of(tmp_path)
    held = {row["step"]: row["eval/loss"] for row in read_log(tmp_path / "run" / "metrics.jsonl") if "eval/loss" in row}
    lowest = min(held, key=held.get)
    assert max(held) == lowest + 6 < 30 and [r["step"] for r in log if "loss" in r][-1] == lowest + 6
    assert found["name"] == "memorised" and found["ended"] == "early" and f"early_stop after step {max(held)}" in out
    again = run(tmp_path, *settings, "export_best=true", "resume=true")
    assert again == log  # it has nothing to go on for
    longer = run(tmp_path, *[s for s in settings if s != "early_stop=3"], "early_stop=100", "resume=true")
    assert [r["step"] for r in longer if "loss" in r][-1] == 30 and longer[: len(log)] == log


def test_the_reference_is_asked_once_for_each_held_out_pair(base, tmp_path, monkeypatch):
    write_inputs(tmp_path, base, 1)
    asked, live = [], Reference._live_logps

    def counted(self, batch):
        asked.append((self._policy.training, batch.num_pairs))
        return live(self, batch)

    monkeypatch.setattr(Reference, "_live_logps", counted)
    log = run(tmp_path, "eval_every_n_steps=1", "max_steps=4", "batch_size=2", recipe="lora_dpo_single_device")
    assert sum(num for training, num in asked if not training) == 64 and len([r for r in log if "eval/loss" in r]) == 4


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["eval_dataset=null"], "early_stop=2: there is nothing to evaluate on"),
        (["eval_every_n_steps=null"], "early_stop=2: held-out pairs are evaluated at the end only"),
    ],
)
def test_a_patience_without_evaluations_is_refused(base, tmp_path, overrides, words):
    write_inputs(tmp_path, base, 1)
    with pytest.raises(UserError, match=words):
        run(tmp_path, "early_stop=2", *overrides)
