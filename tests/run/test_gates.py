"""What a step costs, counted: FLOPs, kernels, looks at the device's numbers, graphs. It holds on any machine.

A step is the recipe's own: what a run of one step more counts more. T tokens of a row, N scored ones.
"""

from collections import Counter

import pytest
import torch
import yaml
from helpers import SIZES, random_pairs, run_config, run_recipe, save_llama, save_pairs
from torch._dynamo.utils import counters
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from torchtune.modules import TransformerDecoder

from pairtune import models
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out

aten = torch.ops.aten
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_flash_attention_for_cpu_backward
PROMPT, ANSWER, PAIRS = 64, 32, 4  # tokens, tokens, pairs a step
GATED = SIZES | {"num_layers": 2, "vocab_size": 640, "num_kv_heads": 4, "embed_dim": 128, "intermediate_dim": 256}


class Operations(TorchDispatchMode):
    """Counts what is launched, by its name."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = str(operation.overloadpacket)
        if operation is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            name = "index by a mask"  # on a GPU a look at how many are true
        self.counts[name] += 1
        return operation(*args, **(kwargs or {}))


class Looks(TorchFunctionMode):
    """Counts what waits for the device: Python asks for a tensor's numbers."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "nonzero"):
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Pairs of one length."""
    work = tmp_path_factory.mktemp("work")
    save_llama(work / "base", sizes=GATED)
    lengths = {"prompt": (PROMPT - 1,) * 2, "answer": (ANSWER - 2,) * 2, "shared": (0, 0)}
    save_pairs(work / "train.jsonl", random_pairs(6 * PAIRS, vocabulary=640, **lengths))
    cfg = run_config(work, sizes=GATED, max_length=128, max_prompt_length=None, pairs_per_step=PAIRS, batch_size=PAIRS)
    cfg |= {"eval_dataset": {"source": None}, "log_every_n_steps": 100, "samples": {"num_prompts": 0}}
    cfg |= {"save_every_n_steps": None, "keep_last_n": 0, "optimizer": {"_component_": "torch.optim.SGD", "lr": 1e-2}}
    (work / "config.yaml").write_text(yaml.safe_dump(cfg))
    return work


def counted(work, recipe, *overrides, steps):
    """Returns FLOPs, operations, looks of a whole run."""
    attention = dict(zip(ATTENTION, (attention_flops, attention_backward_flops), strict=True))
    flops, operations, looks = FlopCounterMode(display=False, custom_mapping=attention), Operations(), Looks()
    with flops, operations, looks:
        overrides = [f"max_steps={steps}", f"output_dir={work / 'run'}", *overrides]
        run_recipe(recipe, *overrides, config_paths=[work / "config.yaml"])
    return flops.get_total_flops(), operations.counts, looks.counts


def attention_flops(query, key, value, *_, **named):
    """Two products a query and a key."""
    rows, heads, queries, width = query
    return 4 * rows * heads * queries * key[2] * width


def attention_backward_flops(grad, query, key, value, *_, **named):
    """Five: the scores again, and the gradients of weights, values, queries, keys."""
    return attention_flops(query, key, value) * 5 // 2


@pytest.fixture(scope="module")
def a_step(work):
    """What a step of a recipe counts, beyond those before it."""
    known = {}

    def count(*run):
        if run not in known:
            longer, shorter = (counted(work, *run, steps=steps) for steps in (5, 4))
            known[run] = tuple(more - less for more, less in zip(longer, shorter, strict=True))
        return known[run]

    return count


def expected_flops(*, full: bool, rank: int = 4) -> int:
    """Returns a step's, by sizes and tokens: the body's products, LoRA's, attention's, the output's."""
    width, layers, tokens, scored = GATED["embed_dim"], GATED["num_layers"], PROMPT + 2 * ANSWER, 2 * ANSWER
    inner, vocabulary = GATED["intermediate_dim"], GATED["vocab_size"]
    of_block = [(width, width)] * 3  # queries, keys, values: their input in the first layer is the frozen embedding's
    body, adapters = 0, 0
    for layer in range(layers):
        for n, (a, b) in enumerate([*of_block, (width, width), (width, inner), (width, inner), (inner, width)]):
            inputs_have_gradients = full or layer > 0 or n >= len(of_block)
            # Policy and reference forward, the inputs' gradients, the weights'
            body += (2 + inputs_have_gradients + full) * 2 * a * b * tokens
            adapters += (2 + inputs_have_gradients) * 2 * a * rank * tokens + 3 * 2 * b * rank * tokens
    chosen, rejected = (PROMPT + ANSWER) ** 2, ANSWER * (PROMPT + ANSWER)  # a query and a key that a kernel looks at
    attention = layers * 4 * width * (chosen + rejected)
    # A frozen output makes the gradient in its forward, a trained one in backward, and its own.
    head = 2 * width * vocabulary * scored
    return PAIRS * (body + adapters * (not full) + attention * (2 + 5 / 2) + head * (1 + 2 + full))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_takes_the_flops_of_its_tokens_and_no_more(a_step, method):
    """The prompt once for both answers, logits of answers only, a reference without gradients: within 2 %."""
    flops, *_ = a_step(f"{method}_dpo_single_device")
    assert flops == pytest.approx(expected_flops(full=method == "full"), rel=0.02)


def test_a_cached_reference_takes_no_forward(work, a_step):
    cached = "reference=cached", f"reference.cache_dir={work / 'cache'}"
    counted(
        work, "lora_dpo_single_device", *cached, steps=5
    )  # fills it; as many values are then compared in either run
    live, cached = a_step("lora_dpo_single_device")[0], a_step("lora_dpo_single_device", *cached)[0]
    tokens, sizes = PROMPT + 2 * ANSWER, GATED
    width, inner = sizes["embed_dim"], sizes["intermediate_dim"]
    layer = 2 * tokens * (4 * width * width + 3 * width * inner)
    layer += 4 * width * (PROMPT + ANSWER) * (PROMPT + 2 * ANSWER)
    forward = PAIRS * (sizes["num_layers"] * layer + 2 * 2 * ANSWER * width * sizes["vocab_size"])
    assert live - cached == forward


@pytest.mark.parametrize("back_end", ["segments", "mask"])
def test_attention_is_called_once_a_layer_or_once_an_answer(a_step, back_end):
    """In policy and reference; and in the policy's backward."""
    chosen = [f"attention={back_end}"] * (back_end != "segments")  # which is the default on a CPU
    _, operations, _ = a_step("lora_dpo_single_device", *chosen)
    calls = 1 if back_end == "mask" else 2 * PAIRS
    forward, backward = (operations[str(op)] for op in ATTENTION)
    assert (forward, backward) == (2 * GATED["num_layers"] * calls, GATED["num_layers"] * calls)


@pytest.mark.parametrize(
    ("loss", "batch_size", "forwards"),
    [
        ("sigmoid", 2, 2),
        ("kto", 4, 4),  # two of them of each prompt with another one's answers, for the baseline
        ("aot", 4, 2),
        ("aot", 2, 3),  # the policy's once more, since gradients of all micro-batches are not kept
    ],
)
def test_a_step_computes_nothing_twice_that_it_could_keep(work, loss, batch_size, forwards):
    """Forwards over a step's pairs: policy's and reference's."""

    def calls(steps):
        seen = []
        handle = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: seen.append(module) if isinstance(module, TransformerDecoder) else None
        )
        settings = [f"max_steps={steps}", f"output_dir={work / 'run'}", f"loss={loss}", f"batch_size={batch_size}"]
        run_recipe("lora_dpo_single_device", *settings, config_paths=[work / "config.yaml"])
        handle.remove()
        return len(seen)

    assert calls(2) - calls(1) == forwards * PAIRS / batch_size


@pytest.mark.parametrize(("method", "loss"), [("lora", []), ("full", []), ("qlora", []), ("lora", ["loss=kto"])])
def test_between_logged_steps_a_device_is_looked_at_once(a_step, method, loss):
    """Before the update: whether its losses and its gradient's norm are finite.

    All else is laid out on the host.
    """
    _, operations, looks = a_step(f"{method}_dpo_single_device", *loss)
    laid_out = 1 + len(loss)  # batches; which of their pairs have which answer
    assert looks == {"__float__": 2, "nonzero": 3 * laid_out}
    assert operations["aten._local_scalar_dense"] == 2 and operations["aten.nonzero"] == 3 * laid_out
    waiting = ("index by a mask", "aten.masked_select", "aten.equal", "aten.is_nonzero", "aten._unique2")
    assert not [name for name in waiting if operations[name]]


def launched(num_layers, num_pairs):
    """Returns the operations, but for views, of a forward and backward with LoRA everywhere and a dense mask."""
    component = {"_component_": "torchtune.models.llama3.llama3", **GATED, "num_layers": num_layers}
    modules = ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"]
    model = models.lora(component, rank=4, alpha=8.0, dropout=0.0, modules=modules, use_dora=False, dtype="fp32")
    models.prepare(model.to_empty(device="cpu"), max_length=128, attention="mask")
    batch = lay_out(random_pairs(num_pairs, prompt=(40, 40), answer=(20, 20)), 128)
    with Operations() as operations:
        answer_logps(model, batch)[0].sum().backward()
    views = ("view", "_unsafe_view", "t", "transpose", "slice", "select", "expand", "unsqueeze", "detach", "permute")
    return sum(count for name, count in operations.counts.items() if name.removeprefix("aten.") not in views)


def test_a_layer_launches_as_much_in_any_model_and_with_any_number_of_pairs():
    """Compiled, a layer is one graph; what it launches without a compiler may not creep up, or grow with the batch."""
    of_few, of_many = ([launched(layers, pairs) for layers in (2, 3, 6)] for pairs in (2, 8))
    a_layer = of_few[1] - of_few[0]
    assert of_few[2] - of_few[1] == of_many[2] - of_many[1] == 3 * a_layer
    assert a_layer <= 180


def test_no_graph_is_compiled_for_new_lengths_or_later_steps(work, monkeypatch):
    """Rows are of one length; where their number varies, as with a dense mask, torch sees it once."""
    monkeypatch.setenv("TORCH_COMPILE_BACKEND", "eager")
    graphs = []
    for prompt, steps in (((70, 90), 2), ((70, 90), 5), ((8, 90), 5)):  # one pair a row; one or two
        pairs = random_pairs(6 * PAIRS, seed=3, vocabulary=640, prompt=prompt, answer=(3, 12), shared=(0, 0))
        save_pairs(work / "lengths.jsonl", pairs)
        torch._dynamo.reset()
        counters.clear()
        settings = [f"max_steps={steps}", f"output_dir={work / 'run'}", f"dataset={work / 'lengths.jsonl'}"]
        run_recipe("lora_dpo_single_device", *settings, "compile=true", config_paths=[work / "config.yaml"])
        graphs.append(counters["stats"]["unique_graphs"])
        assert counters["frames"]["ok"] == counters["frames"]["total"]
    # With gradients behind frozen embeddings and behind a layer, without, and with adapters off
    assert graphs[:2] == [4, 4] and graphs[2] <= 8
