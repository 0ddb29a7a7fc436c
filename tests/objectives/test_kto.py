"""KTO against formulas written from the paper, value and gradient, in float64."""

import math

import pytest
import torch

from posttrain.objectives.kto import LabelledInputs, kto_loss, kto_reference_point
from posttrain.objectives.preference import PairInputs, PreferenceSpec, preference_loss
from posttrain.objectives.reduce import Normalizer
from posttrain.types import Ratio

NORM = Normalizer(tokens=25, sequences=5)


def _sigma(x):
    return 1 / (1 + math.exp(-x))


def _tensor(values):
    return torch.tensor(values, dtype=torch.float64)


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
        inputs = PairInputs(*[_tensor(LOGP[:2])] * 2, *[torch.ones(2)] * 2)
        preference_loss(inputs, PreferenceSpec(loss_type="kto"), NORM)
