"""The README.md of an export: a model card, with the metadata by which the Hugging Face Hub lists a model. No torch.

It is made of the run's folder. Files of the user's machine are named by their last part only.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from pairtune.config.layout import REPO_ID_FILE, read_record
from pairtune.config.rules import show
from pairtune.files import write_text
from pairtune.pairs.sources import looks_like_path
from pairtune.run import pair_log
from pairtune.run.evaluations import held_of
from pairtune.run.finished import Finished, open_run
from pairtune.run.places import CARD, EXPORT
from pairtune.run.signed import signed

PAPER = "[Direct Preference Optimization](https://arxiv.org/abs/2305.18290)"
OF_BASE = ("license", "license_name", "license_link", "language")  # what its card says holds for what is made of it
LIBRARIES = ("torchtune", "torch", "torchao")


def write_card(run_dir: Path) -> None:
    """Writes the card of a run's export, and of the adapter in it."""
    run = open_run(run_dir)
    exported = run.folder / EXPORT
    for folder in (exported, exported / "adapter"):
        if folder.is_dir():
            write_text(folder / CARD, signed(_card(run, folder, is_adapter=folder != exported)))


def _card(run: Finished, folder: Path, *, is_adapter: bool) -> str:
    base = Path(run.config.get("checkpointer", {}).get("checkpoint_dir") or "")
    repo = _repository(base)
    of_base = f"[{repo}](https://huggingface.co/{repo})" if repo else f"`{base.name}`"
    has_template = (folder / "chat_template.jinja").is_file()
    has_template = has_template or "chat_template" in read_record(folder / "tokenizer_config.json")
    code = _code(repo or base.name, run.name, is_adapter=is_adapter, has_template=has_template)
    what = "An adapter in PEFT's layout" if is_adapter else "A model"
    parts = [
        f"---\n{_metadata(run, base, repo, is_adapter=is_adapter).to_yaml()}\n---",
        f"# {run.name}",
        f"{what}, made from {of_base} by preference optimization ({PAPER}) with pairtune.",
        f"## What it came to\n\n{run.verdict.headline}.",
        "\n".join(f"- {line}" for line in run.verdict.numbers),
        _evaluations(run),
        f"## To ask it\n\n```python\n{code}\n```",
        f"## How it was made\n\n{_table(_settings(run))}",
        "What was measured is how it ranks pairs like those that it was trained on. Whether its answers are true or "
        "harmless was not.",
        "Versions: " + ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    ]
    return "\n\n".join(part for part in parts if part)


def _metadata(run: Finished, base: Path, repo: str | None, *, is_adapter: bool) -> ModelCardData:
    try:
        of_base = metadata_load(base / CARD) if (base / CARD).is_file() else None
    except (OSError, ValueError):  # no YAML that anybody can read
        of_base = None
    kept = {key: of_base[key] for key in OF_BASE if key in of_base} if isinstance(of_base, dict) else {}
    sources = [
        source for _, source in _sources(run.config) if not looks_like_path(source) and not Path(source).exists()
    ]
    if repo:
        kept |= {"base_model": repo, "base_model_relation": "adapter" if is_adapter else "finetune"}
    return ModelCardData(
        **kept,
        datasets=list(dict.fromkeys(sources)) or None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo", "preference-optimization", "pairtune", "torchtune", *(["lora"] if "lora" in run.config else [])],
    )


def _repository(base: Path) -> str | None:
    """Returns which repository of the Hub a folder is of, as far as it says so."""
    noted = read_record(base / REPO_ID_FILE).get("repo_id")
    if isinstance(noted, str):
        return noted
    cached = next((part for part in base.expanduser().absolute().parts if part.startswith("models--")), None)
    return cached.removeprefix("models--").replace("--", "/", 1) if cached else None  # of huggingface_hub's cache


def _sources(config: Mapping) -> Iterator[tuple[str, str]]:
    """Yields key and source of all that pairs came from."""
    for key in ("dataset", "eval_dataset"):
        source = (config.get(key) or {}).get("source")
        for one in source if isinstance(source, list) else [source]:
            named = one.get("source") if isinstance(one, Mapping) else one
            if isinstance(named, str):
                yield key, named


def _evaluations(run: Finished) -> str:
    held = [row for row in run.log if "eval/loss" in row]
    if not held:
        return ""
    first, last = held[0], held[-1]
    rows = [["held-out pairs", "before" if first["step"] == 0 else f"step {first['step']}", f"step {last['step']}"]]
    for key, name in (("loss", "loss"), ("rewards/accuracies", "ranked rightly"), ("rewards/margins", "margin")):
        if last.get(f"eval/{key}") is not None:
            is_tied = [key == "rewards/accuracies" and not held_of(row).is_ranking for row in (first, last)]
            values = [row.get(f"eval/{key}") for row in (first, last)]
            shown = ["all tied" if t else "" if v is None else f"{v:.4g}" for t, v in zip(is_tied, values, strict=True)]
            rows.append([name, *shown])
    return _table(rows)


def _settings(run: Finished) -> list[list[str]]:
    config, steps = run.config, run.verdict.step
    pairs = pair_log.read(run.folder / pair_log.FILE)
    seen = len(set(pair_log.identity(pairs[pairs["is_held_out"] == 0]).tolist()))
    names = {key: [] for key in ("dataset", "eval_dataset")}
    for key, source in _sources(config):
        names[key].append(Path(source).name if looks_like_path(source) else source)
    rows = [
        ["setting", "value"],
        ["pairs", f"{seen:,} of {', '.join(names['dataset'])}"],
        ["held out", ", ".join(names["eval_dataset"]) or str(config.get("dataset", {}).get("val_fraction"))],
        ["steps", f"{steps:,} of {config.get('pairs_per_step')} pairs"],
        ["loss", _component(config.get("loss"))],
        ["reference", str((config.get("reference") or {}).get("name"))],
        ["optimizer", _component(config.get("optimizer"))],
        ["schedule", _component(config.get("lr_scheduler"))],
    ]
    if "lora" in config:
        rows.append(["adapters", show(config["lora"])])
    return rows + [
        [key, show(config[key])] for key in ("max_length", "max_prompt_length", "dtype", "seed") if key in config
    ]


def _component(block: object) -> str:
    """Returns a component's name and arguments."""
    if not isinstance(block, Mapping) or "_component_" not in block:
        return show(block)
    arguments = ", ".join(f"{key} {show(value)}" for key, value in block.items() if key != "_component_")
    return f"{block['_component_'].rpartition('.')[2]}{f' ({arguments})' if arguments else ''}"


def _table(rows: list[list[str]]) -> str:
    head, *rest = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def _code(base: str, name: str, *, is_adapter: bool, has_template: bool) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if is_adapter:
        lines = ["from peft import PeftModel", *lines, f'base = AutoModelForCausalLM.from_pretrained("{base}")']
        lines += [f'model = PeftModel.from_pretrained(base, "{name}")']
    else:
        lines += [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("{name}")']
    if has_template:
        lines += ['messages = [{"role": "user", "content": "..."}]']
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        lines += [f"prompt = tokenizer.apply_chat_template(messages, {options})"]
    else:
        lines += ['prompt = tokenizer("...", return_tensors="pt")']
    lines += ["print(tokenizer.decode(model.generate(**prompt, max_new_tokens=256)[0]))"]
    return "\n".join(lines)
