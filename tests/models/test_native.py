import math

import numpy as np
import pytest
import torch

from posttrain.models import native
from posttrain.models.decode import LlamaStep
from posttrain.models.native import NativeStep, PromptsInMemory, RowsInMemory

pytestmark = pytest.mark.usefixtures("compiler")


@pytest.fixture
def step(policy_of):
    return NativeStep(policy_of("qwen3"), prepack=False)


def test_the_norm_of_a_sum_in_float64(step):
    module = step._model.layers[0].input_layernorm
    x, update = torch.randn(3, len(module.weight)), torch.randn(3, len(module.weight))
    found = x.clone()
    out = step._add_and_norm(found, update, module)
    assert torch.equal(found, x + update)
    for row, own in enumerate((x + update).double().tolist()):
        by = 1 / math.sqrt(sum(one * one for one in own) / len(own) + module.variance_epsilon)
        expected = [one * by * weight for one, weight in zip(own, module.weight.tolist(), strict=True)]
        assert out[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert torch.equal(step._add_and_norm(found, None, module), out)


def test_swiglu_in_float64_where_exp_ends_too(step):
    gate = torch.tensor([[-1e30, -200.0, -88.5, -87.2, -3.0, -1e-6, 0.0, 1e-6, 0.5, 20.0, 90.0, 1e30]])
    up = torch.linspace(-2, 2, 12)[None]
    # Both as slices of a product of gate and up.
    together = torch.cat([gate, up], 1)
    found = step._swiglu(*together.split([12, 12], 1))[0].tolist()
    for one, g, u in zip(found, gate[0].double().tolist(), up[0].double().tolist(), strict=True):
        sigmoid = 1 / (1 + math.exp(-g)) if g > -700 else 0.0
        assert one == pytest.approx(g * sigmoid * u, rel=1e-6, abs=1e-30 if g > -1e9 else 1e-7)
    assert math.isnan(step._swiglu(torch.tensor([[math.nan]]), torch.ones(1, 1)).item())


def _rms_normed(head, norm, epsilon):
    by = 1 / math.sqrt(sum(x * x for x in head) / len(head) + epsilon)
    return [x * by * weight for x, weight in zip(head, norm, strict=True)]


def _turned(head, cosine, sine):
    """`sine` of the first half is negated."""
    half = len(head) // 2
    return [x * cosine[d] + head[(d + half) % len(head)] * sine[d] for d, x in enumerate(head)]


@pytest.mark.parametrize("window", [0, 1, 5, 70])
def test_attention_in_float64_and_to_the_bit_with_other_threads(step, monkeypatch, window):
    """Rows whose prompts lie in tensors of other widths, with more tokens than a tile, before and behind their end."""
    a, width = step._attentions[0], step._width
    heads, kv_heads, module = a.heads, a.kv_heads, step._model.layers[0].self_attn
    a.window = window
    lengths, widths, own = [3, 90, 1], [3, 96, 4], [0, 2, 130]
    prompts = [[torch.randn(kv_heads, room, width) for room in widths] for _ in "kv"]
    kept = [torch.randn(3, kv_heads, 140, width) for _ in "kv"]
    expected_kept = [one.double().tolist() for one in kept]
    projected = [torch.randn(3, count * width) for count in (heads, kv_heads, kv_heads)]
    rotation = (torch.randn(3, width), torch.randn(3, width))
    addresses = tuple(np.array([one.data_ptr() for one in side]) for side in prompts)
    rows = RowsInMemory(
        np.array(own), [tuple(kept)], PromptsInMemory(np.array(lengths), np.array(widths), [addresses]), 132
    )
    found = step._attend(0, projected, rotation, rows).view(3, heads, width)
    monkeypatch.setattr(native, "_threads", lambda work: 2)
    assert torch.equal(step._attend(0, projected, rotation, rows).view(3, heads, width), found)

    q_norm, k_norm, epsilon = (
        module.q_norm.weight.tolist(),
        module.k_norm.weight.tolist(),
        module.q_norm.variance_epsilon,
    )
    query, key, value = (part.view(3, -1, width).double().tolist() for part in projected)
    cosine, sine = (part.double().tolist() for part in rotation)
    for row in range(3):
        for head in range(heads):
            kv = head // (heads // kv_heads)
            expected_kept[0][row][kv][own[row]] = _turned(
                _rms_normed(key[row][kv], k_norm, epsilon), cosine[row], sine[row]
            )
            expected_kept[1][row][kv][own[row]] = value[row][kv]
            keys, values = (
                side[row][kv, : lengths[row]].tolist() + mine[row][kv][: own[row] + 1]
                for side, mine in zip(prompts, expected_kept, strict=True)
            )
            turned = _turned(_rms_normed(query[row][head], q_norm, epsilon), cosine[row], sine[row])
            seen = range(max(0, len(keys) - window) if window else 0, len(keys))
            weights = [math.exp(a.scale * sum(x * y for x, y in zip(turned, keys[t], strict=True))) for t in seen]
            out = [
                sum(w * values[t][d] for w, t in zip(weights, seen, strict=True)) / sum(weights) for d in range(width)
            ]
            assert found[row, head].tolist() == pytest.approx(out, rel=2e-5, abs=2e-6)
    for one, expected in zip(kept, expected_kept, strict=True):
        assert one.flatten().tolist() == pytest.approx(torch.tensor(expected).flatten().tolist(), rel=1e-5, abs=1e-6)


def test_drafts_are_verified_with_the_kernels_too(policy_of):
    policy = policy_of("qwen3")
    step, plain = (kind(policy, prepack=False) for kind in (NativeStep, LlamaStep))

    class Kept:
        def attend(self, layer, query, key, value, options):
            return query * key.mean() + value.mean()

    ids, positions = torch.tensor([5, 9, 6]), torch.tensor([3, 4, 0])
    for wanted in (None, torch.tensor([1])):
        with torch.no_grad():
            found, expected = step(ids, positions, Kept(), wanted), plain(ids, positions, Kept(), wanted)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
