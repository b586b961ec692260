"""Claims about `tune plan`: that memory is what a step allocates, and that what it proposes helps."""

import functools
import json
import runpy
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import NF4_SIZES, ROOT, random_pairs, run_config, run_recipe, save_llama, save_pairs, tiny_llama
from torch.profiler import ProfilerActivity, profile, record_function
from torchao.dtypes.nf4tensor import to_nf4
from torchtune.models.llama3 import lora_llama3

from pairtune.cli import plan
from pairtune.cli.commands import main
from pairtune.cli.recipe import read_recipe
from pairtune.process import dist
from pairtune.run import choosing, memory

TOOL = runpy.run_path(str(ROOT / "tools" / "check_plan.py"))
RECIPES = [f"{method}_dpo_{devices}" for method in ("full", "lora", "qlora")
           for devices in ("single_device", "distributed")]  # fmt: skip
SIZES = NF4_SIZES | {"num_layers": 1, "max_seq_len": 512}
MIB = 1 / 1024  # in GiB


@pytest.fixture
def path(tmp_path):
    """A config of a model that is nowhere on the disk, with 50 pairs that are."""
    config = {
        "model": {"_component_": "torchtune.models.llama3.llama3", **SIZES},
        "checkpointer": {"checkpoint_dir": str(tmp_path / "nowhere"), "model_type": "LLAMA3"},
        "dataset": {"source": str(tmp_path / "pairs.jsonl")},
        "device": "cpu", "dtype": "fp32", "max_length": 256, "max_prompt_length": 128,
        "pairs_per_step": 16, "batch_size": 8, "lora": {"rank": 4},
    }  # fmt: skip
    save_pairs(tmp_path / "pairs.jsonl", random_pairs(50))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def planned(path, recipe, *overrides, **devices):
    return plan.plan(plan.Run(recipe, (path,), overrides, **devices), read_recipe)


# Memory is what a step allocates


@pytest.fixture(scope="module")
def one_thread():
    """Attention on the CPU has buffers a thread, which on small models would be most of the memory."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def predicted(number, num_shards=1):
    cases = TOOL["CASES"] if num_shards == 1 else TOOL["SHARDED_CASES"]
    return TOOL["predict"](cases[number], num_shards)


@pytest.mark.parametrize("number", range(len(TOOL["CASES"])), ids=lambda number: str(TOOL["CASES"][number]))
def test_predicted_peak_is_what_a_training_step_allocates(number, one_thread):
    """Within 1 %; 5 % in full bf16, where the CPU converts a bf16 operand before it subtracts a float32 one."""
    case = TOOL["CASES"][number]
    tolerance = 0.05 if case.method == "full" and case.dtype == "bf16" else 0.01
    measured = TOOL["measure"](case, dist.start("cpu"))
    assert predicted(number).total == pytest.approx(measured, rel=tolerance)


def test_predicted_peak_is_what_each_of_two_processes_allocates():
    """Within 5 %: FSDP2 gathers and reduces in buffers that are counted at a few moments of a step."""
    measured = TOOL["measure_sharded"](2)
    assert [predicted(n, 2).total for n in range(len(TOOL["SHARDED_CASES"]))] == pytest.approx(measured, rel=0.05)


def test_each_part_of_the_table_weighs_in_some_measured_case():
    """A wrong part would show: each is at least a tenth of the whole somewhere, more than it could hide in."""
    cases = [predicted(n) for n in range(len(TOOL["CASES"]))]
    cases += [predicted(n, 2) for n in range(len(TOOL["SHARDED_CASES"]))]
    for part in [part for part in memory.PARTS if part not in ("gradients", "optimizer scratch")]:
        assert max(case.parts.get(part, 0) / case.total for case in cases) > 0.1, part


@pytest.mark.parametrize("method", ["full", "lora"])
def test_no_way_to_fill_max_length_takes_more_than_the_batch_that_is_planned(method):
    def total(batch):
        setting = memory.Setting("cuda")
        policy, reference = plan.build(
            method, TOOL["MODEL"], lora=TOOL["LORA"], dtype="fp32", max_length=128, setting=setting
        )
        return memory.step_memory(policy, reference, batch, TOOL["OPTIMIZER"], setting).total

    worst = total(memory.worst_batch(3, 128))
    assert all(total(memory.uniform_batch(3, prompt, 128 - prompt)) < worst for prompt in (2, 64, 127))


def test_a_fused_optimizer_allocates_nothing_and_foreach_a_tensor_for_each_weight(path):
    overrides = ("device=cuda", "max_length=16", "max_prompt_length=8", "batch_size=1", "pairs_per_step=1")
    fused = planned(path, "full_dpo_single_device", *overrides).memory
    foreach = planned(path, "full_dpo_single_device", *overrides, "optimizer.foreach=true").memory
    assert "optimizer scratch" not in fused.parts
    assert foreach.parts["optimizer scratch"] == pytest.approx(foreach.trained, rel=0.01)


def test_counting_leaves_torch_as_it_was(path):
    before = F.scaled_dot_product_attention, F.rms_norm
    planned(path, "lora_dpo_single_device")
    with pytest.raises(plan.UserError, match="optimizer._component_=torch.optim.LBFGS: its memory cannot be told"):
        planned(path, "lora_dpo_single_device", "optimizer={_component_: torch.optim.LBFGS, lr: 1.0}")
    assert (F.scaled_dot_product_attention, F.rms_norm) == before


# The rest of the table


@pytest.mark.parametrize("recipe", RECIPES)
def test_parameters_and_checkpoints_are_those_of_a_real_model(path, recipe):
    """A checkpoint is the trained weights and AdamW's two moments of each, and a step number a weight."""
    model = tiny_llama(**SIZES)
    trained = list(model.parameters())
    if "full" not in recipe:
        modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
        model = lora_llama3(modules, apply_lora_to_mlp=True, lora_rank=4, lora_alpha=16, **SIZES)
        trained = [p for name, p in model.named_parameters() if "lora_" in name]
    of_recipe = planned(path, recipe, "keep_last_n=2", "keep_best=null")
    assert of_recipe.num_parameters == sum(p.numel() for p in model.parameters())
    assert of_recipe.num_trained == sum(p.numel() for p in trained)
    assert of_recipe.checkpoint == 3 * 4 * of_recipe.num_trained + 4 * len(trained)
    assert of_recipe.num_checkpoints == 3  # one more, while it is written
    assert of_recipe.export == 4 * of_recipe.num_parameters


def test_shards_are_a_part_of_what_one_device_holds_and_wait_in_host_memory_when_offloaded(path):
    one, four = (planned(path, "full_dpo_distributed", gpus=n).memory for n in (1, 4))
    offloaded = planned(path, "full_dpo_distributed", "fsdp_cpu_offload=true", gpus=4).memory
    head_width = SIZES["embed_dim"] // SIZES["num_heads"]
    rope = 4 * (
        SIZES["max_seq_len"] * head_width + head_width // 2
    )  # float32 sines, cosines and frequencies: not sharded
    for part, whole in (("weights", rope), ("reference", rope), ("optimizer state", 0)):
        assert four.parts[part] == pytest.approx((one.parts[part] - whole) / 4 + whole)
        assert offloaded.parts.get(part, 0) == whole
    trained = one.trained
    assert offloaded.host == pytest.approx((2 * trained + trained + 2 * trained) / 4, rel=1e-3)  # and step numbers


def test_steps_are_counted_where_the_data_set_is_here(path):
    assert planned(path, "lora_dpo_single_device", "epochs=3").num_steps == 3 * 4  # 50 rows, 16 a step
    held_out = planned(path, "lora_dpo_single_device", "dataset.val_fraction=0.4", "pairs_per_step=8")
    assert (held_out.num_rows, held_out.num_steps) == (30, 4)
    elsewhere = planned(path, "lora_dpo_single_device", "dataset.source=org/pairs")
    assert elsewhere.num_steps is None and "unknown: the data set is not here" in str(elsewhere)
    stream = planned(path, "lora_dpo_single_device", "dataset.streaming=true", "max_steps=90")
    assert stream.num_steps == 90 and "90, of a stream" in str(stream)


def test_a_step_is_cut_into_as_many_micro_batches_as_the_recipes_make(path):
    counts = [planned(path, "lora_dpo_distributed", "batch_size=2", gpus=n).micro_batches for n in (1, 2, 3, 16)]
    assert counts == [8, 4, 3, 1]
    assert planned(path, "lora_dpo_distributed", gpus=16).batch_size == 1  # 16 pairs a step


# What to change


TIGHT = {  # recipe, GPUs, MiB a device
    "fewer pairs": ("lora_dpo_single_device", 1, 50),
    "several things": ("lora_dpo_single_device", 1, 7),
    "a second model": ("full_dpo_single_device", 1, 12),
    "sharded": ("full_dpo_distributed", 2, 10),
    "offloaded": ("full_dpo_distributed", 2, 5),
}


@pytest.mark.parametrize("recipe, gpus, mib", TIGHT.values(), ids=TIGHT)
def test_what_is_proposed_makes_it_fit_and_nothing_of_it_can_be_left_out(path, recipe, gpus, mib):
    run = plan.Run(recipe, (path,), ("batch_size=16",), gpus=gpus, gpu_memory=mib * MIB)
    assert not plan.plan(run, read_recipe).fits
    changes, changed = plan.smallest_change(run, read_recipe)

    def fits(some):
        changed = run
        for change in some:
            changed = change.of(changed)
        return plan.plan(changed, read_recipe).fits

    assert changed.fits and fits(changes)
    assert not any(fits(fewer) for n in range(len(changes)) for fewer in combinations(changes, n))


def test_fewer_pairs_at_a_time_come_before_everything_else_and_no_fewer_than_needed(path):
    run = plan.Run("lora_dpo_distributed", (path,), ("batch_size=16",), gpu_memory=80 * MIB)
    (change,), changed = plan.smallest_change(run, read_recipe)
    more = planned(path, run.recipe, f"batch_size={2 * changed.batch_size}", gpu_memory=80 * MIB)
    assert change.words == f"batch_size={changed.batch_size}" and changed.fits and not more.fits


@pytest.mark.parametrize("setting", ["reference=cached", "reference=none", "loss=simpo"])
def test_full_dpo_without_a_second_model_is_planned_without_it(path, setting):
    live, without = (planned(path, "full_dpo_single_device", *settings).memory for settings in ((), (setting,)))
    assert live.parts["reference"] == live.parts["weights"] and "reference" not in without.parts


def test_fp8_products_are_planned_with_a_second_model_and_compiled(path):
    """They keep what other products do, and for a moment hold operands in 8 bits; without a compiler in 32, too."""
    of = ("full_dpo_single_device", "device=cuda", "dtype=bf16", "enable_activation_checkpointing=true")
    for compiled, most in (("compile=false", 1.2), ("compile=true", 1.05)):
        plain, inside = (planned(path, *of, compiled, f"enable_fp8_training={on}") for on in ("false", "true"))
        assert inside.memory.parts["weights"] == plain.memory.parts["weights"]
        assert plain.memory.total <= inside.memory.total < most * plain.memory.total


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_second_model_is_planned_by_its_size_dtype_and_bits(path, method):
    weights = dict(tiny_llama(**SIZES).named_parameters())
    packed = [to_nf4(w) for name, w in weights.items() if name.startswith("layers") and w.ndim == 2]
    in_nf4 = sum(getattr(w, part).nbytes for w in packed for part in w.__tensor_flatten__()[0])
    whole = sum(w.numel() for w in weights.values())
    sizes = {"fp32": 4 * whole, "bf16": 2 * whole, "nf4": 4 * (whole - sum(w.numel() for w in packed)) + in_nf4}
    settings = {
        "fp32": ["reference.checkpoint_dir=elsewhere", "reference.quantize=false"],
        "bf16": ["reference.dtype=bf16", "reference.quantize=false"],
        "nf4": ["reference.checkpoint_dir=elsewhere", "reference.quantize=true"],
    }
    head_width = SIZES["embed_dim"] // SIZES["num_heads"]
    rope = 4 * (SIZES["max_seq_len"] * head_width + head_width // 2)
    for kind, size in sizes.items():
        live = planned(path, f"{method}_dpo_single_device", "reference=model", *settings[kind]).memory
        assert live.parts["reference"] == size + rope, kind


def test_a_second_model_that_fills_a_cache_is_planned_for_the_time_before_training(path):
    """It is alone then: what does not fit whole may fit in 4 bits, and the step has no part in it."""
    sizes = SIZES | {"num_layers": 40}
    component = {"_component_": "torchtune.models.llama3.llama3", **sizes}
    settings = ("batch_size=1", "reference=cached", "reference.checkpoint_dir=elsewhere")
    settings += (f"reference.model={json.dumps(component)}",)
    alone = planned(path, "lora_dpo_single_device", "batch_size=1")
    cached = planned(path, "lora_dpo_single_device", *settings)
    weights = 4 * sum(p.numel() for p in tiny_llama(**sizes).parameters())
    assert cached.memory == alone.memory and alone.reference_pass == 0
    assert weights < cached.reference_pass < 1.5 * weights and cached.peak == cached.reference_pass
    run = plan.Run("lora_dpo_single_device", (path,), settings, gpu_memory=1.2 * weights / plan.GIB)
    assert not plan.plan(run, read_recipe).fits
    (change,), changed = plan.smallest_change(run, read_recipe)
    assert change.words == "reference.quantize=true" and changed.fits
    assert "\nreference's pass " in str(cached) and "reference's pass" not in str(alone)


def allocated(work, *overrides):
    """The most bytes of tensors in a whole run of full DPO, by torch.profiler's record: the same on every machine."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("training"):
        run_recipe("full_dpo_single_device", *overrides, config_paths=[work / "config.yaml"])
    return TOOL["_peak"](profiler)


def test_full_dpo_with_a_cached_reference_takes_the_memory_of_plain_fine_tuning(tmp_path, one_thread):
    """Within 5 %, filling the cache included; a live reference is seen, and costs about its weights."""
    sizes = NF4_SIZES | {"vocab_size": 2000}
    save_llama(tmp_path / "base", sizes=sizes)
    save_pairs(tmp_path / "train.jsonl", random_pairs(16))
    cfg = run_config(tmp_path, sizes=sizes, eval_dataset={"source": None}, batch_size=2, pairs_per_step=4, max_steps=2)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(cfg | {"keep_last_n": 0, "samples": {"num_prompts": 0}}))
    cached = ("loss=sigmoid", "reference=cached", f"reference.cache_dir={tmp_path / 'cache'}")
    plain, filling, found, live = (
        allocated(tmp_path, *settings)
        for settings in (["loss=sft"], cached, cached, ["loss=sigmoid", "reference=model"])
    )
    assert [filling, found] == pytest.approx([plain] * 2, rel=0.05)
    weights = 4 * sum(p.numel() for p in tiny_llama(**sizes).parameters())
    assert live - plain == pytest.approx(weights, rel=0.2) and live > 1.15 * plain


def test_only_distributed_recipes_are_given_more_gpus(path):
    def words(recipe):
        run = plan.Run(recipe, (path,), gpu_memory=MIB)
        return {change.words for knob in plan._knobs(run, read_recipe) for change in knob}

    assert {"--gpus 2", "fsdp_cpu_offload=true"} <= words("lora_dpo_distributed")
    assert not {"--gpus 2", "fsdp_cpu_offload=true"} & words("lora_dpo_single_device")


def test_a_step_of_one_micro_batch_saves_full_dpo_its_whole_gradients(path):
    many, one = (planned(path, "full_dpo_distributed", f"batch_size={n}", gpus=4) for n in (1, 4))
    assert many.memory.parts["whole gradients"] >= many.memory.trained
    assert one.memory.parts.get("whole gradients", 0) < one.memory.trained / 2


# The command


def test_plan_prints_a_table_and_whether_it_fits(path, capsys):
    assert main(["plan", str(path), "--gpu-memory", "1", "epochs=1", "epochs=2"]) == 0
    note, _, out = capsys.readouterr().out.partition("\n")
    assert note == "config: epochs=1 has no effect: epochs=2 stands behind it on the command line"
    assert out.startswith("lora_dpo_single_device on 1 CPU of 1 GiB\n")
    assert "8, if all 50 rows become pairs" in out and "16 pairs, at most 8,176 tokens" in out
    assert "\n  weights " in out and "\n  export " in out and "It fits: 0." in out


def test_plan_says_what_to_change_and_ends_with_status_1(path, capsys):
    assert main(["plan", str(path), "--gpu-memory", str(50 * MIB), "batch_size=16"]) == 1
    out = capsys.readouterr().out
    assert "It does not fit: " in out and "\nIt fits with batch_size=" in out


def test_plan_says_when_nothing_helps(path, capsys):
    assert main(["plan", str(path), "--recipe", "qlora_dpo_single_device", "--gpu-memory", str(MIB / 4)]) == 1
    assert "a smaller model does" in capsys.readouterr().out


def test_without_a_gpu_and_its_memory_there_is_no_verdict(path, capsys):
    assert main(["plan", str(path)]) == 0
    assert "fit" not in capsys.readouterr().out.replace(plan.ASSUMED, "")


def test_a_copy_of_a_recipe_is_planned_like_the_recipe(path, tmp_path, capsys):
    main(["cp", "full_dpo_distributed", str(tmp_path / "mine.py")])
    capsys.readouterr()
    assert main(["plan", str(path), "--recipe", str(tmp_path / "mine.py"), "--gpus", "2"]) == 0
    copy = capsys.readouterr().out
    assert main(["plan", str(path), "--recipe", "full_dpo_distributed", "--gpus", "2"]) == 0
    assert copy.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--recipe", "lora_dpo_single_device", "--gpus", "2"], "lora_dpo_single_device runs on one device"),
        (["--gpus", "0"], "--gpus 0: must be above 0"),
        (["--gpus", "3", "data_parallel_replicate_dim=2"], "data_parallel_replicate_dim=2: must divide the 3"),
        (["--recipe", "qlora_dpo_distributed", "--gpus", "8", "data_parallel_replicate_dim=2"], "all processes or not"),
        (["batch_size=0"], "batch_size=0: must be auto, or a whole number, at least 1"),
        (["--recipe", "lora_dpo_single_device", "reference=model"], "would hold the base a second time"),
        (["--recipe", "qlora_dpo_distributed", "reference=modle"], "nearest valid: reference.name=model"),
    ],
)
def test_what_cannot_run_is_refused_as_the_run_would_be(path, capsys, words, message):
    assert main(["plan", str(path), *words]) == 2
    assert message in capsys.readouterr().err


CHECKPOINTED = "batch_size=1", "compile=false", "enable_activation_checkpointing=true"
PARAMETERS = 8.03e9
LONG = "max_length=32768", "max_prompt_length=null", "model=torchtune.models.llama3_1.llama3_1_8b"
OFFLOADED = "enable_activation_offloading=true"


@pytest.mark.parametrize(
    ("gpu_memory", "recipe", "overrides", "known"),
    [
        (48.0, "lora_dpo_single_device", LONG, {"weights": 2 * PARAMETERS}),
        (32.0, "lora_dpo_single_device", (*LONG, OFFLOADED), {"weights": 2 * PARAMETERS}),
        (24.0, "qlora_dpo_single_device", (*LONG, OFFLOADED), {}),
        (
            80.0,
            "full_dpo_single_device",
            ("dtype=bf16", "reference=cached", "optimizer=torchao.optim.AdamW8bit"),
            # The optimizer's are two bytes and two blocks of 256 numbers' scales
            {"weights": 2 * PARAMETERS, "gradients": 2 * PARAMETERS, "optimizer state": PARAMETERS * 2 * (1 + 4 / 256)},
        ),
    ],
    ids=["LoRA, 32k tokens", "offloaded", "QLoRA, offloaded", "full, 8-bit AdamW"],
)
def test_eight_billion_fit_one_gpu(gpu_memory, recipe, overrides, known):
    of = planned(ROOT / "configs" / "llama3_8b.yaml", recipe, *overrides, *CHECKPOINTED, gpu_memory=gpu_memory)
    parts = of.memory.parts
    assert {name: parts[name] for name in known} == pytest.approx(known, rel=0.01)
    one = of.max_tokens * 4096 * 2  # bytes of a layer's input, in bf16: what is kept of it
    kept, moved = (2, 32) if OFFLOADED in overrides else (32, 0)
    # and of one layer what its attention and 8,192 tokens of its feed-forward network keep: see docs/performance.md
    assert (kept + 15) * one < parts["activations"] < (kept + 20) * one + 2**32
    assert of.memory.pinned == pytest.approx(moved * one, rel=1e-4)  # a power of two is but two tokens more
    assert of.memory.total < choosing.USABLE * gpu_memory * 2**30


def test_a_model_of_eight_billion_is_planned_from_its_config_alone(capsys):
    """Known: 8.03e9 parameters, of which a LoRA of rank 16 on all linear layers adds 41.9 million."""
    assert main(["plan", "llama3_8b", "--gpus", "8", "--gpu-memory", "80"]) == 0
    out = capsys.readouterr().out
    assert "8,072,204,288, 41,943,040 trained, bf16" in out
    assert "lora_dpo_distributed on 8 GPUs of 80 GiB" in out
