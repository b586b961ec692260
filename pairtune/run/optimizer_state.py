"""An optimizer's state as plain tensors under names, and back: also in few bits, also in shards.

A checkpoint has `optimizer.PARAMETER.KEY`, whole or as FSDP2 cuts it. What torch.distributed.checkpoint cannot cut is
written in pieces, by each process its own: `local.SHARD.optimizer.PARAMETER.KEY.PART`. That is what few bits are made
of (torchao: codes, a scale a block, a table of values), and the tensors of an optimizer that knows no shards.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from pairtune.errors import UserError
from pairtune.process.dist import World
from pairtune.run.optimizers import copies, groups_of, state_of

DTYPES = (  # that torch.distributed.checkpoint writes as safetensors
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
)
WHOLE = "values"  # the part that a tensor without parts is


@dataclass(frozen=True)
class Piece:
    """What a process wrote of a state's tensor: its `size` numbers from `start` on, in the order of its elements."""

    start: int
    size: int
    names: dict[str, str]  # in the checkpoint, by part


class OptimizerState:
    """What an optimizer keeps between steps, for checkpoints."""

    def __init__(self, optimizer: Optimizer, trained: Mapping[str, nn.Parameter], world: World):
        """
        Args:
            trained: The model's parameters that the optimizer has, by the names that checkpoints give them.
        """
        self._optimizer, self._trained = optimizer, trained
        self._world, self._index = world, world.mesh["shard"].get_local_rank() if world.shards else 0
        self._waiting: dict[str, list[Piece]] = {}  # what is put together once it has been read

    def tensors(self) -> dict[str, Tensor]:
        """Returns tensors by their names in a checkpoint, in place. Every process has to call it."""
        found, in_pieces = {}, self._in_pieces()
        for name, value, parameter in self._by_name():
            own = _parts(value)
            if _is_cut(value, parameter, in_pieces):
                found |= {f"local.{self._index}.{name}.{part}": tensor for part, tensor in own.items()}
            elif set(own) == {WHOLE}:
                found[name] = value
            else:
                found |= {f"local.0.{name}.{part}": tensor for part, tensor in own.items()}
        return {name: tensor for name, tensor in found.items() if tensor.numel()}

    def values(self) -> dict[str, dict]:
        """Returns all that is no tensor, by parameter."""
        held = {name: state_of(self._optimizer, p) for name, p in self._trained.items()}
        values = {n: {k: v for k, v in state.items() if not isinstance(v, Tensor)} for n, state in held.items()}
        return {name: state for name, state in values.items() if state}

    def groups(self) -> list[dict]:
        """Returns the parameter groups without parameters, and their tensors as numbers."""
        return as_numbers(groups_of(self._optimizer))

    def check(self) -> None:
        """Refuses what a checkpoint cannot hold; every process has to call it.

        Raises:
            UserError: A tensor of a kind that cannot be written, or a value that JSON does not bring back.
        """
        kind = type(self._optimizer)
        key = f"optimizer._component_={kind.__module__}.{kind.__qualname__}"
        for name, tensor in self.tensors().items():
            if hasattr(_local(tensor), "__tensor_flatten__") or tensor.dtype not in DTYPES:
                raise UserError(
                    f"{key}: its state {name} is a {type(_local(tensor)).__name__} of {tensor.dtype}, which cannot be "
                    "saved, and a run could not be resumed exactly; use another optimizer, such as torch.optim.AdamW"
                )
        check_json([self.values(), self.groups()], key, "optimizer")

    def _by_name(self) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
        for name, parameter in self._trained.items():
            for key, value in state_of(self._optimizer, parameter).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{name}.{key}", value, parameter

    def _in_pieces(self) -> bool:
        """Whether any process holds few bits in its shards: then all write pieces of what is sharded."""
        found = any(isinstance(v, DTensor) and set(_parts(v)) != {WHOLE} for _, v, _ in self._by_name())
        return bool(self._world.max_number(int(found)))

    # Reading

    def templates(self, saved: dict, num_shards: int | None) -> dict[str, Tensor]:
        """Returns what to read of a checkpoint: the state itself where it can be filled in place.

        Args:
            saved: What the checkpoint has: names, and torch's metadata of each.
            num_shards: Processes that its model was sharded over; None: not known.

        Raises:
            UserError: The checkpoint's pieces are those of another number of processes, and cannot be cut anew.
        """
        wanted, self._waiting, in_pieces = {}, {}, self._in_pieces()
        pieces, here = _pieces(saved), {}
        for name, value, parameter in self._by_name():
            here[name] = value
            own, is_cut = _parts(value), _is_cut(value, parameter, in_pieces)
            if name in saved and set(own) == {WHOLE} and not is_cut:
                wanted[name] = value
                continue
            whole = {0: Piece(0, math.prod(saved[name].size), {WHOLE: name})} if name in saved else {}
            found = pieces.get(name, whole)
            mine = found.get(self._index if is_cut else 0)
            as_many = num_shards == self._world.num_shards if name not in saved else self._world.num_shards == 1
            if mine and as_many and {p: saved[n].size for p, n in mine.names.items()} == _sizes(own):
                wanted |= {mine.names[part]: tensor for part, tensor in own.items()}
            elif found and value.numel():
                wanted |= self._to_put_together(name, value, parameter, found, saved, num_shards)
        for name in saved.keys() - here.keys():  # made by a later step than the first
            if name.startswith("optimizer."):
                parameter, found = self._trained[name.removeprefix("optimizer.").rpartition(".")[0]], saved[name]
                like = found.size == parameter.shape
                new = torch.zeros_like(parameter.data) if like else torch.zeros(found.size)
                wanted[name] = new.to(found.properties.dtype)
        return wanted

    def _to_put_together(self, name, value, parameter, found: dict[int, Piece], saved: dict, num_shards) -> dict:
        start, size = _range(parameter)
        known = all(set(p.names) == {WHOLE} or {"codes", "scale"} <= set(p.names) for p in found.values())
        if not known or _local(value).numel() != size or sum(p.size for p in found.values()) != parameter.numel():
            raise UserError(
                f"resume: the optimizer's state {name} was written by {num_shards or 'another number of'} processes, "
                f"each in blocks of its own, and cannot be cut for {self._world.num_shards}; resume on as many"
            )
        overlapping = [p for p in found.values() if p.start < start + size and start < p.start + p.size]
        self._waiting[name] = overlapping
        names = [n for piece in overlapping for n in piece.names.values()]
        return {n: torch.zeros(saved[n].size, dtype=saved[n].properties.dtype) for n in names}

    @torch.no_grad()
    def load(self, read: dict[str, Tensor], values: dict[str, dict], groups: list[dict], saved: dict) -> None:
        """Becomes what a checkpoint holds, once `templates` have been filled from it.

        Args:
            read: Those, filled.
            values, groups: As `values` and `groups` gave them.
        """
        known = {name for name, *_ in self._by_name()}
        in_checkpoint = {*(n for n in saved if n.startswith("optimizer.")), *_pieces(saved)}
        for name, value, parameter in [*self._by_name()]:
            if name in self._waiting:
                start, size = _range(parameter)
                _put_together(_local(value), start, size, self._waiting[name], read)
        for name, parameter in self._trained.items():
            state, prefix = state_of(self._optimizer, parameter), f"optimizer.{name}."
            for key, value in [*state.items()]:
                known_there = (
                    prefix + key in in_checkpoint or not value.numel()
                    if isinstance(value, Tensor)
                    else (key in values.get(name, {}))
                )
                if not known_there:  # such as all of a parameter that no gradient has reached yet
                    del state[key]
            state |= {n.removeprefix(prefix): t for n, t in read.items() if n.startswith(prefix) and n not in known}
            state |= {key: as_before(value, state.get(key)) for key, value in values.get(name, {}).items()}
        for group, then in zip(self._optimizer.param_groups, groups, strict=True):
            group |= {key: as_before(value, group.get(key)) for key, value in then.items()}
        for parameter, updated in copies(self._optimizer).items():
            updated.copy_(_local(parameter))


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _is_cut(value: Tensor, parameter: nn.Parameter, in_pieces: bool) -> bool:
    """Whether this process's part of a state is written as a piece: see the module."""
    if not isinstance(parameter, DTensor) or not value.dim():
        return False
    return in_pieces or not isinstance(value, DTensor)


def _parts(value: Tensor) -> dict[str, Tensor]:
    """The plain tensors that this process's part of a state is made of, sharing its memory."""
    tensor = _local(value)
    if not hasattr(tensor, "__tensor_flatten__"):
        return {WHOLE: tensor}
    inner = {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    # Eight bits of a float are written as a byte: torch.distributed.checkpoint does not know their names.
    return {n: t.view(torch.uint8) if t.dtype.itemsize == 1 and t.is_floating_point() else t for n, t in inner.items()}


def _sizes(parts: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {part: tensor.shape for part, tensor in parts.items()}


def _range(parameter: nn.Parameter) -> tuple[int, int]:
    """Where this process's part of a parameter begins, and how many numbers it has."""
    if not isinstance(parameter, DTensor):
        return 0, parameter.numel()
    shape, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return (offset[0] * math.prod(parameter.shape[1:]) if math.prod(shape) else 0), math.prod(shape)


def _pieces(saved: dict) -> dict[str, dict[int, Piece]]:
    """The pieces in a checkpoint, by state and shard."""
    names: dict[str, dict[int, dict[str, str]]] = {}
    for name in saved:
        if name.startswith("local."):
            _, shard, rest = name.split(".", 2)
            state, _, part = rest.rpartition(".")
            names.setdefault(state, {}).setdefault(int(shard), {})[part] = name
    found = {}
    for state, shards in names.items():
        start, found[state] = 0, {}
        for shard, parts in sorted(shards.items()):
            sizes = {part: math.prod(saved[name].size) for part, name in parts.items()}
            size = sizes.get("codes", sizes.get(WHOLE, 0)) * (2 if sizes.get("qmap") == 16 else 1)
            found[state][shard] = Piece(start, size, parts)
            start += size
    return found


def _put_together(tensor: Tensor, start: int, size: int, pieces: list[Piece], read: dict[str, Tensor]) -> None:
    """Fills this process's part of a state from others' pieces: bit for bit where all are cut at blocks alike."""
    found = [{part: read[name] for part, name in piece.names.items()} for piece in pieces]
    own, first = _parts(tensor), pieces[0].start
    if all("scale" in parts for parts in (own, *found)):
        block = size // own["scale"].numel()
        alike = all(piece.size // parts["scale"].numel() == block for piece, parts in zip(pieces, found, strict=True))
        if alike and start % block == 0 and all(piece.start % block == 0 for piece in pieces):
            blocks = slice((start - first) // block, (start - first + size) // block)
            for part in ("codes", "scale"):
                rows = [parts[part].view(parts["scale"].numel(), -1) for parts in found]
                own[part].copy_(torch.cat(rows)[blocks].view(own[part].shape))
            return
    floats = torch.cat([_floats(parts, tensor) for parts in found])
    tensor.copy_(floats[start - first :][:size].view(tensor.shape).to(tensor.device))


def _floats(parts: dict[str, Tensor], like: Tensor) -> Tensor:
    """The numbers [n] that a piece holds: torchao's formats, of 8 and 4 bits by a table, and of an 8-bit float."""
    if WHOLE in parts:
        return parts[WHOLE].flatten()
    codes, scale, table = parts["codes"].flatten(), parts["scale"], parts.get("qmap")
    if table is None:
        numbers = codes.view(torch.float8_e4m3fn).float()
    elif table.numel() == 16:
        numbers = table[torch.stack([codes >> 4, codes & 0b1111], dim=-1).int()]
    else:
        numbers = table[codes.int()]
    return (numbers.view(scale.numel(), -1) * scale[:, None]).flatten()


# JSON


def check_json(values, where: str, key: str) -> None:
    """Refuses what would not come back from state.json as it was, before training and not at the first save.

    Args:
        where: The key that is to blame, as the error begins.
        key: What another value is given for.

    Raises:
        UserError: As said.
    """
    try:
        back = json.loads(json.dumps(values))
    except (TypeError, ValueError) as error:
        back = error
    if back != _with_lists(values):
        raise UserError(
            f"{where}: its state cannot be saved as JSON ({back if isinstance(back, Exception) else values}), and a "
            f"run could not be resumed exactly; name another {key}"
        )


def as_numbers(node):
    """Returns nested values with each tensor of one element as its number."""
    if isinstance(node, dict):
        return {key: as_numbers(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(as_numbers(value) for value in node)
    return node.item() if isinstance(node, Tensor) and node.numel() == 1 else node


def as_before(value, current):
    """Returns what JSON made of a value in the types that it has now: tensors, tuples."""
    if isinstance(current, Tensor):
        return torch.as_tensor(value, dtype=current.dtype, device=current.device)
    if isinstance(current, (list, tuple)) and isinstance(value, list):
        padded = [*current, *[None] * (len(value) - len(current))]
        return type(current)(as_before(v, c) for v, c in zip(value, padded, strict=False))
    if isinstance(current, dict) and isinstance(value, dict):
        return {key: as_before(v, current.get(key)) for key, v in value.items()}
    return value


def _with_lists(node):
    if isinstance(node, dict):
        return {key: _with_lists(value) for key, value in node.items()}
    return [_with_lists(value) for value in node] if isinstance(node, (list, tuple)) else node
