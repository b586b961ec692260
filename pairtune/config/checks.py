"""Whether values are what keys.py and a recipe's defaults say, and possible together. Components: components.py."""

import math
from typing import Any

from pairtune.config import answers, keys
from pairtune.config.rules import AUTO, REQUIRED, fits, kind_words, set_and_metric, show, wrong_kind
from pairtune.errors import UserError, close_to, nearest


def check_values(cfg: dict, defaults: dict, prefix: str = "") -> None:
    """Types are the defaults', conditions those of keys.py. Of a component's arguments, conditions alone."""
    for key, value in cfg.items():
        name, default = f"{prefix}{key}", defaults.get(key)
        if holds_component(name, default):
            _check_block(name, value, default)
        elif isinstance(default, dict) and isinstance(value, dict):
            check_values(value, default, f"{name}.")
        else:
            _check_value(name, value, default)


def holds_component(name: str, default: Any) -> bool:
    """Returns whether the key's value is a block with `_component_`."""
    return is_component(default) or keys.may_hold_component(name)


def is_component(node: Any) -> bool:
    return isinstance(node, dict) and "_component_" in node


def component_path(key: str, default: dict | None = None) -> str:
    """Returns the default's path, or an example."""
    path = (default or {}).get("_component_")
    return keys.example(key) if path in (None, REQUIRED, AUTO) else path


def _check_block(name: str, block: Any, default: dict | None) -> None:
    if block is None and keys.may_hold_component(name):
        return
    example = component_path(name, default)
    if isinstance(block, dict) and block.keys() - {"_component_"} and block.get("_component_") is None:
        argument = next(argument for argument in block if argument != "_component_")
        raise UserError(
            f"{name}.{argument}={show(block[argument])}: there is no {name} that could take it; "
            f"name one first: {name}={example}"
        )
    if not is_component(block) or not isinstance(block["_component_"], str):
        main = {"optimizer": "lr", "loss": "beta"}.get(name)
        of_number = isinstance(block, (int, float)) and not isinstance(block, bool) and main
        hint = f"; a number goes to one of its arguments, such as {name}.{main}={show(block)}" if of_number else ""
        raise UserError(f"{name}={show(block)}: must be a component, named by its import path: {name}={example}{hint}")
    for argument, value in block.items():
        if value is not None:  # null: not passed
            rule = keys.rule(f"{name}.{argument}")
            _check_finite(f"{name}.{argument}", value)
            _check_rule(f"{name}.{argument}", value, rule.kind if rule else None, (default or {}).get(argument))


def _check_value(name: str, value: Any, default: Any) -> None:
    rule = keys.rule(name)
    kind = rule.kind if rule and rule.kind else None if default in (None, REQUIRED) else type(default)
    if value is None and keys.may_be_null(name, default):
        return
    if isinstance(default, dict):
        raise _no_block(name, value, default)
    if value is None:
        raise UserError(f"{name}=null: must be {kind_words(kind)}{_for_example(name, default)}")
    _check_finite(name, value)
    _check_rule(name, value, kind, default)


def _check_finite(name: str, value: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        off = f" ({name}=null switches it off)" if keys.switched_off(name) else ""
        raise UserError(f"{name}={value}: must be a finite number{off}")


def _check_rule(name: str, value: Any, kind: Any, default: Any) -> None:
    if not fits(value, kind):
        raise wrong_kind(name, value, kind)
    rule = keys.rule(name)
    if rule and not rule.holds(value):
        hint = f"; nearest valid: {name}={show(rule.nearest(value))}" if rule.nearest else _for_example(name, default)
        raise UserError(f"{name}={show(value)}: must be {rule.says}{hint}")


def _no_block(name: str, value: Any, default: dict) -> UserError:
    """The error of one value in a block's place, with the key of it that may be meant."""
    fitting = [key for key, own in default.items() if own is not None and value is not None and fits(value, type(own))]
    example = f"set one of them, such as {name}.{fitting[0]}={show(value)}" if fitting else "set one of them"
    return UserError(f"{name}={show(value)}: must be a block of keys, {', '.join(default)}; {example}")


def _for_example(name: str, default: Any) -> str:
    return "" if default in (None, REQUIRED, []) else f"; e.g. {name}={show(default)}"


def check_together(cfg: dict) -> None:
    """Refuses values that are possible alone and impossible together."""
    _check_sizes(cfg)
    _check_offloading(cfg)
    _check_evaluated(cfg)
    _check_kept(cfg)
    _check_rate(cfg)
    _check_reference(cfg.get("reference") or {})
    _check_streaming(cfg)


def _check_sizes(cfg: dict) -> None:
    prompt, total = cfg.get("max_prompt_length"), cfg.get("max_length")
    if prompt and total and prompt >= total:
        raise UserError(
            f"max_prompt_length={prompt}: must be below max_length={total}, which counts prompt and answer: nothing "
            f"would be left for an answer; nearest valid: max_prompt_length={total - 1} or max_length={2 * prompt}"
        )
    answer = cfg.get("max_completion_length")
    if answer and total and answer >= total:
        raise UserError(
            f"max_completion_length={answer}: must be below max_length={total}, which counts prompt and answer: it "
            f"would have no effect; nearest valid: max_completion_length={total - 1} or max_completion_length=null"
        )
    pairs, batch = cfg.get("pairs_per_step"), cfg.get("batch_size")
    if pairs and isinstance(batch, int) and pairs % batch:
        divisor = min((d for d in range(1, pairs + 1) if pairs % d == 0), key=lambda d: (abs(d - batch), d))
        raise UserError(
            f"batch_size={batch}: must divide pairs_per_step={pairs}; nearest valid: batch_size={divisor} "
            f"or pairs_per_step={max(1, round(pairs / batch)) * batch}"
        )


def _check_offloading(cfg: dict) -> None:
    again = cfg.get("enable_activation_checkpointing")
    if not cfg.get("enable_activation_offloading"):
        return
    if cfg.get("device") == "cpu":
        raise offloading_on_cpu()
    if again not in (True, AUTO):
        raise UserError(
            f"enable_activation_offloading=true: with enable_activation_checkpointing={show(again)} a layer keeps more "
            "than can be copied while it computes; nearest valid: enable_activation_checkpointing=true, or auto"
        )


def offloading_on_cpu() -> UserError:
    """Returns the error of a run that may turn out to be on a CPU only when its device is known."""
    return UserError(
        "enable_activation_offloading=true: keeps activations in host memory, where a CPU has them; nearest valid: "
        "enable_activation_offloading=false, or device=cuda"
    )


def _check_evaluated(cfg: dict) -> None:
    source = (cfg.get("eval_dataset") or {}).get("source")
    fraction = (cfg.get("dataset") or {}).get("val_fraction")
    for key in ("eval_every_n_steps", "eval_every_n_epochs", "keep_best", "early_stop"):
        if cfg.get(key) and not (source or fraction):
            raise UserError(
                f"{key}={cfg[key]}: there is nothing to evaluate on; "
                f"set eval_dataset.source or dataset.val_fraction, or {key}=null"
            )
    name, metric = set_and_metric(cfg.get("keep_best") or "")
    names = list(source) if isinstance(source, dict) else []
    if name and name not in names:
        raise UserError(
            f"keep_best={cfg['keep_best']}: eval_dataset.source names {', '.join(names) or 'no held-out sets'}; "
            f"nearest valid: keep_best={(close_to(name, names) + '/') if names else ''}{metric}"
        )
    steps, epochs = cfg.get("eval_every_n_steps"), cfg.get("eval_every_n_epochs")
    if cfg.get("early_stop") and not (steps or epochs):
        raise UserError(
            f"early_stop={cfg['early_stop']}: held-out pairs are evaluated at the end only, where nothing is left to "
            "stop; set eval_every_n_epochs, such as 0.25, or early_stop=null"
        )
    if steps and epochs:
        raise UserError(
            f"eval_every_n_epochs={epochs}: eval_every_n_steps={steps} says the same in another way; keep one of them "
            "(eval_every_n_steps=null or eval_every_n_epochs=null)"
        )
    if source and fraction:
        raise UserError(
            f"dataset.val_fraction={fraction}: eval_dataset.source is set too; keep one of the "
            "two (dataset.val_fraction=null or eval_dataset.source=null)"
        )


def _check_kept(cfg: dict) -> None:
    if cfg.get("export_best") and not cfg.get("keep_best"):
        raise UserError("export_best=true: set keep_best, which says by what metric, such as keep_best=loss")
    if cfg.get("keep_last_n") == 0 and (cfg.get("keep_best") or cfg.get("resume")):
        key = "keep_best" if cfg.get("keep_best") else "resume"
        raise UserError(
            f"keep_last_n=0: writes no checkpoint, which {key}={show(cfg[key])} needs; nearest valid: keep_last_n=1"
        )


def _check_rate(cfg: dict) -> None:
    schedule = cfg.get("lr_scheduler") or {}
    steps, ratio = schedule.get("num_warmup_steps"), schedule.get("warmup_ratio")
    if steps is not None and ratio is not None:
        raise UserError(
            f"lr_scheduler.num_warmup_steps={steps}: warmup_ratio={ratio} says the same in another way; keep one of "
            "them (lr_scheduler.warmup_ratio=null or lr_scheduler.num_warmup_steps=null)"
        )
    optimizer = cfg.get("optimizer")
    if optimizer and optimizer.get("lr") is None:
        raise UserError(f"optimizer.lr: {optimizer['_component_']} needs a learning rate: set optimizer.lr=...")


def _check_reference(reference: dict) -> None:
    for key, names in keys.by_reference().items():
        if reference.get(key) is not None and reference.get("name") not in names:
            raise UserError(
                f"reference.{key}={show(reference[key])}: has no effect with reference={reference.get('name')}, only "
                f"with {' or '.join(names)}; nearest valid: reference.{key}=null or reference={names[0]}"
            )
    if reference.get("model") and not reference.get("checkpoint_dir"):
        raise UserError(
            f"reference.model={reference['model']['_component_']}: the run's own weights are those of `model`; name "
            "the folder of this one's: reference.checkpoint_dir=..., or set reference.model=null"
        )


def _check_streaming(cfg: dict) -> None:
    dataset = cfg.get("dataset") or {}
    if not dataset.get("streaming"):
        if dataset.get("shuffle_buffer"):
            raise UserError(
                f"dataset.shuffle_buffer={dataset['shuffle_buffer']}: has no effect: all rows are shuffled among each "
                "other; nearest valid: dataset.shuffle_buffer=null, or dataset.streaming=true"
            )
        return
    every, fraction, kept = cfg.get("eval_every_n_epochs"), dataset.get("val_fraction"), dataset.get("cache_dir")
    refused = (
        (not cfg.get("max_steps"), "its rows are not counted before it ends; set max_steps, such as max_steps=1000"),
        (cfg.get("epochs", 1) != 1, f"epochs={cfg.get('epochs')} cannot be told; leave it out, and set max_steps"),
        (every, f"eval_every_n_epochs={every} cannot be told; set eval_every_n_steps"),
        (fraction, f"what dataset.val_fraction={fraction} of it is cannot be told; set eval_dataset.source"),
        (kept, f"dataset.cache_dir={kept} keeps no tokens of it; leave it out"),
        (
            (cfg.get("reference") or {}).get("name") == "cached",
            "reference=cached computes the values of all pairs before the first step; reference=adapter_off (of lora_ "
            "and qlora_ recipes) or reference=model computes them as they come",
        ),
        (
            dataset.get("shuffle_buffer") and cfg.get("shuffle") is False,
            "shuffle=false leaves rows in their order, and dataset.shuffle_buffer has no effect; keep one of them",
        ),
    )
    for is_so, why in refused:
        if is_so:
            raise UserError(f"dataset.streaming=true: {why}")


def unknown_keys(values: dict, schema: dict, where: str, prefix: str) -> UserError:
    """Returns the error of keys that the schema does not have, and were given these values."""
    told = []
    for key, value in values.items():
        here, near = answers.answer(key, value), nearest(key, schema, prefix=prefix)
        here = here or ("" if near else answers.answer_within(key, value))
        told.append((key, f"; {here}" if here else near))
    told.sort(key=lambda entry: not entry[1])  # first what can be answered
    (key, hint), *more = told
    hint = hint or "; known: " + ", ".join(prefix + known for known in schema)
    also = "".join(f"; unknown, too, {prefix}{key}{hint.replace('; ', ': ', 1)}" for key, hint in more)
    return UserError(f"{where}: unknown key {prefix}{key}{hint}{also}")
