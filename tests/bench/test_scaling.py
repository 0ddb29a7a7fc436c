"""The fit, the arithmetic that is counted, and that every kind of work runs; no time is asserted."""

import math
import random

import pytest

import scaling
import scaling_points
import sections
import workload
from scaling_points import Family, Size, decode_bytes, forward_flops


def test_the_exponent_of_a_power_law_is_exact():
    slope, error = scaling.exponent([1, 2, 4, 8], [3 * x**1.5 for x in (1, 2, 4, 8)])
    assert slope == pytest.approx(1.5)
    assert error == pytest.approx(0.0, abs=1e-9)


def test_the_standard_error_is_that_of_least_squares():
    """Points (0, 0), (1, 0), (2, 3) in logs: slope 3/2, residuals 1/2, -1, 1/2; error² = (3/2) / 1 / 2."""
    slope, error = scaling.exponent([1, math.e, math.e**2], [1, 1, math.e**3])
    assert (slope, error) == pytest.approx((1.5, math.sqrt(0.75)))


@pytest.mark.parametrize("family", [Family(3, 4, 1), Family(5, 2, 3), Family(0, 6, 1)])
def test_attended_pairs_are_those_one_can_count(family):
    prompt = sum(1 for query in range(family.prompt) for key in range(family.prompt) if key <= query)
    answer = sum(family.prompt + place + 1 for place in range(family.answer))
    assert family.attended == prompt + family.branches * answer


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A model of hidden size 8: no folder of it is needed, only its shape."""
    from posttrain.planner.shape import ModelShape

    shape = ModelShape(
        num_layers=1, hidden=8, intermediate=24, vocab=10, num_heads=2, num_kv_heads=1, head_dim=4, tied=True
    )
    monkeypatch.setattr(scaling_points, "shape_of", lambda model: shape)


def test_forward_flops_by_hand(tiny):
    """Weights 8·8 + 2·8·4 + 8·8 + 3·8·24 = 768; 7 tokens, 4 of them scored by a head of 80; 3·4/2 + 4·3 + 4·5/2 = 28 pairs of 8 channels."""
    assert forward_flops(Size(batch=2), Family(3, 4, 1)) == 2 * (2 * 768 * 7 + 2 * 80 * 4 + 4 * 8 * 28)


def test_decode_bytes_by_hand(tiny, monkeypatch):
    """Two steps read 768 + 80 weights each; six rows read contexts of 5 and 6 tokens of 2 · 4 values."""
    monkeypatch.setattr(scaling_points, "PROMPT", 5)
    assert decode_bytes(Size(length=2, batch=2, group=3)) == 4 * (2 * (768 + 80) + 6 * (5 + 6) * 8)


@pytest.mark.slow
@pytest.mark.parametrize("work", list(scaling_points.WORKS))
def test_every_work_runs_at_its_exact_size(work, monkeypatch, tmp_path):
    monkeypatch.setattr(workload, "OUT", tmp_path / "out")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    scaling_points.shape_of.cache_clear()
    scaling_points.one_token_words.cache_clear()
    size = Size(length=16, batch=1, group=2, model="64")
    point = scaling_points.measure(work, size, 1)
    assert point.seconds > 0 and point.flops_rate > 0
    assert (point.bytes_rate is not None) == (work == "rollouts")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(workload.tokenizer_dir())
    assert len(tokenizer(scaling_points.text(random.Random(0), 40))["input_ids"]) == 40


def test_a_section_is_replaced_between_its_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a: start -->\nold\n<!-- a: end -->\n<!-- b: start -->\nkept\n<!-- b: end -->\n")
    sections.write("a", "new", page)
    sections.write("a", "newer", page)
    assert page.read_text() == (
        "before\n<!-- a: start -->\nnewer\n<!-- a: end -->\n<!-- b: start -->\nkept\n<!-- b: end -->\n"
    )
