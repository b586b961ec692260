"""pairs.bin, `tune pairs`, `tune eval`: flipped labels lie behind, and an export gives its run's own numbers."""

import json
import random
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import yaml
from helpers import SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs
from huggingface_hub import ModelCard

from pairtune.cli import main
from pairtune.cli.evaluate import Asked, settle
from pairtune.config.saved import reference_of
from pairtune.errors import UserError
from pairtune.process.dist import World
from pairtune.run import pair_log, places
from pairtune.run.card import write_card
from pairtune.run.dynamics import contradictions, courses
from pairtune.run.metrics import RunLog, read_log
from pairtune.run.resuming import read_values
from pairtune.run.signed import is_unedited


def table_of(looks):
    """RECORDs of (step, row, margin)."""
    table = np.zeros(len(looks), pair_log.RECORD)
    table["step"], table["row"], table["chosen_reward"] = (list(column) for column in zip(*looks, strict=True))
    table["chosen_length"] = table["rejected_length"] = 5
    return table


def test_flipped_labels_lie_behind_whatever_the_margins_are():
    """Margins grow a thousandfold over the run; a pair seen early is compared with those seen early."""
    rng, flipped = random.Random(1), set(range(0, 400, 10))
    looks = []
    for row in rng.sample(range(400), 400):
        step = 1 + len(looks) // 10
        margin = 10 ** (step / 13) * 1e-3 * (rng.gauss(1, 0.5) if row not in flipped else rng.gauss(-1, 0.5))
        looks.append((step, row, margin))
    found = [course.row for course in courses(table_of(looks), held_out=False)]
    assert len(flipped & set(found[:60])) >= 0.9 * len(flipped)


def test_courses_say_when_a_pair_was_learned_and_what_was_forgotten():
    margins = {0: (0.0, 1.0, 2.0), 1: (0.0, 1.0, -0.5), 2: (0.0, -1.0, 0.2), 3: (0.0, -1.0, -2.0)}
    looks = [(step, row, values[n]) for n, step in enumerate((1, 5, 9)) for row, values in margins.items()]
    found = {course.row: course for course in courses(table_of(looks), held_out=False)}
    assert {row: course.learned for row, course in found.items()} == {0: 5, 1: None, 2: 9, 3: None}
    assert {row for row, course in found.items() if course.was_forgotten} == {1}
    assert found[3].steps == (1, 5, 9) and found[3].margins == (0.0, -1.0, -2.0)


def test_rows_that_say_the_opposite_are_contradictions():
    texts = {0: ("Q", "a", "b"), 1: ("Q", "b", "a"), 2: ("Q", "c", "a"), 3: ("R", "b", "a"), 4: ("Q", "a", "b ")}
    assert contradictions(texts) == [(0, 1), (0, 2), (1, 4), (2, 4)]


def test_pairs_of_one_row_are_told_apart_and_a_cut_record_is_none(tmp_path):
    seen = [(7, digest, 3, 4, 0.5, 1.0, 0.0, -9.0, -9.0) for digest in (30, 20)]
    table = pair_log.records(4, seen, is_held_out=True)
    assert table["digest"].tolist() == [20, 30] and len(set(pair_log.identity(table).tolist())) == 2
    content = table.tobytes() + pair_log.records(5, seen, is_held_out=False).tobytes()
    (tmp_path / "pairs.bin").write_bytes(content[:-1])
    assert pair_log.read(tmp_path / "pairs.bin")["step"].tolist() == [4, 4, 5]
    pair_log.keep(tmp_path / "pairs.bin", step=5, evaluated=3)
    assert pair_log.read(tmp_path / "pairs.bin")["step"].tolist() == [5]
    (tmp_path / "pairs.bin").write_bytes(b"x" * 99)
    with pytest.raises(UserError, match="is damaged, or another version's"):
        pair_log.read(tmp_path / "pairs.bin")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run on 96 pairs, of which every tenth has its labels flipped; the last two contradict the first two."""
    folder = tmp_path_factory.mktemp("run")
    save_llama(folder / "base", sizes=SIZES)
    pairs = random_pairs(96, seed=5)
    for row in range(0, 96, 10):
        pairs[row].chosen, pairs[row].rejected = pairs[row].rejected, pairs[row].chosen
    save_pairs(folder / "train.jsonl", pairs)
    save_pairs(folder / "held_out.jsonl", random_pairs(16, seed=6))
    cfg = run_config(folder, sizes=SIZES, samples={"num_prompts": 0}, batch_size=8, lr_scheduler=None, keep_last_n=0)
    cfg |= {"optimizer": {"lr": 1e-3}, "epochs": 2, "eval_every_n_epochs": 1}
    (folder / "config.yaml").write_text(json.dumps(cfg))
    run_recipe("full_dpo_single_device", config_paths=[folder / "config.yaml"])
    return folder


def test_a_run_keeps_each_pair_and_lists_flipped_labels_first(made, capsys):
    kept = pair_log.read(made / "run" / "pairs.bin")
    assert (kept["is_held_out"] == 0).sum() == 2 * 96 and (kept["is_held_out"] == 1).sum() == 3 * 16
    assert main(["pairs", str(made / "run"), "--top", "5", "--output", str(made / "all.jsonl")]) == 0
    out = capsys.readouterr().out
    rows = [json.loads(line) for line in (made / "all.jsonl").read_text().splitlines()]
    assert len(rows) == 96 and sum(row["row"] % 10 == 0 for row in rows[:14]) >= 6
    first = json.loads((made / "train.jsonl").read_text().splitlines()[rows[0]["row"]])
    assert (rows[0]["prompt"], rows[0]["chosen"]) == (first["prompt"], first["chosen"])
    assert f"row {rows[0]['row']}: " in out and "label may be wrong" in out and "prompt:" in out


def test_what_is_not_there_is_told_in_a_sentence(made, tmp_path, capsys):
    (made / "train.jsonl").rename(made / "moved.jsonl")
    assert main(["pairs", str(made / "run"), "--top", "1"]) == 0
    assert "texts are not shown: dataset.source=" in capsys.readouterr().out
    (made / "moved.jsonl").rename(made / "train.jsonl")
    for words, said in (
        (["pairs", str(tmp_path)], "holds no metrics.jsonl: it is not the folder of a run"),
        (["pairs", str(tmp_path / "no")], "no such folder"),
        (["pairs", str(made / "run"), "--top", "0"], "--top 0: must be at least 1"),
        (["plot", str(made / "base")], "holds no metrics.jsonl"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_finished_runs_are_plotted_alone_and_over_each_other(made, tmp_path, capsys):
    (made / "run" / "curves.png").unlink()
    assert main(["plot", str(made / "run")]) == 0
    assert (made / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", str(made / "run"), str(made / "run"), "--output", str(tmp_path / "two.png")]) == 0
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG") and "run: " in capsys.readouterr().out


# held-out sets with names


def test_each_held_out_set_with_a_name_is_evaluated_by_itself(made, tmp_path, capsys):
    lines = (made / "held_out.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("math", lines[:5]), ("code", lines[5:] + lines[:1])):  # one of them is in both
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    source = {"math": str(tmp_path / "math.jsonl"), "code": {"source": str(tmp_path / "code.jsonl"), "limit": 9}}
    cfg = run_config(made, sizes=SIZES, output_dir=str(tmp_path / "run"), eval_dataset=source, max_steps=2)
    cfg |= {"keep_best": "code/loss", "eval_every_n_steps": 1, "samples": {"num_prompts": 0}, "optimizer": {"lr": 1e-3}}
    (tmp_path / "c.yaml").write_text(json.dumps(cfg))
    rows = run_recipe("full_dpo_single_device", config_paths=[tmp_path / "c.yaml"])
    out = capsys.readouterr().out
    (last,) = [row for row in rows if row["step"] == 2 and "eval/loss" in row]
    assert last["eval/loss"] == pytest.approx((5 * last["eval/math/loss"] + 9 * last["eval/code/loss"]) / 14)
    assert main(["eval", str(tmp_path / "run"), "--dataset", str(tmp_path / "code.jsonl"), "dataset.limit=9"]) == 0
    alone = dict(re.findall(r"^  eval/(\S+) +(\S+)$", capsys.readouterr().out, re.MULTILINE))
    assert {f"eval/code/{name}" for name in alone.keys() - {"kl_per_token"}} <= set(last)
    assert last["eval/math/pairs"] == 5
    for name in ("loss", "rewards/margins", "rewards/accuracies", "logps/rejected", "pairs", "loss_stderr"):
        assert last[f"eval/code/{name}"] == pytest.approx(float(alone[name]), rel=1e-5, abs=1e-6), name
    best = read_values(tmp_path / "run" / "checkpoints" / "step_2")["best"]
    assert (best["metric"], best["value"]) == ("code/loss", last["eval/code/loss"])
    other = ["keep_best=math/loss", "max_steps=3", "resume=true"]  # whose losses are compared with its own alone
    rows = run_recipe("full_dpo_single_device", *other, config_paths=[tmp_path / "c.yaml"])
    found = read_values(tmp_path / "run" / "checkpoints" / "step_3")["lowest"]
    losses = {row["step"]: row["eval/math/loss"] for row in rows if row["step"] > 1 and "eval/loss" in row}
    lowest = min(losses, key=losses.get)
    assert found == {"step": lowest, "metric": "math/loss", "value": losses[lowest]}
    assert "\n  code: loss " in out and re.search(
        r"\n  math: held-out loss 0.69\S+ before training, 0\.\d+ at step 2", out
    )


# tune eval


def test_an_export_evaluated_again_gives_the_runs_last_evaluation(made, capsys):
    last = [row for row in read_log(made / "run" / "metrics.jsonl") if "eval/loss" in row][-1]
    words = ["eval", str(made / "run"), "--output", str(made / "each.jsonl"), "attention=mask"]
    assert main(words) == 0
    out = capsys.readouterr().out
    found = dict(re.findall(r"^  (eval/\S+) +(\S+)$", out, re.MULTILINE))
    names = "loss", "rewards/chosen", "rewards/margins", "logps/chosen", "pairs", "length_baseline", "kl_per_token"
    for name in names:
        assert float(found[f"eval/{name}"]) == pytest.approx(last[f"eval/{name}"], rel=1e-5, abs=1e-6), name
    rows = [json.loads(line) for line in (made / "each.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(16)) and "accuracy by longer answer" in out
    assert np.mean([row["loss"] for row in rows]) == pytest.approx(last["eval/loss"], abs=1e-6)


def test_a_folder_evaluated_alone_gives_transformers_log_probabilities(made, capsys):
    transformers = pytest.importorskip("transformers")
    rows = [{**json.loads(line), "source": "ab"[n % 2]} for n, line in enumerate((made / "held_out.jsonl").open())]
    (made / "sources.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["eval", str(made / "run" / "export"), "--dataset", str(made / "sources.jsonl"), "dtype=fp32", "device=cpu"]
    words += ["max_length=96", "max_prompt_length=64", "--output", str(made / "alone.jsonl")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "no reference (--reference FOLDER)" in out and re.search(r"accuracy by source\n  a .* of 8 .*\n  b ", out)
    model = transformers.AutoModelForCausalLM.from_pretrained(made / "run" / "export", attn_implementation="eager")
    expected = scores_of(model, random_pairs(16, seed=6))
    found = [json.loads(line)["chosen_logp"] for line in (made / "alone.jsonl").read_text().splitlines()]
    assert found == pytest.approx(expected, rel=1e-5)


def scores_of(model, pairs):
    found = []
    for pair in pairs:
        with torch.no_grad():
            logits = model(torch.tensor([pair.prompt + pair.chosen])).logits[0, len(pair.prompt) - 1 : -1]
        found.append(float(logits.log_softmax(-1)[torch.arange(len(pair.chosen)), torch.tensor(pair.chosen)].sum()))
    return found


def test_a_run_is_evaluated_against_what_it_was_compared_with(made, tmp_path):
    """Its base; another model, if it had one; its base in 4 bits, where its export has that, too; or what is asked."""
    of_run = yaml.safe_load((made / "run" / "config.yaml").read_text())
    for name, folder in (("export", made / "run" / "export"), ("other", made / "base"), ("third", made / "base")):
        (tmp_path / name).symlink_to(folder)
    in_4_bits, other = {"merge_into": "dequantized", "base_dtype": "nf4"}, {"checkpoint_dir": str(tmp_path / "other")}
    for change, asked, expected in (
        ({}, None, (made / "base", None)),
        ({"reference": of_run["reference"] | other}, None, (tmp_path / "other", None)),
        (in_4_bits, None, (made / "base", True)),
        (in_4_bits | {"base_dtype": "int8"}, None, (made / "base", None)),
        (in_4_bits | {"reference": of_run["reference"] | other}, tmp_path / "third", (tmp_path / "third", None)),
        (
            {"merge_into": "original", "reference": other},
            None,
            (tmp_path / "other", True),
        ),  # as QLoRA's other models are
        (in_4_bits | {"reference": other | {"quantize": False}}, None, (tmp_path / "other", False)),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(of_run | change))
        cfg, told = settle(Asked(tmp_path, None, asked, []))
        assert (cfg.reference.name, cfg.reference.checkpoint_dir) == ("model", str(expected[0]))
        assert cfg.reference.quantize == expected[1] and told == f"reference {expected[0]}"
    for change, said in (
        ({"reference": {"name": "none"}}, "the run had no reference"),
        ({"reference": {"name": "sync"}}, "the run's reference moved, and is in no folder"),
        ({"adapter": "sft", "reference": {"name": "start"}}, "the run began from an adapter, and was compared with it"),
        ({"adapter": "sft", "reference": {"name": "adapter_off"}}, ""),
    ):
        assert reference_of(of_run | change) == (made / "base", said)


def test_what_cannot_be_evaluated_is_told_in_a_sentence(made, tmp_path, capsys):
    shutil.copy(made / "run" / "config.yaml", tmp_path)
    for words, said in (
        (["eval", str(made / "base")], "which pairs? --dataset FILE"),
        (["eval", str(tmp_path)], "has no export: the run has not ended"),
    ):
        assert main(words) == 2
        assert said in capsys.readouterr().err


# A policy's own reward


def test_a_policys_own_reward_is_what_its_run_logged_and_transformers_computes(made, tmp_path, capsys):
    """Each answer alone, an empty and a long one among them; and of two models that no run made, the same."""
    transformers = pytest.importorskip("transformers")
    rows = [json.loads(line) for line in (made / "held_out.jsonl").read_text().splitlines()]
    asked = [{"prompt": r["prompt"], "answers": [r["chosen"], " ", r["rejected"], r["chosen"] * 9]} for r in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    names = {"run": [made / "run"], "export": [made / "run" / "export", "--judge-reference", str(made / "base")]}
    found = {}
    for name, (policy, *more) in names.items():
        words = ["--judge", f"implicit:{policy}", *more, "--output", str(tmp_path / f"{name}.jsonl")]
        assert main(["data", "judge", str(tmp_path / "a.jsonl"), *words]) == 0
        out = capsys.readouterr().out
        found[name] = [json.loads(line)["scores"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert "without a verdict (" in out and f"against {made / 'base'}'s" in out
    kept = pair_log.read(made / "run" / "pairs.bin")
    last = np.sort(kept[(kept["is_held_out"] == 1) & (kept["step"] == kept["step"].max())], order="row")
    policy, base = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        for folder in (made / "run" / "export", made / "base")
    )
    for column, answer in ((0, "chosen"), (2, "rejected")):
        pairs = random_pairs(16, seed=6)
        for pair in pairs:
            pair.chosen = getattr(pair, answer)
        expected = [
            0.1 * (one - other) for one, other in zip(*(scores_of(m, pairs) for m in (policy, base)), strict=True)
        ]
        assert max(map(abs, expected)) > 0.1
        for scores in found.values():
            assert [row[column] for row in scores] == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert [row[column] for row in found["run"]] == pytest.approx(last[f"{answer}_reward"].tolist(), abs=1e-5)
    assert {row[1] for row in found["run"]} == {None} and None in {row[3] for row in found["run"]}
    lines = [{"prompt": r["prompt"], "a": r["rejected"], "b": r["chosen"]} for r in rows]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["compare", "--answers", str(tmp_path / "c.jsonl"), "--judge", f"implicit:{made / 'run'}"]) == 0
    wins = int((last["chosen_reward"] > last["rejected_reward"]).sum())
    assert re.search(rf"^b +{wins} +0 +{16 - wins} ", capsys.readouterr().out, re.MULTILINE)


def test_answers_over_the_budget_have_no_reward_whatever_else_is_judged(made, tmp_path, capsys):
    """Alone, and beside others: messages of which none is left beside texts."""
    long, messages = " ".join(f"w{n % 90 + 5}" for n in range(900)), [{"role": "user", "content": "w5 w6"}]
    rows = [{"prompt": messages, "answers": [long]}, {"prompt": "w5 w6", "answers": ["w7", long]}]
    for some, expected in ((rows[:1], [[None]]), (rows, [[None], [True, None]])):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        words = ["data", "judge", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o.jsonl")]
        assert main([*words, "--judge", f"implicit:{made / 'run'}"]) == 0
        scores = [json.loads(line)["scores"] for line in (tmp_path / "o.jsonl").read_text().splitlines()]
        assert [[s is not None or None for s in row] for row in scores] == expected
        (tmp_path / "o.jsonl").unlink()


def test_a_policy_without_a_reward_of_its_own_is_told(made, tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "w5", "answers": ["w7"]}) + "\n")
    of_run = yaml.safe_load((made / "run" / "config.yaml").read_text())
    changes = {
        "no_export": {},
        "simpo": {"loss": {"name": "simpo"}, "reference": {"name": "model"}},
        "sync": {"reference": {"name": "sync"}},
        "ld": {"loss": {"name": "sigmoid", "beta": 0.1, "ld_alpha": 0.3}},
        "adapter": {"adapter": "runs/first/export/adapter"},
    }
    for name, change in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(of_run | change))
        if name != "no_export":
            (tmp_path / name / "export").symlink_to(made / "run" / "export")
    for judge, more, said in (
        (made / "base", [], "likelier than which model finds it? name a reference that is a model's folder"),
        (made / "base", ["--judge-reference", "no"], "its reference no is no folder here"),
        (tmp_path / "no", [], "there is no such folder"),
        (tmp_path, [], "holds no config.json"),
        (tmp_path / "no_export", [], "has no export: the run has not ended"),
        (tmp_path / "sync", [], "the run's reference moved, and is in no folder; name a reference"),
        (tmp_path / "adapter", [], "the run began from an adapter, and was compared with it; name a reference"),
        (tmp_path / "ld", [], "the run's loss weighs tokens beyond the shorter answer by ld_alpha"),
        (tmp_path / "simpo", [], "the run's loss simpo compares with no reference by a beta"),
        (made / "run", ["--judge-budget", "3"], "--judge-budget: has no effect but on an endpoint"),
    ):
        words = ["data", "judge", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "o.jsonl")]
        assert main([*words, "--judge", f"implicit:{judge}", *more]) == 2
        assert said in capsys.readouterr().err
    for judge, said in (
        (made / "run", f"--judge implicit:{made / 'run'}"),
        ("m.f", "--judge-reference: has no effect"),
    ):
        assert main([*words, "--judge", str(judge), *["--judge-reference", "x"] * (judge == "m.f")]) == 2
        assert said in capsys.readouterr().err


# tune report


class Page(HTMLParser):
    """Whether tags nest, and what a page would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.fetched, self.text = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("kind", ["ended", "killed", "killed before its first evaluation after training"])
def test_a_report_is_one_page_that_says_how_the_run_ended(made, tmp_path, capsys, kind):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    prompt = "<script>alert('&')</script>"
    (run / "samples.jsonl").write_text(json.dumps({"prompt": prompt, "before": "one"}) + "\n")
    if kind != "ended":  # as a kill leaves it: the last line cut, no picture, a verdict that was the last evaluation's
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = lines[:4] if "before" in kind else lines[:16]
        (run / "metrics.jsonl").write_text("".join(kept) + '{"step": 9, "lo')
        (run / "verdict.json").write_text(json.dumps({"ended": "no"}))
    assert main(["report", str(run)]) == 0
    text = (run / "report.html").read_text()
    page = Page(text)
    assert page.fetched == [] and "<script" not in text and prompt in "".join(page.text)
    assert ("by a kill or a crash: it did not end" in text) == (kind != "ended")
    said = capsys.readouterr().out
    assert "report.html" in said and f"<strong>{said.split(': ')[1].split(' (up to')[0]}</strong>" in text
    assert "prefers-color-scheme: dark" in text and "row " in text and "tune run" in text
    assert "<td>optimizer.lr</td><td>0.001</td><td>5e-07</td>" in text
    of_rows = [json.loads(line) for line in (made / "held_out.jsonl").read_text().splitlines()]
    shown = re.findall(r"row (\d+): margin.*?<dt>prompt</dt><dd>(.*?)</dd><dt>chosen</dt><dd>(.*?)</dd>", text)
    assert [(p, c) for _, p, c in shown] == [
        (of_rows[int(n)]["prompt"], of_rows[int(n)]["chosen"].strip()) for n, *_ in shown
    ]
    assert len(shown) == 5 and "Training pairs: " in text and re.search(r"rows read +96  100.0 %", text)


def test_the_report_of_a_run_has_texts_as_its_model_sees_them(made):
    """Written by the run, of tokens: nothing is read again."""
    text = (made / "run" / "report.html").read_text()
    assert Page(text).fetched == [] and text.count("<dt>rejected</dt>") == 5
    prompts = {json.loads(line)["prompt"] for line in (made / "held_out.jsonl").read_text().splitlines()}
    assert all(any(p in shown for p in prompts) for shown in re.findall(r"<dt>prompt</dt><dd>(.*?)</dd>", text))


def test_a_run_that_may_be_killed_any_moment_has_a_report_from_its_first_evaluation_on(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    (run / "report.html").unlink()
    log = RunLog(run, World(torch.device("cpu")), None, {}, step=0, evaluated=0)
    log.conclude("no")
    text = (run / "report.html").read_text()
    assert "Made after step 0, while the run went on" in text and Page(text).fetched == []


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LOOK = """<!DOCTYPE html><iframe src="{page}" style="border:0;width:{width}px;height:900px"></iframe><script>
const frame = document.querySelector("iframe");
frame.onload = () => {{ const root = frame.contentDocument.documentElement;
  const bodies = [...root.querySelectorAll("body *")].filter(one => !one.closest(".wide"));
  document.title = JSON.stringify([root.scrollWidth, Math.max(...bodies.map(one => one.getBoundingClientRect().right)),
    getComputedStyle(frame.contentDocument.body).backgroundColor, root.querySelectorAll("svg polyline").length]); }};
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium, where there is apt")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_a_report_whole_on_a_telephone_and_on_a_screen(made, tmp_path, dark):
    shutil.copy(made / "run" / "report.html", tmp_path)
    for width in (400, 1400):
        (tmp_path / "look.html").write_text(LOOK.format(page="report.html", width=width))
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--allow-file-access-from-files",
            "--window-size=1500,1000",
        ]
        flags += [
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        ]
        command = [CHROMIUM, *flags, "--virtual-time-budget=5000", "--dump-dom", f"file://{tmp_path}/look.html"]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
        whole, furthest, back, lines = json.loads(unescape(re.search("<title>(.*?)</title>", dom)[1]))
        assert whole <= width and furthest <= width and lines >= 10
        assert back == ("rgb(20, 22, 26)" if dark else "rgb(255, 255, 255)")


# The card of an export


def test_an_export_has_a_card_by_which_the_hub_lists_it(made, tmp_path):
    """Its metadata as huggingface_hub reads them; what the base's card says of its licence goes on."""
    run = tmp_path / "a run"
    shutil.copytree(made / "run", run)
    base = tmp_path / "base"
    base.mkdir()
    (base / "original_repo_id.json").write_text('{"repo_id": "org/base"}')
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlanguage: [en]\n---\n# Base\n")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["checkpointer"]["checkpoint_dir"] = str(base)
    config["dataset"]["source"] = ["org/pairs", str(tmp_path / "secret place" / "mine.jsonl")]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert is_unedited(run / "export" / "README.md")
    write_card(run)
    card = ModelCard.load(run / "export" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "org/base", "base_model_relation": "finetune", "datasets": ["org/pairs"], "language": ["en"],
        "library_name": "transformers", "license": "other", "license_name": "llama3",
        "pipeline_tag": "text-generation", "tags": ["dpo", "preference-optimization", "pairtune", "torchtune"],
    }  # fmt: skip
    assert "| pairs | 96 of org/pairs, mine.jsonl |" in card.text and "secret place" not in card.text
    last = read_log(run / "metrics.jsonl")[-1]
    assert f"| loss | 0.6931 | {last['eval/loss']:.4g} |" in card.text and "learned" in card.text
    code = re.search("```python\n(.*?)```", card.text, re.DOTALL)[1]
    compile(code, "card", "exec")


def test_a_card_that_was_edited_is_not_written_over(made, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(made / "run", run)
    places.check(places.look(run), continues=True, reads=[])
    with (run / "export" / "README.md").open("a") as card:
        card.write("my words\n")
    with pytest.raises(UserError, match="holds README.md, which no run writes"):
        places.check(places.look(run), continues=True, reads=[])
