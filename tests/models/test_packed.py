import pytest
import torch
from torch.nn.functional import linear

from posttrain.models import packed as module
from posttrain.models.packed import can_be_packed, packed, why_not_packed


def _plain(x):
    raise AssertionError("these products are large enough")


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 16, 65, 1000])
def test_matrices_of_one_input_are_multiplied_side_by_side(monkeypatch, biased, rows):
    monkeypatch.setattr(module, "_LEAST_WORK", 0)
    weights = [(torch.randn(n, 40) / 6, torch.randn(n) if biased else None) for n in (64, 24, 7)]
    x = torch.randn(rows, 40)
    for found, (weight, bias) in zip(packed(weights, _plain)(x), weights, strict=True):
        torch.testing.assert_close(found, linear(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_small_products_are_left_to_the_plain_kernel():
    calls = []
    project = packed([(torch.randn(64, 64), None)], lambda x: calls.append(len(x)) or [x])
    for rows in (1, 127, 128, 500):
        project(torch.randn(rows, 64))
    assert calls == [1, 127]


def test_what_is_no_matrix_of_float32_is_not_laid_out():
    weight, bias = torch.randn(4, 4), torch.randn(4)
    assert can_be_packed([(weight, bias), (weight, bias)])
    assert not can_be_packed([(weight, bias), (weight, None)])
    assert not can_be_packed([(weight, None), None])
    assert not can_be_packed([(weight.bfloat16(), None)])


def test_a_machine_without_the_products_says_so(policy_of, monkeypatch):
    policy = policy_of("qwen3")
    assert why_not_packed(policy) == ""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert "without oneDNN" in why_not_packed(policy)
