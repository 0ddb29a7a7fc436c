import pytest

from posttrain.rewards.library import GOLD_COLUMNS, REWARDS, gold_column, text_of
from posttrain.rewards.workers import RewardPool


def score(name, completion, **columns):
    options = columns.pop("options", {})
    return REWARDS[name].fn(["p"], [completion], **{key: [value] for key, value in columns.items()}, **options)[0]


def test_the_right_format_with_the_wrong_value_scores_zero():
    assert score("boxed", r"<think>It is clear.</think>\boxed{999}", answer="42") == 0.0
    assert score("boxed", r"<think>It is clear.</think>\boxed{42}", answer="42") == 1.0


def test_two_different_boxes_score_zero():
    assert score("boxed", r"\boxed{42} \boxed{41}", answer="42") == 0.0
    assert score("boxed", r"\boxed{42} \boxed{42}", answer="42") == 1.0


@pytest.mark.parametrize("name", ["boxed", "number", "choice", "exact", "math_equivalence"])
def test_no_reference_is_unscored(name):
    assert score(name, r"\boxed{42}") is None
    assert score(name, r"\boxed{42}", answer=None) is None
    assert score(name, r"\boxed{42}", answer="  ") is None


def test_the_first_gold_column_present_is_used():
    assert gold_column({"label": 1, "solution": 2}) == "solution"
    assert score("boxed", r"\boxed{42}", solution=r"So \boxed{42}.", label="41") == 1.0
    assert score("boxed", r"\boxed{42}", label=42) == 1.0
    assert GOLD_COLUMNS[0] == "answer"


def test_messages_are_scored_by_the_last_assistant_turn():
    assert text_of([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}]) == "a"
    assert text_of([{"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}]) == "a"
    assert text_of("a") == "a"
    assert text_of([{"role": "assistant", "content": None}]) == text_of(None) == text_of(3) == ""
    assert score("boxed", [{"role": "assistant", "content": r"\boxed{42}"}], answer="42") == 1.0


def test_math_backends():
    formula = r"\boxed{(x-1)(x+1)}"
    assert score("math_equivalence", formula, answer="x^2-1") == 1.0
    assert score("math_equivalence", formula, answer="x^2-1", options={"backend": "math_verify"}) == 1.0
    assert score("math_equivalence", r"\boxed{(X-1)(X+1)}", answer="x^2-1", options={"backend": "math_verify"}) == 0.0
    with pytest.raises(ValueError, match="expected 'own' or 'math_verify'"):
        score("math_equivalence", formula, answer="1", options={"backend": "sympy"})


@pytest.mark.parametrize(
    "answer", [r"9^{9^{9}}", r"(1+x)^{3000}", "1000000!", "{" * 50 + "x" + "}" * 50, "41=42", "6*7"]
)
def test_math_verify_is_never_shown_what_would_hang_it(answer):
    assert score("math_equivalence", rf"\boxed{{{answer}}}", answer="x^2", options={"backend": "math_verify"}) == 0.0
    assert score("math_equivalence", rf"\boxed{{{answer}}}", answer="42", options={"backend": "math_verify"}) == 0.0


def test_formats():
    assert score("think_format", "<think>a</think>b") == 1.0
    assert score("think_format", "<think></think>b") == 0.0
    assert score("clean", r"<think>a</think>\boxed{1}") == 1.0
    assert score("clean", r"<think>a</think>\boxed{1} Easy!") == 0.0


def test_json_against_schema_and_reference():
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    assert score("json_schema", '{"n": 1}', schema=schema) == 1.0
    assert score("json_schema", '{"n": 1, "m": 2}', schema=schema) == 0.0
    assert score("json_schema", '{"n": 1}', schema=schema, answer='{"n": 2}') == 0.0
    assert score("json_schema", '{"n": 1, "m": 2}', schema=schema, options={"strict": False}) == 1.0
    with pytest.raises(ValueError, match="outside the schema"):
        score("json_schema", "1", schema={"$ref": "https://example.org/schema"})


def test_code_is_run_against_hidden_tests():
    tests = [{"call": "f", "args": [2], "expected": 4}, {"call": "f", "args": [3], "expected": 9}]
    right, half = "```python\ndef f(x): return x * x\n```", "```python\ndef f(x): return x + 2\n```"
    assert score("code_tests", right, tests=tests) == 1.0
    assert score("code_tests", half, tests=tests) == 0.0
    assert score("code_tests", half, tests=tests, options={"partial": True}) == 0.5
    assert score("code_tests", "no code", tests=tests) == 0.0
    assert score("code_tests", right, tests=[]) is None


LOOPS = ["def f(x):\n    while True: pass", "while True: pass", "import time\ntime.sleep(100)", "def f(x): return f(x)"]


@pytest.mark.parametrize("tests", [[{"call": "f", "args": [2], "expected": 4}] * 8, [{"stdin": "", "stdout": "4"}] * 8])
def test_a_loop_in_generated_code_is_zero_and_never_unscored(tests):
    code = [f"```python\n{loop}\n```" for loop in LOOPS] + ["```python\ndef f(x): return x * x\nprint(4)\n```"]
    with RewardPool(["code_tests"], kwargs={"code_tests": {"timeout_s": 2.0, "partial": True}}, timeout_s=3.0) as pool:
        workers = [worker.process.supervisor.pid for worker in pool._workers]
        found = pool.score(["p"] * len(code), code, {"tests": [tests] * len(code)})
        assert [b.total for b in found] == [0.0] * len(LOOPS) + [1.0], found
        assert [worker.process.supervisor.pid for worker in pool._workers] == workers  # none was killed


def test_hostile_answers_are_scored_without_killing_the_worker():
    answers = ["9^{9^{9}}", "9^{\\frac{9^9}{1}}", "((((2^{50})^{50})^{50})^{50})^{50}", "10^{999999999}", "1e999999999", "99999999!", "(a+b+c)^{50}", "\\sqrt[1/9^9]{9}"]  # fmt: skip
    answers += ["9^{" * 300_000, "9" * 1_000_000, "(" * 1_000_000, "\\boxed{" * 100_000]
    specs, backend = (
        ["boxed", "math_equivalence", "number", "choice", "exact"],
        {"math_equivalence": {"backend": "math_verify"}},
    )
    with RewardPool(specs, kwargs=backend) as pool:
        workers = [worker.process.pid for worker in pool._workers]
        found = pool.score(
            ["p"] * len(answers), [f"\\boxed{{{answer}}}" for answer in answers], {"answer": ["x^2+1"] * len(answers)}
        )
        assert [b.total for b in found] == [0.0] * len(answers), [b.error for b in found]
        assert [worker.process.pid for worker in pool._workers] == workers


def test_soft_overlong_is_dapos_equation_13():
    """L_max 10, cache 4: 0 up to 6, -(L - 6) / 4 up to 10, then -1."""
    lengths = [5, 6, 7, 8, 10, 50]
    ids = [[0] * n for n in lengths]
    got = REWARDS["soft_overlong"].fn([""] * 6, [""] * 6, completion_ids=ids, max_length=10, cache=4)
    assert got == [0, 0, -0.25, -0.5, -1, -1]


def test_length_and_repetition():
    assert score("length_penalty", "", completion_ids=[1] * 5, options={"max_length": 10}) == -0.5
    assert score("length_penalty", "", completion_ids=[1] * 50, options={"max_length": 10}) == -1.0
    # 1212 has the 2-grams 12 21 12: one of three is a repeat
    assert score("repetition_penalty", "", completion_ids=[1, 2, 1, 2], options={"ngram_size": 2}) == pytest.approx(
        -1 / 3
    )
    assert score("repetition_penalty", "", completion_ids=[1], options={"ngram_size": 2}) == 0.0
    assert score("repetition_penalty", "", completion_ids=[1, 2, 3, 4]) == 0.0


def test_every_row_says_what_it_does():
    for name, row in REWARDS.items():
        assert len(row.meaning) > 20 and row.low < row.high, name
