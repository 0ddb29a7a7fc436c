"""What a supervised process has started does not outlive it, its order to end, or us."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest
from tests.processes import all_gone, family

from posttrain.supervised import SupervisedProcess

# A program that writes the ids of itself and of a daemon, and goes on.
PROGRAM = (
    "import os, pathlib, subprocess, sys, time; "
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
    "pathlib.Path(sys.argv[1]).write_text(f'{os.getpid()} {child.pid}'); "
    "print('last words', flush=True); {then}"
)


def command(place, then="time.sleep(600)"):
    return [sys.executable, "-c", PROGRAM.replace("{then}", then), str(place)]


def started(place, log, **how):
    return SupervisedProcess("posttrain.supervised:run_program", command(place, **how), log, os.environ)


def pids(place):
    for _ in range(600):
        if place.exists() and " " in (text := place.read_text()):
            return [int(pid) for pid in text.split()]
        time.sleep(0.05)
    raise AssertionError("it did not start")


def test_the_order_to_end_reaches_what_it_has_started(tmp_path):
    with tempfile.TemporaryFile() as log:
        process = started(tmp_path / "pids", log)
        running = pids(tmp_path / "pids")
        assert not process.has_ended()
        process.end()
        assert all_gone(running)


@pytest.mark.parametrize("supervisor", [0, 1])
def test_what_a_killed_supervisor_leaves_is_ended_by_the_other_one(supervisor, tmp_path):
    """Nobody else notices: whoever started it may have been killed too, as Ray kills the children of a worker that ends."""
    with tempfile.TemporaryFile() as log:
        process = started(tmp_path / "pids", log)
        running = pids(tmp_path / "pids")
        os.kill(family(process.pid)[supervisor], signal.SIGKILL)
        assert all_gone(running)
        process.end()


@pytest.mark.parametrize(
    ("then", "how"), [("sys.exit(3)", "exit status 3"), ("os.kill(os.getpid(), 9)", "killed by SIGKILL")]
)
def test_it_ends_as_its_program_does_and_leaves_nothing(then, how, tmp_path):
    with tempfile.TemporaryFile() as log:
        process = started(tmp_path / "pids", log, then=then)
        assert process.how_it_ended() == how
        assert process.last_lines() == ["last words"]
        assert all_gone(pids(tmp_path / "pids"))


@pytest.mark.parametrize("thread", [False, True], ids=["main thread", "another thread"])
def test_it_dies_with_a_parent_that_is_killed(thread, tmp_path):
    start = f"process = SupervisedProcess('posttrain.supervised:run_program', {command(tmp_path / 'pids')!r}, log, os.environ)"
    script = (
        "import os, tempfile, threading, time\n"
        "from posttrain.supervised import SupervisedProcess\n"
        "log = tempfile.TemporaryFile()\n"
        f"def start():\n    {start}\n    time.sleep(600)\n"
        + ("threading.Thread(target=start).start(); time.sleep(600)" if thread else "start()")
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    running = pids(tmp_path / "pids")
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert all_gone(running)


@pytest.mark.parametrize("then", ["sys.exit(3)", "os.kill(os.getpid(), 9)", "time.sleep(600)"])
def test_its_temporary_files_go_with_it(then, tmp_path):
    program = f"import os, sys, tempfile, time; print(tempfile.mkstemp()[1], flush=True); {then}"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    with tempfile.TemporaryFile() as log:
        process = SupervisedProcess(
            "posttrain.supervised:run_program", [sys.executable, "-c", program], log, environment, scratch="ours-"
        )
        while not process.last_lines():
            time.sleep(0.05)
        [file] = process.last_lines()
        process.end()
        assert file.startswith(f"{tmp_path}/ours-")
        assert not list(tmp_path.iterdir())
