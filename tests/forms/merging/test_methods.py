import math

import pytest
import torch

from posttrain.forms.merging.methods import MERGE_METHODS, MergeInput


def merged(name, base, others, shared=None, draw=torch.bernoulli):
    """`others`: (tensor, settings); float64 in, float64 out."""
    row = MERGE_METHODS[name]
    inputs = [] if base is None else [MergeInput(torch.tensor(base, dtype=torch.float64), dict(row.of_model), True)]
    inputs += [MergeInput(torch.tensor(t, dtype=torch.float64), {**row.of_model, **said}) for t, said in others]
    return row.merge(inputs, {**row.shared, **(shared or {})}, draw).tolist()


def test_linear_by_hand():
    assert merged("linear", None, [([1.0, 2.0], {"weight": 1}), ([5.0, 0.0], {"weight": 3})]) == [4.0, 0.5]
    unnormalized = merged("linear", None, [([1.0], {"weight": 1}), ([5.0], {"weight": 3})], {"normalize": False})
    assert unnormalized == [16.0]


def test_task_arithmetic_adds_what_each_model_learned():
    assert merged("task_arithmetic", [1.0, 1.0], [([2.0, 1.0], {"weight": 1}), ([1.0, 5.0], {"weight": 0.5})]) == [
        2.0,
        3.0,
    ]


def test_ties_trims_elects_and_averages_those_who_agree():
    """Task vectors (4, -1, .1, 0) and (-2, -3, 0, .2), density 1/2: the first keeps 4 and -1, the second -2 and -3.

    Signs of the sums (2, -4): +, -. Entry 0 has only the 4, entry 1 the mean of -1 and -3.
    """
    found = merged("ties", [0.0] * 4, [([4.0, -1.0, 0.1, 0.0], {"weight": 1, "density": 0.5}),
                                      ([-2.0, -3.0, 0.0, 0.2], {"weight": 1, "density": 0.5})])  # fmt: skip
    assert found == [4.0, -2.0, 0.0, 0.0]


def test_slerp_keeps_to_the_circle():
    """A quarter turn from (1, 0) to (0, 1): at t = 1/3 the angle is 30 degrees."""
    row = MERGE_METHODS["slerp"]
    inputs = [MergeInput(torch.tensor([1.0, 0.0]), {}, True), MergeInput(torch.tensor([0.0, 1.0]))]
    found = row.merge(inputs, {"t": 1 / 3}, torch.bernoulli)
    torch.testing.assert_close(found, torch.tensor([math.cos(math.pi / 6), 0.5]))


def test_dare_keeps_what_the_mask_says_and_the_sum_of_magnitudes():
    found = merged("dare_linear", [0.0] * 4, [([1.0, 2.0, 3.0, 4.0], {"weight": 1, "density": 0.5})],
                   draw=lambda p: torch.tensor([1.0, 0, 0, 1.0], dtype=p.dtype))  # fmt: skip
    assert found == [2.0, 0.0, 0.0, 8.0]


def test_della_keeps_the_large_more_often():
    seen = []
    merged("della", [0.0] * 3, [([1.0, -3.0, 2.0], {"weight": 1, "density": 0.5, "epsilon": 0.2})],
           draw=lambda p: seen.append(p) or torch.ones_like(p))  # fmt: skip
    torch.testing.assert_close(seen[0], torch.tensor([[0.3, 0.7, 0.5]], dtype=torch.float64))


def test_karcher_of_two_is_the_middle_of_the_arc():
    found = merged("karcher", None, [([2.0, 0.0], {}), ([0.0, 2.0], {})], {"max_iter": 50, "tol": 1e-12})
    assert found == pytest.approx([math.sqrt(2), math.sqrt(2)])


@pytest.mark.parametrize("name", [name for name, row in MERGE_METHODS.items() if row.models[1] > 2])
def test_copies_of_one_model_merge_to_that_model(name):
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    base = None if not MERGE_METHODS[name].needs_base else [[0.0] * 4] * 3
    said = {"weight": 0.5}
    found = merged(name, base, [(tensor, said), (tensor, said)], {"normalize": True, "tol": 1e-9, "max_iter": 10})
    torch.testing.assert_close(torch.tensor(found), torch.tensor(tensor), atol=1e-6, rtol=1e-6)
