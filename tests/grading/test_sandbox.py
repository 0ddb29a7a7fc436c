import contextlib
import os
import time
from pathlib import Path

import pytest

from posttrain.grading import sandbox
from posttrain.grading.sandbox import SandboxLimits, run_calls, run_script

QUICK = SandboxLimits(wall_s=1.5, cpu_s=1)


def one(code, *args, limits=QUICK):
    return run_calls(code, [("f", args)], limits)[0]


def test_values_come_back_as_data():
    results = run_calls(
        "def f(x): return {'a': (x, [None, 1.5, True])}\ndef g(): raise KeyError('no')",
        [("f", [2]), ("g", []), ("h", [])],
    )
    assert results[0].value == {"a": [2, [None, 1.5, True]]}
    assert [r.ok for r in results] == [True, False, False]
    assert "KeyError" in results[1].reason


def test_a_script_reads_its_input_and_writes_its_output():
    assert run_script("print(input()[::-1])", "abc\n").value == "cba\n"
    assert not run_script("raise SystemExit(3)", "").ok


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time\ntime.sleep(100)",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
    ],
)
def test_the_clock_ends_it(code):
    start = time.monotonic()
    result = one(code, limits=SandboxLimits(wall_s=0.6))
    assert not result.ok
    assert "took longer" in result.reason
    assert time.monotonic() - start < 20


def test_memory_and_output_are_bounded():
    assert "MemoryError" in one("def f(): return len(bytearray(1 << 34))").reason
    flood = "import os\nfor fd in range(3, 1024):\n  try:\n    while True: os.write(fd, b'x' * 65536)\n  except OSError: pass\ndef f(): return 1"
    assert not one(flood).ok


@pytest.mark.parametrize("value", ["object()", "{1: 2}", "{1, 2}", "type('I', (int,), {})(3)", "b'x'", "1j"])
def test_only_plain_data_leaves(value):
    assert "no JSON value" in one(f"def f(): return {value}").reason


def test_no_environment_and_no_open_files():
    os.environ["POSTTRAIN_TEST_SECRET"] = "x"
    try:
        assert one("import os\ndef f(): return dict(os.environ)").value in ({}, {"LC_CTYPE": "C.UTF-8"})
    finally:
        del os.environ["POSTTRAIN_TEST_SECRET"]


@pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="this system gives no namespaces")
def test_namespaces_hide_files_network_and_processes(tmp_path):
    (tmp_path / "gold.json").write_text("[42]")
    assert "FileNotFoundError" in one(f"def f(): return open({str(tmp_path / 'gold.json')!r}).read()").reason
    assert "PermissionError" in one("import socket\ndef f(): socket.create_connection(('127.0.0.1', 9), 1)").reason
    assert one(
        "import os\ndef f(): return [os.getpid(), os.path.exists('/proc/self'), os.getuid() == 0 and os.geteuid() != 0]"
    ).value == [1, False, False]
    assert "Error" in one("import os\ndef f(): open(os.__file__, 'a')").reason
    assert one("import ctypes\ndef f(): return ctypes.CDLL(None).unshare(0x10000000)").value == -1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the uid")
def test_a_uid_of_its_own_where_there_are_no_namespaces():
    code = "import os\nprint(os.getuid())\ntry:\n  os.setuid(0)\nexcept PermissionError:\n  print('no')"
    output, reason = sandbox._run({"mode": "script", "code": code, "stdin": "", "nonce": ""}, QUICK, "uid")
    uid, said = output.decode().split()
    assert reason == "" and int(uid) >= 1_600_000_000 and said == "no"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to change the uid")
def test_a_process_that_leaves_the_group_dies_with_its_uid():
    limits = SandboxLimits(wall_s=1.5, num_processes=8)
    code = "import os, time\nif os.fork() == 0:\n  os.setsid()\n  time.sleep(300)\nprint(os.getuid(), flush=True)\nos._exit(0)"
    output, _ = sandbox._run({"mode": "script", "code": code, "stdin": "", "nonce": ""}, limits, "uid")
    uid = int(output.split()[0])
    deadline = time.monotonic() + 5  # a killed process takes a moment to go
    alive = [uid]
    while uid in alive and time.monotonic() < deadline:
        alive = []
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                fields = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
                if fields["State"][0] != "Z":
                    alive.append(int(fields["Uid"].split()[0]))
    assert uid not in alive


@pytest.mark.skipif(sandbox.isolation() != "namespaces", reason="this system gives no namespaces")
def test_the_namespaces_of_an_ordinary_user_hold_too(monkeypatch):
    monkeypatch.setattr(sandbox.os, "geteuid", lambda: 1000)  # takes the way through a user namespace
    code = "import os\nprint(os.getpid(), os.path.exists('/etc'))\nopen('/tmp/x', 'w').write('y')\nos.chroot('/tmp')"
    output, reason = sandbox._run({"mode": "script", "code": code, "stdin": "", "nonce": ""}, QUICK, "namespaces")
    assert output == b"1 False\n"
    assert reason == "ended with status 1"  # no capability to change the root


@pytest.mark.parametrize("level", ["limits", "uid", "namespaces"])
def test_every_level_keeps_the_limits(level):
    if level == "uid" and os.geteuid() != 0:
        level = "limits"
    code = "print(len(bytearray(1 << 34)))"
    output, reason = sandbox._run({"mode": "script", "code": code, "stdin": "", "nonce": ""}, QUICK, level)
    assert output == b"" and reason
