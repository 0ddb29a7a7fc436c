import pytest

from posttrain.grading.code import extract_code, run_tests
from posttrain.grading.sandbox import Limits

LIMITS = Limits(wall_s=2.0, cpu_s=1)
TESTS = [{"call": "add", "args": [1, 2], "expected": 3}, {"call": "add", "args": [5, 7], "expected": 12}]


def test_right_code_passes():
    assert run_tests("def add(a, b):\n    return a + b", TESTS, LIMITS) == [True, True]
    assert run_tests("print(sum(map(int, input().split())))", [{"stdin": "1 2", "stdout": "3"}], LIMITS) == [True]


@pytest.mark.parametrize("value", ["float(a + b)", "str(a + b)", "[a + b]", "None", "a + b == 3"])
def test_the_type_counts(value):
    assert run_tests(f"def add(a, b):\n    return {value}", TESTS, LIMITS) == [False, False]


def test_a_test_of_unknown_form_is_an_error():
    with pytest.raises(ValueError, match="expected call, args, expected or stdin, stdout"):
        run_tests("", [{"input": 1}], LIMITS)


def test_code_is_the_last_fence():
    assert extract_code("a\n```python\nx = 1\n```\n```\ny = 2\n```") == "y = 2\n"
    assert extract_code("x = 1") == "x = 1"
    assert extract_code("\n  if x:\n      y = 1") == "if x:\n    y = 1"
    assert extract_code(" if x:\n    y = 1\n") == "if x:\n   y = 1\n"
    assert extract_code("```python\nx = 1") == ""
