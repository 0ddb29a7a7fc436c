"""Every grader on every known case, and on every way to typeset an answer."""

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from posttrain.grading.scorers import SCORERS
from posttrain.rewards.library import REWARDS

ROWS = [json.loads(line) for line in Path(__file__).with_name("graders.jsonl").read_text().splitlines()]


def graded(name, completion, gold, **options):
    """As the eval scorer of this name grades it, or the reward where there is no scorer or options are given."""
    if name in SCORERS and not options:
        return SCORERS[name](completion, gold, {})
    return REWARDS[name].fn([""], [completion], answer=[gold], **options)[0]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['grader']} {row['gold'][:30]} {row['completion'][:40]}")
def test_every_known_case_is_graded_right(row):
    assert graded(row["grader"], row["completion"], row["gold"], **row["options"]) == row["right"]


SLOTS = {
    "boxed": ["\\boxed{%s}", "So \\boxed{%s}.", "<think>hm</think>\\boxed{ %s }", "$\\boxed{%s}$", "**\\boxed{%s}**", "\\[\\boxed{%s}\\]"],
    "number": ["#### %s", "####%s", "Answer: %s", "**Answer:** %s", "**Answer: %s**", "The answer is **%s**.", "Final answer: $%s$", "the answer is %s", "%s"],
    "choice": ["%s", "**%s**", "(%s)", "Answer: %s", "Answer: **%s**", "**Answer: %s**", "**Answer:** (%s)", "The answer is (%s).", "\\boxed{%s}", "\\boxed{\\text{%s}}", "\\textbf{(%s)}"],
}  # fmt: skip
SLOTS["math"] = SLOTS["math_equivalence"] = SLOTS["boxed"]


def one_way(value):
    """Ways to write a number that a reward takes: no computation is left to the reader."""
    p, q = abs(value.numerator), value.denominator
    signs = ["-", "−"] if value < 0 else [""]
    if q == 1:
        bodies = [
            f"{p}",
            f"{p}.0",
            f"{p}.",
            f"{p:,}",
            f"{p:,}".replace(",", "{,}"),
            f"{p:,}".replace(",", "\\,"),
            f"\\text{{{p}}}",
            f"\\mathrm{{{p}}}",
            f"${p}$",
        ]
        bodies += [f"{p}e0", f"{p / 10**3:.3f} \\times 10^3", f"{p / 10**3:.3f}\\cdot 10^{{3}}", f"{p}000e-3"]
        return [sign + body for sign in signs for body in bodies if not (sign and body[0] in "\\$")]
    bodies = [f"\\frac{{{p}}}{{{q}}}", f"\\dfrac{{{p}}}{{{q}}}", f"\\tfrac {{{p}}} {{{q}}}", f"{p}/{q}", f"{p} / {q}"]
    bodies += [f"\\frac{p}{{{q}}}"] if p < 10 else []
    bodies += [f"\\frac{{{p}}}{q}"] if q < 10 else []
    bodies += [f"\\frac{p}{q}"] if p < 10 and q < 10 else []
    bodies += [f"{p // q}\\frac{{{p % q}}}{{{q}}}", f"{p // q} {p % q}/{q}"] if p > q else []
    signed = [sign + body for sign in signs for body in bodies]
    return signed + ([f"\\frac{{-{p}}}{{{q}}}", f"\\frac{{{p}}}{{-{q}}}"] if value < 0 else [])


def other_ways(value):
    """More ways to write it that an eval takes."""
    p, q = value.numerator, value.denominator
    return [f"\\frac{{{2 * p}}}{{{2 * q}}}", f"{3 * p}/{3 * q}", f"({p})" if q == 1 else f"(\\frac{{{p}}}{{{q}}})"]


@pytest.mark.parametrize("name", ["boxed", "math", "math_equivalence", "number"])
@given(st.integers(-20_000, 20_000), st.integers(1, 30))
@example(-3, 4)
@example(1, 12)
@example(1_234_567, 1)
@settings(max_examples=15, derandomize=True)
def test_a_number_is_itself_however_it_is_typeset(name, numerator, denominator):
    value = Fraction(numerator, denominator)
    golds = [str(value), one_way(value)[0]]
    for slot in SLOTS[name]:
        for text in one_way(value):
            for gold in golds:
                assert graded(name, slot % text, gold) == 1.0, (slot % text, gold)
                if name in REWARDS:
                    assert graded(name, slot % text, gold, strict=True) == 1.0, (slot % text, gold)
            assert graded(name, slot % text, str(value + 1)) == 0.0, (slot % text, value + 1)
            assert graded(name, slot % text, str(-value if value else 1)) == 0.0, slot % text
        if name == "math_equivalence":
            continue
        for text in other_ways(value):
            assert graded(name, slot % text, golds[0]) == 1.0, (slot % text, golds[0])
            if name in REWARDS:
                assert graded(name, slot % text, golds[0], strict=False) == 1.0, slot % text


@pytest.mark.parametrize("slot", SLOTS["choice"])
@pytest.mark.parametrize("letter", "ABEZ")
def test_a_letter_is_itself_however_it_is_typeset(slot, letter):
    other = "C"
    for gold in (letter, f"({letter})", f"\\text{{{letter}}}", f"#### {letter}"):
        assert graded("choice", slot % letter, gold) == graded("choice", slot % letter, gold, strict=True) == 1.0
        assert (
            graded("choice", slot % letter.lower(), gold)
            == graded("choice", slot % letter.lower(), gold, strict=False)
            == 1.0
        )
        assert graded("choice", slot % letter.lower(), gold, strict=True) == 0.0
        for grader in ({}, {"strict": True}, {"strict": False}):
            assert graded("choice", slot % other, gold, **grader) == 0.0
    for text in (f"{letter}: 12", f"{letter}. Paris", f"{letter}) Paris", f"{letter} - Paris", f"({letter}) a red pen"):
        assert graded("choice", slot.replace("(%s)", "%s") % text, letter) == 1.0, slot % text
        assert graded("choice", slot.replace("(%s)", "%s") % text, other) == 0.0, slot % text
    for text in (
        f"{letter} or {other}",
        f"{letter}, {other}",
        f"{letter}: or {other}",
        f"({letter}) and ({other})",
        f"{letter}{other}",
        f"not {letter}",
    ):
        assert graded("choice", slot % text, letter) == 0.0, slot % text


FORMULAS = ["2\\sqrt{3}", "x^2+1", "\\frac{\\pi}{2}", "\\log_2 3", "(1,\\sqrt{2})", "\\{1,2\\}", "y=2x+1", "(-\\infty,4)", "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}"]  # fmt: skip
SET = {
    "spaces": lambda f: f.replace("+", " + ").replace(",", ", ").replace("=", " = "),
    "no spaces": lambda f: f.replace(" ", "") if "\\log" not in f else f,
    "dollars": lambda f: f"${f}$",
    "displaystyle": lambda f: "\\displaystyle " + f,
    "left and right": lambda f: f.replace("(", "\\left(").replace(")", "\\right)"),
    "dfrac": lambda f: f.replace("\\frac", "\\dfrac"),
    "full stop": lambda f: f + ".",
    "short root": lambda f: f.replace("\\sqrt{3}", "\\sqrt3").replace("\\sqrt{2}", "\\sqrt 2"),
    "superscript": lambda f: f.replace("^2", "²"),
    "braced exponent": lambda f: f.replace("^2", "^{2}").replace("_2", "_{2}"),
    "plus infinity": lambda f: f.replace("-\\infty", "-\\,\\infty"),
}


@pytest.mark.parametrize("way", SET)
@pytest.mark.parametrize("formula", FORMULAS)
def test_a_formula_is_itself_however_it_is_typeset(way, formula):
    text = f"\\boxed{{{SET[way](formula)}}}"
    for name, options in (
        ("boxed", {}),
        ("math", {}),
        ("math_equivalence", {}),
        ("math_equivalence", {"strict": False}),
        ("math_equivalence", {"backend": "math_verify"}),
    ):
        if options or name != "math_equivalence":
            assert graded(name, text, formula, **options) == 1.0, (name, options, text)
    for other in FORMULAS:
        if other != formula:
            assert graded("boxed", text, other) == graded("math_equivalence", text, other, strict=True) == 0.0, other


TOWERS = ["9^{9^{9}}", "9^{\\frac{9^9}{1}}", "((((2^{50})^{50})^{50})^{50})^{50}", "{9^9}^{9^9}", "(9^9)^(9^9)", "9^9^9^9", "3000!!!", "((9!)!)!", "\\exp(\\exp(\\exp(9)))", "(1+x)^{3000}", "x^{9^{9}}",
          "(a+b+c)^{50}", "\\binom{10^9}{5\\cdot 10^8}", "\\sqrt[1/9^9]{9}", "10^{999999999}", "1e999999999", "9**9**9", "\\sum_{i=1}^{10^9} i", "e^{e^{e^{e^{9}}}}", "\\sin(9^{9^9})", "2^{2^{2^{2^{2^2}}}}", "99999999!", "0.5^{-9^9}", "\\log(9^{9^9})",
          "x^{300}" * 50, "9^{" * 100 + "9" + "}" * 100, "1/(" * 100 + "x" + ")" * 100, "(" * 900 + "1" + ")" * 900, "1," * 900 + "1", "\\{" + "\\{x\\}," * 300 + "x\\}", "|" * 300, "\\pm " * 200 + "1", "\\cup ".join(["(0,1)"] * 200)]  # fmt: skip


@pytest.mark.parametrize("gold", ["x^2", "2\\sqrt{3}", "42", "9^{9^{9}}", "(1,2)", "\\{1,2\\}", "x<1"])
def test_nested_powers_cannot_hang(gold):
    """Nor factorials, towers of brackets or lists: each costs milliseconds, and what cannot be computed equals nothing."""
    start = time.perf_counter()
    for tower in TOWERS:
        for name, options in (
            ("boxed", {}),
            ("math", {}),
            ("math_equivalence", {"strict": True}),
            ("math_equivalence", {"backend": "math_verify"}),
        ):
            assert graded(name, f"\\boxed{{{tower}}}", gold, **options) == float(tower == gold), (tower, name)
        assert graded("number", f"#### {tower}", gold) == float(tower == gold)
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("num_chars", [500_000, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_ten_megabytes_are_graded_in_time(num_chars):
    start = time.perf_counter()
    for unit in ("a", "9", "9^{", "\\boxed{", "\\boxed{9} ", "answer is 4 ", "answer is 4    ", "**", "####", "B ", "(", "{\"a\":", "``` "):  # fmt: skip
        text = unit * (num_chars // len(unit))
        for name, score in SCORERS.items():
            if name != "regex":
                assert score(text, "43", {}) in (0.0, 1.0, None), name
    assert time.perf_counter() - start < 120  # quadratic code would take days here
