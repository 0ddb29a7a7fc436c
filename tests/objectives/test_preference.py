"""Every preference loss against formulas written from the papers, value and gradient, in float64."""

import math
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import get_args

import pytest
import torch

from posttrain.config.effects import without_effect
from posttrain.config.stages import DPOKeys, PreferenceLoss
from posttrain.errors import ConfigError
from posttrain.objectives.preference import (
    PREFERENCE_LOSSES,
    LabelledInputs,
    PairInputs,
    Pairs,
    Partners,
    PreferenceSpec,
    kto_loss,
    kto_reference_point,
    partners_over,
    preference_loss,
)
from posttrain.objectives.reduce import Normalizer
from posttrain.types import Ratio

PAIRED = [name for name, row in PREFERENCE_LOSSES.items() if not row.unpaired]
MARGIN = [name for name in PAIRED if name not in ("sft", "aot", "aot_unpaired")]

CHOSEN, REJECTED = [-12.0, -3.5, -20.0], [-14.0, -3.0, -9.0]
REF_CHOSEN, REF_REJECTED = [-13.0, -3.0, -18.0], [-13.5, -4.0, -9.5]
CHOSEN_TOKENS, REJECTED_TOKENS = [6, 2, 10], [5, 3, 4]
NORM = Normalizer(tokens=25, sequences=5)


def _ls(x):
    """log σ(x)."""
    return -math.log1p(math.exp(-x))


def _sigma(x):
    return 1 / (1 + math.exp(-x))


def _smooth(z, e):
    return -(1 - e) * _ls(z) - e * _ls(-z)


def _pair_oracle(name, spec, w, l, rw, rl, nw, nl):  # noqa: E741 - the papers' letters
    beta, e, a, b = spec.beta, spec.label_smoothing, w - rw, l - rl
    z = beta * (a - b)
    odds = [math.log(math.exp(x) / (1 - math.exp(x))) for x in (w / nw, l / nl)]
    q = _sigma(z)
    m = _sigma(z / spec.discopop_tau)
    return {
        "sigmoid": lambda: _smooth(z, e),
        "ipo": lambda: (a / nw - b / nl - 1 / (2 * beta)) ** 2,
        "hinge": lambda: max(0.0, 1 - z),
        "robust": lambda: (-(1 - e) * _ls(z) + e * _ls(-z)) / (1 - 2 * e),
        "exo_pair": lambda: q * math.log(q / (1 - e)) + (1 - q) * math.log((1 - q) / e),
        "nca_pair": lambda: -_ls(beta * a) - 0.5 * _ls(-beta * a) - 0.5 * _ls(-beta * b),
        "bco_pair": lambda: -_ls(beta * a) - _ls(-beta * b),
        "sppo_hard": lambda: (a - 0.5 / beta) ** 2 + (b + 0.5 / beta) ** 2,
        "apo_zero": lambda: 1 - _sigma(beta * a) + _sigma(beta * b),
        "apo_down": lambda: _sigma(beta * a) + 1 - _sigma(beta * (a - b)),
        "discopop": lambda: (1 - m) * -_ls(z) + m * math.exp(-z),
        "sigmoid_norm": lambda: _smooth(beta * (a / nw - b / nl), e),
        "sft": lambda: 0.0,
        "simpo": lambda: _smooth(beta * (w / nw - l / nl) - spec.simpo_gamma, e),
        "cpo": lambda: _smooth(beta * (w - l), e),
        "orpo": lambda: -beta * _ls(odds[0] - odds[1]),
    }[name]()


def _oracle(name, spec, chosen, rejected):
    if name in ("aot", "aot_unpaired"):
        if name == "aot":
            left = [w - x for w, x in zip(chosen, rejected, strict=True)]
            right = [w - x for w, x in zip(REF_CHOSEN, REF_REJECTED, strict=True)]
        else:
            left = [w - r for w, r in zip(chosen, REF_CHOSEN, strict=True)]
            right = [x - r for x, r in zip(rejected, REF_REJECTED, strict=True)]
        gaps = [x - y for x, y in zip(sorted(left), sorted(right), strict=True)]
        pairs = sum(_smooth(spec.beta * g, spec.label_smoothing) for g in gaps)
    else:
        columns = (chosen, rejected, REF_CHOSEN, REF_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS)
        pairs = sum(_pair_oracle(name, spec, *values) for values in zip(*columns, strict=True))
    nll_weight = {"sft": 1.0, "orpo": 1.0, "cpo": spec.cpo_alpha}.get(name, 0.0) + spec.rpo_alpha
    return pairs / NORM.sequences - nll_weight * sum(chosen) / NORM.tokens


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def _with_partners(name, inputs):
    """The inputs as a whole step of their own."""
    if PREFERENCE_LOSSES[name].partners is None:
        return inputs
    references = (inputs.ref_chosen_logp_P, inputs.ref_rejected_logp_P)
    step = Pairs(inputs.chosen_logp_P, inputs.rejected_logp_P, *references)
    return replace(inputs, partners=partners_over(step, name))


def _inputs(name="sigmoid"):
    return _with_partners(name, _bare_inputs())


def _bare_inputs():
    return PairInputs(
        chosen_logp_P=_tensor(CHOSEN).requires_grad_(),
        rejected_logp_P=_tensor(REJECTED).requires_grad_(),
        chosen_tokens_P=torch.tensor(CHOSEN_TOKENS),
        rejected_tokens_P=torch.tensor(REJECTED_TOKENS),
        ref_chosen_logp_P=_tensor(REF_CHOSEN),
        ref_rejected_logp_P=_tensor(REF_REJECTED),
    )


def _spec(name, **knobs):
    if name == "exo_pair":
        knobs.setdefault("label_smoothing", 1e-3)
    elif not PREFERENCE_LOSSES[name].smooths:
        knobs.pop("label_smoothing", None)
    return PreferenceSpec(loss_type=name, **knobs)


OPTIONS = {
    "default": {},
    "smoothed": {"label_smoothing": 0.1},
    "strong": {"beta": 0.5, "simpo_gamma": 1.5, "cpo_alpha": 0.3, "discopop_tau": 0.5},
    "rpo": {"rpo_alpha": 0.7},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", PAIRED)
def test_oracle(name, option):
    spec, inputs = _spec(name, **OPTIONS[option]), _inputs(name)
    loss = preference_loss(inputs, spec, NORM).loss
    assert loss.item() == pytest.approx(_oracle(name, spec, CHOSEN, REJECTED), rel=1e-12)
    leaves = [inputs.chosen_logp_P, inputs.rejected_logp_P]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    for side, gradient in enumerate(gradients):
        for i in range(3):
            values = []
            for h in (1e-6, -1e-6):
                sides = [[*CHOSEN], [*REJECTED]]
                sides[side][i] += h
                values.append(_oracle(name, spec, *sides))
            slope = (values[0] - values[1]) / 2e-6
            ours = 0.0 if gradient is None else gradient[i].item()
            assert ours == pytest.approx(slope, rel=1e-6, abs=1e-8)


# At a = b = 0 and the default beta = 0.1.
AT_ZERO = {
    "sigmoid": math.log(2),
    "ipo": 25.0,
    "hinge": 1.0,
    "robust": math.log(2),
    "exo_pair": 2.761231,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "sppo_hard": 50.0,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.846574,
    "sigmoid_norm": math.log(2),
}


def _equal_inputs(logp=-5.0, dtype=torch.float64):
    same = torch.full((2,), logp, dtype=dtype)
    tokens = torch.tensor([3, 3])
    return PairInputs(same, same, tokens, tokens, same, same)


@pytest.mark.parametrize("name", AT_ZERO)
def test_value_when_the_policy_is_its_reference(name):
    inputs = _with_partners(name, _equal_inputs())
    loss = preference_loss(inputs, _spec(name), Normalizer(tokens=6, sequences=2)).loss
    assert loss.item() == pytest.approx(AT_ZERO[name], abs=1e-6)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired", "cpo"])
def test_beta_zero_is_ln_two(name):
    loss = preference_loss(_inputs(name), _spec(name, beta=0.0, cpo_alpha=0.0), Normalizer(25, 3)).loss
    assert loss.item() == pytest.approx(math.log(2), rel=1e-15)


def _swapped(inputs):
    return PairInputs(
        inputs.rejected_logp_P,
        inputs.chosen_logp_P,
        inputs.rejected_tokens_P,
        inputs.chosen_tokens_P,
        inputs.ref_rejected_logp_P,
        inputs.ref_chosen_logp_P,
    )


@pytest.mark.parametrize("name", MARGIN)
def test_swap_flips_the_margin_and_raises_the_loss(name):
    """The chosen answer became likelier than under the reference, the rejected one rarer."""
    tokens = torch.tensor([5])
    inputs = PairInputs(_tensor([-2.0]), _tensor([-40.0]), tokens, tokens, _tensor([-6.0]), _tensor([-20.0]))
    right, wrong = (preference_loss(x, _spec(name), Normalizer(5, 1)) for x in (inputs, _swapped(inputs)))
    assert wrong.metrics["rewards/margins"].value == pytest.approx(-right.metrics["rewards/margins"].value)
    assert right.metrics["rewards/margins"].value > 0
    assert wrong.loss.item() > right.loss.item()


def test_discopop_rises_just_above_zero():
    """Its mixture is not monotone: at z = 0.2 the loss is above that at z = −0.2."""
    losses = []
    for d in (2.0, -2.0):
        inputs = PairInputs(_tensor([d]), _tensor([0.0]), *[torch.ones(1)] * 2, *[_tensor([0.0])] * 2)
        losses.append(preference_loss(inputs, PreferenceSpec(loss_type="discopop"), Normalizer(1, 1)).loss.item())
    assert losses == pytest.approx([0.814763, 0.805752], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("margin", [500.0, -500.0])
@pytest.mark.parametrize("name", PAIRED)
def test_margins_of_500_stay_finite(name, margin, beta, dtype):
    """One token an answer, so that the margin reaches length-mean losses too; log-probs stay ≤ 0."""
    chosen = torch.tensor([min(margin, 0.0)], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([min(-margin, 0.0)], dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(1, dtype=dtype), torch.ones(1, dtype=torch.int64)
    inputs = _with_partners(name, PairInputs(chosen, rejected, one, one, zero, zero))
    terms = preference_loss(inputs, _spec(name, beta=beta), Normalizer(1, 1))
    terms.loss.backward()
    assert terms.loss.isfinite()
    for leaf in (chosen, rejected):
        assert leaf.grad is None or leaf.grad.isfinite().all()


@pytest.mark.parametrize("name", PAIRED)
def test_splitting_and_permuting_change_nothing(name):
    spec, inputs = _spec(name, rpo_alpha=0.2), _inputs(name)
    whole = preference_loss(inputs, spec, NORM)
    parts = [preference_loss(_select(inputs, keep), spec, NORM) for keep in ([2, 0], [1])]
    loss = parts[0].loss + parts[1].loss
    torch.testing.assert_close(loss, whole.loss, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs.chosen_logp_P)[0], torch.autograd.grad(whole.loss, inputs.chosen_logp_P)[0]
    )
    for key, ratio in whole.metrics.items():
        assert (parts[0].metrics[key] + parts[1].metrics[key]).value == pytest.approx(ratio.value, rel=1e-13)


def _select(inputs, keep):
    """Some pairs of a step, with what they are compared with over the whole of it."""
    *tensors, partners = (getattr(inputs, name) for name in PairInputs.__slots__)
    if partners is not None:
        partners = Partners(partners.of_better[keep], partners.of_worse[keep])
    return PairInputs(*(tensor[keep] for tensor in tensors), partners)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
@pytest.mark.parametrize("order", [[2, 0, 1], [1, 2, 0]])
def test_aot_does_not_depend_on_the_order_of_the_step(name, order):
    spec, whole = _spec(name), _inputs(name)
    reordered = _with_partners(name, replace(_select(whole, order), partners=None))
    for leaf in (whole.chosen_logp_P, whole.rejected_logp_P):
        one, other = (torch.autograd.grad(preference_loss(x, spec, NORM).loss, leaf)[0] for x in (whole, reordered))
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-15)


def test_equal_values_have_partners_of_their_own():
    same = torch.zeros(3, dtype=torch.float64)
    partners = partners_over(Pairs(same, same, _tensor([0.0, 1.0, 2.0]), same), "aot")
    assert partners.of_better.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_without_the_step_it_compares_over_is_refused(name):
    with pytest.raises(AssertionError, match="compares over the step"):
        preference_loss(replace(_inputs(name), partners=None), _spec(name), NORM)


def test_losses_without_a_reference_do_not_read_one():
    for name in PAIRED:
        bare = replace(_inputs(), ref_chosen_logp_P=None, ref_rejected_logp_P=None)
        if PREFERENCE_LOSSES[name].needs_reference:
            with pytest.raises(AssertionError, match="needs a reference"):
                preference_loss(bare, _spec(name), NORM)
        else:
            assert torch.equal(
                preference_loss(bare, _spec(name), NORM).loss, preference_loss(_inputs(), _spec(name), NORM).loss
            )


def test_metrics_by_hand():
    """a = 1, −0.5, −2; b = −0.5, 1, 0.5; beta 0.1; the first pair alone is ranked right."""
    metrics = preference_loss(_inputs(), PreferenceSpec(), NORM).metrics
    assert metrics["rewards/chosen"].value == pytest.approx(0.1 * -1.5 / 3)
    assert metrics["rewards/rejected"].value == pytest.approx(0.1 * 1.0 / 3)
    assert metrics["rewards/margins"].value == pytest.approx(0.1 * -2.5 / 3)
    assert metrics["rewards/accuracies"].value == pytest.approx(1 / 3)
    assert metrics["logps/chosen"].value == pytest.approx(sum(CHOSEN) / 3)
    assert "nll_loss" not in metrics


def test_metrics_of_length_mean_losses():
    """With a reference rewards and logps are sums; without one they are what the loss compares: means."""
    ipo = preference_loss(_inputs(), PreferenceSpec(loss_type="ipo"), NORM).metrics
    simpo = preference_loss(_inputs(), PreferenceSpec(loss_type="simpo"), NORM).metrics
    assert ipo["logps/chosen"].value == pytest.approx(sum(CHOSEN) / 3)
    assert simpo["logps/chosen"].value == pytest.approx((-2 - 1.75 - 2) / 3)
    assert simpo["rewards/chosen"].value == pytest.approx(0.1 * (-2 - 1.75 - 2) / 3)


def test_orpo_metrics_by_hand():
    """p = 1/2 and 1/4 have odds 1 and 1/3: log odds ratio ln 3."""
    one = torch.ones(1, dtype=torch.int64)
    inputs = PairInputs(_tensor([math.log(0.5)]), _tensor([math.log(0.25)]), one, one)
    terms = preference_loss(inputs, PreferenceSpec(loss_type="orpo"), Normalizer(1, 1))
    assert terms.metrics["log_odds_chosen"].value == pytest.approx(math.log(3))
    assert terms.metrics["log_odds_ratio"].value == pytest.approx(math.log(0.75))
    assert terms.metrics["nll_loss"].value == pytest.approx(math.log(2))
    assert terms.loss.item() == pytest.approx(math.log(2) - 0.1 * math.log(0.75))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"loss_type": "exo_pair"}, "set it to 1e-3"),
        ({"loss_type": "ipo", "beta": 0.0}, "divides by beta"),
        ({"loss_type": "sppo_hard", "beta": 0.0}, "divides by beta"),
        ({"loss_type": "kto", "rpo_alpha": 0.1}, "has no pairs"),
    ],
)
def test_knobs_that_mean_nothing_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceSpec(**knobs)


def test_configuration_offers_exactly_the_table():
    assert set(get_args(PreferenceLoss)) == set(PREFERENCE_LOSSES)
    for field in dataclass_fields(PreferenceSpec):
        assert DPOKeys.model_fields[field.name].default == field.default


@pytest.mark.parametrize("name", PREFERENCE_LOSSES)
def test_configuration_says_when_label_smoothing_has_no_effect(name):
    keys = DPOKeys(base_model="x", datasets=[{"path": "x"}], loss_type=name, label_smoothing=0.1)
    notes = " ".join(without_effect(keys, lambda key: key == "label_smoothing"))
    assert ("label_smoothing" in notes) != PREFERENCE_LOSSES[name].smooths


# --- KTO -----------------------------------------------------------------------------------------------------------

LOGP, REF = [-10.0, -6.0, -8.0, -3.0], [-11.0, -5.0, -8.5, -1.0]
LABEL = [True, True, False, False]


def _kto_inputs(keep=(0, 1, 2, 3)):
    keep = list(keep)
    return LabelledInputs(_tensor(LOGP)[keep].requires_grad_(), _tensor(REF)[keep], torch.tensor(LABEL)[keep])


def test_kto_value_and_gradient():
    spec = PreferenceSpec(loss_type="kto", beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    inputs, z = _kto_inputs(), 0.4
    terms = kto_loss(inputs, z, spec, Normalizer(tokens=20, sequences=6))
    (gradient,) = torch.autograd.grad(terms.loss, inputs.logp_S)
    total = 0.0
    for i in range(4):
        ratio = LOGP[i] - REF[i]
        gain = _sigma(0.3 * ((ratio - z) if LABEL[i] else (z - ratio)))
        weight = 1.5 if LABEL[i] else 0.7
        total += weight * (1 - gain) / 6
        slope = weight * 0.3 * gain * (1 - gain) / 6 * (-1 if LABEL[i] else 1)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-12)
    assert terms.loss.item() == pytest.approx(total, rel=1e-12)


def test_kto_at_the_reference_is_one_half():
    spec = PreferenceSpec(loss_type="kto")
    terms = kto_loss(LabelledInputs(_tensor(REF), _tensor(REF), torch.tensor(LABEL)), 0.0, spec, Normalizer(4, 4))
    assert terms.loss.item() == pytest.approx(0.5)


def test_kto_micro_batches_add_up():
    spec, norm = PreferenceSpec(loss_type="kto"), Normalizer(tokens=20, sequences=4)
    whole = kto_loss(_kto_inputs(), 0.2, spec, norm)
    parts = [kto_loss(_kto_inputs(keep), 0.2, spec, norm) for keep in ((3, 0), (1,), (2,))]
    assert sum(float(p.loss.detach()) for p in parts) == pytest.approx(whole.loss.item(), rel=1e-14)
    for name, ratio in whole.metrics.items():
        total = parts[0].metrics[name] + parts[1].metrics[name] + parts[2].metrics[name]
        assert total.value == pytest.approx(ratio.value, rel=1e-14)


def test_kto_metrics_by_hand():
    """Desirable ratios 1 and −1, undesirable 0.5 and −2, beta 0.1."""
    metrics = kto_loss(_kto_inputs(), 0.2, PreferenceSpec(loss_type="kto"), Normalizer(20, 4)).metrics
    assert metrics["rewards/chosen"] == Ratio(pytest.approx(0.0), 2.0)
    assert metrics["rewards/rejected"].value == pytest.approx(0.1 * -1.5 / 2)
    assert metrics["logps/rejected"].value == pytest.approx(-11 / 2)
    assert metrics["kl"].value == pytest.approx(0.2)


def test_kto_extremes_stay_finite():
    logp = torch.tensor([-500.0, 0.0, -500.0, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, -500.0, 0.0, -500.0])
    terms = kto_loss(
        LabelledInputs(logp, ref, torch.tensor(LABEL)), 0.0, PreferenceSpec(loss_type="kto", beta=1.0), NORM
    )
    terms.loss.backward()
    assert terms.loss.isfinite() and logp.grad is not None and logp.grad.isfinite().all()


def test_kto_reference_point():
    assert kto_reference_point(Ratio(3.0, 2.0)) == 1.5
    assert kto_reference_point(Ratio(-3.0, 2.0)) == 0.0
    assert kto_reference_point(Ratio(0.0, 0.0)) == 0.0


def test_kto_rows_are_not_pairs():
    with pytest.raises(AssertionError, match="kto_loss"):
        preference_loss(_inputs(), PreferenceSpec(loss_type="kto"), NORM)
