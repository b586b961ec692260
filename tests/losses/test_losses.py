"""Every loss is its paper's, is stable, says what it needs, and does not depend on how a step is cut.

The naive formulas are written from the papers, in float64; TRL's own code is test_losses_against_trl.py.
"""

import inspect
import json
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import losses_worker
import pytest
import torch
from helpers import ENVIRONMENT, tiny_llama
from losses_worker import MAX_LENGTH, STEPS, as_pairs, loss_of, train_step
from omegaconf import OmegaConf
from torch import nn
from torchtune.modules.peft import LoRALinear
from torchtune.rlhf.loss import DPOLoss, RSOLoss

from pairtune import models
from pairtune.config.short_names import path_of
from pairtune.errors import UserError
from pairtune.losses import calling as loss_needs
from pairtune.losses import formulas as losses
from pairtune.losses.calling import Needs, StepLosses, loss_at_start, needs, step_gradients
from pairtune.losses.modules import LOSSES, Discopop, WeightedSum, build
from pairtune.losses.published import ADVICE, advice_for
from pairtune.models.logps import answer_logps, answer_scores, token_logps
from pairtune.pairs.batch import lay_out
from pairtune.pairs.tokenize import Pair
from pairtune.process import dist
from pairtune.process.dist import World

MIX = [{"name": "sigmoid", "beta": 0.2}, {"name": "hinge", "weight": 0.5}, {"name": "sft", "weight": 0.2}]
CASES = [
    ("sigmoid", {"beta": 0.3}),
    ("sigmoid", {"beta": 0.3, "label_smoothing": 0.2}),
    ("sigmoid", {"beta": 0.3, "wpo": True}),
    ("sigmoid_norm", {"beta": 5.0}),
    ("hinge", {"beta": 0.2}),
    ("hinge", {"beta": 0.2, "wpo": True}),
    ("ipo", {"beta": 0.4}),
    ("exo_pair", {"beta": 0.3}),
    ("exo_pair", {"beta": 0.3, "label_smoothing": 0.1}),
    ("nca_pair", {"beta": 0.3}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.0}),
    ("robust", {"beta": 0.3, "label_smoothing": 0.3}),
    ("bco_pair", {"beta": 0.3}),
    ("bco_pair", {"beta": 0.3, "running_mean": False}),
    ("sppo_hard", {"beta": 0.3}),
    ("sppo_hard", {}),
    ("aot", {"beta": 0.3}),
    ("aot", {"beta": 0.3, "label_smoothing": 0.2}),
    ("aot_unpaired", {"beta": 0.3}),
    ("aot_unpaired", {"beta": 0.3, "label_smoothing": 0.2}),
    ("apo_zero", {"beta": 0.3}),
    ("apo_down", {"beta": 0.3}),
    ("discopop", {"beta": 0.1}),
    ("discopop", {"beta": 0.1, "tau": 0.5}),
    ("dpop", {"beta": 0.1}),
    ("dpop", {"beta": 0.1, "dpop_lambda": 5.0}),
    ("sft", {}),
    ("simpo", {}),
    ("simpo", {"beta": 10.0, "gamma_beta_ratio": 0.3}),
    ("orpo", {}),
    ("orpo", {"orpo_lambda": 0.5}),
    ("cpo", {}),
    ("cpo", {"beta": 0.2, "alpha": 0.3}),
    ("kto", {}),
    ("kto", {"beta": 0.2, "desirable_weight": 1.33, "undesirable_weight": 0.7}),
    ("rpo", {"alpha": 0.2}),
    ("mpo", {}),
    ("mixture", {"terms": MIX}),
    *[
        (name, {"beta": 0.1, "f_divergence": divergence})
        for name in ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop")
        for divergence in ("reverse_kl", "forward_kl", "js", "alpha")
    ],
    ("sigmoid", {"f_divergence": "alpha", "f_alpha": 0.25}),
    ("sigmoid", {"f_divergence": "alpha", "f_alpha": 1.0}),
]
WITH_REFERENCE = [(n, o) for n, o in CASES if n not in ("sft", "simpo", "orpo", "cpo")]


def name_of(case):
    return "-".join(map(str, [case[0], *(v for v in case[1].values() if not isinstance(v, list))]))


def each(cases):
    return pytest.mark.parametrize(("name", "options"), cases, ids=map(name_of, cases))


def random_step(count=6, *, seed=0, dtype=torch.float64):
    """A step's log-probabilities (policy chosen, rejected, reference chosen, rejected) and all inputs of all losses."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)

    reference = draw(-30, -10), draw(-30, -10)
    policy = reference[0] + draw(-3, 3), reference[1] + draw(-3, 3)
    lengths = [torch.randint(5, 20, (count,), generator=generator) for _ in range(2)]
    inputs = {
        **{"chosen_lengths": lengths[0], "rejected_lengths": lengths[1]},
        **{"chosen_weights": draw(0.2, 1.5), "rejected_weights": draw(0.2, 1.5)},
        **{"mean_chosen_length": lengths[0].double().mean().item(), "kl": torch.tensor(0.7, dtype=torch.float64)},
    }
    logps = [x.to(dtype) for x in (*policy, *reference)]
    return logps, {k: v.to(dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def call(loss_fn, logps, inputs):
    return loss_fn(*logps, **{name: inputs[name] for name in needs(loss_fn).inputs})


# The formulas


def sg(x):
    return 1 / (1 + torch.exp(-x))


def ls(x):
    return torch.log(sg(x))


def naive_score(r, divergence="reverse_kl", alpha=0.5):
    u = torch.exp(r)
    if divergence == "forward_kl":
        return 1 - 1 / u
    if divergence == "js":
        return torch.log(2 * u / (1 + u))
    if divergence == "alpha" and alpha != 1:
        return (u ** (alpha - 1) - 1) / (alpha - 1)
    return torch.log(u)


def naive_smoothed(z, e):
    return -(1 - e) * ls(z) - e * ls(-z)


def naive(name, options, logps, inputs):
    """Losses [P]; for those that sort, in the order of the sorted values."""
    default = {p.name: p.default for p in inspect.signature(LOSSES[name]).parameters.values()}
    o = SimpleNamespace(**(default | options))
    pc, pl, rc, rl = logps
    n_c, n_l = inputs["chosen_lengths"], inputs["rejected_lengths"]
    r_c, r_l = pc - rc, pl - rl
    if hasattr(o, "f_divergence"):
        s_c, s_l = (naive_score(r, o.f_divergence, 0.5 if o.f_alpha is None else o.f_alpha) for r in (r_c, r_l))
    else:
        s_c, s_l = r_c, r_l
    a_c, a_l = pc / n_c, pl / n_l
    b, e = getattr(o, "beta", None), getattr(o, "label_smoothing", 0.0)
    z = None if b is None else b * (s_c - s_l)
    if name == "sigmoid":
        value = naive_smoothed(z, e)
    elif name == "sigmoid_norm":
        value = -ls(b * (s_c / n_c - s_l / n_l))
    elif name == "hinge":
        value = torch.maximum(torch.zeros_like(z), 1 - z)
    elif name == "ipo":
        value = (s_c / n_c - s_l / n_l - 1 / (2 * b)) ** 2
    elif name == "exo_pair":
        value = sg(z) * (ls(z) - math.log(1 - e)) + sg(-z) * (ls(-z) - math.log(e))
    elif name == "nca_pair":
        value = -ls(b * r_c) - 0.5 * ls(-b * r_c) - 0.5 * ls(-b * r_l)
    elif name == "robust":
        value = (-(1 - e) * ls(z) + e * ls(-z)) / (1 - 2 * e)
    elif name == "bco_pair":
        value = -ls(b * r_c) - ls(-b * r_l)
    elif name == "sppo_hard":
        value = (r_c - 0.5 / b) ** 2 + (r_l + 0.5 / b) ** 2
    elif name == "aot":
        value = naive_smoothed(b * (torch.sort(pc - pl).values - torch.sort(rc - rl).values), e)
    elif name == "aot_unpaired":
        value = naive_smoothed(b * (torch.sort(r_c).values - torch.sort(r_l).values), e)
    elif name == "apo_zero":
        value = 1 - sg(b * r_c) + sg(b * r_l)
    elif name == "apo_down":
        value = sg(b * r_c) + 1 - sg(b * (r_c - r_l))
    elif name == "discopop":
        m = sg(z / o.tau)
        value = -ls(z) * (1 - m) + torch.exp(-z) * m
    elif name == "dpop":
        value = -ls(b * (r_c - r_l - o.dpop_lambda * torch.maximum(torch.zeros_like(r_c), -r_c)))
    elif name == "sft":  # the same for each pair: the mean over all tokens
        value = (-pc.sum() / n_c.sum()).expand(len(pc))
    elif name == "simpo":
        value = -ls(b * (a_c - a_l) - b * o.gamma_beta_ratio)
    elif name == "orpo":
        odds = [torch.exp(a) / (1 - torch.exp(a)) for a in (a_c, a_l)]
        value = -a_c - o.orpo_lambda * ls(torch.log(odds[0] / odds[1]))
    elif name == "cpo":
        value = -ls(b * (pc - pl)) - o.alpha * a_c
    elif name == "kto":
        kl = inputs["kl"]
        desirable = o.desirable_weight * (1 - sg(b * (r_c - kl)))
        value = (desirable + o.undesirable_weight * (1 - sg(b * (kl - r_l)))) / 2
    else:
        terms = {
            "rpo": lambda: [("sigmoid", {"beta": b}, 1.0), ("sft", {}, o.alpha)],
            "mpo": lambda: [("sigmoid", {"beta": b}, 0.8), ("bco_pair", {"beta": b}, 0.2), ("sft", {}, 1.0)],
            "mixture": lambda: [
                (t["name"], {k: v for k, v in t.items() if k not in ("name", "weight")}, t.get("weight", 1.0))
                for t in o.terms
            ],
        }[name]()
        value = sum(weight * naive(term, options, logps, inputs) for term, options, weight in terms)
    if getattr(o, "wpo", False):
        value = value * inputs["chosen_weights"] * inputs["rejected_weights"]
    return value


@each(CASES)
def test_each_loss_and_its_gradients_are_the_papers(name, options):
    logps, inputs = random_step()
    policy = [x.requires_grad_() for x in logps[:2]]
    expected = naive(name, options, logps, inputs)
    loss_fn = build(name, **options)
    got = call(loss_fn, logps, inputs)[0]
    same = {"atol": 1e-9, "rtol": 1e-9}
    torch.testing.assert_close(got.mean(), expected.mean(), **same)
    if not {"sft", "mean_chosen_length"} & {name, *needs(loss_fn).inputs}:  # only its mean has a meaning
        torch.testing.assert_close(got.sort().values, expected.sort().values, **same)
    for g, e in zip(
        torch.autograd.grad(got.mean(), policy, allow_unused=True, materialize_grads=True),
        torch.autograd.grad(expected.mean(), policy, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        torch.testing.assert_close(g, e, **same)


def test_every_loss_has_a_case_with_each_of_its_options():
    common = {"beta", "ld_alpha", "wpo", "f_alpha"}
    for name, make in LOSSES.items():
        tested = [set(options) for n, options in CASES if n == name]
        assert tested, name
        assert set(inspect.signature(make).parameters) <= set.union(common, *tested), name


@each(CASES)
@pytest.mark.parametrize("far", [2000.0, 0.0])
def test_values_and_gradients_are_finite_far_from_the_reference_and_at_it(name, options, far):
    if name == "ipo" and options.get("f_divergence") in ("forward_kl", "alpha") and far:
        pytest.skip("a squared e^80 is beyond float32")
    _, inputs = random_step(4, dtype=torch.float32)
    reference = torch.tensor([-2500.0, -2500.0, -100.0, -1e-4]), torch.tensor([-2500.0, -2500.0, -100.0, -1e-4])
    chosen = (reference[0] + torch.tensor([far, -far, -far, 0.0])).requires_grad_()
    rejected = (reference[1] + torch.tensor([-far, far, -far, 0.0])).requires_grad_()
    values = call(build(name, **options), (chosen, rejected, *reference), inputs)[0]
    gradients = torch.autograd.grad(values.sum(), (chosen, rejected), allow_unused=True, materialize_grads=True)
    assert values.dtype == torch.float32
    assert values.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


def test_orpo_is_finite_where_an_answer_is_certain():
    zeros = torch.zeros(1, requires_grad=True)
    lengths = torch.ones(1)
    for logps in ((zeros, zeros - 5), (zeros - 5, zeros)):
        values = build("orpo")(*logps, chosen_lengths=lengths, rejected_lengths=lengths)[0]
        (gradient,) = torch.autograd.grad(values.sum(), zeros)
        assert values.isfinite().all() and gradient.isfinite().all()


def test_discopop_is_finite_where_its_exponential_alone_overflows():
    far = torch.tensor([-2000.0], requires_grad=True)
    value = Discopop(beta=1.0, tau=0.05).formula(far, torch.zeros(1))
    assert value.item() == 2000.0  # the logistic loss: the margin is wrong, and the exponential has no part in it
    assert torch.autograd.grad(value, far)[0].item() == -1.0


def test_discopops_small_margins_shrink_at_first():
    """The numbers of its docstring."""
    z = torch.linspace(-1, 1, 20_001, dtype=torch.float64, requires_grad=True)
    slopes = {}
    for tau in (0.05, 0.102, 0.103):
        value = Discopop(beta=1.0, tau=tau).formula(z, torch.zeros_like(z))
        slopes[tau] = torch.autograd.grad(value.sum(), z)[0]
        assert slopes[tau][10_000].item() == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75, abs=1e-9)
    assert slopes[0.102][10_000] > 0 > slopes[0.103][10_000]
    signs = slopes[0.05].sign()
    assert z[1:][signs[1:] != signs[:-1]].tolist() == pytest.approx([-0.119, 0.072], abs=1e-3)


# What is logged


@each(CASES)
def test_a_tie_is_not_an_accurate_pair(name, options):
    _, inputs = random_step(3)
    same = torch.full((3,), -20.0, dtype=torch.float64)
    inputs["rejected_lengths"] = inputs["chosen_lengths"]
    _, chosen, rejected = call(build(name, **options), (same,) * 4, inputs)
    assert not (chosen > rejected).any()


@each(CASES)
def test_rewards_are_detached_and_beta_r(name, options):
    logps, inputs = random_step()
    logps[0].requires_grad_()
    loss_fn = build(name, **options)
    _, chosen, rejected = call(loss_fn, logps, inputs)
    assert not chosen.requires_grad and not rejected.requires_grad
    beta = (options | {"beta": MIX[0]["beta"]} if name == "mixture" else options).get("beta")
    if beta is None and name != "sft":
        beta = inspect.signature(LOSSES[name]).parameters[LOSSES[name].beta_key].default
    expected = logps[0] - logps[2], logps[1] - logps[3]
    if name in ("simpo", "orpo"):
        beta = options.get("orpo_lambda", beta)
        expected = logps[0] / inputs["chosen_lengths"], logps[1] / inputs["rejected_lengths"]
    if name in ("sft", "cpo"):
        beta, expected = 1.0 if name == "sft" else beta, logps[:2]
    torch.testing.assert_close(chosen, beta * expected[0].detach())
    torch.testing.assert_close(rejected, beta * expected[1].detach())


# The start


def test_the_loss_at_the_start_is_the_closed_form():
    ln2 = math.log(2)
    expected = {
        **dict.fromkeys(("sigmoid", "sigmoid_norm", "robust", "aot", "aot_unpaired", "dpop"), ln2),
        **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
        **dict.fromkeys(("nca_pair", "bco_pair"), 2 * ln2),
        **dict.fromkeys(("sft", "simpo", "orpo", "cpo", "rpo", "mpo"), None),
        **{"ipo": 25.0, "sppo_hard": 2 * 500.0**2, "kto": 0.5, "discopop": ln2 / 2 + 0.5},
        "exo_pair": -ln2 - 0.5 * math.log(1e-3) - 0.5 * math.log(1 - 1e-3),
    }
    assert expected.keys() == LOSSES.keys() - {"mixture"}
    for name, value in expected.items():
        assert loss_at_start(build(name)) == pytest.approx(value, rel=1e-6) if value is not None else True
        assert (loss_at_start(build(name)) is None) == (value is None), name


def test_the_loss_at_the_start_is_none_where_it_depends_on_more_than_the_ratios():
    assert loss_at_start(build("sigmoid", wpo=True)) is None
    assert loss_at_start(build("mixture", terms=MIX)) is None
    with_cpo = [{"name": "sigmoid"}, {"name": "cpo"}]
    assert loss_at_start(build("mixture", terms=with_cpo)) is None


def test_the_loss_at_the_start_of_options_and_of_torchtunes_losses():
    ln2 = math.log(2)
    two = [{"name": "sigmoid", "weight": 0.8}, {"name": "bco_pair", "weight": 0.2}]
    assert loss_at_start(build("mixture", terms=two)) == pytest.approx(0.8 * ln2 + 0.2 * 2 * ln2)
    assert loss_at_start(build("sigmoid", label_smoothing=0.3)) == pytest.approx(ln2)
    assert loss_at_start(build("kto", undesirable_weight=3.0)) == pytest.approx(1.0)
    for divergence in get_args(losses.Divergence):
        assert loss_at_start(build("sigmoid", f_divergence=divergence)) == pytest.approx(ln2)
    assert loss_at_start(DPOLoss(beta=0.3)) == pytest.approx(ln2)
    assert loss_at_start(RSOLoss()) == 1.0


# Options


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("sigmoid", {"beta": -0.1}, "loss.beta=-0.1: must be greater than 0; e.g. loss.beta=0.1"),
        ("sppo_hard", {"beta": 0.0}, "loss.beta=0.0: must be greater than 0"),
        ("ipo", {"beta": math.inf}, "loss.beta=inf"),
        ("robust", {"label_smoothing": 0.5}, "loss.label_smoothing=0.5: must be at least 0 and below 0.5"),
        ("sigmoid", {"label_smoothing": -0.1}, "loss.label_smoothing=0.0"),
        ("exo_pair", {"label_smoothing": 0.0}, "loss.label_smoothing=0.0: must be above 0"),
        ("sigmoid", {"ld_alpha": 1.5}, "loss.ld_alpha=1.5: must be at least 0 and at most 1; e.g. loss.ld_alpha=1.0"),
        ("rpo", {"alpha": 0.0}, "loss.alpha=0.0: must be greater than 0; e.g. loss.alpha=1.0"),
        ("rpo", {"beta": 0.0}, "loss.beta=0.0: must be greater than 0; e.g. loss.beta=0.1"),
        ("mpo", {"beta": 0.0}, "loss.beta=0.0: must be greater than 0; e.g. loss.beta=0.1"),
        ("sigmoid", {"f_alpha": 0.3}, "loss.f_alpha=0.3: has no effect"),
        ("discopop", {"tau": 0.0}, "loss.tau=0.0: must be greater than 0"),
        ("dpop", {"dpop_lambda": -1.0}, "loss.dpop_lambda=-1.0: must be at least 0"),
        ("simpo", {"gamma_beta_ratio": -0.1}, "loss.gamma_beta_ratio=-0.1: must be at least 0"),
        ("orpo", {"orpo_lambda": 0.0}, "loss.orpo_lambda=0.0: must be greater than 0"),
        ("kto", {"desirable_weight": 0.0}, "loss.desirable_weight=0.0: must be greater than 0"),
        ("sigmoid", {"beta": "low"}, "loss.beta=low: must be a number"),
        ("sigmoid", {"wpo": 1}, "loss.wpo=1: must be true or false"),
        ("sigmod", {}, "loss.name=sigmod: no such loss; nearest: sigmoid"),
        ("sigmoid", {"label_smoothin": 0.1}, "loss.label_smoothin: Sigmoid has no such argument; it takes beta,"),
        ("mixture", {"terms": []}, "loss.terms=[]: must have at least one loss"),
        ("mixture", {"terms": [{"beta": 0.1}]}, "loss.terms[0]={beta: 0.1}: must name its loss"),
        ("mixture", {"terms": [{"name": "ipoo"}]}, "loss.terms[0].name=ipoo: no such loss; nearest: ipo;"),
        (
            "mixture",
            {"terms": [{"name": "sft", "beta": 1}]},
            "loss.terms[0].beta: Sft has no such argument; it takes none",
        ),
        (
            "mixture",
            {"terms": [{"name": "sft", "weight": 0.0}]},
            "loss.terms[0].weight=0.0: must be greater than 0; e.g.",
        ),
        ("mixture", {"terms": [{"name": "sft", "weight": "a"}]}, "loss.terms[0].weight=a: must be a number"),
        ("mixture", {"terms": [{"name": "ipo", "beta": -1.0}]}, "loss.terms[0]: loss.beta=-1.0"),
    ],
)
def test_a_wrong_option_is_refused_by_name_and_value_before_anything_is_read(name, options, words):
    with pytest.raises(UserError) as error:
        build(name, **options)
    assert words in str(error.value)


def test_a_wrong_choice_is_refused_with_the_choices_and_the_nearest():
    words = "loss.f_divergence=jss: must be one of reverse_kl, forward_kl, js, alpha; nearest: loss.f_divergence=js"
    for make in (partial(build, "sigmoid"), LOSSES["sigmoid"]):
        with pytest.raises(UserError, match=f"^{words}$"):
            make(f_divergence="jss")
    with pytest.raises(UserError, match="loss.f_divergence=3: must be one of reverse_kl, forward_kl, js, alpha$"):
        build("sigmoid", f_divergence=3)


def test_a_losss_signature_is_its_schema_and_all_that_it_takes():
    assert list(inspect.signature(LOSSES["hinge"]).parameters) == ["beta", "ld_alpha", "wpo", "f_divergence", "f_alpha"]
    for name, make in LOSSES.items():
        for option, parameter in inspect.signature(make).parameters.items():
            assert parameter.annotation is not parameter.empty, (name, option)
            assert (parameter.default is parameter.empty) == (name == "mixture")
    with pytest.raises(TypeError, match="f_divergence"):
        LOSSES["nca_pair"](f_divergence="js")
    with pytest.raises(TypeError, match="averaged"):
        LOSSES["hinge"](averaged=True)


SMOOTHED = {"sigmoid", "exo_pair", "robust", "aot", "aot_unpaired"}
DIVERGING = {"sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop"}


@pytest.mark.parametrize("name", LOSSES)
def test_options_that_would_be_ignored_do_not_exist(name):
    wrong = {"label_smoothing": 0.1} if name not in SMOOTHED else {}
    wrong |= {"f_divergence": "js"} if name not in DIVERGING else {}
    wrong |= {"beta": 0.1} if name in ("sft", "orpo", "mixture") else {}
    for option, value in wrong.items():
        with pytest.raises(UserError, match=f"loss.{option}: .* has no such argument"):
            build(name, **{option: value})


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - {"mixture"}))
def test_every_option_that_exists_changes_the_loss(name):
    """Label smoothing that is accepted and ignored, a coefficient that is not used."""
    logps, inputs = random_step()
    changes = {
        **{"beta": 0.77, "label_smoothing": 0.21, "f_divergence": "js", "wpo": True, "tau": 0.3, "dpop_lambda": 3.0},
        **{"gamma_beta_ratio": 0.4, "orpo_lambda": 0.7, "alpha": 0.3},
        **{"desirable_weight": 1.5, "undesirable_weight": 1.5},
    }
    before = call(build(name), logps, inputs)[0].mean()
    for option in inspect.signature(LOSSES[name]).parameters:
        if option == "ld_alpha":
            assert needs(build(name, ld_alpha=0.5)).ld_alpha == 0.5
        elif option == "f_alpha":
            a, b = (build(name, f_divergence="alpha", f_alpha=x) for x in (0.5, 0.7))
            assert not torch.isclose(call(a, logps, inputs)[0].mean(), call(b, logps, inputs)[0].mean())
        elif option == "running_mean":
            pass  # see test_bcos_shift_is_the_mean_of_all_rewards_of_the_steps_before
        else:
            after = call(build(name, **{option: changes[option]}), logps, inputs)[0].mean()
            assert not torch.isclose(before, after), option


def test_simpo_has_no_likelihood_term():
    """Making both answers likelier by the same average leaves the loss as it is."""
    logps, inputs = random_step()
    n_c, n_l = inputs["chosen_lengths"], inputs["rejected_lengths"]
    shifted = [logps[0] + 0.4 * n_c, logps[1] + 0.4 * n_l, None, None]
    loss_fn = build("simpo")
    torch.testing.assert_close(call(loss_fn, logps, inputs)[0], call(loss_fn, shifted, inputs)[0])


def test_wpo_goes_with_hinge_and_not_with_sft():
    logps, inputs = random_step()
    logps[0].requires_grad_()
    call(build("hinge", wpo=True), logps, inputs)[0].sum().backward()
    assert logps[0].grad.any()
    with pytest.raises(UserError, match="loss.wpo: Sft has no such argument"):
        build("sft", wpo=True)
    terms = [{"name": "sigmoid", "wpo": True}, {"name": "sft", "weight": 0.2}]
    got = call(build("mixture", terms=terms), logps, inputs)[0].mean()
    expected = naive("sigmoid", {"wpo": True}, logps, inputs) + 0.2 * naive("sft", {}, logps, inputs)
    torch.testing.assert_close(got, expected.mean())


# Interchangeable with torchtune's


@pytest.mark.parametrize("theirs", [DPOLoss(beta=0.3, label_smoothing=0.1), RSOLoss(gamma=0.3)])
def test_torchtunes_modules_and_ours_agree(theirs):
    ours = build("hinge", beta=0.3) if isinstance(theirs, RSOLoss) else build("sigmoid", beta=0.3, label_smoothing=0.1)
    logps, _ = random_step()
    names = inspect.signature(theirs.forward).parameters
    by_keyword = dict(zip(names, logps, strict=True))
    for got, by_name, expected in zip(ours(*logps), ours(**by_keyword), theirs(*logps), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
        assert torch.equal(got, by_name)


def test_torchtunes_and_users_own_losses_need_a_reference_and_nothing_else():
    class Own(nn.Module):
        pass

    assert needs(DPOLoss()) == needs(Own()) == Needs(reference=True, whole_step=False, inputs=(), ld_alpha=1.0)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_says_what_it_needs(name):
    loss_fn = build("mixture", terms=MIX) if name == "mixture" else build(name)
    assert needs(loss_fn).reference == (name not in ("sft", "simpo", "orpo", "cpo"))
    assert needs(loss_fn).whole_step == (name in ("aot", "aot_unpaired"))
    assert ("kl" in needs(loss_fn).inputs) == (name == "kto")
    assert ("mean_chosen_length" in needs(loss_fn).inputs) == (name in ("sft", "rpo", "mpo", "mixture"))
    logps, inputs = random_step()
    assert all(value.shape == (6,) for value in call(loss_fn, logps, inputs))
    if not needs(loss_fn).reference:
        without = call(loss_fn, [*logps[:2], None, None], inputs)
        assert all(map(torch.equal, without, call(loss_fn, logps, inputs)))


# Mixtures


def test_a_mixture_logs_the_rewards_of_its_first_loss_that_is_not_sft():
    logps, inputs = random_step()
    terms = [{"name": "sft"}, {"name": "sigmoid", "beta": 0.3}, {"name": "hinge", "beta": 0.9}]
    got = call(build("mixture", terms=terms), logps, inputs)[1:]
    assert all(map(torch.equal, got, build("sigmoid", beta=0.3)(*logps)[1:]))
    assert torch.equal(call(build("mixture", terms=terms[:1]), logps, inputs)[1], logps[0])


def test_a_mixture_of_torchtunes_losses_works():
    logps, _ = random_step()
    got = WeightedSum([DPOLoss(beta=0.1), RSOLoss()], [1.0, 0.5])(*logps)[0]
    torch.testing.assert_close(got, DPOLoss(beta=0.1)(*logps)[0] + 0.5 * RSOLoss()(*logps)[0])


OWN = """
from torch import nn
from torch.nn.functional import softplus

def plain(chosen, rejected, reference_chosen, reference_rejected):
    z = chosen - reference_chosen - rejected + reference_rejected
    return softplus(-z), chosen.detach(), rejected.detach()

def make(factor: float = 1.0):
    return lambda *logps: (factor * plain(*logps)[0], *plain(*logps)[1:])

class DPOLoss(nn.Module):
    def __init__(self, beta: float = 0.1):
        super().__init__()
        self.beta = beta

    def forward(self, *logps):
        return plain(*(self.beta * x for x in logps))

class Mean(DPOLoss):
    def forward(self, *logps):
        values, *rewards = plain(*logps)
        return values.mean(), *rewards
"""


@pytest.fixture
def own_losses(tmp_path, monkeypatch):
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_losses", None)


def test_a_term_is_any_module_by_its_import_path(own_losses):
    logps, inputs = random_step()
    theirs = {"_component_": "torchtune.rlhf.loss.DPOLoss", "beta": 0.3, "weight": 0.7}
    loss_fn = build("mixture", terms=[theirs, {"name": "sft", "weight": 0.2}])
    assert needs(loss_fn) == Needs(inputs=("mean_chosen_length",))
    got, *rewards = call(loss_fn, logps, inputs)
    sft = -logps[0].sum() / inputs["chosen_lengths"].sum()
    torch.testing.assert_close(got.mean(), 0.7 * DPOLoss(beta=0.3)(*logps)[0].mean() + 0.2 * sft)
    assert all(map(torch.equal, rewards, DPOLoss(beta=0.3)(*logps)[1:]))
    own = [{"_component_": "own_losses.DPOLoss", "beta": 0.2}, {"_component_": "own_losses.make", "factor": 0.5}]
    got = build("mixture", terms=[{"name": "dpo", "beta": 0.2}, *own])(*logps)[0]
    torch.testing.assert_close(got, 2 * DPOLoss(beta=0.2)(*logps)[0] + 0.5 * DPOLoss(beta=1.0)(*logps)[0])


@pytest.mark.parametrize(
    ("term", "words"),
    [
        (
            {"_component_": "own_losses.DPOLoss", "betta": 1},
            "loss.terms[1].betta: DPOLoss has no such argument; it takes",
        ),
        ({"_component_": "own_losses.DPOLoss", "beta": "a"}, "loss.terms[1].beta=a: must be a number"),
        ({"_component_": "own_losses.DPOLos"}, "loss.terms[1]._component_=own_losses.DPOLos: cannot be imported"),
        ({"_component_": "own_losses.Mean"}, "loss.terms[1]: loss._component_=own_losses.Mean: must map"),
    ],
)
def test_a_term_by_its_import_path_is_checked_as_a_loss_is(own_losses, term, words):
    """A mean would be added to each pair's loss, and weigh with their number."""
    with pytest.raises(UserError) as error:
        build("mixture", terms=[{"name": "sft"}, term])
    assert words in str(error.value) and "remove it with" not in str(error.value)


def test_terms_that_share_a_forward_share_ld_alpha_but_for_sft():
    ld = {"name": "sigmoid", "ld_alpha": 0.5}
    for other in ({"name": "hinge"}, {"name": "hinge", "ld_alpha": 0.6}, {"name": "simpo"}):
        with pytest.raises(UserError, match=r"loss.ld_alpha: .* share one forward"):
            build("mixture", terms=[ld, other])
    with pytest.raises(UserError, match=r"loss.ld_alpha=0.5: does not go with both sft and"):
        build("mixture", terms=[{"name": "aot", "ld_alpha": 0.5}, {"name": "sft"}])
    inner = {"name": "mixture", "terms": [ld, {"name": "sft"}]}
    with pytest.raises(UserError, match=r"loss.ld_alpha=0.5: does not go with both sft and"):
        build("mixture", terms=[inner, {"name": "aot", "ld_alpha": 0.5}])
    loss_fn = build("mixture", terms=[ld, {"name": "sft", "weight": 0.2}])
    assert needs(loss_fn).ld_alpha == 0.5
    logps, inputs = random_step()
    whole = logps[0] - 3
    got = call(loss_fn, logps, inputs | {"whole_chosen_logps": whole})[0].mean()
    expected = naive("sigmoid", {}, logps, inputs) + 0.2 * naive("sft", {}, [whole, *logps[1:]], inputs)
    torch.testing.assert_close(got, expected.mean())


# KTO


def test_bcos_shift_is_the_mean_of_all_rewards_of_the_steps_before():
    loss_fn, world, seen = build("bco_pair", beta=0.3), World(torch.device("cpu")), []
    for seed in range(3):
        logps, _ = random_step(seed=seed)
        shift = torch.cat(seen).mean() if seen else 0.0
        rewards = [0.3 * (logps[0] - logps[2]), 0.3 * (logps[1] - logps[3])]
        expected = -torch.log(sg(rewards[0] - shift)) - torch.log(sg(shift - rewards[1]))
        # Two micro-batches; and an evaluation and a rehearsal beside them, which do not count.
        with loss_needs.unchanged(loss_fn):
            loss_fn(*logps)
        values = torch.cat([loss_fn(*(x[part] for x in logps))[0] for part in (slice(2), slice(2, None))])
        torch.testing.assert_close(values, expected, atol=1e-9, rtol=1e-9)
        loss_needs.after_step(loss_fn, world)
        seen += rewards
    fixed = build("bco_pair", beta=0.3, running_mean=False)
    fixed(*logps)
    loss_needs.after_step(fixed, world)
    assert fixed.seen.tolist() == [0, 0] != loss_fn.seen.tolist()


def test_a_mixture_moves_the_shift_of_its_terms():
    loss_fn, alone = build("mpo"), build("bco_pair", beta=0.1)
    logps, inputs = random_step()
    loss_fn(*logps, mean_chosen_length=inputs["mean_chosen_length"])
    alone(*logps)
    for module in (loss_fn, alone):
        loss_needs.after_step(module, World(torch.device("cpu")))
    assert loss_fn.terms[1].seen.tolist() == alone.seen.tolist() and alone.seen[1] == 2 * len(logps[0])


def test_ktos_kl_is_the_cut_mean_of_the_step_and_has_no_gradient():
    ratios = torch.tensor([-3.0, 1.0, 4.0], requires_grad=True)
    kl = losses.kto_kl(ratios.sum(), 3)
    assert kl.item() == pytest.approx(2 / 3) and not kl.requires_grad
    assert losses.kto_kl(-ratios.sum(), 3).item() == 0
    # Cutting micro-batches' means at 0 and averaging those would give another number.
    assert torch.stack([losses.kto_kl(r, 1) for r in ratios]).mean().item() == pytest.approx(5 / 3)
    logps, inputs = random_step()
    inputs["kl"].requires_grad_()
    assert not call(build("kto"), logps, inputs)[0].requires_grad


def test_kto_takes_answers_that_are_not_in_pairs():
    """Rows 0-2 have a desirable answer, 3 and 4 an undesirable one, 5 both."""
    logps, inputs = random_step()
    has_chosen, has_rejected = torch.tensor([1, 1, 1, 0, 0, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    chosen, rejected = ([logps[i] * has, logps[i + 2] * has] for i, has in ((0, has_chosen), (1, has_rejected)))
    loss_fn = build("kto", desirable_weight=1.33)
    lengths = {"chosen_lengths": 4 * has_chosen, "rejected_lengths": 7 * has_rejected}
    values, *rewards = loss_fn(chosen[0], rejected[0], chosen[1], rejected[1], **lengths, kl=inputs["kl"])
    r, kl = [logps[0] - logps[2], logps[1] - logps[3]], inputs["kl"]
    wanted, unwanted = 1.33 * (1 - sg(0.1 * (r[0] - kl))), 1 - sg(0.1 * (kl - r[1]))
    expected = torch.stack([*wanted[:3], *unwanted[3:5], (wanted[5] + unwanted[5]) / 2])
    torch.testing.assert_close(values, expected)
    torch.testing.assert_close(rewards[0][has_chosen.bool()], 0.1 * r[0][has_chosen.bool()])
    torch.testing.assert_close(rewards[1][has_rejected.bool()], 0.1 * r[1][has_rejected.bool()])


def test_only_kto_takes_unpaired_rows():
    assert [name for name in LOSSES if name != "mixture" and needs(build(name)).takes_unpaired] == ["kto"]
    assert needs(build("mixture", terms=[{"name": "kto"}])).takes_unpaired
    assert not needs(build("mixture", terms=[{"name": "kto"}, {"name": "sft"}])).takes_unpaired


def test_a_row_without_a_chosen_answer_has_no_chosen_tokens():
    pairs = [Pair([1], [5, 6, 2], [7, 2], 0), Pair([1], [], [7, 2], 1)]
    assert [loss_needs.mean_chosen_length(pairs, score_end=end) for end in (True, False)] == [1.5, 1.0]


def test_mismatched_pairs_have_each_answer_once_and_never_behind_its_own_prompt():
    pairs = [Pair(prompt=[i], chosen=[10 + i], rejected=[20 + i], row=i) for i in range(4)]
    for pair, own in zip(loss_needs.mismatched(pairs, 2), pairs, strict=True):
        assert pair.prompt == own.prompt and pair.chosen != own.chosen and pair.rejected != own.rejected
    assert sorted(p.chosen[0] for p in loss_needs.mismatched(pairs, 2)) == [10, 11, 12, 13]


def test_rows_of_one_prompt_side_by_side_get_answers_to_another_one():
    apart = [
        Pair([i], *(([10 + i], []) if n == 0 else ([], [20 + i])), row=2 * i + n) for i in range(3) for n in (0, 1)
    ]
    for pair, own in zip(loss_needs.mismatched(apart, 2), apart, strict=True):
        answer = (pair.chosen or pair.rejected)[0]
        assert pair.prompt == own.prompt and answer % 10 != own.prompt[0]
    assert loss_needs.mismatched(apart[:2], 2) == loss_needs.mismatched(apart[:1], 2) == []
    assert losses.kto_kl(torch.zeros(()), 0).item() == 0


def test_a_step_of_two_prompts_has_mismatched_pairs_however_long_they_are():
    """The shortest prompt takes any answers: they stand behind a longer one of their own. So no step is without."""
    full = [Pair([i] * (9 - length), [5] * length, [6], row=i) for i, length in enumerate([8, 1, 4])]
    assert [(p.row, len(p.chosen)) for p in loss_needs.mismatched(full, 9)] == [(0, 1), (2, 1)]
    for two in (full[:2], full[1:], full[::2]):
        assert len(loss_needs.mismatched(two, 9)) == 1


def logp_of_answer(model, prompt, answer):
    """In float64, of one conversation alone."""
    tokens = torch.tensor([prompt + answer])
    table = model(tokens)[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return table.gather(1, tokens[0, len(prompt) :, None]).sum()


@torch.no_grad()
def test_ktos_baseline_is_the_naive_one_on_a_model_of_no_more_positions_than_max_length():
    """A row whose answers do not fit is passed over (3), one for whose prompt none fits is left out (5)."""
    pairs = as_pairs(7)
    policy, reference = (tiny_llama(seed=seed, max_seq_len=MAX_LENGTH).double() for seed in (1, 2))
    found, ratios = {}, []
    for i, own in enumerate(pairs):
        for other in (pairs + pairs)[i + 1 : i + 7]:
            if other.prompt != own.prompt and i not in found:
                conversations = [(own.prompt, answer) for answer in (other.chosen, other.rejected)]
                if all(len(prompt + answer) <= MAX_LENGTH for prompt, answer in conversations):
                    found[i] = other.row
                    ratios += [logp_of_answer(policy, *c) - logp_of_answer(reference, *c) for c in conversations]
    assert found == {0: 1, 1: 2, 2: 3, 3: 5, 4: 5, 6: 0}
    expected = torch.stack(ratios).mean()
    assert expected > 1  # above where it is cut
    for model in (policy, reference):
        models.prepare(model, max_length=MAX_LENGTH)
    for batch_size in (1, 4, 7):
        got = losses_worker.kl_of(policy, reference, pairs, batch_size, dist.start("cpu"))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-6)  # torchtune's norms are float32


# A whole step


def prepared(seed):
    model = tiny_llama(seed=seed).double()
    models.prepare(model, max_length=128)
    return model


def test_every_loss_and_option_for_scores_is_among_the_steps():
    assert {name for name, _ in STEPS} >= LOSSES.keys()
    for option in ("wpo", "ld_alpha"):
        have = {name for name, make in LOSSES.items() if option in inspect.signature(make).parameters}
        assert {name for name, options in STEPS if option in options} == have


@each(STEPS)
def test_a_step_does_not_depend_on_its_micro_batches(name, options):
    """Eight of one are one of eight, and three, three and two."""
    loss_fn, model, reference = loss_of(name, options), prepared(1), prepared(0)
    pairs = as_pairs(8, loss_fn)

    def step(batch_size):
        loss, by_pair = train_step(loss_fn, model, reference, pairs, batch_size, dist.start("cpu"))
        return loss, torch.tensor(by_pair), torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, *gradients = step(8)
    assert all(g.any() for g in gradients)
    for batch_size in (1, 3):
        other_loss, *others = step(batch_size)
        assert other_loss == pytest.approx(loss, abs=1e-6)
        # Models compute in float64; what is left is WPO's weights, which are float32.
        assert all((o - g).norm() / g.norm() < 1e-6 for o, g in zip(others, gradients, strict=True))


def test_a_step_does_not_depend_on_the_number_of_processes(tmp_path):
    """On a model that FSDP2 shards, with 7 pairs on 2 processes: the last micro-batch of one of them is empty."""
    worker, path = Path(__file__).with_name("losses_worker.py"), tmp_path / "results.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run([*command, str(worker), str(path)], env=ENVIRONMENT, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    alone = losses_worker.measure(dist.start("cpu"), batch_size=7)
    for case, got, expected in zip(STEPS, json.loads(path.read_text()), alone, strict=True):
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5), case  # float32
        assert len(got["gradients"]) == 7
        for which in ("gradients", "norms"):
            ours, theirs = torch.tensor(got[which]), torch.tensor(expected[which])
            assert theirs.any() and (ours - theirs).norm() / theirs.norm() < 1e-4, (case, which)


def test_a_pair_of_weight_two_counts_as_two_and_a_margin_is_what_rewards_have_to_differ_by():
    """The loss is sum(w_i l_i) / sum(w_i), and l of -log sigmoid(z - margin), of max(0, 1 - (z - margin))."""
    model, reference, pairs = prepared(1), prepared(0), as_pairs(4)
    world, twice = dist.start("cpu"), [*pairs, pairs[2]]
    weighted = [replace(pair, weight=3.0 * (1 + (pair is pairs[2]))) for pair in pairs]
    for name in ("sigmoid", "orpo", "nca_pair"):
        losses_of = [train_step(build(name), model, reference, some, 9, world)[0] for some in (twice, weighted)]
        assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-6)
    logps = [
        torch.tensor(values, dtype=torch.float64) for values in ([-3.0, -9.0], [-4.0, -5.0], [-3.5, -8.0], [-4.0, -7])
    ]
    z, margins = 0.5 * ((logps[0] - logps[2]) - (logps[1] - logps[3])), torch.tensor([0.3, -1.2], dtype=torch.float64)
    e = 0.2
    naive_losses = {
        "sigmoid": -ls(z - margins),
        "sigmoid_norm": -ls(0.5 * ((logps[0] - logps[2]) / 4 - (logps[1] - logps[3]) / 2) - margins),
        "hinge": (1 - (z - margins)).clamp(min=0),
        "robust": (-(1 - e) * ls(z - margins) + e * ls(-(z - margins))) / (1 - 2 * e),
    }
    assert naive_losses.keys() == {name for name, kind in LOSSES.items() if kind.takes_margins}
    lengths = {"chosen_lengths": torch.tensor([4.0, 4.0]), "rejected_lengths": torch.tensor([2.0, 2.0])}
    for name, expected in naive_losses.items():
        loss_fn = build(name, beta=0.5, **({"label_smoothing": e} if name == "robust" else {}))
        found, *_ = loss_fn(*logps, margins=margins, **(lengths if name == "sigmoid_norm" else {}))
        torch.testing.assert_close(found, expected)


def test_weights_and_margins_are_refused_by_losses_that_take_none():
    for loss_fn, names, said in (
        (build("ipo"), ["weight", "margin"], "dataset.columns.margin: the loss ipo takes no margins"),
        (build("kto"), ["margin"], "dataset.columns.margin: the loss kto takes no margins"),
        (build("aot"), ["weight"], "dataset.columns.weight: the loss aot takes no weights"),
        (
            DPOLoss(),
            ["weight"],
            "loss DPOLoss takes no weights of pairs; loss=sigmoid does, and is torchtune's DPOLoss",
        ),
        (
            build("mixture", terms=[{"name": "sigmoid"}, {"name": "sft"}]),
            ["weight"],
            "the loss mixture takes no weights",
        ),
    ):
        with pytest.raises(UserError, match=said):
            loss_needs.check_takes(loss_fn, names, "dataset")
    loss_needs.check_takes(build("kto"), ["weight"], "dataset")
    loss_needs.check_takes(build("sigmoid"), ["weight", "margin"], "dataset")


@each([("aot", {"beta": 1.0}), ("aot_unpaired", {"beta": 1.0}), ("sft", {})])
def test_a_step_taken_pair_by_pair_is_another_loss_than_the_whole_steps(name, options):
    """So the test above can see what it is for."""
    logps, inputs = random_step(8)
    loss_fn = build(name, **options)
    whole = call(loss_fn, logps, inputs)[0].mean()
    parts = []
    for i in range(8):
        its = inputs | {"mean_chosen_length": inputs["chosen_lengths"][i].item()}
        parts.append(call(loss_fn, [x[i : i + 1] for x in logps], its)[0])
    assert (torch.cat(parts).mean() - whole).abs() > 1e-2


@each([case for case in CASES if case[0] in ("aot", "aot_unpaired", "sigmoid", "sft", "kto", "mixture")])
def test_step_gradients_are_autograds(name, options):
    logps, inputs = random_step(8)
    loss_fn = build(name, **options)
    its = {n: inputs[n] for n in needs(loss_fn).inputs}
    with torch.no_grad():
        step = step_gradients(loss_fn, *logps, **its)
    policy = [x.clone().requires_grad_() for x in logps[:2]]
    values, chosen_rewards, rejected_rewards = loss_fn(*policy, *logps[2:], **its)
    gradients = torch.autograd.grad(values.sum(), policy, allow_unused=True, materialize_grads=True)
    assert torch.equal(step.losses, values) and not step.losses.requires_grad
    assert torch.equal(step.chosen_gradients, gradients[0]) and torch.equal(step.rejected_gradients, gradients[1])
    assert torch.equal(step.chosen_rewards, chosen_rewards) and torch.equal(step.rejected_rewards, rejected_rewards)


@each([("aot", {}), ("aot_unpaired", {}), ("mixture", {"terms": [{"name": "aot"}, {"name": "sft"}]})])
def test_a_micro_batch_answers_with_its_part_of_the_step(name, options):
    """Its losses' values and rewards are the step's, and so is the gradient, whatever its own values would give."""
    logps, inputs = random_step(8)
    loss_fn = build(name, **options)
    whole = step_gradients(loss_fn, *logps, **{n: inputs[n] for n in needs(loss_fn).inputs})
    part = StepLosses(*(value[2:5] for value in vars(whole).values()))
    policy = [x[2:5].clone().requires_grad_() for x in logps[:2]]
    losses, *rewards = loss_fn(*policy, *(x[2:5] for x in logps[2:]), step=part)
    assert torch.equal(losses, part.losses)
    assert torch.equal(rewards[0], part.chosen_rewards) and torch.equal(rewards[1], part.rejected_rewards)
    gradients = torch.autograd.grad(losses.sum(), policy)
    assert torch.equal(gradients[0], part.chosen_gradients) and torch.equal(gradients[1], part.rejected_gradients)


def test_aot_gives_each_loss_to_the_pair_whose_policy_margin_it_is():
    logps, _ = random_step(8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    for name in ("aot", "aot_unpaired"):
        loss_fn = build(name)
        torch.testing.assert_close(loss_fn(*[x[order] for x in logps])[0], loss_fn(*logps)[0][order])


# LD-DPO and WPO, where the tokens are


def token_table(model, pairs):
    """Each answer's log-probabilities over the vocabulary [n, V], and its tokens; chosen, then rejected."""
    table = []
    for prompt, answer in [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]:
        logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1].double()
        table.append((logits.log_softmax(-1), torch.tensor(answer)))
    return table


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_ld_alpha_weighs_the_tokens_beyond_the_shorter_answer(ld_alpha):
    model = tiny_llama()
    pairs = as_pairs(5)
    tokens = [table.gather(1, answer[:, None])[:, 0] for table, answer in token_table(model, pairs)]
    expected = []
    for i, answer in enumerate(tokens):
        n = min(len(tokens[i % 5]), len(tokens[i % 5 + 5]))
        expected.append(answer[:n].sum() + ld_alpha * answer[n:].sum())
    assert len({len(t) for t in tokens}) > 1
    models.prepare(model, max_length=128)
    got = torch.cat(answer_logps(model, lay_out(pairs), ld_alpha))
    torch.testing.assert_close(got.double(), torch.stack(expected), atol=1e-4, rtol=0)
    scores = answer_scores(model, lay_out(pairs), ld_alpha=ld_alpha)
    assert torch.equal(torch.cat([scores.chosen_logps, scores.rejected_logps]), got)
    assert torch.equal(scores.whole_chosen_logps, answer_logps(model, lay_out(pairs))[0])
    if ld_alpha == 1:
        assert torch.equal(got, torch.cat(answer_logps(model, lay_out(pairs))))


@pytest.mark.parametrize("head", ["frozen", "trained", "tied", "lora", "no_grad"])
def test_wpo_weights_are_those_of_the_whole_vocabulary(head):
    model, pairs = tiny_llama(tied=head == "tied"), as_pairs(4)
    if head == "lora":
        model.output = LoRALinear(64, 320, rank=4, alpha=8)
        torch.nn.init.normal_(model.output.lora_b.weight)
    expected = []
    for table, answer in token_table(model, pairs):
        token = table.gather(1, answer[:, None])[:, 0]
        expected.append((token - table.exp().square().sum(-1).log()).mean().exp())
    models.prepare(model, max_length=128)
    if head == "frozen":
        model.output.weight.requires_grad_(False)
    with torch.set_grad_enabled(head != "no_grad"):
        scores = answer_scores(model, lay_out(pairs), weights=True)
    got = torch.cat([scores.chosen_weights, scores.rejected_weights])
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), torch.stack(expected).detach(), rtol=1e-4, atol=0)
    assert scores.chosen_logps.requires_grad == (head != "no_grad")
    if head == "lora":
        scores.chosen_logps.sum().backward()  # computes chunks again
    assert model.pairtune.log_collision is None


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("keep_bytes", [0, 2**30])
@pytest.mark.parametrize("chunk_size", [1, 7, 100])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_collision_probabilities_cost_no_change_of_values_and_gradients(trainable, keep_bytes, chunk_size, softcap):
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(50, 8, requires_grad=trainable)
    target, log_collision = torch.randint(50, (20,)), torch.empty(20)
    options = {"softcap": softcap, "chunk_size": chunk_size, "keep_bytes": keep_bytes}
    inputs = [hidden, weight] if trainable else [hidden]
    plain = token_logps(hidden, weight, target, **options)
    with_collision = token_logps(hidden, weight, target, **options, log_collision=log_collision)
    assert torch.equal(plain, with_collision)
    for a, b in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (plain, with_collision)), strict=True):
        assert torch.equal(a, b)
    logits = hidden.double() @ weight.double().T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.softmax(-1).square().sum(-1).log()
    torch.testing.assert_close(log_collision.double(), expected, atol=1e-5, rtol=0)


def test_a_batch_of_padding_has_scores_too():
    model = tiny_llama()
    models.prepare(model, max_length=128)
    scores = answer_scores(model, lay_out([]), ld_alpha=0.5, weights=True)
    assert scores.chosen_weights.shape == scores.chosen_logps.shape == (0,)
    scores.chosen_logps.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


# Advice


def test_kto_s_weights_are_held_against_the_number_of_labels():
    """Three desirable answers to one undesirable one: a third of the weight balances them."""
    pairs = [Pair([1], [2], [], 0)] * 3 + [Pair([1], [], [2], 3)]
    kto = {"_component_": "pairtune.preference_losses.Kto"}
    (sentence,) = advice_for(kto, None, "lora", pairs)
    assert "weigh 3.00 to 1 altogether" in sentence and "loss.desirable_weight=0.333 to 0.444" in sentence
    assert advice_for(kto | {"desirable_weight": 0.4}, None, "lora", pairs) == []
    assert advice_for(kto | {"undesirable_weight": 3.0}, None, "lora", pairs) == []
    assert advice_for(kto, None, "lora", pairs[:3]) == []  # nothing to weigh against


def test_advice_is_for_the_loss_itself_and_not_for_another_of_its_name(own_losses):
    for path, num_sentences in (("torchtune.rlhf.loss", 1), ("torchtune.rlhf.loss.dpo", 1), ("own_losses", 0)):
        assert len(advice_for({"_component_": f"{path}.DPOLoss", "beta": 5.0}, None, "full")) == num_sentences
    assert len(advice_for({"_component_": "pairtune.preference_losses.sigmoid", "beta": 5.0}, None, "full")) == 1


def advice(name, lr=None, method="full", **options):
    return advice_for({"_component_": path_of(name), **options}, lr, method)


def test_of_the_defaults_orpos_alone_lies_outside_of_what_was_published():
    """With the block of a run's config, as recipes ask."""
    terms = {"mixture": {"terms": MIX}}
    blocks = {name: OmegaConf.create({"_component_": path_of(name), **terms.get(name, {})}) for name in LOSSES}
    assert [name for name, block in blocks.items() if advice_for(block, None, "lora")] == ["orpo"]


def test_advice_is_given_outside_of_what_was_published_and_names_its_source():
    assert advice("sigmoid", lr=5e-7) == advice("sigmoid", lr=5e-7, beta=0.05) == []
    assert advice("ipo", lr=1.0, beta=100.0) == []  # nothing known, nothing said
    (sentence,) = advice("sigmoid", lr=5e-4, method="qlora")
    assert sentence.startswith("optimizer.lr=0.0005: published lora runs of sigmoid used 5e-07 (Notus")
    (sentence,) = advice("sigmoid_norm", lr=5e-7, beta=0.1)
    assert sentence == "loss.beta=0.1: published runs of sigmoid_norm used 5 (Tulu 3 8B)"
    assert advice("orpo", orpo_lambda=1.0)[0].startswith("loss.orpo_lambda=1: ")
    assert {p.loss for p in ADVICE} <= LOSSES.keys()
    assert all(p.method in ("full", "lora") for p in ADVICE if p.lr)
