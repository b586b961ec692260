"""Weights out: a folder that transformers and PEFT load, with the base's config and the tokenizer of the training."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from torch import Tensor
from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.errors import UserError
from pairtune.files import give_modes, read_object
from pairtune.folders.opening import make_ready
from pairtune.folders.peft_write import write_adapter
from pairtune.folders.weights import ModelFolder, Weights, open_weights
from pairtune.models import fp8
from pairtune.models.additions import Sharing, additions
from pairtune.models.bridge import BridgedDecoder
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import PairBatch
from pairtune.tokenizer.hf import HFTokenizer, TorchtuneTokenizer, trained_template
from pairtune.tokenizer.template import set_template

# Nats an answer and a token of it that rounding of merged weights makes; another order of rows, or a lost layer, makes
# several a token. bf16 logits of 16 and above are 0.125 apart: of an answer of one token or two that is all there is.
TOLERANCE = {"fp32": (0.01, 0.01), "bf16": (0.5, 0.1)}
SHARD_BYTES = 5 * 10**9
TOKENIZER_FILES = (
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
ADAPTER_DIR = "adapter"  # in an export
BLOCK = 2**12  # bytes that a disk gives a file at least
OTHERS = 2**18  # bytes of small files that a run writes besides: curves, settings
MODEL_FILES = ("config.json", "generation_config.json", "LICENSE*")


@dataclass(frozen=True)
class Probe:
    """What a trained model says of a few pairs: its export, read again, has to say the same.

    Attributes:
        batch: The pairs, on the device to compute on.
        logps: Chosen and rejected log-probabilities, [P] each.
        sharing: How the model took them.
    """

    batch: PairBatch
    logps: tuple[Tensor, Tensor]
    sharing: Sharing = Sharing()


def probe(model: TransformerDecoder, batch: PairBatch) -> Probe:
    """Returns what the model's weights say of these pairs now, without fp8. Every process has to call it."""
    with models.frozen(model), fp8.off(model):
        return Probe(batch, answer_logps(model, batch), additions(model).sharing)


def export(
    base: ModelFolder,
    run_dir: Path,
    *,
    merged: dict[str, Tensor],
    adapter: dict[str, Tensor] | None = None,
    lora: dict | None = None,
    tokenizer: HFTokenizer | TorchtuneTokenizer | None = None,
) -> Path:
    """Writes run_dir/export: the merged weights in Hugging Face layout, with the config of the base and the tokenizer.

    An adapter goes to run_dir/export/adapter in PEFT layout, with the tokenizer beside it. The folder takes its name
    when it is complete.

    Args:
        base: The model that training started from.
        merged: models.merge_adapters of the gathered weights.
        adapter: models.only_adapters of the same; empty without adapters.
        lora: rank, alpha, dropout and modules, with an adapter.
        tokenizer: The run's, from tokenizer.adapt: its files and chat template are written, and generation stops at
            its `stop_ids`. None: the base's files as they are.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    exported = run_dir / "export"
    with taking_its_place(exported) as folder:
        write_model(base, folder, merged)
        _write_tokenizer(tokenizer, base, folder)
        if adapter:
            write_adapter(folder / ADAPTER_DIR, adapter, base, lora)
            _copy(folder, TOKENIZER_FILES, folder / ADAPTER_DIR)
    return exported


def export_size(
    model: TransformerDecoder, base: ModelFolder, tokenizer: HFTokenizer | TorchtuneTokenizer | None = None
) -> int:
    """Returns the bytes of a model's export, adapter and tokenizer included, to a few KiB a file.

    Args:
        model: The trained one, loaded or not; weights in 4 bits are exported in full.
        base, tokenizer: As for `export`.
    """
    num_parameters, num_bytes = models.num_parameters(model)[0], models.DTYPES[models.dtype_of(model)].itemsize
    towers = sum(value.numel() * (value.dtype.itemsize - num_bytes) for value in base.towers().values())
    source = base.path if tokenizer is None or tokenizer.folder is None else tokenizer.folder
    files = [*_files(source, TOKENIZER_FILES)] * (2 if additions(model).lora else 1) + [*_files(base.path, MODEL_FILES)]
    tables = 256 * sum(1 for _ in model.parameters())  # names, shapes and offsets
    return num_parameters * num_bytes + towers + tables + sum(file.stat().st_size + BLOCK for file in files) + OTHERS


@contextmanager
def taking_its_place(folder: Path) -> Iterator[Path]:
    """Gives a new folder, which takes a folder's name and place when the context ends without an error.

    A link stays one: it is what it leads to that is replaced. Files get the modes that the umask gives.
    """
    folder = Path(os.path.realpath(folder))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as name:
        new, earlier = Path(name) / folder.name, Path(name) / "earlier"
        new.mkdir()
        yield new
        give_modes(new)
        if folder.exists():
            folder.rename(earlier)
        try:
            new.rename(folder)
        except OSError:
            if earlier.exists():
                earlier.rename(folder)
            raise


def write_model(
    base: ModelFolder, folder: Path, weights: dict[str, Tensor], *, safe_serialization: bool = True
) -> None:
    """Writes whole weights in Hugging Face layout, with the config of the base.

    Args:
        weights: Under torchtune's names.
        safe_serialization: As safetensors, not as pickles.
    """
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    kind = {"max_shard_size": SHARD_BYTES, "safe_serialization": safe_serialization}
    theirs = base.family.to_theirs(weights, base.config)
    theirs |= {name: value.clone() for name, value in base.towers().items() if name in theirs}  # to the byte
    save_torch_state_dict(theirs, folder, **kind)
    _copy(base.path, MODEL_FILES, folder)
    if not (folder / "config.json").is_file():
        (folder / "config.json").write_text(json.dumps(base.config))
    _edit_json(folder / "config.json", torch_dtype=dtype, dtype=dtype)


def check_export(
    exported: Path,
    base: ModelFolder,
    component: dict,
    trained: Probe,
    *,
    max_length: int,
    dtype: str,
    other_base: bool = False,
) -> str:
    """Reads an export again and compares what it computes with what the trained model did; returns a sentence.

    Only one layer of it is in memory at a time.

    Args:
        component: The config's `model` block.
        trained: Of the trained model.
        max_length: Tokens of the longest conversation that it was trained on.
        other_base: It was merged into weights that training did not compute with: the difference is told only.

    Raises:
        UserError: It is not the trained model.
    """
    folder = open_weights({"checkpoint_dir": str(exported), "model_type": base.family.name}, component)
    model = models.full(component, dtype=dtype)
    make_ready(model, folder.config, max_length)
    if isinstance(model, BridgedDecoder):
        model.share(trained.sharing)
    with models.streamed(model, Weights(folder), trained.batch.tokens.device):
        again = torch.cat(answer_logps(model, trained.batch))
    lengths = torch.tensor(trained.batch.answer_lengths, device=again.device).clamp(min=1)
    difference, (an_answer, a_token) = (again - torch.cat(trained.logps)).abs(), TOLERANCE[dtype]
    furthest = f"{(difference / lengths).max():.2g}"
    told = f"read again, its log-probabilities are within {furthest} nats a token of the trained model's"
    if not other_base and not (difference <= an_answer + a_token * lengths).all():
        raise UserError(
            f"{exported}: {told}; rounding makes at most {an_answer} an answer and {a_token} a token: this is not the "
            "trained model, which the run's checkpoints hold if it kept any. It is a mistake in the export, which its "
            "authors should hear of"
        )
    return told


def _write_tokenizer(tokenizer: HFTokenizer | TorchtuneTokenizer | None, base: ModelFolder, folder: Path) -> None:
    """Puts files, chat template and stop tokens of the training into a folder that has the base's config."""
    source = base.path if tokenizer is None or tokenizer.folder is None else tokenizer.folder
    copy_tokenizer(source, folder)
    if tokenizer is not None:
        for file in tokenizer.files:
            shutil.copyfile(file, folder / file.name)
        set_template(folder, trained_template(tokenizer, base.path))
        _write_stop_ids(tokenizer.stop_ids, base.config, folder / "generation_config.json")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a folder's tokenizer into another one."""
    _copy(source, TOKENIZER_FILES, folder)
    if (folder / "tokenizer_config.json").is_file():
        _edit_json(folder / "tokenizer_config.json")


def _write_stop_ids(stop_ids: list[int], config: dict, file: Path) -> None:
    if not file.is_file():  # then readers take the ids of config.json, and where this file is, none of them
        ids = {key: config[key] for key in ("bos_token_id", "pad_token_id") if config.get(key) is not None}
        file.write_text(json.dumps(ids))
    _edit_json(file, eos_token_id=stop_ids if len(stop_ids) > 1 else stop_ids[0])


def _copy(source: Path, patterns: tuple[str, ...], folder: Path) -> None:
    """Copies files without their modes: a base may be read-only, its export must not be."""
    for file in _files(source, patterns):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _files(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    return (file for pattern in patterns for file in folder.glob(pattern) if file.is_file())


def _edit_json(path: Path, **values) -> None:
    """Sets values, and takes out what is not of these weights: auto_map names code of the base's folder.

    And a base in fewer bits, quantization_config, is exported in the run's dtype.
    """
    others = ("auto_map", "quantization_config")
    content = {key: value for key, value in read_object(path).items() if key not in others}
    path.write_text(json.dumps(content | values, indent=2) + "\n")


def export_checked(
    model: TransformerDecoder,
    gathered: dict[str, Tensor],
    base: ModelFolder,
    run_dir: Path,
    component: dict,
    max_length: int,
    tokenizer: HFTokenizer | TorchtuneTokenizer,
    trained: Probe,
    onto_original: bool = False,
) -> str:
    """Writes run_dir/export and reads it again, see `export` and `check_export`; returns a sentence.

    Args:
        model: The trained one; it tells dtype and adapters.
        gathered: Its weights, from models.gather_weights.
        onto_original: Adapters alone were gathered, and are merged into the base as it was before it was quantized.
    """
    dtype = models.dtype_of(model)
    whole = models.on_base(gathered, Weights(base), dtype) if onto_original else gathered
    exported = export(
        base,
        run_dir,
        merged=models.merge_adapters(model, whole),
        adapter=models.only_adapters(model, gathered),
        lora=additions(model).lora,
        tokenizer=tokenizer,
    )
    how = {"max_length": max_length, "dtype": dtype, "other_base": onto_original}
    told = check_export(exported, base, component, trained, **how)
    return f"{exported}: {told}"
