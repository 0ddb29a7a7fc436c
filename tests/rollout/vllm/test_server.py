"""The process of a server: how it is started, that it is waited for, and what a start that fails says."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.errors import EngineError, EngineGoneError
from posttrain.rollout.vllm import server
from posttrain.rollout.vllm.options import VLLMOptions
from posttrain.rollout.vllm.server import OwnServer, await_ready, last_cause, server_arguments

OPTIONS = VLLMOptions(model="some/model", stop_token_ids=(2,), lora_rank=4)
PROGRAMS = {
    "dies": "import sys; print('INFO all is well'); print('ValueError: no such model', file=sys.stderr); print('bye'); sys.exit(3)",
    "sleeps": "import time; print('loading'); time.sleep(600)",
    "shows": "import json, os, sys, time; print(json.dumps([sys.argv[1:], dict(os.environ)]), flush=True); time.sleep(600)",
}


@pytest.fixture
def started(tmp_path, monkeypatch):
    """`started(program)`: a server whose module is one of `PROGRAMS`."""
    for name, text in PROGRAMS.items():
        (tmp_path / f"program_{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    running = []

    def start(program, folder=None, options=OPTIONS, log="log"):
        monkeypatch.setattr(server, "_MODULE", f"program_{program}")
        running.append(OwnServer(options, folder or tmp_path, tmp_path / log, 1.0))
        return running[-1]

    yield start
    for one in running:
        one.close()


def test_a_start_that_fails_says_the_line_that_tells_why_and_where_the_log_is(started, tmp_path):
    (tmp_path / "log").write_text("OSError: of a run before\n")
    with pytest.raises(
        EngineGoneError,
        match=rf"did not start: it ended \(exit status 3\): ValueError: no such model; its log is {tmp_path}/log",
    ):
        await_ready(started("dies"), 60)
    assert (tmp_path / "log").read_text().startswith("OSError: of a run before\n")


def test_a_start_has_a_deadline(started):
    begun = time.monotonic()
    with pytest.raises(EngineGoneError, match=r"not ready after 1 s .* raise rollout.start_timeout_s"):
        await_ready(started("sleeps"), 1.0)
    assert time.monotonic() - begun < 20


def test_the_key_goes_through_the_environment_alone(started, tmp_path):
    one = started("shows")
    while not (tmp_path / "log").read_text().endswith("\n"):
        time.sleep(0.05)
    arguments, environment = json.loads((tmp_path / "log").read_text())
    assert environment["VLLM_API_KEY"] == one.client.token
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
    assert not any(one.client.token in argument for argument in arguments)
    assert arguments[:2] == ["--uds", str(tmp_path / "socket")]
    other = started("sleeps")
    assert other.client.token != one.client.token


def test_a_process_sees_the_cards_of_its_server_alone_and_sleeps_where_it_is_to(started, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b,GPU-c,GPU-d")
    found = {}
    for log, changes in {
        "split": {"cards": ("GPU-c", "GPU-d"), "device": "cuda", "tensor_parallel_size": 2},
        "colocated": {"cards": ("GPU-a",), "device": "cuda", "sleeps": True},
        "cpu": {},
    }.items():
        started("shows", options=replace(OPTIONS, **changes), log=log)
        while not (tmp_path / log).read_text().endswith("\n"):
            time.sleep(0.05)
        arguments, environment = json.loads((tmp_path / log).read_text())
        found[log] = environment["CUDA_VISIBLE_DEVICES"], set(arguments)
    assert [cards for cards, _ in found.values()] == ["GPU-c,GPU-d", "GPU-a", "GPU-a,GPU-b,GPU-c,GPU-d"]
    assert "--tensor-parallel-size=2" in found["split"][1]
    assert [log for log, (_, arguments) in found.items() if "--enable-sleep-mode" in arguments] == ["colocated"]
    # vLLM asks for so much of a card to be free, whoever else is on it; the bytes of its cache are given.
    shares = [log for log, (_, arguments) in found.items() if "--gpu-memory-utilization=0.01" in arguments]
    assert shares == ["split", "colocated"]


def test_closing_ends_it(started, tmp_path):
    one = started("sleeps")
    pid = one.pid
    assert one.ended() == ""
    one.close()
    assert not Path(f"/proc/{pid}").exists()
    one.close()


def test_a_folder_too_deep_for_a_socket_is_said(started, tmp_path):
    with pytest.raises(EngineError, match=r"too long for a Unix socket .* set TMPDIR"):
        started("sleeps", tmp_path / ("x" * 120))


def test_every_option_stands_on_the_command_line():
    arguments = server_arguments(OPTIONS)
    assert {
        "--model=some/model",
        "--enable-lora",
        "--max-lora-rank=8",
        "--no-trust-remote-code",
        "--enforce-eager",
    } <= set(arguments)
    assert '--weight-transfer-config={"backend": "posttrain"}' in arguments
    assert "--generation-config=vllm" in arguments
    assert len(arguments) == len(OPTIONS.engine_args()) + 5


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], ""),
        (["loading", "", "  "], "loading"),
        (["Traceback:", "OSError: no config.json", "INFO: shutting down"], "OSError: no config.json"),
        (
            [
                "(EngineCore pid=7) ERROR 11-28 14:13:23 [core.py:1] RuntimeError: no memory",
                "(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.",
                "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above)",
            ],
            "RuntimeError: no memory",
        ),
        (
            [
                "(APIServer pid=6) WARNING 11-29 22:20:52 [system_utils.py:255] This can cause errors like `OSError: [Errno 24] Too many`.",
                "(Worker pid=8) INFO 11-29 22:22:20 [multiproc_executor.py:843] Parent process exited",
            ],
            "",
        ),
        (
            ["api_server.py: error: argument --dtype: invalid choice"],
            "api_server.py: error: argument --dtype: invalid choice",
        ),
    ],
)
def test_of_a_log_the_line_that_tells_why_is_found(lines, cause):
    assert last_cause(lines) == cause
