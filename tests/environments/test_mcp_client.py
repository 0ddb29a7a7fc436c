"""The tools of an MCP server: listed, called, and cut off where they hang."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from posttrain.environments.pool import EnvironmentPool
from posttrain.environments.spec import EnvironmentSpec
from posttrain.errors import ConfigError

SERVER = Path(__file__).with_name("mcp_server.py")
needs_mcp = pytest.mark.skipif(find_spec("mcp") is None, reason="the protocol needs posttrain[mcp]")


def call(name, place=0, **arguments):
    return place, {"do": "call", "name": name, "arguments": arguments}


@needs_mcp
def test_a_servers_tools_are_called_and_one_that_hangs_costs_its_episode():
    spec = EnvironmentSpec(None, (f"mcp:{sys.executable} {SERVER}",))
    with EnvironmentPool(spec, timeout_s=5.0, num_workers=1) as pool:
        assert [tool["function"]["name"] for tool in pool.tools] == ["add", "fail", "hang", "crash", "flood"]
        assert pool.tools[0]["function"]["parameters"]["required"] == ["a", "b"]
        added, failed, hung, again = pool.ask(
            [call("add", a=40, b=2), call("fail"), call("hang"), call("add", a=1, b=1)]
        )
    assert added["text"] == "42" and again["text"] == "2"
    assert failed["error"] and "no luck" in failed["text"]
    assert "took longer than 5 s" in hung["failed"]


@needs_mcp
@pytest.mark.parametrize("workers", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_server_that_crashes_or_floods_costs_the_episode_in_which_it_does(workers):
    spec = EnvironmentSpec(None, (f"mcp:{sys.executable} {SERVER}",))
    with EnvironmentPool(spec, timeout_s=10.0, num_workers=workers) as pool:
        said = ["add", "crash", "add", "flood", "add", "add"] if workers == 1 else ["add", "crash", "flood"] * 8
        asked = [
            call(name, place, **({"a": place, "b": 1} if name == "add" else {})) for place, name in enumerate(said)
        ]
        answers = pool.ask(asked)
    for place, (name, answer) in enumerate(zip(said, answers, strict=True)):
        if name == "add":
            assert answer.get("text") == str(place + 1), answer
        else:
            assert ("ended" if name == "crash" else "2,000,000 characters") in answer["failed"], (name, answer)


@needs_mcp
def test_a_command_that_is_no_server_is_refused_with_its_words():
    spec = EnvironmentSpec(None, (f"mcp:{sys.executable} -c pass",))
    with pytest.raises(ConfigError, match="did not start as an MCP server"), EnvironmentPool(spec, 5.0, 1):
        pass
