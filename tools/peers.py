"""One trainer in a process of its own, that makes a step when it is told to: ours, torchtune's, or TRL's, as they are.

bench.py starts it. Whoever trains, it is the program that its users run: our recipe's main, the setup and train of
torchtune's recipe, TRL's Trainer; a logger or callback at the end of each step is where it waits. What makes the work
the same for all is set here: weights, fresh adapters, pairs and their order, AdamW without decay, clipping or schedule.
"""

import json
import os
import runpy
import sys
import time
from pathlib import Path

import random_work as work
from loggers import Gate

ROOT = Path(__file__).resolve().parents[1]
RATES = {"full": 1e-5, "lora": 1e-3, "qlora": 1e-3}
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


# Ours


def ours(spec: dict) -> None:
    """The recipe of the method, in one process or, under torchrun, in several."""
    from pairtune import config, models
    from pairtune.process import torchao_names

    torchao_names.quiet()
    alone, folder = spec["processes"] == 1, Path(spec["folder"])
    recipe = runpy.run_path(
        str(ROOT / "recipes" / f"{spec['method']}_dpo_{'single_device' if alone else 'distributed'}.py")
    )
    if spec["method"] != "full" and alone:
        load = models.load

        def load_then_fill(model, *args, **kwargs):
            load(model, *args, **kwargs)
            (_fill_bridged if _is_bridged(spec) else _fill_adapters)(model, folder / "adapter")

        models.load = load_then_fill  # adapter=... would be another run: what it starts from is not the reference
    path = folder / f"ours_{os.getpid()}.yaml"
    logger = {"metric_logger": {"_component_": "loggers.Gate", **spec["gate"]}}
    path.write_text(json.dumps(our_config(spec) | logger))  # JSON is YAML
    overrides = [flag for flag in spec["flags"] if "=" in flag]
    recipe["main"](config.load(recipe["METHOD"], recipe["DEFAULTS"], [path], overrides))


def our_config(spec: dict) -> dict:
    """Returns a config of the work for our recipes; what a flag does not say is as the recipe has it."""
    folder, flags = Path(spec["folder"]), spec["flags"]
    cfg = {
        "output_dir": str(folder / f"run_{os.getpid() if spec['processes'] == 1 else os.getppid()}"),
        "device": spec["device"], "dtype": spec["dtype"], "samples": {"num_prompts": 0}, "keep_last_n": 0,
        "model": {"_component_": work.LLAMA, **spec["sizes"]},
        "checkpointer": {"checkpoint_dir": str(folder / "base"), "model_type": "LLAMA3"},
        "dataset": {"source": str(folder / "pairs.jsonl")}, "shuffle": False,
        "max_length": spec["max_length"], "max_prompt_length": None,
        "lr_scheduler": None, "clip_grad_norm": None, "optimizer": _optimizer(spec),
        "pairs_per_step": spec["pairs_per_step"], "batch_size": spec["batch_size"],
    }  # fmt: skip
    if _is_bridged(spec):
        cfg["checkpointer"] = {"checkpoint_dir": str(folder / "base")}
        cfg["model"] = {"_component_": "pairtune.models.bridge.causal_lm", "path": str(folder / "base")}
    if spec["lr"]:
        cfg["lr_scheduler"] = {"_component_": "pairtune.schedules.cosine", "warmup_ratio": 0.0}
    if spec["method"] != "full":
        cfg["lora"] = {"rank": spec["rank"], "alpha": 2 * spec["rank"], "dropout": 0.0}
    if "cached" in flags:
        cfg["reference"] = {"name": "cached", "cache_dir": str(folder / "cache")}
    keys = {"compiled": "compile", "checkpointing": "enable_activation_checkpointing"}
    return cfg | {key: True for flag, key in keys.items() if flag in flags}


def _is_bridged(spec: dict) -> bool:
    return spec["real"] or "bridged" in spec["flags"]


def _optimizer(spec: dict) -> dict:
    fused = {"fused": True} if spec["device"] == "cuda" else {}
    return {"_component_": "torch.optim.AdamW", "lr": _rate(spec), "weight_decay": 0.0, **fused}


def _rate(spec: dict) -> float:
    return spec["lr"] or RATES[spec["method"]]


# torchtune's


def torchtune_rows(tokenizer, *, source):
    """The pairs as torchtune's DPO recipes read them; named as `dataset._component_` in the config."""
    rows = []
    for pair in map(json.loads, Path(source).read_text().splitlines()):
        prompt, *answers = work.read_ids(pair)
        row = {}
        for kind, answer in zip(("chosen", "rejected"), answers, strict=True):
            row[f"{kind}_input_ids"] = prompt + answer
            row[f"{kind}_labels"] = [-100] * len(prompt) + answer
        rows.append(row)
    return rows


class TorchtunePadding:
    """All that torchtune's recipe asks of a tokenizer here."""

    pad_id = 0


class DrawnWeights:
    """A checkpointer whose weights are drawn on the device: for a speed that no weight decides."""

    def __init__(self, sizes, dtype: str, device: str, should_load_recipe_state: bool = False):
        self._sizes, self._dtype, self._device = dict(sizes), dtype, device

    def load_checkpoint(self) -> dict:
        import torch
        from torchtune.models.llama3 import llama3

        kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[self._dtype]
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in llama3(**self._sizes).named_parameters()}
        drawn = {name: torch.ones(shape, dtype=kind, device=self._device) for name, shape in shapes.items()}
        for value in drawn.values():
            if value.ndim > 1:
                value.normal_(0, value.shape[1] ** -0.5)
        return {"model": drawn}


def torchtune(spec: dict) -> None:
    """The class of torchtune's recipe, set up and trained as its `tune run` does; full DPO is distributed only."""
    from pairtune.process import torchao_names  # what torchtune wants of torchao

    torchao_names.quiet()
    import torchtune
    from omegaconf import OmegaConf

    is_full = spec["method"] == "full"
    name = "full_dpo_distributed" if is_full else "lora_dpo_single_device"
    module = runpy.run_path(str(Path(torchtune.__file__).parents[1] / "recipes" / f"{name}.py"))
    if is_full:
        _alone(spec["device"])
    cfg = OmegaConf.create(torchtune_config(spec))
    recipe = module["FullDPORecipeDistributed" if is_full else "LoRADPORecipeSingleDevice"](cfg=cfg)
    recipe.setup(cfg=cfg)
    if not is_full and not spec["drawn"]:
        _fill_adapters(recipe._model, Path(spec["folder"]) / "adapter")
    recipe.train()


def torchtune_config(spec: dict) -> dict:
    folder, method = Path(spec["folder"]), spec["method"]
    weights = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(folder / "base"),
        "checkpoint_files": ["model.safetensors"], "model_type": "LLAMA3", "output_dir": str(folder / "torchtune"),
    }  # fmt: skip
    if spec["drawn"]:
        weights = {"_component_": "peers.DrawnWeights", "sizes": spec["sizes"]}
        weights |= {"dtype": spec["dtype"], "device": spec["device"]}
    adapters = {"lora_rank": spec["rank"], "lora_alpha": 2 * spec["rank"], "lora_attn_modules": ATTENTION}
    model = {"_component_": work.LLAMA, **spec["sizes"]}
    if method != "full":
        model |= {"_component_": "torchtune.models.llama3.lora_llama3", **adapters, "apply_lora_to_mlp": True}
        model |= {"quantize_base": method == "qlora"}
    return {
        "output_dir": str(folder / "torchtune"), "device": spec["device"], "dtype": spec["dtype"], "seed": 0,
        "model": model, "checkpointer": weights, "ref_checkpointer": weights,
        "tokenizer": {"_component_": "peers.TorchtunePadding"},
        "dataset": {"_component_": "peers.torchtune_rows", "source": str(folder / "pairs.jsonl")}, "shuffle": False,
        "loss": {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1}, "optimizer": _optimizer(spec),
        "lr_scheduler": None, "epochs": 1, "max_steps_per_epoch": None, "batch_size": spec["batch_size"],
        "gradient_accumulation_steps": spec["pairs_per_step"] // spec["batch_size"], "resume_from_checkpoint": False,
        "compile": "compiled" in spec["flags"], "enable_activation_checkpointing": "checkpointing" in spec["flags"],
        "log_every_n_steps": 1, "metric_logger": {"_component_": "loggers.Gate", **spec["gate"]},
    }  # fmt: skip


def _alone(device: str) -> None:
    """A world of one; on a CPU without what torchtune asks of a GPU there."""
    import torch
    from torchtune import training

    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    if device == "cpu":
        training.get_memory_stats = lambda device: {}
        training.log_memory_stats = lambda stats: None
        training.cleanup_before_training = lambda: None


def _fill_adapters(model, folder: Path) -> None:
    """Copies PEFT's adapters; B is zero, and A is the same in both layouts."""
    import torch
    from safetensors.torch import load_file

    ours = {"q_proj": "attn.q_proj", "k_proj": "attn.k_proj", "v_proj": "attn.v_proj", "o_proj": "attn.output_proj"}
    ours |= {"gate_proj": "mlp.w1", "up_proj": "mlp.w3", "down_proj": "mlp.w2"}
    parameters = {name.replace("._checkpoint_wrapped_module", "").replace("._orig_mod", ""): p
                  for name, p in model.named_parameters()}  # fmt: skip
    with torch.no_grad():
        for name, value in load_file(folder / "adapter_model.safetensors").items():
            words = name.split(".")
            layer, kind = words[words.index("layers") + 1], words[-2].lower()
            parameters[f"layers.{layer}.{ours[words[-3]]}.{kind}.weight"].copy_(value)


def _fill_bridged(model, folder: Path) -> None:
    """The same for transformers' classes, whose names PEFT's are made of."""
    import torch
    from safetensors.torch import load_file

    parameters = {name.replace("._checkpoint_wrapped_module", ""): p for name, p in model.named_parameters()}
    with torch.no_grad():
        for name, value in load_file(folder / "adapter_model.safetensors").items():
            ours = name.replace("base_model.model.", "lm.").replace("lora_A", "lora_a").replace("lora_B", "lora_b")
            parameters[ours].copy_(value)


# TRL's


def trl(spec: dict) -> None:
    """TRL's DPOTrainer; `completions` scores their tokens alone on a CPU, too; `liger` takes Liger's kernels."""
    sys.modules["torchao"] = None  # peft takes no torchao but its own, and none is needed
    import torch
    from datasets import Dataset
    from peft import LoraConfig, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer
    from trl.trainer import utils

    if "completions" in spec["flags"]:
        utils._use_triton = lambda device: True  # asked there for nothing but whether to take all positions
    folder = Path(spec["folder"])
    rows = list(map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()))
    is_full, gate = spec["method"] == "full", Gate(**spec["gate"])
    arguments = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=spec["batch_size"], num_train_epochs=1,
        gradient_accumulation_steps=spec["pairs_per_step"] // spec["batch_size"], learning_rate=_rate(spec),
        lr_scheduler_type="cosine" if spec["lr"] else "constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=0.0, logging_steps=1,
        bf16=spec["dtype"] == "bf16", use_cpu=spec["device"] == "cpu", report_to=[], save_strategy="no",
        gradient_checkpointing="checkpointing" in spec["flags"], dataloader_num_workers=0, disable_tqdm=True,
        max_length=spec["max_length"], beta=0.1,
        precompute_ref_log_probs="cached" in spec["flags"], use_liger_kernel="liger" in spec["flags"],
    )  # fmt: skip
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=spec["rank"], lora_alpha=2 * spec["rank"], target_modules=targets, task_type="CAUSAL_LM")

    class Trainer(DPOTrainer):
        """Its own steps, of which the loss is kept: what it logs is rounded."""

        losses: list = []

        def _get_train_sampler(self, *args, **kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append((loss[0] if isinstance(loss, tuple) else loss).detach())
            return loss

        def log(self, logs, *args, **kwargs):
            super().log(logs, *args, **kwargs)
            if "loss" in logs:
                kept, self.losses = torch.stack(self.losses), []
                gate.wait(float(kept.float().mean()))

    padding = {} if spec["real"] else {"pad_token": "</s>"}
    trainer = Trainer(
        model=_trl_model(spec), args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "base", **padding),
        peft_config=None if is_full else lora,
    )  # fmt: skip
    if not is_full and not spec["drawn"]:
        set_peft_model_state_dict(trainer.model, load_file(folder / "adapter" / "adapter_model.safetensors"))
    trainer.train()


def _trl_model(spec: dict):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base, kind = Path(spec["folder"]) / "base", {"bf16": torch.bfloat16, "fp32": torch.float32}[spec["dtype"]]
    if spec["drawn"]:
        with torch.device(spec["device"]):
            return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base), dtype=kind)
    quantized = {}
    if spec["method"] == "qlora":
        from transformers import BitsAndBytesConfig

        quantized = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
                     bnb_4bit_compute_dtype=kind, bnb_4bit_use_double_quant=True)}  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(base, dtype=kind, **quantized)


# What times and memory are compared with


def loaded(spec: dict) -> None:
    """The model in memory, and nothing else."""
    import pairtune  # noqa: F401  before torchtune, which may want names that torchao no longer has

    # isort: split

    from torchtune.models.llama3 import llama3

    model = _trl_model(spec) if spec["real"] else llama3(**spec["sizes"])
    Gate(**spec["gate"]).wait(float(len(list(model.parameters()))))


def matmul(spec: dict) -> None:
    """Operations a second of square matrix products, told in the place of a loss."""
    Gate(**spec["gate"]).wait(matmul_tflops(spec["device"]))


def matmul_tflops(device: str) -> float:
    """Returns what square products make, the best of rounds: bf16 at 8192 on a GPU, float32 at 1024 a CPU thread."""
    import torch

    on_gpu = device == "cuda"
    size, kind, count = (8192, torch.bfloat16, 20) if on_gpu else (1024, torch.float32, 4)
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    clock, best = time.perf_counter if on_gpu else time.process_time, float("inf")
    for _ in range(4):
        if on_gpu:
            torch.cuda.synchronize()
        start = clock()
        for _ in range(count):
            a @ b
        if on_gpu:
            torch.cuda.synchronize()
        best = min(best, (clock() - start) / count)
    return 2 * size**3 / best / 1e12


def die_with_parent() -> None:
    """Leaves no process behind where the one that started this is killed; on Linux."""
    import ctypes
    import signal

    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    die_with_parent()
    asked = json.loads(sys.argv[1])
    globals()[asked["system"]](asked)
