"""A pass over what a reference cache misses, as recipes make it: for test_reference_cache.py, and run by it.

    reference_cache_worker.py CACHE BASE NUM_PAIRS [OUTPUT]

writes how many forwards this process made and the values it ended with to OUTPUT.RANK, as JSON.
"""

import json
import os
import sys
from pathlib import Path

import torch
from helpers import SIZES, random_pairs
from omegaconf import OmegaConf

from pairtune import models
from pairtune.folders import weights as checkpoint
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.pairs.steps import share
from pairtune.process import dist
from pairtune.reference import cache as reference_cache

LLAMA = "torchtune.models.llama3.llama3"
ONE = dist.World(torch.device("cpu"))


class Reference:
    """A frozen model of a folder in Hugging Face layout, its identity, and a count of its forwards."""

    def __init__(self, folder, base, *, world=ONE, dtype="fp32", sizes=SIZES, lora=None, attention="auto", **identity):
        self.component = {"_component_": LLAMA, **sizes}
        settings = {"_component_": "torchtune.training.FullModelHFCheckpointer", "model_type": "LLAMA3"}
        files = checkpoint.open_weights(OmegaConf.create(settings | {"checkpoint_dir": str(base)}))
        self.world, self.num_forwards, self.ld_alpha = world, 0, identity.get("ld_alpha", 1.0)
        self.model = (
            models.lora(self.component, **lora, dtype=dtype) if lora else models.full(self.component, dtype=dtype)
        )
        models.prepare(self.model, max_length=128, attention=attention)
        paths = {"component": self.component, "weight_files": files.weight_files}
        self.identity = reference_cache.identify(folder, self.model, world, **paths | identity)
        self.model.requires_grad_(False).eval()
        models.load(self.model, checkpoint.Weights(files), world=world)
        self.model.register_forward_hook(self._count)

    def _count(self, *_):
        self.num_forwards += 1

    def logps(self, pairs):
        with torch.no_grad():
            return answer_logps(self.model, lay_out(pairs), self.ld_alpha)

    def fill(self, folder, pairs, *, batch_size=4):
        cache = reference_cache.ReferenceCache(folder, self.identity, pairs, self.world)
        for micro in share(cache.missing, batch_size, rank=self.world.rank, size=self.world.size):
            cache.put(micro, *self.logps(micro))
        cache.complete()
        return cache


def main(folder, base, num_pairs, output=None):
    distributed = "RANK" in os.environ
    world = dist.connect(dist.start("cpu")) if distributed else ONE
    if not world.is_main:
        folder = f"{folder}-of-another-machine"
    reference = Reference(Path(folder), base, world=world)
    pairs = random_pairs(int(num_pairs), seed=1)
    cache = reference.fill(Path(folder), pairs, batch_size=1)
    if output:
        result = {"forwards": reference.num_forwards, "values": torch.stack(cache(pairs)).tolist()}
        Path(f"{output}.{world.rank}").write_text(json.dumps(result))
    dist.stop(world)


if __name__ == "__main__":
    main(*sys.argv[1:])
