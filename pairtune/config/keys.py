"""Every key of a config, a row each: default, comment, rule, who has it, and whether it may change on resuming.

RUN, DISTRIBUTED, FILES, REFERENCE, ROWS, TOKENS and STREAM are the defaults that recipes share, to be spread into their
DEFAULTS. What is learned, and how, keeps default and comment in the recipe: its row has the rest. A key that is in no
row, such as one that a copied recipe adds, has the type of its default.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pairtune.config.rules import (
    AUTO,
    HIGHER_IS_BETTER,
    LORA_LAYERS,
    REQUIRED,
    Rule,
    above,
    at_least,
    between,
    from_to,
    of_kind,
    one_of,
    set_and_metric,
    some_text,
    switch_or,
)

IN_RECIPE = object()  # a default that stands in the recipe, as does its comment


@dataclass(frozen=True)
class Key:
    """One key of a config, or a block of keys.

    Attributes:
        name: With dots, as in key=value.
        default, comment: What recipes share; a block has neither.
        rule: What its value must be beyond the default's type.
        resume: Whether another value continues the same run: yes, no, or "by result", if the pairs or weights that come
            of it are the same. None: as the block that it is in says, at last no.
        nullable: Null is a value though the default is another.
        example: A component to name in its place, of a key that holds one.
        recipes: Which have it, if not all. In a file the others pass over it.
        references: Of `reference`: with which it has an effect.
        published: What null becomes with these.
    """

    name: str
    default: Any = IN_RECIPE
    comment: str = ""
    rule: Rule | None = None
    resume: Literal["yes", "no", "by result"] | None = None
    nullable: bool = False
    example: str = ""
    recipes: str = ""
    references: tuple[str, ...] = ()
    published: Any = None


# Rules that a single key has

_COUNT = Rule(
    lambda v: v == "auto" or isinstance(v, int) and not isinstance(v, bool) and v >= 1,
    "auto, or a whole number, at least 1",
    lambda v: 1 if isinstance(v, (int, float)) else "auto",
    object,
)
_DEVICE = Rule(
    lambda v: v in ("auto", "cpu", "cuda") or v.startswith("cuda:") and v[5:].isdecimal(), "auto, cpu, cuda or cuda:N"
)
_METRIC = Rule(
    lambda v: set_and_metric(v)[1] in HIGHER_IS_BETTER,
    f"one of {', '.join(HIGHER_IS_BETTER)}, or null; of held-out pairs with a name NAME/loss and so on",
    lambda v: "loss",
    str,
)
_CHECKPOINT = Rule(lambda v: v != "", "true, false, auto, or the path of a checkpoint", None, bool | str)
_PROMPTS = Rule(lambda v: all(isinstance(prompt, str) for prompt in v), 'a list of text, numbers in quotes: ["1","2"]')
_TEMPERATURE = Rule(lambda v: v >= 0, "at least 0 (0 is greedy)", lambda v: 0.0)
_TIMEOUT = Rule(lambda v: 0 < v <= 10**6, "above 0 and at most 1000000, 12 days")
CHECKPOINTERS = (
    "torchtune.training.FullModelHFCheckpointer",
    "torchtune.training.FullModelMetaCheckpointer",
    "torchtune.training.FullModelTorchTuneCheckpointer",
    "pairtune.folders.HFCheckpointer",  # the first, for torchtune's recipes, too
)
_CHECKPOINTER = Rule(
    lambda v: v in (AUTO, *CHECKPOINTERS),
    f"one of {', '.join((AUTO, *CHECKPOINTERS))}: folders of Hugging Face, Meta and torchtune are read",
)
_MODULES = Rule(
    lambda v: v and all(m in tuple(LORA_LAYERS) for m in v),
    f"a list of at least one of {', '.join(LORA_LAYERS)}",
    lambda v: [m for m in v if m in tuple(LORA_LAYERS)] or ["q_proj", "v_proj"],
)
_LOGGER = "torchtune.training.metric_logging.TensorBoardLogger"
_MOVE = Rule(lambda v: 0 < v <= 1, "above 0 and at most 1", lambda v: 1.0, float)
_SOURCE = Rule(
    lambda v: isinstance(v, str) and v.strip() or isinstance(v, list) and v,
    "text, and not empty, or a list of such or of blocks with a source each",
    None,
    str | list,
)
_HELD_OUT = Rule(
    lambda v: isinstance(v, str) and v.strip() or isinstance(v, list | dict) and v,
    "text, and not empty, or a list of such or of blocks with a source each, or names with one of these each",
    None,
    str | list | dict,
)
_FOLDER = Rule(lambda v: v is False or isinstance(v, str) and v, "a folder, null or false", None, object)
_EPOCHS = Rule(lambda v: 0 < v <= 1_000_000, "above 0, such as 1, 3 or 0.5", lambda v: 1, float)
_FRACTION = Rule(lambda v: 0 < v < 1, "above 0 and below 1, such as 0.1", None, float)


# Where a run computes, what it keeps, what it tells

_RUN = (
    Key("seed", 42, "order of the pairs, fresh adapters, sampled answers", between(0, 2**32, int)),
    Key("device", "auto", "cuda, cpu, or auto: a GPU where there is one", _DEVICE, "yes"),
    Key(
        "dtype",
        "bf16",
        "bf16, or fp32 for twice the memory; log-probabilities and losses are float32 either way",
        one_of("bf16", "fp32"),
    ),
    Key(
        "compile",
        "auto",
        "torch.compile layer by layer: true, false, or auto: on a GPU, where the run is worth the minute that it takes",
        switch_or("auto"),
        "yes",
    ),
    Key(
        "attention",
        "auto",
        "flex (compiled), varlen (bf16 on a GPU), segments (a call a document), mask (dense), or auto",
        one_of("auto", "flex", "varlen", "segments", "mask"),
        "yes",
    ),
    Key(
        "enable_activation_checkpointing",
        "auto",
        "computed again in backward: true, whole layers; selective, what is cheap; false, nothing; auto: what fits",
        switch_or("selective", "auto"),
        "yes",
    ),
    Key(
        "enable_activation_offloading",
        False,
        "true: inputs of layers that are computed again wait in host memory, on a GPU",
        resume="yes",
    ),
    Key(
        "save_every_n_steps",
        100,
        "a checkpoint to resume from; null: at the end, on SIGTERM and on Ctrl-C only",
        at_least(1),
        "yes",
        nullable=True,
    ),
    Key(
        "keep_last_n",
        1,
        "so many checkpoints stay on the disk; 0: none is written",
        at_least(0),
        "yes",
    ),
    Key(
        "keep_best",
        None,
        "and the best by the held-out loss, rewards/accuracies or rewards/margins",
        _METRIC,
        "yes",
    ),
    Key(
        "export_best",
        False,
        "export the best one's weights in place of the last one's",
        resume="yes",
    ),
    Key(
        "on_save_failure",
        "stop",
        "a disk that is full stops the run; continue: train on with the earlier checkpoints",
        one_of("stop", "continue"),
        "yes",
    ),
    Key(
        "resume",
        False,
        "true: the newest checkpoint of output_dir; auto: if there is one; or a path",
        _CHECKPOINT,
        "yes",
    ),
    Key("log_every_n_steps", 1, "a line of metrics.jsonl and what metric_logger gets", at_least(1), "yes"),
    Key(
        "eval_every_n_steps",
        None,
        "the held-out pairs; null: at the end only",
        at_least(1),
        "yes",
    ),
    Key(
        "eval_every_n_epochs",
        None,
        "the same, told in epochs: 1, or 0.25 for four times in each",
        above(0),
        "yes",
    ),
    Key(
        "early_stop",
        None,
        "ends the run after so many evaluations in a row without a lower held-out loss; null: never",
        at_least(1),
        "yes",
    ),
    Key("samples", resume="yes"),
    Key("samples.prompts", [], "questions answered before and after; [] takes held-out prompts", _PROMPTS),
    Key("samples.num_prompts", 3, "how many of those; 0: none", at_least(0)),
    Key("samples.max_new_tokens", 128, "the length at which an answer is cut", at_least(1)),
    Key("samples.temperature", 0.0, "0 takes the likeliest token", _TEMPERATURE),
    Key(
        "metric_logger",
        None,
        f"a component, such as {_LOGGER} with log_dir",
        resume="yes",
        nullable=True,
        example=_LOGGER,
    ),
)

_DISTRIBUTED = (
    Key(
        "data_parallel_replicate_dim",
        1,
        "copies of the model, each sharded over a group of processes",
        at_least(1),
        "yes",
        recipes="distributed recipes",
    ),
    Key(
        "fsdp_cpu_offload",
        False,
        "shards wait in host memory: larger models, slower steps",
        resume="yes",
        recipes="distributed recipes",
    ),
    Key(
        "collective_timeout_s",
        600.0,
        "a process that stands still so long ends the run",
        _TIMEOUT,
        "yes",
        recipes="distributed recipes",
    ),
)

# The model's files

_FILES = (
    Key("checkpointer", example="torchtune.training.FullModelHFCheckpointer"),
    Key(
        "checkpointer._component_",
        AUTO,
        "torchtune.training.FullModelHFCheckpointer or FullModelMetaCheckpointer by the folder's files; or "
        "FullModelTorchTuneCheckpointer",
        _CHECKPOINTER,
    ),
    Key(
        "checkpointer.checkpoint_dir",
        REQUIRED,
        "the model's folder; its files are found",
        of_kind(str),
        "by result",
    ),
    Key(
        "checkpointer.model_type",
        AUTO,
        "LLAMA2, LLAMA3, MISTRAL, GEMMA, QWEN2, ...: as the folder's config.json says, or the builder",
        of_kind(str),
    ),
    Key("tokenizer", resume="by result", example="pairtune.tokenizer.hf_tokenizer"),
    Key("tokenizer._component_", "pairtune.tokenizer.hf_tokenizer", "reads tokenizer.json and the chat template"),
    Key("tokenizer.path", "${checkpointer.checkpoint_dir}", "a folder that has them"),
)

# The model, and what learns

_BY_ADAPTERS = "lora_ and qlora_ recipes"
_LEARNING = (
    Key("output_dir", rule=some_text(), resume="yes"),
    Key("base_dtype", rule=one_of("nf4", "int8", "fp8"), recipes="qlora_ recipes"),
    Key("merge_into", rule=one_of("original", "dequantized"), resume="yes", recipes="qlora_ recipes"),
    Key("model", example="torchtune.models.llama3.llama3_8b"),
    Key("model.path", resume="by result"),  # of pairtune.models.bridge.causal_lm: what lies there counts
    Key("lora", recipes=_BY_ADAPTERS),
    Key("lora.rank", rule=from_to(1, 65_536)),
    Key("lora.alpha", rule=above(0)),
    Key("lora.dropout", rule=between(0, 1)),
    Key("lora.modules", rule=_MODULES),
    Key("lora.use_dora"),
    Key("lora.use_rslora"),
    Key("adapter", rule=of_kind(str), resume="by result", nullable=True, recipes=_BY_ADAPTERS),
    Key("enable_fp8_training", recipes="full_ recipes"),
    Key("optimizer", example="torch.optim.AdamW"),
    Key("optimizer.lr", rule=above(0)),
    Key("optimizer.weight_decay"),
    Key("decay_norms_and_biases"),
    Key("max_length", rule=at_least(2), resume="by result"),
    Key("max_prompt_length", rule=at_least(1), resume="by result", nullable=True),
    Key("max_completion_length", rule=at_least(1), resume="by result", nullable=True),
    Key("shuffle"),
    Key("loss", example="torchtune.rlhf.loss.DPOLoss"),
    Key("loss.beta", rule=above(0)),
    Key("loss.gamma", rule=above(0)),  # of torchtune's RSOLoss
    Key("loss.label_smoothing", rule=between(0, 0.5)),
    Key("router_aux_loss_coef", rule=at_least(0.0)),
    Key("score_end"),
    Key("disable_dropout"),
    Key("lr_scheduler", nullable=True, example="pairtune.schedules.cosine"),
    Key("lr_scheduler.warmup_ratio", rule=between(0, 1)),
    Key("lr_scheduler.num_warmup_steps"),
    Key("clip_grad_norm", rule=above(0), nullable=True),
    Key("pairs_per_step", rule=from_to(1, 1_000_000)),
    Key("batch_size", rule=_COUNT, resume="yes"),
    Key("epochs", rule=_EPOCHS, resume="yes"),
    Key("max_steps", rule=at_least(1), resume="yes", nullable=True),
)

_REFERENCE = (
    Key("reference"),
    Key("reference.name", rule=one_of("adapter_off", "start", "model", "cached", "sync", "none")),
    Key(
        "reference.checkpoint_dir",
        None,
        "model, cached: the folder of another model with this vocabulary; null: the run's",
        of_kind(str),
        "by result",
        references=("model", "cached"),
    ),
    Key(
        "reference.model",
        None,
        "model, cached: its builder, if it is of another size or architecture; null: `model`",
        nullable=True,
        example="torchtune.models.llama3.llama3_8b",
        references=("model", "cached"),
    ),
    Key(
        "reference.dtype",
        None,
        "model, cached: bf16 or fp32; null: the run's",
        one_of("bf16", "fp32"),
        references=("model", "cached"),
    ),
    Key(
        "reference.quantize",
        None,
        "model, cached: true for 4 bits (NF4) in linear layers; null: as the run's base, true in qlora_ recipes",
        of_kind(bool),
        references=("model", "cached"),
    ),
    Key(
        "reference.cache_dir",
        None,
        "cached: where runs share it; null: ~/.cache/pairtune/reference",
        of_kind(str),
        "yes",
        references=("cached",),
    ),
    Key(
        "reference.every_n_steps",
        None,
        "sync (TR-DPO, arXiv 2404.09656): how often it moves toward the policy",
        at_least(1),
        references=("sync",),
        published=512,
    ),
    Key(
        "reference.alpha",
        None,
        "sync: how far, 1 takes what the policy has learned",
        _MOVE,
        references=("sync",),
        published=0.6,
    ),
)

# Preference pairs: `dataset` and `eval_dataset` have the same keys

_ROWS = (
    Key(
        "source",
        REQUIRED,
        "a .json, .jsonl(.gz), .csv or .parquet file, a folder of them, or a Hub id; or a list of several",
        _SOURCE,
    ),
    Key("name", None, "which configuration, for a Hub data set that has several", of_kind(str)),
    Key("revision", None, "which commit, branch or tag of it", of_kind(str)),
    Key("split", "train", "slices work: train[:90%]"),
    Key("limit", None, "the first N rows only", at_least(1)),
    Key("columns", {}, "ours: theirs, where a column has another name; null leaves one out; choice: docs/data.md"),
    Key("on_bad_row", "drop", "a broken row: drop, if at most one in twenty is, or error", one_of("drop", "error")),
    Key("rejected", "all", "of several worse answers: all, the best or the worst", one_of("all", "best", "worst")),
    Key(
        "overlong",
        "drop",
        "a pair over the budget: drop, trim_prompt (from the left) or error",
        one_of("drop", "trim_prompt", "error"),
    ),
)
_TOKENS = (
    Key(
        "cache_dir",
        None,
        "where tokens are kept for other runs; null: ~/.cache/pairtune/tokens; false: nowhere",
        _FOLDER,
        "yes",
    ),
)
_STREAM = (
    Key(
        "streaming",
        False,
        "true: rows are read while it trains, and never held whole; max_steps ends the run",
    ),
    Key(
        "shuffle_buffer",
        None,
        "streaming: so many rows are shuffled among each other; null: 10,000",
        at_least(1),
    ),
)
_PAIRS = (
    Key("dataset", resume="by result"),
    *(replace(row, name=f"dataset.{row.name}") for row in _TOKENS),
    *(replace(row, name=f"dataset.{row.name}") for row in _STREAM),
    *(replace(row, name=f"dataset.{row.name}") for row in _ROWS),
    Key("dataset.val_fraction", rule=_FRACTION, nullable=True),
    Key("eval_dataset", resume="yes", nullable=True),
    Key(
        "eval_dataset.source",
        REQUIRED,
        "as of dataset; or names with one each: evaluated apart, too",
        _HELD_OUT,
    ),
    *(replace(row, name=f"eval_dataset.{row.name}") for row in _ROWS[1:]),
)


def _defaults(rows: Iterable[Key], within: str = "") -> dict:
    """Returns rows' defaults by name, nested at the dots."""
    nested: dict = {}
    for row in rows:
        *blocks, last = row.name.removeprefix(within).split(".")
        block = nested
        for name in blocks:
            block = block.setdefault(name, {})
        if row.default is not IN_RECIPE:
            block[last] = row.default
    return nested


RUN = _defaults(_RUN)
DISTRIBUTED = _defaults(_DISTRIBUTED)
FILES = _defaults(_FILES)
REFERENCE = _defaults(_REFERENCE, "reference.")  # of the block `reference`, but for its name
ROWS = _defaults(_ROWS)  # of the blocks `dataset` and `eval_dataset`
TOKENS = _defaults(_TOKENS)  # of `dataset`, for both
STREAM = _defaults(_STREAM)  # of `dataset`

KEYS = {row.name: row for row in (*_RUN, *_DISTRIBUTED, *_FILES, *_LEARNING, *_REFERENCE, *_PAIRS)}


def rule(name: str) -> Rule | None:
    """Returns what the key's value must be beyond its default's type."""
    return KEYS[name].rule if name in KEYS else None


def comment(name: str) -> str:
    """Returns what recipes that share the key's default say of it; "" where it stands in the recipe."""
    if name not in KEYS:
        return ""
    published = KEYS[name].published
    return KEYS[name].comment + (f"; null: {published}, as published" if published else "")


def may_be_null(name: str, default: Any) -> bool:
    """Returns whether null is a value of this key, which is not an argument of a component."""
    return default is None or default in ({}, []) or (name in KEYS and KEYS[name].nullable)


def switched_off(name: str) -> bool:
    """Returns whether null at this key leaves something out."""
    return name in KEYS and not KEYS[name].published and may_be_null(name, KEYS[name].default)


def may_hold_component(name: str) -> bool:
    """Returns whether the key holds a block with `_component_` where it is not null."""
    return name in KEYS and KEYS[name].nullable and KEYS[name].example != ""


def example(name: str) -> str:
    """Returns the path of a component that this key may hold."""
    return KEYS[name].example or "..." if name in KEYS else "..."


def recipes_with(name: str) -> str:
    """Returns in words which recipes have this key; "" where all have it, or none."""
    return KEYS[name].recipes if name in KEYS else ""


def by_reference() -> dict[str, tuple[str, ...]]:
    """Returns the keys of `reference` that have an effect with some references only, and with which."""
    return {row.name.partition(".")[2]: row.references for row in _REFERENCE if row.references}


def with_published(cfg: dict) -> dict:
    """Returns the config with what was published in place of null."""
    reference = cfg.get("reference")
    if not isinstance(reference, dict):
        return cfg
    published = {
        name: row.published
        for row in _REFERENCE
        for name in (row.name.partition(".")[2],)
        if row.published and name in reference and reference[name] is None and reference["name"] in row.references
    }
    return {**cfg, "reference": {**reference, **published}}


def on_resume(name: str) -> str:
    """Returns whether another value of this key continues the same run: "yes", "no", or "by result" (see Key)."""
    while name:
        if name in KEYS and KEYS[name].resume:
            return KEYS[name].resume
        name = name.rpartition(".")[0]
    return "no"
