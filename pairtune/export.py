"""Weights out: a folder that transformers and PEFT load, with the base model's config, tokenizer and template."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor

from pairtune import adapters, models
from pairtune.batch import PairBatch
from pairtune.checkpoint import ModelFolder, Weights, open_weights
from pairtune.errors import UserError
from pairtune.logps import answer_logps

# Nats an answer and a token of it that rounding of merged weights makes; another order of rows, or a lost layer, makes
# several a token. bf16 logits of 16 and above are 0.125 apart: of an answer of one token or two that is all there is.
TOLERANCE = {"fp32": (0.01, 0.01), "bf16": (0.5, 0.1)}
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
COPIED = ("config.json", "generation_config.json", "LICENSE*", *TOKENIZER_FILES)


def export(
    base: ModelFolder,
    run_dir: Path,
    *,
    merged: dict[str, Tensor],
    adapter: dict[str, Tensor] | None = None,
    lora: dict | None = None,
    tokenizer: dict | None = None,
) -> Path:
    """Writes run_dir/export: the merged weights in Hugging Face layout, with the config and tokenizer of the base.

    An adapter goes to run_dir/export/adapter in PEFT layout, with the tokenizer beside it. The folder takes its name
    when it is complete.

    Args:
        base: The model that training started from.
        merged: models.merge_adapters of the gathered weights.
        adapter: models.only_adapters of the same; empty without adapters.
        lora: rank, alpha, dropout and modules, with an adapter.
        tokenizer: The config's `tokenizer` block: its `path`, if a folder, is where the tokenizer's files are, and its
            `chat_template` is the one that goes with them.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    dtype = str(next(iter(merged.values())).dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory(dir=run_dir, prefix=".export-") as name:
        folder = Path(name) / "export"
        folder.mkdir()
        save_torch_state_dict(base.family.to_theirs(merged, base.config), folder, max_shard_size=SHARD_BYTES)
        for file in _files(base.path, COPIED):
            shutil.copy(file, folder / file.name)
        _copy_tokenizer(tokenizer or {}, base.path, folder)
        _edit_json(folder / "config.json", torch_dtype=dtype, dtype=dtype)
        if adapter:
            adapters.write_adapter(folder / "adapter", adapter, base, lora)
            for file in _files(folder, TOKENIZER_FILES):
                shutil.copy(file, folder / "adapter" / file.name)
        exported = run_dir / "export"
        if exported.exists():
            exported.rename(Path(name) / "earlier")
        folder.rename(exported)
    return exported


def check_export(
    exported: Path,
    base: ModelFolder,
    component: dict,
    batch: PairBatch,
    trained: tuple[Tensor, Tensor],
    *,
    dtype: str,
    other_base: bool = False,
    **prepared,
) -> str:
    """Reads an export again and compares what it computes with what the trained model did; returns a sentence.

    Only one layer of it is in memory at a time.

    Args:
        component: The config's `model` block.
        batch: A few pairs, on the device to compute on.
        trained: Their chosen and rejected log-probabilities, [P] each, under the trained model.
        other_base: It was merged into weights that training did not compute with: the difference is told only.
        prepared: What models.prepare got.

    Raises:
        UserError: It is not the trained model.
    """
    folder = open_weights({"checkpoint_dir": str(exported), "model_type": base.family.name})
    model = models.full(component, dtype=dtype)
    models.prepare(model, **prepared | {"checkpoint_activations": False, "compile_layers": False})
    with models.streamed(model, Weights(folder), batch.tokens.device):
        again = torch.cat(answer_logps(model, batch))
    lengths = torch.tensor(batch.answer_lengths, device=again.device).clamp(min=1)
    difference, (an_answer, a_token) = (again - torch.cat(trained)).abs(), TOLERANCE[dtype]
    furthest = f"{(difference / lengths).max():.2g}"
    told = f"read again, its log-probabilities are within {furthest} nats a token of the trained model's"
    if not other_base and not (difference <= an_answer + a_token * lengths).all():
        raise UserError(
            f"{exported}: {told}; rounding makes at most {an_answer} an answer and {a_token} a token: this is not the "
            "trained model, which the run's checkpoints hold if it kept any. It is a mistake in the export, which its "
            "authors should hear of"
        )
    return told


def _copy_tokenizer(tokenizer: dict, checkpoint_dir: Path, folder: Path) -> None:
    """Puts the run's tokenizer and chat template into a folder that has the base model's."""
    path, template = tokenizer.get("path"), tokenizer.get("chat_template")
    if path and Path(path).is_dir() and Path(path).resolve() != checkpoint_dir.resolve():
        for file in _files(Path(path), TOKENIZER_FILES):
            shutil.copy(file, folder / file.name)
    elif path and Path(path).is_file():
        shutil.copy(path, folder / Path(path).name)
    if template and template != "plain":
        text = Path(template).read_text() if "{" not in template else template
        (folder / "chat_template.jinja").write_text(text)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [file for pattern in patterns for file in folder.glob(pattern) if file.is_file()]


def _edit_json(path: Path, **values) -> None:
    edited = json.dumps(json.loads(path.read_text()) | values, indent=2) + "\n"
    path.unlink()  # a copy of a read-only file is read-only
    path.write_text(edited)
