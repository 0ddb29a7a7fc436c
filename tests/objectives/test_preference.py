"""Every preference loss against formulas written from the papers, value and gradient, in float64."""

import math
from dataclasses import fields as dataclass_fields
from dataclasses import replace
from typing import get_args

import pytest
import torch

from posttrain.config.effects import without_effect
from posttrain.config.preference import DPOKeys, PreferenceLoss
from posttrain.errors import ConfigError
from posttrain.objectives.preference import (
    PREFERENCE_LOSSES,
    PairInputs,
    Pairs,
    Partners,
    PreferenceSpec,
    partners_over,
    preference_loss,
)
from posttrain.objectives.reduce import Normalizer

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
        "dpop": lambda: _smooth(beta * (a - b - spec.dpop_lambda * max(0.0, -a)), e),
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
    "strong": {"beta": 0.5, "simpo_gamma": 1.5, "cpo_alpha": 0.3, "discopop_tau": 0.5, "dpop_lambda": 2.0},
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
    "dpop": math.log(2),
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


@pytest.mark.parametrize("name", ["sigmoid", "robust", "sigmoid_norm", "aot", "aot_unpaired", "dpop", "cpo"])
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
    found = {name: value for name in PairInputs.__slots__ if (value := getattr(inputs, name)) is not None}
    partners = found.pop("partners", None)
    if partners is not None:
        partners = Partners(partners.of_better[keep], partners.of_worse[keep])
    return PairInputs(**{name: tensor[keep] for name, tensor in found.items()}, partners=partners)


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


# --- what is done to all rows alike -----------------------------------------------------------------------------------


def _values(inputs, spec):
    """Loss and its gradient in both answers' log-probs."""
    loss = preference_loss(inputs, spec, NORM).loss
    return loss.item(), torch.autograd.grad(loss, [inputs.chosen_logp_P, inputs.rejected_logp_P])


def _check_by_differences(inputs, spec, oracle):
    """`oracle` of (chosen, rejected): the value, and the gradient by central differences."""
    value, gradients = _values(inputs, spec)
    assert value == pytest.approx(oracle(CHOSEN, REJECTED), rel=1e-12)
    for side, gradient in enumerate(gradients):
        for i in range(len(CHOSEN)):
            found = []
            for h in (1e-6, -1e-6):
                sides = [[*CHOSEN], [*REJECTED]]
                sides[side][i] += h
                found.append(oracle(*sides))
            assert gradient[i].item() == pytest.approx((found[0] - found[1]) / 2e-6, rel=1e-5, abs=1e-8)


def _f_prime(divergence, alpha, u):
    """f'(u), as the paper's table has it; its α is 1 − ours."""
    if divergence == "alpha_divergence":
        return (1 - u ** -(1 - alpha)) / (1 - alpha)
    return {"forward_kl": 1 - 1 / u, "js_divergence": math.log(2 * u / (1 + u)), "reverse_kl": math.log(u)}[divergence]


F_ROWS = [name for name, row in PREFERENCE_LOSSES.items() if row.takes_f_divergence and row.needs_reference]
COLUMNS = (REF_CHOSEN, REF_REJECTED, CHOSEN_TOKENS, REJECTED_TOKENS)


@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js_divergence", 0.5), ("alpha_divergence", 0.3)],
)
@pytest.mark.parametrize("name", F_ROWS)
def test_f_divergence_puts_f_prime_in_the_place_of_the_log_ratio(name, divergence, alpha):
    spec = _spec(name, beta=0.2, f_divergence_type=divergence, f_alpha_divergence_coef=alpha)

    def oracle(chosen, rejected):
        # ORPO's odds, which the oracle works out for every row, want log-probs below 0.
        shift = 50.0
        total = 0.0
        for w, x, rw, rx, nw, nx in zip(chosen, rejected, *COLUMNS, strict=True):
            a, b = (_f_prime(divergence, alpha, math.exp(d)) for d in (w - rw, x - rx))
            total += _pair_oracle(name, spec, a - shift, b - shift, -shift, -shift, nw, nx)
        return total / NORM.sequences

    _check_by_differences(_inputs(), spec, oracle)


def test_alpha_divergence_ends_at_both_kls():
    at = {}
    for alpha in (0.0, 1.0):
        at[alpha] = _values(
            _inputs(), PreferenceSpec(f_divergence_type="alpha_divergence", f_alpha_divergence_coef=alpha)
        )[0]
    assert at[1.0] == _values(_inputs(), PreferenceSpec())[0]
    assert at[0.0] == pytest.approx(_values(_inputs(), PreferenceSpec(f_divergence_type="forward_kl"))[0], rel=1e-12)


@pytest.mark.parametrize("divergence", ["forward_kl", "js_divergence", "alpha_divergence"])
@pytest.mark.parametrize("margin", [500.0, -500.0])
def test_f_divergences_of_far_answers_stay_finite(divergence, margin):
    chosen = torch.tensor([min(margin, 0.0)], requires_grad=True)
    inputs = PairInputs(chosen, -abs(chosen.detach() - margin), *[torch.ones(1)] * 2, *[torch.zeros(1)] * 2)
    loss = preference_loss(inputs, PreferenceSpec(f_divergence_type=divergence), Normalizer(1, 1)).loss
    (gradient,) = torch.autograd.grad(loss, chosen)
    assert loss.isfinite() and gradient.isfinite().all()


def test_losses_are_added_up_by_their_weights():
    """MPO's: preference, quality and generation; value and gradient are those of the losses alone, weighed."""
    names, weights = ("sigmoid", "bco_pair", "sft"), (0.8, 0.2, 1.0)

    def oracle(chosen, rejected):
        alone = [_oracle(name, PreferenceSpec(loss_type=name), chosen, rejected) for name in names]
        return sum(weight * loss for weight, loss in zip(weights, alone, strict=True))

    _check_by_differences(_inputs(), PreferenceSpec(loss_type=names, loss_weights=weights), oracle)


def test_a_sum_logs_the_rewards_under_the_reference():
    metrics = preference_loss(_inputs(), PreferenceSpec(loss_type=("sft", "sigmoid")), NORM).metrics
    assert metrics["rewards/chosen"].value == pytest.approx(0.1 * -1.5 / 3)
    assert "nll_loss" in metrics


@pytest.mark.parametrize("name", [name for name, row in PREFERENCE_LOSSES.items() if row.takes_margin])
def test_a_margin_is_taken_off_what_the_row_pushes_up(name):
    """βd − αm is what a row sees whose margins are m: the same as without, of a chosen answer that much less likely."""
    margins = [0.5, 0.0, 2.0]
    spec = _spec(name, beta=0.5, margin_coef=0.7, cpo_alpha=0.0, dpop_lambda=0.0)
    lengths = CHOSEN_TOKENS if PREFERENCE_LOSSES[name].length_mean else [1, 1, 1]

    def oracle(chosen, rejected):
        without = replace(spec, margin_coef=0.0)
        less = [w - 0.7 * m / 0.5 * n for w, m, n in zip(chosen, margins, lengths, strict=True)]
        return _oracle(name, without, less, rejected)

    _check_by_differences(replace(_inputs(), margin_P=_tensor(margins)), spec, oracle)


def test_a_pairs_weight_multiplies_its_terms():
    """Weights 2, 0 and 1: of the pair in the middle nothing is left, neither of its preference nor of its NLL."""
    spec = PreferenceSpec(rpo_alpha=0.5)
    weights = [2.0, 0.0, 1.0]

    def oracle(chosen, rejected):
        pairs = [_pair_oracle("sigmoid", spec, *v) for v in zip(chosen, rejected, *COLUMNS, strict=True)]
        nll = sum(weight * -w for weight, w in zip(weights, chosen, strict=True)) / NORM.tokens
        return sum(w * x for w, x in zip(weights, pairs, strict=True)) / NORM.sequences + 0.5 * nll

    _check_by_differences(replace(_inputs(), weight_P=_tensor(weights)), spec, oracle)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"loss_type": ("sigmoid", "kto")}, "reads labelled rows, the other losses pairs; name it alone"),
        ({"loss_type": ("aot", "aot_unpaired")}, "each sort the step in their own way; keep one"),
        ({"loss_type": ("sigmoid", "sft"), "loss_weights": (1.0,)}, "1 entries for 2 losses"),
        ({"loss_type": "kto", "ld_alpha": 0.5}, "has no pairs, which ld_alpha is for"),
        ({"loss_type": "kto", "row_weights": True}, "has no pairs, which row_weights is for"),
        ({"loss_type": "nca_pair", "f_divergence_type": "forward_kl"}, "set reverse_kl, or one of sigmoid"),
        ({"loss_type": "simpo", "f_divergence_type": "js_divergence"}, "under a reference"),
        ({"loss_type": "ipo", "margin_coef": 1.0}, "set it to 0, or take one of sigmoid"),
        ({"loss_type": "aot", "use_weighting": True}, "set use_weighting: false"),
        ({"loss_type": "aot_unpaired", "row_weights": True}, "set row_weights: false"),
    ],
)
def test_what_a_row_is_not_defined_for_is_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        PreferenceSpec(**knobs)
