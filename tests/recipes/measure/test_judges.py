"""A judge as a reward: what it is asked, how its verdicts are read, what is kept, and what happens without a verdict."""

import importlib.util
import json
import os
import queue
import re
import threading
from pathlib import Path

import pytest
import yaml

from posttrain.config.load import load_judge
from posttrain.errors import ConfigError, RewardError
from posttrain.grading.learned import learned_digest
from posttrain.recipes.measure.learned import load_learned
from posttrain.rewards.workers import RewardPool


def of(text, tag):
    return re.search(rf"<{tag}>\n(.*?)\n</{tag}>", text, re.DOTALL).group(1)


@pytest.fixture
def judge(tmp_path):
    """`judge(url, …)` writes a judge's file; its name as a reward."""

    def write(url, name="rubric", **keys):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"model": "m", "url": url, "cache": "./kept", **keys}))
        return f"judge:{path}"

    return write


def scored(spec, said, prompts=None, **columns):
    prompts = prompts or ["Say please."] * len(said)
    with RewardPool([spec], load=load_learned) as pool:
        return pool.score(prompts, said, columns)


def polite(question, body):
    return f"Let me see.\nVerdict: {8 if 'please' in of(question, 'answer') else 2}"


def test_a_verdict_is_a_reward_from_0_to_1_and_its_cost_is_counted(judge, judging):
    with judging(polite) as (url, requests):
        good, bad = scored(judge(url), ["please", "no"])
    assert (good.total, bad.total) == (0.8, 0.2)
    assert good.counts == {"rubric/verdicts": 1, "rubric/failed": 0, "rubric/cached": 0, "rubric/tokens": 7}
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert requests[0]["model"] == "m" and requests[0]["temperature"] == 0.0


def test_what_was_judged_is_not_asked_again_unless_something_changed(judge, judging):
    with judging(polite) as (url, requests):
        spec = judge(url)
        first, again = scored(spec, ["please"]), scored(spec, ["please", "please"])
        assert [a.total for a in again] == [first[0].total] * 2 and len(requests) == 1
        assert again[0].counts["rubric/cached"] == 1 and again[0].counts["rubric/tokens"] == 7
        for change in (
            {"system": "Be strict."},
            {"max_tokens": 9},
            {"seed": 1},
            {"model": "other"},
            {"temperature": 0.5},
        ):
            scored(judge(url, **change), ["please"])
        assert len(requests) == 6


def test_a_name_at_a_server_is_no_path(judge, judging, tmp_path):
    (tmp_path / "m").mkdir()
    with judging(polite) as (url, requests):
        scored(judge(url), ["please"])
    assert requests[0]["model"] == "m"


def test_the_key_comes_from_the_environment_and_stands_nowhere(judge, monkeypatch, tmp_path, judging):
    monkeypatch.setenv("MY_KEY", "s3cret")
    with judging(polite) as (url, requests):
        scored(judge(url, token_env="MY_KEY"), ["please"])
    assert requests[0]["key"] == "Bearer s3cret"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"s3cret" in path.read_bytes()]


def test_criteria_are_judged_one_by_one_and_weighed(judge, judging):
    def rule(question, body):
        return "Verdict: 10" if of(question, "criterion") in of(question, "answer") else "Verdict: 0"

    rubric = ["please", {"criterion": "{answer}", "weight": 3.0}]
    with judging(rule) as (url, _):
        found = scored(judge(url, rubric=rubric), ["please", "42", "42 please", "no"], answer=["42"] * 4)
    assert [one.total for one in found] == [0.25, 0.75, 1.0, 0.0]


def test_a_comparison_is_made_in_both_orders_and_a_judge_that_goes_by_order_says_nothing(judge, judging):
    def longer(question, body):
        a, b = (of(question, f"answer_{letter}") for letter in "ab")
        return f"Verdict: {'tie' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}"

    said, against = ["much longer", "no", "same"], {"answer": ["short"] * 2 + ["like"]}
    with judging(longer) as (url, requests):
        found = scored(judge(url, against="answer"), said, **against)
    assert [one.total for one in found] == [1.0, 0.0, 0.5] and len(requests) == 6
    with judging(lambda question, body: "Verdict: A") as (url, _):
        found = scored(judge(url, against="answer"), said, **against)
    assert [one.total for one in found] == [0.5] * 3
    assert all(one.counts["rubric/order_flips"] == 2 for one in found)


def test_several_samples_are_asked_with_seeds_of_their_own_and_their_mean_taken(judge, judging):
    with judging(lambda question, body: f"Verdict: {body['seed'] - 3}") as (url, requests):
        (found,) = scored(judge(url, samples=3, temperature=0.7, seed=5), ["x"])
    assert found.total == pytest.approx(0.3) and sorted(request["seed"] for request in requests) == [5, 6, 7]


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("I like it.", "no verdict in the judge's answer"),
        ("Verdict: 3\nVerdict: 9", "2 verdicts that differ"),
        ("Verdict: 11", "the verdict '11' is none; expected a number from 0 to 10"),
        ("Verdict: good", "the verdict 'good' is none"),
        ("Verdict: 4/5", "the verdict '4/5' is none"),
        ("\n" * 100_000, "no verdict"),
        ("<think>Verdict: 9</think>", "no verdict"),
        ("", "no verdict"),
    ],
)
def test_without_a_verdict_a_completion_is_unscored_and_never_0(says, why, judge, judging):
    with judging(lambda question, body: says) as (url, _):
        (found,) = scored(judge(url), ["x"])
        assert found.total is None and why in found.error
        assert found.counts["rubric/failed"] == 1
        with pytest.raises(RewardError, match="on_failure: stop ends the run"):
            scored(judge(url, on_failure="stop"), ["x"])


@pytest.mark.parametrize(
    "says",
    [
        "**Verdict:** 7/10",
        "> verdict: `7`",
        "Verdict: 7.",
        "<think>Verdict: 1</think>\nVerdict: 7",
        "Verdict: 7, good.",
        "Verdict: 7\n\n## Verdict: 7.0/10",
    ],
)
def test_a_verdict_may_be_dressed(says, judge, judging):
    with judging(lambda question, body: says) as (url, _):
        assert scored(judge(url), ["x"])[0].total == pytest.approx(0.7)


def test_a_busy_server_is_asked_again_and_one_that_refuses_is_not(judge, judging):
    with judging(polite, failures=[429, 503]) as (url, requests):
        assert scored(judge(url), ["please"])[0].total == 0.8 and len(requests) == 3
    with judging(polite, failures=[401]) as (url, requests):
        (found,) = scored(judge(url), ["please"])
        assert found.total is None and "answered 401" in found.error and len(requests) == 1
        assert scored(judge(url), ["please"])[0].total == 0.8, "a failure is not kept"


def test_a_server_that_is_not_there_costs_its_completions_and_too_many_stop_the_step(judge):
    spec = judge("http://127.0.0.1:9/v1", retries=0, timeout_s=1.0)
    with RewardPool([spec], load=load_learned) as pool:
        assert [one.total for one in pool.score(["p"], ["x"], {})] == [None]
        with pytest.raises(RewardError, match="1 of 1 completions are unscored"):
            pool.score(["p"], ["x"], {}, max_unscored=0.1)


def test_what_an_answer_holds_is_not_filled_in(judge, judging):
    with judging(polite) as (url, requests):
        scored(judge(url), ["{answer} {low} please"], answer=["SECRET"])
    assert "{answer} {low} please" in requests[0]["messages"][-1]["content"]


def test_a_column_that_is_missing_stops_and_one_that_is_null_is_unscored(judge, judging):
    with judging(polite) as (url, _):
        spec = judge(url, prompt="{completion} {answer}")
        with pytest.raises(RewardError, match=r"names \{answer\}, and the dataset has no such column"):
            scored(spec, ["x"])
        (found,) = scored(spec, ["x"], answer=[None])
        assert found.total is None and "the row has no `answer`" in found.error


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"prompt": "Is it good?"}, r"prompt.*has no \{completion\}"),
        ({"rubric": ["polite"], "against": "answer"}, "a comparison has no criteria"),
        ({"samples": 3}, "asks the same thing 3 times"),
        ({"scale": [5, 1]}, "has no room"),
        ({"verdict": "x"}, "has 0 groups"),
        ({"url": "ftp://x"}, "expected http"),
        ({"url": "https://me:secret@host/v1"}, "holds a password"),
        ({"tempreature": 1}, "tempreature"),
    ],
)
def test_a_judge_that_cannot_work_is_refused_with_its_file(keys, why, judge):
    with pytest.raises(ConfigError, match=why) as refused:
        load_judge(Path(judge(**{"url": "http://127.0.0.1:9/v1", **keys}).removeprefix("judge:")))
    assert "rubric.yaml" in str(refused.value) and "secret" not in str(refused.value)


def test_its_digest_moves_with_its_file(judge):
    first = learned_digest(judge("http://127.0.0.1:9/v1"))
    assert learned_digest(judge("http://127.0.0.1:9/v1", system="Be strict.")) != first


def test_a_model_of_this_process_judges_and_is_part_of_the_digest(make_local_model, tmp_path):
    model = make_local_model("qwen3")
    path = tmp_path / "local.yaml"
    keys = {
        "model": f"../{model.relative_to(tmp_path.parent)}" if model.is_relative_to(tmp_path.parent) else str(model),
        "cache": "./kept",
        "max_tokens": 4,
        "verdict": "(?s)^(.).*$",
        "scale": [-1, 1],
    }
    path.write_text(yaml.safe_dump(keys))
    before = learned_digest(f"judge:{path}")
    one, two = scored(f"judge:{path}", ["x", "y"]), scored(f"judge:{path}", ["x", "y"])
    assert [o.error for o in one] == [o.error for o in two] and two[0].counts["local/cached"] == 1
    assert one[0].counts["local/tokens"] > 4 and one[0].counts["local/cached"] == 0
    os.utime(model / "config.json")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert learned_digest(f"judge:{path}") != before


def test_what_a_model_of_this_process_cannot_read_is_unscored(make_local_model, tmp_path):
    keys = {"model": str(make_local_model("qwen3")), "cache": "./kept", "max_tokens": 4, "verdict": "(?s)^(.).*$"}
    (tmp_path / "local.yaml").write_text(yaml.safe_dump(keys))
    found = scored(f"judge:{tmp_path / 'local.yaml'}", ["half \ud800", "long " * 100_000])
    assert [one.total for one in found] == [None, None]
    assert "lone surrogate" in found[0].error and "the judge takes" in found[1].error


def test_a_run_that_a_judge_pays_logs_its_cost_and_goes_on_as_if_it_had_not_stopped(train, runner, judge, judging):
    def rule(question, body):
        return f"Verdict: {sum(map(ord, of(question, 'answer'))) % 11}"

    with judging(rule) as (url, _):
        options = {"reward_funcs": [judge(url), "spread"]}
        whole = train("grpo", name="whole", **options)
        train("grpo", name="cut", stop_after=2, **options)
        cut = train("grpo", name="cut", **options)
    assert runner.losses(whole) == runner.losses(cut) and any(runner.losses(whole))
    first = runner.rows(whole)[0]
    assert first["rewards/rubric/tokens"] == 7 * 8 and first["rewards/rubric/verdicts"] == 8
    assert first["rewards/rubric/failed"] == 0 and first["judge/failed"] == 0


@pytest.mark.skipif(importlib.util.find_spec("llguidance") is None, reason="a server needs posttrain[serve]")
def test_our_own_server_judges(judge, make_local_model, tmp_path):
    from posttrain.serve.options import ServeOptions
    from posttrain.serve.run import run_server
    from posttrain.serve.setup import ServedNames, make_router

    folder, opened = make_local_model("qwen3"), queue.Queue()
    options, names = ServeOptions(port=0, drain_s=5.0), ServedNames([str(folder)], tmp_path / "none", name="tiny")
    thread = threading.Thread(
        target=run_server, args=(options, lambda: make_router(names, options), opened.put), daemon=True
    )
    thread.start()
    served = opened.get(timeout=120)
    try:
        keys = {"model": "tiny", "max_tokens": 4, "verdict": "(?s)^(.).*$", "temperature": 1.0, "samples": 2}
        (found,) = scored(judge(f"{served.address}/v1", **keys), ["x"])
    finally:
        served.stop()
        thread.join(30)
    assert found.counts["rubric/verdicts"] == 2 and found.counts["rubric/tokens"] > 8
    assert found.total is not None or "in the judge's answer" in found.error or "is none" in found.error
