"""DoRA, arXiv 2402.09353: a low-rank update of a weight's direction, and a magnitude for each of its rows."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules.peft import DoRALinear as TorchtuneDoRALinear

from pairtune.models import frozen_base


class DoRALinear(TorchtuneDoRALinear):
    """torchtune's layer with another forward, that of the merged weight and, but for dropout, of PEFT.

    torchtune's scales the bias with the weight's rows, which merging cannot; and it multiplies an identity of the
    input's width by A and B in each forward, to get at their product. Dropout is on the adapter's input, as in LoRA;
    PEFT drops the base's too.

    Attributes:
        rank, alpha: As torchtune's LoRALinear has them.
        frozen_magnitude: A second, frozen set of magnitudes, or None: models.lora(frozen_copy=True).
        reads_frozen: The forward takes those: models.frozen_copy_of.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, dropout: float = 0.0, **options):
        super().__init__(in_dim, out_dim, rank, alpha, dropout, **options)
        self.rank, self.alpha = rank, alpha  # torchtune's keeps their ratio only
        self.frozen_magnitude: nn.Parameter | None
        self.register_parameter("frozen_magnitude", None)
        self.reads_frozen = False

    def forward(self, x: Tensor) -> Tensor:
        """Returns [..., out] for x [..., in]; the rows' norms are constants to the gradient (section 4.3)."""
        weight = frozen_base.values_of(self)  # made once for the product and the norms
        held = frozen_base.is_held(self.weight)
        base = frozen_base.product(x, self, weight) if held else F.linear(x, weight)
        if not self.disabled:
            update = self.lora_b(self.lora_a(self.dropout(x)))
            magnitude = self.frozen_magnitude if self.reads_frozen else self.magnitude
            scale = (magnitude / self.row_norms(weight)).to(x.dtype)  # at the start all ones
            base = scale * (base + self.scaling * update)
        return base if self.bias is None else base + self.bias

    @torch.no_grad()
    def row_norms(self, weight: Tensor) -> Tensor:
        """Returns the norms [out] of the rows of W + (alpha / rank) B A, W's values given, in the magnitudes' dtype."""
        return row_norms(weight, self.lora_a.weight, self.lora_b.weight, self.scaling)

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """Makes the magnitudes the rows' norms: the layer computes what it would as LoRA."""
        self.magnitude.copy_(self.row_norms(frozen_base.values_of(self)))


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Returns the norms [out] of the rows of weight + scaling * b @ a, summed in float32 and rounded to a's dtype.

    As in PEFT. Magnitudes start as these norms and have that dtype: over norms of float32 bf16 ones would not be 1.
    """
    return torch.linalg.vector_norm(weight.float() + scaling * (b.float() @ a.float()), dim=1).to(a.dtype)
