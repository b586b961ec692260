"""torchtune's own recipes with pairtune.folders.HFCheckpointer: what they load, save and resume from."""

import runpy
import subprocess
import sys
from pathlib import Path

import hf_peers
import pytest
import torch
import torchtune
from helpers import NF4_SIZES, SIZES, random_pairs, save_llama
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.training import FullModelHFCheckpointer

from pairtune.errors import UserError
from pairtune.folders import HFCheckpointer

OURS, THEIRS = "pairtune.folders.HFCheckpointer", "torchtune.training.FullModelHFCheckpointer"
LLAMA = {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}
LORA = {
    "_component_": "torchtune.models.llama3.lora_llama3", **NF4_SIZES,
    "lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 4, "lora_alpha": 8,
}  # fmt: skip


class Padding:
    """All that torchtune's recipes ask of a tokenizer when the rows are tokens already."""

    pad_id = 0


def pairs(tokenizer):
    """Rows of its DPO recipes."""
    rows = []
    for pair in random_pairs(4, seed=5):
        row = {}
        for kind in ("chosen", "rejected"):
            answer = getattr(pair, kind)
            row[f"{kind}_input_ids"] = pair.prompt + answer
            row[f"{kind}_labels"] = [-100] * len(pair.prompt) + answer
        rows.append(row)
    return rows


def conversations(tokenizer):
    """Rows of its recipes for fine-tuning."""
    return [
        {"tokens": row.prompt + row.chosen, "labels": [-100] * len(row.prompt) + row.chosen}
        for row in random_pairs(4, seed=5)
    ]


def train(work, recipe, model, checkpointer=OURS, *, run="run", rows="pairs", loss, **changes):
    """Runs two epochs of two steps of a recipe of torchtune's; returns the folder that it wrote."""
    files = {"checkpoint_dir": str(work / "base"), "model_type": "LLAMA3", "output_dir": str(work / run)}
    if checkpointer == THEIRS:
        files["checkpoint_files"] = ["model.safetensors"]
    cfg = {
        "output_dir": str(work / run), "device": "cpu", "dtype": "fp32", "seed": 3, "compile": False, "model": model,
        "checkpointer": {"_component_": checkpointer, **files} | changes.pop("files", {}),
        "tokenizer": {"_component_": f"{__name__}.Padding"}, "dataset": {"_component_": f"{__name__}.{rows}"},
        "loss": loss, "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-1}, "epochs": 2, "batch_size": 2,
        "lr_scheduler": None, "max_steps_per_epoch": None, "gradient_accumulation_steps": 1, "shuffle": False,
        "resume_from_checkpoint": False, "enable_activation_checkpointing": False, "log_every_n_steps": 1,
        "optimizer_in_bwd": False, "save_adapter_weights_only": False,
        "metric_logger": {
            "_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(work / "log"),
        },
    } | changes  # fmt: skip
    module = runpy.run_path(str(Path(torchtune.__file__).parents[1] / "recipes" / f"{recipe}.py"))
    (made,) = [made for name, made in module.items() if name.endswith("RecipeSingleDevice")]
    cfg = OmegaConf.create(cfg)
    made = made(cfg=cfg)
    made.setup(cfg=cfg)
    made.train()
    made.cleanup()
    return work / run


def dpo(work, checkpointer=OURS, **changes):
    loss = {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.1}
    return train(work, "lora_dpo_single_device", LORA, checkpointer, loss=loss, **changes)


def finetune(work, model=LLAMA, checkpointer=OURS, **changes):
    loss = {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss"}
    recipe = "full_finetune_single_device"
    return train(work, recipe, model, checkpointer, rows="conversations", loss=loss, **changes)


@pytest.fixture
def work(tmp_path):
    save_llama(tmp_path / "base")
    return tmp_path


def same(one, other):
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_gives_and_saves_what_torchtunes_own_does(work):
    ours, theirs = finetune(work), finetune(work, checkpointer=THEIRS, run="theirs")
    assert same(ours / "epoch_1/model.safetensors", theirs / "epoch_1/model-00001-of-00001.safetensors")
    assert not same(ours / "epoch_1/model.safetensors", work / "base/model.safetensors")
    block = {"checkpoint_dir": str(work / "base"), "model_type": "LLAMA3"}
    loaded = FullModelHFCheckpointer(checkpoint_files=["model.safetensors"], output_dir=work / "o", **block)
    expected = loaded.load_checkpoint()["model"]
    found = HFCheckpointer(output_dir=work / "o", **block).load_checkpoint()["model"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_lora_run_leaves_merged_weights_for_transformers_and_an_adapter_for_peft(work):
    saved = dpo(work, epochs=1) / "epoch_0"  # on a CPU, torchtune's recipe merges into the weights that it trains on
    with torch.no_grad():
        merged = hf_peers.peer_logps(hf_peers.load_peer(saved), random_pairs(2))
        adapted = hf_peers.peer_logps(hf_peers.load_peer(work / "base", saved / "adapter"), random_pairs(2))
        base = hf_peers.peer_logps(hf_peers.load_peer(work / "base"), random_pairs(2))
    torch.testing.assert_close(merged, adapted, rtol=1e-5, atol=0)
    assert (merged - base).abs().max() > 1e-3


def test_a_run_goes_on_from_the_epoch_that_the_recipes_state_is_of(work):
    """torchtune's own takes the newest adapter: here that of epoch 1, which would then be trained once more."""
    saved = dpo(work, save_adapter_weights_only=True)
    whole = torch.load(saved / "epoch_1/adapter_model.pt")
    dpo(work, save_adapter_weights_only=True, resume_from_checkpoint=True)
    again, earlier = (torch.load(saved / f"epoch_{epoch}/adapter_model.pt") for epoch in (1, 0))
    assert whole.keys() == again.keys() == earlier.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert not all(torch.equal(earlier[name], whole[name]) for name in whole)


def test_of_a_full_run_that_goes_on_the_weights_are_the_epochs(work):
    saved = finetune(work)
    block = {"checkpoint_dir": str(work / "base"), "model_type": "LLAMA3", "output_dir": str(saved)}
    found = HFCheckpointer(**block, should_load_recipe_state=True).load_checkpoint()
    assert found["epochs_run"] == 1 and "optimizer" in found
    expected = HFCheckpointer(**block | {"checkpoint_dir": str(saved / "epoch_0"), "output_dir": work / "o"})
    expected = expected.load_checkpoint()["model"]
    assert all(torch.equal(found["model"][name], expected[name]) for name in expected)


def test_a_family_that_torchtune_does_not_know_trains_in_its_recipe(tmp_path):
    from transformers import Qwen3Config

    sizes = {"vocab_size": 320, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 128}
    peer = hf_peers.save_peer(tmp_path / "base", Qwen3Config(**sizes, tie_word_embeddings=False))
    model = {**SIZES, "num_layers": 2, "head_dim": 32, "tie_word_embeddings": False, "norm_eps": 1e-6}
    model |= {"_component_": "pairtune.qwen3.qwen3"}
    saved = finetune(tmp_path, model, files={"model_type": "QWEN3"}) / "epoch_1"
    with torch.no_grad():
        before, after = (hf_peers.peer_logps(p, random_pairs(2)) for p in (peer, hf_peers.load_peer(saved)))
    assert (after - before).abs().max() > 1e-3


def test_pickles_and_adapters_alone_are_saved_where_asked_for(work):
    block = {"checkpoint_dir": str(work / "base"), "model_type": "LLAMA3", "output_dir": str(work / "out")}
    made = HFCheckpointer(**block, safe_serialization=False)
    weights = made.load_checkpoint()["model"]
    made.save_checkpoint({"model": weights}, epoch=0)
    assert (work / "out/epoch_0/pytorch_model.bin").is_file() and not (work / "out/recipe_state").exists()
    state = {"adapter": {"layers.0.attn.q_proj.lora_a.weight": torch.ones(4, 128)}, "epochs_run": 2}
    made.save_checkpoint(state, epoch=1, intermediate_checkpoint=True, adapter_only=True)
    files = {path.name for path in (work / "out/epoch_1").iterdir()}
    assert files == {"adapter_model.pt", "tokenizer.json", "tokenizer_config.json"}
    assert torch.load(work / "out/recipe_state/recipe_state.pt") == {"epochs_run": 2}
    with pytest.raises(UserError, match="adapter_only=True, and state_dict has no adapter"):
        made.save_checkpoint({"model": weights}, epoch=2, adapter_only=True)


def test_what_does_not_belong_together_is_refused_as_in_our_recipes(work):
    block = {"checkpoint_dir": str(work / "base"), "output_dir": str(work / "out")}
    with pytest.raises(UserError, match="config.json says model_type=llama"):
        HFCheckpointer(**block, model_type="QWEN2")
    with pytest.raises(ValueError, match="subdirectory of the checkpoint directory"):
        HFCheckpointer(**block | {"output_dir": str(work / "base/out")}, model_type="LLAMA3")


def test_names_of_files_need_no_torch():
    code = "import sys; import pairtune.config.layout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
