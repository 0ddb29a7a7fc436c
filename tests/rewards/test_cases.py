from posttrain.rewards.cases import (
    AnswerForm,
    PolicySample,
    candidate_forms,
    case_kind,
    cases_digest,
    cases_of,
    surely_wrong,
)
from posttrain.types import Origin, Prompt


def prompts(golds, **columns):
    return [Prompt(Origin("p", i), f"Question {i}?", {"answer": gold, **columns}) for i, gold in enumerate(golds)]


def test_cases_have_a_gold_and_a_wrong_answer_of_its_kind():
    assert [c.wrong for c in cases_of(prompts(["42", "-7"]))] == ["49", "0"]
    assert [c.wrong for c in cases_of(prompts(["A", "B"]))] == ["B", "A"]
    assert [c.wrong for c in cases_of(prompts(["Paris", "Rome"]))] == ["Rome", "Paris"]
    assert cases_of(prompts(["20+22\n#### 42"]))[0].gold == "42"
    assert cases_of(prompts([None]))[0].gold is None
    assert len(cases_of(prompts(["1"] * 9), limit=4)) == 4


def test_kinds():
    assert case_kind(cases_of(prompts(["1", "2/3"]))) == "number"
    assert case_kind(cases_of(prompts(["A", "C"]))) == "choice"
    assert case_kind(cases_of(prompts(["1", "x"]))) == "text"
    assert case_kind(cases_of(prompts(["1"], tests=[]))) == "code"
    assert case_kind(cases_of(prompts(["1"], schema={}))) == "json"


def test_the_form_seen_in_samples_comes_first():
    samples = [PolicySample(0, r"<think>a</think>\boxed{1}"), PolicySample(1, r"<think>b</think>\boxed{2}")]
    assert candidate_forms(samples, ["r.py:f"])[0] == AnswerForm(True, "\\boxed{", "}")
    assert candidate_forms([], ["number"])[0] == AnswerForm(False, "#### ", "")
    assert candidate_forms([PolicySample(0, "Answer: 3")], ["r.py:f"])[0] == AnswerForm(False, "Answer: ", "")
    assert AnswerForm(True, "\\boxed{", "}").render("4", "2+2") == r"<think>2+2</think>\boxed{4}"


def test_only_what_is_surely_wrong_is_called_wrong():
    assert surely_wrong(r"\boxed{41}", "42")
    assert not surely_wrong(r"\boxed{42}", "42")
    assert not surely_wrong("it is 42", "42")
    assert not surely_wrong("I do not know", "42")
    assert surely_wrong("It is Rome.", "Paris")
    assert not surely_wrong("Not Paris?", "Paris")


def test_the_digest_sees_cases_and_samples():
    cases = cases_of(prompts(["1", "2"]))
    digests = {cases_digest(cases, []), cases_digest(cases[:1], []), cases_digest(cases, [PolicySample(0, "x")])}
    assert len(digests) == 3
    assert cases_digest(cases_of(prompts(["1", "2"])), []) in digests
