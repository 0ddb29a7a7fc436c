import math

import pytest
import torch

from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.sft import SFT_LOSSES, sft_loss

LOGP = [-0.1, -2.0, -0.7, -1.3]
NORM = Normalizer(tokens=10, sequences=3)


def _oracle(logp, loss_type):
    """Value and gradient from the definitions: d(−logp) = −1; d(−sg(p)·logp) = −p."""
    p = [math.exp(x) if loss_type == "dft" else 1.0 for x in logp]
    return sum(-w * x for w, x in zip(p, logp, strict=True)) / 10, [-w / 10 for w in p]


@pytest.mark.parametrize("loss_type", SFT_LOSSES)
def test_value_and_gradient(loss_type):
    logp = torch.tensor(LOGP, dtype=torch.float64, requires_grad=True)
    terms = sft_loss(logp, NORM, loss_type)
    terms.loss.backward()
    value, gradient = _oracle(LOGP, loss_type)
    assert terms.loss.item() == pytest.approx(value, rel=1e-14)
    assert logp.grad is not None and logp.grad.tolist() == pytest.approx(gradient, rel=1e-14)


@pytest.mark.parametrize("loss_type", SFT_LOSSES)
def test_micro_batches_add_up(loss_type):
    logp = torch.tensor(LOGP, dtype=torch.float64)
    whole, first, rest = (sft_loss(part, NORM, loss_type) for part in (logp, logp[:1], logp[1:]))
    assert (first.loss + rest.loss).item() == pytest.approx(whole.loss.item(), rel=1e-14)
    for name, ratio in whole.metrics.items():
        assert (first.metrics[name] + rest.metrics[name]).value == pytest.approx(ratio.value, rel=1e-14)


def test_metrics():
    logp = torch.tensor(LOGP, dtype=torch.float64)
    top1 = torch.tensor([True, False, True, True])
    metrics = sft_loss(logp, NORM, "dft", top1, torch.full((4,), 0.5)).metrics
    assert metrics["nll_loss"].value == pytest.approx(4.1 / 4)
    assert metrics["mean_token_accuracy"].value == 0.75
    assert metrics["entropy"].value == 0.5
    assert set(sft_loss(logp, NORM).metrics) == {"loss"}


def test_nothing_trained_is_zero():
    terms = sft_loss(torch.zeros(0, requires_grad=True), Normalizer(tokens=0, sequences=1))
    assert terms.loss.item() == 0
