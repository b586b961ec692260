"""Host memory of loading a checkpoint in several processes on one machine: what each holds at most, and for good.

    python tools/measure_loading.py [--processes 1 2 4]

A random Llama of 0.27 billion parameters (1.0 GiB in float32) is written, then loaded as the distributed recipes load
it: each process maps the file, copies layer after layer, and keeps its shard. Counted is anonymous memory, which is a
process's own; the mapped file is the kernel's to drop, and there once for all processes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

from pairtune.process import torchao_names

MODEL = {
    "vocab_size": 32_000, "num_layers": 16, "num_heads": 16, "num_kv_heads": 16, "embed_dim": 1024, "max_seq_len": 512,
    "intermediate_dim": 2816, "rope_base": 10_000,
}  # fmt: skip


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


class Peak:
    """The most anonymous memory while it is open, sampled every few milliseconds."""

    def __enter__(self):
        self.mib, self._done = anonymous_mib(), threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def _sample(self):
        while not self._done.wait(0.003):
            self.mib = max(self.mib, anonymous_mib())

    def __exit__(self, *error):
        self._done.set()
        self._thread.join()


def write_model(folder: Path) -> float:
    """Writes a random model in Hugging Face layout; returns its MiB."""
    from safetensors.torch import save_file
    from torchtune.models.convert_weights import tune_to_hf
    from torchtune.models.llama3 import llama3

    heads = {"num_heads": MODEL["num_heads"], "num_kv_heads": MODEL["num_kv_heads"], "dim": MODEL["embed_dim"]}
    weights = {k: v.contiguous() for k, v in tune_to_hf(llama3(**MODEL).state_dict(), **heads).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama", "vocab_size": MODEL["vocab_size"], "hidden_size": MODEL["embed_dim"],
        "intermediate_size": MODEL["intermediate_dim"], "num_hidden_layers": MODEL["num_layers"],
        "num_attention_heads": MODEL["num_heads"], "num_key_value_heads": MODEL["num_kv_heads"],
        "rope_theta": float(MODEL["rope_base"]), "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return (folder / "model.safetensors").stat().st_size / 2**20


def load(folder: Path) -> None:
    """One process: loads its shard and appends what it took to the folder's report."""
    from omegaconf import OmegaConf

    from pairtune import models
    from pairtune.folders.weights import Weights, open_weights
    from pairtune.process import dist

    world = dist.connect(dist.start("cpu"))
    cfg = {
        "_component_": "torchtune.training.FullModelHFCheckpointer",
        "checkpoint_dir": str(folder),
        "model_type": "LLAMA3",
    }
    files = open_weights(OmegaConf.create(cfg))
    model = models.full({"_component_": "torchtune.models.llama3.llama3", **MODEL}, dtype="fp32")
    models.prepare(model, max_length=512)
    world.barrier()
    before = anonymous_mib()
    with Peak() as peak:
        models.load(model, Weights(files), world=world)
    after = anonymous_mib()
    world.barrier()
    (folder / f"rank{world.rank}").write_text(json.dumps({"peak": peak.mib - before, "kept": after - before}))
    dist.stop(world)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torchao_names.quiet()
    if args.load:
        load(args.load)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "base"
        folder.mkdir()
        print(f"checkpoint: {write_model(folder):,.0f} MiB\n")
        print(f"{'processes':>9}{'peak MiB a process':>20}{'kept MiB a process':>20}{'peak MiB of all':>17}")
        for processes in args.processes:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            load_here = [*command, __file__, "--load", str(folder)]
            subprocess.run(load_here, env=environment, stdout=subprocess.DEVNULL, check=True)
            rows = [json.loads((folder / f"rank{rank}").read_text()) for rank in range(processes)]
            peak, kept = (max(row[key] for row in rows) for key in ("peak", "kept"))
            print(f"{processes:>9}{peak:>20,.0f}{kept:>20,.0f}{sum(row['peak'] for row in rows):>17,.0f}", flush=True)


if __name__ == "__main__":
    main()
