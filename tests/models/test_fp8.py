"""Products in fp8: which layers', what they come to, and where they are refused."""

import pytest
import torch
import torch.nn.functional as F
from helpers import NF4_SIZES, random_pairs, tiny_llama
from torchao.float8.float8_linear import Float8Linear

from pairtune import models
from pairtune.errors import UserError
from pairtune.models import fp8
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj"]}


def built(**changes):
    return models.full({"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES, **changes}, dtype="bf16")


def loaded():
    model = built()
    models.fit(model, max_length=128)
    told = fp8.convert(model, CPU)
    models.load(model, tiny_llama(**NF4_SIZES).state_dict(), world=World(CPU))
    return model, told


def rounded(x):
    """To e4m3's 3 bits after the point, by a power of two a row that fills its range of 448."""
    scale = torch.exp2(torch.floor(torch.log2(448 / x.abs().amax(-1, keepdim=True).double())))
    return (x.double() * scale).to(torch.float8_e4m3fn).double() / scale


def test_a_product_is_that_of_numbers_rounded_token_by_token_and_row_by_row():
    model, _ = loaded()
    layer, x = model.layers[0].mlp.w1, torch.randn(5, NF4_SIZES["embed_dim"], dtype=torch.bfloat16)
    expected = rounded(x) @ rounded(layer.weight.detach()).T
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-2 * expected.std().item(), rtol=1e-2)
    assert not torch.allclose(layer(x), F.linear(x, layer.weight), atol=1e-2)
    with fp8.off(model):
        assert torch.equal(layer(x), F.linear(x, layer.weight))


def test_what_a_pair_comes_to_does_not_depend_on_the_pairs_beside_it():
    """With a scale for all tokens at a time it would, by 0.1 and more where one of them is large."""
    (model, _), pairs = loaded(), random_pairs(4)
    with torch.no_grad():
        model.tok_embeddings.weight[pairs[3].prompt[2]] *= 50
        together = torch.stack(answer_logps(model, lay_out(pairs[:1] + pairs[3:])))[:, 0]
        alone = torch.stack(answer_logps(model, lay_out(pairs[:1])))[:, 0]
    assert pairs[3].prompt[2] not in pairs[0].prompt + pairs[0].chosen + pairs[0].rejected
    torch.testing.assert_close(together, alone, atol=0.02, rtol=0)


def test_compiled_layers_round_with_gradients_as_without_them():
    """A policy and the reference that it starts from are two programs, and the first loss is ln 2."""
    model = built(num_layers=1)
    models.fit(model, max_length=128)
    fp8.convert(model, CPU)
    models.load(model, tiny_llama(**{**NF4_SIZES, "num_layers": 1}).state_dict(), world=World(CPU))
    batch = lay_out(random_pairs(4))
    with torch.no_grad():
        eager = torch.stack(answer_logps(model, batch))
    with torch._inductor.config.patch(emulate_precision_casts=False):  # which is put back behind the test
        models.execute(model, models.Execution("mask", compile=True))
        policy = torch.stack(answer_logps(model, batch))
        with torch.no_grad():
            reference = torch.stack(answer_logps(model, batch))
    torch.testing.assert_close(policy.detach(), reference, atol=1e-3, rtol=0)
    torch.testing.assert_close(policy.detach(), eager, atol=1e-2, rtol=0)


def test_layers_that_the_kernels_do_not_take_are_left_out_with_output_and_embedding():
    model, told = loaded()
    inside = sum(m.weight.numel() for layer in model.layers for m in layer.modules() if isinstance(m, Float8Linear))
    share = inside / sum(p.numel() for p in model.parameters())
    assert told == f"enable_fp8_training: products of {share:.0%} of the parameters in fp8, emulated: no faster\n"
    assert not isinstance(model.output, Float8Linear)
    assert "9 linear layers left out" in fp8.convert(built(num_layers=3, intermediate_dim=200), CPU)
    with pytest.raises(UserError, match="no linear layer here has sizes that are multiples of 16"):
        fp8.convert(built(embed_dim=40, num_heads=4, num_kv_heads=4), CPU)


@pytest.mark.parametrize(
    ("method", "dtype", "words"),
    [("full", "fp32", "nearest valid: dtype=bf16"), ("lora", "bf16", "base_dtype=fp8"), ("qlora", "bf16", "of full")],
)
def test_other_models_are_refused(method, dtype, words):
    component = {"_component_": "torchtune.models.llama3.llama3", **NF4_SIZES}
    with pytest.raises(UserError, match=words):
        fp8.convert(models.policy(method, component, LORA, dtype=dtype), CPU)
