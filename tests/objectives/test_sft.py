import math

import pytest
import torch

from posttrain.objectives import distill
from posttrain.objectives.distill import Head, token_scores
from posttrain.objectives.reduce import Normalizer
from posttrain.objectives.sft import SFT_LOSSES, Smoothing, eaft_weight, sft_loss

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


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("tiled", [False, True])
def test_smoothing_is_torch_s_own(monkeypatch, softcap, tiled):
    """(1-e)·(-log p(y)) + e·(mean over v of -log p(v)): value, and gradients of hidden states, head and bias, by the tile and whole."""
    if tiled:
        monkeypatch.setattr(distill, "head_tile_rows", lambda vocab, device: 16)
    torch.manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (7, 4), (7,))
    )
    target = torch.tensor([0, 6, 3, 3, 1])
    logits = hidden @ weight.t() + bias
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    theirs = torch.nn.functional.cross_entropy(logits, target, label_smoothing=0.3, reduction="sum") / 10
    expected = torch.autograd.grad(theirs, (hidden, weight, bias))
    logp, mean, top1, _ = token_scores(Head(hidden, weight, bias, softcap), target)
    terms = sft_loss(logp, NORM, smoothing=Smoothing(0.3, mean))
    assert terms.loss.item() == pytest.approx(theirs.item(), rel=1e-12)
    for mine, right in zip(torch.autograd.grad(terms.loss, (hidden, weight, bias)), expected, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
    assert top1.tolist() == (logits.argmax(-1) == target).tolist()
    assert terms.metrics["nll_loss"].value == pytest.approx(-logp.mean().item())


@pytest.mark.parametrize("tiled", [False, True])
@pytest.mark.parametrize(("top_k", "alpha"), [(3, 1.0), (3, 0.5), (50, 2.0), (3, 0.0)])
def test_eaft_weighs_a_token_by_the_entropy_of_the_likeliest(monkeypatch, tiled, top_k, alpha):
    """(H_k / 3)^α · (−log p(y)), H_k of the k likeliest tokens renormalised: by a loop, with a weight that passes no gradient."""
    if tiled:
        monkeypatch.setattr(distill, "head_tile_rows", lambda vocab, device: 16)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (7, 4)))
    target = torch.tensor([0, 6, 3, 3, 1])
    expected = torch.zeros((), dtype=torch.float64)
    for row, y in zip(hidden @ weight.t(), target, strict=True):
        top = sorted((float(z) for z in row), reverse=True)[:top_k]
        share = [math.exp(z - top[0]) / sum(math.exp(other - top[0]) for other in top) for z in top]
        entropy = -sum(p * math.log(p) for p in share)
        expected = expected - (entropy / 3) ** alpha * torch.log_softmax(row, -1)[y] / 10
    logp, _, _, entropy_M = token_scores(Head(hidden, weight, None, None), target, top_k)
    terms = sft_loss(logp, NORM, "eaft", weight_M=eaft_weight(entropy_M, alpha))
    assert terms.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for mine, right in zip(
        *(torch.autograd.grad(loss, (hidden, weight)) for loss in (terms.loss, expected)), strict=True
    ):
        torch.testing.assert_close(mine, right, rtol=1e-10, atol=1e-12)
