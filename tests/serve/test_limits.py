"""Who may ask, how much, and what becomes of clients that leave, hang or come too many at once."""

import contextlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from posttrain.errors import ConfigError
from posttrain.serve.options import ServeOptions, read_token
from posttrain.serve.setup import ServedNames

LONG = {"model": "tiny", "prompt": "What", "max_tokens": 500, "seed": 1}
NEVER = {"logit_bias": {"2": -100}}
"""No stop token: an answer goes on until its limit."""


def until(condition, within_s=20.0):
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < within_s
        time.sleep(0.01)


@pytest.fixture(scope="module")
def small(running, folder, tmp_path_factory):
    """A server with few places, little patience, and a token; a step takes as long as a larger model's."""
    options = {"max_num_seqs": 2, "max_queue": 1, "stall_s": 1.5, "max_body_bytes": 20_000, "token": "sesame"}
    with running(ServedNames([str(folder)], tmp_path_factory.mktemp("none"), name="tiny"), **options) as found:
        [entry] = found.service.router._pool._entries.values()
        embedding = entry.loading.result().rows.loop.policy.base.get_input_embeddings()
        embedding.register_forward_pre_hook(lambda module, args: time.sleep(0.004))
        yield found


def http(serving, token="sesame"):
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.Client(base_url=serving.address, headers=headers, timeout=60)


def is_idle(serving):
    [loop] = [e.loading.result().rows.loop for e in serving.service.router._pool._entries.values()]
    return (serving.service.num_open, loop.num_running, loop.num_waiting) == (0, 0, 0)


def num_left(serving):
    line = 'posttrain_serve_requests_total{endpoint="completions",status="499"}'
    page = http(serving).get("/metrics").text.splitlines()
    return next((float(row.rsplit(" ", 1)[1]) for row in page if row.startswith(line)), 0.0)


def test_a_token_is_wanted_everywhere_but_for_health(small):
    for token in ("", "open", "sesamf", "sesame "[:5], "é"):
        for path in ("/v1/models", "/metrics"):
            headers = {"authorization": f"Bearer {token}".encode()} if token else {}
            answer = httpx.get(small.address + path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert httpx.get(small.address + "/health").status_code == 200
    assert http(small).get("/v1/models").status_code == 200


def test_a_server_for_other_machines_needs_a_token():
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(ConfigError, match="--token-file"):
            ServeOptions(host=host).check()
        ServeOptions(host=host, token="x").check()
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.7"):
        ServeOptions(host=host).check()


def test_a_token_comes_from_its_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_SERVE_TOKEN", "from-env")
    assert read_token(None) == "from-env"
    (tmp_path / "token").write_text("from-file\n")
    assert read_token(tmp_path / "token") == "from-file"
    for text in ("", "two words"):
        (tmp_path / "token").write_text(text)
        with pytest.raises(ConfigError, match="expected one word"):
            read_token(tmp_path / "token")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(tmp_path / "none")


def test_without_a_token_a_page_under_another_name_gets_nothing(serving):
    port = serving.address.rsplit(":", 1)[1]
    for host, status in (
        ("evil.example", 403),
        ("evil.example:80", 403),
        (f"localhost:{port}", 200),
        ("127.0.0.1", 200),
        ("localhost:1@evil.example", 403),
    ):
        assert httpx.get(serving.address + "/v1/models", headers={"host": host}).status_code == status
    assert httpx.get(serving.address + "/v1/models", headers={"host": f"[::1]:{port}"}).status_code == 200


def test_a_body_that_is_too_large_is_refused_before_it_is_read(small):
    for content in (b"x" * 30_000, iter([b"x" * 9_000] * 4)):
        answer = http(small).post("/v1/completions", content=content, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_that_does_not_come_is_not_waited_for(small):
    host, port = small.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert b" 408 " in connection.recv(1000).split(b"\r\n")[0]


def test_a_body_that_comes_byte_by_byte_is_not_waited_for(small):
    host, port = small.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"
            b"Content-Length: 10000\r\n\r\n"
        )
        connection.settimeout(small.service.options.stall_s / 4)
        begun, said = time.monotonic(), b""
        while not said and time.monotonic() - begun < 10 * small.service.options.stall_s:
            connection.sendall(b" ")
            with contextlib.suppress(TimeoutError):
                said = connection.recv(1000)
        assert b" 408 " in said.split(b"\r\n")[0]


HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n"


def connect(serving, timeout_s=10):
    host, port = serving.address.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=timeout_s)


@pytest.mark.parametrize("first", [b"", HEALTH + b"\r\n"], ids=["new", "kept"])
def test_headers_that_come_byte_by_byte_are_not_waited_for(small, first):
    stall_s = small.service.options.stall_s
    with connect(small, stall_s / 8) as connection:
        connection.sendall(first)
        assert not first or b" 200 " in connection.recv(1000)
        begun, is_open = time.monotonic(), True
        while is_open and time.monotonic() - begun < 10 * stall_s:
            with contextlib.suppress(TimeoutError):
                try:
                    connection.sendall(b"G")
                    is_open = connection.recv(1000) != b""
                except (ConnectionResetError, BrokenPipeError):
                    is_open = False
        assert not is_open and time.monotonic() - begun > stall_s / 2


def test_a_connection_that_says_nothing_is_closed(small):
    with connect(small) as connection:
        assert connection.recv(1000) == b""


def test_headers_without_end_are_refused(small):
    with connect(small) as connection:
        connection.sendall(HEALTH + b"X: " + b"x" * (1 << 17))
        assert b" 400 " in connection.recv(1000)


def test_who_is_one_connection_too_many_is_told_so_until_another_closes(running, folder, tmp_path):
    with running(ServedNames([str(folder)], tmp_path, name="tiny"), max_connections=2) as serving:
        with connect(serving), connect(serving):
            answer = httpx.get(serving.address + "/health")
            assert (answer.status_code, answer.json()["error"]["code"]) == (429, "too_many_connections")
            assert (answer.headers["retry-after"], answer.headers["connection"]) == ("1", "close")
            with connect(serving, 5) as silent:
                assert silent.recv(1000) == b"", "it does not hold its place for the patience of the others"
        until(lambda: httpx.get(serving.address + "/health").status_code == 200)


def test_too_many_at_once_are_told_when_to_come_back_and_the_others_are_answered(small):
    with http(small) as client:
        ask = lambda n: client.post("/v1/completions", json={**LONG, **NEVER, "max_tokens": 200, "seed": n})  # noqa: E731
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(ask, range(8)))
        refused = [answer for answer in answers if answer.status_code == 429]
        assert {answer.status_code for answer in answers} == {200, 429} and 1 <= len(refused) <= 5
        for answer in refused:
            assert 1 <= int(answer.headers["retry-after"]) <= 60
            assert answer.json()["error"]["type"] == "rate_limit_error"
        assert client.post("/v1/completions", json={**LONG, "n": 4}).status_code == 400
    until(lambda: is_idle(small))


def test_a_body_that_is_not_sent_as_json_is_told_so(small):
    answer = http(small).post("/v1/completions", content=json.dumps(LONG), headers={"content-type": "text/plain"})
    assert answer.status_code == 400
    assert "send one with the header Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_client_that_leaves_frees_its_rows(small):
    with http(small) as client:
        with client.stream("POST", "/v1/completions", json={**LONG, **NEVER, "n": 3, "stream": True}) as answer:
            lines = answer.iter_lines()  # closed with its last reference, and the connection with it
            next(lines)
            assert small.service.num_open == 3
        until(lambda: is_idle(small))
        with pytest.raises(httpx.TimeoutException):
            client.post("/v1/completions", json={**LONG, **NEVER, "n": 3}, timeout=0.1)
    until(lambda: is_idle(small))
    assert http(small).post("/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200


def test_a_client_that_takes_nothing_frees_its_rows(small):
    host, port = small.address.removeprefix("http://").split(":")
    left = num_left(small)
    body = json.dumps({**LONG, **NEVER, "n": 3, "stream": True, "logprobs": 20}).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\nContent-Type: application/json\r\n"
            b"Content-Length: " + str(len(body)).encode() + b"\r\n\r\n" + body
        )
        until(lambda: small.service.num_open == 3)
        until(lambda: is_idle(small))
        until(lambda: num_left(small) == left + 1)


def test_a_step_that_fails_is_told_and_the_next_request_is_answered(running, folder, tmp_path, make_client):
    with running(ServedNames([str(folder)], tmp_path, name="tiny")) as serving:
        client = make_client(serving)
        [entry] = serving.service.router._pool._entries.values()
        embedding = entry.loading.result().rows.loop.policy.base.get_input_embeddings()

        def fail(module, args):
            hook.remove()
            raise RuntimeError("out of memory, say")

        hook = embedding.register_forward_pre_hook(fail)
        with pytest.raises(openai.APIStatusError, match="out of memory, say; ask again") as caught:
            client.completions.create(model="tiny", prompt="What", max_tokens=3)
        assert caught.value.status_code == 503
        assert client.completions.create(model="tiny", prompt="What", max_tokens=3).choices[0].finish_reason


def test_a_stopping_server_answers_what_it_let_in_and_lets_in_nobody(running, folder, tmp_path, make_client):
    with running(ServedNames([str(folder)], tmp_path, name="tiny")) as serving:
        client, found = make_client(serving), []
        asking = threading.Thread(
            target=lambda: found.append(client.completions.create(**LONG, logit_bias={"2": -100}))
        )
        asking.start()
        until(lambda: serving.service.num_open == 1)
        serving.stop()
        until(lambda: serving.service.is_draining)
        refused = httpx.post(serving.address + "/v1/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert httpx.get(serving.address + "/health").status_code == 503
        asking.join(60)
    assert found[0].usage.completion_tokens == 500


def test_answers_that_the_drain_does_not_wait_for_are_told_so(running, folder, tmp_path, make_client):
    with running(ServedNames([str(folder)], tmp_path, name="tiny"), drain_s=0.05) as serving:
        client = make_client(serving)
        stream = client.completions.create(**LONG, logit_bias={"2": -100}, stream=True)
        next(stream)
        serving.stop()
        with pytest.raises(openai.APIError, match="the server is shutting down"):
            for _ in stream:
                pass
