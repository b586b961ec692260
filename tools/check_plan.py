"""Whether a step takes the memory that `tune plan` says: prediction against allocation, on small random models.

    python tools/check_plan.py                  # one process
    python tools/check_plan.py --processes 2    # the same, sharded over two (FSDP2 over gloo)

Measured is what torch's CPU allocator hands out during two training steps, as torch.profiler records it: neither the
process's memory nor time plays a part, so the numbers are the same on every machine. What gloo allocates for itself
is left out; as its own thread can let go of a gathered layer late, the lesser of two trials counts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile, record_function

from pairtune.process import torchao_names

torchao_names.quiet()  # before torchao is imported

from torchtune.rlhf.loss import DPOLoss  # noqa: E402

from pairtune import models  # noqa: E402
from pairtune.cli import plan  # noqa: E402
from pairtune.folders.check_model import windows  # noqa: E402
from pairtune.models.adapters import own_shapes  # noqa: E402
from pairtune.models.logps import answer_logps  # noqa: E402
from pairtune.pairs.batch import ROW_MULTIPLE  # noqa: E402
from pairtune.process import dist  # noqa: E402
from pairtune.reference.sources import frozen_model  # noqa: E402
from pairtune.run import memory, optimizers  # noqa: E402

MODEL = {
    "_component_": "torchtune.models.llama3.llama3", "vocab_size": 2000, "num_layers": 4, "num_heads": 4,
    "num_kv_heads": 2, "embed_dim": 128, "intermediate_dim": 384, "max_seq_len": 512, "rope_base": 10_000,
}  # fmt: skip
WIDE = {"embed_dim": 256, "intermediate_dim": 768, "num_kv_heads": 4}  # what NF4 can cut in two
LONG = {"intermediate_dim": 2048, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "max_seq_len": 8192}
SQUARE = {"intermediate_dim": 128, "num_kv_heads": 4}  # few shapes, each of which an optimizer's step is compiled for
GEMMA2 = {"_component_": "pairtune.gemma2.gemma2", "head_dim": 32, "query_pre_attn_scalar": 32}
MIXTURE = {"_component_": "pairtune.mixtral.mixtral", "num_experts": 4}
LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]}
OPTIMIZER = {"_component_": "torch.optim.AdamW", "lr": 1e-4}
BITS_8, BITS_4 = "torchao.optim.AdamW8bit", "torchao.optim.AdamW4bit"
FOUR_BIT = {"name": "model", "quantize": True}
STEPS = 2  # from the second on, the optimizer has its state
TRIALS = 2  # on many processes: gloo's own thread can let go of a gathered layer late, which only adds


@dataclass(frozen=True)
class Case:
    """A model, a method and a batch of pairs of equal lengths, in tokens."""

    method: str
    dtype: str
    batch_size: int
    prompt: int
    answer: int
    micro_batches: int = 1
    checkpointing: bool = False
    attention: str = "segments"
    sizes: dict = field(default_factory=dict)
    modules: tuple[str, ...] = ()
    reference: dict | None = None  # as in a config
    optimizer: str = "torch.optim.AdamW"
    base_dtype: str = "nf4"
    base_config: dict = field(default_factory=dict)  # of which sliding windows are read

    def __str__(self) -> str:
        component = self.component
        words = [self.method, self.dtype] + [self.base_dtype] * (self.base_dtype != "nf4")
        words += [f"{self.batch_size} x {self.prompt}/{self.answer}"]
        words += [f"V {component['vocab_size']:,}", f"D {component['embed_dim']}"]
        words += ["checkpointing"] * self.checkpointing + ["mask"] * (self.attention == "mask")
        words += [f"{component[name]} experts" for name in ("num_experts",) if name in component]
        words += [f"{self.micro_batches} micro-batches"] * (self.micro_batches > 1) + list(self.modules)
        words += ["4-bit second model"] * (self.reference is not None)
        words += [self.optimizer.rpartition(".")[2]] * (self.optimizer != OPTIMIZER["_component_"])
        words += [self.base_config["model_type"]] if self.base_config else []
        return ", ".join(words)

    @property
    def component(self) -> dict:
        return MODEL | self.sizes

    @property
    def lora(self) -> dict:
        return LORA | ({"modules": list(self.modules)} if self.modules else {})

    def batch(self):
        length = self.prompt + 2 * self.answer
        row_length = -(-length // ROW_MULTIPLE) * ROW_MULTIPLE if self.attention == "mask" else None
        return memory.uniform_batch(self.batch_size, self.prompt, self.answer, row_length)


CASES = (
    Case("full", "fp32", 2, 60, 60),
    Case("full", "bf16", 8, 30, 80, sizes={"vocab_size": 6000}),
    Case("full", "fp32", 2, 100, 100, micro_batches=3, checkpointing=True, sizes=WIDE),
    Case("lora", "fp32", 4, 60, 60),
    Case("lora", "bf16", 8, 100, 50, checkpointing=True),
    Case("lora", "fp32", 3, 90, 140, attention="mask"),
    Case("lora", "fp32", 1, 6000, 1500, checkpointing=True, sizes=LONG),  # a row that its layer takes in pieces
    Case("lora", "bf16", 4, 40, 60, micro_batches=2, sizes={"vocab_size": 8000}, modules=("q_proj", "mlp", "output")),
    Case("qlora", "fp32", 1, 60, 60, sizes=WIDE),
    Case("qlora", "bf16", 4, 120, 60, checkpointing=True, sizes=WIDE),
    Case("qlora", "bf16", 4, 120, 60, base_dtype="int8", sizes=WIDE),
    Case("lora", "fp32", 2, 40, 60, sizes=WIDE, reference=FOUR_BIT),
    Case("lora", "fp32", 3, 90, 140, base_config={"model_type": "mistral", "sliding_window": 64}),
    Case("lora", "fp32", 3, 90, 140, sizes=GEMMA2, base_config={"model_type": "gemma2", "sliding_window": 64}),
    Case("lora", "bf16", 4, 60, 60, checkpointing=True, sizes=MIXTURE),
    Case("full", "fp32", 2, 60, 60, sizes=SQUARE, optimizer=BITS_8),
    Case("full", "fp32", 2, 60, 60, sizes=SQUARE, optimizer=BITS_4),
    Case("full", "fp32", 2, 60, 60, optimizer="torch.optim.SGD"),
)
SHARDED_CASES = (
    Case("full", "fp32", 2, 40, 60, sizes=WIDE),
    Case("full", "bf16", 2, 40, 60, micro_batches=2, checkpointing=True, sizes=WIDE),
    Case("qlora", "fp32", 2, 40, 60, micro_batches=2, sizes=WIDE),
    Case("lora", "fp32", 2, 40, 60, sizes=WIDE, reference=FOUR_BIT),
    Case("full", "fp32", 2, 40, 60, sizes=WIDE | SQUARE, optimizer=BITS_8),
)


def predict(case: Case, num_shards: int = 1) -> memory.StepMemory:
    """Returns what `tune plan` would say of this batch."""
    how = models.Execution(case.attention, checkpointing=case.checkpointing)
    setting = memory.Setting("cpu", num_shards, case.micro_batches, execution=how)
    policy, reference = plan.build(
        case.method, case.component, lora=case.lora, dtype=case.dtype, base_dtype=case.base_dtype,
        max_length=case.prompt + case.answer, setting=setting, num_processes=num_shards, reference=case.reference,
        base_config=case.base_config,
    )  # fmt: skip
    return memory.step_memory(policy, reference, case.batch(), OPTIMIZER | {"_component_": case.optimizer}, setting)


def measure(case: Case, world: dist.World) -> int:
    """Returns the most bytes allocated at a time in training steps as the recipes make them, weights included."""
    torch.manual_seed(0)
    whole = models.full(case.component, dtype="fp32")
    weights = {name: 0.02 * torch.randn(shape) for name, shape in own_shapes(whole).items()}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        policy, reference = _build(case, world)
        for model in (policy, reference):
            if model is not None:
                models.load(model, weights, world=world)
        optimizer = optimizers.make(OPTIMIZER | {"_component_": case.optimizer}, policy.parameters())
        with record_function("training"):
            for _ in range(STEPS):
                _train(case, policy, reference, optimizer, world)
    return _peak(profiler)


def _build(case: Case, world: dist.World):
    if case.method == "full":
        policy, reference = (models.full(case.component, dtype=case.dtype) for _ in range(2))
        reference.requires_grad_(False).eval()
    else:
        base = {"dtype": case.dtype, "base_dtype": case.base_dtype}
        policy = models.policy(case.method, case.component, case.lora, **base, world=world)
        reference = None
        if case.reference:
            like = {"component": case.component, "dtype": case.dtype, "world": world}
            reference = frozen_model(case.reference, case.method, **like)
    for model in (policy, reference):
        if model is not None:
            models.prepare(
                model, max_length=case.prompt + case.answer, attention=case.attention,
                checkpoint_activations=case.checkpointing, windows=windows(case.base_config, len(model.layers)),
            )  # fmt: skip
    return policy, reference


def _train(case: Case, policy, reference, optimizer, world: dist.World) -> None:
    loss_fn = DPOLoss(beta=0.1)
    for n in range(case.micro_batches):
        models.sync_gradients(policy, n == case.micro_batches - 1)
        batch = case.batch().to(world.device)
        chosen, rejected = answer_logps(policy, batch)
        losses, *_ = loss_fn(chosen, rejected, *_reference_logps(policy, reference, batch))
        losses.sum().backward()
    models.clip_gradients(policy, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _reference_logps(policy, reference, batch):
    if reference is None:
        with models.reference_of(policy) as model:
            return answer_logps(model, batch)
    with torch.no_grad():
        return answer_logps(reference, batch)


def _peak(profiler) -> int:
    """The most bytes alive from the first training step on; c10d::... is gloo's own."""
    events, starts = [], []

    def walk(event, is_ours: bool) -> None:
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1].ptr, event.typed[1].alloc_size, is_ours))
        elif event.name == "training":
            starts.append(event.start_time_ns)
        for child in event.children:
            walk(child, is_ours and not event.name.startswith(("c10d::", "gloo:")))

    for event in profiler.profiler.kineto_results.experimental_event_tree():
        walk(event, True)
    alive, total, peak = {}, 0, 0
    for time, address, size, is_ours in sorted(events, key=lambda event: event[0]):
        if size > 0 and is_ours:
            alive[address] = size
            total += size
        elif size < 0:
            total -= alive.pop(address, 0)
        peak = max(peak, total) if time >= starts[0] else 0
    return peak


def show(predicted: list[memory.StepMemory], measured: list[int], cases) -> str:
    """Returns a Markdown table."""
    lines = ["| configuration | predicted MiB | measured MiB | predicted / measured |", "| --- | --- | --- | --- |"]
    for case, says, is_so in zip(cases, predicted, measured, strict=True):
        lines.append(f"| {case} | {says.total / 2**20:.2f} | {is_so / 2**20:.2f} | {says.total / is_so:.3f} |")
    return "\n".join(lines)


def measure_sharded(processes: int) -> list[int]:
    """Returns what the first of several processes measures of SHARDED_CASES."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        done = subprocess.run([*command, __file__, "--worker", str(path)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-3000:])
        return json.loads(path.read_text())


def _work(path: Path) -> None:
    world = dist.connect(dist.start("cpu"))
    measured = [min(measure(case, world) for _ in range(TRIALS)) for case in SHARDED_CASES]
    if world.is_main:
        path.write_text(json.dumps(measured))
    dist.stop(world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)  # attention on the CPU has buffers a thread
    if args.worker:
        _work(args.worker)
    elif args.processes > 1:
        predicted = [predict(case, args.processes) for case in SHARDED_CASES]
        print(show(predicted, measure_sharded(args.processes), SHARDED_CASES))
    else:
        world = dist.start("cpu")
        print(show([predict(case) for case in CASES], [measure(case, world) for case in CASES], CASES))


if __name__ == "__main__":
    main()
