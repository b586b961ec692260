"""Run by torchrun: several runs of recipes, one after the other in the same processes, as JSON in argv[1] lists them.

Each is [name, config path, overrides]; what a run leaves is in its output_dir.
"""

import json
import sys
from pathlib import Path

from helpers import run_recipe

if __name__ == "__main__":
    for name, config_path, overrides in json.loads(sys.argv[1]):
        run_recipe(name, *overrides, config_paths=[Path(config_path)])
