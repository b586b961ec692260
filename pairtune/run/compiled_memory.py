"""What a compiled layer keeps for its backward, and holds within, counted without compiling it.

torch.compile decides what is kept and what is computed again by a minimal cut through the layer's graph, within
torch's activation_memory_budget. Here that very cut is made on the meta device; a stand-in that keeps as much then
takes the layer's place in memory.step_memory.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor, fx, nn
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from pairtune.models import attention
from pairtune.models.execution import SELECTIVE_BUDGET
from pairtune.models.experts import mixtures_of
from pairtune.pairs.batch import PairBatch, lay_out

# Operations with kernels of their own: what goes in and comes out is in memory. All between them is fused.
_KERNELS = ("mm.", "bmm.", "addmm.", "_attention", "sort.", "index_put", "scatter")
_TOKENS = 1024
_SOME = SimpleNamespace(prompt=[0] * 512, chosen=[1] * 256, rejected=[2] * 256)
_VIEWS = ("view", "permute", "transpose", "t", "alias", "expand", "squeeze", "unsqueeze", "slice", "select")


@dataclass(frozen=True)
class LayerMemory:
    """Bytes of a compiled layer.

    Attributes:
        kept: From forward to backward.
        forward, backward: Most that is there at a time within either, beside the layer's input and parameters; kept
            tensors included.
    """

    kept: int
    forward: int
    backward: int


def layer_memory(layer: nn.Module, hidden: Tensor, **inputs) -> LayerMemory:
    """Returns what a layer takes that is compiled for these inputs, on the meta device."""
    # The compiler's modules take most of a second and 16 MiB, and few runs on a CPU compile
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    graphs: dict[str, fx.GraphModule] = {}

    def remember(which: str):
        return lambda graph, _: graphs.setdefault(which, graph)

    backend = aot_autograd(
        fw_compiler=remember("forward"),
        bw_compiler=remember("backward"),
        inference_compiler=remember("forward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    hidden = torch.empty_like(hidden, requires_grad=True)
    trained = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    with torch.enable_grad():
        out = torch.compile(layer.forward, backend=backend)(hidden, **inputs)
        torch.autograd.grad(out, trained, torch.empty_like(out))  # the backward's graph comes with the first call
    torch._dynamo.reset()
    given = set(graphs["forward"].graph.find_nodes(op="placeholder"))
    kept = {_storage(node): _bytes(node) for node in _outputs(graphs["forward"]) if _storage(node) not in given}
    return LayerMemory(
        kept=sum(kept.values()) - hidden.nbytes,  # the output is the next layer's input
        forward=_most(graphs["forward"], given=False),
        backward=_most(graphs["backward"], given=True) - hidden.nbytes,
    )


def _outputs(graph: fx.GraphModule) -> list[fx.Node]:
    (output,) = graph.graph.find_nodes(op="output")
    return output.all_input_nodes


def _most(graph: fx.GraphModule, *, given: bool) -> int:
    """The bytes of what is in memory at the fullest moment; `given`: inputs that no parameter is, until last used."""
    order = {node: i for i, node in enumerate(graph.graph.nodes)}
    kernels = {n for n in order if n.op == "output" or any(k in str(n.target) for k in _KERNELS)}
    parts = {n for n in order if "getitem" in str(n.target)}
    alive: dict[fx.Node, list[int]] = {}  # by storage: bytes, from, to
    for node, at in order.items():
        if not _bytes(node) or (node.op == "placeholder" and (not given or node.name.startswith("primals"))):
            continue
        written = node.op == "placeholder" or node in kernels | parts or any(user in kernels for user in node.users)
        base = _storage(node)
        if written or base in alive:
            entry = alive.setdefault(base, [_bytes(base), at, at])
            entry[2] = max([entry[2], *(order[user] for user in _readers(node, kernels))])
    return max(
        (sum(size for size, start, end in alive.values() if start <= at <= end) for at in order.values()), default=0
    )


def _readers(node: fx.Node, kernels: set[fx.Node]) -> set[fx.Node]:
    """The kernels that read a node, through all that is fused with them."""
    found, seen, waiting = set(), set(), [*node.users]
    while waiting:
        user = waiting.pop()
        if user in seen:
            continue
        seen.add(user)
        if user in kernels:
            found.add(user)
        else:
            waiting.extend(user.users)
    return found


def _storage(node: fx.Node) -> fx.Node:
    """The node whose memory a view shows."""
    while node.op == "call_function" and any(f".{name}." in str(node.target) for name in _VIEWS):
        node = node.args[0]
    return node


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


@contextmanager
def as_compiled(model: TransformerDecoder, batch: PairBatch, *, selective: bool = False) -> Iterator[None]:
    """While it lasts, the model's layers take on the meta device what they take compiled.

    A mixture of experts stays as it is: its routing is looked at from outside.

    Args:
        batch: On the meta device.
        selective: Within execution.SELECTIVE_BUDGET.
    """
    if mixtures_of(model):
        yield
        return
    with ExitStack() as stack:
        for layer in (m for m in model.modules() if isinstance(m, TransformerSelfAttentionLayer)):
            layer.forward = _StandIn(layer, _compiled(model, layer, batch, selective))
            stack.callback(layer.__dict__.pop, "forward")
        yield


_KNOWN: dict[tuple, LayerMemory] = {}  # of layers that are alike, for a number of tokens


def _compiled(model: TransformerDecoder, layer: nn.Module, batch: PairBatch, selective: bool) -> LayerMemory:
    """What a layer takes, which but for a dense mask grows as the tokens do: then it is counted for a few."""
    embedding, told_of = model.tok_embeddings.weight, batch
    if model.pairtune.back_end == "flex":
        told_of = lay_out([_SOME], _TOKENS).to(batch.tokens.device)
    shape = *told_of.tokens.shape, embedding.shape[1]
    parts = ((name, p.shape, p.dtype, type(p.data), p.requires_grad) for name, p in layer.named_parameters())
    kind = shape, model.pairtune.back_end, layer.attn._attention_call, selective, *parts
    if kind not in _KNOWN:
        hidden = torch.empty(shape, dtype=embedding.dtype, device="meta")
        told = attention.told(told_of, model.pairtune.back_end, model.pairtune.windows)
        with torch._functorch.config.patch(activation_memory_budget=SELECTIVE_BUDGET if selective else 1.0):
            _KNOWN[kind] = layer_memory(layer, hidden, mask=told, input_pos=told_of.input_pos)
    times = batch.tokens.numel() / told_of.tokens.numel()
    return LayerMemory(*(round(times * size) for size in vars(_KNOWN[kind]).values()))


class _StandIn:
    """A layer's forward that holds what the compiled one holds."""

    def __init__(self, layer: nn.Module, memory: LayerMemory):
        self._trained, self._memory = [p for p in layer.parameters() if p.requires_grad], memory

    def __call__(self, hidden: Tensor, **_) -> Tensor:
        return _Holding.apply(hidden, self._memory, *self._trained)


class _Holding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, memory, *trained):
        _hold(memory.forward - memory.kept)
        ctx.memory = memory
        ctx.save_for_backward(hidden, torch.empty(memory.kept, dtype=torch.uint8, device="meta"), *trained)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx, grad):
        hidden, kept, *trained = ctx.saved_tensors
        _hold(ctx.memory.backward - kept.nbytes - hidden.nbytes)
        return torch.empty_like(hidden), None, *map(torch.empty_like, trained)


def _hold(size: int) -> None:
    torch.empty(max(0, size), dtype=torch.uint8, device="meta")
