"""A sweep makes each combination once, goes on where it was, and names the best no more surely than it is known."""

import json
import re
import subprocess
import sys

import matplotlib
import pytest
from helpers import ENVIRONMENT, random_pairs, run_config, save_llama, save_pairs

from pairtune.cli.alternatives import combinations, split
from pairtune.cli.commands import main
from pairtune.cli.sweep_table import best, row_of, table
from pairtune.errors import UserError
from pairtune.run.metrics import read_log

TUNE = [sys.executable, "-m", "pairtune.cli"]
# A user's: it ends, fails where it is told, or has its sweep stopped once and waits for what that sends on
RECIPE = """
import json, os, signal
from pathlib import Path
from pairtune import config

METHOD = "full"
DEFAULTS = {"output_dir": "runs/mine", "resume": False, "rate": 1.0, "more": {"size": 1}}


def main(cfg):
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open("starts.txt", "a") as file:
        file.write(f"{cfg.rate} {cfg.resume} {os.environ.get('WORLD_SIZE')}\\n")
    if cfg.rate == 2 and not Path("stopped").exists():
        Path("stopped").touch()
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        os.kill(os.getppid(), signal.SIGINT)
        raise SystemExit(128 + signal.sigwait([signal.SIGINT]))
    if cfg.rate == 3 and not Path("mended").exists():
        raise SystemExit(7)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.7}) + "\\n")
    (folder / "verdict.json").write_text(json.dumps({"ended": "yes"}))


if __name__ == "__main__":
    main(config.parse(METHOD, DEFAULTS))
"""


@pytest.mark.parametrize(
    ("written", "alternatives"),
    [
        ("0.1,0.2", ["0.1", "0.2"]),
        ("[q_proj,v_proj]", ["[q_proj,v_proj]"]),
        ("[q_proj,v_proj], all-linear", ["[q_proj,v_proj]", "all-linear"]),
        ("[{name: a, weight: 1}],{x: [1,2]},null", ["[{name: a, weight: 1}]", "{x: [1,2]}", "null"]),
        ("'a,b',\"c,d\"", ["'a,b'", '"c,d"']),
        ("what's new,don't", ["what's new", "don't"]),
        ("[1,2", ["[1,2"]),
        ("'a,b", ["'a,b"]),
        ("", [""]),
    ],
)
def test_commas_outside_brackets_braces_and_quotes_part_alternatives(written, alternatives):
    assert split(written) == alternatives


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (
            ["loss.beta=0.05,0.1", "seed=3", "optimizer.lr=1e-6,5e-6"],
            ["beta=0.05,lr=1e-6", "beta=0.05,lr=5e-6", "beta=0.1,lr=1e-6", "beta=0.1,lr=5e-6"],
        ),
        (["dataset.source=/x/a.jsonl,/x/b.jsonl"], ["source=a.jsonl", "source=b.jsonl"]),
        (["dataset=/x/a.jsonl,/y/a.jsonl"], ["dataset=-x-a.jsonl", "dataset=-y-a.jsonl"]),
        (["optimizer=torch.optim.SGD,torch.optim.AdamW"], ["optimizer=SGD", "optimizer=AdamW"]),
        (["a.lr=1,2", "b.lr=3,4"], [f"a.lr={a},b.lr={b}" for a in (1, 2) for b in (3, 4)]),
        (["lora.modules=[q,v],[q]", "x=-1,1"], [f"modules={m},x={x}" for m in ("-q-v-", "-q-") for x in (-1, 1)]),
        (["x='/',':'"], ["x=-.1", "x=-.2"]),
    ],
)
def test_every_combination_has_a_short_name_and_its_own_words(words, names):
    found = combinations(words)
    assert [one.name for one in found] == names
    for one in found:
        assert all(f"{key}={value}" in one.words for key, value in one.differs.items())
        assert [word for word in words if "," not in word] == [word for word in one.words if word in words]
    assert len({tuple(one.words) for one in found}) == len(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["loss.beta=0.1"], "no key has alternatives"),
        (["loss.beta=0.1,"], "one of its alternatives is empty"),
        (["loss.beta=0.1,0.2,0.10"], "0.10 is there twice"),
        (["loss.beta=0.1,0.2", "loss.beta=0.3"], "loss.beta stands twice"),
        (["loss.beta=0.1,0.2", "resume=true"], "resume=true: is not for a sweep to vary"),
        (["output_dir=a,b"], "is not for a sweep to vary"),
    ],
)
def test_what_is_no_sweep_is_refused(words, said):
    with pytest.raises(UserError, match=re.escape(said)):
        combinations(words)


def made(folder, name, *evaluations, differs=None, **config):
    """The row of a run that logged these evaluations of 100 held-out pairs: accuracy and loss, a step each."""
    (folder / name).mkdir()
    rows = [{"step": 1, "loss": 0.7}] + [
        {
            **{"step": step, "eval/loss": loss, "eval/loss_stderr": 0.01, "eval/pairs": 100},
            **({} if accuracy is None else {"eval/rewards/accuracies": accuracy, "eval/rewards/margins": 1.0}),
        }
        for step, (accuracy, loss) in enumerate(evaluations, 1)
    ]
    (folder / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / name / "config.yaml").write_text(json.dumps({"eval_dataset": {"source": "x"}} | config))
    (folder / name / "verdict.json").write_text(json.dumps({"ended": "yes"}))
    return row_of(name, differs or {"optimizer.lr": name}, "ended", folder / name)


def test_the_best_has_an_interval_and_is_not_told_apart_from_what_overlaps(tmp_path):
    rows = [
        made(tmp_path, "low", (0.50, 0.70)),
        made(tmp_path, "best", (0.70, 0.50), (0.90, 0.60)),
        made(tmp_path, "near", (0.85, 0.55)),
        row_of("none", {}, "failed", tmp_path / "none"),
    ]
    # Of 90 of 100: Wilson's interval with continuity correction (R's prop.test: 0.8202 to 0.9477)
    assert best(rows) == (
        "Best: best, 90.0% of 100 held-out pairs (82.0% to 94.8%); not told apart from near: their intervals overlap"
    )
    assert best(rows[:2]).endswith("which no other run's interval reaches")
    lines = table(rows).splitlines()
    assert lines[2].split("  ")[0] == "best" and "0.6000 ± 0.0196" in lines[2] and "90.0% of 100" in lines[2]
    assert re.search(r" 1 +\w", lines[2])  # its best step by held-out loss
    assert lines[4].split() == ["none", "-", "-", "-", "-;", "failed"]
    exported = made(tmp_path, "exported", (0.70, 0.50), (0.90, 0.60), export_best=True, keep_best="loss")
    assert exported.accuracy == 0.70 and exported.held.step == 1  # the weights that it has exported


@pytest.mark.parametrize(
    ("differs", "accuracies", "said"),
    [
        ({"optimizer.lr": "1"}, (None, None), "Best: b, held-out loss 0.5000 (interval 0.4804 to 0.5196), which no"),
        ({"loss.beta": "1"}, (None, None), "Best: none is named, since no pair is ranked"),
        ({"loss.beta": "1"}, (0.8, 0.8), "Best: a, 80.0% of 100"),
        ({"loss.beta": "1"}, (), "Best: none is named, since no run that ended has held-out pairs"),
    ],
)
def test_held_out_losses_of_different_losses_are_not_compared(tmp_path, differs, accuracies, said):
    names, losses = ("a", "b"), (0.6, 0.5)
    evaluations = [[(accuracy, loss)] for accuracy, loss in zip(accuracies, losses, strict=False)] or [[], []]
    rows = [made(tmp_path, n, *e, differs=differs) for n, e in zip(names, evaluations, strict=True)]
    assert best(rows).startswith(said)


def test_runs_with_different_held_out_pairs_are_not_compared(tmp_path):
    rows = [made(tmp_path, name, (0.8, 0.5), eval_dataset={"source": name}) for name in "ab"]
    assert best(rows) == "Best: none is named, since runs were judged by different held-out pairs"


def test_a_sweep_that_was_stopped_or_failed_goes_on_with_what_is_missing(tmp_path, monkeypatch, capfd):
    (tmp_path / "mine.py").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["tune"])
    starts = tmp_path / "starts.txt"
    assert main(["sweep", "mine.py", "rate=1,2,fast"]) == 2
    assert "run rate=fast: rate=fast: must be a number" in capfd.readouterr().err and not starts.exists()
    words = ["sweep", "mine.py", "rate=1,2,3"]
    stopped = subprocess.run([*TUNE, *words], env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert stopped.returncode == 130, stopped.stderr
    assert "1 of 3 runs have ended; the same command goes on:\n  tune sweep mine.py rate=1,2,3" in stopped.stdout
    assert starts.read_text() == "1 auto None\n2 auto None\n"
    assert main(words) == 1
    out = capfd.readouterr().out
    assert "rate=1  rate=1  (has ended)" in out and re.search("^rate=3 .*-; failed$", out, re.MULTILINE)
    assert "failed: rate=3; " in out and "Best: none is named" in out
    assert starts.read_text().endswith("2 auto None\n3 auto None\n")
    (tmp_path / "mended").touch()
    assert main(words) == 0
    assert starts.read_text().count("\n") == 5
    lines = [json.loads(line) for line in (tmp_path / "runs/mine_sweep/sweep.jsonl").read_text().splitlines()]
    assert [(line["differs"], line["status"]) for line in lines] == [({"rate": str(n)}, "ended") for n in (1, 2, 3)]
    capfd.readouterr()
    assert main([*words, "more.size=2"]) == 2
    assert "made with more.size=1, which is 2 now; name another output_dir" in capfd.readouterr().err
    assert main(["sweep", "mine.py", "rate=1,2", "output_dir=runs/mine_sweep/rate=1"]) == 2
    assert starts.read_text().count("\n") == 5
    assert main(["sweep", "--nproc_per_node", "1", "mine.py", "rate=1,4"]) == 0  # torchrun's options go to each run
    assert starts.read_text().splitlines()[5:] == ["4 auto 1"]


def test_a_killed_sweep_finishes_what_is_missing_and_computes_reference_and_tokens_once(tmp_path):
    save_llama(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", random_pairs(24, seed=1))
    save_pairs(tmp_path / "held_out.jsonl", random_pairs(8, seed=2))
    rows = [json.loads(line) | {"note": "x" * 12_000} for line in (tmp_path / "train.jsonl").open()]  # enough to keep
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    logger = {"_component_": "interrupting.KillParentOnce", "step": 2, "note": str(tmp_path / "killed")}
    cfg = run_config(tmp_path, reference="cached", batch_size=4, samples={"num_prompts": 0}, metric_logger=logger)
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    words = ["sweep", "lora_dpo_single_device", "--config", "config.yaml", "loss.beta=0.1,0.3", "output_dir=out"]
    words += ["optimizer.lr=5e-3", "lr_scheduler=null"]
    kept = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "MPLCONFIGDIR": matplotlib.get_cachedir()}

    def sweep():
        return subprocess.run(
            [*TUNE, *words], cwd=tmp_path, env=ENVIRONMENT | kept, capture_output=True, text=True, timeout=600
        )

    assert sweep().returncode == -9  # in the first run, which hears of it and stops
    first, second = (tmp_path / "out" / f"beta={beta}" for beta in ("0.1", "0.3"))
    done = sweep()  # waits for it
    assert done.returncode == 0, done.stderr
    assert "beta=0.1  loss.beta=0.1  (goes on)" in done.stdout
    assert [row["step"] for row in read_log(first / "metrics.jsonl") if "loss" in row] == [1, 2, 3]
    assert first.joinpath("console.log").read_text().count("resume=auto\n") == 2
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(r"^Best: beta=0\.\d, \d+\.\d% of 8 held-out pairs \(", done.stdout, re.MULTILINE)
    (values,) = (tmp_path / "cache" / "pairtune" / "reference").glob("*/values.bin")
    assert values.stat().st_size == 32 * (24 + 8)  # a record a pair: none was computed twice
    tokens = [path for path in (tmp_path / "cache" / "pairtune" / "tokens").rglob("*") if path.is_file()]
    begun = (second / "config.yaml").stat().st_mtime_ns  # the other run has written neither
    assert tokens and all(path.stat().st_mtime_ns < begun for path in (values, *tokens))
