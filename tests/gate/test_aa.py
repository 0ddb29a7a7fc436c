from dataclasses import replace

import pytest

from posttrain.errors import GateError
from posttrain.gate.aa import aa_check


def test_flips_are_counted_with_their_exact_bound(report):
    first = report([1] * 100, "m")
    second = report([1] * 99 + [0], "m")
    result = aa_check(first, second)
    assert (result.num_items, result.flips, result.rate, result.passed) == (100, 1, 0.01, True)
    assert result.upper == pytest.approx(0.0466, abs=1e-4)
    assert not aa_check(first, report([1] * 97 + [0] * 3, "m")).passed


@pytest.mark.parametrize("change", [{"model_digest": "other"}, {"split": "dev"}, {"items": ()}])
def test_only_the_same_model_on_the_same_items_compares(report, change):
    first = report([1] * 40, "m")
    with pytest.raises(GateError, match="A/A check"):
        aa_check(first, replace(first, **change))
