"""Which of a model's linear layers lora.modules means, by the names that transformers' families give them."""

import re

from torch import nn

from pairtune.config.rules import LORA_LAYERS
from pairtune.errors import UserError
from pairtune.models.bridge.decoder import BridgedDecoder
from pairtune.models.grouped import ExpertsLinear

QUERIES, KEYS, VALUES, OUT = "attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj"
GATE, DOWN, UP = "mlp.w1", "mlp.w2", "mlp.w3"
OUTPUT, ROUTER = "output", "mlp.router"
TOWER = "tower.*"  # of images and sound
READ = "mamba.*"  # whose weight a kernel reads: an adapter beside it would have no effect, as PEFT says, too

# The last part of a layer's name: torchtune's names of what it computes. Fused ones compute several.
IN_ATTENTION = {
    **dict.fromkeys(("q_proj", "q_a_proj", "q_b_proj", "query", "wq", "q"), (QUERIES,)),
    **dict.fromkeys(("k_proj", "key", "wk", "k"), (KEYS,)),
    **dict.fromkeys(("v_proj", "value", "wv", "v"), (VALUES,)),
    **dict.fromkeys(("kv_a_proj_with_mqa", "kv_b_proj", "kv_proj", "kv_a_proj"), (KEYS, VALUES)),
    **dict.fromkeys(("qkv_proj", "query_key_value", "Wqkv", "c_attn", "qkv"), (QUERIES, KEYS, VALUES)),
    **dict.fromkeys(("o_proj", "out_proj", "dense", "c_proj", "wo", "o"), (OUT,)),
}
IN_MLP = {
    **dict.fromkeys(("gate_proj", "w1", "gate"), (GATE,)),
    **dict.fromkeys(("down_proj", "w2", "fc2", "c_proj", "dense_4h_to_h", "fc_out", "wo"), (DOWN,)),
    **dict.fromkeys(("up_proj", "w3"), (UP,)),
    **dict.fromkeys(("gate_up_proj", "Wi"), (GATE, UP)),
    **dict.fromkeys(("fc1", "c_fc", "dense_h_to_4h", "fc_in", "wi"), (GATE,)),
}
ROUTERS = ("gate", "router")  # where experts are beside them
_ATTENTION = re.compile(r"(^|\.)(self_attn|attn|attention|self_attention|temporal_block)\.")


def parts_of(model: BridgedDecoder) -> dict[str, set[str]]:
    """Returns, by the name of each linear layer, experts' too, what it computes, in the words of rules.LORA_LAYERS.

    A layer whose name is in neither table, such as that of a state space, computes none of them; all-linear means it,
    unless it is of a tower.
    """
    head, found, towers = model.output, {}, tuple(f"{name}." for name in model.towers)
    # State spaces (Mamba): A and D are of nothing else.
    mixers = tuple(f"{name}." for name, m in model.named_modules() if hasattr(m, "A_log") and hasattr(m, "D"))
    # What has queries is attention, whatever it is called.
    attending = {name.rpartition(".")[0] for name, _ in model.named_modules() if name.endswith(".q_proj")}
    for name, module in model.named_modules():
        if type(module) not in (nn.Linear, ExpertsLinear):
            continue
        is_read = name.startswith(mixers) and not name.endswith(".in_proj")
        beside = {TOWER} if name.startswith(towers) else {READ} if is_read else set()
        found[name] = {OUTPUT} if module is head else beside or set(_parts(name, attending))
    return found


def _parts(name: str, attending: set[str]) -> tuple[str, ...]:
    of, _, leaf = name.rpartition(".")
    if of in attending or _ATTENTION.search(name):
        return IN_ATTENTION.get(leaf, ())
    return (ROUTER,) if leaf in ROUTERS else IN_MLP.get(leaf, ())


def check_whole(modules: list[str], adapted: dict[str, set[str]]) -> None:
    """Refuses to adapt a part of a layer that computes several: there it has one adapter.

    Args:
        modules: What lora.modules holds.
        adapted: From parts_of, the layers that it means.

    Raises:
        UserError: As said.
    """
    if "all-linear" in modules:
        return
    asked = {part for module in modules for part in LORA_LAYERS[module]}
    for name, parts in adapted.items():
        if lacking := sorted(parts - asked):
            leaf = name.rpartition(".")[2]
            others = [next(key for key, of in LORA_LAYERS.items() if of == (part,)) for part in lacking]
            raise UserError(
                f"lora.modules: this model's {leaf} computes what {', '.join(others)} would, too, and has one adapter; "
                f"nearest valid: lora.modules=[{','.join([*modules, *others])}]"
            )
