"""Optimizers that people use: stopped and resumed bit for bit, sharded, refused by their own name before weights."""

import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, SHARDED_SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs
from safetensors.torch import load_file
from torch import nn

from pairtune.errors import UserError
from pairtune.process.dist import World
from pairtune.run import optimizers, schedules
from pairtune.run.metrics import read_log
from pairtune.run.optimizer_state import OptimizerState
from pairtune.run.rehearsal import rehearse

WORLD = World(torch.device("cpu"))
LOSS = {"_component_": "torchtune.rlhf.loss.DPOLoss"}
COSINE = {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.1}
SPEED = {"pairs_per_second", "tokens_per_second", "peak_memory_gib"}
TORCHS = ["Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"]
TORCHS += ["Adafactor", "Muon"]
FEW_BITS = ["torchao.optim.AdamW8bit", "torchao.optim.AdamW4bit", "torchao.optim.AdamWFp8"]
BITSANDBYTES = ["bitsandbytes.optim.AdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"]
BITSANDBYTES += ["bitsandbytes.optim.PagedAdamW32bit"]


def tried(optimizer, lr_scheduler=COSINE, *, model=None, world=WORLD, **arguments):
    block = {"_component_": optimizer, "lr": 1e-3, **arguments}
    rehearse(block, lr_scheduler, LOSS, model, world, num_training_steps=10)


@pytest.mark.parametrize("lr_scheduler", [COSINE, None], ids=["cosine", "constant"])
@pytest.mark.parametrize("name", [*(f"torch.optim.{name}" for name in TORCHS), *FEW_BITS, *BITSANDBYTES])
def test_each_goes_on_from_a_checkpoint_bit_for_bit_on_a_few_parameters(name, lr_scheduler):
    """The rehearsal's own two steps; torch's AdamW8bit was refused in the name of lr_scheduler."""
    pytest.importorskip(name.partition(".")[0])
    tried(name, lr_scheduler)


class Forgetful(torch.optim.SGD):
    """Counts its steps where no checkpoint looks."""

    count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data -= p.grad * group["lr"] * self.count


class Hoarder(torch.optim.SGD):
    """Keeps something that cannot be written."""

    def __init__(self, params, lr, kept):
        super().__init__(params, lr)
        self.kept = {"complex": torch.zeros(2, dtype=torch.complex64), "set": {1, 2}}[kept]

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["kept"] = self.kept


def fails_later(optimizer, *, num_training_steps, last_epoch=-1, rate="nan"):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(rate), last_epoch)


class Number(torch.optim.lr_scheduler.LRScheduler):
    """Puts a number where an optimizer has a tensor."""

    def __init__(self, optimizer, *, num_training_steps, last_epoch=-1):
        super().__init__(optimizer, last_epoch)

    def step(self, epoch=None):
        for group in self.optimizer.param_groups:
            group["lr"] = 0.5


class OneCycle(torch.optim.lr_scheduler.OneCycleLR):
    """torch's, under the arguments that recipes pass."""

    def __init__(self, optimizer, *, num_training_steps, last_epoch=-1):
        super().__init__(optimizer, 0.1, total_steps=num_training_steps + 1)


HERE = "test_optimizers"
BOTH = nn.ParameterDict({"matrix": torch.zeros(2, 2), "norm": torch.zeros(2)})


@pytest.mark.parametrize(
    ("optimizer", "lr_scheduler", "arguments", "says"),
    [
        (f"{HERE}.Forgetful", COSINE, {}, "^optimizer._component_=test_optimizers.Forgetful: does not go on "),
        (f"{HERE}.Hoarder", COSINE, {"kept": "complex"}, "^optimizer._component_=test_optimizers.Hoarder: .*complex64"),
        (f"{HERE}.Hoarder", COSINE, {"kept": "set"}, "^optimizer._component_=test_optimizers.Hoarder: .*JSON .*set"),
        ("torch.optim.AdamW", {"_component_": f"{HERE}.fails_later"}, {}, "^lr_scheduler: .* step 1 nan, .*finite"),
        ("torch.optim.AdamW", {"_component_": f"{HERE}.fails_later", "rate": "inf"}, {}, "^lr_scheduler: .* inf, "),
        ("torchao.optim.AdamW8bit", {"_component_": f"{HERE}.Number"}, {}, "^lr_scheduler.*: lr was changed to a non-"),
        ("torch.optim.Adagrad", {"_component_": f"{HERE}.OneCycle"}, {}, "^lr_scheduler.*must support momentum"),
        ("torch.optim.AdamW", COSINE, {"fused": True, "foreach": True}, "^optimizer.fused=true optimizer.foreach"),
        ("torch.optim.AdamW", COSINE, {"capturable": True}, "^optimizer.capturable=true: torch.optim.AdamW refuses"),
        ("torchao.optim.AdamW8bit", COSINE, {"betas": [0.9, 1.5]}, r"^optimizer.betas=\[0.9,1.5\]: .*Invalid beta"),
        ("torchao.optim.CPUOffloadOptimizer", COSINE, {}, "^optimizer._component_=torchao.*CPUOffload.* on the CPU"),
        ("torch.optim.Muon", COSINE, {"model": BOTH}, "^optimizer._component_=torch.optim.Muon: takes matrices only"),
    ],
)  # fmt: skip
def test_who_is_to_blame_is_named_before_weights_are_read(optimizer, lr_scheduler, arguments, says):
    with pytest.raises(UserError, match=says):
        tried(optimizer, lr_scheduler, **arguments)


@pytest.mark.parametrize("name", ["torch.optim.AdamW", *FEW_BITS])
@pytest.mark.parametrize(
    "lr_scheduler",
    [
        {"_component_": f"{HERE}.OneCycle"},
        {"_component_": "pairtune.schedules.linear"},
        {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2},
    ],
)
def test_a_rate_that_is_a_tensor_goes_with_any_schedule(name, lr_scheduler):
    tried(name, lr_scheduler)
    tried(
        name, {"_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": 2}
    )


# Decay


@pytest.mark.parametrize(
    ("block", "decay_all", "decays"),
    [
        ({"_component_": "torch.optim.AdamW", "weight_decay": 0.1}, False, [0.1, 0.0]),
        ({"_component_": "torch.optim.AdamW"}, False, [0.01, 0.0]),  # torch's own default
        ({"_component_": "torchao.optim.AdamW8bit"}, False, [0.01, 0.0]),
        ({"_component_": "torch.optim.AdamW", "weight_decay": 0.1}, True, [0.1]),
        ({"_component_": "torch.optim.AdamW", "weight_decay": 0.0}, False, [0.0]),
        ({"_component_": "torch.optim.SGD"}, False, [0]),
    ],
)
def test_parameters_of_one_dimension_are_not_decayed(block, decay_all, decays):
    made = optimizers.make(block | {"lr": 0.1}, BOTH.values(), decay_all)
    assert [group["weight_decay"] for group in made.param_groups] == decays
    assert sum(len(group["params"]) for group in made.param_groups) == 2
    if len(decays) == 2:
        assert made.param_groups[1]["params"] == [BOTH["norm"]]


# Pieces


def step_in_shards(cls, cuts):
    """A step of a [24, 512] parameter cut at these rows: what its processes write, and exp_avg as they know it."""
    generator, saved, known = torch.Generator().manual_seed(0), {}, []
    values, gradient = (torch.randn(24, 512, generator=generator) for _ in range(2))
    for shard, (start, end) in enumerate(zip([0, *cuts], [*cuts, 24], strict=True)):
        p = nn.Parameter(values[start:end].clone())
        optimizer = cls([p], lr=0.1)
        p.grad = gradient[start:end].clone()
        optimizer.step()
        for name, tensor in OptimizerState(optimizer, {"w": p}, WORLD).tensors().items():
            piece = name if name.startswith("local.") or not tensor.dim() else f"local.0.{name}.values"
            saved[piece.replace("local.0.", f"local.{shard}.")] = tensor
        held = optimizer.state[p]["exp_avg"]
        known.append(held.dequantize() if hasattr(held, "dequantize") else held)
    return saved, torch.cat(known)


def read_whole(cls, saved, num_shards):
    p = nn.Parameter(torch.zeros(24, 512))
    optimizer = cls([p], lr=0.1)
    optimizers.make_state(optimizer)
    kept = OptimizerState(optimizer, {"w": p}, WORLD)
    sizes = {n: SimpleNamespace(size=t.shape, properties=SimpleNamespace(dtype=t.dtype)) for n, t in saved.items()}
    read = kept.templates(sizes, num_shards)
    for name, tensor in read.items():
        tensor.copy_(saved[name])
    kept.load(read, {}, kept.groups(), sizes)
    assert optimizer.state[p]["step"] == 1
    return optimizer.state[p]["exp_avg"].dequantize()


@pytest.mark.parametrize(("name", "rounds"), [("AdamW8bit", 0.01), ("AdamW4bit", 0.06), ("AdamWFp8", 0.02)])
@pytest.mark.parametrize("cuts", [[], [12], [8, 16], [20]])
def test_blocks_of_any_number_of_processes_are_put_together(name, rounds, cuts):
    """Bit for bit; but where a shard is too small for few bits, as the last of [20], to their rounding."""
    cls = getattr(pytest.importorskip("torchao.optim"), name)
    with torch.compiler.set_stance("force_eager"):
        saved, known = step_in_shards(cls, cuts)
        found = read_whole(cls, saved, len(cuts) + 1)
    if cuts == [20]:
        torch.testing.assert_close(found, known, atol=rounds, rtol=0)
    else:
        assert torch.equal(found, known)


# Whole runs

KILLED = "metric_logger={_component_: interrupting.Interrupt, step: 5, sent: SIGKILL}"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A config of six steps in eight bits, with matrices whose halves are large enough for them; and such a run."""
    work = tmp_path_factory.mktemp("optimizers")
    save_llama(work / "base", sizes=SHARDED_SIZES)
    save_pairs(work / "train.jsonl", random_pairs(48, seed=1))
    cfg = run_config(
        work,
        sizes=SHARDED_SIZES,
        eval_dataset={"source": None},
        optimizer={"_component_": "torchao.optim.AdamW8bit", "lr": 5e-3},
        lora={"rank": 64, "alpha": 16},
        samples={"num_prompts": 0},
        save_every_n_steps=2,
    )
    (work / "config.yaml").write_text(json.dumps(cfg))
    run_recipe("lora_dpo_single_device", f"output_dir={work / 'straight'}", config_paths=[work / "config.yaml"])
    return work


def tune_run(work, name, recipe, *words):
    """Runs in processes of its own; returns their status and output."""
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many as here, for the same bits
    command = [sys.executable, "-m", "pairtune.cli", "run", *recipe.split(), "--config", str(work / "config.yaml")]
    command += [f"output_dir={work / name}", *words]
    done = subprocess.run(command, env=ENVIRONMENT | threads, text=True, capture_output=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


def logged(work, name):
    return [{k: v for k, v in row.items() if k not in SPEED} for row in read_log(work / name / "metrics.jsonl")]


def test_a_run_in_eight_bits_that_is_killed_ends_as_one_left_alone(work):
    """SIGKILL in step 5: the checkpoint of step 2 is whole by then, that of step 4 perhaps."""
    status, _ = tune_run(work, "killed", str(ROOT / "recipes" / "lora_dpo_single_device.py"), KILLED)
    assert status == -signal.SIGKILL and not (work / "killed" / "export").exists()
    words = (f"output_dir={work / 'killed'}", "resume=true")
    run_recipe("lora_dpo_single_device", *words, config_paths=[work / "config.yaml"])
    assert logged(work, "killed") == logged(work, "straight")
    weights, expected = (load_file(work / name / "export" / "model.safetensors") for name in ("killed", "straight"))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_processes_learn_in_eight_bits_what_one_learns_also_when_they_are_killed(work):
    recipe = f"--nproc_per_node 2 {ROOT / 'recipes' / 'lora_dpo_distributed.py'}"
    status, _ = tune_run(work, "two", recipe, KILLED)
    before = logged(work, "two")
    assert status != 0 and [row["step"] for row in before] == [1, 2, 3, 4, 5]
    status, output = tune_run(work, "two", recipe, "resume=true")
    assert status == 0, output[-3000:]
    after, one = logged(work, "two"), logged(work, "straight")
    assert after[:5] == before  # bit for bit, from the checkpoint on, too
    assert [row["loss"] for row in after] == pytest.approx([row["loss"] for row in one], abs=1e-6)
    assert one[0]["loss"] - one[-1]["loss"] > 0.03
    shards = list((work / "two" / "checkpoints").glob("*/shard-00002-*.safetensors"))
    assert any(name.startswith("local.1.") and name.endswith(".exp_avg_sq.codes") for name in load_file(*shards))


def test_a_warm_up_is_as_long_as_its_share_says():
    """7 % of 100 steps are 7, though 0.07 * 100 is more than that in floats."""
    for ratio, total, warmup in ((0.07, 100, 7), (0.1, 12, 2), (0.29, 100, 29), (0.5, 3, 2)):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = schedules.cosine(optimizer, num_training_steps=total, warmup_ratio=ratio)
        assert [round(schedule.lr_lambdas[0](step), 9) for step in (0, warmup)] == [round(1 / (warmup + 1), 9), 1.0]
