"""What a distributed run needs, on paper: memory a GPU, bytes sent a step, and how far the links keep up.

    python tools/plan.py                                    # the table of docs/distributed.md
    python tools/plan.py llama3_1.llama3_1_8b --gpus 8 --method lora --pairs 2

Everything follows from the model's sizes, which torchtune's builder gives on the meta device, and from these formulas.
With N GPUs, weights in bf16, gradients reduced in float32, activations checkpointed layer by layer:

  GiB          as `tune plan` counts it (pairtune/run/memory.py) at a step's fullest moment: weights, AdamW's state and
               full DPO's second model, sharded; gradients; weights on their way; activations and logits
  sent         a step: (N - 1) / N of what is gathered (a layer for forward, for backward and for the reference's
               forward, the root once, for each micro-batch; in full DPO the reference's root too) and of the float32
               gradients, which are reduced once. With hybrid sharding N is the GPUs that share a copy, and the
               copies' gradients are added up over the network: 2 (R - 1) / R of a shard of them, for R copies
  FLOPs        2 a weight and token in the body's forward; backward twice that (once, behind frozen weights);
               checkpointing and the reference one forward more each; the head on answer tokens only
  efficiency   compute / max(compute, links), as FSDP overlaps the two; "no overlap" is compute / (compute + links)

The rest is assumed, and printed above the table. None of it is measured.
"""

import argparse
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import nn

from pairtune.process import torchao_names

PEAK_FLOPS, KERNELS = 989e12, 0.5  # bf16 on an H100, and the share of it that matrix products reach
NVLINK, NETWORK = 450e9, 50e9  # bytes a second a GPU, one direction: within eight GPUs, and beyond (400 Gb/s a GPU)
GPUS_A_NODE = 8
PROMPT, ANSWER = 512, 128  # tokens of a prompt and of each answer
LORA_RANK = 16
LORA_MODULES = ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]
COLUMNS = {  # of the table, and the parts of pairtune.memory in it
    "resident": ("weights", "reference", "optimizer state", "optimizer scratch"),
    "gradients": ("gradients", "whole gradients"),
    "gathered": ("gathered weights",),
    "activations": ("activations", "logits"),
}
# Builder, GPUs, copies, pairs a GPU a micro-batch, micro-batches a step: one, as several keep whole gradients.
CASES = (
    ("llama3_1.llama3_1_8b", 8, 1, 8, 1),
    ("llama3_1.llama3_1_70b", 8, 1, 8, 1),
    ("llama3_1.llama3_1_70b", 64, 1, 4, 1),
    ("llama3_1.llama3_1_70b", 64, 8, 4, 1),
    ("llama3_1.llama3_1_405b", 128, 1, 2, 1),
    ("llama3_1.llama3_1_405b", 128, 1, 8, 1),
)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: in one layer, in the root, and what a layer's LoRA adapters add."""

    layers: int
    layer: int
    root: int
    vocabulary: int
    width: int
    adapter: int = 0

    @property
    def body(self) -> int:
        return self.layers * self.layer


def sizes(model: nn.Module, rank: int = LORA_RANK) -> Sizes:
    """Returns the sizes of a full model, built on the meta device."""
    layer = model.layers[0]
    linears = [m.weight.shape for m in layer.modules() if isinstance(m, nn.Linear)]
    in_layers = sum(p.numel() for p in model.layers.parameters())
    return Sizes(
        layers=len(model.layers),
        layer=sum(p.numel() for p in layer.parameters()),
        root=sum(p.numel() for p in model.parameters()) - in_layers,
        vocabulary=model.tok_embeddings.num_embeddings,
        width=model.tok_embeddings.embedding_dim,
        adapter=sum(rank * (rows + columns) for rows, columns in linears),
    )


def gathered_bytes(s: Sizes, method: str, micro_batches: int = 1, reference: bool = True, item: int = 2) -> int:
    """Returns the bytes of all weights that a step gathers; `item` bytes a weight.

    `reference`: its forward runs in the step (live), or not (its log-probabilities come from a cache).
    """
    body = s.layers * (s.layer + (s.adapter if method == "lora" else 0))
    policy = 2 * body + s.root
    return micro_batches * item * (policy + (body + (s.root if method == "full" else 0) if reference else 0))


def reduced_bytes(s: Sizes, method: str) -> int:
    """Returns the bytes of all float32 gradients that a step reduces, once."""
    return 4 * (s.body + s.root if method == "full" else s.layers * s.adapter)


def memory_bytes(builder: str, method: str, shards: int, pairs: int, micro_batches: int = 1) -> dict[str, int]:
    """Returns bytes a GPU, by column of the table."""
    from pairtune.cli import plan
    from pairtune.run import memory

    setting = memory.Setting("cuda", shards, micro_batches)
    policy, reference = plan.build(
        method,
        {"_component_": f"torchtune.models.{builder}"},
        lora={"rank": LORA_RANK, "alpha": 2.0 * LORA_RANK, "dropout": 0.0, "modules": LORA_MODULES},
        dtype="bf16",
        max_length=PROMPT + ANSWER,
        checkpoint_activations=True,
        setting=setting,
        num_processes=shards,
    )
    batch = memory.uniform_batch(pairs, PROMPT, ANSWER)
    optimizer = {"_component_": "torch.optim.AdamW", "lr": 1e-5, "fused": True}
    parts = memory.step_memory(policy, reference, batch, optimizer, setting).parts
    return {column: sum(parts.get(name, 0) for name in names) for column, names in COLUMNS.items()}


def flops(s: Sizes, method: str, pairs: int) -> float:
    """Returns FLOPs of a micro-batch on a GPU."""
    tokens, scored = pairs * (PROMPT + 2 * ANSWER), pairs * 2 * ANSWER
    body, head = 2 * s.body * tokens, 2 * s.vocabulary * s.width * scored
    attention = pairs * 4 * s.layers * s.width * ((PROMPT + ANSWER) ** 2 / 2 + ANSWER * PROMPT + ANSWER**2 / 2)
    forwards_of_backward = 2 if method == "full" else 1
    # forward, backward, checkpointing's second forward, the reference's forward
    return body * (1 + forwards_of_backward + 1 + 1) + attention * 5 + head * ((3 if method == "full" else 2) + 1)


def plan(builder: str, gpus: int, copies: int, pairs: int, micro_batches: int, method: str) -> dict:
    """Returns one row of the table, in SI and GiB units."""
    module, _, name = f"torchtune.models.{builder}".rpartition(".")
    with torch.device("meta"):
        s = sizes(getattr(import_module(module), name)())
    shards = gpus // copies
    memory = memory_bytes(builder, method, shards, pairs, micro_batches)
    reduced = reduced_bytes(s, method)
    sent = (shards - 1) / shards * (gathered_bytes(s, method, micro_batches) + reduced)
    between_copies = 2 * (copies - 1) / copies * reduced / shards
    links = sent / (NVLINK if shards <= GPUS_A_NODE else NETWORK) + between_copies / NETWORK
    compute = micro_batches * flops(s, method, pairs) / (PEAK_FLOPS * KERNELS)
    num_pairs = gpus * pairs * micro_batches
    return {
        "model": builder.rsplit(".", 1)[-1],
        "GPUs": f"{gpus}" if copies == 1 else f"{copies} x {shards}",
        "method": method,
        "pairs a step": num_pairs,
        **{f"{name} GiB": value / 2**30 for name, value in memory.items()},
        "GiB a GPU": sum(memory.values()) / 2**30,
        "GB sent a step": (sent + between_copies) / 1e9,
        "compute s": compute,
        "links s": links,
        "efficiency": compute / max(compute, links),
        "no overlap": compute / (compute + links),
        "pairs/s": num_pairs / max(compute, links),
    }


def show(rows: list[dict]) -> str:
    """Returns a Markdown table."""

    def cell(value):
        return (
            f"{value:.2f}"
            if isinstance(value, float) and value < 10
            else f"{value:,.0f}"
            if isinstance(value, float)
            else str(value)
        )

    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(map(cell, row.values())) + " |" for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builder", nargs="?", help="below torchtune.models, such as llama3_1.llama3_1_8b")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--copies", type=int, default=1, help="hybrid sharding: data_parallel_replicate_dim")
    parser.add_argument("--method", choices=["full", "lora"], help="default: both")
    parser.add_argument("--pairs", type=int, default=2, help="a GPU a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1, help="a step")
    args = parser.parse_args()
    torchao_names.quiet()
    cases = [(args.builder, args.gpus, args.copies, args.pairs, args.micro_batches)] if args.builder else CASES
    methods = [args.method] if args.method else ["full", "lora"]
    print(
        f"Assumed: {PROMPT} prompt and {ANSWER} + {ANSWER} answer tokens a pair; {PEAK_FLOPS / 1e12:.0f} TFLOP/s "
        f"a GPU, of which matrix products reach {KERNELS:.0%};\n{NVLINK / 1e9:.0f} GB/s a GPU "
        f"among {GPUS_A_NODE} GPUs, "
        f"{NETWORK / 1e9:.0f} GB/s beyond; LoRA rank {LORA_RANK}; the reference's forward in every step.\n"
    )
    print(show([plan(*case, method) for case in cases for method in methods]))


if __name__ == "__main__":
    main()
