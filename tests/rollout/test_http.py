"""Calls of a server: what is sent, what comes back, and what a server that dies or hangs means."""

import json
import socket
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler

import pytest

from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.http import Address, Client, RefusedError


class Handler(BaseHTTPRequestHandler):
    """Answers with what it was sent; `wait` seconds later, or not at all."""

    def do_POST(self):
        self.server.seen.append((self.path, self.headers["Authorization"]))
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "null")
        if self.path == "/die":
            self.connection.close()
            return
        if self.path == "/half":
            self.send_response(200)
            self.send_header("Content-Length", "100")
            self.end_headers()
            self.wfile.write(b"{")
            return
        if self.path == "/text":
            self._answer(200, "done", "text/plain")
            return
        if self.path == "/broken":
            self._answer(200, "", "application/json", b"{")
            return
        if self.path == "/no":
            self._answer(403, {"error": {"message": "not\nthis"}})
            return
        wait = body.get("wait", 0) if body else 0
        self.connection.settimeout(wait or 0.001)
        try:
            if not self.connection.recv(1):
                self.server.hung_up.append(body)
                return
        except TimeoutError:
            pass
        self.connection.settimeout(None)
        self._answer(200, body)

    do_GET = do_POST

    def _answer(self, status, value, kind="application/json", data=None):
        data = data or (json.dumps(value) if kind == "application/json" else value).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass

    def address_string(self):
        return "client"


class OnSocket(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True


class OnPort(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True


@pytest.fixture(params=["socket", "port"])
def server(request, tmp_path):
    made = OnSocket(str(tmp_path / "s"), Handler) if request.param == "socket" else OnPort(("127.0.0.1", 0), Handler)
    made.seen, made.hung_up = [], []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


@pytest.fixture
def client(server):
    where = server.server_address
    address = Address(path=where) if isinstance(where, str) else Address(*where)
    return Client(address, "secret", timeout_s=5)


def calls(client, bodies, path="/echo", beat=lambda: None, **options):
    how = {"at_once": 4, "timeout_s": 5.0, "every_s": 0.05} | options
    return client.calls(path, bodies, beat=beat, **how)


def test_what_is_sent_comes_back_and_the_token_goes_with_it(client, server):
    assert client.call("POST", "/echo", {"a": [1, 2.5, "ü"]}) == {"a": [1, 2.5, "ü"]}
    assert client.call("GET", "/echo") is None
    assert server.seen == [("/echo", "Bearer secret")] * 2


def test_an_answer_may_be_text(client):
    assert client.call("POST", "/text", {}) == "done"


def test_an_answer_that_is_no_json_is_said_and_the_server_is_not_taken_for_dead(client):
    with pytest.raises(EngineError, match="answered with what is no JSON") as found:
        client.call("POST", "/broken", {})
    assert not isinstance(found.value, EngineGoneError)


def test_a_large_body_arrives_whole(client):
    body = {"ids": list(range(300_000))}
    assert client.call("POST", "/echo", body) == body


def test_an_error_is_said_in_one_line_with_its_status(client):
    with pytest.raises(RefusedError, match=r"^POST /no: the server at \S+ answered 403: not this$") as found:
        client.call("POST", "/no", {})
    assert found.value.status == 403


@pytest.mark.parametrize("path", ["/die", "/half"])
def test_a_server_that_dies_while_it_answers_is_gone(path, client):
    with pytest.raises(EngineGoneError, match=f"POST {path}: .* hung up"):
        client.call("POST", path, {})


def test_nobody_there_is_gone_too(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = Address(*free.getsockname())
    for address in (nobody, Address(path=str(tmp_path / "none"))):
        with pytest.raises(EngineGoneError, match=r"GET /health: the server at .* cannot be reached"):
            Client(address).call("GET", "/health")


def test_a_call_has_a_deadline(client):
    started = time.monotonic()
    with pytest.raises(EngineGoneError, match=r"did not answer within 0\.3 s"):
        client.call("POST", "/echo", {"wait": 60}, timeout_s=0.3)
    assert time.monotonic() - started < 20


def test_a_server_that_takes_no_more_connections_is_gone_within_the_deadline(tmp_path):
    """As one that was stopped by a signal."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen(0)
        client = Client(Address(path=str(tmp_path / "s")), timeout_s=0.3)
        held = []
        started = time.monotonic()
        for _ in range(4):
            with pytest.raises(EngineGoneError):
                held.append(client.call("GET", "/health"))
        assert time.monotonic() - started < 20


def test_many_calls_come_back_as_they_end(client):
    bodies = [{"n": n, "wait": wait} for n, wait in enumerate([1.0, 0.01, 0.4, 0.01, 0.01])]
    found = list(calls(client, bodies, at_once=5))
    assert [place for place, _ in found][-2:] == [2, 0]
    assert [answer for _, answer in sorted(found)] == bodies


def test_not_more_than_asked_are_under_way(client, server):
    found = calls(client, [{"wait": 0.3}] * 6, at_once=2)
    next(found)
    assert len(server.seen) <= 3
    assert len(list(found)) == 5


def test_who_stops_waiting_hangs_up(client, server):
    found = calls(client, [{"wait": 0.01}, {"wait": 60, "n": 1}, {"wait": 60, "n": 2}])
    next(found)
    found.close()
    deadline = time.monotonic() + 5
    while len(server.hung_up) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(body["n"] for body in server.hung_up) == [1, 2]


def test_while_it_waits_it_looks_whether_the_server_lives(client):
    beats = []

    def beat():
        beats.append(time.monotonic())
        if len(beats) == 3:
            raise EngineGoneError("the heart stands still")

    with pytest.raises(EngineGoneError, match="the heart stands still"):
        list(calls(client, [{"wait": 60}], beat=beat))


def test_a_call_among_many_has_a_deadline_too(client):
    with pytest.raises(EngineGoneError, match=r"did not answer within 0\.2 s"):
        list(calls(client, [{"wait": 60}], timeout_s=0.2))


def test_the_token_is_in_no_message(client):
    with pytest.raises(RefusedError) as found:
        client.call("POST", "/no", {})
    assert "secret" not in str(found.value)
