"""A judge's server that is silent, slow, broken or hostile, and a cache that is: each costs its verdicts, and none says anything untrue."""

import contextlib
import json
import socket
import threading

import pytest
import yaml

from posttrain.errors import ConfigError, RewardError
from posttrain.recipes.measure.learned import load_learned
from posttrain.rewards.workers import RewardPool


@contextlib.contextmanager
def answering(*raw):
    """A server that says these bytes to each connection and hangs up; None holds it open. Yields its URL."""
    server = socket.create_server(("127.0.0.1", 0))
    held = []

    def serve():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            head = connection.recv(1 << 16)
            while b"\r\n\r\n" not in head or not head.partition(b"\r\n\r\n")[2]:
                head += connection.recv(1 << 16)
            held.append(connection)
            for part in raw:
                if part is None:
                    break
                with contextlib.suppress(OSError):
                    connection.sendall(part)
            else:
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        server.close()
        for connection in held:
            connection.close()


def http(body, status="200 OK", length=None):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    size = len(content) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n".encode() + content


def says(content, **more):
    return http({"choices": [{"message": {"content": content}}], **more})


@pytest.fixture
def judge(tmp_path):
    def write(url, **keys):
        path = tmp_path / "rubric.yaml"
        path.write_text(yaml.safe_dump({"model": "m", "url": url, "cache": "./kept", "retries": 0, **keys}))
        return f"judge:{path}"

    return write


def scored(spec, said):
    with RewardPool([spec], load=load_learned) as pool:
        return pool.score(["Say please."] * len(said), said, {})


@pytest.mark.parametrize(
    "raw",
    [
        b"\x16\x03\x01 no HTTP at all\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: 1\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        http(b"{", length=1000),
        http(b"[" * 200_000),
        http(b"\xff\xfe\x00"),
        http([]),
        http({"choices": []}),
        says(["Verdict: 9"]),
        says({"text": "Verdict: 9"}),
        says("Verdict: 9", usage={"total_tokens": "many"}),
        says("Verdict: 9", usage={"total_tokens": 10**400}),
        says("Verdict: 9", usage={"total_tokens": -7}),
        http(b'{"choices":[{"message":{"content":"Verdict: 9"}}],"usage":{"total_tokens":1e999}}'),
        http(b"no", "500 Oh", length=1000),
        http(b"", "302 Found\r\nLocation: http://127.0.0.1:9/"),
    ],
)
def test_an_answer_that_is_none_leaves_its_completion_unscored(raw, judge):
    with answering(raw) as url:
        (found,) = scored(judge(url), ["please"])
    assert found.total is None and f"the judge at {url}" in found.error
    assert found.counts["rubric/failed"] == 1


@pytest.mark.parametrize("usage", [{"total_tokens": None}, None])
def test_a_server_that_counts_no_tokens_judges(usage, judge):
    with answering(says("Verdict: 9", usage=usage)) as url:
        assert scored(judge(url), ["please"])[0].total == pytest.approx(0.9)


def test_an_answer_that_does_not_end_is_late(judge):
    with answering(http(b" " * 1_000_000, length=10**9), None) as url:
        assert "timed out" in scored(judge(url, timeout_s=0.3), ["please"])[0].error
    with answering(b"HTTP/1.1 200 OK\r\n\r\n", *[b" " * (1 << 20)] * 20) as url:
        assert "bytes" in scored(judge(url), ["please"])[0].error


def test_where_nobody_answers_the_rest_is_not_waited_for(judge):
    with answering(None) as url, pytest.raises(RewardError, match=r"8 questions and no answer yet: .* timed out"):
        scored(judge(url, timeout_s=0.3, at_once=4), [f"please {n}" for n in range(10_000)])


def test_where_the_server_dies_half_way_one_wait_leaves_the_rest_unscored(judge, judging):
    """What was answered is kept, and what was not asked is asked when it is there again."""
    dead, over = threading.Event(), threading.Event()

    def rule(question, body):
        if dead.is_set():
            over.wait(30)
        if "please 20" in question:
            dead.set()
        return "Verdict: 8"

    said = [f"please {n}." for n in range(200)]
    with judging(rule) as (url, _):
        found = scored(judge(url, timeout_s=1.0, at_once=8), said)
        over.set()
    assert 0.8 in [one.total for one in found[:20]]
    lost = [one for one in found if one.total is None]
    assert len(lost) > 150 and all(one.counts["rubric/failed"] == 1 for one in lost)
    assert "not asked, for the last 8 had no answer: the judge at" in found[-1].error


def test_a_key_is_not_repeated_whatever_the_server_or_the_key_holds(judge, monkeypatch, tmp_path):
    monkeypatch.setenv("POSTTRAIN_JUDGE_KEY", "sk-s3cret")
    with answering(http({"error": "bad key sk-s3cret"}, "401 No")) as url:
        (found,) = scored(judge(url), ["please"])
    assert "answered 401" in found.error and "s3cret" not in found.error
    monkeypatch.setenv("POSTTRAIN_JUDGE_KEY", "sk-s3cret\nmore")
    with pytest.raises(ConfigError, match="POSTTRAIN_JUDGE_KEY") as refused:
        scored(judge("http://127.0.0.1:9/v1"), ["please"])
    assert "s3cret" not in str(refused.value)
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"s3cret" in p.read_bytes()]


@pytest.mark.parametrize(
    "kept",
    ["", "{", "[]", '{"text": 5, "tokens": 1}', '{"text": null, "tokens": 0}', '{"text": "Verdict: 1", "tokens": "x"}'],
)
def test_a_verdict_that_is_kept_in_another_form_is_asked_for_again(kept, judge, judging, tmp_path):
    with judging(lambda question, body: "Verdict: 8") as (url, requests):
        spec = judge(url)
        scored(spec, ["please"])
        (file,) = (tmp_path / "kept").rglob("*.json")
        file.write_text(kept)
        assert scored(spec, ["please"])[0].total == 0.8 and len(requests) == 2


def test_an_answer_is_kept_before_the_others_have_come(judge, judging, tmp_path):
    first = threading.Event()

    def rule(question, body):
        if "slow" in question:
            first.wait(30)
            assert len(list((tmp_path / "kept").rglob("*.json"))) == 1
        return "Verdict: 8"

    def watch():
        while not list((tmp_path / "kept").rglob("*.json")):
            first.wait(0.01)
        first.set()

    threading.Thread(target=watch, daemon=True).start()
    with judging(rule) as (url, _):
        assert [one.total for one in scored(judge(url), ["slow", "quick"])] == [0.8, 0.8]
    assert first.is_set()


def test_a_cache_that_cannot_be_written_is_named(judge, judging, tmp_path):
    (tmp_path / "kept").write_text("no folder")
    with (
        judging(lambda question, body: "Verdict: 8") as (url, _),
        pytest.raises(RewardError, match="set `cache` in the judge's file"),
    ):
        scored(judge(url), ["please"])
