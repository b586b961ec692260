"""Published settings of losses, and what they say about a run's: advice only, nothing is refused."""

import inspect
from dataclasses import dataclass

from torchtune.rlhf.loss import DPOLoss

from pairtune.config.components import import_component
from pairtune.losses.modules import LOSSES, Kto, Sigmoid
from pairtune.pairs.at_once import lengths_of
from pairtune.pairs.tokenize import Pair

TRL_INDEX = (
    "TRL's index of papers"  # github.com/huggingface/trl, docs/source/paper_index.md, where the section is named
)


@dataclass(frozen=True)
class Published:
    """A setting that was used. Learning rates are given where it is known what was trained: full or lora."""

    loss: str
    beta: float | None
    lr: float | None
    method: str | None
    source: str


ADVICE = (
    Published("sigmoid", 0.1, 1e-6, "full", f"DPO paper, appendix B ({TRL_INDEX})"),
    Published("sigmoid", 0.1, 5e-7, "full", "Zephyr 7B beta, model card"),
    Published("sigmoid", 0.01, 5e-7, "full", "alignment-handbook, zephyr-7b-beta config_full"),
    Published("sigmoid", 0.05, 5e-7, "full", "alignment-handbook, zephyr-7b-gemma"),
    Published("sigmoid", 0.1, 5e-7, "full", "Notus 7B v1"),
    Published("sigmoid", 0.5, 1e-6, "full", "alignment-handbook, SmolLM2"),
    Published("sigmoid", 0.01, 3e-7, "full", "SimPO repository, DPO on Llama 3 v0.2"),
    Published("sigmoid", 0.01, 7e-7, "full", "SimPO repository, DPO on Llama 3 Instruct"),
    Published("sigmoid", 0.01, 5e-6, "lora", "alignment-handbook, zephyr-7b-beta config_qlora"),
    Published("sigmoid", 0.1, 5e-7, "lora", "Notus 7B v1, LoRA"),
    Published("sigmoid", None, 1e-4, "lora", "open-instruct, dpo_train_with_qlora"),
    Published("sigmoid_norm", 5.0, 5e-7, "full", "Tulu 3 8B"),
    Published("sigmoid_norm", 5.0, 2e-7, "full", "Tulu 3 70B and 405B"),
    Published("sigmoid_norm", 5.0, 5e-7, "full", "OLMo 2 7B"),
    Published("rpo", 0.1, 1e-5, "full", "Llama 3 paper, 4.1.4, with alpha 0.2"),
    Published("exo_pair", 0.1, None, None, f"EXO paper, section B ({TRL_INDEX})"),
    Published("nca_pair", 0.01, None, None, f"NCA paper, section C ({TRL_INDEX})"),
    Published("robust", 0.01, None, None, f"robust DPO paper, section B ({TRL_INDEX})"),
    Published("bco_pair", 0.01, None, None, f"BCO paper, section C ({TRL_INDEX})"),
    Published("sppo_hard", 0.001, 5e-7, "full", "SPPO repository, scripts/pipeline.sh"),
    Published("apo_zero", 0.1, None, None, f"APO paper, section 5.2 ({TRL_INDEX})"),
    Published("apo_zero", 0.05, 1e-6, "full", "alignment-handbook, SmolLM3"),
    Published("apo_down", 0.1, None, None, f"APO paper, section 5.2 ({TRL_INDEX})"),
    Published("discopop", 0.05, 5e-7, "full", f"DiscoPOP paper, section B.1 ({TRL_INDEX})"),
    Published("simpo", 2.5, 1e-6, "full", "SimPO repository, Llama 3 8B Instruct"),
    Published("simpo", 10.0, 1e-6, "full", "SimPO repository, Llama 3 8B Instruct v0.2"),
    Published("simpo", 2.0, 6e-7, "full", "SimPO repository, Llama 3 8B base"),
    Published("simpo", 2.0, 3e-7, "full", "SimPO repository, Mistral 7B base"),
    Published("simpo", 2.5, 5e-7, "full", "SimPO repository, Mistral 7B Instruct"),
    Published("simpo", 10.0, 8e-7, "full", "SimPO repository, Gemma 2 9B"),
    Published("orpo", 0.05, 5e-6, "full", "alignment-handbook, zephyr-141b (beta is lambda)"),
    Published("kto", 0.1, None, None, "KTO paper"),
)


def advice_for(loss: dict, lr: float | None, method: str, pairs: list[Pair] = ()) -> list[str]:
    """Returns a sentence for each of beta, learning rate and KTO's weights that lies outside of what was published.

    Args:
        loss: A config's block: a loss of ours, or torchtune's own; nothing is known of others.
        method: full, lora or qlora; learning rates of lora and qlora are not told apart.
        pairs: What is trained on; for KTO.
    """
    made = import_component("loss", loss["_component_"])
    made = Sigmoid if made is DPOLoss else made
    if made not in LOSSES.values():
        return []
    options = {**{k: p.default for k, p in inspect.signature(made).parameters.items()}, **loss}
    kind = "full" if method == "full" else "lora"
    betas = [(p.beta, p) for p in ADVICE if p.loss == made.name and p.beta is not None]
    rates = [(p.lr, p) for p in ADVICE if p.loss == made.name and p.lr is not None and p.method == kind]
    return [
        *_outside(f"loss.{made.beta_key}", options.get(made.beta_key), betas, f"published runs of {made.name}"),
        *_outside("optimizer.lr", lr, rates, f"published {kind} runs of {made.name}"),
        *(_of_weights(options["desirable_weight"], options["undesirable_weight"], pairs) if made is Kto else ()),
    ]


def _of_weights(desirable: float, undesirable: float, pairs: list[Pair]) -> list[str]:
    """The KTO paper, 4.2: desirable answers altogether weigh as much as undesirable ones, or up to a third more."""
    counts = [int((lengths > 0).sum()) for lengths in lengths_of(pairs)[1:]]
    if not all(counts):
        return []
    ratio = desirable * counts[0] / (undesirable * counts[1])
    if 1 - 1e-6 <= ratio <= 4 / 3 + 1e-6:
        return []
    return [
        f"loss.desirable_weight={desirable:g}: with {counts[0]:,} desirable and {counts[1]:,} undesirable answers they "
        f"weigh {ratio:.2f} to 1 altogether; the KTO paper has 1 to 1.33: loss.desirable_weight="
        f"{undesirable * counts[1] / counts[0]:.3g} to {4 / 3 * undesirable * counts[1] / counts[0]:.3g}"
    ]


def _outside(key: str, value: float | None, published: list[tuple[float, Published]], runs: str) -> list[str]:
    if value is None or not published:
        return []
    (low, lowest), (high, highest) = (pick(published, key=lambda pair: pair[0]) for pick in (min, max))
    if low <= value <= high:
        return []
    used = f"{low:g} ({lowest.source})"
    used += f" to {high:g} ({highest.source})" if high > low else ""
    return [f"{key}={value:g}: {runs} used {used}"]
