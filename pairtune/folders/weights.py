"""Weights in: a model's folder, whose files are found and read without a copy.

In Hugging Face layout they are read here; in torchtune's and Meta's by torchtune's classes (checkpointers.py).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torchtune.training.checkpointing._utils import FormattedCheckpointFiles

from pairtune import models
from pairtune.config import architectures, fewer_bits
from pairtune.config.architectures import config_type_of
from pairtune.config.config_json import setting
from pairtune.config.layout import INDEX_FILES, find_weights, read_index
from pairtune.config.rules import one_line
from pairtune.config.uses import is_bridged
from pairtune.errors import UserError, listed, nearest
from pairtune.files import read_json
from pairtune.folders import checkpointers
from pairtune.folders.bridged import BridgedFamily
from pairtune.folders.check_model import check_model_type, model_type_of, positions
from pairtune.folders.families import FAMILIES, Family
from pairtune.folders.made_config import check_params, make_config, read_params
from pairtune.folders.tensors import read_shard
from pairtune.models.bridge import build as bridge
from pairtune.models.bridge import packed
from pairtune.models.bridge.files import Plan, Source
from pairtune.models.build import DTYPES

TABLES = (torch.int64, torch.int32, torch.bool)  # what some of transformers' models look up, such as a token's experts


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder; no weight of it is read yet.

    Attributes:
        path: The folder.
        weight_files: The files of its weights.
        config: Its config.json, or what stands for it.
        family: How its weights are named in Hugging Face layout, which it is exported in.
        reader: The class of torchtune's that reads its one file, which is in another layout; None: it is in this one.
    """

    path: Path
    weight_files: tuple[Path, ...]
    config: dict
    family: Family | BridgedFamily
    reader: str | None = None

    def shards(self) -> Iterator[tuple[Path, dict[str, Tensor]]]:
        """Yields each file with its tensors by name, memory-mapped."""
        for path in self.weight_files:
            if self.reader:
                yield path, checkpointers.read_state_dict(self.reader, path, self.family.name)
            else:
                also = packed.DTYPES if fewer_bits.kind_of(self.config) else ()
                tables = TABLES if isinstance(self.family, BridgedFamily) else ()
                yield path, read_shard(path, ignored=self.family.ignored, also=(*also, *tables))

    def plan(self, tensors: Mapping[str, Tensor]) -> Plan:
        """Returns where our weights come from in its files.

        Args:
            tensors: What they hold, on the meta device.
        """
        if isinstance(self.family, BridgedFamily):
            return self.family.plan(tensors)
        sources, strange = {}, {}
        for key, value in tensors.items():
            try:
                found = self._to_ours(key, value)
            except (KeyError, RuntimeError) as error:
                strange[key] = one_line(error.args[0])
                continue
            for name in found:
                source = Source((key,), lambda values, k=key, n=name: self._to_ours(k, values[0])[n])
                sources.setdefault(name, []).append(source)
        return Plan(sources, strange)

    def _to_ours(self, name: str, value: Tensor) -> dict[str, Tensor]:
        """Returns what one of its files' tensors is here, as Family.to_ours; torchtune's classes renamed theirs."""
        if not self.reader:
            return self.family.to_ours(name, value, self.config)
        if self.family.name_of(name) is None:
            raise KeyError(f"no weight of {self.family.name}")
        is_embedding = name == "output.weight" and setting(self.config, "tie_word_embeddings")
        return {"tok_embeddings.weight" if is_embedding else name: value}

    def towers(self) -> dict[str, Tensor]:
        """Returns what it holds for images and sound, by the names in its files; known after `plan`."""
        names = getattr(self.family, "in_towers", ())
        return {
            name: value
            for _, shard in (self.shards() if names else ())
            for name, value in shard.items()
            if name in names and value.is_floating_point() and value.dtype.itemsize > 1
        }

    def name_of(self, weight: str) -> str | None:
        """Returns what one of our weights is called in its files; None for an unknown one."""
        return weight if self.reader else self.family.name_of(weight)


def open_weights(checkpointer: Mapping, component: Mapping | None = None) -> ModelFolder:
    """Returns the folder of the config's `checkpointer` block.

    Where the block names torchtune.training.FullModelHFCheckpointer, whose arguments it has, the folder is read here,
    for more families and without a copy of the weights. FullModelMetaCheckpointer and FullModelTorchTuneCheckpointer
    read their own. `checkpoint_files` may be left out: the files are found.

    Args:
        component: The config's `model` block. In Meta's and torchtune's layouts it is what a folder without a
            config.json is known by.

    Raises:
        UserError: The folder is not a model, its files are not complete, `model_type` is not its architecture, or
            `component` is not what Meta's params.json says.
    """
    block = OmegaConf.to_container(checkpointer, resolve=True) if OmegaConf.is_config(checkpointer) else checkpointer
    folder, model_type = Path(block["checkpoint_dir"]), block["model_type"]
    reader = checkpointers.reader_of(block.get("_component_"))
    if is_bridged(component):
        return _open_bridged(folder, model_type, reader, _file_names(block.get("checkpoint_files")), component)
    if model_type not in FAMILIES:
        raise UserError(
            f"checkpointer.model_type={model_type}: must be one of {', '.join(FAMILIES)}{nearest(model_type, FAMILIES)}"
        )
    names, family = _file_names(block.get("checkpoint_files")), FAMILIES[model_type]
    if reader:
        names = [checkpointers.find_file(reader, folder, names, model_type)]
    files = _find(folder, names)
    if reader and not (folder / "config.json").is_file():
        return ModelFolder(folder, files, _known_by(component, family, files[0]), family, reader)
    config = read_config(str(folder))
    check_model_type(model_type, config)
    return ModelFolder(folder, files, config, family, reader)


def _find(folder: Path, names: list[str]) -> tuple[Path, ...]:
    """Returns the files of a folder's weights: those of these names, or all."""
    names = names or find_weights(str(folder))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"checkpointer.checkpoint_files: {folder} has no {', '.join(missing)}; leave checkpoint_files out, and the "
            "files are found"
        )
    return tuple(folder / name for name in names)


def _open_bridged(
    folder: Path, model_type: str, reader: str | None, names: list[str], component: Mapping
) -> ModelFolder:
    """Returns the folder of a model that transformers computes: in Hugging Face layout, by config.json's name."""
    if reader:
        raise UserError(
            f"checkpointer._component_: {reader} reads torchtune's families, and `model` is transformers'; take the "
            "same model in Hugging Face layout, with torchtune.training.FullModelHFCheckpointer"
        )
    files, config, family = _find(folder, names), read_config(str(folder), component), BridgedFamily(component)
    if model_type.upper() not in (family.name, "AUTO"):
        raise UserError(
            f"checkpointer.model_type={model_type}: the folder's config.json says model_type={config['model_type']}; "
            f"nearest valid: checkpointer.model_type={family.name}"
        )
    return ModelFolder(folder, files, config, family)


def _known_by(component: Mapping | None, family: Family, file: Path) -> dict:
    """Returns what stands for the config.json that a folder lacks: the model's, if params.json agrees."""
    if component is None:
        raise UserError(f"{file.parent}: holds no config.json; put that of the model there")
    model, path = models.full(component, dtype="fp32"), file.with_name("params.json")
    params = read_params(path) if path.is_file() else None
    if params:
        check_params(model, params, path)
    return make_config(model, config_type_of(family.name), params)


def base_config(checkpointer: Mapping, component: Mapping) -> dict:
    """Returns the config.json of the config's `checkpointer` block, or what stands for it; see `open_weights`.

    Raises:
        UserError: As open_weights; of a folder in Hugging Face layout only config.json is looked at.
    """
    folder = checkpointer["checkpoint_dir"]
    if checkpointers.reader_of(checkpointer["_component_"]) is None:
        return read_config(folder, component)
    return open_weights(checkpointer, component).config


def _file_names(files) -> list[str]:
    """Returns a list of names as it is, and those of torchtune's {filename_format, max_filename}."""
    if not isinstance(files, dict):
        return list(files or [])
    try:
        return sorted(FormattedCheckpointFiles.from_dict(files).build_checkpoint_filenames())
    except ValueError as error:
        raise UserError(f"checkpointer.checkpoint_files: {error}") from None


def open_like(files: ModelFolder, checkpoint_dir: str, component: Mapping) -> ModelFolder:
    """Returns another model's folder, whose config.json says what family it is of.

    Args:
        files: Of the run; its name of the family, such as LLAMA2, is kept where it is one.
        component: The other model's builder.

    Raises:
        UserError: As open_weights.
    """
    find_weights(checkpoint_dir)
    if is_bridged(component):
        return open_weights({"checkpoint_dir": checkpoint_dir, "model_type": "AUTO"}, component)
    model_type = model_type_of(read_config(checkpoint_dir), like=files.family.name)
    return open_weights({"checkpoint_dir": checkpoint_dir, "model_type": model_type})


def read_config(checkpoint_dir: str, component: Mapping | None = None) -> dict:
    """Returns the folder's config.json; what is read of it is of its kind (config/architectures.py).

    Args:
        component: The config's `model` block, where transformers may be what computes it.
    """
    if not is_bridged(component):
        return architectures.read_config(checkpoint_dir)
    bridge.read_config(checkpoint_dir)
    return read_json(Path(checkpoint_dir) / "config.json")


class Weights(Mapping):
    """A folder's weights under torchtune's names, on the CPU; each is converted when it is asked for.

    safetensors files are memory-mapped: however many processes read them, the machine holds them once, and may drop
    what it has no room for. torchtune's own reader converts everything first, which for Llama copies an eighth.

    `empty` holds the same weights on the meta device: their names and shapes, for which no value is read.

    Raises:
        UserError: A file is damaged, or lacks a weight that the index says it has; a weight is in two files, is
            quantized, is none of this architecture's, or, when it is asked for, has a value that is not finite, or
            is there under two names with different values: an embedding and an output layer that are tied.
    """

    def __init__(self, folder: ModelFolder):
        self._folder = folder
        self._tensors: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}  # which file a tensor is in
        for path, shard in folder.shards():
            for key in shard.keys() & self._files.keys():
                raise UserError(f"{path}: {key} is there twice, also in {self._files[key].name}; remove one file")
            self._tensors |= shard
            self._files |= dict.fromkeys(shard, path)
        if folder.reader is None:
            _check_index(folder, self._files)
        self._finite: set[str] = set()
        empty = self._unpack({key: value.to("meta") for key, value in self._tensors.items()})
        plan = folder.plan(empty)
        self._sources = plan.sources  # two of a weight where a tied output layer is stored, too
        self.empty = {name: _make(sources[0], empty) for name, sources in plan.sources.items()}
        if plan.strange:
            strange = [
                f"{key} {list(empty[key].shape)} in {self._files[key].name}: {why}" for key, why in plan.strange.items()
            ]
            raise UserError(
                f"{folder.path}: {len(strange)} tensors are no weights of checkpointer.model_type="
                f"{folder.family.name}, or not of the sizes in config.json; name the architecture that they are of, or "
                f"take them out:\n{listed(strange)}"
            )

    def _unpack(self, empty: dict[str, Tensor]) -> dict[str, Tensor]:
        """Returns the folder's tensors, those in fewer bits as the numbers that they are read as."""
        try:
            self._unpacked = packed.unpacked(empty, self._folder.config)
            made = {key: _make(source, empty) for key, source in self._unpacked.items()}
        except UserError as error:
            raise UserError(f"{self._folder.path}: {error}") from None
        self._files |= {key: self._files[source.keys[0]] for key, source in self._unpacked.items()}
        spent = packed.spent(empty.keys(), self._unpacked)
        return {key: value for key, value in empty.items() if key not in spent} | made

    def __getitem__(self, name: str) -> Tensor:
        source, *twins = self._sources[name]
        value = self._read(source)
        for twin in twins:
            if not torch.equal(value, self._read(twin).to(value.dtype)):
                key, other = source.keys[0], twin.keys[0]
                raise UserError(
                    f"{self._files[other]}: {other} and {key} differ, and are one weight as config.json has it "
                    "(tie_word_embeddings): remove the wrong one, or, if both were trained, set tie_word_embeddings to "
                    "false there and choose a builder with an output layer of its own"
                )
        return value

    def _read(self, source: Source) -> Tensor:
        return source.make([self._checked(key) for key in source.keys])

    def _checked(self, key: str) -> Tensor:
        source = self._unpacked.get(key)
        value = _make(source, self._tensors) if source else self._tensors[key]
        # The sum of finite numbers may overflow: only then is every number looked at, which takes several passes.
        if key not in self._finite and not value.sum(dtype=torch.float32).isfinite() and not value.isfinite().all():
            raise UserError(
                f"{self._files[key]}: {key} holds NaN or infinite values: the file is damaged, or the run that saved "
                "it had diverged; download it again, or take an earlier checkpoint"
            )
        self._finite.add(key)  # a fused tensor is asked for once a part
        return value

    def name_of(self, name: str) -> str:
        """Returns what one of our weights is called in a folder of this family, or in these files."""
        found = self._sources.get(name)
        return found[0].keys[0] if found else self._folder.name_of(name) or "nothing"

    def __iter__(self):
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def _make(source: Source, tensors: Mapping[str, Tensor]) -> Tensor:
    return source.make([tensors[key] for key in source.keys])


def advice(folder: ModelFolder, dtype: str, max_length: int) -> list[str]:
    """Returns a sentence for each of max_length and dtype that the folder's model was not made for."""
    return positions(folder.config, max_length) + rounding(folder, dtype)


def rounding(folder: ModelFolder, dtype: str) -> list[str]:
    """Returns a sentence where the run's dtype, bf16 or fp32, has fewer digits than most of the folder's weights."""
    if said := fewer_bits.sentence(folder.config, dtype):
        return [said]
    numbers = Counter()
    for value in Weights(folder).empty.values():
        numbers[value.dtype] += value.numel()
    ((stored, _),) = numbers.most_common(1)
    if torch.finfo(stored).eps >= torch.finfo(DTYPES[dtype]).eps:
        return []
    kind = str(stored).removeprefix("torch.")
    return [
        f"dtype={dtype}: the folder's weights are {kind}, which has more digits; they are rounded, for training and "
        "for the export. dtype=fp32 keeps them, in twice the memory"
    ]


def _check_index(folder: ModelFolder, files: dict[str, Path]) -> None:
    """Every weight that an index names is in the file that it names, as far as that file is read."""
    read = {path.name for path in files.values()}
    for index in (folder.path / name for name in INDEX_FILES):
        shards = read_index(index) if index.is_file() else {}
        weights = (key for key in shards if not key.endswith(folder.family.ignored))
        elsewhere = (key for key in weights if key not in files or files[key].name != shards[key])
        absent = [key for key in elsewhere if shards[key] in read]
        if absent:
            raise UserError(
                f"{index}: {len(absent)} weights are not in the file it names, such as {absent[0]} in "
                f"{shards[absent[0]]}; download the folder again"
            )
