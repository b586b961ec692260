"""torchtune's models and what they lack: built, loaded, sharded, gathered; attention over pairs, log-probabilities."""

import torchtune  # noqa: F401  before torchao: its import says so where torchao lacks something

from pairtune.models.adapters import (
    adapted_modules,
    adapter_shapes,
    copied_parameters,
    frozen,
    frozen_copy_of,
    num_parameters,
    plain_name,
    reference_of,
    sizes,
)
from pairtune.models.build import DTYPES, disable_dropout, dtype_of, full, lora, policy, qlora, without_numbers
from pairtune.models.execution import Execution, execute, fit, plainly, prepare
from pairtune.models.fp8 import convert as convert_to_fp8
from pairtune.models.gather import gather_weights, merge_adapters, on_base, only_adapters
from pairtune.models.load import check_weights, load, streamed
from pairtune.models.shard import clip_gradients, forget_gathered, sync_gradients
from pairtune.models.sharing import settle

__all__ = [
    "DTYPES",
    "Execution",
    "adapted_modules",
    "adapter_shapes",
    "check_weights",
    "clip_gradients",
    "convert_to_fp8",
    "copied_parameters",
    "disable_dropout",
    "dtype_of",
    "execute",
    "fit",
    "forget_gathered",
    "frozen",
    "frozen_copy_of",
    "full",
    "gather_weights",
    "load",
    "lora",
    "merge_adapters",
    "num_parameters",
    "on_base",
    "only_adapters",
    "plain_name",
    "plainly",
    "policy",
    "prepare",
    "qlora",
    "reference_of",
    "settle",
    "sizes",
    "streamed",
    "sync_gradients",
    "without_numbers",
]
