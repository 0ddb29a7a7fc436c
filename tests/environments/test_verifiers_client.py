"""Environments of the package verifiers, in its own Python: single turns, turns of a `run` and tools; lost where they break.

`make setup-verifiers` installs it; without it these tests are skipped.
"""

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.cli.data_env import env as write_rows
from posttrain.environments.hosted import EpisodeLostError
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.spec import EnvironmentSpec, program
from posttrain.environments.verifiers_client import VerifiersServer, VerifiersSession
from posttrain.errors import ConfigError
from posttrain.evals.suite import load_suite

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-verifiers" / "bin" / "python"
needs_verifiers = pytest.mark.skipif(not PYTHON.is_file(), reason="needs make setup-verifiers")


def spec_of(name, options=""):
    return f"verifiers:{PYTHON} {HERE / 'verifiers_envs' / name}.py {options}"


def reset(place, task, content="Guess a number from 0 to 9.", system=None):
    prompt = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": content}]
    return place, {"do": "reset", "prompt": prompt, "seed": 7, "columns": {"task": task}}


def turn(place, text, *calls, is_last=False, is_cut=False):
    named = [{"id": f"call{n:05}", "name": name, "arguments": given} for n, (name, given) in enumerate(calls)]
    return place, {"do": "turn", "text": text, "calls": named, "is_last": is_last, "is_cut": is_cut}


def shown(answer):
    return [(message["role"], message["content"]) for message in answer["messages"]]


@pytest.fixture(scope="module")
def guessing():
    with EnvironmentPool(EnvironmentSpec(spec_of("guess_env")), 30.0, 1) as pool:
        yield pool


@needs_verifiers
def test_an_environment_answers_each_turn_until_it_ends_the_episode_and_pays(guessing):
    assert (guessing.tools, guessing.takes_turns) == ((), True)
    begun = guessing.ask([reset(0, 4), reset(1, 8)])
    assert all("failed" not in answer for answer in begun)
    first, second = guessing.ask([turn(0, "5"), turn(1, "8")])
    assert shown(first) == [("user", "lower")] and not first["done"] and first["reward"] is None
    assert second["done"] and not second["was_cut"]
    assert (second["reward"], second["metrics"]) == (1.0, {"found": 1.0, "tries": 1.0})
    (last,) = guessing.ask([turn(0, "4")])
    assert last["done"] and last["metrics"] == {"found": 1.0, "tries": 2.0}


@needs_verifiers
def test_what_the_budget_ends_is_scored_as_it_is(guessing):
    guessing.ask([reset(0, 4), reset(1, 4)])
    guessing.ask([turn(1, "5")])
    last, cut = guessing.ask([turn(0, "5", is_last=True), (1, {"do": "cut"})])
    for answer in (last, cut):
        assert answer["done"] and answer["was_cut"]
        assert answer["reward"] == 0.0 and answer["metrics"]["tries"] == 1.0


@needs_verifiers
def test_one_that_breaks_costs_its_episode_and_no_other(guessing):
    guessing.ask([reset(place, 3) for place in range(4)])
    answers = guessing.ask([turn(0, "raise"), turn(1, "crash"), turn(2, "flood"), turn(3, "3")])
    assert "no such guess" in answers[0]["failed"]
    assert "its process ended" in answers[1]["failed"]
    assert "2,000,000 characters" in answers[2]["failed"]
    assert answers[3]["reward"] == 1.0
    assert all("failed" not in answer for answer in guessing.ask([reset(place, 3) for place in range(4)]))


@needs_verifiers
def test_what_breaks_in_a_turn_that_many_play_is_lost_alone(guessing):
    begun = guessing.ask([reset(place, place) for place in range(12)])
    assert all("failed" not in answer for answer in begun)
    said = [{1: "crash", 5: "flood", 9: "raise"}.get(place, str(place % 10)) for place in range(12)]
    answers = guessing.ask([turn(place, text) for place, text in enumerate(said)])
    assert [place for place, answer in enumerate(answers) if "failed" in answer] == [1, 5, 9]
    assert all(answer["reward"] == 1.0 for answer in answers if "failed" not in answer)
    assert all("failed" not in answer for answer in guessing.ask([reset(1, 3), reset(5, 3)]))


@needs_verifiers
@pytest.mark.slow
def test_many_that_hang_end_together_at_their_deadline():
    with EnvironmentPool(EnvironmentSpec(spec_of("guess_env")), 90.0, 1) as pool:
        assert all("failed" not in answer for answer in pool.ask([reset(place, 3) for place in range(16)]))
        began = time.monotonic()
        answers = pool.ask([turn(place, "3" if place % 2 else "hang") for place in range(16)])
        assert time.monotonic() - began < 8 * 90  # one after the other they would take that long
        for place, answer in enumerate(answers):
            assert answer.get("reward") == 1.0 if place % 2 else "took longer than 90 s" in answer["failed"], (
                place,
                answer,
            )


@needs_verifiers
@pytest.mark.slow
def test_one_that_hangs_ends_at_its_deadline_with_all_that_it_started():
    with EnvironmentPool(EnvironmentSpec(spec_of("guess_env")), 20.0, 1) as pool:
        pool.ask([reset(0, 3), reset(1, 3)])
        hung, fine = pool.ask([turn(0, "hang"), turn(1, "3")])
        assert "took longer than 20 s" in hung["failed"] and fine["reward"] == 1.0
        deadline = time.monotonic() + 20
        while (there := _running("sleep 4242")) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not there


def _running(command):
    return subprocess.run(["pgrep", "-fx", command], capture_output=True, check=False).stdout


@needs_verifiers
def test_a_row_must_be_the_environments(guessing):
    prompt = {"prompt": [{"role": "user", "content": "Guess."}], "seed": 7}
    other, none, far = guessing.ask(
        [reset(0, 4, "Guess."), (1, {"do": "reset", **prompt, "columns": {}}), reset(2, -1)]
    )
    assert "which is not the row's prompt" in other["failed"] and "posttrain data env" in other["failed"]
    assert "no column 'task'" in none["failed"]
    assert "names task -1" in far["failed"]


@needs_verifiers
@pytest.mark.slow
def test_rows_are_written_of_a_taskset_with_options(tmp_path, capsys):
    write_rows(spec_of("echo_env", "--env.taskset.count 2"), tmp_path / "rows.jsonl", 10)
    assert capsys.readouterr().out.startswith("wrote 2 rows")
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows[1] == {
        "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Say 1"}],
        "task": 1,
    }
    write_rows(spec_of("echo_env", "--env.taskset.count 2"), tmp_path / "suite.jsonl", 10, suite=True)
    items = load_suite("echo", tmp_path / "suite.jsonl").items
    assert [(item.id, item.scorer, item.columns) for item in items] == [
        (str(n), "environment", {"task": n}) for n in range(2)
    ]
    with EnvironmentPool(EnvironmentSpec(spec_of("echo_env")), 30.0, 1) as pool:
        pool.ask([reset(0, 1, "Say 1", "Be short.")])
        (answer,) = pool.ask([turn(0, "1")])
    assert (answer["reward"], answer["metrics"]) == (2.0, {"exact": 1.0, "length": 1.0})


@needs_verifiers
@pytest.mark.slow
def test_a_tool_is_called_as_verifiers_calls_it():
    with EnvironmentPool(EnvironmentSpec(spec_of("shop_env")), 60.0, 1) as pool:
        assert [tool["function"]["name"] for tool in pool.tools] == ["shop_price"]
        pool.ask([reset(0, 1, "What is the price of one pear?")])
        (answer,) = pool.ask([turn(0, "", ("shop_price", '{"item": "pear"}'), ("nothing", "{}"))])
        assert shown(answer) == [("tool", "12"), ("tool", "error: unknown tool 'nothing'")]
        assert [message["tool_call_id"] for message in answer["messages"]] == ["call00000", "call00001"]
        (last,) = pool.ask([turn(0, "It is 12.")])
        assert last["reward"] == 1.0


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("verifiers:", "expected verifiers:PYTHON ID"),
        ("verifiers:gsm8k-v1", "expected verifiers:PYTHON ID"),
        ("verifiers:'", "is no command line"),
        ("verifiers:no/such/python gsm8k-v1", "does not exist"),
        (f"verifiers:{HERE} gsm8k-v1", "is no program"),
        (f"verifiers:{sys.executable} none.py", "no file none.py"),
    ],
)
def test_a_wrong_spec_is_said_without_starting_anything(spec, expected):
    with pytest.raises(ConfigError, match=expected):
        EnvironmentSpec(spec).check()


def test_one_that_never_answers_is_waited_for_until_the_deadline(tmp_path):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "socket"))
        listening.listen()
        with pytest.raises(EpisodeLostError, match="timed out"):
            VerifiersSession(str(tmp_path / "socket"), 0.2).ask({"do": "describe"})


def test_a_python_without_verifiers_is_named_with_what_to_install():
    with pytest.raises(ConfigError, match=r"has no package verifiers; install it there with: .*pip install verifiers"):
        VerifiersServer(program(f"verifiers:{sys.executable} {HERE / 'verifiers_envs' / 'echo_env.py'}"))


@needs_verifiers
@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (f"verifiers:{PYTHON} no-such-env", "taskset 'no-such-env' not found"),
        (spec_of("echo_env", "--env.taskset.coun 2"), "coun"),
        (spec_of("echo_env", "count=2"), "expected --env.KEY VALUE"),
    ],
)
def test_a_wrong_environment_or_option_is_one_line(spec, expected):
    with pytest.raises(ConfigError, match=expected) as caught:
        EnvironmentPool(EnvironmentSpec(spec), 30.0, 1).open()
    assert "\n" not in str(caught.value)
