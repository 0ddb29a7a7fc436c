"""Ranks as roles on this machine (`--ray local`): the same numbers as under torchrun, and a rank's death costs a restart."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.distributed.conftest import environment
from tests.processes import all_gone

from posttrain.distributed.keeper import LocalKeeper
from posttrain.distributed.rank_group import RankGroup, RankProgram
from posttrain.distributed.roles import Role


@pytest.fixture
def workers():
    """`workers("local", "sft", yaml, "--workers", 2)`: the command in a process of its own, ended with the test."""
    running = []

    def start(address, *arguments):
        words = [sys.executable, "-m", "posttrain.cli.app", *map(str, arguments), "--ray", str(address)]
        running.append(
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
        )
        return running[-1]

    yield start
    for one in running:
        if one.poll() is None:
            one.terminate()
            one.communicate(timeout=600)


def done(process, code=0, timeout=600):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == code, err[-6000:]
    return out, err


@pytest.mark.slow
def test_two_workers_take_the_steps_of_torchrun_to_the_bit(workers, torchrun, write_yaml, runner, tmp_path):
    out, _ = done(workers("local", "sft", write_yaml("sft", max_steps=3), "--workers", 2))
    assert "model   " in out
    torchrun(2, "sft", write_yaml("sft", name="other.yaml", max_steps=3, output_dir=str(tmp_path / "other")))
    mine, theirs = tmp_path / "run/stages/01-sft", tmp_path / "other/stages/01-sft"
    assert [row["loss"] for row in runner.rows(mine)] == [row["loss"] for row in runner.rows(theirs)]
    digests = [json.loads((stage / "result.json").read_text())["model_digest"] for stage in (mine, theirs)]
    assert digests[0] == digests[1]


HALF_SAY_IT = """
import os, time
from posttrain.distributed.keeper import say_synced
if os.environ["RANK"] == "1":
    say_synced(3)
time.sleep(0.6)
"""


def test_a_rank_is_stale_until_it_says_that_it_has_the_state(tmp_path):
    told = []
    roles = [Role(f"rank-{n}", told.append) for n in range(2)]
    program = RankProgram(("{python}", "-c", HALF_SAY_IT), str(tmp_path), {})
    code = RankGroup(
        program, roles, lambda rank: LocalKeeper(), lambda *_: None, lambda: False, lambda: None, 0.0, 5.0
    ).run()  # fmt: skip
    assert code == 0
    states = {role.name: [event["to"] for event in told if event["role"] == role.name] for role in roles}
    assert states == {"rank-0": ["restarting", "stale", "dead"], "rank-1": ["restarting", "stale", "healthy", "dead"]}


def rank_pids(folder):
    """Process ids of the ranks of the run below `folder`, by rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and str(folder.parent).encode() in (entry / "cmdline").read_bytes():
                variables = dict(line.partition(b"=")[::2] for line in (entry / "environ").read_bytes().split(b"\0"))
                if b"MASTER_PORT" in variables and b"posttrain.cli.app" in (entry / "cmdline").read_bytes():
                    found[int(variables[b"RANK"])] = int(entry.name)
    return found


def await_steps(run, number, process, longest_s=600):
    metrics = next(iter(run.glob("stages/*/metrics.jsonl")), None)
    until = time.monotonic() + longest_s
    while metrics is None or metrics.read_bytes().count(b"\n") < number:
        assert process.poll() is None, process.communicate()[1][-4000:]
        assert time.monotonic() < until
        time.sleep(0.01)
        metrics = next(iter(run.glob("stages/*/metrics.jsonl")), None)


def kill_rank(run):
    os.kill(rank_pids(run)[1], signal.SIGKILL)


def check_killed(process, run, kill):
    """After two steps something is killed, and the run comes to its end."""
    await_steps(run, 2, process)
    kill(run)
    _, err = done(process)
    assert "was killed by SIGKILL; the ranks start again from the last checkpoint (2 more times at most)" in err
    told = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    states = [event["to"] for event in told if event.get("role") == "rank-1"]
    assert states == ["restarting", "stale", "healthy", "dead"] * 2
    assert [event["lease"] for event in told if event.get("to") == "healthy"] == [1, 1, 2, 2]


def check_like_straight(workers, write_yaml, runner, tmp_path):
    """The run in `tmp_path / "run"` has every step once, with the losses of one that nothing happened to."""
    straight = write_yaml("sft", name="straight.yaml", output_dir=str(tmp_path / "straight"))
    done(workers("local", "sft", straight, "--workers", 2))
    mine, theirs = (runner.rows(tmp_path / name / "stages/01-sft") for name in ("run", "straight"))
    assert [(row["step"], row["loss"]) for row in mine] == [(row["step"], row["loss"]) for row in theirs]


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_a_restart_and_nothing_twice(workers, write_yaml, runner, tmp_path):
    check_killed(workers("local", "sft", write_yaml("sft"), "--workers", 2), tmp_path / "run", kill_rank)
    check_like_straight(workers, write_yaml, runner, tmp_path)


@pytest.mark.slow
def test_a_rank_that_stands_still_is_ended_and_costs_a_restart(workers, write_yaml, runner, tmp_path):
    """SIGSTOP: the others give it up after `ddp_timeout` and end with an error, the one that stands still ends by nothing of its own."""
    process = workers("local", "sft", write_yaml("sft", ddp_timeout=8), "--workers", 2)
    run = tmp_path / "run"
    await_steps(run, 2, process)
    stopped = rank_pids(run)[1]
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    _, err = done(process)
    assert "rank 1 on 127.0.0.1 stands still" in err and "the ranks start again from the last checkpoint" in err
    print(f"recovered after {time.monotonic() - began:.1f} s")
    assert all_gone([stopped])
    check_like_straight(workers, write_yaml, runner, tmp_path)


@pytest.mark.slow
def test_a_wish_to_stop_reaches_the_ranks_and_is_answered_once(workers, write_yaml, tmp_path):
    process = workers("local", "sft", write_yaml("sft", max_steps=400, save_steps=0), "--workers", 2)
    await_steps(tmp_path / "run", 2, process)
    process.terminate()
    _, err = done(process, code=75)
    assert err.count("saved; start again to go on") == 1
    assert not rank_pids(tmp_path / "run")


@pytest.mark.slow
def test_ranks_end_with_whoever_started_them(workers, write_yaml, tmp_path):
    process = workers("local", "sft", write_yaml("sft", max_steps=400, save_steps=0), "--workers", 2)
    await_steps(tmp_path / "run", 1, process)
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while rank_pids(tmp_path / "run") and time.monotonic() < until:
        time.sleep(0.1)
    assert not rank_pids(tmp_path / "run")


BAD = [
    (["--workers", 2], "--workers and --worker say how --ray places processes"),
    (["--ray", "local", "--worker", "gpu=1"], "got 'gpu=1', expected cpus=N, gpus=N and placement=NAME"),
    (["--ray", "local", "--worker", "placement=tight"], "placement is 'tight', expected one of pack, spread"),
    (["--ray", "local", "--worker", "cpus=0"], "expected numbers from 0 on, not all of them 0"),
    (["--ray", "local", "--set", "learning_rte=1"], "learning_rte: unknown key; did you mean learning_rate?"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_what_cannot_be_placed_is_one_line(arguments, message, refused, write_yaml, tmp_path):
    done = refused(1, "sft", write_yaml("sft"), *arguments)
    assert done.returncode == 64
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_without_the_extra_it_is_named(write_yaml):
    call = "import sys; sys.modules['ray'] = None; from posttrain.cli.app import main; main(sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", call, "sft", write_yaml("sft"), "--ray", "auto"], check=False, capture_output=True, text=True,
        env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (64, "error: --ray needs Ray; pip install 'posttrain[ray]'\n")
