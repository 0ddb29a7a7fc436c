from dataclasses import replace

import pytest

from posttrain.gate import GateSpec, Guard, Primary
from posttrain.gate.selection import promising
from posttrain.gate.spec import Limits

SPEC = GateSpec(guards=(Guard("format", 0.1),), primary=(Primary("heldout", 0.2),), limits=Limits(truncated=0.5))


@pytest.mark.parametrize(
    ("heldout", "format_", "good"),
    [(3, 10, True), (2, 10, False), (10, 9, False), (10, 10, True), (0, 0, False)],
)
def test_every_point_estimate_must_be_beyond_its_line(report, heldout, format_, good):
    """Ten items are no ground for a verdict; to choose they are enough."""

    def side(model, right):
        return {
            name: report([1] * number + [0] * (10 - number), model, suite=name, split="dev")
            for name, number in right.items()
        }

    ours, theirs = side("c", {"heldout": heldout, "format": format_}), side("b", {"heldout": 0, "format": 10})
    chosen, words = promising(SPEC, ours, theirs, "dev")
    assert chosen is good
    assert f"heldout {heldout / 10:+.4f} (line +0.2000)" in words


def test_a_limit_and_a_broken_comparison_are_not_promising(report):
    side = {name: report([1] * 10, "c", suite=name, split="dev") for name in ("heldout", "format")}
    base = {name: report([0] * 10, "b", suite=name, split="dev") for name in ("heldout", "format")}
    cut = {k: replace(r, items=tuple(replace(i, finishes=("length",)) for i in r.items)) for k, r in side.items()}
    assert promising(SPEC, side, base, "dev")[0]
    chosen, words = promising(SPEC, cut, base, "dev")
    assert not chosen
    assert "100.0% of the answers were cut off" in words
    assert promising(SPEC, side, side, "dev") == (False, "format: candidate and baseline are the same model, c")
