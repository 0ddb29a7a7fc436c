import json

from posttrain.rewards.canaries import impossible
from posttrain.rewards.cases import cases_of
from posttrain.rewards.library import REWARDS
from posttrain.types import Origin, Prompt

DIGEST = "sha256:" + "0123456789abcdef" * 4


def case_of(**columns):
    return cases_of([Prompt(Origin("p", 0), "Q?", columns)])[0]


def test_the_reference_keeps_its_shape():
    assert impossible(case_of(answer="42"), DIGEST)["answer"].isdigit()
    assert isinstance(impossible(case_of(answer=42), DIGEST)["answer"], int)
    worked = impossible(case_of(solution="20 + 22 = 42\n#### 42"), DIGEST)["solution"]
    assert worked.startswith("20 + 22 = 42\n#### 1") and not worked.endswith("42\n#### 42")
    assert impossible(case_of(answer="B"), DIGEST)["answer"] == "∅"
    assert impossible(case_of(answer="Paris", topic="x"), DIGEST) == {"answer": "canary 0123456789abcdef", "topic": "x"}


def test_it_depends_on_the_digest_alone():
    other = "sha256:" + "f" * 64
    case = case_of(answer="42")
    assert impossible(case, DIGEST) == impossible(case, DIGEST) != impossible(case, other)


def test_no_right_answer_of_the_library_is_paid():
    tests = [{"call": "add", "args": [1, 2], "expected": 3}, {"stdin": "1", "stdout": "1"}]
    columns = impossible(case_of(answer="def add(a, b):\n    return a + b", tests=json.dumps(tests)), DIGEST)
    assert {test.get("expected", test.get("stdout")) for test in json.loads(columns["tests"])} == {DIGEST[7:]}
    right = {
        "boxed": r"\boxed{42}",
        "number": "#### 42",
        "math_equivalence": r"\boxed{42}",
        "exact": "42",
        "choice": "Answer: A",
    }
    for name, text in right.items():
        case = case_of(answer="A" if name == "choice" else "42")
        gold = [case.columns["answer"]]
        assert REWARDS[name].fn(["Q?"], [text], answer=gold) == [1.0]
        assert REWARDS[name].fn(["Q?"], [text], answer=[impossible(case, DIGEST)["answer"]]) == [0.0]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    given = impossible(case_of(answer='{"n": 1}', schema=schema), DIGEST)
    assert REWARDS["json_schema"].fn(["Q?"], ['{"n": 1}'], schema=[schema], answer=[given["answer"]]) == [0.0]
