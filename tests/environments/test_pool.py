"""Environments in processes of their own: what they answer, and what one that fails costs."""

import os
import time
from pathlib import Path

import pytest

from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.spec import EnvironmentSpec
from posttrain.errors import ConfigError

OWN = Path(__file__).with_name("own_env.py")


def pool_of(env=None, tools=(), timeout_s=10.0, num_workers=2):
    spec = EnvironmentSpec(env and f"{OWN}:{env}", tuple(f"{OWN}:{names}" for names in tools))
    return EnvironmentPool(spec, timeout_s, num_workers)


def reset(place, **columns):
    return place, {"do": "reset", "prompt": "p", "seed": 10 + place, "columns": columns}


def step(place, answer="hello"):
    return place, {"do": "step", "answer": answer}


def call(name, place=0, **arguments):
    return place, {"do": "call", "name": name, "arguments": arguments}


@pytest.mark.parametrize("env", ["Echo", "AsyncEcho"])
def test_each_episode_has_an_environment_of_its_own_with_its_seed(env):
    with pool_of(env) as pool:
        pool.ask([reset(0), reset(1)])
        first, second = pool.ask([step(0), step(1)])
        assert first["text"].startswith("seed 3") and second["text"].startswith("seed 4")
        assert not first["done"] and first["reward"] is None
        pool.ask([step(0), step(1)])
        (last,) = pool.ask([step(0, "hello")])
        assert (last["done"], last["reward"]) == (True, pytest.approx(2 / 3))
        (again,) = pool.ask([reset(0)])
        assert "failed" not in again


@pytest.mark.parametrize("fault", ["hang", "crash", "flood", "scribble", "raise"])
def test_an_environment_that_fails_costs_its_own_episode_within_its_deadline(fault, tmp_path, monkeypatch):
    pids = tmp_path / "pids"
    pids.touch()
    monkeypatch.setenv("ENV_TEST_PIDS", str(pids))
    with pool_of("Faulty", timeout_s=1.0) as pool:
        pool.ask([reset(0, fault=fault), reset(1)])
        pool.ask([step(0), step(1)])
        started = time.monotonic()
        failed, whole = pool.ask([step(0), step(1)])
        assert time.monotonic() - started < 40  # what hangs does so for 60 s
        assert len(failed["failed"]) < 2000 and "failed" not in whole, failed
        gone, other = pool.ask([step(0), step(1)])
        assert "there is no episode" in gone["failed"] and other["done"], "its process began none"
        (again,) = pool.ask([reset(0)])
        assert "failed" not in again
    for pid in map(int, pids.read_text().split()):
        assert not os.path.exists(f"/proc/{pid}"), "what it had started lives on"


@pytest.mark.parametrize(("env", "asked"), [("Faulty", step(0)), ("Tooled", call("remember", word="x"))])
def test_what_is_asked_of_an_episode_that_did_not_begin_says_so(env, asked):
    with pool_of(env) as pool:
        (before,) = pool.ask([asked])
        pool.ask([reset(0)])
        assert "failed" not in pool.ask([asked])[0]
    assert "there is no episode: none was begun, or it was lost" in before["failed"]


def test_what_is_larger_than_anybody_reads_is_no_answer():
    with pool_of("Large") as pool:
        pool.ask([reset(0)])
        (answer,) = pool.ask([step(0)])
    assert "2,097,152 characters" in answer["failed"]


def test_a_tool_that_raises_says_so_to_the_model_and_one_that_ends_its_process_costs_one_episode():
    with pool_of(tools=["calc,slow_calc,broken,crash"]) as pool:
        asked = [
            call("calc", a=3),
            call("slow_calc", 1, a=3),
            call("broken", 2, a=3),
            call("crash", 3, a=3),
            call("calc", 4, a=1, b=1),
        ]
        added, slow, broken, crashed, after = pool.ask(asked)
        assert (added["text"], slow["text"], after["text"]) == ("5", "4", "2")
        assert broken == broken | {"text": "error: RuntimeError: no 3", "error": True}
        assert "exit status 3" in crashed["failed"]
        wrong, unknown = pool.ask([call("calc", b=3), call("clac")])
        assert wrong["error"] and "missing 1 required" in wrong["text"]
        assert unknown["error"] and "there are calc, slow_calc, broken, crash" in unknown["text"]


def test_half_a_character_is_written_as_a_question_mark():
    with pool_of(None, ("half",)) as pool:
        said, failed = pool.ask([call("half", a=0), call("half", a=1)])
    assert (said["text"], failed["text"]) == ("?", "error: ValueError: ?")


@pytest.mark.parametrize("pay", [float("nan"), float("inf"), "much"])
def test_what_is_no_reward_costs_its_episode(pay):
    with pool_of("Pays") as pool:
        pool.ask([reset(0, pay=pay), reset(1, pay=True)])
        failed, paid = pool.ask([step(0), step(1)])
    assert str(pay) in failed["failed"] and paid["reward"] == 1.0


def test_an_environment_offers_its_own_tools_and_keeps_what_they_did():
    with pool_of("Tooled", tools=["calc"]) as pool:
        assert [tool["function"]["name"] for tool in pool.tools] == ["remember", "calc"]
        assert pool.tools[0]["function"]["parameters"]["properties"]["word"]["description"] == "the word to keep, whole"
        assert not pool.steps
        pool.ask([reset(0), reset(1)])
        answers = pool.ask(
            [
                call("remember", 0, word="a"),
                call("remember", 0, word="b"),
                call("remember", 1, word="a"),
                call("calc", 1, a=1),
            ]
        )
        assert [answer["text"] for answer in answers] == ["1 kept", "2 kept", "1 kept", "3"]


@pytest.mark.parametrize(
    ("env", "tools", "said"),
    [
        ("Nothing", (), "has no 'Nothing'"),
        ("calc", (), "expected a class"),
        (None, ("clac",), "did you mean 'calc'?"),
        (None, ("undocumented",), "has no docstring"),
        (None, ("untyped",), "'a' has no type"),
        (None, ("calc", "calc"), "two tools are called 'calc'"),
        (None, ("Echo",), "expected a function"),
    ],
)
def test_what_cannot_be_played_with_is_refused_by_name(env, tools, said):
    with pytest.raises(ConfigError, match=said), pool_of(env, tools):
        pass
