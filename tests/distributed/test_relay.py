"""The port of a server's Unix socket: who has the token gets through, on every path, and nobody else."""

import http.client
import socket
import threading
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingUnixStreamServer

import pytest

from posttrain.distributed.relay import Relay


class _Answering(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body[::-1])

    def log_message(self, *arguments):
        pass

    def address_string(self):
        return "socket"


@pytest.fixture
def relay(tmp_path):
    """A relay with the token `good`, and what the server behind it was asked."""
    server = ThreadingUnixStreamServer(str(tmp_path / "socket"), _Answering)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    found = Relay("127.0.0.1", tmp_path / "socket", "good")
    yield found, server.seen
    found.close()
    server.shutdown()
    server.server_close()


def asked(relay, body=b"abc", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", relay.port, timeout=10)
    connection.request("POST", "/pause", body, headers)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_who_has_the_token_gets_through_with_as_much_as_there_is(relay):
    body = bytes(range(256)) * (1 << 14)
    assert asked(relay[0], body, Authorization="Bearer good") == (200, body[::-1])


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer bad"}, {"Authorization": "good"}, {"X": "Authorization: Bearer good"}]
)
def test_nobody_else_reaches_any_path(relay, headers):
    assert asked(relay[0], **headers)[0] == 401
    assert relay[1] == []


def test_two_tokens_or_no_whole_head_are_refused(relay):
    for request in (
        b"POST / HTTP/1.1\r\nAuthorization: Bearer good\r\nAuthorization: Bearer bad\r\n\r\n",
        b"POST / HTTP/1.1\r\nAuthorization: Bearer good",
    ):
        with socket.create_connection(("127.0.0.1", relay[0].port), 10) as connection:
            connection.sendall(request)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1 << 10).startswith(b"HTTP/1.1 401 ")
    assert relay[1] == []


def test_a_closed_relay_takes_nobody(relay):
    relay[0].close()
    with pytest.raises(ConnectionRefusedError):
        asked(relay[0], Authorization="Bearer good")
