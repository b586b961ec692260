"""The three single-device recipes, run whole on a tiny Llama: what they compute, log, refuse and leave behind."""

import json
import math
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torchtune
from helpers import (
    ENVIRONMENT,
    NF4_SIZES,
    ROOT,
    padded_logps,
    random_pairs,
    run_recipe,
    save_llama,
    save_pairs,
    tiny_llama,
)
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import hf_to_tune

from pairtune import config, models
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint
from pairtune.folders.export import Probe, check_export, probe
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

RECIPES = ("full_dpo_single_device", "lora_dpo_single_device", "qlora_dpo_single_device")
METRICS = {
    "step", "epoch", "loss", "lr", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins",
    "rewards/accuracies", "logps/chosen", "logps/rejected", "pairs_per_second", "tokens_per_second", "peak_memory_gib",
}  # fmt: skip


@pytest.fixture
def work(tmp_path):
    """A model, 24 pairs, 6 held-out pairs and a config in a folder of their own."""
    save_llama(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", random_pairs(24, seed=1))
    save_pairs(tmp_path / "held_out.jsonl", random_pairs(6, seed=2))
    model = {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}
    cfg = {
        "output_dir": str(tmp_path / "run"),
        "device": "cpu",
        "dtype": "fp32",
        "model": model,
        "checkpointer": {"checkpoint_dir": str(tmp_path / "base"), "model_type": "LLAMA3"},
        "dataset": {"source": str(tmp_path / "train.jsonl")},
        "eval_dataset": {"source": str(tmp_path / "held_out.jsonl")},
        "max_length": 96,
        "max_prompt_length": 64,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-3},
        "pairs_per_step": 8,
        "batch_size": 4,
        "samples": {"num_prompts": 2, "max_new_tokens": 5},
        "lora": {"rank": 4, "alpha": 8},
        "per_method": {"lora": {"optimizer": {"lr": 1e-2}}, "qlora": {"optimizer": {"lr": 1e-2}}},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    return tmp_path


def run(work, recipe, *overrides):
    return run_recipe(recipe, *overrides, config_paths=[work / "config.yaml"])


def losses(log):
    return [row["loss"] for row in log if "loss" in row]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_learns_and_its_folder_holds_everything(work, recipe, capsys):
    log = run(work, recipe, "epochs=6", "eval_every_n_steps=9")
    training, evaluation = [r for r in log if "loss" in r], [r for r in log if "eval/loss" in r]
    assert [r["step"] for r in training] == list(range(1, 19))
    assert [r["step"] for r in evaluation] == [9, 18]
    assert all(set(r) == METRICS for r in training)
    assert training[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert training[0]["rewards/margins"] == training[0]["rewards/accuracies"] == 0
    assert training[0]["grad_norm"] > 0
    assert training[-1]["loss"] < 0.5 < training[-1]["rewards/accuracies"]
    files = {str(p.relative_to(work / "run")) for p in (work / "run").rglob("*") if p.is_file()}
    expected = {"config.yaml", "metrics.jsonl", "curves.png", "samples.jsonl", "export/config.json"}
    expected |= {"export/model.safetensors", "export/tokenizer.json", "export/tokenizer_config.json"}
    expected |= {"export/generation_config.json"}  # the base has none: it comes of the run's tokenizer
    if not recipe.startswith("full"):
        expected |= {"export/adapter/adapter_model.safetensors", "export/adapter/adapter_config.json"}
        expected |= {"export/adapter/tokenizer.json"}
    assert expected <= files
    assert (work / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (work / "run" / "samples.jsonl").read_text().splitlines()]
    assert [set(s) for s in samples] == [{"prompt", "before", "after"}] * 2
    out = capsys.readouterr().out
    assert "rows read" in out and "held out loss" in out


def test_the_first_held_out_evaluation_is_the_reference_itself(work):
    log = run(work, "lora_dpo_single_device", "max_steps=1", "optimizer.lr=1e-30")
    (evaluation,) = [r for r in log if "eval/loss" in r]
    assert evaluation["eval/loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("recipe", RECIPES)
def test_how_a_step_is_cut_into_batches_changes_nothing(work, recipe):
    whole = run(work, recipe, "batch_size=8", "epochs=2")
    cut = run(work, recipe, "batch_size=1", "epochs=2")
    for one, other in zip(whole, cut, strict=True):
        for key in METRICS - {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}:
            if key in one:
                assert other[key] == pytest.approx(one[key], rel=2e-4, abs=2e-5), key


def test_a_last_step_with_fewer_pairs_is_a_mean_over_these(work):
    """24 pairs in steps of 16: the second step has 8, whose gradient is not shrunk; nothing moves at this lr."""
    log = run(work, "full_dpo_single_device", "pairs_per_step=16", "optimizer.lr=1e-30", "shuffle=false")
    alone = run(work, "full_dpo_single_device", "pairs_per_step=8", "optimizer.lr=1e-30", "shuffle=false")
    assert [r["epoch"] for r in log if "loss" in r] == [0.5, 1.0]
    assert log[1]["grad_norm"] == pytest.approx(alone[2]["grad_norm"], rel=1e-4)
    assert log[1]["logps/chosen"] == pytest.approx(alone[2]["logps/chosen"], rel=1e-6)


def test_the_saved_config_repeats_the_run(work):
    first = run(work, "lora_dpo_single_device", "epochs=2", "loss.beta=0.3")
    saved = work / "run" / "config.yaml"
    again = run_recipe("lora_dpo_single_device", f"output_dir={work / 'again'}", config_paths=[saved])
    assert losses(again) == losses(first)


def test_evaluating_changes_no_training_number(work):
    quiet = run(work, "lora_dpo_single_device", "epochs=2")
    watched = run(work, "lora_dpo_single_device", "epochs=2", "eval_every_n_steps=1")
    assert losses(watched) == losses(quiet)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("setting", ["enable_activation_checkpointing=true", "attention=mask"])
def test_what_only_costs_or_saves_memory_changes_no_number(work, recipe, setting):
    plain, changed = run(work, recipe), run(work, recipe, setting)
    assert losses(changed) == pytest.approx(losses(plain), abs=1e-5)


COUNT = """
import json, sys
from pathlib import Path
from helpers import run_recipe
from torch._dynamo.utils import counters
log = run_recipe("lora_dpo_single_device", *sys.argv[2:], config_paths=[Path(sys.argv[1])])
print(json.dumps([counters["frames"], log]))
"""


def test_every_kind_of_forward_is_compiled_and_gives_the_same_losses(work):
    """Of evaluation, reference, a whole step's values and training, in several shapes: torch gives up at a limit.

    In a process of its own: what other tests have compiled counts, too.
    """
    settings = ["loss=aot", "batch_size=4", "eval_every_n_steps=2", "max_steps=6", "samples.num_prompts=0"]
    command = [sys.executable, "-c", COUNT, str(work / "config.yaml"), *settings, "compile=true"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    frames, compiled = json.loads(done.stdout.splitlines()[-1])
    assert frames["ok"] == frames["total"] > 8
    assert losses(compiled) == pytest.approx(losses(run(work, "lora_dpo_single_device", *settings)), abs=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_bf16_starts_at_ln_2_and_learns(work, recipe):
    log = run(work, recipe, "dtype=bf16", "epochs=6")
    assert losses(log)[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses(log)[-1] < 0.5


def test_the_hinge_loss_is_what_its_paper_says(work):
    """RSO, arXiv 2309.06657, eq. 10 with gamma as beta: relu(1 - gamma * margin), margin in nats."""
    log = run(work, "lora_dpo_single_device", "loss=torchtune.rlhf.loss.RSOLoss", "loss.gamma=0.2", "pairs_per_step=1",
              "batch_size=1", "eval_dataset.source=null")  # fmt: skip
    assert log[0]["loss"] == 1.0
    for row in log:  # rewards are gamma times the log-ratios already
        assert row["loss"] == pytest.approx(max(0.0, 1 - row["rewards/margins"]), abs=1e-5)


def test_logged_numbers_are_those_of_a_naive_computation(work):
    """The reference's log-probabilities, chosen and rejected, from torchtune's padded forward on the same pairs."""
    pairs = random_pairs(24, seed=1)
    expected = padded_logps(tiny_llama(**NF4_SIZES), pairs).detach()
    log = run(work, "lora_dpo_single_device", "pairs_per_step=24", "shuffle=false")
    assert log[0]["logps/chosen"] == pytest.approx(expected[:24].mean().item(), abs=1e-4)
    assert log[0]["logps/rejected"] == pytest.approx(expected[24:].mean().item(), abs=1e-4)


def test_the_tensorboard_logger_gets_what_metrics_jsonl_gets(work):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    component = "torchtune.training.metric_logging.TensorBoardLogger"
    log = run(work, "lora_dpo_single_device", f"metric_logger={{_component_: {component}, log_dir: {work / 'tb'}}}")
    (folder,) = {p.parent for p in (work / "tb").rglob("events*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [float(e.tensor_proto.float_val[0]) for e in events.Tensors("loss")] == pytest.approx(losses(log), rel=1e-6)
    assert "eval/rewards/accuracies" in events.Tags()["tensors"]


def test_the_wandb_logger_gets_what_metrics_jsonl_gets(work, monkeypatch):
    """Offline: nothing leaves the machine. Its own summary holds the last value of each metric, its config ours."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = {}
    monkeypatch.setattr(wandb, "finish", lambda finish=wandb.finish: (seen.update(read_wandb()), finish()))

    def read_wandb():
        return {"loss": wandb.run.summary["loss"], "step": wandb.run.step, "pairs": wandb.run.config["pairs_per_step"]}

    component = "torchtune.training.metric_logging.WandBLogger"
    log = run(work, "lora_dpo_single_device", f"metric_logger={{_component_: {component}, log_dir: {work / 'wandb'}}}")
    assert seen["loss"] == losses(log)[-1] and seen["pairs"] == 8 and seen["step"] >= 3
    assert list((work / "wandb").rglob("*.wandb"))


def test_dropout_that_has_no_effect_is_said_and_without_it_it_has_one(work, capsys):
    plain = run(work, "lora_dpo_single_device", "epochs=2")
    capsys.readouterr()
    off = run(work, "lora_dpo_single_device", "epochs=2", "lora.dropout=0.5")
    assert "lora.dropout, has no effect" in capsys.readouterr().out
    assert losses(off) == losses(plain)
    on = run(work, "lora_dpo_single_device", "epochs=2", "lora.dropout=0.5", "disable_dropout=false")
    assert losses(on)[-1] != losses(plain)[-1]


def test_questions_of_ones_own_are_answered(work):
    run(work, "lora_dpo_single_device", "samples.prompts=[w7 w8, w9]")
    samples = [json.loads(line) for line in (work / "run" / "samples.jsonl").read_text().splitlines()]
    assert [s["prompt"].split() for s in samples] == [["w7", "w8"], ["w9"]]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("checkpointer.checkpoint_dir=/nowhere", ["/nowhere", "no such folder", "tune download"]),
        ("checkpointer.model_type=LAMA", ["model_type", "LAMA", "LLAMA3"]),
        ("max_length=200", ["max_length=200", "128 positions"]),
        ("model.vocab_size=300", ["320 token ids", "300"]),
        ("model.num_layer=2", ["num_layer", "num_layers"]),
        ("dataset.source=/nowhere.jsonl", ["/nowhere.jsonl"]),
        ("lr_scheduler.num_warmup_steps=30", ["num_warmup_steps", "30", "3 steps"]),
        ("optimizer.weight_decay=-1", ["optimizer", "weight_decay"]),
        ("loss=torchtune.rlhf.loss.PPOLoss", ["loss", "PPOLoss"]),
        ("model.rope_base=500000", ["rope_theta", "config.json", "do not belong together"]),
        ("device=cuda:7", ["cuda:7", "0 GPUs"]),
    ],
)
def test_a_mistake_is_told_before_weights_are_read(work, override, words):
    (work / "base" / "model.safetensors").write_bytes(b"reading this fails in another way")
    with pytest.raises(UserError) as error:
        run(work, "lora_dpo_single_device", override)
    for word in words:
        assert word in str(error.value)


def test_a_missing_shard_is_named(work):
    (work / "base" / "model.safetensors").rename(work / "base" / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (work / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="1 of them are missing: model-00002-of-00002.safetensors"):
        run(work, "lora_dpo_single_device")


def test_a_gradient_that_is_no_number_is_told_before_the_first_update(work):
    weights = load_file(work / "base" / "model.safetensors")
    weights["model.norm.weight"][0] = 3e38  # a number yet, so that loading does not refuse it
    save_file(weights, work / "base" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"before the first update the gradient's norm is nan; weights that are not"):
        run(work, "lora_dpo_single_device", "samples.num_prompts=0")


# Exports, against transformers and PEFT


def scores_in_transformers(model, pairs):
    logps = []
    for answers in ("chosen", "rejected"):
        for pair in pairs:
            prompt, answer = pair.prompt, getattr(pair, answers)
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum())
    return torch.stack(logps)


def trained_scores(work, pairs, monkeypatch, recipe, *overrides):
    """Runs a recipe and returns what its trained policy, adapters on, gives these pairs."""
    scores = {}
    original = models.gather_weights

    def gather_weights(model, world, **options):
        with torch.no_grad():
            scores["policy"] = torch.cat(answer_logps(model, lay_out(pairs)))
        return original(model, world, **options)

    monkeypatch.setattr(models, "gather_weights", gather_weights)
    run(work, recipe, "epochs=8", *overrides)
    return scores["policy"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_merged_weights_are_the_policy_in_transformers(work, recipe, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    pairs = random_pairs(6, seed=2)
    as_trained = ["merge_into=dequantized"] if recipe.startswith("qlora") else []
    trained = trained_scores(work, pairs, monkeypatch, recipe, *as_trained)
    exported = AutoModelForCausalLM.from_pretrained(work / "run" / "export", attn_implementation="eager")
    assert exported.dtype == torch.float32
    torch.testing.assert_close(scores_in_transformers(exported, pairs), trained, rtol=1e-5, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    assert (scores_in_transformers(base, pairs) - trained).abs().max() > 0.1
    assert AutoTokenizer.from_pretrained(work / "run" / "export").decode([7, 8]) == "w7 w8"


def test_the_adapter_on_the_base_is_the_policy_in_peft(work, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    pairs = random_pairs(6, seed=2)
    trained = trained_scores(work, pairs, monkeypatch, "lora_dpo_single_device")
    model = AutoPeftModelForCausalLM.from_pretrained(work / "run" / "export" / "adapter", dtype=torch.float32)
    torch.testing.assert_close(scores_in_transformers(model, pairs), trained, rtol=1e-5, atol=1e-4)


# What an export is compared with before the run says that it is done


def test_qloras_adapters_go_into_the_original_base_and_the_difference_is_told(work, capsys):
    run(work, "qlora_dpo_single_device", "epochs=2", "lora.modules=[q_proj]")
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "exported weights" in line]
    difference = float(re.search(r"within (\S+) nats a token of the trained model's", told)[1])
    assert 1e-3 < difference < 1  # what 4 bits round away
    base, exported = (load_file(work / folder / "model.safetensors") for folder in ("base", "run/export"))
    adapter = load_file(work / "run" / "export" / "adapter" / "adapter_model.safetensors")
    for name, value in exported.items():
        layer, expected = f"base_model.model.{name.removesuffix('.weight')}", base[name]
        if "q_proj" in name:
            a, b = (adapter[f"{layer}.lora_{part}.weight"].double() for part in "AB")
            expected = (expected.double() + 2.0 * b @ a).float()
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0, msg=name)
    run(work, "qlora_dpo_single_device", "epochs=2", "lora.modules=[q_proj]", "merge_into=dequantized")
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "exported weights" in line]
    assert float(re.search(r"within (\S+) nats", told)[1]) < 1e-4


def test_an_export_that_is_not_the_trained_model_is_refused(work):
    run(work, "lora_dpo_single_device", "max_steps=2")
    exported = work / "run" / "export"
    files = checkpoint.open_weights({"checkpoint_dir": str(work / "base"), "model_type": "LLAMA3"})
    component = {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}
    model = models.full(component, dtype="fp32")
    models.prepare(model, max_length=96)
    pairs = random_pairs(3)
    weights = checkpoint.Weights(checkpoint.open_weights({"checkpoint_dir": str(exported), "model_type": "LLAMA3"}))
    models.load(model, weights, world=World(torch.device("cpu")))
    trained, same = probe(model, lay_out(pairs)), {"dtype": "fp32", "max_length": 96}
    assert "within 0 nats" in check_export(exported, files, component, trained, **same)
    one_token = [SimpleNamespace(prompt=pair.prompt, chosen=[2], rejected=[3]) for pair in pairs]
    close = probe(model, lay_out(one_token))
    off = Probe(close.batch, tuple(logps + 0.25 for logps in close.logps))  # twice what parts bf16 logits of 20
    check_export(exported, files, component, off, **same | {"dtype": "bf16"})
    changed = load_file(exported / "model.safetensors")
    changed["lm_head.weight"] = changed["lm_head.weight"].flip(0)
    save_file(changed, exported / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="nats a token.*this is not the trained model"):
        check_export(exported, files, component, trained, **same)


# torchtune's own recipe, on the same weights, pairs, order and adapters


class Padding:
    """All that torchtune's recipe asks of a tokenizer when the rows are tokens already."""

    pad_id = 0


def tokenized_rows(tokenizer, *, count, seed):
    """random_pairs as torchtune's DPO recipes read them; named in the peer's config."""
    rows = []
    for pair in random_pairs(count, seed=seed):
        row = {}
        for kind in ("chosen", "rejected"):
            answer = getattr(pair, kind)
            row[f"{kind}_input_ids"] = pair.prompt + answer
            row[f"{kind}_labels"] = [-100] * len(pair.prompt) + answer
        rows.append(row)
    return rows


def test_ten_steps_follow_torchtunes_own_recipe(work):
    from omegaconf import OmegaConf

    save_pairs(work / "train.jsonl", random_pairs(40, seed=5))
    common = {"_component_": "torch.optim.AdamW", "lr": 1e-2, "weight_decay": 0.0}
    ours = run(work, "lora_dpo_single_device", "pairs_per_step=4", "shuffle=false", "optimizer.lr=1e-2",
               "lr_scheduler=null", "clip_grad_norm=null", "lora.modules=[q_proj,v_proj,mlp]", "samples.num_prompts=0",
               "seed=3", "eval_dataset.source=null")  # fmt: skip
    path = Path(torchtune.__file__).parents[1] / "recipes" / "lora_dpo_single_device.py"
    lora = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8}
    peer = {
        "output_dir": str(work / "peer"), "device": "cpu", "dtype": "fp32", "seed": 3, "compile": False,
        "model": {"_component_": "torchtune.models.llama3.lora_llama3", **NF4_SIZES, **lora},
        "checkpointer": {
            "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(work / "base"),
            "checkpoint_files": ["model.safetensors"], "model_type": "LLAMA3", "output_dir": str(work / "peer"),
        },
        "tokenizer": {"_component_": f"{__name__}.Padding"},
        "dataset": {"_component_": f"{__name__}.tokenized_rows", "count": 40, "seed": 5},
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1}, "optimizer": common, "epochs": 1,
        "lr_scheduler": None, "max_steps_per_epoch": None, "gradient_accumulation_steps": 1, "batch_size": 4,
        "shuffle": False, "resume_from_checkpoint": False, "enable_activation_checkpointing": False,
        "log_every_n_steps": 1, "save_adapter_weights_only": True,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(work / "peer"),
            "filename": "log.txt",
        },
    }  # fmt: skip
    peer = OmegaConf.create(peer)
    recipe = runpy.run_path(str(path))["LoRADPORecipeSingleDevice"](cfg=peer)
    recipe.setup(cfg=peer)
    world = World(torch.device("cpu"))
    torch.manual_seed(3)  # our recipe's adapters
    model = models.lora({"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}, rank=4, alpha=8.0, dropout=0.0,
                        modules=["q_proj", "v_proj", "mlp"], dtype="fp32")  # fmt: skip
    heads = {"num_heads": NF4_SIZES["num_heads"], "num_kv_heads": NF4_SIZES["num_kv_heads"], "dim": 128}
    weights = hf_to_tune(load_file(work / "base" / "model.safetensors"), **heads)
    models.load(model, weights, world=world)
    recipe._model.load_state_dict(models.only_adapters(model, models.gather_weights(model, world)), strict=False)
    recipe.train()
    recipe.cleanup()
    lines = (work / "peer" / "log.txt").read_text().splitlines()
    theirs = [dict(part.split(":") for part in line.split(" | ")[1].split()) for line in lines if "loss" in line]
    assert len(theirs) == len(ours) == 10
    for mine, row in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(float(row["loss"]), abs=1e-5)
        assert mine["rewards/margins"] == pytest.approx(float(row["rewards/margins"]), abs=1e-4)
        assert mine["logps/chosen"] == pytest.approx(float(row["log_probs/chosen"]), abs=1e-3)
    assert ours[-1]["loss"] < 0.68  # it moved: ten equal numbers would prove little


# The config for real


@pytest.mark.parametrize("recipe", RECIPES)
def test_llama3_8b_builds_from_its_config(recipe):
    module = runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))
    cfg = config.load(module["METHOD"], module["DEFAULTS"], [ROOT / "configs" / "llama3_8b.yaml"], [])
    if module["METHOD"] == "full":
        model = models.full(cfg.model, dtype=cfg.dtype)
    else:
        model = models.lora(cfg.model, **cfg.lora, dtype=cfg.dtype, quantize_base=module["METHOD"] == "qlora")
    models.prepare(model, max_length=cfg.max_length, vocab_size=128_256)
    total, trained = models.num_parameters(model)
    base = 8_030_261_248  # the number of parameters on the model's card
    adapters = 0 if module["METHOD"] == "full" else 41_943_040  # 32 layers, rank 16 on all seven matrices
    assert (total, trained) == (base + adapters, adapters or base)
    assert all(p.is_meta for p in model.parameters())
