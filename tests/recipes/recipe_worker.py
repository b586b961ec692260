"""Run by torchrun: several runs of recipes, one after the other in the same processes, as JSON in argv[1] lists them.

Each is [name, config path, overrides]; what a run leaves is in its output_dir.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch.distributed as torch_dist
from helpers import run_recipe


def main(runs):
    store = torch_dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    here = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
    connect = torch_dist.init_process_group
    for number, (name, config_path, overrides) in enumerate(json.loads(runs)):
        # Keys of its own: torchrun's store still holds the addresses of the run before.
        torch_dist.init_process_group = partial(connect, store=torch_dist.PrefixStore(f"run {number}", store), **here)
        run_recipe(name, *overrides, config_paths=[Path(config_path)])


if __name__ == "__main__":
    main(sys.argv[1])
