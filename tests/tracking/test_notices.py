"""Notices reach a real server or command at least once, and a hook that hangs or fails costs nothing but the notice."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from posttrain.tracking.notices import Hook, Notifier, Outbox

ALL = frozenset({"pending", "held", "mirror_failed", "finished"})
NOTICE = {
    "event": "finished",
    "run": "words",
    "run_id": "r1",
    "at": "2026-01-01T00:00:00+00:00",
    "text": "words: finished",
}


@contextmanager
def server(answer):
    """A server on a free port; `answer(handler, body)` does what it likes with a request. Gives its URL and the bodies."""
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            bodies.append((body, dict(self.headers)))
            answer(self, body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", bodies
    finally:
        httpd.shutdown()
        httpd.server_close()


def answers(code, **headers):
    def answer(handler, body):
        handler.send_response(code)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()

    return answer


def hook(**changes):
    return Hook(**{"name": "ops", "events": ALL, "timeout_s": 5.0, "url_env": "OPS_URL", **changes})


def test_a_notice_is_posted_with_its_id_and_token_and_not_sent_again(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path, [hook(token_env="OPS_TOKEN")])
    with server(answers(204)) as (url, bodies):
        monkeypatch.setenv("OPS_URL", f"{url}/secret-path")
        monkeypatch.setenv("OPS_TOKEN", "sesame")
        outbox.put(NOTICE, "model")
        outbox.put(NOTICE, "model")
        outbox.put(NOTICE, "another")
        assert (outbox.send().num_taken, outbox.send().num_taken) == (2, 0)
    ((body, headers), _) = bodies
    assert (body["text"], body["event"]) == ("words: finished", "finished")
    assert headers["Authorization"] == "Bearer sesame"
    assert headers["Idempotency-Key"] == body["id"]
    written = "".join(path.read_text() for path in (tmp_path / "outbox").glob("*.json"))
    assert "sesame" not in written
    assert "secret-path" not in written


def test_a_hook_is_told_only_of_its_events(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path, [hook(events=frozenset({"pending"}))])
    outbox.put(NOTICE, "model")
    assert not (tmp_path / "outbox").exists()
    with server(answers(200)) as (url, bodies):
        monkeypatch.setenv("OPS_URL", url)
        outbox.put({**NOTICE, "event": "pending"}, "model")
        assert outbox.send().num_taken == 1
    assert len(bodies) == 1


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (answers(500), "the server answers 500"),
        (answers(302, Location="http://127.0.0.1:9/"), "the server answers 302"),
    ],
)
def test_what_a_server_refuses_waits_and_a_redirect_is_not_followed(tmp_path, monkeypatch, answer, why):
    outbox = Outbox(tmp_path, [hook()])
    with server(answer) as (url, _):
        monkeypatch.setenv("OPS_URL", url)
        outbox.put(NOTICE, "model")
        assert outbox.send().waiting == (f"ops: finished: {why}",)
    with server(answers(200)) as (url, bodies):
        monkeypatch.setenv("OPS_URL", url)
        assert outbox.send().num_taken == 1
    assert len(bodies) == 1


def test_why_a_notice_waits_repeats_nothing_of_a_variable(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path, [hook()])
    outbox.put(NOTICE, "model")
    monkeypatch.delenv("OPS_URL", raising=False)
    assert outbox.send().waiting == ("ops: finished: OPS_URL not set",)
    for url in ("hooks.example/T0P", "ftp://T0P", "http://127.0.0.1:1/T0P", "http://[T0P", "http://127.0.0.1:1/T0P x"):
        monkeypatch.setenv("OPS_URL", url)
        (line,) = outbox.send().waiting
        assert "T0P" not in line, line


def _trickles(handler, body):
    """Never a whole answer, and never a silence that a socket's own timeout would see."""
    with pytest.raises(OSError):
        while True:
            handler.wfile.write(b"H")
            handler.wfile.flush()
            time.sleep(0.1)


@pytest.mark.parametrize("answer", [lambda handler, body: time.sleep(30), _trickles], ids=["hangs", "trickles"])
def test_a_server_that_does_not_answer_delays_nothing(tmp_path, monkeypatch, answer):
    said = []
    outbox = Outbox(tmp_path, [hook(timeout_s=0.3, url_env="HANGING_URL")])  # its thread outlives the test
    with server(answer) as (url, bodies):
        monkeypatch.setenv("HANGING_URL", url)
        notifier = Notifier(outbox, 2.5, said.append)
        with notifier.sending():
            begun = time.monotonic()
            for number in range(20):
                notifier.tell(NOTICE, f"{number}")
            assert time.monotonic() - begun < 4.0, "telling is writing a file"
            closing = time.monotonic()
        assert time.monotonic() - closing < 20.0
        assert bodies
    assert "posttrain notify RUN sends it again" in said[0]
    assert len(list((tmp_path / "outbox").glob("*.json"))) == 20


def test_a_notice_whose_sender_was_killed_before_it_marked_it_is_sent_again_with_the_same_id(tmp_path, monkeypatch):
    Outbox(tmp_path, [hook()]).put(NOTICE, "model")
    sender = []

    def kills(handler, body):
        if len(bodies) == 1:
            os.kill(sender[0].pid, signal.SIGKILL)
        answers(200)(handler, body)

    program = (
        "import sys; from pathlib import Path; from posttrain.tracking.notices import Hook, Outbox; "
        "Outbox(Path(sys.argv[1]), [Hook('ops', frozenset({'finished'}), 20.0, url_env='OPS_URL')]).send(); print('sent')"
    )
    with server(kills) as (url, bodies):
        monkeypatch.setenv("OPS_URL", url)
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        for expected in (-signal.SIGKILL, 0, 0):
            sender[:] = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path)])]
            assert sender[0].wait(60) == expected
    assert len(bodies) == 2, "sent, killed before the mark, sent again, and then no more"
    assert bodies[0][0] == bodies[1][0]


def test_a_command_gets_the_notice_on_its_standard_input(tmp_path):
    tell = tmp_path / "tell.sh"
    tell.write_text("#!/bin/sh\ncat > told.json\n")
    tell.chmod(0o755)
    outbox = Outbox(tmp_path / "run", [hook(url_env="", command=("./tell.sh",), project=tmp_path)])
    outbox.put(NOTICE, "model")
    assert outbox.send().num_taken == 1
    assert json.loads((tmp_path / "told.json").read_text())["text"] == "words: finished"


@pytest.mark.parametrize(
    ("command", "why"),
    [
        (("sh", "-c", "exit 3"), "exit code 3"),
        (("no-such-program",), "no-such-program: No such file or directory"),
        (("sh", "-c", "sleep 60 & sleep 60"), "no end within 0.3 s"),
    ],
)
def test_a_command_that_fails_or_hangs_is_ended_and_its_notice_waits(tmp_path, command, why):
    outbox = Outbox(tmp_path, [hook(url_env="", command=command, timeout_s=0.3)])
    outbox.put(NOTICE, "model")
    begun = time.monotonic()
    assert outbox.send().waiting == (f"ops: finished: {why}",)
    assert time.monotonic() - begun < 20.0


def test_two_senders_do_not_send_the_same_notice_at_once(tmp_path, monkeypatch):
    outbox = Outbox(tmp_path, [hook()])
    outbox.put(NOTICE, "model")
    with server(lambda handler, body: (time.sleep(0.5), answers(200)(handler, body))) as (url, bodies):
        monkeypatch.setenv("OPS_URL", url)
        first = threading.Thread(target=outbox.send)
        first.start()
        while not bodies:
            time.sleep(0.01)
        assert Outbox(tmp_path, [hook()]).send().waiting == ("another process sends them at this moment",)
        first.join()
    assert len(bodies) == 1


def test_a_disk_that_is_full_or_a_damaged_notice_costs_the_notice_and_not_the_run(tmp_path):
    said = []
    (tmp_path / "outbox").write_text("a file where the folder should be")
    notifier = Notifier(Outbox(tmp_path, [hook()]), 1.0, said.append)
    with notifier.sending():
        notifier.tell(NOTICE, "model")
    assert "cannot be kept, so nobody is told" in said[0]
    (tmp_path / "outbox").unlink()
    Outbox(tmp_path, [hook()]).put(NOTICE, "model")
    (path,) = (tmp_path / "outbox").glob("*.json")
    path.write_text("{")
    said.clear()
    with Notifier(Outbox(tmp_path, [hook()]), 1.0, said.append).sending():
        pass
    assert f"{path} is damaged" in said[0]
