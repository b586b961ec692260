"""How much memory a training step takes, counted without taking it.

The step runs on the meta device, where tensors have shapes and no memory, through the functions that recipes call:
forward, reference, backward, clipping, optimizer. So no formula can miss what a layer keeps for its backward. Three
things differ from the real run and are modelled here: which attention and norm kernels the device has, what some
kernels allocate inside, and what FSDP2 shards, gathers and reduces.
"""

import inspect
import warnings
import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import flex_attention as flex
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.errors import UserError
from pairtune.models import attention, logps, nf4, offloading
from pairtune.models.bridge.towers import towers_of
from pairtune.models.execution import SELECTIVE, Execution, checkpointed
from pairtune.pairs.batch import PairBatch, lay_out
from pairtune.pairs.limits import worst_pair
from pairtune.process.dist import World
from pairtune.run import optimizers
from pairtune.run.compiled_memory import as_compiled

aten = torch.ops.aten
META = torch.device("meta")

# Bytes that a kernel allocates for itself and frees before it returns.
KERNEL_BYTES = {aten.logsumexp.default: lambda x, *_: x.nbytes}  # exp(x - max)


PARTS = {  # in the order of a table, and what is not plain from the name
    "weights": "",
    "reference": "the second, frozen model",
    "gradients": "",
    "whole gradients": "not sharded before a step's last micro-batch has been through backward",
    "optimizer state": "",
    "optimizer scratch": "what its step allocates",
    "gathered weights": "layers on their way, embedding and output, buffers for gradients on theirs",
    "activations": "",
    "logits": "",
}


@dataclass(frozen=True)
class Setting:
    """Where a step runs, and in how many pieces."""

    device: str = "cuda"  # or cpu
    num_shards: int = 1  # devices that share a model's weights (FSDP2)
    micro_batches: int = 1  # a step
    cpu_offload: bool = False  # shards wait in host memory; weights are gathered even by one device
    processes: int = 1  # that share out a step's pairs
    execution: Execution | None = None  # None: as the model was told by models.execute

    @classmethod
    def of(cls, world: World) -> "Setting":
        """A run's."""
        return cls(
            device=world.device.type,
            num_shards=world.num_shards if world.shards else 1,
            cpu_offload=world.cpu_offload,
            processes=world.size,
        )

    @property
    def shards(self) -> bool:
        return self.num_shards > 1 or self.cpu_offload

    @property
    def share_of_state(self) -> float:
        """What a process holds of an optimizer's state, wherever that is."""
        return 1 / self.num_shards

    @property
    def share(self) -> float:
        """What a device holds of whatever is sharded."""
        return 0.0 if self.cpu_offload else 1 / self.num_shards


@dataclass(frozen=True)
class StepMemory:
    """Bytes a device at the moment when a step holds most, by part, and what there is over all devices."""

    parts: dict[str, int]  # without those that hold nothing then
    trained: int  # bytes of the trained weights
    optimizer: int  # bytes of the optimizer's state
    host: int  # bytes a process of the shards that wait in host memory; 0 without offloading
    pinned: int = 0  # bytes a process of layers' inputs there

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def step_memory(
    policy: TransformerDecoder,
    reference: TransformerDecoder | None,
    batch: PairBatch,
    optimizer: dict,
    setting: Setting,
) -> StepMemory:
    """Returns the peak of a training step, once the optimizer has its state.

    Args:
        policy: On the meta device, from models.full or models.lora and models.prepare.
        reference: A second model, likewise; None: the policy with its adapters off.
        batch: A micro-batch.
        optimizer: The config's block.

    Raises:
        UserError: The optimizer does not run on the meta device.
    """
    trained = [p for p in policy.parameters() if p.requires_grad]
    made = _made_once(policy, optimizer, trained, setting)
    held = {"weights": [*policy.parameters()], "reference": []}
    if reference is not None:
        held["reference"] = [*reference.parameters()]
    ledger = _Ledger(*filter(None, (policy, reference)))
    for part, tensors in held.items():
        ledger.own(tensors, part, setting.share)
    ledger.own(made.state, "optimizer state", 0.0 if made.on_host or setting.cpu_offload else made.share)
    for model, part in ((policy, "weights"), (reference, "reference")):
        if model is not None:
            _fill_rope(model)
            ledger.own(model.buffers(), part)  # not sharded
    sharding = _Sharding(policy, reference, setting, ledger)
    batch, away = batch.to(META), _HostMemory()
    with (
        _kernels_of(setting.device),
        _executing(setting.execution, batch, policy, reference),
        _offloading(setting.execution, policy, away),
        ledger,
        sharding.of_gradients(),
    ):
        if setting.micro_batches > 1:  # the last one holds most: it finds the gradients of those before it
            sharding.accumulate()
        _forward_backward(policy, reference, batch, sharding)
        models.clip_gradients(policy, 1.0)
        ledger.new = ("optimizer scratch", setting.share if made.allocates else 0.0)
        if made.allocates:
            with torch.compiler.set_stance("force_eager"):
                made.optimizer.step()
    state = round(num_bytes(made.state) * made.share * setting.num_shards)  # of all devices
    on_host = num_bytes([*trained, *(t for tensors in held.values() for t in tensors)])  # gradients are as `trained`
    host = (on_host + state) // setting.num_shards if setting.cpu_offload else 0
    if made.on_host and not setting.cpu_offload:
        host = state // setting.num_shards + made.copies * 2 * num_bytes(trained)  # weights and gradients
    return StepMemory(
        parts={part: round(ledger.peak[part]) for part in PARTS if ledger.peak[part] >= 1},
        trained=num_bytes(trained),
        optimizer=state,
        host=host,
        pinned=away.size,
    )


def pass_memory(reference: TransformerDecoder, batch: PairBatch, setting: Setting) -> int:
    """Returns the peak bytes a device while a second model fills a cache: it is alone, and keeps nothing for backward.

    Args:
        reference, batch, setting: As for `step_memory`.
    """
    ledger = _Ledger(reference)
    ledger.own(reference.parameters(), "reference", setting.share)
    _fill_rope(reference)
    ledger.own(reference.buffers(), "reference")
    sharding = _Sharding(reference, None, setting, ledger)
    batch = batch.to(META)
    with _kernels_of(setting.device), _executing(setting.execution, batch, reference), ledger, torch.no_grad():
        sharding.forward()
        logps.answer_logps(reference, batch)
    return round(sum(ledger.peak.values()))


def worst_batch(batch_size: int, max_length: int, row_length: int | None = None) -> PairBatch:
    """Returns a batch of pairs that `worst_pair` describes. `row_length` is for dense masks, as in lay_out."""
    return uniform_batch(batch_size, *worst_pair(max_length), row_length)


def uniform_batch(batch_size: int, prompt: int, answer: int, row_length: int | None = None) -> PairBatch:
    """Returns a batch of pairs of equal lengths, in tokens; the answers have no beginning in common."""
    return lay_out([uniform_pair(prompt, answer)] * batch_size, row_length)


def uniform_pair(prompt: int, answer: int) -> SimpleNamespace:
    """Returns a pair of these lengths, in tokens."""
    return SimpleNamespace(prompt=[0] * prompt, chosen=[1] * answer, rejected=[2] * answer)


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of these tensors' memory; of NF4 ones, what they are packed into."""
    return sum(map(_num_bytes, tensors))


def _num_bytes(tensor: Tensor) -> int:
    return sum(t.untyped_storage().nbytes() for t in _plain(tensor))


def _plain(tensor: Tensor) -> list[Tensor]:
    """The tensors that a tensor subclass such as NF4 is made of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))]


# The step


def _forward_backward(policy, reference, batch: PairBatch, sharding: "_Sharding") -> None:
    sharding.forward()
    chosen, rejected = logps.answer_logps(policy, batch)
    sharding.reference_forward()
    with torch.no_grad():
        if reference is None:
            with models.reference_of(policy):
                logps.answer_logps(policy, batch)
        else:
            logps.answer_logps(reference, batch)
    sharding.backward()
    F.logsigmoid(chosen - rejected).sum().backward()
    sharding.end_backward()


@dataclass(frozen=True)
class _Made:
    """An optimizer on the meta device, and how much of what it holds is on a device of the run."""

    optimizer: Optimizer
    state: list[Tensor]
    share: float  # what a device holds of the state
    allocates: bool  # whether what its step allocates counts: one that is fused or compiled allocates little
    on_host: bool  # its state is in host memory
    copies: bool  # and with it copies of weights and gradients


_known: WeakKeyDictionary[nn.Module, dict] = WeakKeyDictionary()  # by what is trained: an 8-bit state takes a while


def _made_once(policy: nn.Module, block: dict, trained: list[nn.Parameter], setting: Setting) -> _Made:
    """Returns `_make_optimizer`'s, made once for all steps that are counted of this policy."""
    known, key = _known.setdefault(policy, {}), (repr(block), setting.device, setting.cpu_offload, setting.num_shards)
    if key not in known:
        known[key] = _make_optimizer(block, trained, setting)
    return known[key]


def _make_optimizer(block: dict, trained: list[nn.Parameter], setting: Setting) -> _Made:
    """Returns the optimizer with its state.

    On a GPU torch's optimizers take all parameters at once (foreach), on a CPU one after the other, unless told.

    Raises:
        UserError: It does not run on the meta device.
    """
    arguments, path, copies = dict(block), block["_component_"], False
    fused, foreach = arguments.pop("fused", None), arguments.pop("foreach", None)
    if path == optimizers.OFFLOADING:
        arguments["_component_"], copies = arguments.pop("optimizer_class", "torch.optim.AdamW"), True
        arguments = {k: v for k, v in arguments.items() if k not in ("offload_gradients", "minimal_size")}
    on_gpu = setting.device == "cuda"
    if fused is None and foreach is None and on_gpu and not setting.cpu_offload:
        fused = optimizers.takes_fused(block)
    if ".Paged" in path:  # managed memory, which a GPU shares with its host
        arguments["_component_"] = path.replace(".Paged", ".")
    try:
        with torch.compiler.set_stance("force_eager"):
            optimizer = optimizers.build(arguments, trained)
            if "foreach" in inspect.signature(type(optimizer)).parameters:
                foreach = on_gpu and not fused if foreach is None else foreach
                optimizer = optimizers.build(arguments | {"foreach": bool(foreach)}, trained)
            state, share = _state(optimizer, trained), setting.share_of_state
            if setting.num_shards > 1 and not path.startswith("torch."):  # blocks are those of a shard
                shards = [_shard(p, setting.num_shards) for p in trained]
                state, share = _state(optimizers.build(arguments, shards), shards), 1.0
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"optimizer._component_={path}: its memory cannot be told without running it: {error}"
        ) from None
    compiled = path.startswith(("torchao.", "bitsandbytes."))
    return _Made(optimizer, state, share, not (fused or compiled), on_gpu and (copies or ".Paged" in path), copies)


def _state(optimizer: Optimizer, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Makes the optimizer's state, and returns its tensors, each once."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    found = [v for values in optimizer.state.values() for v in values.values() if isinstance(v, Tensor)]
    return list({id(tensor): tensor for tensor in found}.values())


def _shard(parameter: nn.Parameter, num_shards: int) -> nn.Parameter:
    """The largest of a parameter's shards."""
    rows = -(-parameter.shape[0] // num_shards)
    return nn.Parameter(torch.empty(rows, *parameter.shape[1:], dtype=parameter.dtype, device=META))


def _fill_rope(model: nn.Module) -> None:
    """Llama 3.1 and later leave rope's buffers out on the meta device; models.load makes them."""
    for module in model.modules():
        if hasattr(module, "rope_init") and not list(module.buffers()):
            with torch.device("cpu"):
                module.rope_init()
            module.to(META)


# What is alive


class _Ledger(TorchDispatchMode):
    """Adds up, by part, the bytes of all meta tensors that are alive, and remembers the most.

    What an operation returns counts until the last reference to its storage is gone, as in an allocator.
    """

    def __init__(self, *models: TransformerDecoder):
        super().__init__()
        self.sizes: Counter[str] = Counter()  # part -> bytes a device
        self.peak: Counter[str] = Counter()
        self.new = ("activations", 1.0)  # the part of new tensors, and what a device holds of them
        self._vocabularies = {model.tok_embeddings.num_embeddings for model in models}
        self._total, self._most = 0.0, 0.0
        self._entries: dict[int, tuple[str, float, weakref.ref]] = {}  # by a storage's address: part, bytes

    def own(self, tensors: Iterable[Tensor], part: str, share: float = 1.0) -> None:
        """Says what these tensors are, and how much of them a device holds."""
        for tensor in (plain for t in tensors for plain in _plain(t) if plain.is_meta):
            self._forget(tensor.untyped_storage()._cdata)
            self._enter(tensor.untyped_storage(), part, share)

    def set(self, part: str, size: float) -> None:
        """Says how many bytes a part has for which no tensor stands."""
        self._add(part, size - self.sizes[part])

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if any(t not in (Tensor, nn.Parameter) for t in types):
            return NotImplemented  # NF4 does it with plain tensors, which come back here
        if operation in KERNEL_BYTES:
            inside = KERNEL_BYTES[operation](*args)
            self._add("logits", inside)
            self._add("logits", -inside)
        if operation == aten._local_scalar_dense.default and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # whether a mask is all ones, which some of transformers' models ask: here it is
        result = operation(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_meta:
                storage = tensor.untyped_storage()
                if storage._cdata not in self._entries:
                    is_logits = tensor.dim() > 1 and tensor.shape[-1] in self._vocabularies
                    self._enter(storage, *(("logits", 1.0) if is_logits else self.new))
        return result

    def _enter(self, storage, part: str, share: float) -> None:
        address, size = storage._cdata, storage.nbytes() * share
        self._entries[address] = (part, size, weakref.ref(storage, lambda _: self._forget(address)))
        self._add(part, size)

    def _forget(self, address: int) -> None:
        if address in self._entries:
            part, size, _ = self._entries.pop(address)
            self._add(part, -size)

    def _add(self, part: str, size: float) -> None:
        self.sizes[part] += size
        self._total += size
        if self._total > self._most:
            self._most, self.peak = self._total, self.sizes.copy()


# Sharding


class _Sharding:
    """Enters what FSDP2 holds beside the shards; nothing where there are none.

    A block is gathered into a flat buffer and copied out of it. In forward the buffer is kept until the next block has
    come; in backward the next layer's is there already. There a layer's gradients come one by one, whole, and with the
    last one are copied into a float32 buffer, which is reduced while those of the next layer come. The root stays from
    forward to the end of backward, where its gradients are reduced: until then they are whole.
    """

    def __init__(self, policy: TransformerDecoder, reference: nn.Module | None, setting: Setting, ledger: _Ledger):
        self._setting, self._ledger = setting, ledger
        self._layer_of = {p: i for i, layer in enumerate(policy.layers) for p in layer.parameters() if p.requires_grad}
        self._trained = {p: p in self._layer_of for p in policy.parameters() if p.requires_grad}
        self._trained_root = [p for p, in_layer in self._trained.items() if not in_layer]
        self._layer, self._root = _block_bytes(policy)
        # Without a second model, the reference's forward is one more of the policy's, whose root is there already.
        self._second_layer, self._second_root = (self._layer, 0) if reference is None else _block_bytes(reference)
        self._to_come = Counter(self._layer_of.values())  # gradients, by layer
        self._whole = Counter()  # bytes of those that have come, by layer
        self._reducing = 0  # bytes of the buffer

    def accumulate(self) -> None:
        """Enters the gradients of earlier micro-batches; FSDP2 reduces them in the last one only."""
        for parameter in self._trained:
            parameter.grad = torch.empty_like(parameter)
            self._enter_gradient(parameter, reduced=not self._setting.shards)

    def forward(self) -> None:
        self._gather(2 * (self._root + self._layer), self._root + self._layer)
        self._gather(self._root + 2 * self._layer, self._root + self._layer)

    def reference_forward(self) -> None:
        root = self._root + self._second_root
        self._gather(root + self._second_root + 2 * self._second_layer, root + self._second_layer)
        self._gather(root + 2 * self._second_layer, root + self._second_layer)

    def backward(self) -> None:
        coming = self._reducing + self._whole.total()
        self._gather(self._root + 2 * self._layer + coming, self._root + self._layer + coming)

    def _reduce(self, parameter: nn.Parameter) -> None:
        """Enters a gradient that has come, whole, and with the last one of its layer the buffer in their place."""
        layer, item = self._layer_of[parameter], parameter.element_size()
        summed = 4 if self._setting.micro_batches > 1 else 0  # bytes a number, of those of earlier micro-batches
        self._whole[layer] += parameter.numel() * (item + summed)
        self._to_come[layer] -= 1
        self.backward()
        if not self._to_come[layer]:
            numbers = sum(p.numel() for p, other in self._layer_of.items() if other == layer)
            self._reducing, self._whole[layer] = 4 * numbers, numbers * (summed or item)
            self.backward()
            del self._whole[layer]
            self.backward()

    def end_backward(self) -> None:
        if self._setting.shards:
            in_float32 = 4 * sum(p.numel() for p in self._trained_root)
            self._gather(in_float32, in_float32)
            self._ledger.own([p.grad for p in self._trained_root], "gradients", self._setting.share)
        self._gather(0, 0)

    def _gather(self, among_several: float, alone: float) -> None:
        if self._setting.shards:
            self._ledger.set("gathered weights", among_several if self._setting.num_shards > 1 else alone)

    @contextmanager
    def of_gradients(self):
        """Enters each gradient when it has come."""
        handles = [p.register_post_accumulate_grad_hook(self._arrive) for p in self._trained]
        yield
        for handle in handles:
            handle.remove()

    def _arrive(self, parameter: nn.Parameter) -> None:
        self._enter_gradient(parameter, reduced=self._trained[parameter] or not self._setting.shards)
        if self._trained[parameter] and self._setting.shards:
            self._reduce(parameter)

    def _enter_gradient(self, parameter: nn.Parameter, *, reduced: bool) -> None:
        if reduced:
            self._ledger.own([parameter.grad], "gradients", self._setting.share)
        else:  # in float32 once there are several to add up
            share = 4 / parameter.element_size() if self._setting.micro_batches > 1 else 1
            self._ledger.own([parameter.grad], "whole gradients", share)


def _block_bytes(model: TransformerDecoder) -> tuple[float, int]:
    """Returns the bytes of a layer and of the root: embedding, last norm and output."""
    layers = num_bytes(p for layer in model.layers for p in layer.parameters())
    towers = num_bytes(p for tower in towers_of(model) for p in tower.parameters())  # which are never gathered
    return layers / len(model.layers), num_bytes(model.parameters()) - layers - towers


# Kernels


@contextmanager
def _executing(how: Execution | None, batch: PairBatch, *models: TransformerDecoder | None):
    """While it lasts, the models' layers hold what they hold when they compute so."""
    with ExitStack() as stack:
        for model in filter(None, models if how else ()):
            stack.callback(setattr, model.pairtune, "back_end", model.pairtune.back_end)
            model.pairtune.back_end = how.attention
            if how.compile:
                stack.enter_context(as_compiled(model, batch, selective=how.checkpointing == SELECTIVE))
            if how.checkpointing is True:
                stack.enter_context(checkpointed(model, compiled=how.compile))
        yield


def _offloading(how: Execution | None, policy: TransformerDecoder, away: "_HostMemory"):
    return offloading.offloaded(policy, away) if how and how.offloading else nullcontext()


class _HostMemory(saved_tensors_hooks):
    """What torchtune's OffloadActivations does with layers' inputs: the device holds the one that is on its way.

    Attributes:
        size: Bytes of pinned memory, which torch hands out in powers of two.
    """

    def __init__(self):
        super().__init__(self._take, self._give)
        self.size, self._on_device = 0, None

    def _take(self, tensor: Tensor) -> Tensor | tuple:
        if tensor.nbytes < 1024:
            return tensor
        self.size += 2 ** (tensor.nbytes - 1).bit_length()
        self._on_device = tensor
        return tensor.shape, tensor.dtype

    def _give(self, kept: Tensor | tuple) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, dtype = kept
        self._on_device = torch.empty(shape, dtype=dtype, device=META)  # beside the one before
        return self._on_device


@contextmanager
def _kernels_of(device: str):
    """Treats meta tensors as this device's: attention, norm and NF4 kernels, its number of logits at a time.

    torch would take its general kernels for them, which keep all attention weights.
    """
    sdpa, rms_norm, validate = F.scaled_dot_product_attention, F.rms_norm, flex._validate_device

    def attend(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa and not attention.takes_groups(device, q.dtype, attn_mask):
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        if device == "cpu" and (dropout_p or q.shape[-1] != v.shape[-1]):  # no fused kernel there
            how = {"attn_mask": attn_mask, "dropout_p": dropout_p, "is_causal": is_causal, "enable_gqa": enable_gqa}
            return sdpa(q, k, v, **how)
        return _fused_attention(device, q, k, v, attn_mask, is_causal)

    def norm(x, normalized_shape, weight=None, eps=None):
        if device == "cuda" and weight is not None and weight.dtype == x.dtype:
            return _FusedNorm.apply(x, weight)
        return rms_norm(x, normalized_shape, weight, eps)

    F.scaled_dot_product_attention, F.rms_norm, flex._validate_device = attend, norm, lambda *_: None
    logps.CHUNK_LOGITS["meta"] = logps.CHUNK_LOGITS[device]
    if device == "cuda":
        nf4.FUSED.add("meta")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that bf16 norms are not fused: counted as such
            yield
    finally:
        F.scaled_dot_product_attention, F.rms_norm, flex._validate_device = sdpa, rms_norm, validate
        del logps.CHUNK_LOGITS["meta"]
        nf4.FUSED.discard("meta")


def _fused_attention(device: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Keeps q, k, v, the output and a number a query and head; a boolean mask becomes one of q's dtype, kept too."""
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, torch.zeros((), dtype=q.dtype, device=META), float("-inf"))
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)[0]
    if mask is None and q.dtype != torch.float32 and q.shape[-1] == v.shape[-1]:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    mask = None if mask is None else mask.expand(*q.shape[:2], *mask.shape[-2:])
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, q.requires_grad, 0.0, is_causal)[0]


class _FusedNorm(torch.autograd.Function):
    """The shapes of CUDA's RMSNorm: it keeps its input and a number a position."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1]))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
