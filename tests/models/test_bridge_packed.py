"""Folders in 4 and 8 bits are read as the numbers that their bits stand for, trained, and exported as whole weights."""

import json

import hf_peers
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_bridge_experts import LORA, component, opened, save

from pairtune import models
from pairtune.errors import UserError
from pairtune.folders import weights as checkpoint

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # OCP Microscaling, 5.3.3
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 40]}


def rewrite(folder, change, **settings):
    """Puts what `change` makes of the folder's tensors in their place, and settings into its config.json."""
    tensors = change(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def to_mxfp4(tensors):
    """Random bits for experts' matrices, and the numbers that they stand for, by hand."""
    torch.manual_seed(0)
    stored, meant = {}, {}
    for name, value in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = meant[name] = value.bfloat16()
            continue
        experts, rows, columns = value.shape
        codes = torch.randint(16, (experts, columns, rows // 32, 32))
        exponents = torch.randint(120, 126, codes.shape[:3])
        stored[f"{name}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{name}_scales"] = exponents.to(torch.uint8)
        numbers = E2M1[codes] * torch.exp2(exponents.float() - 127)[..., None]
        meant[name] = numbers.flatten(2).transpose(1, 2).bfloat16().contiguous()
    return stored, meant


def to_fp8(tensors, block):
    """e4m3 of each block over its scale, of matrices that are no whole blocks; or of each matrix over one."""
    stored, meant = {}, {}
    for name, value in tensors.items():
        if value.dim() != 2 or "embed" in name or "lm_head" in name or "mlp.gate." in name:
            stored[name] = meant[name] = value.bfloat16()
            continue
        if block is None:
            scale = whole = value.abs().max() / 448
            stored[name.replace(".weight", ".activation_scale")] = torch.ones(())
        else:
            tiles = [[tile.abs().max() / 448 for tile in row.split(block[1], 1)] for row in value.split(block[0], 0)]
            scale = torch.tensor(tiles)
            whole = torch.empty_like(value)
            for i, row in enumerate(scale):
                for j, number in enumerate(row):
                    whole[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]] = number
        stored[name] = (value / whole).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = stored[name].float() * whole
    return stored, meant


def saved(tmp_path, name, pack, quantization):
    """A folder in fewer bits, and one of what its bits stand for."""
    for kind in (0, 1):
        folder = tmp_path / ("base", "meant")[kind]
        save(folder, name)
        settings = {} if kind else {"quantization_config": quantization}
        rewrite(folder, lambda tensors, kind=kind: pack(tensors)[kind], **settings)
    return opened(tmp_path / "base")


CASES = {
    "gpt-oss in MXFP4": ("GptOss", to_mxfp4, MXFP4),
    "Qwen 3 MoE in FP8, by blocks": ("Qwen3Moe", lambda t: to_fp8(t, (32, 40)), FP8),
    "Qwen 3 MoE in FP8, by matrix": ("Qwen3Moe", lambda t: to_fp8(t, None), FP8 | {"weight_block_size": None}),
}


@pytest.mark.parametrize(("name", "pack", "quantization"), CASES.values(), ids=CASES)
def test_bits_are_read_as_what_they_stand_for(name, pack, quantization, tmp_path):
    files = saved(tmp_path, name, pack, quantization)
    found, meant = checkpoint.Weights(files), checkpoint.Weights(opened(tmp_path / "meant"))
    assert set(found) == set(meant)
    for key in meant:
        assert found.empty[key].shape == meant[key].shape
        assert torch.equal(found[key].float(), meant[key].float()), key
    (said,) = checkpoint.advice(files, "bf16", 64)
    assert "which training cannot change; they are read into bf16, trained and exported so" in said


@pytest.mark.parametrize("name", ["gpt-oss in MXFP4", "Qwen 3 MoE in FP8, by blocks"])
def test_a_run_exports_whole_weights_that_transformers_loads(name, tmp_path):
    saved(tmp_path, *CASES[name])
    hf_peers.write_config(tmp_path, component(tmp_path / "base"), "AUTO", lora=LORA)
    (tmp_path / "packed").mkdir()
    (tmp_path / "base").rename(tmp_path / "packed" / "base")
    (tmp_path / "meant").rename(tmp_path / "base")  # which PEFT and transformers start from
    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace(f"{tmp_path}/base", f"{tmp_path}/packed/base"))
    hf_peers.check_run(tmp_path, "lora")
    assert "quantization_config" not in json.loads((tmp_path / "run" / "export" / "config.json").read_text())


def test_bits_of_another_kind_or_without_their_scales_are_refused(tmp_path):
    files = saved(tmp_path, *CASES["Qwen 3 MoE in FP8, by blocks"])
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    for change, said in (
        (lambda t: {k: v for k, v in t.items() if k != name}, f"{name}, its scales, are not there"),
        (lambda t: t | {name: torch.ones(3, 3)}, r"q_proj.weight: scales are \[3, 3\], and \[2, 2\] are its blocks"),
    ):
        kept = load_file(files.path / "model.safetensors")
        rewrite(files.path, change)
        with pytest.raises(UserError, match=said):
            checkpoint.Weights(files)
        rewrite(files.path, lambda _, kept=kept: kept)
    for other in ({"quant_method": "gptq", "bits": 4}, FP8 | {"fmt": "e5m2"}, FP8 | {"weight_block_size": 128}):
        rewrite(files.path, lambda t: t, quantization_config=other)
        with pytest.raises(UserError, match="the weights are quantized, which training cannot undo"):
            models.full(component(files.path), dtype="fp32")
