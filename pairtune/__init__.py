"""Direct Preference Optimization recipes on torchtune. The recipes hold the loop; this package holds the leaves."""

import sys

from pairtune import torchao_names

__version__ = "0.1.0"

# Modules that configs name, and where they are now: a config.yaml of an earlier run goes on working.
MOVED = {
    "pairtune.gemma2": "pairtune.models.gemma2",
    "pairtune.gpt2": "pairtune.models.gpt2",
    "pairtune.gpt_neox": "pairtune.models.gpt_neox",
    "pairtune.mixtral": "pairtune.models.mixtral",
    "pairtune.qwen3": "pairtune.models.qwen3",
    "pairtune.preference_losses": "pairtune.losses.modules",
    "pairtune.schedules": "pairtune.run.schedules",
}


sys.meta_path.append(torchao_names.Moved(MOVED))
torchao_names.install()
