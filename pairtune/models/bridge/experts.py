"""Mixtures of experts in transformers' models: how they compute, and what their routers chose.

transformers asks a registered function to compute what a layer's experts do with their tokens. Their matrices, which
it keeps as one parameter of three dimensions each, become modules of grouped.py here, with adapters and fewer bits.
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn

from pairtune.models.bridge.towers import is_shell
from pairtune.models.experts import RecordedRouter
from pairtune.models.grouped import ExpertsLinear, Groups, rows_of

NAME = "pairtune"
_MATRICES = ("gate_up_proj", "up_proj", "down_proj")


def register() -> None:
    """Makes transformers know `forward` as experts_implementation="pairtune"."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(NAME, forward)


@torch.compiler.disable  # groups have another size each time
def forward(module: nn.Module, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """Returns each token's weighted sum of what its experts make of it, [T, D].

    Args:
        module: transformers' experts, after `install`.
        tokens: [T, D].
        chosen: [T, K], numbers of experts.
        weights: [T, K].
    """
    groups = Groups.of(chosen, module.num_experts)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _biased(module, up, module.get_submodule(up)(groups.spread(tokens), groups.ends), groups)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    rows = _biased(module, "down_proj", module.down_proj(inner, groups.ends), groups)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    return groups.gathered(rows, weights).to(tokens.dtype)


def _biased(module: nn.Module, name: str, rows: Tensor, groups: Groups) -> Tensor:
    if not module.has_bias:
        return rows
    return rows + rows_of(getattr(module, f"{name}_bias"), groups.ends, len(rows))


def install(lm: nn.Module) -> None:
    """Makes experts' matrices modules and routers tell what they chose, in a model of transformers.

    Args:
        lm: Built with experts_implementation="pairtune".
    """
    for module in list(lm.modules()):
        if hasattr(module, "_is_expert_parallel"):  # which transformers gives those that it asks a function for
            _make_modules(module, module.is_transposed)
        elif type(module).__name__ == "Llama4TextMoe":
            _make_modules(module.experts, transposed=True)
            module.forward = partial(_llama4, module)
    _record(lm)


def _make_modules(experts: nn.Module, transposed: bool) -> None:
    for name in _MATRICES:
        weight = experts._parameters.get(name)
        if weight is not None:
            del experts._parameters[name]
            matrices = ExpertsLinear(weight.shape, transposed)
            matrices.weight = weight
            experts.add_module(name, matrices)


@torch.compiler.disable
def _llama4(mixture: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what Llama 4's layer does: [T, D], and its router's logits [T, E].

    There every expert computes every token, times a factor that is 0 for all but the chosen ones: nothing, of nothing.

    Args:
        hidden: [B, S, D].
    """
    tokens, experts = hidden.reshape(-1, hidden.shape[-1]), mixture.experts
    scores, logits = mixture.router(tokens)
    factors, chosen = scores.topk(mixture.top_k, dim=-1)
    groups = Groups.of(chosen, mixture.num_experts)
    rows = groups.spread(tokens) * factors.flatten()[groups.order, None]
    gate, up = experts.gate_up_proj(rows, groups.ends).chunk(2, dim=-1)
    rows = experts.down_proj(up * experts.act_fn(gate), groups.ends)
    return mixture.shared_expert(tokens) + groups.gathered(rows, torch.ones_like(factors)), logits


def _record(lm: nn.Module) -> None:
    text, there = lm.config.get_text_config(), vars(sys.modules[type(lm).__module__])
    in_shell = is_shell(lm.config) and hasattr(text, "router_aux_loss_coef") and "load_balancing_loss_func" in there
    if not (hasattr(lm, "router_aux_loss_coef") or in_shell):  # transformers has no such loss for the others
        return
    told = (getattr(model, "_can_record_outputs", None) or {} for model in (lm.base_model, lm.get_decoder()))
    recorder = next((of["router_logits"] for of in told if "router_logits" in of), None)
    per_token = getattr(lm, "num_experts_per_tok", None) or text.num_experts_per_tok
    for module in lm.modules():
        if isinstance(module, getattr(recorder, "target_class", ())):
            module.recorded_router = RecordedRouter(per_token)
            module.register_forward_hook(lambda m, _, out: m.recorded_router.record(out[recorder.index]))


def their_names(lm: nn.Module) -> dict[str, str]:
    """Returns, of weights that `install` has renamed, transformers' names by ours."""
    return {f"{name}.weight": name for name, module in lm.named_modules() if isinstance(module, ExpertsLinear)}
