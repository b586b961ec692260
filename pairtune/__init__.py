"""Direct Preference Optimization recipes on torchtune. The recipes hold the loop; this package holds the leaves."""

import sys

from pairtune.process import torchao_names

__version__ = "0.1.0"

# Modules that configs and copies of recipes name, and where they are now: those of an earlier day go on working.
MOVED = {
    "pairtune.console": "pairtune.process.console",
    "pairtune.dist": "pairtune.process.dist",
    "pairtune.gemma2": "pairtune.models.gemma2",
    "pairtune.gpt2": "pairtune.models.gpt2",
    "pairtune.gpt_neox": "pairtune.models.gpt_neox",
    "pairtune.judge": "pairtune.making.judge",
    "pairtune.mixtral": "pairtune.models.mixtral",
    "pairtune.qwen3": "pairtune.models.qwen3",
    "pairtune.preference_losses": "pairtune.losses.modules",
    "pairtune.schedules": "pairtune.run.schedules",
}


sys.meta_path.append(torchao_names.Moved(MOVED))
torchao_names.install()
