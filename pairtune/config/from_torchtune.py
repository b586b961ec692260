"""torchtune's own DPO configs under our keys: what means the same here is taken over, the rest is refused by name."""

from typing import Any

from pairtune.config.rules import show
from pairtune.errors import UserError

# Keys of its recipes that have one value here, and what there is in place of others.
FIXED = {
    "resume_from_checkpoint": (False, "resume=true goes on from a checkpoint of ours"),
    "save_adapter_weights_only": (False, "merged weights are exported, and the adapter beside them"),
    "log_peak_memory_stats": (True, "peak memory is always logged"),
}
OTHERS = ("gradient_accumulation_steps", "max_steps_per_epoch", "ref_checkpointer")
LORA = {  # arguments of its lora_ builders
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_attn_modules": "modules",
    "apply_lora_to_mlp": "mlp",
    "apply_lora_to_output": "output",
}
DATA_SETS = {
    "torchtune.datasets.stack_exchange_paired_dataset": "dataset.source=FOLDER, data/rl of the Hub's "
    "lvwerra/stack-exchange-paired, and dataset.columns={prompt: question, chosen: response_j, rejected: response_k}",
    "torchtune.datasets.hh_rlhf_helpful_dataset": "dataset.source=RLHFlow/HH-RLHF-Helpful-standard",
}


def translate(content: dict, where: str, *, given: set[str], distributed: bool) -> dict:
    """Returns a config file's content under our keys; one that is not torchtune's as it is.

    Args:
        where: The file, for messages.
        given: Keys that the command line sets, which what is refused here would only have filled.
        distributed: Whether the recipe runs on several devices.

    Raises:
        UserError: A key that says something that recipes here do not do, or say in another way.
    """
    if "checkpointer" not in content or not content.keys() & {*FIXED, *OTHERS}:
        return content
    for key, (value, instead) in FIXED.items():
        if key in content and content[key] != value:
            raise UserError(f"{where}: {key}={show(content[key])}: is a key of torchtune's; here {instead}; remove it")
    ours = {key: value for key, value in content.items() if key not in (*FIXED, *OTHERS)}
    ours |= _model(ours) | _checkpointer(content, where) | _dataset(content, where, given)
    return ours | _steps(content, where, given, distributed)


def _model(content: dict) -> dict[str, Any]:
    """lora_llama2_7b and its arguments: the base builder, and a block `lora`."""
    model = content.get("model") or {}
    home, _, builder = str(model.get("_component_")).rpartition(".")
    if not builder.startswith("lora_"):
        return {}
    base = {key: value for key, value in model.items() if key not in LORA}
    lora = {LORA[key]: value for key, value in model.items() if key in LORA}
    extra = [name for name in ("mlp", "output") if lora.pop(name, False)]
    if "modules" in lora:
        lora["modules"] = [*lora["modules"], *extra]
    return {"model": base | {"_component_": f"{home}.{builder.removeprefix('lora_')}"}, "lora": lora}


def _checkpointer(content: dict, where: str) -> dict[str, Any]:
    """Without output_dir, which is the run's; the reference's is the policy's."""
    block = content["checkpointer"]
    if content.get("ref_checkpointer", block) != block:
        raise UserError(
            f"{where}: ref_checkpointer: is not checkpointer, and here the reference is what the run starts from; "
            "remove it"
        )
    if isinstance(block, dict) and block.get("output_dir") in ("${output_dir}", content.get("output_dir")):
        block = {key: value for key, value in block.items() if key != "output_dir"}
    return {"checkpointer": block}


def _dataset(content: dict, where: str, given: set[str]) -> dict[str, Any]:
    block = content.get("dataset")
    component = block.get("_component_") if isinstance(block, dict) else None
    if component is None:
        return {}
    if "dataset.source" not in given:
        instead = DATA_SETS.get(component, "dataset.source=..., and dataset.columns where columns have other names")
        raise UserError(f"{where}: dataset._component_={component}: pairs are read by name here; set {instead}")
    return {"dataset": {}}


def _steps(content: dict, where: str, given: set[str], distributed: bool) -> dict[str, Any]:
    """Pairs of a step on one device, and steps of its one epoch."""
    steps, ours = content.get("max_steps_per_epoch"), {}
    if steps is not None and "max_steps" not in given:
        if content.get("epochs", 1) != 1:
            raise UserError(
                f"{where}: max_steps_per_epoch={steps}: cuts each epoch; here max_steps cuts the run: set max_steps"
            )
        ours["max_steps"] = steps
    batch, batches = content.get("batch_size"), content.get("gradient_accumulation_steps")
    if batch is not None and batches is not None and "pairs_per_step" not in given:
        if distributed:
            raise UserError(
                f"{where}: gradient_accumulation_steps={batches}: counts batches of {batch} pairs on each device; here "
                f"a step's pairs are those of all devices: set pairs_per_step={2 * batch * batches} for two devices"
            )
        ours["pairs_per_step"] = batch * batches
    return ours
