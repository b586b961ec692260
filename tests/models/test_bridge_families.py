"""Twelve families of transformers from a folder to an export, by every method: by one process and by two; resumed."""

import json
import re
import runpy
import shutil
from pathlib import Path

import hf_peers
import pytest
import torch
from helpers import ROOT, from_first_step, random_pairs, run_recipe, save_tokenizer, start_two
from safetensors.torch import load_file
from test_bridge import APART, DENSE, SIZES, component
from test_bridge_experts import MIXTURES, check_plan

METHODS = ("lora", "full", "qlora")
MORE = {
    "Gemma4Text": {
        "head_dim": 16, "global_head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 16, "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "Mistral3": {
        "text_config": {"model_type": "ministral3", "head_dim": 16} | SIZES,
        "vision_config": {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                          "num_attention_heads": 2, "head_dim": 16, "image_size": 28, "patch_size": 14},
    },
    "Qwen3_5": {
        "text_config": {"model_type": "qwen3_5_text"} | SIZES | APART["Qwen3_5Text"],
        "vision_config": {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
                          "out_hidden_size": 64, "num_position_embeddings": 16},
    },
}  # fmt: skip
FAMILIES = {
    name: (DENSE | APART | MIXTURES | MORE)[name]
    for name in (
        *("Qwen3Moe", "Qwen3_5", "Gemma3Text", "Gemma4Text", "GptOss", "Olmo3"),
        *("SmolLM3", "Mistral3", "Glm4", "DeepseekV2", "Lfm2", "FalconH1"),
    )
}
TOWER = re.compile("vision_tower|visual|multi_modal_projector|vision_model")
ROTATING = [*zip(FAMILIES, METHODS * 4, strict=True)]  # what is tried with one method a family


def config_of(name):
    import transformers

    is_shell = "text_config" in FAMILIES[name]
    return getattr(transformers, f"{name}Config")(**({} if is_shell else SIZES) | FAMILIES[name])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of each family: its base, a config, and a run by two processes; one start makes them all."""
    root, runs = tmp_path_factory.mktemp("families"), []
    for name, method in ROTATING:
        hf_peers.save_peer(root / name / "base", config_of(name))
        lora = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}
        more = {"lora": lora, "keep_last_n": 0, "samples": {"num_prompts": 0}, "merge_into": "dequantized"}
        hf_peers.write_config(root / name, component(root / name / "base"), "AUTO", **more)
        words = [f"output_dir={root / name / method / 'two'}"]
        runs.append([f"{method}_dpo_distributed", str(root / name / "config.yaml"), words])
    start_two(Path(__file__).parents[1] / "recipes" / "recipe_worker.py", json.dumps(runs))
    return root


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_exports_compute_what_a_run_last_measured(root, name, method):
    """Weights in transformers, adapters in PEFT; two processes log and export the same."""
    folder = root / name / method
    log = run_recipe(
        f"{method}_dpo_single_device", f"output_dir={folder / 'one'}", config_paths=[root / name / "config.yaml"]
    )
    assert [row["step"] for row in log if "loss" in row] == [1, 2]
    weights = load_file(folder / "one" / "export" / "model.safetensors")
    measured = torch.tensor([log[-1]["eval/logps/chosen"], log[-1]["eval/logps/rejected"]])
    peers = {"weights": hf_peers.load_peer(folder / "one" / "export")}
    if method == "lora":  # a QLoRA adapter belongs to the 4-bit base
        peers["adapter"] = hf_peers.load_peer(root / name / "base", folder / "one" / "export" / "adapter")
    for part, peer in peers.items():
        with torch.no_grad():
            chosen, rejected = hf_peers.peer_logps(peer, random_pairs(2, seed=2)).chunk(2)
        torch.testing.assert_close(torch.stack([chosen.mean(), rejected.mean()]), measured, rtol=1e-5, atol=0, msg=part)
    started = load_file(root / name / "base" / "model.safetensors")
    assert weights.keys() == started.keys()
    assert any(not torch.equal(weights[key], started[key]) for key in started)
    assert all(torch.equal(weights[key], started[key]) for key in started if TOWER.search(key))
    if (folder / "two").exists():
        for one, other in zip(log, from_first_step(folder / "two" / "metrics.jsonl"), strict=True):
            for key in one.keys() & {"loss", "grad_norm", "logps/chosen", "eval/loss", "eval/logps/rejected"}:
                torch.testing.assert_close(other[key], one[key], rtol=1e-4, atol=1e-5, msg=key)
        of_two = load_file(folder / "two" / "export" / "model.safetensors")
        for key, value in weights.items():
            torch.testing.assert_close(of_two[key], value, rtol=0, atol=1e-3, msg=key)


@pytest.mark.parametrize(("name", "method"), ROTATING)
def test_a_run_goes_on_bit_for_bit(root, name, method):
    run, recipe = root / name / "resumed", f"{method}_dpo_single_device"
    how = (f"output_dir={run}", "save_every_n_steps=1", "keep_last_n=2", "resume=auto")
    run_recipe(recipe, *how, config_paths=[root / name / "config.yaml"])
    straight = load_file(run / "export" / "model.safetensors")
    shutil.rmtree(run / "export")
    shutil.rmtree(run / "checkpoints" / "step_2")
    run_recipe(recipe, *how, config_paths=[root / name / "config.yaml"])
    again = load_file(run / "export" / "model.safetensors")
    assert again.keys() == straight.keys() and all(torch.equal(again[key], straight[key]) for key in straight)


@pytest.mark.parametrize(("name", "method"), ROTATING)
def test_what_is_planned_is_what_a_step_allocates(name, method, tmp_path):
    check_plan(tmp_path, config_of(name), method)


@pytest.mark.parametrize(("name", "method", "dtype"), [("gemma3", "full", "bf16"), ("llama4", "lora", "fp32")])
def test_what_a_model_has_for_images_is_exported_as_it_was(name, method, dtype, tmp_path):
    """To the byte, in a run of another dtype, too: pairs of texts leave it alone, and so do adapters.

    Small configurations are the sweep's.
    """
    sweep = runpy.run_path(str(ROOT / "tools" / "sweep_transformers.py"))
    sweep["SMALL"]["vocab_size"] = 320
    sweep["save"](name, tmp_path / "base").bfloat16().save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base", 320)
    lora = {"rank": 4, "alpha": 8.0, "modules": ["all-linear"]}
    more = {"lora": lora, "samples": {"num_prompts": 0}, "dtype": dtype}
    hf_peers.write_config(tmp_path, {"_component_": "auto"}, "AUTO", **more)
    run_recipe(f"{method}_dpo_single_device", config_paths=[tmp_path / "config.yaml"])
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("base", "run/export"))
    seen = [key for key in before if TOWER.search(key)]
    assert before.keys() == after.keys() and len(seen) > 50
    assert all(before[key].dtype == after[key].dtype and torch.equal(before[key], after[key]) for key in seen)
    assert any(not torch.equal(before[key], after[key]) for key in before if "language_model" in key)
    if method == "lora":
        adapter = load_file(tmp_path / "run" / "export" / "adapter" / "adapter_model.safetensors")
        assert adapter and not any(TOWER.search(key) for key in adapter)
