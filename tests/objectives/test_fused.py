import pytest
import torch

from posttrain.objectives import logprobs
from posttrain.objectives.fused import FUSED_HEADS, fused_head, liger_scores
from posttrain.objectives.logprobs import chunked_logprobs


def _case():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator) for n in (700, 50))
    return hidden, 0.25 * weight, torch.randint(0, 50, (700,), generator=generator)


def _scored(hidden, weight, targets):
    """Scores under a temperature, and the gradients of both of them."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    scores = chunked_logprobs(*leaves, targets, temperature=0.7, with_entropy=True)
    weights = torch.linspace(0.5, 1.5, len(targets))
    (scores.logp_M * weights + 0.3 * scores.entropy_M * weights.flip(0)).sum().backward()
    return scores, [leaf.grad for leaf in leaves]


def test_liger_scores_as_the_chunks_do(monkeypatch):
    """By its torch fallback, which has the arithmetic of its kernel for Hopper cards, on more rows than one of its chunks."""
    pytest.importorskip("triton", reason="liger-kernel imports triton (pip install 'posttrain[gpu]')")
    pytest.importorskip("liger_kernel", reason="pip install 'posttrain[gpu]'")
    expected, expected_grads = _scored(*_case())
    monkeypatch.setattr(logprobs, "fused_head", lambda *head: liger_scores)
    scores, grads = _scored(*_case())
    torch.testing.assert_close(scores.logp_M, expected.logp_M, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(scores.entropy_M, expected.entropy_M, atol=2e-6, rtol=1e-6)
    assert torch.equal(scores.top1_M, expected.top1_M)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_a_fused_head_takes_the_place_of_the_chunks_and_gives_top1_only_where_asked(monkeypatch):
    hidden, weight, targets = _case()
    called = []

    def fused(hidden_MD, weight_VD, targets_M, temperature, with_entropy):
        called.append(with_entropy)
        logp = (hidden_MD @ weight_VD.t() / temperature).log_softmax(-1)
        return logp.gather(1, targets_M[:, None])[:, 0], None

    expected = chunked_logprobs(hidden, weight, targets)
    monkeypatch.setattr(logprobs, "fused_head", lambda *head: fused)
    scores = chunked_logprobs(hidden, weight, targets)
    assert called == [False]
    torch.testing.assert_close(scores.logp_M, expected.logp_M, atol=1e-5, rtol=1e-5)
    assert torch.equal(scores.top1_M, expected.top1_M)
    assert chunked_logprobs(hidden, weight, targets, with_top1=False).top1_M is None


def test_no_fused_head_fits_a_bias_a_soft_cap_no_tokens_or_a_cpu(monkeypatch):
    hidden = torch.randn(3, 4)
    assert fused_head(hidden, None, None) is None
    monkeypatch.setitem(FUSED_HEADS, "liger", FUSED_HEADS["liger"]._replace(fits=lambda hidden_MD: True))
    assert fused_head(hidden, None, None) is liger_scores
    assert fused_head(hidden, torch.zeros(5), None) is None
    assert fused_head(hidden, None, 30.0) is None
    assert fused_head(hidden[:0], None, None) is None
