"""Each token through the matrix of its own expert: the experts of a layer in one tensor, and adapters of each.

Tokens' choices are sorted by expert, so that an expert multiplies rows that lie one behind the other. How many those
are stays on the device. Nothing is added up in any order: the same batch gives the same numbers.

T tokens, K experts a token, E experts, r the rank of adapters.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pairtune.models import frozen_base

_ALIGNED = 16  # bytes of which a row is a multiple where one kernel takes all experts


@dataclass(frozen=True)
class Groups:
    """T K choices, sorted by expert.

    Attributes:
        order: [T K], the choices' numbers: token K + place.
        inverse: [T K], where each choice stands in `order`.
        ends: [E] int32, behind the last choice of each expert.
        per_token: K.
    """

    order: Tensor
    inverse: Tensor
    ends: Tensor
    per_token: int

    @classmethod
    def of(cls, chosen: Tensor, num_experts: int) -> "Groups":
        """Returns those of the experts that tokens chose, [T, K] int64."""
        experts, order = chosen.flatten().sort(stable=True)
        numbers = torch.arange(len(order), device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, numbers)
        ends = torch.searchsorted(experts, torch.arange(num_experts, device=order.device), right=True).int()
        return cls(order, inverse, ends, chosen.shape[-1])

    def spread(self, tokens: Tensor) -> Tensor:
        """Returns a row for each choice, in order, [T K, D], for tokens [T, D]."""
        return _Spread.apply(tokens, self.order, self.inverse, self.per_token)

    def gathered(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns each token's sum of its K rows, [T, D], for rows in order [T K, D], by weights [T, K]."""
        rows = _Permuted.apply(rows, self.inverse, self.order).view(-1, self.per_token, rows.shape[-1])
        return (rows * weights.reshape(-1, self.per_token, 1)).sum(1).to(rows.dtype)


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tokens: Tensor, order: Tensor, inverse: Tensor, per_token: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.per_token = per_token
        return tokens[order // per_token]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(-1, ctx.per_token, grad.shape[-1]).sum(1), None, None, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows[order]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


# Products


def product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Returns each row times its expert's matrix, [N, out], for rows [N, in] and weight [E, in, out].

    Args:
        ends: Of Groups.
    """
    return _Product.apply(rows, weight, ends)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return _multiply(rows, weight, ends)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        to_rows = _multiply(grad, weight.transpose(1, 2), ends) if ctx.needs_input_grad[0] else None
        to_weight = _outer(rows, grad, ends, weight) if ctx.needs_input_grad[1] else None
        return to_rows, to_weight, None


class _HeldProduct(torch.autograd.Function):
    """Of a weight in fewer bits, whose values backward makes anew; it goes to the rows only."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, scale: Tensor | None, layer: "ExpertsLinear", ends: Tensor):
        ctx.save_for_backward(weight, scale, ends)
        ctx.layer = layer
        return _multiply(rows, layer.turned(frozen_base.values(weight, scale, layer.shape)), ends)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, ends = ctx.saved_tensors
        dense = ctx.layer.turned(frozen_base.values(weight, scale, ctx.layer.shape))
        return _multiply(grad.contiguous(), dense.transpose(1, 2), ends), None, None, None, None


def rows_of(table: Tensor, ends: Tensor, num_rows: int) -> Tensor:
    """Returns the row [out] of its expert for each choice, [N, out], for a table [E, out].

    As a product, whose gradient is added up in one order: that of an index is added up in any.
    """
    width = _ALIGNED // table.element_size()
    ones = F.pad(table.new_ones(num_rows, 1), (0, width - 1))
    return product(ones, F.pad(table[:, None], (0, 0, 0, width - 1)), ends)


def _multiply(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    if rows.is_meta:
        return rows.new_empty(len(rows), weight.shape[2])
    if _in_one(rows, *weight.shape[1:]):
        return F.grouped_mm(rows, weight, offs=ends)
    return torch.cat([part @ matrix for part, matrix in zip(_split(rows, ends), weight, strict=True)])


def _outer(rows: Tensor, grad: Tensor, ends: Tensor, weight: Tensor) -> Tensor:
    """Returns the gradient of a weight [E, in, out], laid out as that is: it becomes a parameter's."""
    if rows.is_meta:
        return torch.empty_like(weight)
    is_transposed = weight.stride(-1) != 1  # a view of [E, out, in]
    left, right = (grad, rows) if is_transposed else (rows, grad)
    if _in_one(rows, *weight.shape[1:]):
        made = F.grouped_mm(left.T, right, offs=ends)
    else:
        parts = zip(_split(left, ends), _split(right, ends), strict=True)
        made = torch.stack([one.T @ other for one, other in parts])
    return made.transpose(1, 2) if is_transposed else made


def _in_one(rows: Tensor, *sizes: int) -> bool:
    is_old = rows.is_cuda and torch.cuda.get_device_capability(rows.device) < (8, 0)
    return not is_old and all(size * rows.element_size() % _ALIGNED == 0 for size in sizes)


def _split(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    return rows.split([end - start for start, end in pairwise([0, *ends.tolist()])])


# Layers


class ExpertsLinear(nn.Module):
    """E matrices of E experts in one weight: [E, out, in], or [E, in, out] where a family has it transposed.

    Args:
        shape: Of the weight.
        transposed: Which of the two.
    """

    bias = None  # which families keep elsewhere

    def __init__(self, shape: torch.Size, transposed: bool):
        super().__init__()
        self.shape, self.transposed = torch.Size(shape), transposed
        self.weight = nn.Parameter(torch.empty(self.shape))

    @property
    def in_features(self) -> int:
        """Width of what it takes."""
        return self.shape[1 if self.transposed else 2]

    @property
    def out_features(self) -> int:
        """Width of what it returns."""
        return self.shape[2 if self.transposed else 1]

    def turned(self, weight: Tensor) -> Tensor:
        """Returns [E, in, out] of its weight's values."""
        return weight if self.transposed else weight.transpose(1, 2)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Returns [N, out] for rows [N, in], sorted by expert; `ends` of Groups."""
        if frozen_base.is_held(self.weight):
            return _HeldProduct.apply(rows, self.weight, getattr(self, "weight_scale", None), self, ends)
        return product(rows, self.turned(self.weight).to(rows.dtype), ends)


class LoRAExpertsLinear(ExpertsLinear):
    """The same with an adapter (arXiv 2106.09685) for each expert.

    Args:
        rank, alpha, dropout: As torchtune's LoRALinear has them.
    """

    def __init__(self, shape: torch.Size, transposed: bool, rank: int, alpha: float, dropout: float = 0.0):
        super().__init__(shape, transposed)
        self.rank, self.alpha, self.disabled = rank, alpha, False
        self.dropout = nn.Dropout(dropout) if dropout > 0.0 else nn.Identity()
        self.lora_a = ExpertsLinear((shape[0], rank, self.in_features), transposed=False)
        self.lora_b = ExpertsLinear((shape[0], self.out_features, rank), transposed=False)
        self.weight.requires_grad_(False)

    def adapter_params(self) -> list[str]:
        """Returns the names of what is trained."""
        return ["lora_a.weight", "lora_b.weight"]

    def initialize_parameters(self) -> None:
        """Draws A as a linear layer's weight and makes B zero, as LoRALinear does."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.lora_a.weight, -bound, bound)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Returns [N, out] for rows [N, in], sorted by expert; `ends` of Groups."""
        out = super().forward(rows, ends)
        if self.disabled:
            return out
        return out + (self.alpha / self.rank) * self.lora_b(self.lora_a(self.dropout(rows), ends), ends)
