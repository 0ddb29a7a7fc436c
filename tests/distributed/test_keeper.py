"""One program of a role: kept while somebody asks, ended with its lease, served on where it may be."""

import os
import time
from pathlib import Path

import pytest

from posttrain.distributed.keeper import Keeper
from posttrain.distributed.roles import RoleProgram

SHOWS = "import os, sys; print(os.getcwd(), os.environ['WHO']); print('bad', file=sys.stderr); sys.exit(3)"
SLEEPS = "import time; time.sleep(600)"


@pytest.fixture
def keeper():
    made = Keeper(2.0)
    yield made
    made.close()


def program(tmp_path, script, **options):
    return RoleProgram(("{python}", "-c", script, *options.pop("words", ())), str(tmp_path), {"WHO": "me"}, **options)


def reported(keeper, wanted):
    """What it has written until the report that is wanted."""
    out, err, until = b"", b"", time.monotonic() + 30
    while time.monotonic() < until:
        report = keeper.look()
        out, err = out + report.out, err + report.err
        if wanted(report):
            return report, out.decode(), err.decode()
        time.sleep(0.05)
    raise AssertionError((out, err))


def test_its_output_and_its_end_are_delivered_under_the_lease_of_its_start(keeper, tmp_path):
    keeper.start(7, program(tmp_path, SHOWS))
    report, out, err = reported(keeper, lambda report: report.code is not None)
    assert (report.lease, report.code, report.how) == (7, 3, "exit status 3")
    assert (out, err) == (f"{tmp_path} me\n", "bad\n")


def test_a_program_nobody_asks_for_is_ended(keeper, tmp_path):
    keeper.start(1, program(tmp_path, SLEEPS))
    pid = keeper._running.process.pid
    for _ in range(6):  # longer than its lease
        time.sleep(0.5)
        assert keeper.look().code is None
    until = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists()
    assert keeper.look().is_idle


def test_a_server_is_handed_on_only_with_whole_weights(keeper, tmp_path):
    server = program(tmp_path, SLEEPS, words=["{private}/socket"], token="one", log=str(tmp_path / "log"))
    first = keeper.serve(server)
    assert (first["warm"], first["token"]) == (False, "one")
    assert os.stat(Path(first["socket"]).parent).st_mode & 0o077 == 0
    again = program(tmp_path, SLEEPS, words=["{private}/socket"], token="two", log=str(tmp_path / "log"))
    keeper.synced(4)
    assert keeper.look().version == 4
    assert keeper.serve(again) == {**first, "warm": True}
    assert keeper.look().version == -1, "stale until the next sync"
    keeper.synced(-1)  # an update began, and whoever sent it was killed
    anew = keeper.serve(again)
    assert (anew["warm"], anew["token"]) == (False, "two")
    assert keeper.look().lease == 2
    other = program(tmp_path, SLEEPS, words=["{private}/socket", "more"], token="three", log=str(tmp_path / "log"))
    keeper.synced(5)
    assert keeper.serve(other)["warm"] is False
    assert not Path(anew["socket"]).parent.exists()
