"""Our losses are TRL's own code's, wherever TRL has them, pair by pair; and where TRL differs, it is said how.

TRL's loss methods are called on objects that hold what they read, with tokens' log-probabilities in place of a model.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_losses import call, each, random_step

from pairtune.losses import formulas as losses
from pairtune.losses.calling import loss_inputs, needs
from pairtune.losses.modules import build
from pairtune.models.logps import AnswerScores

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[test]' -c constraints.txt")

from trl.experimental.cpo import CPOTrainer  # noqa: E402
from trl.experimental.orpo import ORPOTrainer  # noqa: E402
from trl.trainer.dpo_trainer import DPOTrainer  # noqa: E402
from trl.trainer.kto_trainer import KTOTrainer  # noqa: E402

CPU = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, gather_for_metrics=lambda x: x)
PROMPT = 3


def random_answers(count=8, *, seed=0, dtype=torch.float64):
    """Token log-probabilities of policy and reference, and the policy's log sum_v p_v^2: lists of [n], chosen first."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (2 * count,), generator=generator).tolist()

    def draw(low, high):
        return [low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64).to(dtype) for n in lengths]

    reference = draw(-3, -1)
    policy = [r + d for r, d in zip(reference, draw(-0.5, 0.5), strict=True)]
    return policy, reference, draw(-2, -0.5)


def padded(answers):
    """[2 P, S - 1]: as a causal model gives them, zero outside of the answers."""
    width = max(map(len, answers))
    rows = [torch.cat([a.new_zeros(PROMPT - 1), a, a.new_zeros(width - len(a))]) for a in answers]
    return torch.stack(rows)


def answer_sums(answers, ld_alpha=1.0):
    half = len(answers) // 2
    sums = []
    for i, a in enumerate(answers):
        n = min(len(answers[i % half]), len(answers[i % half + half]))
        sums.append(a[:n].sum() + ld_alpha * a[n:].sum())
    return torch.stack(sums).chunk(2)


class FakeModel:
    """What TRL reads of a model's outputs."""

    training = True

    def __init__(self, token_logps, log_collision=None):
        zeros = torch.zeros_like(token_logps)
        self.outputs = SimpleNamespace(log_probs=token_logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
        self.outputs.log_sum_sq_probs = log_collision

    def __call__(self, **_):
        return self.outputs


def trl_dpo(answers, loss_types, loss_weights, options):
    policy, reference, log_collision = answers
    ld_alpha = options.get("ld_alpha", 1.0)
    mask = padded([torch.ones(len(a), dtype=torch.long) for a in policy])
    mask = torch.cat([torch.zeros(len(mask), 1, dtype=torch.long), mask], dim=1)  # the first token is not predicted
    reference_logps = answer_sums(reference, ld_alpha)
    divergence = options.get("f_divergence", "reverse_kl")
    model = FakeModel(padded(policy), padded(log_collision))
    trainer = SimpleNamespace(
        **{"model": model, "accelerator": CPU, "args": SimpleNamespace(discopop_tau=options.get("tau", 0.05))},
        **{"loss_types": loss_types, "loss_weights": loss_weights, "beta": options["beta"]},
        **{"label_smoothing": options.get("label_smoothing", 0.0), "use_weighting": options.get("wpo", False)},
        **{"ld_alpha": ld_alpha if ld_alpha != 1 else None, "precompute_ref_logps": True, "aux_loss_enabled": False},
        f_divergence_type={"js": "js_divergence", "alpha": "alpha_divergence"}.get(divergence, divergence),
        f_alpha_divergence_coef=options.get("f_alpha", 0.5),
        _metrics=defaultdict(lambda: defaultdict(list)),
        **{"_total_train_tokens": 0, "_tp_size": 1},
    )
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": torch.ones_like(mask), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": reference_logps[0], "ref_rejected_logps": reference_logps[1]}
    loss = DPOTrainer._compute_loss(trainer, model, inputs, return_outputs=False)
    rewards = [trainer._metrics["train"][f"rewards/{answer}"][0] for answer in ("chosen", "rejected")]
    return loss, rewards


def our_loss(loss_fn, answers):
    """The mean loss and mean rewards of these pairs as a step."""
    policy, reference, log_collision = answers
    ld_alpha = needs(loss_fn).ld_alpha
    half = len(policy) // 2
    lengths = tuple(map(len, policy))
    weights = torch.stack([(a - c).mean().exp() for a, c in zip(policy, log_collision, strict=True)]).chunk(2)
    scores = AnswerScores(*answer_sums(policy, ld_alpha), answer_sums(policy)[0], *weights)
    batch = SimpleNamespace(pairs=(), answer_lengths=lengths, target=torch.zeros(1))
    inputs = loss_inputs(loss_fn, batch, scores, mean_chosen_length=sum(lengths[:half]) / half)
    logps = scores.chosen_logps, scores.rejected_logps, *answer_sums(reference, ld_alpha)
    return [value.mean() for value in loss_fn(*logps, **inputs)]


PAIRED = ["sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard"]
PAIRED += ["apo_zero", "apo_down", "discopop"]
WITH_TRL = [(name, {"beta": beta}) for name in PAIRED for beta in (0.1, 2.0)]
WITH_TRL += [(name, {"beta": 0.3, "ld_alpha": 0.4}) for name in PAIRED]
WITH_TRL += [(name, {"beta": 0.3, "wpo": True}) for name in PAIRED]
WITH_TRL += [(name, {"beta": 0.3, "label_smoothing": 0.2}) for name in ("exo_pair", "robust")]
WITH_TRL += [("discopop", {"beta": 0.3, "tau": 0.5})]
WITH_TRL += [
    (name, {"beta": 0.3, "f_divergence": divergence})
    for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
    for divergence in ("forward_kl", "js", "alpha")
]
WITH_TRL += [("sigmoid", {"beta": 0.3, "f_divergence": "alpha", "f_alpha": a}) for a in (0.0, 0.25, 1.0, 2.0)]
TRL_OPTIONS = {"exo_pair": {"label_smoothing": 1e-3}, "robust": {"label_smoothing": 0.1}}  # our defaults


@each(WITH_TRL)
def test_a_pairs_loss_is_trls(name, options):
    # TRL's alpha divergence has no float64.
    dtype = torch.float32 if options.get("f_divergence") == "alpha" else torch.float64
    policy, reference, collision = random_answers(dtype=dtype)
    for i in range(8):
        pair = [[x[i], x[i + 8]] for x in (policy, reference, collision)]
        theirs, their_rewards = trl_dpo(pair, [name], [1.0], TRL_OPTIONS.get(name, {}) | options)
        ours, *our_rewards = our_loss(build(name, **options), pair)
        torch.testing.assert_close(ours, theirs.to(dtype), atol=1e-6, rtol=1e-6)
        assert [r.item() for r in our_rewards] == pytest.approx(their_rewards, abs=1e-6)


MIX = [{"name": "sigmoid", "ld_alpha": 0.3}, {"name": "bco_pair", "beta": 0.1, "ld_alpha": 0.3, "weight": 0.2}]
WHOLE_STEPS = [
    ("aot", {"beta": 0.5}),
    ("aot", {"beta": 0.5, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.5, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.5, "ld_alpha": 0.3}),
]


@each(WHOLE_STEPS)
def test_a_step_that_sorts_is_trls_when_its_batch_is_the_step(name, options):
    answers = random_answers()
    theirs, _ = trl_dpo(answers, [name], [1.0], options)
    torch.testing.assert_close(our_loss(build(name, **options), answers)[0], theirs, atol=1e-6, rtol=1e-6)


def test_mixtures_with_sft_are_trls_when_its_batch_is_the_step():
    answers = random_answers()
    for loss_fn, types, weights, options in (
        (build("sft"), ["sft"], [1.0], {}),
        (build("rpo", alpha=0.2), ["sigmoid", "sft"], [1.0, 0.2], {}),
        (build("mpo"), ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0], {}),
        (
            build("mixture", terms=[*MIX, {"name": "sft"}]),
            ["sigmoid", "bco_pair", "sft"],
            [1.0, 0.2, 1.0],
            {"ld_alpha": 0.3},
        ),
    ):
        theirs, _ = trl_dpo(answers, types, weights, {"beta": 0.1} | options)
        torch.testing.assert_close(our_loss(loss_fn, answers)[0], theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
@pytest.mark.parametrize("kl", [1.5, -1.5])
def test_kto_is_trls(weights, kl):
    logps, _ = random_step(4)
    mismatched = torch.randn(8, dtype=torch.float64)
    mismatched += kl - mismatched.mean()
    policy, reference = torch.cat(logps[:2]), torch.cat(logps[2:])
    trainer = SimpleNamespace(
        **{"model": SimpleNamespace(training=True), "accelerator": CPU, "aux_loss_enabled": False, "beta": 0.2},
        **{"precompute_ref_logps": True, "calculate_KL": True, "loss_type": "kto", "_tp_size": 1},
        **{"desirable_weight": weights[0], "undesirable_weight": weights[1], "_total_train_tokens": 0},
        _metrics=defaultdict(lambda: defaultdict(list)),
        _compute_kl_logps=lambda model, batch: mismatched,
    )
    ids = torch.zeros(8, 2, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": ids + 1, "completion_mask": ids + 1, "ref_logps": reference}
    batch |= {"ref_KL_logps": torch.zeros(8), "label": torch.tensor([True] * 4 + [False] * 4)}
    theirs = KTOTrainer._compute_loss(trainer, FakeModel(policy[:, None]), batch, return_outputs=False)
    loss_fn = build("kto", beta=0.2, desirable_weight=weights[0], undesirable_weight=weights[1])
    lengths = dict.fromkeys(("chosen_lengths", "rejected_lengths"), torch.ones(4, dtype=torch.long))
    ours = loss_fn(*logps, **lengths, kl=losses.kto_kl(mismatched.sum(), 8))[0].mean()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_simpo_cpo_and_orpo_are_trls_preference_terms():
    logps, inputs = random_step()
    averages = logps[0] / inputs["chosen_lengths"], logps[1] / inputs["rejected_lengths"]
    simpo = SimpleNamespace(accelerator=CPU, alpha=0.0, label_smoothing=0.0, loss_type="simpo", beta=2.0)
    simpo.simpo_gamma = 0.5
    for theirs, ours in zip(CPOTrainer.cpo_loss(simpo, *averages), call(build("simpo"), logps, inputs), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    cpo = SimpleNamespace(accelerator=CPU, alpha=0.0, label_smoothing=0.0, loss_type="sigmoid", beta=0.1)
    for theirs, ours in zip(
        CPOTrainer.cpo_loss(cpo, *logps[:2]), call(build("cpo", alpha=0.0), logps, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    # Its odds ratio's loss is subtracted from the likelihood term.
    theirs = ORPOTrainer.odds_ratio_loss(SimpleNamespace(accelerator=CPU, beta=0.3), *averages)
    ours = call(build("orpo", orpo_lambda=0.3), logps, inputs)
    torch.testing.assert_close(ours[0] + averages[0], -theirs[0].double(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1].double(), atol=1e-6, rtol=1e-6)


# Where TRL differs


def test_trls_sigmoid_ignores_label_smoothing():
    pair = [x[:2] for x in random_answers(1)]
    smooth, _ = trl_dpo(pair, ["sigmoid"], [1.0], {"beta": 0.3, "label_smoothing": 0.2})
    plain, _ = trl_dpo(pair, ["sigmoid"], [1.0], {"beta": 0.3})
    assert torch.equal(smooth, plain)
    assert our_loss(build("sigmoid", beta=0.3, label_smoothing=0.2), pair)[0] != plain


def test_trls_weights_crash_with_sft():
    with pytest.raises(RuntimeError):
        trl_dpo(random_answers(), ["sigmoid", "sft"], [1.0, 1.0], {"beta": 0.3, "wpo": True})


def test_trls_weights_crash_with_hinge_when_gradients_are_taken():
    answers = random_answers()
    for a in answers[0]:
        a.requires_grad_()
    theirs, _ = trl_dpo(answers, ["hinge"], [1.0], {"beta": 0.3, "wpo": True})
    with pytest.raises(RuntimeError, match="inplace"):
        theirs.backward()
    our_loss(build("hinge", beta=0.3, wpo=True), answers)[0].backward()


def test_trls_discopop_is_not_a_number_far_from_the_reference():
    policy, reference, collision = random_answers(1, dtype=torch.float32)
    pair = [[policy[0] - 500, policy[1]], reference, collision]
    assert trl_dpo(pair, ["discopop"], [1.0], {"beta": 0.3})[0].isnan()
    assert our_loss(build("discopop", beta=0.3), pair)[0].isfinite()
