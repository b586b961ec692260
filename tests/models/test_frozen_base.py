"""Bases in 4 and 8 bits, of any size and in any number of parts, hold what they should, and are read seldom."""

import pytest
import torch
import torch._inductor.config
from helpers import NF4_SIZES, SIZES, random_pairs, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.dtypes.nf4tensor import to_nf4

from pairtune import models
from pairtune.models import frozen_base, nf4
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

ONE = World(torch.device("cpu"))
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "v_proj", "mlp"], "dtype": "fp32"}
ODD = SIZES | {"embed_dim": 72, "num_heads": 6, "num_kv_heads": 3, "intermediate_dim": 97}  # not a matrix divides


def packed(values, num_shards=1):
    with torch.device("meta"):
        return nf4.pack(values, nf4.empty(values.shape, values.dtype, num_shards))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_torchaos_bit_for_bit_however_many_processes_share_them(dtype):
    values = torch.randn(192, 256, generator=torch.Generator().manual_seed(0)).to(dtype)  # three rows of 16,384
    expected = to_nf4(values).get_original_weight()
    for num_shards, shape in ((1, (192, 256)), (3, (192, 256)), (2, (4, 16_384)), (7, (7, 16_384))):
        weight = packed(values, num_shards)
        assert weight.shape == shape
        assert torch.equal(nf4.dense(weight, values.shape), expected)


def test_the_one_kernel_of_gpus_makes_the_same_bits(monkeypatch):
    monkeypatch.setattr(nf4, "FUSED", {"cpu"})  # torch compiles it for a CPU as well
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.randn(192, 256, generator=torch.Generator().manual_seed(2)).to(dtype)
        found = nf4.dense(packed(values, 2), values.shape)
        assert torch.equal(found, to_nf4(values).get_original_weight())


def test_where_no_kernel_can_be_compiled_the_values_are_the_same_and_it_is_said(monkeypatch):
    monkeypatch.setattr(nf4, "FUSED", {"cpu"})
    values = torch.randn(192, 500, generator=torch.Generator().manual_seed(3))
    with (
        torch._inductor.config.patch({"force_disable_caches": True, "cpp.cxx": ("no-such-compiler",)}),
        pytest.warns(UserWarning, match="without a kernel of their own, more slowly: .*no-such-compiler"),
    ):
        found = nf4.dense(packed(values), values.shape)
    assert torch.equal(found, nf4.dense(packed(values), values.shape)) and not nf4.FUSED


def naive(values):
    """Returns double quantization as the paper has it, value by value in float64, and a value's nearest neighbours."""
    table = to_nf4(torch.zeros(1, 16_384)).nf4.double()
    flat = values.double().flatten()
    blocks = flat.split(64)
    largest = torch.stack([block.abs().max() for block in blocks])
    mean = largest.mean()
    scales = []
    for group in (largest - mean).split(256):
        step = group.abs().max() / 128
        scales += (group / step).round().clamp(-128, 127) * step + mean if step > 0 else [mean] * len(group)
    out = []
    for block, most, scale in zip(blocks, largest, scales, strict=True):
        nearest = (block[:, None] / most - table).abs().argmin(1)
        out.append(table[nearest] * scale)
    return torch.cat(out).view(values.shape)


@pytest.mark.parametrize("shape", [(64, 64), (96, 40), (9, 7), (577, 96)])
def test_a_weight_of_any_size_holds_the_papers_numbers_in_any_number_of_shards(shape):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    expected = naive(values)
    for num_shards in (1, 2, 5):
        weight = packed(values, num_shards)
        assert weight.shape[0] % num_shards == 0 and weight.shape[1] == 16_384
        torch.testing.assert_close(nf4.dense(weight, values.shape).double(), expected, rtol=1e-5, atol=1e-6)


LARGEST = {"int8": 127.0, "fp8": 448.0}


def naive_8_bits(values, base_dtype):
    """Returns each row's nearest multiples of its scale that there are in 8 bits, in float64."""
    scale = values.double().abs().amax(1, keepdim=True) / LARGEST[base_dtype]
    if base_dtype == "int8":
        numbers = torch.arange(-127, 128).double()
    else:
        numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
        numbers = numbers[numbers.isfinite()]
    nearest = ((values.double() / scale)[..., None] - numbers).abs().argmin(-1)
    return numbers[nearest] * scale


@pytest.mark.parametrize("base_dtype", LARGEST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8_bits_hold_a_rows_nearest_multiples_of_its_scale(base_dtype, dtype):
    values = torch.randn(37, 53, generator=torch.Generator().manual_seed(4)).to(dtype)
    values[5] = 0
    weight, scale = frozen_base.to_8_bits(values, frozen_base.EIGHT_BITS[base_dtype], dtype)
    assert weight.itemsize == 1 and scale.shape == (37,) and scale.dtype == dtype
    found = frozen_base.values(weight, scale, values.shape)
    assert found.dtype == dtype and not found[5].any()
    rows = [n for n in range(37) if n != 5]
    exact = naive_8_bits(values[rows], base_dtype)
    if dtype == torch.float32:
        torch.testing.assert_close(found[rows].double(), exact, rtol=1e-5, atol=1e-6)
    # In bf16 the scale is rounded, and numbers for it: no further from the weight than half a step and bf16's rounding.
    error = (found[rows].double() - values[rows].double()).abs()
    least = (exact - values[rows].double()).abs()
    assert error.mean() < 1.1 * least.mean()


def loaded(sizes, *, dora=False, checkpointing=False, base_dtype="nf4"):
    component = {"_component_": "torchtune.models.llama3.llama3", **sizes}
    model = models.lora(component, **LORA, use_dora=dora, quantize_base=True, base_dtype=base_dtype)
    models.prepare(model, max_length=128, checkpoint_activations=checkpointing)
    models.load(model, tiny_llama(**sizes).state_dict(), world=ONE)
    for _, module in models.adapted_modules(model):
        torch.nn.init.normal_(module.lora_b.weight, std=0.1)
        if dora:
            module.initialize_dora_magnitude()
    return model


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_whose_matrices_do_not_divide_is_trained_on_what_it_exports(dora):
    model, pairs = loaded(ODD, dora=dora), lay_out(random_pairs(3))
    frozen = [m for m in model.modules() if isinstance(m, frozen_base.FrozenLinear)]
    assert frozen and all(m.weight.shape != frozen_base.shape_of(m) for m in frozen)
    number = sum(p.numel() for p in tiny_llama(**ODD).parameters())
    assert models.num_parameters(model)[0] == number + models.num_parameters(model)[1]
    assert "21 of 21 weights filled up to whole blocks" in models.sizes(model)
    gathered = models.gather_weights(model, ONE)
    for name, value in tiny_llama(**ODD).state_dict().items():
        assert gathered[name].shape == value.shape
        if name.startswith("layers") and value.dim() == 2:
            torch.testing.assert_close(gathered[name].double(), naive(value), rtol=1e-5, atol=1e-6)
    plain = models.full({"_component_": "torchtune.models.llama3.llama3", **ODD}, dtype="fp32")
    models.prepare(plain, max_length=128)
    models.load(plain, models.merge_adapters(model, gathered), world=ONE)
    for found, expected in zip(answer_logps(model, pairs), answer_logps(plain, pairs), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("base_dtype", LARGEST)
def test_a_base_in_8_bits_exports_what_it_trains_on(base_dtype):
    model = loaded(ODD, base_dtype=base_dtype)
    number = sum(p.numel() for p in tiny_llama(**ODD).parameters())
    assert models.num_parameters(model)[0] == number + models.num_parameters(model)[1]
    assert models.sizes(model).endswith(f" in {base_dtype}")
    gathered = models.gather_weights(model, ONE)
    for name, value in tiny_llama(**ODD).state_dict().items():
        expected = value.double()
        if name.startswith("layers") and value.dim() == 2:
            expected = naive_8_bits(value, base_dtype)
        torch.testing.assert_close(gathered.pop(name).double(), expected, rtol=1e-5, atol=1e-6)
    assert gathered.keys() == {name for name, p in model.named_parameters() if p.requires_grad}


class Lookups(TorchDispatchMode):
    """Counts how often a weight's values are made: each time its bytes are looked up, multiplied or taken as fp8."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten, first = torch.ops.aten, args[0] if args else None
        if function is aten.index_select.default:
            self.count += first.numel() == 256
        elif function is aten.mul.Tensor:
            self.count += first.dtype == torch.int8
        elif function is aten.view.dtype:
            self.count += first.dtype == torch.uint8
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("base_dtype", ["nf4", *LARGEST])
@pytest.mark.parametrize(("dora", "checkpointing"), [(False, False), (True, False), (False, True), (True, True)])
def test_a_weights_values_are_made_once_a_layer_and_direction(base_dtype, dora, checkpointing):
    model = loaded(NF4_SIZES, dora=dora, checkpointing=checkpointing, base_dtype=base_dtype)
    weights = [name for name, p in model.named_parameters() if frozen_base.is_held(p)]
    assert len(weights) == 7 * 3
    with Lookups() as forward:
        chosen, rejected = answer_logps(model, lay_out(random_pairs(2)))
    assert forward.count == len(weights)
    with Lookups() as backward:
        (chosen - rejected).sum().backward()
    # Nothing before the first layer is trained: its queries, keys and values need no gradient of their input.
    assert backward.count == len(weights) - 3 + (len(weights) if checkpointing else 0)
    with Lookups() as reference, models.reference_of(model):
        answer_logps(model, lay_out(random_pairs(2)))
    assert reference.count == len(weights)


@pytest.mark.parametrize(("sizes", "base_dtype"), [(NF4_SIZES, "nf4"), (ODD, "nf4"), (ODD, "int8"), (ODD, "fp8")])
def test_gradients_are_those_of_the_dequantized_weights(sizes, base_dtype):
    model, pairs = loaded(sizes, base_dtype=base_dtype), lay_out(random_pairs(2))
    component = {"_component_": "torchtune.models.llama3.llama3", **sizes}
    plain = models.lora(component, **LORA)
    models.prepare(plain, max_length=128)
    models.load(plain, tiny_llama(**sizes).state_dict(), world=ONE)
    plain.load_state_dict(models.gather_weights(model, ONE))
    for m in (model, plain):
        chosen, rejected = answer_logps(m, pairs)
        (chosen - rejected).sum().backward()
    expected = dict(plain.named_parameters())
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 3 * 5 * 2
    for name, p in trained:
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-5, atol=1e-6, msg=name)
