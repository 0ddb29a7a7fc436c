"""A server that a keeper owns, here one in this process: how it is reached, what becomes of it, and who gets it next."""

import pytest

from posttrain.distributed.keeper import LocalKeeper
from posttrain.distributed.roles import RoleLostError
from posttrain.errors import EngineGoneError
from posttrain.rollout.http import RefusedError
from posttrain.rollout.vllm import server
from posttrain.rollout.vllm.options import VLLMOptions
from posttrain.rollout.vllm.placed import PlacedServer
from posttrain.rollout.vllm.server import await_ready

OPTIONS = VLLMOptions(model="some/model", stop_token_ids=(2,))
SERVES = """
import json, os, sys
from http.server import BaseHTTPRequestHandler
from socketserver import UnixStreamServer


class Answers(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/die":
            print("ValueError: told to", file=sys.stderr, flush=True)
            os._exit(3)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps([os.getpid(), os.environ["VLLM_API_KEY"]]).encode())

    def log_message(self, *arguments):
        pass

    def address_string(self):
        return "socket"


UnixStreamServer(sys.argv[sys.argv.index("--uds") + 1], Answers).serve_forever()
"""


@pytest.fixture
def placed(tmp_path, monkeypatch):
    """`placed(here)`: a server kept by one keeper, as a trainer on node `here` finds it; the keeper is on 127.0.0.1."""
    (tmp_path / "program_serves.py").write_text(SERVES)
    monkeypatch.setattr(server, "_MODULE", "program_serves")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    keeper = LocalKeeper()

    def find(here="127.0.0.1", look=lambda: keeper):
        found = PlacedServer(look, here, OPTIONS, tmp_path / "log", 5.0, 30.0)
        await_ready(found, 60)
        return found

    find.keeper = keeper
    yield find
    keeper.kill()


def test_it_is_asked_through_its_socket_here_and_with_its_token_from_elsewhere(placed):
    near = placed()
    pid, token = near.client.call("GET", "/")
    assert (near.is_near, near.client.address.host, token) == (True, "", near.client.token)
    near.synced(3)
    far = placed("another-node")
    assert (far.is_near, far.client.address.path, far.client.call("GET", "/")) == (False, "", [pid, token])
    far.client.token = "another"
    with pytest.raises(RefusedError, match="answered 401"):
        far.client.call("GET", "/")


def test_the_next_trainer_gets_it_warm_unless_an_update_was_on_its_way(placed):
    first = placed()
    pid = first.client.call("GET", "/")[0]
    first.synced(2)
    second = placed()
    assert second.client.call("GET", "/")[0] == pid
    second.synced(-1)
    assert placed().client.call("GET", "/")[0] != pid


def test_its_death_is_told_with_the_reason_and_another_start_is_another_server(placed, tmp_path):
    one = placed()
    assert one.ended() == ""
    pid = one.client.call("GET", "/")[0]
    with pytest.raises(EngineGoneError):
        one.client.call("GET", "/die")
    while not (ended := one.ended()):
        pass
    assert ended == f"it ended (exit status 3): ValueError: told to; its log is {tmp_path / 'log'}"
    assert placed().client.call("GET", "/")[0] != pid
    one.close()
    assert one.ended()


def test_a_keeper_that_is_lost_is_waited_for(placed):
    left = [None, None, placed.keeper]

    def look():
        if (found := left.pop(0)) is None:
            raise RoleLostError("no role engine-0 is kept")
        return found

    assert placed(look=look).client.call("GET", "/")
