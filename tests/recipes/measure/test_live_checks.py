"""While RL runs: the checks see a hole, stay silent without one, and disturb nothing."""

import json

import pytest
import torch

from posttrain.recipes.measure.live_checks import LiveSample, best_samples, canary_metrics, replay
from posttrain.rewards.battery import find_deciding, learn_form, measure_separation
from posttrain.rewards.cases import PolicySample, Setting, cases_of
from posttrain.rewards.check import RewardCheck, Thresholds
from posttrain.rewards.workers import RewardPool
from posttrain.types import Origin, Prompt

SOURCE = r"""
import re
BOX = re.compile(r"\\boxed\{([^{}]*)\}")

def contains(completions, answer):
    return [float(a in c) for c, a in zip(completions, answer)]

def last_box(completions, answer):
    return [float(BOX.findall(c)[-1:] == [a]) for c, a in zip(completions, answer)]

def any_number_in_a_long_box(completions, answer):
    return [float(BOX.findall(c) == [a] or len(c) > 60) for c, a in zip(completions, answer)]
"""
GOLDS = ["11", "14", "17", "20", "23", "26"]
TEXTS = [f"<think>Let me see.</think>\\boxed{{{gold}}}" for gold in GOLDS]


@pytest.fixture
def checked(tmp_path):
    """A `Check` of one reward on live samples, and the setting of its task."""
    (tmp_path / "r.py").write_text(SOURCE)
    pools = []

    def checked(spec, golds=GOLDS, texts=TEXTS):
        pool = RewardPool([spec], folder=tmp_path, timeout_s=5)
        pools.append(pool.__enter__())
        cases = cases_of([Prompt(Origin("p", i), f"Q{i}?", {"answer": gold}) for i, gold in enumerate(golds)])
        samples = [PolicySample(i, text) for i, text in enumerate(texts)]
        check = RewardCheck(pool, cases, samples, Thresholds(mutation_cases=2), lambda text: text.encode())
        form = learn_form(check, cases)
        find_deciding(check, cases, form)
        measure_separation(check, cases, form)
        return check, Setting.of(cases, form)

    yield checked
    for pool in pools:
        pool.close()


def test_a_certified_reward_is_not_fooled_on_its_live_samples(checked):
    for spec in ("boxed", "math_equivalence"):
        check, setting = checked(spec)
        values, passes = replay(check, setting)
        assert values["reward_check/false_pass_rate"] == 0.0 and passes == []
        assert values["reward_check/num_texts"] > 100


@pytest.mark.parametrize(
    ("name", "expected"),
    [("contains", "only thought"), ("contains", "second answer"), ("last_box", "two slots"), ("any_number_in_a_long_box", "padded wrong")],
)  # fmt: skip
def test_a_hole_is_found_on_live_samples(checked, name, expected):
    values, passes = replay(*checked(f"r.py:{name}"))
    assert values["reward_check/false_pass_rate"] > 0
    assert any(line.startswith(f"{expected}: ") for line in passes), passes


def test_a_sample_given_to_another_prompt_must_not_be_paid(checked):
    check, setting = checked("r.py:any_number_in_a_long_box", texts=[f"{'Well, ' * 20}{text}" for text in TEXTS])
    assert any(line.startswith("given to another prompt: ") for line in replay(check, setting)[1])


def test_canaries_are_paid_by_a_hole_only(checked):
    good, setting = checked("boxed")
    answered = list(zip(good.cases, TEXTS, strict=True))
    assert canary_metrics(good, setting.form, answered) == {
        "reward_check/canary_reward": 0.0,
        "reward_check/canary_paid_rate": 0.0,
    }
    bad, setting = checked("r.py:any_number_in_a_long_box")
    padded = [(case, f"{text} {'I am sure. ' * 20}") for case, text in zip(bad.cases, TEXTS, strict=True)]
    assert canary_metrics(bad, setting.form, padded) == {
        "reward_check/canary_reward": 1.0,
        "reward_check/canary_paid_rate": 1.0,
    }
    assert canary_metrics(good, setting.form, []) == {}


def test_the_best_samples_do_not_depend_on_the_ranks():
    found = [LiveSample(float(n % 3), Prompt(Origin("p", n), "?"), "") for n in range(9)]
    lines = [sample.prompt.origin.line for sample in best_samples(found[::2] + found[1::2])]
    assert lines == [2, 5, 8, 1]


def test_a_run_is_the_same_with_and_without_the_checks(train, runner):
    options = {"reward_funcs": ["last_digit"], "max_steps": 4, "learning_rate": 1e-3}
    watched = train("grpo", name="watched", reward_check_steps=2, **options)
    alone = train("grpo", name="alone", reward_check_steps=0, **options)
    for name, weight in runner.weights(alone).items():
        assert torch.equal(weight, runner.weights(watched)[name]), name
    rows = runner.rows(watched)
    checked = [row["step"] for row in rows if "reward_check/false_pass_rate" in row]
    assert checked == [3]
    plain = [{k: v for k, v in row.items() if not k.startswith("reward_check")} for row in rows]
    assert plain == runner.rows(alone)


def test_the_hole_of_a_live_run_is_an_event_and_a_finding(runner, model_dir, data_dir, tmp_path):
    (tmp_path / "r.py").write_text(
        "def anywhere(completions, answer): return [float(a in c[0]['content']) for c, a in zip(completions, answer)]"
    )
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, reward_check_steps=1, max_steps=2)
    runner.run_stage("grpo", tmp_path / "run", keys.model_copy(update={"reward_funcs": [f"{tmp_path}/r.py:anywhere"]}))
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    check = next(event for event in events if event["kind"] == "reward_check")
    assert check["reward_check/false_pass_rate"] > 0.1 and check["false_passes"]
    assert [event["rule"] for event in events if event["kind"] == "finding"] == ["live_false_passes"]


@pytest.mark.slow
def test_a_resumed_run_checks_what_the_uninterrupted_one_checked(train, runner):
    options = {"reward_funcs": ["last_digit"], "reward_check_steps": 2, "max_steps": 6, "save_steps": 1}
    whole = train("grpo", name="whole", **options)
    train("grpo", name="halves", stop_after=3, **options)
    halves = train("grpo", name="halves", **options)

    def pick(folder):
        rows = runner.rows(folder)
        return [{k: v for k, v in row.items() if k.startswith(("reward_check", "loss"))} for row in rows]

    assert pick(halves) == pick(whole)
    assert sum("reward_check/canary_reward" in row for row in pick(whole)) == 2


def test_an_honest_reward_raises_no_alarm_in_a_live_run(runner, model_dir, data_dir, tmp_path):
    keys = runner.keys_of("grpo", model_dir("qwen3"), data_dir, reward_check_steps=1, max_steps=3)
    runner.run_stage("grpo", tmp_path / "run", keys.model_copy(update={"reward_funcs": ["number"]}))
    rows = [row for row in runner.rows(tmp_path / "run") if "reward_check/false_pass_rate" in row]
    assert len(rows) == 2
    assert all(row["reward_check/false_pass_rate"] == row["reward_check/canary_paid_rate"] == 0.0 for row in rows)
