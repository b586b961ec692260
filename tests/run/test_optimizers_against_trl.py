"""A full run is TRL's own trainer's, step by step: weight decay, clipping and a cosine schedule with warm-up."""

import json
import os

import pytest
import torch
from helpers import NF4_SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]' -c constraints.txt")

STEPS, WARMUP, PAIRS = 10, 2, 4  # in all, of rising rates, a step
LR, DECAY, CLIP = 2e-3, 0.1, 0.5


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The folder of a model and of 40 pairs, and what TRL logs of each step on them."""
    from datasets import load_dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    class InOrder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def compute_loss(self, *args, **kwargs):
            found = super().compute_loss(*args, **kwargs)
            losses.append((found[0] if isinstance(found, tuple) else found).item())  # the log rounds it
            return found

    folder, losses = tmp_path_factory.mktemp("trl"), []
    save_llama(folder / "base", sizes=NF4_SIZES)
    save_pairs(folder / "train.jsonl", random_pairs(STEPS * PAIRS, seed=1, shared=(0, 0)))
    settings = DPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=PAIRS, max_steps=STEPS, learning_rate=LR,
        lr_scheduler_type="cosine", warmup_steps=WARMUP, weight_decay=DECAY, max_grad_norm=CLIP, logging_steps=1,
        beta=0.1, max_length=128, bf16=False, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, seed=0,
    )  # fmt: skip
    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32, attn_implementation="eager")
        for _ in range(2)
    )
    pairs = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train", cache_dir=str(folder))
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    trainer = InOrder(model, reference, args=settings, processing_class=tokenizer, train_dataset=pairs)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "rewards/chosen" in row]
    return folder, [row | {"loss": loss} for row, loss in zip(rows, losses, strict=True)]


def ours(folder, *overrides):
    schedule = {
        "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup", "num_warmup_steps": WARMUP
    }  # fmt: skip
    cfg = run_config(
        folder,
        optimizer={"_component_": "torch.optim.AdamW", "lr": LR, "weight_decay": DECAY},
        **{"lr_scheduler": schedule, "clip_grad_norm": CLIP, "pairs_per_step": PAIRS, "batch_size": PAIRS},
        **{"shuffle": False, "max_length": 128, "eval_dataset": {}, "samples": {"num_prompts": 0}, "keep_last_n": 0},
    )
    (folder / "config.yaml").write_text(json.dumps(cfg))
    return [
        r
        for r in run_recipe("full_dpo_single_device", *overrides, config_paths=[folder / "config.yaml"])
        if "loss" in r
    ]


def farthest(log, theirs):
    """The largest difference in any step's loss or rewards."""
    keys = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins")
    return max(abs(a[key] - b[key]) for a, b in zip(log, theirs, strict=True) for key in keys)


def test_ten_steps_are_trls(theirs):
    folder, expected = theirs
    log = ours(folder)
    assert max(row["grad_norm"] for row in log) > CLIP and log[-1]["loss"] < 0.62  # clipped, and on the move
    assert farthest(log, expected) < 1e-5
    for row, wanted in zip(log, expected, strict=True):
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        assert row["lr"] == pytest.approx(wanted["learning_rate"], rel=1e-6)


def test_decayed_norms_alone_lead_elsewhere(theirs):
    folder, expected = theirs
    assert farthest(ours(folder, "decay_norms_and_biases=true"), expected) > 2e-5
