import time

import pytest

from posttrain.grading import answers
from posttrain.grading.scorers import SCORERS


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{42}",
        r"<think>40+2=42</think>\boxed{42}",
        r"40+2</think> \boxed{ 42 }",  # the template opened the reasoning
        r"\boxed{\boxed{42}}",
        r"\boxed{\text{42}}",
        r"\boxed{$42$}",
        r"\boxed{42.}",
        r"\boxed{42.0}",
        r"So \boxed{42}. Once more: \boxed{42}.",
        r"<think>1</think>Sure! \boxed{42} Hope it helps!",
        r"\boxed{42} So it is 42.",
        r"I put it into \boxed{}: \boxed{42}",
        r"\boxed{42} (the answer stands in \boxed{ })",
        "\\boxed{４２}",
        "\\boxed{4\u200b2}",
    ],
)
def test_boxed_accepts_the_gold_however_it_is_set(text):
    assert answers.is_boxed(text, "42")


@pytest.mark.parametrize(
    "text",
    [
        r"<think>Perfect.</think>\boxed{999}",
        r"\boxed{41} \boxed{42}",
        r"\boxed{42} \boxed{41}",
        r"<think>\boxed{42}</think>",
        r"<think>\boxed{42}",
        r"<think>a</think>\boxed{41}</think>\boxed{42}",
        r"<think>a<think>b</think>\boxed{42}",
        r"\boxed{41=42}",
        r"\boxed{42=42}",
        r"\boxed{6\times 7}",
        r"\boxed{84/2}",
        r"\boxed{42\%}",
        r"\boxed{42 km}",
        r"\boxed{41, 42}",
        r"\boxed{42 or 41}",
        r"\boxed{\pm 42}",
        r"\boxed{-42}",
        r"\boxed{4²}",
        r"\boxed{42 is wrong}",
        r"The answer is not \boxed{42}",
        r"\boxed{42} is wrong.",
        r"\boxed{42} Wait, no: it is 41.",
        r"\boxed{42} The final answer is $41$.",
        r"\boxed{42} or 41",
        r"Either 41 or \boxed{42}",
        "```\n\\boxed{42}\n```",
        r"% \boxed{42}",
        r"<!-- \boxed{42} -->",
        r"\boxed{}",
        r"\boxed{42",
        r"\boxed42",
        "",
    ],
)
def test_boxed_refuses_all_else(text):
    assert not answers.is_boxed(text, "42")


def test_reference_is_read_out_of_a_solution():
    assert answers.reference_answer("20 + 22 = 42\n#### 42") == "42"
    assert answers.reference_answer(r"First \boxed{41}, then \boxed{42}.") == "42"
    assert answers.is_boxed(r"\boxed{42}", r"So $x=\boxed{42}$.")


def test_number_is_read_behind_its_mark():
    assert answers.is_number("so\n#### 1,234", "1234")
    assert answers.is_number("The final answer is:\n**Answer:** 42", "42")
    assert answers.is_number("42", "42")
    assert not answers.is_number("#### 41\n#### 42", "42")
    assert not answers.is_number("41 or 42", "42")
    assert not answers.is_number("I added 40 and 2 and got 42", "42")


def test_choice_takes_one_letter():
    assert answers.is_choice("(C)", "C")
    assert answers.is_choice("Answer: C.", "C")
    assert answers.is_choice(r"<think>B?</think>\boxed{\text{C}}", "C")
    assert not answers.is_choice("Answer: c", "C")
    assert not answers.is_choice("Answer: B, C", "C")
    assert not answers.is_choice(r"\boxed{B}\boxed{C}", "C")


def test_last_number_needs_no_format():
    assert answers.is_last_number("40+2=42", "42")
    assert answers.is_last_number("<think>42</think>", "42")
    assert answers.is_last_number("it was -3", "-3")
    assert answers.last_number("53-21") == "21"
    assert answers.is_last_number(r"so \frac{3}{4} of it", "0.75")
    assert not answers.is_last_number("42%", "42")
    assert not answers.is_last_number("42, then 43", "42")
    assert not answers.is_last_number("no digits", "42")


def test_exact_ignores_white_space_only():
    assert answers.is_exact("<think>x</think>\n New  York ", "New York")
    assert not answers.is_exact("new york", "New York")
    assert not answers.is_exact("", "  ")


def test_think_format_wants_one_filled_block_first():
    assert answers.has_think_format("<think>a</think>b")
    for text in (
        "<think></think>b",
        "<think>a</think>",
        "b<think>a</think>c",
        "<think>a</think><think>b</think>c",
        "</think><think>a",
    ):
        assert not answers.has_think_format(text), text


def test_clean_wants_nothing_else():
    assert answers.is_clean(" <think>2+2=4</think>\n\\boxed{4} ")
    for text in (
        r"<think>a</think>\boxed{4} Easy!",
        r"Sure! <think>a</think>\boxed{4}",
        r"<think>a</think>So \boxed{4}",
        r"<think>a</think>\boxed{4}\boxed{4}",
        r"<think>a</think>\boxed{}",
        r"\boxed{4}",
    ):
        assert not answers.is_clean(text), text


HOSTILE = {
    "braces": "{" * 100_000,
    "open boxes": "\\boxed{" * 100_000,
    "nested boxes": "\\boxed{" * 100_000 + "42" + "}" * 100_000,
    "many boxes": "\\boxed{42}" * 100_000,
    "letters": "a" * 1_000_000,
    "digits": "1" * 1_000_000,
    "spaces": " " * 1_000_000,
    "angles": "<" * 1_000_000,
    "backslashes": "\\" * 1_000_000,
    "thinks": "<think>" * 100_000,
    "fences": "```" * 300_000,
    "comments": "<!--" * 100_000,
    "claims": r"\boxed{42}" + "answer is 42 " * 80_000,
    "answers": "answer is 4 " * 80_000,
    "a gap": "answer is 4" + " " * 500_000 + "b\nanswer is 4" + "*" * 500_000 + ".b",
    "hashes": "\n####" * 200_000,
    "surrogates": "\ud800" * 1000,
    "huge decimal": "\\boxed{1e999}",
    "tower": r"\boxed{9^{9^{9}}}",
    "power": r"\boxed{(1+x)^{3000}}",
    "parentheses": "\\boxed{" + "(" * 1900 + "}",
    "tuples": "\\boxed{" + "(1," * 600 + "}",
    "nan": r"\boxed{NaN}",
}


@pytest.mark.parametrize("name", ["parentheses", "tuples", "tower", "power", "nan", "surrogates"])
@pytest.mark.parametrize("target", ["x^2", "(1,(2,3))", "(" * 900, "{" * 5000, "\\boxed{" * 5000, "\ud800", "####"])
def test_no_reference_breaks_a_scorer(name, target):
    for score in SCORERS.values():
        assert score(HOSTILE[name], target, {}) in (0.0, 1.0, None)


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_breaks_a_scorer_or_takes_long(name):
    start = time.perf_counter()
    for scorer, score in SCORERS.items():
        if scorer != "regex":
            assert score(HOSTILE[name], "43", {}) in (0.0, 1.0, None), scorer
    assert time.perf_counter() - start < 60  # quadratic code would take hours here
