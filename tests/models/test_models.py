"""Full, LoRA and QLoRA models hold the weights they were given, adapt what they say, and merge to what they compute."""

import weakref
from collections import Counter

import pytest
import torch
from helpers import NF4_SIZES, SIZES, random_pairs, tiny_llama
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune.modules import FeedForward
from torchtune.modules.peft import LoRALinear, disable_adapter

from pairtune import models
from pairtune.errors import UserError
from pairtune.models import offloading, pieces
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World

ONE = World(torch.device("cpu"))
LLAMA3, TIED = "torchtune.models.llama3", "torchtune.models.llama3_2.llama3_2_1b"
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "modules": ["q_proj", "v_proj", "mlp"], "dtype": "fp32"}


def component(sizes=SIZES):
    return {"_component_": "torchtune.models.llama3.llama3", **sizes}


def loaded(method, *, sizes=SIZES, seed=0, **changes):
    """A prepared model with the weights of tiny_llama(seed), its adapters' B matrices away from zero."""
    if method == "full":
        model = models.full(component(sizes), dtype="fp32")
    else:
        model = models.lora(component(sizes), **LORA | changes, quantize_base=method == "qlora")
    models.prepare(model, max_length=128)
    models.load(model, tiny_llama(seed=seed, **sizes).state_dict(), world=ONE)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.lora_b.weight, std=0.1)
    return model


def plain_values(model):
    values = {name: p.data for name, p in model.named_parameters()}
    return {n: v.get_original_weight() if isinstance(v, NF4Tensor) else v.clone() for n, v in values.items()}


def scores(model, pairs):
    with torch.no_grad():
        return torch.cat(answer_logps(model, lay_out(pairs)))


def test_only_adapters_are_trained():
    model = loaded("lora")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_" in name}
    assert len(trained) == 3 * 5 * 2  # layers, adapted matrices, A and B
    assert all(p.requires_grad for p in loaded("full").parameters())


class Draws(TorchDispatchMode):
    """Notes what is drawn by chance, and on which device."""

    def __init__(self):
        super().__init__()
        self.values, self.devices = [], set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in operation.tags:
            self.devices.add(result.device.type)
            self.values.append(result.clone())
        return result


@pytest.mark.parametrize("options", [{}, {"dtype": "bf16"}, {"use_dora": True}, {"quantize_base": True}])
def test_fresh_adapters_are_drawn_on_the_cpu_whatever_the_runs_device(options):
    """As they are there, bit for bit; meta stands for another device: what is drawn on it is drawn nowhere."""
    sizes, drawn = NF4_SIZES, {}
    weights = tiny_llama(**sizes).state_dict()
    for device in ("cpu", "meta"):
        model = models.lora(component(sizes), **LORA | options)
        models.prepare(model, max_length=128)
        torch.manual_seed(7)
        with Draws() as draws:
            models.load(model, weights, world=World(torch.device(device)))
        assert draws.devices == {"cpu"}
        drawn[device] = draws.values
        if device == "cpu":
            adapters = [p for name, p in model.named_parameters() if name.endswith("lora_a.weight")]
    assert len(drawn["cpu"]) == len(adapters) and all(map(torch.equal, drawn["cpu"], adapters))
    assert all(map(torch.equal, drawn["meta"], adapters))


def test_adapters_off_is_the_base_bit_for_bit():
    pairs, model = random_pairs(3), loaded("lora")
    with disable_adapter(model):
        off = scores(model, pairs)
    assert torch.equal(off, scores(loaded("full"), pairs))
    assert not torch.equal(off, scores(model, pairs))


def test_fresh_adapters_change_nothing():
    pairs, model = random_pairs(3), models.lora(component(), **LORA)
    models.prepare(model, max_length=128)
    models.load(model, tiny_llama().state_dict(), world=ONE)
    assert torch.equal(scores(model, pairs), scores(loaded("full"), pairs))
    assert all(m.lora_a.weight.abs().max() > 0 for m in model.modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_reference_values_kept_from_before_training_equal_live_ones_after_it(method):
    """What a cache would hold, one pair at a time, against the reference of the trained model, all pairs in one row."""
    model, pairs = loaded(method, sizes=NF4_SIZES), random_pairs(4)
    with models.reference_of(model):
        kept = torch.stack([scores(model, [pair]) for pair in pairs]).T.flatten()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        chosen, rejected = answer_logps(model, lay_out(pairs))
        (rejected - chosen).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with models.reference_of(model):
        live = scores(model, pairs)
    torch.testing.assert_close(live, kept, atol=1e-4, rtol=0)
    assert (scores(model, pairs) - live).abs().max() > 1  # the policy moved


def test_the_reference_has_no_dropout_and_no_gradients():
    model, pairs = loaded("lora", dropout=0.5).train(), random_pairs(2)
    with models.reference_of(model):
        chosen, _ = answer_logps(model, lay_out(pairs))
        assert not chosen.requires_grad
        assert torch.equal(scores(model, pairs), scores(loaded("full"), pairs))
    assert model.training
    assert not torch.equal(scores(model, pairs), scores(model, pairs))


def test_a_quantized_base_is_torchaos_nf4_of_the_weights():
    model, weights = loaded("qlora", sizes=NF4_SIZES), tiny_llama(**NF4_SIZES).state_dict()
    quantized = {n: p.data for n, p in model.named_parameters() if isinstance(p.data, NF4Tensor)}
    assert len(quantized) == 3 * 7
    for name, value in quantized.items():
        assert torch.equal(value.get_original_weight(), to_nf4(weights[name]).get_original_weight())


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_merged_weights_compute_what_the_adapted_model_computes(method, checkpointing):
    model = loaded(method, sizes=NF4_SIZES)
    if checkpointing:
        models.prepare(model, max_length=128, checkpoint_activations=True)
    before = plain_values(model)
    merged = models.merge_adapters(model, models.gather_weights(model, ONE))
    assert merged.keys() == tiny_llama(**NF4_SIZES).state_dict().keys()
    plain = models.full(component(NF4_SIZES), dtype="fp32")
    models.prepare(plain, max_length=128)
    models.load(plain, merged, world=ONE)
    pairs = random_pairs(3)
    torch.testing.assert_close(scores(plain, pairs), scores(model, pairs), atol=1e-4, rtol=0)
    for name, value in plain_values(model).items():  # merging is not in place
        assert torch.equal(value, before[name]), name


def test_two_models_filled_from_one_checkpoint_share_no_memory():
    weights, pairs = tiny_llama().state_dict(), random_pairs(2)
    policy, reference = (models.full(component(), dtype="fp32") for _ in range(2))
    for model in (policy, reference):
        models.prepare(model, max_length=128)
        models.load(model, weights, world=ONE)
    before = scores(reference, pairs)
    assert torch.equal(before, scores(policy, pairs))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.1)
    assert torch.equal(before, scores(reference, pairs))
    assert torch.equal(weights["norm.scale"], tiny_llama().state_dict()["norm.scale"])


def numbers_of(model, batch):
    """Log-probabilities with and without gradients, and the gradients."""
    with torch.no_grad():
        plain = torch.cat(answer_logps(model, batch))
    chosen, rejected = answer_logps(model, batch)
    (chosen - rejected).sum().backward()
    return [plain, chosen.detach(), rejected.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


def test_activation_checkpointing_changes_no_gradient():
    batch, model = lay_out(random_pairs(2)), loaded("lora")
    models.prepare(model, max_length=128, checkpoint_activations=True)
    for checkpointed, plain in zip(numbers_of(model, batch), numbers_of(loaded("lora"), batch), strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "changes"),
    [("full", {}), ("lora", {}), ("lora", {"use_dora": True}), ("lora", {"modules": ["mlp"]}), ("qlora", {})],
    ids=["full", "lora", "dora", "adapters in the network alone", "qlora"],
)
def test_a_feed_forward_network_in_pieces_changes_no_number(method, changes):
    """Of 24 tokens, and what is left of the row; gradients are added up over pieces."""
    batch, sizes = lay_out(random_pairs(3)), NF4_SIZES if method == "qlora" else SIZES
    whole, cut = (loaded(method, sizes=sizes, **changes) for _ in range(2))
    assert batch.tokens.numel() > 2 * 24 and batch.tokens.numel() % 24
    expected = numbers_of(whole, batch)
    models.execute(cut, models.Execution(checkpointing=True))
    assert len(pieces.install(cut, 24)) == len(cut.layers)
    seen = Counter()
    for activation in {m.activation for m in cut.modules() if isinstance(m, FeedForward)}:  # one of all layers
        activation.register_forward_hook(lambda _, inputs, out: seen.update([out.shape[:-1].numel()]))
    for number, same in zip(numbers_of(cut, batch), expected, strict=True):
        torch.testing.assert_close(number, same, atol=1e-6, rtol=1e-5)
    assert max(seen) == 24
    assert seen.total() == 3 * -(-batch.tokens.numel() // 24) * len(cut.layers)  # two forwards, and again in backward


def test_what_draws_by_chance_is_not_cut_into_pieces():
    model = models.lora(component(), **LORA | {"dropout": 0.5})
    assert pieces.install(model, 24) == []
    models.disable_dropout(model)
    assert len(pieces.install(model, 24)) == len(model.layers)


@pytest.mark.parametrize(("method", "compiled"), [("full", False), ("lora", True), ("qlora", False)])
def test_offloading_takes_layers_inputs_alone_and_changes_no_number(monkeypatch, method, compiled):
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "aot_eager")  # which makes no kernels
    taken, given, numbers = [], [], []

    def take(tensor):
        taken.append((weakref.ref(tensor), tensor.shape))
        return tensor.clone()  # elsewhere

    def give(tensor):
        given.append(tensor.shape)
        return tensor.clone()

    batch, sizes = lay_out(random_pairs(2), 128), NF4_SIZES if method == "qlora" else SIZES
    for offloads in (False, True):
        model = loaded(method, sizes=sizes)
        models.prepare(model, max_length=128, attention="mask", checkpoint_activations=True, compile_layers=compiled)
        if offloads:
            offloading.offload(model, saved_tensors_hooks(take, give))
        numbers.append(numbers_of(model, batch))
    assert all(map(torch.equal, *numbers))
    inputs = [(*batch.tokens.shape, sizes["embed_dim"])] * len(model.layers)
    assert [shape for _, shape in taken if shape.numel()] == inputs == [shape for shape in given if shape.numel()]
    assert not any(tensor() is not None for tensor, _ in taken)  # nothing else holds them


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: models.lora({"_component_": f"{LLAMA3}.lora_llama3"}, **LORA), ["base builder", "llama3"]),
        (lambda: models.lora({"_component_": TIED}, **LORA | {"modules": ["q_proj", "output"]}), ["output", "tied"]),
        (lambda: models.full({**component(), "num_layer": 3}, dtype="fp32"), ["num_layer", "num_layers"]),
        (lambda: models.full({"_component_": "torchtune.models.llama3.llama3"}, dtype="fp32"), ["vocab_size"]),
        (lambda: models.prepare(models.full(component(), dtype="fp32"), max_length=129), ["129", "128 positions"]),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_told(call, words):
    with pytest.raises(UserError) as error:
        call()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda weights: weights.pop("norm.scale"), ["1 weights do not fit", "not in the checkpoint: norm.scale"]),
        (
            lambda weights: weights.update(extra=torch.zeros(1)),
            ["1 weights do not fit", "not in the model: extra"],
        ),
        (lambda weights: weights.update({"norm.scale": torch.zeros(3)}), ["norm.scale", "[3]", "[64]"]),
    ],
)
def test_weights_of_another_model_are_refused(change, words):
    weights = tiny_llama().state_dict()
    change(weights)
    with pytest.raises(UserError) as error:
        models.load(models.full(component(), dtype="fp32"), weights, world=ONE)
    for word in words:
        assert word in str(error.value)


def test_bf16_differs_from_float32_by_rounding_only():
    pairs, scored = random_pairs(3), {}
    for dtype in models.DTYPES:
        model = models.full(component(), dtype=dtype)
        models.prepare(model, max_length=128)
        models.load(model, tiny_llama().state_dict(), world=ONE)
        scored[dtype] = scores(model, pairs)
    assert scored["bf16"].dtype == torch.float32
    assert not torch.equal(scored["bf16"], scored["fp32"])
    torch.testing.assert_close(scored["bf16"], scored["fp32"], rtol=0.02, atol=0)
