import math

import pytest
import torch

from posttrain.objectives.logprobs import chunked_logprobs, head_tile_rows, token_entropy, token_logprobs

M, D, V = 13, 5, 11


def _case(dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(M, D, generator=generator, dtype=dtype)
    weight = torch.randn(V, D, generator=generator, dtype=dtype)
    bias = torch.randn(V, generator=generator, dtype=dtype)
    targets = torch.randint(0, V, (M,), generator=generator)
    return hidden, weight, bias, targets


def _oracle_row(logits, target, temperature, softcap):
    """log p and entropy of one token, from the definitions."""
    z = [(softcap * math.tanh(x / softcap) if softcap else x) / temperature for x in logits]
    total = sum(math.exp(x) for x in z)
    p = [math.exp(x) / total for x in z]
    return math.log(p[target]), -sum(q * math.log(q) for q in p)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [None, 1, 4, 13])
def test_chunked_equals_the_definition(temperature, softcap, chunk):
    hidden, weight, bias, targets = _case()
    scores = chunked_logprobs(
        hidden, weight, targets, temperature=temperature, bias=bias, softcap=softcap, chunk=chunk, with_entropy=True
    )
    assert scores.entropy_M is not None
    for row in range(M):
        logits = [sum(h * w for h, w in zip(hidden[row].tolist(), ws, strict=True)) for ws in weight.tolist()]
        logits = [x + b for x, b in zip(logits, bias.tolist(), strict=True)]
        logp, entropy = _oracle_row(logits, int(targets[row]), temperature, softcap)
        assert scores.logp_M[row].item() == pytest.approx(logp, rel=1e-12)
        assert scores.entropy_M[row].item() == pytest.approx(entropy, rel=1e-12)
        assert bool(scores.top1_M[row]) == (max(logits) == logits[int(targets[row])])


def test_plain_by_hand():
    """Logits (0, ln 3): p = (1/4, 3/4), entropy = ¼·ln 4 + ¾·ln(4/3); halving T squares the odds: 9 to 1."""
    logits = torch.tensor([[0.0, math.log(3)]], dtype=torch.float64)
    assert token_logprobs(logits, torch.tensor([1])).item() == pytest.approx(math.log(0.75))
    assert token_logprobs(logits, torch.tensor([1]), temperature=0.5).item() == pytest.approx(math.log(0.9))
    assert token_entropy(logits).item() == pytest.approx(0.25 * math.log(4) + 0.75 * math.log(4 / 3))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("chunk", [3, None])
def test_gradcheck(softcap, chunk):
    hidden, weight, bias, targets = _case()
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def both(h, w, b):
        scores = chunked_logprobs(
            h, w, targets, temperature=0.8, bias=b, softcap=softcap, chunk=chunk, with_entropy=True
        )
        return scores.logp_M, scores.entropy_M

    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("chunk", [4, None])
def test_chunked_and_plain_agree_in_value_and_gradient(dtype, tolerance, chunk):
    upstream = torch.linspace(-1, 1, M, dtype=dtype)
    grads = []
    for chunked in (True, False):
        hidden, weight, bias, targets = _case(dtype)
        leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
        if chunked:
            logp = chunked_logprobs(hidden, weight, targets, temperature=0.9, bias=bias, chunk=chunk).logp_M
        else:
            logp = token_logprobs(hidden @ weight.t() + bias, targets, temperature=0.9)
        grads.append((logp.detach(), *torch.autograd.grad((logp * upstream).sum(), leaves)))
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)


def test_entropy_alone_has_a_gradient():
    hidden, weight, _, targets = _case()
    hidden.requires_grad_()
    entropy = chunked_logprobs(hidden, weight, targets, chunk=4, with_entropy=True).entropy_M
    assert entropy is not None
    (ours,) = torch.autograd.grad(entropy.sum(), hidden)
    (plain,) = torch.autograd.grad(token_entropy(hidden @ weight.t()).sum(), hidden)
    torch.testing.assert_close(ours, plain)


def test_frozen_weight_gets_no_gradient_and_hidden_the_same():
    hidden, weight, _, targets = _case()
    grads = []
    for frozen in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        chunked_logprobs(h, w, targets, chunk=4).logp_M.sum().backward()
        grads.append(h.grad)
        assert (w.grad is None) == frozen
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_backward_twice_gives_the_same_gradient():
    """The kept tile is not overwritten by the first backward."""
    hidden, weight, _, targets = _case()
    hidden.requires_grad_()
    logp = chunked_logprobs(hidden, weight, targets).logp_M.sum()
    (first,) = torch.autograd.grad(logp, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(logp, hidden)
    assert torch.equal(first, second)


def test_large_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    scores = chunked_logprobs(hidden, weight, torch.tensor([1, 1]), with_entropy=True)
    assert scores.logp_M.tolist() == [-2e4, 0.0]
    assert scores.entropy_M is not None and scores.entropy_M.tolist() == [0.0, 0.0]
    scores.logp_M.sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_no_tokens():
    hidden = torch.zeros(0, D, requires_grad=True)
    weight = torch.zeros(V, D, requires_grad=True)
    scores = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), with_entropy=True)
    scores.logp_M.sum().backward()
    assert scores.logp_M.shape == (0,)
    assert weight.grad is not None and weight.grad.abs().sum() == 0


def test_bfloat16_statistics_are_float32():
    """With bf16 inputs the only error left is that of the logits themselves: 2^-8 relative, here below 0.05."""
    hidden, weight, _, targets = _case(torch.float32)
    half = chunked_logprobs(hidden.bfloat16(), weight.bfloat16(), targets, chunk=4).logp_M
    exact = token_logprobs(hidden.bfloat16().float() @ weight.bfloat16().float().t(), targets)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


def test_autocast_casts_once_and_gradients_come_back_in_float32():
    hidden, weight, _, targets = _case(torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = chunked_logprobs(hidden, weight, targets, chunk=4).logp_M
        inside.sum().backward()
    outside = chunked_logprobs(hidden.detach().bfloat16(), weight.detach().bfloat16(), targets, chunk=4).logp_M
    assert torch.equal(inside, outside)
    assert hidden.grad is not None and hidden.grad.dtype == torch.float32


def test_tile_fits_its_budget():
    assert head_tile_rows(32768) * 32768 * 4 == 64 << 20
    assert head_tile_rows(10**9) == 64


def test_wide_logits_are_never_materialised():
    """8192 × 4096 float32 logits would be 128 MiB; the tensors kept for the backward are a few per token."""
    hidden = torch.zeros(8192, 4, requires_grad=True)
    weight = torch.zeros(4096, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        chunked_logprobs(hidden, weight, torch.zeros(8192, dtype=torch.int64))
    assert max(saved) <= 8192 * 4
