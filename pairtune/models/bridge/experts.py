"""Mixtures of experts in transformers' models: how they compute, and what their routers chose.

transformers asks a registered function to compute what a layer's experts do with their tokens. Their matrices, which
it keeps as one parameter of three dimensions each, become modules of grouped.py here, with adapters and fewer bits.
"""

import torch
from torch import Tensor, nn

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
        if not hasattr(module, "_is_expert_parallel"):  # which transformers gives those that it asks a function for
            continue
        for name in _MATRICES:
            weight = module._parameters.get(name)
            if weight is not None:
                del module._parameters[name]
                matrices = ExpertsLinear(weight.shape, module.is_transposed)
                matrices.weight = weight
                module.add_module(name, matrices)
    _record(lm)


def _record(lm: nn.Module) -> None:
    if not hasattr(lm, "router_aux_loss_coef"):  # transformers has no such loss for the others
        return
    recorder = (lm.base_model._can_record_outputs or {}).get("router_logits")
    for module in lm.modules():
        if isinstance(module, getattr(recorder, "target_class", ())):
            module.recorded_router = RecordedRouter(lm.num_experts_per_tok)
            module.register_forward_hook(lambda m, _, out: m.recorded_router.record(out[recorder.index]))


def their_names(lm: nn.Module) -> dict[str, str]:
    """Returns, of weights that `install` has renamed, transformers' names by ours."""
    return {f"{name}.weight": name for name, module in lm.named_modules() if isinstance(module, ExpertsLinear)}
