import pytest

from posttrain.grading.scorers import SCORERS, scorer_digest, unusable


@pytest.mark.parametrize(
    ("scorer", "text", "target", "columns", "score"),
    [
        ("boxed", r"\boxed{4}", "4", {}, 1.0),
        ("boxed", r"\boxed{4}", None, {}, None),
        ("math", r"\boxed{\sqrt{12}}", r"2\sqrt{3}", {}, 1.0),
        ("last_number", "so 4", "4", {}, 1.0),
        ("contains", "<think>Rome</think>Paris it is", "Paris", {}, 1.0),
        ("contains", "<think>Paris</think>Rome", "Paris", {}, 0.0),
        ("regex", "abc", "^a.c$", {}, 1.0),
        ("regex", "abc", "(", {}, None),
        ("clean", r"<think>a</think>\boxed{4}", None, {}, 1.0),
        ("format", "<think>a</think>b", None, {}, 1.0),
        ("json_schema", '{"a": 1}', None, {"schema": {"properties": {"b": {}}}}, 1.0),
        ("json_schema", '{"a": 1}', None, {"schema": {"properties": {"b": {}}}, "strict": True}, 0.0),
        ("json_schema", "3", None, {"schema": '{"type": "integer"}'}, 1.0),
        ("json_schema", "3", "4", {"schema": {"type": "integer"}}, 0.0),
        ("json_schema", "3", '{"type": "integer"}', {}, 1.0),
        ("json_schema", "3", "no schema", {}, None),
    ],
)
def test_scorers(scorer, text, target, columns, score):
    assert SCORERS[scorer](text, target, columns) == score


def test_digest_differs_by_scorer_and_repeats():
    assert scorer_digest("boxed") == scorer_digest("boxed") != scorer_digest("clean")
    with pytest.raises(KeyError, match="expected one of boxed"):
        scorer_digest("boxd")


@pytest.mark.parametrize(
    ("scorer", "target", "columns", "reason"),
    [
        ("exact", None, {}, "it needs a `target`"),
        ("number", "  ", {}, "it needs a `target`"),
        ("boxed", "x" * 2001, {}, "too long to be an answer"),
        ("last_number", "Paris", {}, "is no number"),
        ("choice", "Paris", {}, "is no letter"),
        ("regex", "(", {}, "must be a pattern"),
        ("json_schema", "no schema", {}, "needs a JSON schema"),
        ("json_schema", "no JSON", {"schema": {"type": "integer"}}, "a `target` that is JSON"),
        ("json_schema", '{"type": "no type"}', {}, "needs a JSON schema"),
    ],
)
def test_a_target_that_no_answer_could_match_is_known(scorer, target, columns, reason):
    assert reason in unusable(scorer, target, columns)


@pytest.mark.parametrize(
    ("scorer", "target", "columns"),
    [
        ("last_number", "so #### 1,234", {}), ("last_number", "50%", {}), ("last_number", "1/2", {}), ("choice", "(B) Paris", {}),
        ("choice", "b", {}), ("boxed", r"so \boxed{x^2}", {}), ("number", "two", {}), ("format", None, {}), ("clean", None, {}),
        ("json_schema", None, {"schema": {"type": "integer"}}), ("json_schema", '{"type": "integer"}', {}), ("regex", "^a.c$", {}),
    ],
)  # fmt: skip
def test_a_target_that_an_answer_can_match_is_usable(scorer, target, columns):
    assert unusable(scorer, target, columns) == ""
