import time

import pytest

from posttrain.grading.code import extract_code, run_tests
from posttrain.grading.sandbox import SandboxLimits

LIMITS = SandboxLimits(wall_s=2.0, cpu_s=1)
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


FENCE = "```"
DOCSTRING = 'def f():\n    """Like:\n\n```\nf()\n```\n    """\n    return 1\n'
REPLIES = {
    "python3": (f"{FENCE}python3\nx = 1\n{FENCE}", "x = 1\n"),
    "capitals": (f"{FENCE}Python\nx = 1\n{FENCE}", "x = 1\n"),
    "title": (f'{FENCE}python title="a.py"\nx = 1\n{FENCE}', "x = 1\n"),
    "unclosed": (f"{FENCE}python\nx = 1", "x = 1"),
    "fence in a docstring": (f"{FENCE}python\n{DOCSTRING}{FENCE}\nDone.", DOCSTRING),
    "tagged fence in a docstring": (
        f"{FENCE}python\n{DOCSTRING.replace(FENCE, FENCE + 'python', 1)}{FENCE}\nDone.",
        DOCSTRING.replace(FENCE, FENCE + "python", 1),
    ),
    "text before": (f"{FENCE}text\nplan\n{FENCE}\n{FENCE}python\nx = 1\n{FENCE}", "x = 1\n"),
    "bash before": (f"{FENCE}bash\npip install y\n{FENCE}\n\n{FENCE}python\nx = 1\n{FENCE}", "x = 1\n"),
    "bash after": (f"{FENCE}python\nx = 1\n{FENCE}\nRun:\n{FENCE}bash\npython x.py\n{FENCE}", "x = 1\n"),
    "left open, then bash": (f"{FENCE}python\nx = 1\n{FENCE}bash\nls\n{FENCE}", "x = 1\n"),
    "output after": (f"{FENCE}python\nx = 1\n{FENCE}\nOutput:\n{FENCE}\n5\n{FENCE}", "x = 1\n"),
    "in a sentence": (f"Here: {FENCE}python\nx = 1\n{FENCE} That is it.", "x = 1\n"),
    "closed on its line": (f"{FENCE}python\nx = 1{FENCE} ok", "x = 1"),
    "inline code before": (f"Use {FENCE}y{FENCE} here.\n{FENCE}python\nx = 1\n{FENCE}", "x = 1\n"),
    "tildes": ("~~~python\nx = 1\n~~~", "x = 1\n"),
    "four backticks": ("````python\nx = 1\n````", "x = 1\n"),
    "in a list": (f"1. So\n   {FENCE}python\n   x = 1\n   y = 2\n   {FENCE}", "x = 1\ny = 2\n"),
    "a quote left open": (f"{FENCE}python\nx = 'a\ny = 2\n{FENCE}\nbye", "x = 'a\ny = 2\n"),
    "no Python": (f"{FENCE}text\nhello\n{FENCE}", ""),
    "an expression": (f"{FENCE}\n5\n{FENCE}", "5\n"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_fences_pair_by_language_and_order(name):
    text, code = REPLIES[name]
    assert extract_code(text) == code
    assert extract_code("I think so.\n\n" + text) == code


@pytest.mark.parametrize(
    "unit", ['\\"', " ", f"{FENCE}\n'''\n", FENCE, "a ", f"{FENCE}\n", "'''" + '"""', "- ", "> ", "x, ", f"{FENCE}a "]
)
def test_hostile_fences_take_linear_time(unit):
    start = time.perf_counter()
    for text in (unit * (90_000 // len(unit)), f"{FENCE}python\n" + unit * (90_000 // len(unit)), unit * 5_000_000):
        extract_code(text)
    assert time.perf_counter() - start < 20  # quadratic code would take minutes here


SQUARES = [{"call": "f", "args": [i], "expected": i * i} for i in range(4)]


@pytest.mark.parametrize(
    "body",
    [
        "while x == 1: pass",
        "if x == 1: return 10 ** 10_000",
        "if x == 1: return 'x' * 3_000_000",
        "if x == 1: __import__('os')._exit(0)",
        "if x == 1: return float('nan')",
        "if x == 1: return [bytearray(1 << 34)]",
        "if x == 1:\n    class E(Exception):\n      def __str__(self): raise ValueError\n    raise E",
        "if x == 1:\n    ring = []\n    ring.append(ring)\n    return ring",
        "if x == 1: exit()",
    ],
)
def test_what_one_call_does_costs_its_own_test_only(body):
    assert run_tests(f"def f(x):\n  {body}\n  return x * x", SQUARES, LIMITS) == [True, False, True, True]


def test_each_call_has_its_own_time():
    code = "import time\ndef f(x):\n  time.sleep(0.9)\n  return x * x"
    assert run_tests(code, SQUARES, SandboxLimits(wall_s=3.0)) == [True] * 4


def test_a_loop_ends_with_the_budget_and_the_first_failure():
    for code in ("def f(x):\n  while True: pass", "while True: pass"):
        start = time.monotonic()
        assert run_tests(code, SQUARES * 10, SandboxLimits(wall_s=0.5), budget_s=1.5) == [False] * 40
        assert (
            run_tests(code, SQUARES * 10, SandboxLimits(wall_s=0.5), budget_s=60, stop_at_failure=True) == [False] * 40
        )
        assert time.monotonic() - start < 15
    scripts = [{"stdin": "", "stdout": "1"}] * 40
    start = time.monotonic()
    assert not any(run_tests("while True: pass", scripts, SandboxLimits(wall_s=0.5), stop_at_failure=True))
    assert not any(run_tests("while True: pass", scripts, SandboxLimits(wall_s=0.5), budget_s=1.5))
    assert time.monotonic() - start < 15


@pytest.mark.parametrize("name", ["exit", "quit"])
def test_exit_and_quit_work(name):
    assert run_tests(f"print(input())\n{name}()\nprint(2)", [{"stdin": "1", "stdout": "1"}], LIMITS) == [True]
    assert run_tests(f"def f(x): return x * x\n{name}()", SQUARES, LIMITS) == [True] * 4
