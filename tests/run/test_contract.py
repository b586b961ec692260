"""What must hold before the first update and at every one: each breach is told with its cause and a way out."""

import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, random_pairs, run_config, run_recipe, save_llama, save_pairs, tiny_llama
from torchtune.rlhf.loss import DPOLoss, RSOLoss

from pairtune import models
from pairtune.errors import UserError
from pairtune.losses.calling import loss_inputs, policy_scores
from pairtune.losses.modules import build
from pairtune.models.logps import answer_logps
from pairtune.pairs.batch import lay_out
from pairtune.process.dist import World
from pairtune.run import contract, dry_run
from pairtune.run.metrics import read_log
from pairtune.run.resuming import complete_checkpoints

WORLD = World(torch.device("cpu"))
TOKENIZER = SimpleNamespace(bos_id=1, end_ids={2})


def pair(prompt=(1, 5), chosen=(6, 2), rejected=(7, 2), row=3):
    return SimpleNamespace(prompt=list(prompt), chosen=list(chosen), rejected=list(rejected), row=row)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (pair(prompt=(1, 1, 5)), "row 3: begins with two BOS tokens"),
        (pair(prompt=(5,)), "row 0 begins with BOS, row 3 does not"),
        (pair(chosen=(), rejected=()), "row 3: has no token of an answer"),
        (pair(rejected=(7,)), "row 3: rejected must end in exactly one end token"),
        (pair(chosen=(6, 2, 2)), "row 3: chosen must end in exactly one end token"),
    ],
)
def test_pairs_that_teach_nonsense_are_refused_with_their_row(broken, words):
    with pytest.raises(UserError, match=words):
        contract.check_pairs([pair(row=0), broken], TOKENIZER)


def test_right_pairs_pass_whether_a_tokenizer_has_a_bos_or_not():
    contract.check_pairs(random_pairs(20), TOKENIZER)
    contract.check_pairs([pair(prompt=(5,)), pair(prompt=(8, 9))], SimpleNamespace(bos_id=None, end_ids={2}))
    contract.check_pairs([pair(chosen=()), pair(rejected=())], TOKENIZER)  # unpaired rows


def test_a_best_checkpoint_needs_a_metric_that_the_held_out_rows_have():
    desirable, undesirable = pair(rejected=()), pair(chosen=())
    kto = {"loss_fn": build("kto"), "pairs_per_step": 2, "train": [pair(), pair(prompt=(1, 6))]}
    contract.check_loss(**kto, held_out=[desirable, undesirable], keep_best="rewards/margins")
    contract.check_loss(**kto, held_out=[pair()], keep_best="rewards/accuracies")
    contract.check_loss(**kto, held_out=[desirable], keep_best="loss")
    with pytest.raises(UserError, match="accuracies: the held-out rows are unpaired.* keep_best=rewards/margins"):
        contract.check_loss(**kto, held_out=[desirable, undesirable], keep_best="rewards/accuracies")
    with pytest.raises(UserError, match="margins: the held-out rows have one label only.* keep_best=loss"):
        contract.check_loss(**kto, held_out=[desirable], keep_best="rewards/margins")


def test_ktos_baseline_needs_a_second_pair():
    contract.check_loss(build("sigmoid"), [pair()], [], pairs_per_step=1, keep_best=None)
    with pytest.raises(UserError, match="pairs_per_step=1: KTO's baseline .* nearest valid: pairs_per_step=2"):
        contract.check_loss(build("kto"), [pair(), pair(prompt=(1, 6))], [], pairs_per_step=1, keep_best=None)
    with pytest.raises(UserError, match="all rows have the same prompt, and KTO's baseline"):
        contract.check_loss(build("kto"), [pair(), pair()], [], pairs_per_step=2, keep_best=None)


def test_an_end_token_alone_is_no_answer_where_ends_are_not_scored():
    contract.check_pairs([pair(chosen=(2,))], TOKENIZER)
    with pytest.raises(UserError, match="row 3: chosen is its end token alone, which score_end=false does not score"):
        contract.check_pairs([pair(chosen=(2,))], TOKENIZER, score_end=False)


def test_a_model_without_trained_parameters_is_refused():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    contract.check_trained(model, optimizer)
    with pytest.raises(UserError, match="does not have 1 of 2 trainable parameters"):
        contract.check_trained(model, torch.optim.SGD([model.weight], lr=1.0))
    with pytest.raises(UserError, match="has no trainable parameter"):
        contract.check_trained(model.requires_grad_(False), optimizer)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor, torch.optim.RMSprop])
def test_a_rehearsal_leaves_no_trace_and_has_the_optimizers_state_meanwhile(kind):
    model = tiny_llama()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = kind(model.parameters(), lr=0.1, weight_decay=0.1)
    generator = torch.get_rng_state()
    with dry_run.step(model, optimizer, DPOLoss(), [], WORLD):
        assert kind is torch.optim.SGD or len(optimizer.state) == len(before)
        (model(torch.arange(9)[None]) * torch.rand(1)).sum().backward()
    assert not optimizer.state and optimizer.param_groups[0]["lr"] == 0.1
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), generator)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
    ],
)
def test_out_of_memory_names_the_pairs_and_what_to_lower(error):
    model = tiny_llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    words = r"longest pairs \(rows 3; tokens 6\)\. Lower batch_size .* allocate"
    with pytest.raises(UserError, match=words), dry_run.step(model, optimizer, DPOLoss(), [pair()], WORLD):
        raise error
    with pytest.raises(RuntimeError, match="another"), dry_run.step(model, optimizer, DPOLoss(), [pair()], WORLD):
        raise RuntimeError("another")


class Same:
    """A reference that is the model itself, or is off by so many nats."""

    def __init__(self, model, *, off=0.0, is_start=True):
        self.model, self.off, self.is_start, self.was_asked = model, off, is_start, False

    def logps(self, batch):
        self.was_asked = True
        with torch.no_grad():
            return [logps + self.off for logps in answer_logps(self.model, batch)]


def rehearse(loss_fn=None, *, loop=None, reference=None, pairs=None, dropout=False):
    """What section 7 of a recipe does. `loop` is an edited copy's: from scores and reference to losses and rewards."""
    model, loss_fn = tiny_llama(), loss_fn or DPOLoss()
    models.prepare(model, max_length=128)
    reference, pairs = reference(model) if reference else Same(model), pairs or random_pairs(3)
    with dry_run.step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss_fn, pairs, WORLD) as trial:
        batch = lay_out(pairs)
        scores = policy_scores(model, batch, loss_fn)
        inputs = loss_inputs(loss_fn, batch, scores, mean_chosen_length=1.0, kl=torch.tensor(0.0))
        if loop:
            losses, *rewards = loop(scores, reference, batch)
        else:
            logps = scores.chosen_logps, scores.rejected_logps
            losses, *rewards = loss_fn(*logps, *reference.logps(batch), **inputs)
        trial.meter.add_pairs(batch, scores, losses, *rewards)
        losses.sum().backward()
        trial.check(losses, batch, reference, dropout=dropout)


def test_a_start_at_the_loss_of_zero_margins_passes():
    for loss_fn in (DPOLoss(), DPOLoss(label_smoothing=0.3), RSOLoss(), build("kto", undesirable_weight=3.0)):
        rehearse(loss_fn)
    unpaired = [pair(rejected=(), row=4), pair(chosen=(), row=5), pair()]
    rehearse(build("kto", undesirable_weight=3.0), pairs=unpaired)
    rehearse(reference=lambda model: Same(model, off=3.0), dropout=True)
    rehearse(reference=lambda model: Same(model, off=3.0, is_start=False))


class Wrong(DPOLoss):
    """Rewards are right, and the loss is not that of DPO at zero rewards in every call."""

    def __init__(self, by=0.0):
        super().__init__()
        self.calls, self.by = 0, by

    def forward(self, *logps):
        losses, *rewards = super().forward(*logps)
        self.calls += 1
        return losses + self.by * (self.calls == 1), *rewards


def rewards_of_zero(scores):
    return torch.zeros(len(scores.chosen_logps)), torch.zeros(len(scores.chosen_logps))


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"reference": lambda model: Same(model, off=1.0)}, "row 0 a log-probability of .*They must be one model"),
        (
            {"loop": lambda s, r, b: (s.chosen_logps, r.logps(b)[0] * 0 + 0.5, rewards_of_zero(s)[0])},
            r"the mean of rewards/chosen is \+0.5000; it must be 0, since .* in an edited copy of a recipe, look at",
        ),
        ({"loss_fn": Wrong(by=0.1)}, "the loss of row 0 is 0.7931; it must be 0.6931, .* in an edited copy"),
        ({"loop": lambda s, r, b: (s.chosen_logps * math.nan, *rewards_of_zero(s))}, "the gradient's norm is nan"),
        (
            {"loop": lambda s, r, b: (s.chosen_logps * 0 + 1, *rewards_of_zero(s))},
            "the gradient is zero: nothing would",
        ),
    ],
)
def test_a_start_that_cannot_be_right_is_refused(start, words):
    with pytest.raises(UserError, match=words):
        rehearse(**start)


def test_an_edited_loop_is_not_held_to_the_loss_and_reference_of_the_config(capsys):
    rehearse(loop=lambda s, r, b: (0.8 - s.chosen_logps + r.logps(b)[0], *rewards_of_zero(s)))  # another loss
    assert capsys.readouterr().out == ""
    mine = lambda s, r, b: DPOLoss()(s.chosen_logps, s.rejected_logps, *rewards_of_zero(s))  # noqa: E731
    rehearse(loop=mine)  # another reference
    assert "the loop does not ask `reference`" in capsys.readouterr().out
    half = lambda s, r, b: LOSS(s.chosen_logps, s.rejected_logps, *(0.5 * v for v in r.logps(b)))  # noqa: E731
    rehearse(LOSS, loop=half)  # the reference's values, changed
    names = "reference_chosen_logps", "reference_rejected_logps"
    named = lambda s, r, b: LOSS(  # noqa: E731
        s.chosen_logps, s.rejected_logps, **{n: 0.5 * v for n, v in zip(names, r.logps(b), strict=True)}
    )
    rehearse(LOSS, loop=named)


LOSS = DPOLoss()


def test_numbers_that_are_not_finite_name_the_rows_to_blame():
    losses = [torch.tensor([0.5]), torch.tensor([math.inf, 0.5])]
    rows = [[pair(row=4)], [pair(row=5), pair(row=6)]]
    contract.check_finite(7, [torch.tensor([0.5])], torch.tensor(1.0), rows[:1], WORLD)
    with pytest.raises(UserError, match=r"step 7: the loss of rows \[5\] is not a finite number; no update was made"):
        contract.check_finite(7, losses, torch.tensor(1.0), rows, WORLD)
    with pytest.raises(UserError, match=r"the gradient's norm \(rows of this step: \[4, 6\]\) is not a finite"):
        contract.check_finite(
            7, [torch.tensor([0.5, 0.5])], torch.tensor(math.nan), [[pair(row=6), pair(row=4)]], WORLD
        )


# In a run


@pytest.fixture
def work(tmp_path):
    save_llama(tmp_path / "base")
    save_pairs(tmp_path / "train.jsonl", random_pairs(24, seed=1))
    cfg = run_config(tmp_path, eval_dataset={"source": None}, batch_size=4, samples={"num_prompts": 0})
    (tmp_path / "config.yaml").write_text(json.dumps(cfg))
    return tmp_path


def test_a_run_that_diverges_stops_before_the_update_and_keeps_its_checkpoint(work):
    settings = ("optimizer.lr=1e30", "optimizer.weight_decay=1.0", "save_every_n_steps=1", "shuffle=false")
    # A process of its own: the checkpoint is whole when the process has ended
    recipe = ROOT / "recipes" / "full_dpo_single_device.py"
    command = [sys.executable, recipe, "--config", work / "config.yaml", *settings]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 1
    assert re.search(r"step 2: .*rows of this step: \[8, 9, 10, 11, 12, 13, 14, 15\]\) is not a", done.stderr)
    log = read_log(work / "run" / "metrics.jsonl")
    assert [row["step"] for row in log if row["step"]] == [1, 2] and log[-1]["loss"] is None
    assert json.loads((work / "run" / "verdict.json").read_text())["name"] == "diverged"
    assert [p.name for p in complete_checkpoints(work / "run" / "checkpoints")] == ["step_1"]


def test_a_loss_that_ignores_the_policy_is_refused_before_the_first_update(work):
    (work / "deaf.py").write_text(
        "from torchtune.rlhf.loss import DPOLoss\n"
        "class Loss(DPOLoss):\n"
        "    def forward(self, *logps):\n"
        "        return tuple(0 * x for x in super().forward(*logps))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(work))
        with pytest.raises(UserError, match="before the first update the gradient is zero: nothing would be learned"):
            run_recipe("lora_dpo_single_device", "loss=deaf.Loss", config_paths=[work / "config.yaml"])
