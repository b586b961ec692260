"""Direct Preference Optimization recipes on torchtune. The recipes hold the loop; this package holds the leaves."""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec

__version__ = "0.1.0"

# Modules that configs name, and where they are now: a config.yaml of an earlier run goes on working.
MOVED = {
    "pairtune.gemma2": "pairtune.models.gemma2",
    "pairtune.gpt2": "pairtune.models.gpt2",
    "pairtune.gpt_neox": "pairtune.models.gpt_neox",
    "pairtune.mixtral": "pairtune.models.mixtral",
    "pairtune.qwen3": "pairtune.models.qwen3",
    "pairtune.preference_losses": "pairtune.losses.modules",
}


class _Moved(MetaPathFinder, Loader):
    """Imports a module of MOVED from where it is now; it is the same module under both names."""

    def find_spec(self, name: str, path=None, target=None) -> ModuleSpec | None:
        return ModuleSpec(name, self) if name in MOVED else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(_Moved())
