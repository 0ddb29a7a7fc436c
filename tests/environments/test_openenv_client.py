"""Environments of an OpenEnv server: acted in by text, by fields and by tools, and lost with the server's words.

`make setup-envs` installs openenv-core in an environment of its own; without it these tests play with a small server that speaks its protocol.
"""

import contextlib
import socket
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.environments.openenv_client import connect_openenv
from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.spec import EnvironmentSpec
from posttrain.errors import ConfigError

HERE = Path(__file__).parent
REAL = HERE.parents[1] / ".venv-envs" / "bin" / "python"
SERVERS = {
    "openenv-core": (
        [str(REAL), str(HERE / "openenv_server.py")],
        REAL.is_file(),
        "openenv-core needs make setup-envs",
    ),
    "protocol": (
        [sys.executable, str(HERE / "openenv_protocol.py")],
        all(map(find_spec, ("fastapi", "uvicorn"))),
        "the server needs posttrain[serve]",
    ),
}
pytestmark = pytest.mark.skipif(find_spec("websockets") is None, reason="the sessions need posttrain[openenv]")


@pytest.fixture(params=SERVERS, scope="module")
def serve(request):
    """The address of a server of a kind of environment; started once for each `sessions`, which no two tests need to share."""
    command, is_there, reason = SERVERS[request.param]
    if not is_there:
        pytest.skip(reason)
    started = {}
    with contextlib.ExitStack() as stack:

        def address(kind, sessions=4):
            if (kind, sessions) not in started:
                process = stack.enter_context(
                    subprocess.Popen([*command, kind, str(sessions)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                )
                stack.callback(process.kill)
                assert process.stdout is not None
                started[kind, sessions] = int(process.stdout.readline())
            return f"openenv:http://127.0.0.1:{started[kind, sessions]}"

        yield address


def reset(place, prompt: object = "Guess a digit.", seed=7, **columns):
    return place, {"do": "reset", "prompt": prompt, "seed": seed, "columns": columns}


def step(place, answer):
    return place, {"do": "step", "answer": answer}


def call(place, name, **arguments):
    return place, {"do": "call", "name": name, "arguments": arguments}


def pool_of(address, timeout_s=20.0):
    return EnvironmentPool(EnvironmentSpec(address), timeout_s, num_workers=1)


def test_each_episode_has_a_session_of_its_own_and_is_answered_by_text(serve):
    chat = [{"role": "user", "content": "Guess a digit."}]
    with pool_of(serve("guess")) as pool:
        assert (pool.tools, pool.steps, pool.calls_pay) == ((), True, False)
        assert not any(answer.get("failed") for answer in pool.ask([reset(0), reset(1, chat, 3), reset(2, seed=1)]))
        low, right, high = pool.ask([step(0, "3"), step(1, "3"), step(2, "3")])
        assert (low["text"], low["reward"], low["done"]) == ("more", -0.25, False)
        assert (right["text"], right["reward"], right["done"]) == ("yes", 1.0, True)
        assert high["text"] == "less"
        pool.ask([reset(1, seed=4)])
        (again,) = pool.ask([step(1, "3")])
    assert again["text"] == "more"


def test_a_turn_that_the_server_rejects_is_told_why_and_the_episode_goes_on(serve):
    with pool_of(serve("guess")) as pool:
        pool.ask([reset(0)])
        wrong, right = pool.ask([step(0, "7" * 21)]) + pool.ask([step(0, "7")])
    assert wrong["text"] == "error: message: String should have at most 20 characters"
    assert (wrong["reward"], wrong["done"], right["done"]) == (None, False, True)


def test_a_rows_seed_is_the_environments(serve):
    with pool_of(serve("guess")) as pool:
        pool.ask([(0, {"do": "reset", "prompt": "Guess a digit.", "seed": 7, "columns": {"seed": 3}})])
        (right,) = pool.ask([step(0, "3")])
    assert right["done"]


def test_an_action_of_several_fields_is_a_tool_whose_calls_pay_and_end_the_episode(serve):
    with pool_of(serve("walk")) as pool:
        (tool,) = pool.tools
        assert tool["function"]["name"] == "act" and tool["function"]["parameters"]["required"] == ["dx"]
        assert (pool.steps, pool.calls_pay) == (False, True)
        pool.ask([reset(0, 'You stand at {"x": 0, "y": 0}.')])
        asked = [call(0, "act", dx="far"), call(0, "act", dx=1, dy=5), call(0, "act", dx=1), call(0, "act", dx=1)]
        wrong, first, last, over = pool.ask(asked)
    assert wrong["error"] and "dx" in wrong["text"]
    assert (first["text"], first["reward"], first["done"]) == ('{"x": 1, "y": 5}', 1.0, False)
    assert last["done"]
    assert over["error"] and over["text"] == "error: the episode is over"


def test_an_environments_own_tools_are_listed_and_called(serve):
    with pool_of(serve("desk")) as pool:
        assert [tool["function"]["name"] for tool in pool.tools] == ["add"]
        pool.ask([reset(0, "")])
        added, missing = pool.ask([call(0, "add", a=40, b=2), call(0, "add", a=40)])
    assert added["text"] == "42" and not added["error"]
    assert missing["error"] and missing["text"].startswith("error: ")


def test_what_the_server_shows_and_the_prompt_does_not_costs_the_episode(serve):
    with pool_of(serve("guess")) as pool:
        hidden, shown = pool.ask([reset(0, "Say something."), reset(1)])
    assert "shows 'Guess a digit.', which the row's prompt does not hold" in hidden["failed"]
    assert "failed" not in shown


def test_an_error_of_the_environment_and_a_server_that_is_full_cost_the_episode(serve):
    with pool_of(serve("guess", sessions=1)) as pool:
        pool.ask([reset(0)])
        (full,) = pool.ask([reset(1)])
        (raised,) = pool.ask([step(0, "a word")])
    assert "CAPACITY_REACHED" in full["failed"]
    assert "invalid literal" in raised["failed"]


def test_a_server_that_dies_costs_its_episodes(serve):
    with pool_of(serve("guess", sessions=2)) as pool:
        pool.ask([reset(0)])
        (dead,) = pool.ask([step(0, "die")])
    assert "the server closed the session at step" in dead["failed"]


def test_a_server_that_floods_costs_the_episode_in_which_it_does(serve):
    with pool_of(serve("guess", sessions=12)) as pool:
        pool.ask([reset(place, seed=3) for place in range(12)])
        answers = pool.ask([step(place, "flood" if place == 5 else "3") for place in range(12)])
        assert "2,000,000 characters" in answers[5].pop("failed")
        assert all(answer["done"] for place, answer in enumerate(answers) if place != 5)
        (again,) = pool.ask([reset(5, seed=3)])
    assert "failed" not in again


@pytest.mark.slow
def test_a_session_that_hangs_costs_its_episode_at_the_deadline(serve):
    with pool_of(serve("guess", sessions=8), timeout_s=4.0) as pool:
        pool.ask([reset(place, seed=3) for place in range(6)])
        answers = pool.ask([step(place, "hang" if place == 2 else "3") for place in range(6)])
        assert "took longer than 4 s" in answers[2]["failed"]
        assert all(answer["done"] for place, answer in enumerate(answers) if place != 2)
        (again,) = pool.ask([reset(2, seed=3)])
    assert "failed" not in again


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("openenv:127.0.0.1:8000", "expected openenv:URL"),
        ("openenv:http://[::1", "expected openenv:URL"),
        ("openenv:http://127.0.0.1:port", "expected openenv:URL"),
        ("openenv:http://127.0.0.1:9", "expected a running server of OpenEnv"),
    ],
)
def test_an_address_without_a_server_is_refused(address, said):
    with pytest.raises(ConfigError, match=said), pool_of(address):
        pass


@pytest.mark.parametrize(
    "answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b'HTTP/1.0 200 OK\r\n\r\n{"action": {"properties": []}}']
)
def test_a_server_of_something_else_is_refused_in_a_line(answer):
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve_one():
            connection, _ = listening.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(answer)

        server = threading.Thread(target=serve_one, daemon=True)
        server.start()
        with pytest.raises(ConfigError, match="expected a running server of OpenEnv"):
            connect_openenv(f"http://127.0.0.1:{listening.getsockname()[1]}")
        server.join()
