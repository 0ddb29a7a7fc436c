import pytest

from posttrain.grading.equality import equal_values, math_equal, same_answer

EQUAL = [  # reference, answer
    ("x=3", "3"), ("3", "x=3"), ("\\theta=\\frac{\\pi}{3}", "\\pi/3"), ("f(x)=x^2", "x^2"), ("3x=6", "x=2"),
    ("\\pm 3", "3,-3"), ("3,-3", "\\pm 3"), ("1\\pm\\sqrt2", "1+\\sqrt2, 1-\\sqrt2"),
    ("1,2,3", "1, 2, \\text{and } 3"), ("2,3", "3, 2"), ("1,2", "x=1 \\text{ or } x=2"), ("(1,2),(3,4)", "(3,4),(1,2)"),
    ("(-\\infty,-1)\\cup(1,\\infty)", "x<-1 \\text{ or } x>1"), ("[0,1)", "0\\le x<1"), ("x \\ge 2", "[2,+\\infty)"), ("x\\in[1,2]", "[1,2]"),
    ("\\mathbb{R}", "(-\\infty,\\infty)"), ("x\\ne 3", "(-\\infty,3)\\cup(3,\\infty)"), ("1<x\\leq 2", "2 \\geq x > 1"),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ 2\\end{pmatrix}"), ("\\begin{pmatrix}\\frac12&0\\end{pmatrix}", "\\begin{pmatrix}0.5 & 0\\end{pmatrix}"),
    ("y=2x+1", "2x-y+1=0"), ("|x|", "\\sqrt{x^2}"), ("\\sin^2 x", "1-\\cos^2 x"), ("\\sin 2x", "2\\sin x\\cos x"), ("\\sin^{-1} x", "\\arcsin x"),
    ("x_1+x_2", "x_2+x_1"), ("3!", "6"), ("2\\frac{x}{3}", "\\frac{2x}{3}"), ("2\\sqrt{3}", "2*sqrt(3)"), ("18", "\\$18"), ("18", "18 dollars"), ("New York", "new york"),
    ("2^{10}", "1024"), ("1024", "2^{10}"), ("1:2:3", "2:4:6"), ("5", "(5)"), ("\\emptyset", "\\{\\}"), ("6.6\\times10^{-34}", "6.6e-34"), ("12\\text{ cm}^2", "12\\,\\mathrm{cm}^{2}"),
    ("\\sqrt{1000001}-1000", "\\frac{1}{\\sqrt{1000001}+1000}"), ("\\cos 60^\\circ", "\\frac12"), ("2^{500}", "\\sqrt{2^{1000}}"),
]  # fmt: skip
OTHER = [
    ("2\\times3", "6"), ("6.6\\times 10^{-34}", "0"), ("0", "10^{-40}"), ("2^{31}-1", "2^{31}"), ("10^{30}+1", "10^{30}"), ("2^{500}+1", "\\sqrt{2^{1000}}"),
    ("1/3", "0.3333333333333333333"), ("\\pi", "3.14159265358979"), ("\\pi", "22/7"), ("2", "2^{1.0000001}"), ("1", "0.9999999999999999"),
    ("42", "41=42"), ("42", "6*7"), ("42", "\\sqrt{1764}"), ("42", "42, 43"), ("42", "42 or 43"), ("42", "42%"), ("42", "-42"), ("42", "x=y=42"),
    ("x=3", "y=3"), ("x=3", "x=4"), ("x=x", "y=y"), ("\\pm 3", "3"), ("(1,2)", "[1,2]"), ("(1,2)", "(2,1)"), ("\\{1,2\\}", "(1,2)"), ("1,1,2", "1,2,2"),
    ("x<4", "x\\le4"), ("x<4", "x>4"), ("x<4", "y<4"), ("(0,\\infty)", "(0,1)"), ("\\infty", "-\\infty"), ("(-\\infty,1)", "(-\\infty,1]"), ("7:05", "7:5"),
    ("x", "X"), ("A", "B"), ("yes", "no"), ("5 cm", "5 m"), ("5x", "5"), ("5", "5x"), ("121_3", "121"), ("\\emptyset", "0"), ("x_1", "x_2"), ("|x|", "x"),
    ("\\begin{pmatrix}1&2\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"), ("\\begin{vmatrix}1&2\\\\3&4\\end{vmatrix}", "\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal_values_are_equal(reference, answer):
    assert equal_values(answer, reference)
    assert equal_values(reference, reference)


@pytest.mark.parametrize(("reference", "answer"), OTHER)
def test_other_values_are_not(reference, answer):
    assert not equal_values(answer, reference)
    assert not math_equal(answer, reference)
    assert not same_answer(answer, reference)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [("3/4", "6/8"), ("1000", "10^3"), ("Paris", "paris"), ("1,2", "2,1"), ("3:4", "6:8"), ("42", "42 km")],
)
def test_what_only_an_eval_takes(reference, answer):
    assert equal_values(answer, reference)
    assert not math_equal(answer, reference)
    assert not same_answer(answer, reference)


@pytest.mark.parametrize(("reference", "answer"), [("2\\sqrt{3}", "\\sqrt{12}"), ("x=3", "3"), ("x<4", "(-\\infty,4)")])
def test_what_needs_formulas(reference, answer):
    assert math_equal(answer, reference)
    assert not same_answer(answer, reference)
