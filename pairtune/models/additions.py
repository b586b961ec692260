"""All that pairtune keeps with a torchtune model beside its modules: one object, `model.pairtune`."""

from dataclasses import dataclass, field

from torch import Tensor, nn

from pairtune.models.experts import MixtureOfExperts, RecordedRouter
from pairtune.pairs.batch import PairBatch


@dataclass(frozen=True)
class Sharing:
    """How a model takes a pair's two answers.

    Attributes:
        prompts: Both follow one prompt in a row; else each has a prompt and a row of its own.
        dense: A layer is told whom it sees by a tensor of all pairs of tokens, which some models of transformers' add
            or cut; else by what visibility.py says.
    """

    prompts: bool = True
    dense: bool = False


@dataclass
class Additions:
    """What a model's adapters are, what `prepare` decided, and the batch that it scores just now.

    Attributes:
        lora: Settings of its adapters as models.lora took them (rank, alpha, use_dora, use_rslora, modules); None
            without adapters.
        num_positions: Tokens of the longest conversation that it takes; model.max_seq_len is beyond any row of them.
        back_end: How it attends, of attention.BACK_ENDS.
        sharing: How it takes a pair's two answers, decided before training, see sharing.py.
        is_compiled: Whether its layers are.
        windows: How far each layer looks back, None for a layer without a sliding window; empty: no layer has one.
        mixtures: Its mixtures of experts, in the order of layers, from experts.mixtures_of.
        batch: While a batch is scored: that one. Without it the model returns logits, as torchtune's.
        log_collision: While WPO's weights are computed: [N], which the forward fills.
        uniform: While tokens are drawn: [N] in [0, 1); the forward returns the tokens that they stand for.
        fp8: The torchao recipe of its products, where they are in fp8.
    """

    lora: dict | None = None
    num_positions: int | None = None
    back_end: str = "segments"
    sharing: Sharing = Sharing()
    is_compiled: bool = False
    windows: list[int | None] = field(default_factory=list)
    mixtures: list[MixtureOfExperts | RecordedRouter] = field(default_factory=list)
    batch: PairBatch | None = None
    log_collision: Tensor | None = None
    uniform: Tensor | None = None
    fp8: str | None = None

    @property
    def takes_fixed_rows(self) -> bool:
        """Whether batches are to be laid out in rows of one length: kernels are made for a shape."""
        return self.back_end in ("mask", "flex")


def additions(model: nn.Module) -> Additions:
    """Returns `model.pairtune`, which a model that others have built gets now."""
    if not hasattr(model, "pairtune"):
        model.pairtune = Additions()
    return model.pairtune
