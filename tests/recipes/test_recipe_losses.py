"""Every loss and every reference through whole recipes: by one line of config, on any number of processes."""

import json
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from helpers import (
    NF4_SIZES,
    ROOT,
    SHARDED_SIZES,
    from_first_step,
    padded_logps,
    random_pairs,
    run_config,
    run_recipe,
    save_llama,
    save_pairs,
    start_two,
    tiny_llama,
)
from safetensors.torch import load_file
from test_losses import naive

from pairtune import models
from pairtune.errors import UserError
from pairtune.losses.modules import LOSSES
from pairtune.reference import cache as reference_cache
from pairtune.run.metrics import draw_curves, plot_curves, read_log

# Those whose loss before the first update is that of zero margins, from the formulas at their defaults.
AT_START = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 25.0,  # (0 - 1 / (2 * 0.1))^2
    "exo_pair": 0.5 * (math.log(0.5) - math.log(1 - 1e-3)) + 0.5 * (math.log(0.5) - math.log(1e-3)),
    "nca_pair": 2 * math.log(2),
    "robust": math.log(2),  # (0.9 - 0.1) / (1 - 0.2)
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 2 * 500.0**2,  # 0.5 / 0.001
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * math.log(2) + 0.5,
    "dpop": math.log(2),
    "kto": 0.5,
}
OPTIONS = {"mixture": "loss=[{name: sigmoid},{name: aot,weight: 0.5},{name: sft,weight: 0.2}]"}
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
LIVE = {"eval/kl_per_token"}  # which takes the reference's model, not its values


def write_inputs(folder, sizes=NF4_SIZES):
    save_llama(folder / "base", sizes=sizes)
    save_pairs(folder / "train.jsonl", random_pairs(40, seed=1))
    save_pairs(folder / "held_out.jsonl", random_pairs(8, seed=2))
    cfg = run_config(
        folder,
        sizes=sizes,
        optimizer={"_component_": "torch.optim.AdamW", "lr": 5e-3},
        lr_scheduler=None,
        batch_size=8,
        epochs=2,
        samples={"num_prompts": 0},
        per_method={"full": {"optimizer": {"lr": 1e-3}}},
    )
    (folder / "config.yaml").write_text(json.dumps(cfg))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("losses")
    write_inputs(folder)
    return folder


@pytest.fixture
def run(inputs, tmp_path):
    def run(recipe, *overrides, name="run"):
        folder = tmp_path / name
        return run_recipe(recipe, f"output_dir={folder}", *overrides, config_paths=[inputs / "config.yaml"])

    return run


def training(log):
    return [row for row in log if "loss" in row]


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_by_its_name_learns_and_does_not_depend_on_micro_batches(run, name):
    loss = OPTIONS.get(name, f"loss={name}")
    whole = run("lora_dpo_single_device", loss)
    cut = run("lora_dpo_single_device", loss, "batch_size=1", name="cut")
    if name in AT_START:
        assert training(whole)[0]["loss"] == pytest.approx(AT_START[name], rel=1e-5)
    for one, other in zip(training(whole), training(cut), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-4), one["step"]
    evaluation = whole[-1]
    start = margin_of_the_base(name) if name in ("simpo", "orpo", "cpo") else 0.0
    if name in ("sft", "discopop"):  # sft is about likelihood; DiscoPOP's small margins shrink at first
        assert evaluation["eval/loss"] < training(whole)[0]["loss"]
    else:
        assert evaluation["eval/rewards/margins"] > start
        assert evaluation["eval/rewards/accuracies"] > 0.5


def values_of_the_base(pairs):
    """What `naive` takes, of a policy that is the reference, by torchtune's padded forward in float64."""
    with torch.no_grad():
        logps = padded_logps(tiny_llama(**NF4_SIZES).double(), pairs).chunk(2)
    lengths = [torch.tensor([len(getattr(pair, answer)) for pair in pairs]) for answer in ("chosen", "rejected")]
    return [*logps, *logps], {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]}


def margin_of_the_base(name):
    """The held-out margin before training, of a loss without a reference."""
    (chosen, rejected, *_), lengths = values_of_the_base(random_pairs(8, seed=2))
    if name == "cpo":
        margins = 0.1 * (chosen - rejected)
    else:
        beta = {"simpo": 2.0, "orpo": 0.1}[name]
        margins = beta * (chosen / lengths["chosen_lengths"] - rejected / lengths["rejected_lengths"])
    return margins.mean().item()


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in AT_START])
def test_a_loss_that_needs_more_than_margins_starts_at_its_closed_form(run, name):
    """The first step is the whole data set."""
    log = run("lora_dpo_single_device", OPTIONS.get(name, f"loss={name}"), "pairs_per_step=40", "max_steps=1")
    terms = [{"name": "sigmoid"}, {"name": "aot", "weight": 0.5}, {"name": "sft", "weight": 0.2}]
    logps, lengths = values_of_the_base(random_pairs(40, seed=1))
    expected = naive(name, {"terms": terms} if name == "mixture" else {}, logps, lengths).mean().item()
    assert training(log)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("name", "same"), [("sigmoid", "DPOLoss"), ("hinge", "RSOLoss")])
def test_ours_and_torchtunes_are_interchangeable(run, name, same):
    ours = run("lora_dpo_single_device", f"loss={name}")
    theirs = run("lora_dpo_single_device", f"loss=torchtune.rlhf.loss.{same}", name="theirs")
    for one, other in zip(training(ours), training(theirs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["loss=ipoo"], "loss.name=ipoo: no such loss; nearest: ipo"),
        (["loss=nca_pair", "loss.label_smoothing=0.1"], "loss.label_smoothing: NcaPair has no such argument"),
        (["loss=robust", "loss.label_smoothing=0.5"], "loss.label_smoothing=0.5"),
        (["loss=sigmoid", "loss.beta=-1"], "loss.beta=-1"),
        (["loss=simpo", "loss.f_divergence=js"], "loss.f_divergence: Simpo has no such argument"),
        (["loss=sigmoid", "loss.f_divergence=jss"], "must be one of reverse_kl"),
        (["reference=adapter_of"], "reference.name=adapter_of"),
        (
            ["reference=model"],
            "reference=model: would hold the base a second time, which is here already; use reference=adapter_off",
        ),
        (["loss=simpo", "reference=cached"], "reference=cached: this loss has no reference"),
        (["reference=sync", "reference.alpha=1.5"], "reference.alpha=1.5: must be above 0 and at most 1"),
        (["reference.alpha=0.5"], "reference.alpha=0.5: has no effect with reference=adapter_off, only with sync"),
        (["reference=start", "reference.every_n_steps=9"], "reference.every_n_steps=9: has no effect with"),
        (["reference.checkpoint_dir=x"], "only with model or cached; nearest valid: reference.checkpoint_dir=null or"),
        (["reference=sync", "reference.quantize=true"], "reference.quantize=true: has no effect with reference=sync"),
        (["reference=none", "reference.dtype=bf16"], "reference.dtype=bf16: has no effect with reference=none"),
        (["reference=model", "reference.dtype=fp8"], "reference.dtype=fp8: must be one of bf16, fp32"),
        (["reference=model", "reference.cache_dir=x"], "reference.cache_dir=x: has no effect with reference=model"),
        (
            ["reference=model", "reference.model=torchtune.models.llama3.llama3_8b"],
            "reference.model=torchtune.models.llama3.llama3_8b: the run's own weights are those of `model`",
        ),
        (
            ["reference=model", "reference.checkpoint_dir=x", "reference.model=torchtune.models.llama3.lama3_8b"],
            "reference.model._component_=torchtune.models.llama3.lama3_8b: cannot be imported",
        ),
        (
            ["reference=model", "reference.checkpoint_dir=x", "reference.model=torch.optim.AdamW"],
            "reference.model._component_=torch.optim.AdamW: makes no model",
        ),
        (["reference=model", "reference.checkpoint_dir=nowhere"], "reference.checkpoint_dir=nowhere: no such folder"),
        (
            ["loss=simpo", "reference=model", "reference.checkpoint_dir=x"],
            "reference=model: this loss has no reference, and none is loaded",
        ),
        (["adapter=x", "reference=model"], "reference=model: the run starts from an adapter"),
        (["adapter=x", "reference=cached", "reference.quantize=true"], "the model without it is another one"),
    ],
)
def test_what_a_loss_or_recipe_does_not_have_is_refused(run, settings, words):
    with pytest.raises(UserError) as refusal:
        run("lora_dpo_single_device", *settings)
    assert words in str(refusal.value)


SETTLED = 4 + 2  # forwards of a model that is loaded: two pairs' conversations one by one, and twice together


def test_a_loss_without_reference_loads_and_runs_none(run, capsys):
    """Every forward of a whole model is counted: a reference's doubles them."""
    forwards = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: forwards.append(1) if type(module).__name__ == "TransformerDecoder" else None
    )
    try:
        run("full_dpo_single_device", "loss=simpo", "max_steps=2", "batch_size=8")
        alone = len(forwards)
        forwards.clear()
        run("full_dpo_single_device", "loss=sigmoid", "max_steps=2", "batch_size=8", name="with")
    finally:
        hook.remove()
    # A dry run, two steps, two evaluations, with the reference's, which is remembered for the second, and both are
    # compared before the first step; next tokens are drawn, and looked at by both; then the export is compared with the
    # model.
    assert alone == SETTLED + 5 + 2 and len(forwards) == 2 * SETTLED + 9 + 2 + 3 + 2


def test_llama_3s_option_changes_the_loss_and_stays_exact(run):
    whole = run("lora_dpo_single_device", "loss=rpo", "loss.alpha=0.2", name="whole")
    cut = run("lora_dpo_single_device", "loss=rpo", "loss.alpha=0.2", "score_end=false", name="cut")
    small = run("lora_dpo_single_device", "loss=rpo", "loss.alpha=0.2", "score_end=false", "batch_size=1", name="small")
    assert training(cut)[0]["logps/chosen"] > training(whole)[0]["logps/chosen"]  # a token less
    assert training(cut)[0]["loss"] != pytest.approx(training(whole)[0]["loss"], abs=1e-4)
    for one, other in zip(training(cut), training(small), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-4)


def test_kto_fits_its_rows_of_one_length(run):
    """Prompts stand before other prompts' answers there."""
    log = run("lora_dpo_single_device", "loss=kto", "attention=mask", "max_steps=3", name="mask")
    segments = run("lora_dpo_single_device", "loss=kto", "max_steps=3", name="segments")
    for one, other in zip(training(log), training(segments), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)


def take_apart(folder):
    """Writes the pairs as one desirable and one undesirable row each; returns the overrides that read them."""
    for name in ("train", "held_out"):
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        apart = [
            {"prompt": row["prompt"], "completion": row[answer], "label": answer == "chosen"}
            for row in rows
            for answer in ("chosen", "rejected")
        ]
        (folder / f"{name}_apart.jsonl").write_text("".join(json.dumps(row) + "\n" for row in apart))
    sources = {"dataset": folder / "train_apart.jsonl", "eval_dataset": folder / "held_out_apart.jsonl"}
    return ["loss=kto", *(f"{key}.source={path}" for key, path in sources.items())]


@pytest.fixture(scope="module")
def answers(inputs):
    return take_apart(inputs)


def test_kto_learns_from_answers_that_are_not_in_pairs(run, answers):
    whole = run("lora_dpo_single_device", *answers, "batch_size=8")
    cut = run("lora_dpo_single_device", *answers, "batch_size=1", "attention=mask", name="cut")
    assert training(whole)[0]["loss"] == pytest.approx(0.5, rel=1e-5)
    for one, other in zip(training(whole), training(cut), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3, abs=1e-4), one["step"]
    assert whole[-1]["eval/rewards/margins"] > 0.1
    assert "eval/rewards/accuracies" not in whole[-1] and "rewards/accuracies" not in whole[0]


def test_answers_taken_apart_have_the_gradient_of_their_pairs(run, answers):
    """At the start, where KTO's baseline is 0 whichever answers it comes from."""
    options = ["shuffle=false", "max_steps=1", "eval_every_n_steps=null"]
    pairs = run("full_dpo_single_device", "loss=kto", *options, name="pairs")
    apart = run("full_dpo_single_device", *answers, *options, "pairs_per_step=16", name="apart")
    assert apart[0]["grad_norm"] == pytest.approx(pairs[0]["grad_norm"], rel=1e-5)
    for key in ("logps/chosen", "logps/rejected"):
        assert apart[0][key] == pytest.approx(pairs[0][key], rel=1e-6)
    for key in ("eval/logps/chosen", "eval/rewards/chosen", "eval/rewards/margins"):
        assert apart[-1][key] == pytest.approx(pairs[-1][key], rel=1e-3, abs=1e-6)


def test_desirable_weights_weigh(run, answers):
    plain = run("lora_dpo_single_device", *answers, "max_steps=1", name="plain")
    heavy = run("lora_dpo_single_device", *answers, "loss.desirable_weight=3", "max_steps=1", name="heavy")
    assert plain[0]["loss"] == pytest.approx(0.5, rel=1e-5)
    num_desirable = 8 * (heavy[0]["loss"] / 0.5 - 1) / 2  # n of eight answers: the loss is (8 + 2 n) / 8 of 0.5
    assert num_desirable == pytest.approx(round(num_desirable), abs=1e-3) and 1 <= round(num_desirable) <= 7


def test_settings_outside_of_what_was_published_are_told_once_with_a_source(run, capsys):
    run("lora_dpo_single_device", "loss=ipo", "loss.beta=5", "max_steps=1")
    run("lora_dpo_single_device", "loss=sigmoid", "loss.beta=5", "max_steps=1", name="sigmoid")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "advice: loss.beta" in line]
    assert "loss.beta=5: published runs of sigmoid used 0.01" in line and "SmolLM2" in line


# References


def test_dpo_on_top_of_an_adapter_starts_at_ln_2_against_that_adapter(run, tmp_path):
    run("lora_dpo_single_device", "loss=sft", name="sft")
    adapter = f"adapter={tmp_path / 'sft' / 'export' / 'adapter'}"
    log = run("lora_dpo_single_device", adapter, "reference=start", name="dpo")
    assert training(log)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["eval/rewards/margins"] > 0
    with pytest.raises(UserError, match="the model without it is another one.* Use reference=start"):
        run("lora_dpo_single_device", adapter, name="refused")


def test_rows_of_one_label_have_curves_of_what_they_have(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "rewards/chosen": 0.1, "eval/loss": 0.5}\n')
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ([{"step": 1, "loss": 25.0}, {"step": 1, "eval/loss": 24.0}, {"step": 2, "loss": 20.0}], 25.0),
        ([{"step": 1, "eval/loss": 24.0}, {"step": 1, "loss": 0.5}], 0.5),
        ([{"step": 3, "loss": 0.7}], None),  # a log whose beginning is lost
        ([{"step": 1, "loss": None}, {"step": 2, "loss": 0.7}], None),
        ([{"step": 1, "rewards/margins": 0.0}], None),  # an edited loop that logs no loss
    ],
)
def test_the_grey_line_of_the_loss_is_where_this_loss_began(log, line):
    panels = {axis.get_title(): axis for axis in draw_curves(log).axes}
    grey = [drawn.get_ydata()[0] for axis in [panels.get("loss")] if axis for drawn in axis.lines
            if drawn.get_color() == "0.75"]  # fmt: skip
    assert grey == ([] if line is None else [line])


def test_a_running_mean_of_rewards_survives_resuming_bit_for_bit(run, tmp_path):
    bco = ("loss=bco_pair", "loss.beta=0.1", "batch_size=4")
    straight = run("lora_dpo_single_device", *bco, "save_every_n_steps=3", "keep_last_n=9", name="straight")
    fixed = run("lora_dpo_single_device", *bco, "loss.running_mean=false", name="fixed")
    assert straight[0]["loss"] == fixed[0]["loss"] and straight[5]["loss"] != fixed[5]["loss"]  # it has moved
    checkpoint = tmp_path / "straight" / "checkpoints" / "step_3"
    branch = run("lora_dpo_single_device", *bco, f"resume={checkpoint}", name="branch")
    assert [{k: v for k, v in r.items() if k not in SPEED} for r in branch] == [
        {k: v for k, v in r.items() if k not in SPEED} for r in straight
    ]


@pytest.mark.parametrize(
    ("method", "kind"), [("lora", []), ("lora", ["lora.use_dora=true"]), ("full", [])], ids=["lora", "dora", "full"]
)
def test_a_moving_reference_survives_resuming_bit_for_bit(run, tmp_path, method, kind):
    settings = ("reference=sync", "reference.every_n_steps=2", "reference.alpha=0.5", *kind)
    recipe = f"{method}_dpo_single_device"
    straight = run(recipe, *settings, "save_every_n_steps=3", "keep_last_n=9", name="straight")
    fixed = run(recipe, *kind, name="fixed")
    assert [r["loss"] for r in training(straight)[:2]] == [r["loss"] for r in training(fixed)[:2]]
    assert straight[5]["loss"] != fixed[5]["loss"]  # it has moved
    branch = run(recipe, *settings, f"resume={tmp_path / 'straight' / 'checkpoints' / 'step_3'}", name="branch")
    assert [{k: v for k, v in r.items() if k not in SPEED} for r in branch] == [
        {k: v for k, v in r.items() if k not in SPEED} for r in straight
    ]


OTHER_SIZES = NF4_SIZES | {"num_layers": 2}
OTHER = [f"reference.model={json.dumps({'_component_': 'torchtune.models.llama3.llama3', **OTHER_SIZES})}"]


@pytest.fixture
def other(tmp_path):
    """Settings of a reference with a layer less and weights of its own."""
    save_llama(tmp_path / "other", sizes=OTHER_SIZES, seed=3)
    return [f"reference.checkpoint_dir={tmp_path / 'other'}", *OTHER]


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_another_model_is_the_reference_in_every_recipe(run, other, method):
    """Rewards before the first update, from torchtune's padded forward of both models."""
    quantize = ["reference.quantize=false"] if method == "qlora" else []  # there it is in 4 bits like the base
    log = run(f"{method}_dpo_single_device", "reference=model", *other, *quantize, "pairs_per_step=40", "max_steps=1")
    chosen, rejected = padded_logps(tiny_llama(seed=3, **OTHER_SIZES), random_pairs(40, seed=1)).chunk(2)
    for name, values in (("chosen", chosen), ("rejected", rejected)):
        found = log[0][f"logps/{name}"] - log[0][f"rewards/{name}"] / 0.1  # reward = beta (policy - reference)
        assert found == pytest.approx(float(values.mean()), rel=1e-5)
    assert abs(log[0]["rewards/margins"]) > 0.01  # which no start from the reference has


def test_a_starting_adapter_and_another_reference_go_together(run, other, tmp_path):
    run("lora_dpo_single_device", "loss=sft", "max_steps=2", name="sft")
    adapter = f"adapter={tmp_path / 'sft' / 'export' / 'adapter'}"
    merged = ["reference=model", f"reference.checkpoint_dir={tmp_path / 'sft' / 'export'}"]
    log = run("lora_dpo_single_device", adapter, *merged, "max_steps=1", name="merged")
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)  # the merged model is what the policy starts from
    log = run("lora_dpo_single_device", adapter, "reference=model", *other, "max_steps=1", name="beside")
    assert log[0]["loss"] != pytest.approx(math.log(2), abs=1e-3)


def test_a_run_is_not_resumed_beside_another_reference(run, other, tmp_path):
    settings = ["reference=model", *other, "save_every_n_steps=2", "keep_last_n=9"]
    run("lora_dpo_single_device", *settings, "max_steps=4", name="straight")
    resume = f"resume={tmp_path / 'straight' / 'checkpoints' / 'step_2'}"
    for change in ("reference.dtype=bf16", "reference.quantize=true"):
        with pytest.raises(UserError, match=f"{change.partition('=')[0]}: null then"):
            run("lora_dpo_single_device", *settings, resume, change, name="changed")
    (tmp_path / "other").rename(tmp_path / "moved")
    moved = f"reference.checkpoint_dir={tmp_path / 'moved'}"
    branch = run("lora_dpo_single_device", *settings, resume, moved, "max_steps=4", name="branch")
    assert [r["loss"] for r in training(branch)] == [
        r["loss"] for r in training(read_log(tmp_path / "straight" / "metrics.jsonl"))
    ]
    save_llama(tmp_path / "other", sizes=OTHER_SIZES, seed=4)
    with pytest.raises(UserError, match="reference weights: not the same in model.safetensors"):
        run("lora_dpo_single_device", *settings, resume, name="changed")


def test_without_a_reference_dpo_is_its_loss_of_the_policy_alone(run):
    log = run("full_dpo_single_device", "reference=none", "max_steps=1", "optimizer.lr=1e-30")
    (evaluation,) = [row for row in log if "eval/loss" in row]
    margin = evaluation["eval/logps/chosen"] - evaluation["eval/logps/rejected"]
    assert evaluation["eval/rewards/margins"] == pytest.approx(0.1 * margin, rel=1e-5)


# Several processes


WITH_OPTIONS = {
    "sigmoid_wpo": ["loss=sigmoid", "loss.wpo=true", "loss.ld_alpha=0.3"],
    "sigmoid_smoothed": ["loss=sigmoid", "loss.label_smoothing=0.2", "loss.f_divergence=js"],
    "hinge_wpo": ["loss=hinge", "loss.wpo=true"],
    "ipo_ld": ["loss=ipo", "loss.ld_alpha=0.5"],
    "aot_ld": ["loss=aot", "loss.ld_alpha=0.5"],
    "rpo_of_llama_3": ["loss=rpo", "loss.alpha=0.2", "score_end=false"],
    "mixture_wpo": ["loss=[{name: sigmoid, wpo: true, ld_alpha: 0.3},{name: sft, weight: 0.2}]"],
    "mixture_aot": ["loss=[{name: aot_unpaired},{name: sigmoid, wpo: true},{name: sft, weight: 0.2}]"],
    "dpo_loss": ["loss=torchtune.rlhf.loss.DPOLoss", "loss.label_smoothing=0.1"],
    "rso_loss": ["loss=torchtune.rlhf.loss.RSOLoss"],
    "sync": ["reference=sync", "reference.every_n_steps=1"],
    "none": ["reference=none"],
}


OF_EACH_KIND = ("sigmoid", "sigmoid_norm", "dpop", "simpo", "cpo", "sft", "kto", "aot", "aot_unpaired", "mpo")


def test_two_processes_compute_losses_of_each_kind_as_one_does(inputs, tmp_path):
    """Metrics of two steps and an evaluation, each step's last micro-batch uneven, and what was learned."""
    settings = {name: [OPTIONS.get(name, f"loss={name}")] for name in OF_EACH_KIND} | WITH_OPTIONS
    settings["sigmoid_norm"].append("loss.beta=0.5")  # 5 would multiply the log-probabilities' rounding
    shared = ["max_steps=2", "pairs_per_step=6", "batch_size=2", "keep_last_n=0", "lora.modules=[q_proj,mlp]"]
    # Not Adam, which divides small gradients by themselves and makes steps of their rounding.
    shared += ["optimizer._component_=torch.optim.SGD", "optimizer.lr=1.0"]
    overrides = {name: [*words, *shared] for name, words in settings.items()}
    overrides["unpaired"] = [*take_apart(inputs), *shared]
    overrides["dora"] = ["lora.use_dora=true", *shared]
    overrides["dora_sync"] = ["lora.use_dora=true", "reference=sync", "reference.every_n_steps=1", *shared]
    overrides |= {f"{name}_bf16": ["dtype=bf16", *overrides[name]] for name in ("sigmoid", "dora", "aot")}
    path = str(inputs / "config.yaml")
    runs = [["lora_dpo_distributed", path, [*o, f"output_dir={tmp_path / 'two' / n}"]] for n, o in overrides.items()]
    start_two(Path(__file__).with_name("recipe_worker.py"), json.dumps(runs))
    # Margins are near zero: rounding may turn their sign, and a correlation divides by how little they differ
    at_a_tie = {"rewards/accuracies", "eval/rewards/accuracies", "eval/length_correlation"}
    counted = {"eval/like_length/accuracies", "eval/chosen_lost/share"}  # of few pairs, beyond a threshold
    for name, its_overrides in overrides.items():
        one = run_recipe(
            "lora_dpo_single_device", *its_overrides, f"output_dir={tmp_path / 'one' / name}", config_paths=[Path(path)]
        )
        two = from_first_step(tmp_path / "two" / name / "metrics.jsonl")
        rounding = 2**-8 if name.endswith("bf16") else 1e-5  # of a number
        assert len(one) == 3
        for row, expected in zip(two, one, strict=True):
            for key in expected.keys() - SPEED - at_a_tie - (counted if name.endswith("bf16") else set()):
                assert row[key] == pytest.approx(expected[key], rel=rounding, abs=rounding), (name, row["step"], key)
        exports = (tmp_path / n / name / "export" / "adapter" / "adapter_model.safetensors" for n in ("two", "one"))
        weights, expected = map(load_file, exports)
        assert any(weights[key].any() for key in weights if "lora_B" in key), name
        for key in weights:
            atol = 4 * rounding * float(expected[key].abs().max()) if name.endswith("bf16") else 1e-6
            torch.testing.assert_close(weights[key], expected[key], atol=atol, rtol=0, msg=f"{name}: {key}")


def test_single_answers_have_weights_of_their_own_and_no_margins(run, inputs, tmp_path):
    """A step's loss is a weighted mean, however it is cut; weights that are all one change nothing."""
    rows = [json.loads(line) for line in (inputs / "train.jsonl").read_text().splitlines()]
    answers = [(row["prompt"], row[name], name == "chosen") for row in rows for name in ("chosen", "rejected")]
    with (tmp_path / "single.jsonl").open("w") as file:
        for i, (prompt, answer, label) in enumerate(answers[::3]):
            row = {"prompt": prompt, "completion": answer, "label": label, "some": 0.5 + i % 4, "same": 3}
            file.write(json.dumps(row) + "\n")
    how = ["loss=kto", f"dataset.source={tmp_path / 'single.jsonl'}", "max_steps=3", "eval_dataset.source=null"]

    def losses(name, *settings):
        return [row["loss"] for row in training(run("lora_dpo_single_device", *how, *settings, name=name))]

    plain, some = losses("plain"), losses("some", "dataset.columns={weight: some}")
    assert losses("cut", "dataset.columns={weight: some}", "batch_size=1") == pytest.approx(some, abs=1e-5)
    assert losses("same", "dataset.columns={weight: same}") == pytest.approx(plain, abs=1e-6)
    assert max(abs(one - other) for one, other in zip(plain, some, strict=True)) > 1e-4
    with pytest.raises(UserError, match="dataset.columns.margin: the loss kto takes no margins"):
        losses("margin", "dataset.columns={margin: some}")


# Faults that other libraries have


def final(log):
    return [row for row in log if "eval/loss" in row][-1]


def test_fault_label_smoothing_is_accepted_and_ignored(run):
    """Each step's loss is the smoothed one of the margin that its pair has by then."""
    log = run("lora_dpo_single_device", "loss=sigmoid", "loss.label_smoothing=0.15", "pairs_per_step=1", "batch_size=1")
    for row in training(log):  # of one pair each
        margin = row["rewards/margins"]
        expected = 0.85 * math.log1p(math.exp(-margin)) + 0.15 * math.log1p(math.exp(margin))
        assert row["loss"] == pytest.approx(expected, abs=1e-5)
    assert max(abs(row["rewards/margins"]) for row in training(log)) > 0.5
    with pytest.raises(UserError, match=r"loss.label_smoothing: Ipo has no such argument"):
        run("lora_dpo_single_device", "loss=ipo", "loss.label_smoothing=0.15", name="ipo")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["loss=sigmod"], "loss.name=sigmod"),
        (["loss=torchtune.rlhf.loss.DPOLos"], "DPOLos"),
        (["loss=sigmoid", "loss.bta=0.1"], "loss.bta"),
        (["loss=ipo", "loss.beta=-0.1"], "loss.beta=-0.1"),
        (["loss.beta=-0.1"], "loss.beta=-0.1"),  # torchtune's own, which takes it
        (["loss=[{name: sigmoid},{name: ipo,beta: -1.0}]"], "loss.terms[1]: loss.beta=-1.0"),
        (["loss=robust", "loss.label_smoothing=0.5"], "loss.label_smoothing=0.5"),
        (["loss=sigmoid", "loss.ld_alpha=2.0"], "loss.ld_alpha=2.0"),
        (["loss=sft", "loss.wpo=true"], "loss.wpo"),
        (["reference=sink"], "reference.name=sink"),
    ],
)
def test_fault_what_is_wrong_with_a_loss_shows_after_tokenizing_or_never(run, tmp_path, settings, words):
    """Here before a row is read, and before there is a run folder: these rows would be refused too."""
    (tmp_path / "pairs.jsonl").write_text("no JSON")
    data = [f"dataset.source={tmp_path / 'pairs.jsonl'}", f"eval_dataset.source={tmp_path / 'pairs.jsonl'}"]
    with pytest.raises(UserError) as refusal:
        run("lora_dpo_single_device", *data, *settings)
    assert words in str(refusal.value) and "pairs.jsonl" not in str(refusal.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(UserError, match="pairs.jsonl"):
        run("lora_dpo_single_device", *data)


@pytest.mark.parametrize("loss", [["loss=hinge", "loss.wpo=true"], ["loss=[{name: sigmoid, wpo: true},{name: sft}]"]])
def test_fault_wpo_crashes_with_hinge_and_sft(run, loss):
    log = run("lora_dpo_single_device", *loss, "max_steps=2")
    assert len(training(log)) == 2


@pytest.mark.parametrize("setting", ["loss.ld_alpha=0.5", "score_end=false"])
def test_fault_a_cache_is_stale_after_ld_alpha_changed(run, tmp_path, setting):
    cached = ("loss=sigmoid", "reference=cached", f"reference.cache_dir={tmp_path / 'cache'}", "max_steps=1")
    run("lora_dpo_single_device", *cached, name="before")
    log = run("lora_dpo_single_device", *cached, setting, name="after")
    assert training(log)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    live = run("lora_dpo_single_device", "loss=sigmoid", "max_steps=1", setting, name="live")
    for key in ("eval/loss", "eval/rewards/margins", "eval/logps/chosen"):
        assert final(log)[key] == pytest.approx(final(live)[key], abs=1e-5)


def test_fault_a_mix_up_coefficient_is_ignored(run):
    """After two small steps the reference goes `alpha` of the way: the rest of it is what margins are made of."""
    settings = ("max_steps=3", "optimizer._component_=torch.optim.SGD", "optimizer.lr=0.1")
    whole = training(run("full_dpo_single_device", *settings, name="fixed"))[2]["rewards/margins"]
    assert abs(whole) > 1e-4
    for alpha in (0.25, 0.75, 1.0):
        moved = ("reference=sync", "reference.every_n_steps=2", f"reference.alpha={alpha}")
        log = training(run("full_dpo_single_device", *settings, *moved, name=str(alpha)))
        assert log[2]["rewards/margins"] == pytest.approx((1 - alpha) * whole, abs=0.05 * abs(whole))


def test_an_evaluation_has_the_reference_of_the_step_that_it_follows(run):
    """Else each evaluation right after a hard move would compare the policy with itself."""
    settings = ("max_steps=3", "eval_every_n_steps=1")
    fixed = run("lora_dpo_single_device", *settings, name="fixed")
    moved = ("reference=sync", "reference.every_n_steps=2", "reference.alpha=1.0")
    log = run("lora_dpo_single_device", *settings, *moved, name="moved")
    margins, expected = ([r["eval/rewards/margins"] for r in rows if "eval/loss" in r] for rows in (log, fixed))
    assert margins[:2] == expected[:2] and margins[2] != expected[2] and all(margins)


def test_a_reference_that_would_never_move_is_refused(run):
    with pytest.raises(UserError, match="reference.every_n_steps=512: the run has 4 steps.*every_n_steps=3"):
        run("lora_dpo_single_device", "reference=sync", "max_steps=4")
    with pytest.raises(UserError, match="reference.every_n_steps=4: the run has 4 steps"):
        run("full_dpo_single_device", "reference=sync", "reference.every_n_steps=4", "max_steps=4")


def test_ktos_baseline_is_logged(run):
    """At the start it is 0: policy and reference are one. Answers that all become likelier raise it."""
    settings = ["loss=kto", "loss.undesirable_weight=0.01"]
    log = run("lora_dpo_single_device", *settings)
    cut = run("lora_dpo_single_device", *settings, "batch_size=2", name="cut")
    baseline, of_cut = ([row["kl"] for row in training(rows)] for rows in (log, cut))
    assert baseline[0] == 0 and baseline[-1] > 0.5 and log[-1]["eval/kl"] > 0.5
    assert of_cut == pytest.approx(baseline, rel=1e-2, abs=1e-4)  # Adam divides small gradients' rounding


@pytest.mark.parametrize("loss", ["simpo", "sft"])
def test_a_loss_without_a_reference_goes_on_from_an_adapter(run, tmp_path, loss):
    run("lora_dpo_single_device", "loss=sft", "max_steps=2", name="sft")
    adapter = f"adapter={tmp_path / 'sft' / 'export' / 'adapter'}"
    log = run("lora_dpo_single_device", adapter, f"loss={loss}", "max_steps=1", name="on_top")
    start = run("lora_dpo_single_device", adapter, "reference=start", "max_steps=1", name="start")
    base = run("lora_dpo_single_device", "max_steps=1", name="base")
    assert log[0]["logps/chosen"] == start[0]["logps/chosen"] != base[0]["logps/chosen"]
    with pytest.raises(UserError, match="reference=cached: KTO .* use reference=start"):
        run("lora_dpo_single_device", adapter, "loss=kto", "reference=cached")


def test_a_margin_that_a_hinge_asks_no_more_of_is_no_fault(run):
    """Without a reference the longest pair's margin may be wide enough before the first step."""
    settings = ["loss=hinge", "reference=none", "batch_size=1", "loss.beta=1.0", "max_steps=3"]
    log = training(run("lora_dpo_single_device", *settings))
    assert len(log) == 3 and any(row["grad_norm"] > 0 for row in log)


def test_options_of_losses_and_references_are_checked_before_files(run, tmp_path):
    nowhere = f"checkpointer.checkpoint_dir={tmp_path / 'nowhere'}"
    for settings, words in (
        (["loss=discopop", "loss.tau=-1"], "loss.tau=-1"),
        (["loss=sigmoid", "loss.ld_alpha=3"], "loss.ld_alpha=3"),
        (["loss=simpo", "reference=cached"], "this loss has no reference"),
    ):
        with pytest.raises(UserError, match=words):
            run("lora_dpo_single_device", nowhere, *settings)


# The cache


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_cached_reference_gives_the_numbers_of_a_live_one_and_is_computed_once(run, tmp_path, method):
    recipe, cached = f"{method}_dpo_single_device", ("reference=cached", f"reference.cache_dir={tmp_path / 'cache'}")
    live = run(recipe, name="live")
    first = run(recipe, *cached, name="first")
    decoders = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: decoders.append(module) if type(module).__name__ == "TransformerDecoder" else None
    )
    try:
        again = run(recipe, *cached, name="again")
        num_forwards = len(decoders)
        run(recipe, *cached, "loss=ipo", "loss.beta=0.3", "optimizer.lr=1e-4", "seed=7", name="another")
    finally:
        hook.remove()
    # 16 pairs of the cache are looked at again; a dry run, a look at what its reference says, ten steps and two
    # evaluations of one batch each follow, and the export is compared with the model.
    assert num_forwards == SETTLED + 2 + 1 + 1 + 10 + 2 + 2
    assert len(decoders) == 2 * num_forwards  # another loss, beta, learning rate and seed: the same cache
    for one, other, third in zip(live, first, again, strict=True):
        for key in one.keys() - SPEED - LIVE:
            assert other[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key
            assert third[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), key


@pytest.mark.parametrize("reference", [[], ["reference.checkpoint_dir=OTHER", "reference.quantize=true"]])
def test_two_processes_fill_a_cache_and_one_reads_it(tmp_path, reference):
    write_inputs(tmp_path, sizes=SHARDED_SIZES)
    save_llama(tmp_path / "other", sizes=SHARDED_SIZES, seed=3)
    overrides = ["reference=cached", f"reference.cache_dir={tmp_path / 'cache'}", "epochs=1", "optimizer.lr=0.002"]
    overrides += [setting.replace("OTHER", str(tmp_path / "other")) for setting in reference]
    recipe = str(ROOT / "recipes" / "full_dpo_distributed.py")
    config = ["--config", str(tmp_path / "config.yaml"), f"output_dir={tmp_path / 'two'}", *overrides]
    command = [sys.executable, "-m", "pairtune.cli", "run", "--nproc_per_node", "2", recipe, *config]
    done = subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (entry,) = [p for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.stat().st_size >= 48 * 32]
    size = entry.stat().st_size
    one = run_recipe("full_dpo_single_device", *overrides, config_paths=[tmp_path / "config.yaml"])
    assert entry.stat().st_size == size
    for row, expected in zip(from_first_step(tmp_path / "two" / "metrics.jsonl"), one, strict=True):
        for key in ("loss", "grad_norm", "eval/loss"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5)


def test_a_cache_that_was_filled_in_other_batches_serves_a_run_in_bf16(run, tmp_path):
    """Its rounding is another one: that is no fault of the policy, however large beta is."""
    settings = ["dtype=bf16", "loss=sigmoid_norm", "reference=cached", f"reference.cache_dir={tmp_path / 'cache'}"]
    run("lora_dpo_single_device", *settings, "max_steps=1", "loss.beta=50", name="fills")
    log = run("lora_dpo_single_device", *settings, "attention=mask", "batch_size=4", "loss.beta=50", name="reads")
    assert training(log)[0]["loss"] == pytest.approx(math.log(2), abs=0.5)


def test_a_cache_holds_what_the_run_asks_for(run, tmp_path):
    """A run of one step does not wait for the whole data set."""
    cached = ("reference=cached", f"reference.cache_dir={tmp_path / 'cache'}", "pairs_per_step=4", "batch_size=2")

    def num_values():
        (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
        return len(reference_cache.read(tmp_path / "cache", entry.name))

    one = run("lora_dpo_single_device", *cached, "max_steps=1", name="one")
    assert 8 + 4 <= num_values() <= 8 + 4 + 2  # held-out pairs, the step's, and the two longest
    live = run("lora_dpo_single_device", *cached[2:], "max_steps=1", name="live")
    assert one[0]["loss"] == pytest.approx(live[0]["loss"], abs=1e-6)
    run("lora_dpo_single_device", *cached, "epochs=1", name="all")
    assert num_values() == 8 + 40


def test_on_top_of_an_adapter_the_cached_reference_is_that_start(run, tmp_path):
    for kind in ([], ["lora.use_dora=true"]):
        run("lora_dpo_single_device", "loss=sft", "max_steps=4", *kind, name=f"sft{len(kind)}")
    dropout = ["lora.dropout=0.5", "disable_dropout=false"]  # of the policy, and of no reference
    cached = ["reference=cached", f"reference.cache_dir={tmp_path / 'cache'}"]
    recipes = [("lora", "sft0", dropout), ("lora", "sft1", ["lora.use_dora=true"]), ("qlora", "sft0", [])]
    for method, sft, more in recipes:
        recipe, name = f"{method}_dpo_single_device", f"{method}-{sft}"
        adapter = f"adapter={tmp_path / sft / 'export' / 'adapter'}"
        live = run(recipe, adapter, "reference=start", *more, name=f"{name}-live")
        first, again = (run(recipe, adapter, *cached, *more, name=f"{name}-{i}") for i in range(2))
        for one, other, third in zip(live, first, again, strict=True):
            for key in one.keys() - SPEED - LIVE:
                assert other[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6), key
                assert third[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6), key
        if more is not dropout:
            assert live[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


class Decoders:
    """The decoders of forwards, by their layers; `alive` tells which have tensors after each load."""

    def __init__(self, monkeypatch):
        self.forwards, self.alive, self._tensors = [], [], []
        self._patch = monkeypatch

    def __enter__(self):
        load = models.load

        def spying_load(model, *args, **kwargs):
            load(model, *args, **kwargs)
            self._tensors += [(weakref.ref(p), len(model.layers)) for p in model.parameters()]
            self.alive.append({num_layers for found, num_layers in self._tensors if found() is not None})

        self._patch.setattr(models, "load", spying_load)
        self._hook = torch.nn.modules.module.register_module_forward_pre_hook(
            lambda module, _: (
                self.forwards.append(len(module.layers)) if type(module).__name__ == "TransformerDecoder" else None
            )
        )
        return self

    def __exit__(self, *_):
        self._hook.remove()
        self._patch.undo()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_another_model_fills_a_cache_and_is_gone_when_the_policy_comes(run, other, tmp_path, method, monkeypatch):
    """The policy has three layers, the reference two."""
    recipe = f"{method}_dpo_single_device"
    cached = ["reference=cached", f"reference.cache_dir={tmp_path / 'cache'}", *other, "max_steps=4"]
    live = run(recipe, "reference=model", *other, "max_steps=4", name="live")
    with Decoders(monkeypatch) as seen:
        first = run(recipe, *cached, name="first")
    # 40 to 48 pairs, 32 at a time; a rehearsal, four steps, two evaluations, and the export compared with the model.
    assert seen.forwards == (SETTLED + 2) * [2] + (SETTLED + 7 + 2) * [3]
    assert seen.alive[:2] == [{2}, {3}]
    with Decoders(monkeypatch) as seen:
        again = run(recipe, *cached, name="again")
    assert seen.forwards == (SETTLED + 7 + 2) * [3] and set.union(*seen.alive) == {3}  # it is not even loaded
    for one, two, three in zip(live, first, again, strict=True):
        for key in one.keys() - SPEED - LIVE:
            assert two[key] == pytest.approx(one[key], rel=1e-6, abs=1e-6), key
            assert three[key] == two[key], key


def test_what_a_cache_cannot_serve_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="reference=cached: KTO scores answers to other prompts"):
        run("lora_dpo_single_device", "loss=kto", "reference=cached")
