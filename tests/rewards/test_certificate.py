import json
from pathlib import Path

import pytest

from posttrain.errors import RewardError
from posttrain.rewards.cases import cases_of
from posttrain.rewards.certificate import Certificate, check_rewards
from posttrain.rewards.check import Thresholds
from posttrain.rewards.workers import RewardPool
from posttrain.types import Origin, Prompt

FEW = Thresholds(mutation_cases=2, repeats=2)


def prompts(golds, num=8, chat=True, **columns):
    rows = []
    for i in range(num):
        question = f"Tom has {i} pens and gets {i + 2} more. How many?"
        given = {"answer": golds[i % len(golds)], **columns} if golds else {"topic": "pens"}
        rows.append(Prompt(Origin("p", i), ({"role": "user", "content": question},) if chat else question, given))
    return rows


NUMBERS = ["11", "-14", "17", "1200", "3/4"]


def certify(specs, rows, **options):
    with RewardPool(specs, **options) as pool:
        return check_rewards(pool, cases_of(rows), thresholds=FEW)


def test_our_box_reward_passes_its_own_check():
    certificate = certify(["boxed", "think_format"], prompts(NUMBERS))
    assert certificate.verdict == "pass", certificate.failures
    assert certificate.measures["false_passes"] == 0 and certificate.measures["mutation_recall"] == 1.0
    assert certificate.config["form"] == {"think": True, "before": "\\boxed{", "after": "}"}
    assert certificate.matches(certificate.reward_digest) and not certificate.matches("sha256:other")
    again = Certificate.from_json(json.loads(json.dumps(certificate.to_json())))
    assert again == certificate and again.digest == certificate.digest


def test_the_reward_of_the_quickstart_passes_its_check():
    folder = Path(__file__).parents[2] / "examples" / "quickstart"
    certificate = certify(["rewards.py:correct"], prompts(["11", "-14", "17", "42"]), folder=folder)
    assert certificate.verdict == "pass", certificate.failures
    assert certificate.measures["false_passes"] == 0


def test_a_reward_as_lenient_as_an_eval_is_refused_for_what_it_leaves_to_the_reader():
    certificate = certify(["boxed"], prompts(["11", "-14", "17"]), kwargs={"boxed": {"strict": False}})
    assert certificate.verdict == "fail"
    assert any(failure.startswith("unevaluated expression") for failure in certificate.failures)


def test_a_naive_reward_is_refused_with_its_holes_named(tmp_path):
    (tmp_path / "r.py").write_text(
        "def correct(completions, answer): return [float(a in c[-1]['content']) for c, a in zip(completions, answer)]"
    )
    certificate = certify(["r.py:correct"], prompts(["11", "14", "17"]), folder=tmp_path)
    assert certificate.verdict == "fail"
    assert not certificate.matches(certificate.reward_digest)
    failed = " ".join(certificate.failures)
    for name in ("lists and hedges", "enumeration", "denial", "retraction", "gold only in think", "two slots"):
        assert f"{name}: " in failed


def test_without_references_the_certificate_is_partial():
    certificate = certify(["think_format"], prompts(None))
    assert certificate.verdict == "partial" and certificate.matches(certificate.reward_digest)
    assert "no column answer" in certificate.warnings[0]
    assert {row.kind for row in certificate.mutations} == {"N"}


def test_without_references_what_does_not_survive_still_fails(tmp_path):
    (tmp_path / "r.py").write_text("def first(completions): return [float(c.encode()[0]) for c in completions]")
    certificate = certify(["r.py:first"], prompts(None, chat=False), folder=tmp_path)
    assert certificate.verdict == "fail"
    assert any(failure.startswith("surrogates") for failure in certificate.failures)


def test_nothing_to_check_on_is_an_error():
    with RewardPool(["boxed"]) as pool, pytest.raises(RewardError, match="at least one prompt"):
        check_rewards(pool, [])


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
ADDITIONS = [{"call": "add", "args": [1, 2], "expected": 3}, {"call": "add", "args": [5, 7], "expected": 12}]
LIBRARY = {
    "boxed, text prompts": (["boxed"], prompts(NUMBERS, chat=False), {}),
    "units": (["boxed"], prompts(["5 cm", "12 kg", "3 m"]), {}),
    "number": (["number", "soft_overlong"], prompts(NUMBERS), {}),
    "choice": (["choice"], prompts(list("ABCD")), {}),
    "exact": (["exact"], prompts(["Paris", "Rome", "Oslo"]), {}),
    "math": (["math_equivalence", "clean"], prompts([r"2\sqrt{3}", "x^2+1", "(1,2)", r"\frac{\pi}{2}"]), {}),
    "math-verify": (["math_equivalence"], prompts([r"2\sqrt{3}", "x^2+1", "(1,2)"]), {"kwargs": {"math_equivalence": {"backend": "math_verify"}}}),
    "json": (["json_schema"], prompts(['{"n": 1}', '{"n": 2}'], schema=SCHEMA), {}),
    "code": (["code_tests"], prompts(["def add(a, b):\n    return a + b"], 3, tests=ADDITIONS), {"kwargs": {"code_tests": {"timeout_s": 0.7}}}),
    "penalties": (["boxed", "length_penalty", "repetition_penalty"], prompts(NUMBERS), {}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_the_whole_library_passes_its_own_check(name):
    specs, rows, options = LIBRARY[name]
    certificate = certify(specs, rows, **options)
    assert certificate.verdict == "pass", certificate.failures
    assert certificate.measures["false_passes"] == 0
