"""An answer's log-probability is the same number however it is laid out, masked, chunked and differentiated."""

import copy
import runpy
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, padded_logps, random_pairs, tiny_llama
from torch.profiler import ProfilerActivity, profile, record_function
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import LoRALinear

from pairtune import models
from pairtune.models import logps
from pairtune.pairs.batch import lay_out

PEAK = runpy.run_path(str(ROOT / "tools" / "check_plan.py"))["_peak"]
BACK_ENDS = ("segments", "mask")


def ours(model, pairs, *, back_end="segments", row_length=None):
    logps.install(model, back_end)
    return torch.cat(logps.answer_logps(model, lay_out(pairs, row_length)))


def gradients(model, values, weights):
    model.zero_grad()
    (values * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["untied", "tied"])
def model(request):
    return tiny_llama(tied=request.param == "tied")


@pytest.mark.parametrize("back_end", BACK_ENDS)
@pytest.mark.parametrize("row_length", [None, 128, 200])
def test_they_equal_torchtunes_padded_forward(model, back_end, row_length):
    pairs = random_pairs(5)
    weights = torch.randn(10)
    theirs = padded_logps(model, pairs)
    their_gradients = gradients(model, theirs, weights)
    prepared = copy.deepcopy(model)
    models.prepare(prepared, max_length=128)
    values = ours(prepared, pairs, back_end=back_end, row_length=row_length)
    our_gradients = gradients(prepared, values, weights)
    assert theirs.abs().max() > 100  # sums of hundreds of nats
    torch.testing.assert_close(values, theirs, atol=1e-4, rtol=0)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in our_gradients.items():
        error = (gradient - their_gradients[name]).norm() / their_gradients[name].norm()
        assert error < 1e-6, name


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_pair_alone_equals_itself_packed_in_any_order_and_width(back_end):
    model = tiny_llama().double()
    models.prepare(model, max_length=128)
    pairs = random_pairs(6)
    alone = torch.stack([ours(model, [p], back_end=back_end) for p in pairs])  # [6, 2]
    for order in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4]):
        for row_length in (None, 110, 128, 256):
            packed = ours(model, [pairs[i] for i in order], back_end=back_end, row_length=row_length).view(2, 6).T
            torch.testing.assert_close(packed, alone[order], atol=1e-10, rtol=0)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_an_unpaired_answer_scores_what_it_does_in_its_pair(back_end):
    model = tiny_llama().double()
    models.prepare(model, max_length=128)
    pairs = random_pairs(6)
    expected = ours(model, pairs, back_end=back_end).view(2, 6)
    apart = [SimpleNamespace(**(vars(p) | {("rejected", "chosen")[i % 2]: []})) for i, p in enumerate(pairs)]
    for row_length in (None, 128):
        values = ours(model, apart, back_end=back_end, row_length=row_length).view(2, 6)
        for i in range(6):
            assert values[1 - i % 2, i] == 0
            torch.testing.assert_close(values[i % 2, i], expected[i % 2, i], atol=1e-10, rtol=0)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_changing_chosen_tokens_leaves_everything_else_bit_equal(back_end):
    model = tiny_llama()
    models.prepare(model, max_length=128)
    pairs = random_pairs(3)
    before = ours(model, pairs, back_end=back_end)
    changed = copy.deepcopy(pairs)
    changed[1].chosen = [*changed[1].chosen[:-2], 77, 2]
    after = ours(model, changed, back_end=back_end)
    assert after[1] != before[1]
    others = [0, 2, 3, 4, 5]
    assert torch.equal(after[others], before[others])


def test_an_answer_that_continues_the_other_one_is_scored_whole():
    model = tiny_llama()
    pairs = random_pairs(2)
    pairs[0].rejected = [*pairs[0].chosen, 9, 2]
    pairs[1].chosen = [*pairs[1].rejected, 9, 2]
    expected = padded_logps(model, pairs)
    models.prepare(model, max_length=128)
    for back_end in BACK_ENDS:
        torch.testing.assert_close(ours(model, pairs, back_end=back_end), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_a_batch_of_padding_has_gradients_of_zero_for_every_parameter(model, back_end):
    """A process without pairs runs along: FSDP reduces gradients of all processes, and they have to be there."""
    models.prepare(model, max_length=128)
    values = ours(model, [], back_end=back_end)
    assert values.shape == (0,)
    values.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def naive_token_logps(hidden, weight, target, softcap=None):
    logits = hidden.double() @ weight.double().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits.log_softmax(-1)[torch.arange(len(target)), target]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 50, 1000])
@pytest.mark.parametrize("mode", ["frozen", "kept", "recomputed", "no_grad"])
def test_every_mode_and_chunk_size_agrees_with_float64(mode, chunk_size, softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 16, requires_grad=True), torch.randn(301, 16)
    weight.requires_grad_(mode in ("kept", "recomputed"))
    target, upstream = torch.randint(301, (50,)), torch.randn(50)
    expected = naive_token_logps(hidden, weight, target, softcap)
    expected_gradients = torch.autograd.grad(
        (expected * upstream).sum(), [hidden] + ([weight] if weight.requires_grad else [])
    )
    with torch.set_grad_enabled(mode != "no_grad"):
        keep = 2**30 if mode == "kept" else 0
        options = {"softcap": softcap, "chunk_size": chunk_size, "keep_bytes": keep}
        values = logps.token_logps(hidden, weight, target, **options)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, atol=2e-5, rtol=0)
    if mode == "no_grad":
        assert not values.requires_grad
        return
    inputs = [hidden] + ([weight] if weight.requires_grad else [])
    for got, wanted in zip(torch.autograd.grad((values * upstream).sum(), inputs), expected_gradients, strict=True):
        torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["frozen", "recomputed", "no_grad"])
def test_a_chunk_of_logits_is_gone_when_the_next_one_comes(mode, dtype, softcap):
    """Eight chunks take, at most, what one takes: by torch.profiler's record of what is allocated and freed."""
    weight = torch.randn(5000, 16, dtype=dtype, requires_grad=mode == "recomputed")

    def peak(num_tokens):
        hidden, target = torch.randn(num_tokens, 16, dtype=dtype, requires_grad=True), torch.arange(num_tokens)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("training"):
            with torch.set_grad_enabled(mode != "no_grad"):
                values = logps.token_logps(hidden, weight, target, softcap=softcap, chunk_size=32, keep_bytes=0)
            if mode != "no_grad":
                values.sum().backward()
        weight.grad = None
        return PEAK(profiler)

    peak(32)  # what is allocated once
    chunk = 32 * 5000 * dtype.itemsize
    assert peak(8 * 32) - peak(32) < chunk / 4  # all of hidden's gradient is in it
    assert peak(32) > chunk


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("trainable", [True, False])
def test_gradients_pass_gradcheck(trainable, keep_bytes, softcap):
    torch.manual_seed(0)
    hidden = torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 5, dtype=torch.float64, requires_grad=trainable)
    target = torch.randint(13, (9,))

    def function(hidden, weight):
        return logps.token_logps(hidden, weight, target, softcap=softcap, chunk_size=4, keep_bytes=keep_bytes)

    assert torch.autograd.gradcheck(function, (hidden, weight))


def test_lora_on_the_output_layer_agrees_with_the_padded_forward():
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64, "max_seq_len": 128}
    model = lora_llama3(["q_proj"], False, True, **sizes, intermediate_dim=96, lora_rank=4, lora_alpha=8)
    torch.nn.init.normal_(model.output.lora_b.weight)
    pairs, weights = random_pairs(3), torch.randn(6)
    expected = padded_logps(model, pairs)
    wanted = gradients(model, expected, weights)["output.lora_a.weight"]
    models.prepare(model, max_length=128)
    values = ours(model, pairs)
    torch.testing.assert_close(values, expected, atol=1e-4, rtol=0)
    off = gradients(model, values, weights)["output.lora_a.weight"] - wanted
    assert off.norm() <= 1e-5 * wanted.norm()


class LargestVocabularyTensor:
    """The most elements of a tensor with a vocabulary dimension that autograd keeps for backward."""

    def __init__(self, vocabulary, parameters):
        self.vocabulary, self.largest = vocabulary, 0
        self.parameters = {p.data_ptr() for p in parameters}

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        if self.vocabulary in tensor.shape and tensor.data_ptr() not in self.parameters:
            self.largest = max(self.largest, tensor.numel())
        return tensor


def test_no_logits_are_kept_behind_a_frozen_head():
    model = tiny_llama(vocab_size=997)
    models.prepare(model, max_length=128)
    model.output.weight.requires_grad_(False)
    pairs = random_pairs(4)
    with LargestVocabularyTensor(997, model.parameters()) as saved:
        ours(model, pairs)
    assert saved.largest == 0
    with LargestVocabularyTensor(997, model.parameters()) as saved:
        padded_logps(model, pairs)
    assert saved.largest > 0  # the gauge sees what torchtune's way keeps


@pytest.mark.parametrize("keep_bytes", [0, 2**20])
def test_a_trained_head_keeps_no_logits_beyond_its_budget(keep_bytes):
    hidden, weight = torch.randn(70, 16, requires_grad=True), torch.randn(997, 16, requires_grad=True)
    target = torch.randint(997, (70,))
    with LargestVocabularyTensor(997, [weight]) as saved:
        values = logps.token_logps(hidden, weight, target, chunk_size=8, keep_bytes=keep_bytes)
    assert saved.largest == (8 * 997 if keep_bytes else 0)  # a chunk's, of which there are as many as the budget takes
    with LargestVocabularyTensor(997, [weight]) as saved:
        expected = (hidden @ weight.T).log_softmax(-1)[torch.arange(70), target]
    assert saved.largest == 70 * 997
    torch.testing.assert_close(values, expected)


def test_adapters_on_the_output_keep_no_logits(monkeypatch):
    monkeypatch.setitem(logps.CHUNK_LOGITS, "cpu", 8 * 997)
    output = LoRALinear(16, 997, rank=2, alpha=4.0)
    hidden, target = torch.randn(70, 16, requires_grad=True), torch.randint(997, (70,))
    with LargestVocabularyTensor(997, output.parameters()) as saved:
        logps._checkpointed_token_logps(hidden, target, output, None, None).sum().backward()
    assert saved.largest <= 8 * 997  # of the chunk that backward computes again


def test_generation_still_gets_logits():
    model = tiny_llama()
    tokens = torch.randint(3, 320, (2, 20))
    expected = model(tokens)
    models.prepare(model, max_length=128)
    assert torch.equal(model(tokens), expected)
