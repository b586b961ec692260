"""Our reader and writer of Hugging Face folders behind torchtune's checkpointer interface: for torchtune's recipes."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtune import training
from torchtune.training.checkpointing._utils import (
    RECIPE_STATE_DIRNAME,
    check_outdir_not_in_ckptdir,
    get_recipe_checkpoint_path,
    safe_torch_load,
)

from pairtune.errors import UserError
from pairtune.folders.export import ADAPTER_DIR, copy_tokenizer, taking_its_place, write_model
from pairtune.folders.peft_write import write_adapter
from pairtune.folders.tensors import read_shard
from pairtune.folders.weights import Weights, open_weights

OF_MODEL = (training.MODEL_KEY, training.ADAPTER_KEY, training.ADAPTER_CONFIG)  # the rest is the recipe's state
ADAPTER_FILE = "adapter_model.pt"  # under torchtune's names: what its recipes resume from


class HFCheckpointer:
    """torchtune's FullModelHFCheckpointer with its arguments, for every family of pairtune's and for its builders.

    Weights are memory-mapped, and compared with config.json as in pairtune's own recipes. What a recipe saves after
    epoch N lies in output_dir/epoch_N: a folder that transformers loads, in which adapter/ is what PEFT loads, and
    adapter_model.pt what a recipe resumes from.

    Args:
        checkpoint_dir: A model in Hugging Face layout.
        model_type: Its family: LLAMA3, QWEN3, ...
        output_dir: Of the run, not within checkpoint_dir.
        checkpoint_files: As torchtune's; None: the files are found. A resumed run's are not looked at.
        adapter_checkpoint: Of a resumed run, within output_dir; None: that of the epoch that the recipe's state is of,
            where torchtune's own takes the newest.
        recipe_checkpoint: Of a resumed run, within output_dir; None: recipe_state/recipe_state.pt.
        resume_from_checkpoint: An older name of should_load_recipe_state.
        safe_serialization: Saves safetensors; False: pickles.
        should_load_recipe_state: Goes on from what an earlier run saved.

    Raises:
        UserError: The folder is not a model of this family.
        ValueError: output_dir is within checkpoint_dir, or there is nothing to resume from.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        model_type: str,
        output_dir: str,
        checkpoint_files: list[str] | dict[str, str] | None = None,
        adapter_checkpoint: str | None = None,
        recipe_checkpoint: str | None = None,
        resume_from_checkpoint: bool = False,
        safe_serialization: bool = True,
        should_load_recipe_state: bool = False,
    ):
        self._checkpoint_dir, self._output_dir = Path(checkpoint_dir), Path(output_dir)  # torchtune's client reads both
        self._block = {"checkpoint_dir": checkpoint_dir, "model_type": model_type, "checkpoint_files": checkpoint_files}
        self._files = open_weights(self._block)
        self._adapter_checkpoint, self._safe_serialization = adapter_checkpoint, safe_serialization
        check_outdir_not_in_ckptdir(self._checkpoint_dir, self._output_dir)
        self._output_dir.mkdir(parents=True, exist_ok=True)
        resumes = should_load_recipe_state or resume_from_checkpoint
        self._recipe_checkpoint = get_recipe_checkpoint_path(self._output_dir, recipe_checkpoint, resumes)

    def load_checkpoint(self) -> dict[str, Any]:
        """Returns the weights as `model`, under torchtune's names; and of a run that goes on its state and adapter.

        Raises:
            UserError: A file is missing or damaged, see Weights.
        """
        if self._recipe_checkpoint is None:
            return {training.MODEL_KEY: dict(Weights(self._files))}
        state = safe_torch_load(self._recipe_checkpoint)
        folder = self._epoch_dir(state[training.EPOCHS_KEY] - 1)
        adapter = folder / ADAPTER_FILE
        if self._adapter_checkpoint:
            adapter = self._output_dir / self._adapter_checkpoint
        if adapter.is_file():
            return {training.MODEL_KEY: dict(Weights(self._files)), training.ADAPTER_KEY: read_shard(adapter), **state}
        trained = open_weights(self._block | {"checkpoint_dir": str(folder), "checkpoint_files": None})
        return {training.MODEL_KEY: dict(Weights(trained)), **state}

    def save_checkpoint(
        self, state_dict: dict[str, Any], epoch: int, intermediate_checkpoint: bool = False, adapter_only: bool = False
    ) -> None:
        """Writes what a recipe knows after an epoch; the folder of the epoch takes its name when it is complete.

        Args:
            state_dict: `model`, whole weights under torchtune's names; `adapter` and `adapter_config` of LoRA; and, if
                training goes on, the recipe's state.
            intermediate_checkpoint: Training goes on: its state is written.
            adapter_only: `model` is left out.

        Raises:
            UserError: `adapter_only` without an adapter.
        """
        adapter = state_dict.get(training.ADAPTER_KEY)
        if adapter_only and not adapter:
            raise UserError("save_checkpoint: adapter_only=True, and state_dict has no adapter")
        with taking_its_place(self._epoch_dir(epoch)) as folder:
            if not adapter_only:
                weights = state_dict[training.MODEL_KEY]
                write_model(self._files, folder, weights, safe_serialization=self._safe_serialization)
            copy_tokenizer(self._files.path, folder)
            if adapter:
                torch.save(adapter, folder / ADAPTER_FILE)
            if adapter and training.ADAPTER_CONFIG in state_dict:
                settings = _lora_settings(state_dict[training.ADAPTER_CONFIG], adapter)
                write_adapter(folder / ADAPTER_DIR, adapter, self._files, settings)
        if intermediate_checkpoint:
            kept = {key: value for key, value in state_dict.items() if key not in OF_MODEL}
            path = self._output_dir / RECIPE_STATE_DIRNAME / "recipe_state.pt"
            path.parent.mkdir(exist_ok=True)
            torch.save(kept, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)

    def _epoch_dir(self, epoch: int) -> Path:
        return self._output_dir / f"epoch_{epoch}"


def _lora_settings(config: dict, adapter: dict[str, Tensor]) -> dict:
    """Returns what torchtune's recipes tell of an adapter, by our names; its dropout they do not tell."""
    use_dora = any(name.endswith(".magnitude") for name in adapter)
    return {"rank": config["r"], "alpha": config["lora_alpha"], "dropout": 0.0, "use_dora": use_dora}
