import pytest

from posttrain.grading.equality import math_equal


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        (r"2\sqrt{3}", r"\sqrt{12}"),
        ("x^2-1", "(x-1)(x+1)"),
        (r"\frac{\pi}{2}", r"\pi/2"),
        ("y=2x+1", "y=1+2x"),
        ("2x+1", "y = 2x+1"),
        ("42", "x=42"),
        (r"(0,\sqrt{2})", "(0,2^{1/2})"),
        (r"\sqrt[3]{8x}", r"2\sqrt[3]{x}"),
        ("e^x", r"\exp(x)"),
    ],
)
def test_equal_formulas(reference, answer):
    assert math_equal(answer, reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("42", r"\sqrt{1764}"),
        ("42", "6*7"),
        ("42", "x=y=42"),
        ("2^{100}", "2^{100}+1"),
        ("x", "y"),
        ("x", "X"),
        ("x+1", "x-1"),
        (r"\pi", "3.14159"),
        (r"(1,\pi)", r"(\pi,1)"),
        ("x", "x" + "+0" * 100),
        ("x", "9^{9^{9^{9}}}"),
        ("x", "1/0"),
        ("x", "(" * 300),
    ],
)
def test_other_formulas(reference, answer):
    assert not math_equal(answer, reference)
