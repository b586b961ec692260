"""Folders in Meta's and in torchtune's layout, which torchtune's own checkpointers read: runs from them, refusals."""

import json
import shutil

import hf_peers
import pytest
import torch
from helpers import NF4_SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs, save_tokenizer, tiny_llama
from safetensors.torch import load_file, save_file
from torchtune.models.convert_weights import tune_to_meta

from pairtune.cli.commands import main
from pairtune.errors import UserError
from pairtune.folders.weights import Weights, open_weights

CLASSES = {"meta": "FullModelMetaCheckpointer", "torchtune": "FullModelTorchTuneCheckpointer"}
PARAMS = {  # as of Llama 3
    "dim": 128, "n_layers": 3, "n_heads": 4, "n_kv_heads": 4, "vocab_size": 320, "multiple_of": 64,
    "ffn_dim_multiplier": 0.3, "norm_eps": 1e-5, "rope_theta": 10_000.0,
}  # fmt: skip
MODEL = {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}
MEASURED = ("loss", "grad_norm", "logps/chosen", "eval/loss", "eval/logps/chosen", "eval/logps/rejected")


def save_as(layout, folder):
    """Writes save_llama's weights in another layout, with its tokenizer and no config.json."""
    folder.mkdir()
    weights = tiny_llama(**NF4_SIZES).state_dict()
    if layout == "meta":
        torch.save(tune_to_meta(weights) | {"rope.freqs": torch.ones(16)}, folder / "consolidated.00.pth")
        (folder / "params.json").write_text(json.dumps(PARAMS))
    else:
        torch.save(weights, folder / "torchtune_model_0.pt")
        torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(1)}, folder / "adapter_model.pt")  # of its run
    save_tokenizer(folder, NF4_SIZES["vocab_size"])
    return folder


def block(layout, folder, **changes):
    component = f"torchtune.training.{CLASSES[layout]}"
    return {"_component_": component, "checkpoint_dir": str(folder), "model_type": "LLAMA3"} | changes


@pytest.fixture
def work(tmp_path):
    save_llama(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", random_pairs(8, seed=1))
    save_pairs(tmp_path / "held_out.jsonl", random_pairs(2, seed=2))
    rate = {"_component_": "torch.optim.AdamW", "lr": 1e-3}
    cfg = run_config(tmp_path, pairs_per_step=4, batch_size=2, optimizer=rate, samples={"num_prompts": 0})
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    return tmp_path


def run(work, method, *overrides, checkpointer=None):
    paths = [work / "config.yaml"]
    if checkpointer:
        paths.append(work / "checkpointer.yaml")
        paths[-1].write_text(json.dumps({"checkpointer": checkpointer}))
    return run_recipe(f"{method}_dpo_single_device", *overrides, config_paths=paths)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("layout", CLASSES)
def test_a_run_is_that_from_a_hugging_face_folder_and_its_export_loads_in_transformers(work, layout, method):
    expected = run(work, method, f"output_dir={work / 'hf'}")
    log = run(work, method, checkpointer=block(layout, save_as(layout, work / "other")))
    assert [[row.get(key) for key in MEASURED] for row in log] == [
        [row.get(key) for key in MEASURED] for row in expected
    ]
    weights, hf = (load_file(work / name / "export" / "model.safetensors") for name in ("run", "hf"))
    assert weights.keys() == hf.keys() and all(torch.equal(weights[name], hf[name]) for name in hf)
    if method != "qlora":  # its weights before they are merged are rounded otherwise
        with torch.no_grad():
            logps = hf_peers.peer_logps(hf_peers.load_peer(work / "run" / "export"), random_pairs(2, seed=2))
        (measured,) = [row["eval/logps/chosen"] for row in log if "eval/loss" in row]
        assert logps[:2].mean().item() == pytest.approx(measured, rel=1e-5)
    if method == "lora":
        adapted = hf_peers.load_peer(work / "base", work / "run" / "export" / "adapter")
        merged = adapted.merge_and_unload().state_dict()["model.layers.0.self_attn.q_proj.weight"]
        torch.testing.assert_close(merged, weights["model.layers.0.self_attn.q_proj.weight"])


def test_a_stopped_run_goes_on_and_other_weights_are_noticed(work):
    files = block("meta", save_as("meta", work / "other"))
    whole = run(work, "lora", checkpointer=files)
    shutil.rmtree(work / "run")
    run(work, "lora", "max_steps=1", "lr_scheduler=null", checkpointer=files)
    resumed = run(work, "lora", "resume=true", "lr_scheduler=null", checkpointer=files)
    assert [row["step"] for row in resumed if "loss" in row] == [row["step"] for row in whole if "loss" in row]
    weights = torch.load(work / "other" / "consolidated.00.pth")
    torch.save(weights | {"norm.weight": weights["norm.weight"] + 1}, work / "other" / "consolidated.00.pth")
    with pytest.raises(UserError, match="base weights: not the same in consolidated.00.pth"):
        run(work, "lora", "resume=true", "lr_scheduler=null", checkpointer=files)


@pytest.mark.parametrize("layout", CLASSES)
def test_validate_and_plan_know_such_folders(work, layout, capsys):
    (work / "checkpointer.yaml").write_text(
        json.dumps({"checkpointer": block(layout, save_as(layout, work / "other"))})
    )
    words = ["--config", str(work / "checkpointer.yaml")]
    assert main(["validate", str(work / "config.yaml"), *words, "--recipe", "lora_dpo_single_device"]) == 0
    assert "30 tensors, names and shapes as in the model" in capsys.readouterr().out
    assert main(["plan", str(work / "config.yaml"), *words, "--recipe", "lora_dpo_single_device"]) == 0
    assert "parameters" in capsys.readouterr().out


def test_a_config_json_that_is_there_is_compared_and_exported(work):
    folder = save_as("torchtune", work / "other")
    config = json.loads((work / "base" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 500_000.0}))
    with pytest.raises(UserError, match="rope_theta is 10000.0 in `model` and 500000.0 in config.json"):
        run(work, "lora", checkpointer=block("torchtune", folder))
    (folder / "config.json").write_text(json.dumps(config | {"of_its_own": 7}))
    run(work, "lora", checkpointer=block("torchtune", folder))
    assert json.loads((work / "run" / "export" / "config.json").read_text())["of_its_own"] == 7


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"dim": 4096}, "dim is 128 in `model` and 4096 in params.json"),
        ({"n_layers": 4}, "n_layers is 3 in `model` and 4 in params.json"),
        ({"n_heads": 8, "n_kv_heads": None}, "n_heads is 4 .* and 8 .*; n_kv_heads is 4 .* and 8 .*; head_dim is 32"),
        ({"vocab_size": 128_256}, "vocab_size is 320 in `model` and 128256 in params.json"),
        ({"ffn_dim_multiplier": None}, "hidden_dim is 128 in `model` and 384 in params.json"),
        ({"hidden_dim": 14_336}, "hidden_dim is 128 in `model` and 14336 in params.json"),
        ({"rope_theta": 500_000.0}, "rope_theta is 10000.0 in `model` and 500000.0 in params.json"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-05 in `model` and 1e-06 in params.json"),
        ({"use_scaled_rope": True}, "use_scaled_rope is false in `model` and true in params.json"),
        ({"dim": "wide"}, "params.json: dim='wide': must be"),
        ({"dim": None}, "params.json: dim: is missing"),
    ],
)
def test_a_model_that_params_json_contradicts_is_refused_before_a_weight_is_read(tmp_path, changes, said):
    folder = save_as("meta", tmp_path / "other")
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))
    (folder / "consolidated.00.pth").write_bytes(b"no weights")
    with pytest.raises(UserError, match=said):
        open_weights(block("meta", folder), MODEL)


@pytest.mark.parametrize("unsaid", [{"vocab_size": -1}, {"norm_eps": None}, {"multiple_of": None}])
def test_what_params_json_leaves_out_is_the_models(tmp_path, unsaid):
    folder = save_as("meta", tmp_path / "other")
    (folder / "params.json").write_text(json.dumps({k: v for k, v in (PARAMS | unsaid).items() if v is not None}))
    assert open_weights(block("meta", folder), MODEL).config["vocab_size"] == 320


def test_mistrals_own_file_tells_its_window(tmp_path):
    folder = save_as("meta", tmp_path / "other")
    (folder / "params.json").write_text(
        json.dumps(PARAMS | {"hidden_dim": 128, "head_dim": 32, "sliding_window": 4096})
    )
    component = {"_component_": "torchtune.models.mistral.mistral", **NF4_SIZES}
    config = open_weights(block("meta", folder, model_type="MISTRAL"), component).config
    assert config["model_type"] == "mistral" and config["sliding_window"] == 4096


def rewritten(folder, edit):
    path = folder / "consolidated.00.pth"
    torch.save(edit(torch.load(path)), path)


def without_output(weights):
    return {name: value for name, value in weights.items() if name != "output.weight"}


@pytest.mark.parametrize(
    "layout, spoil, changes, said",
    [
        ("meta", lambda f: (f / "consolidated.01.pth").touch(), {}, "in 2 parts.*Hugging Face layout"),
        ("meta", lambda f: (f / "consolidated.00.pth").rename(f / "a.pth"), {}, "no weights; looked for consolidated"),
        ("meta", lambda f: (f / "consolidated.00.pth").write_bytes(b"x"), {}, "FullModelMetaCheckpointer cannot read"),
        ("meta", lambda f: rewritten(f, lambda w: w | {"a.b": w["norm.weight"]}), {}, 'unexpected key: "a.b"'),
        ("meta", lambda f: rewritten(f, lambda w: w | {"norm.weight": w["norm.weight"].int()}), {}, "quantized"),
        ("meta", lambda f: None, {"model_type": "QWEN2"}, "model_type=QWEN2: FullModelMeta.* does not read it; take"),
        ("meta", lambda f: None, {"model_type": "LLAMA3_VISION"}, "must be one of LLAMA2"),
        ("meta", lambda f: rewritten(f, without_output), {"model_type": "LLAMA3_2"}, "it has no output.weight"),
        ("torchtune", lambda f: None, {"model_type": "QWEN3"}, "FullModelTorchTuneCheckpointer does not read it"),
        ("torchtune", lambda f: torch.save({}, f / "b.bin"), {}, "holds b.bin, torchtune_model_0.pt; say which one"),
        ("torchtune", lambda f: torch.save([], f / "torchtune_model_0.pt"), {}, "holds a list, not weights by name"),
        ("torchtune", lambda f: None, {"checkpoint_files": ["a.pt", "b.pt"]}, "reads one file, not 2"),
        ("torchtune", lambda f: None, {"checkpoint_files": ["a.pt"]}, "checkpoint_files: .* has no a.pt"),
        ("torchtune", lambda f: shutil.rmtree(f), {}, "no such folder"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_a_sentence(tmp_path, layout, spoil, changes, said):
    folder = save_as(layout, tmp_path / "other")
    spoil(folder)
    with pytest.raises(UserError, match=said) as error:
        Weights(open_weights(block(layout, folder, **changes), MODEL))
    assert "\n" not in str(error.value).strip()


def test_names_of_the_hub_in_torchtunes_layout_are_refused(tmp_path):
    save_llama(tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(UserError, match="30 tensors are no weights of checkpointer.model_type=LLAMA3"):
        Weights(open_weights(block("torchtune", tmp_path / "base"), MODEL))


def test_a_tied_output_layer_that_meta_stores_is_the_embedding_or_refused(tmp_path):
    """torchtune's class leaves Llama 3.2's out without a look."""
    weights = tiny_llama(tied=True, **NF4_SIZES).state_dict()
    sizes = {name: value for name, value in NF4_SIZES.items() if name != "rope_base"}
    component = {"_component_": "torchtune.models.llama3_2._component_builders.llama3_2", **sizes}
    for off in (0, 1):
        stored = weights | {"output.weight": weights["tok_embeddings.weight"] + off}
        torch.save(tune_to_meta(stored), tmp_path / "consolidated.00.pth")
        found = Weights(open_weights(block("meta", tmp_path, model_type="LLAMA3_2"), component))
        assert found.keys() == weights.keys()
        if off:
            with pytest.raises(UserError, match="differ, and are one weight as config.json has it"):
                dict(found)
        else:
            assert torch.equal(found["tok_embeddings.weight"], weights["tok_embeddings.weight"])


def test_a_named_file_is_read_and_safetensors_are_too(tmp_path):
    folder = save_as("torchtune", tmp_path / "other")
    weights = {name: value + 1 for name, value in tiny_llama(**NF4_SIZES).state_dict().items()}
    save_file(weights, folder / "later.safetensors")
    found = Weights(open_weights(block("torchtune", folder, checkpoint_files=["later.safetensors"]), MODEL))
    assert found.keys() == weights.keys() and torch.equal(found["norm.scale"], weights["norm.scale"])


def test_a_hugging_face_block_for_such_a_folder_names_the_class_that_reads_it(tmp_path):
    files = {"checkpoint_dir": str(save_as("meta", tmp_path / "other")), "model_type": "LLAMA3"}
    with pytest.raises(UserError, match="consolidated.00.pth is for checkpointer._component_=.*FullModelMetaCheck"):
        open_weights(files, MODEL)


def test_a_second_model_is_in_hugging_face_layout(work):
    folder = save_as("meta", work / "other")
    with pytest.raises(UserError, match="reference.checkpoint_dir=.*not a model in Hugging Face layout"):
        run(work, "lora", "reference=model", f"reference.checkpoint_dir={folder}")
    log = run(work, "lora", "reference=model", f"reference.checkpoint_dir={work / 'base'}",
              checkpointer=block("meta", folder))  # fmt: skip
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
