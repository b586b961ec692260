"""What `auto` chooses, by device; what it chooses changes no number, fits, and is told."""

from types import SimpleNamespace

import pytest
import torch

from pairtune import models
from pairtune.errors import UserError
from pairtune.models.execution import Execution
from pairtune.pairs.batch import lay_out
from pairtune.run import choosing
from pairtune.run.choosing import GIB
from pairtune.run.memory import Setting, step_memory

PAIR = SimpleNamespace(prompt=[0] * 512, chosen=[1] * 256, rejected=[2] * 256)  # a row of 1,024 tokens
LORA = {
    "rank": 16, "alpha": 32.0, "dropout": 0.0, "modules": ["q_proj", "k_proj", "v_proj", "output_proj", "mlp"],
    "use_dora": False, "use_rslora": False,
}  # fmt: skip
ADAMW = {"_component_": "torch.optim.AdamW", "lr": 1e-5}
AUTO = dict.fromkeys(choosing.KEYS, "auto")


def policy(method, builder):
    adapters = None if method == "full" else LORA
    model = models.policy(method, {"_component_": f"torchtune.models.{builder}"}, adapters, dtype="bf16")
    models.disable_dropout(model)
    models.fit(model, max_length=1024)
    return model


@pytest.fixture(scope="module")
def built():
    made = {}

    def build(*what):
        if what not in made:
            made[what] = policy(*what)
        return made[what]

    return build


# A row: GPU's GB; FlexAttention, compiled, always; what backward computes again, and pairs at a time
TABLE = {
    ("lora", "llama3.llama3_8b"): {24: (True, 8), 48: (False, 5), 80: (False, 8), 141: (False, 8)},
    ("qlora", "llama3.llama3_8b"): {24: ("selective", 5), 48: (False, 7), 80: (False, 8), 141: (False, 8)},
    ("lora", "llama3_2.llama3_2_1b"): {24: (False, 8), 48: (False, 8), 80: (False, 8), 141: (False, 8)},
}


@pytest.mark.parametrize(("what", "by_memory"), TABLE.items(), ids=[" ".join(what) for what in TABLE])
def test_what_is_chosen_for_gpus_of_many_sizes(built, what, by_memory):
    work = choosing.Work(PAIR, 1024, 64, num_steps=1000)
    for memory, (checkpointing, pairs) in by_memory.items():
        model = built(*what)
        chosen = choosing.choose(AUTO, work, model, None, ADAMW, Setting(), memory * GIB)
        told = {"attention": "flex", "compile": True, "enable_activation_checkpointing": checkpointing}
        assert chosen.keys == told | {"batch_size": pairs}, memory
        assert (chosen.row_length, chosen.rows) == (1024 * pairs, 1024 * pairs)
        setting = Setting(execution=chosen.execution, micro_batches=64 // pairs)
        counted = step_memory(model, None, lay_out([PAIR] * pairs, 1024 * pairs), ADAMW, setting).total
        assert counted <= choosing.USABLE * memory * GIB
        assert chosen.reason.startswith(f"{counted / GIB:.1f} of {memory}.0 GiB in rows of {1024 * pairs:,} tokens")


def test_what_is_asked_for_is_kept_and_the_rest_is_chosen(built):
    model, work = built("lora", "llama3_2.llama3_2_1b"), choosing.Work(PAIR, 1024, 64, num_steps=1000)

    def chosen(memory=80, setting=None, work=work, **asked):
        found = choosing.choose(AUTO | asked, work, model, None, ADAMW, setting or Setting(), memory * GIB)
        return found.keys | {"row": found.row_length}

    assert chosen(batch_size=2)["row"] == 2048
    assert chosen(memory=8, batch_size=8)["enable_activation_checkpointing"] is not False
    eager = {"attention": "varlen", "compile": False, "enable_activation_checkpointing": False, "row": None}
    assert chosen(compile=False) == eager | {"batch_size": 8}
    assert chosen(attention="segments")["compile"] is False  # as it has to be
    assert chosen(attention="mask", compile=True)["row"] == 1024  # each pair a row of its own
    short = choosing.Work(PAIR, 1024, 64, [1024] * 256, num_steps=4)
    assert chosen(work=short)["compile"] is False  # no minute of compiling for less than two of training
    on_cpu = choosing.choose(AUTO, work, model, None, ADAMW, Setting(device="cpu"), None)
    assert on_cpu.execution == Execution("segments", False, False) and on_cpu.batch_size == 4
    odd = choosing.Work(PAIR, 1024, 6, num_steps=9)
    assert choosing.choose(AUTO, odd, model, None, ADAMW, Setting(device="cpu"), None).batch_size == 3
    offloaded = AUTO | {"enable_activation_offloading": True}  # where there would be room, too
    assert chosen(**offloaded)["enable_activation_checkpointing"] is True
    with pytest.raises(UserError, match="enable_activation_offloading=true: keeps activations in host memory"):
        choosing.choose(offloaded, work, model, None, ADAMW, Setting(device="cpu"), None)
    tight = choosing.choose(AUTO, work, model, None, ADAMW, Setting(), 2 * GIB)
    assert tight.batch_size == 1 and "more than fits: `tune plan`" in tight.reason


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"attention": "segments", "compile": True}, "attention=segments: compile=true would compile anew"),
        ({"attention": "varlen", "compile": True}, "attention=varlen: compile=true would compile anew"),
        ({"attention": "flex", "compile": False}, "attention=flex: without compile=true"),
        ({"enable_activation_checkpointing": "selective", "compile": False}, "it is the compiler that chooses"),
    ],
)
def test_what_does_not_go_together_is_refused(built, asked, words):
    model, work = built("lora", "llama3_2.llama3_2_1b"), choosing.Work(PAIR, 1024, 64)
    with pytest.raises(UserError, match=words):
        choosing.choose(AUTO | asked, work, model, None, ADAMW, Setting(), 80 * GIB)
    compiled = {"attention": "auto", "checkpointing": "auto"} | {
        key.removeprefix("enable_activation_"): value for key, value in asked.items()
    }
    with pytest.raises(UserError, match=words):
        choosing.check(compiled["attention"], compiled["compile"], compiled["checkpointing"])


def test_the_row_length_is_the_one_that_pads_least(built):
    """Steps of eight rows of 6,144 tokens, where ten pairs of 768 would fit a row, and leave every seventh empty."""
    pair = SimpleNamespace(prompt=[0] * 512, chosen=[1] * 128, rejected=[2] * 128)
    work = choosing.Work(pair, 768, 64, [768] * 640, num_steps=1000)
    chosen = choosing.choose(AUTO, work, built("lora", "llama3_2.llama3_2_1b"), None, ADAMW, Setting(), 80 * GIB)
    assert (chosen.row_length, chosen.batch_size) == (6144, 8)


def test_a_compiled_base_in_few_bits_keeps_none_of_its_values(built):
    """Kept, they would be the model in 16 bits: 0.4 GB a layer of 8B."""
    work = lay_out([PAIR] * 2, 2048)
    how = Setting(execution=Execution("flex", True, False))
    of_lora, of_qlora = (step_memory(built(m, "llama3.llama3_8b"), None, work, ADAMW, how) for m in ("lora", "qlora"))
    assert of_qlora.parts["activations"] == pytest.approx(of_lora.parts["activations"], rel=0.02)
    assert of_lora.parts["activations"] / 2048 / 32 == pytest.approx(145_000, rel=0.1)  # bytes a token and layer: H100
    assert torch._functorch.config.activation_memory_budget == 1.0
