"""Starts that go wrong: who says it, how often, and what the others do."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.distributed.conftest import command, environment, ranks_of

import posttrain

ALONE = [
    ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT are not set"),
    ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc: got 'abc'"),
    ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "ACCELERATE_MIXED_PRECISION is set and WORLD_SIZE is not"),
]


@pytest.mark.parametrize(("changes", "message"), ALONE)
def test_one_process_where_several_were_meant_is_one_line(changes, message, refused, write_yaml):
    done = refused(1, "sft", write_yaml("sft"), **changes)
    assert done.returncode == 64
    assert message in done.stderr
    assert "torchrun --nproc-per-node" in done.stderr or "expected a whole number" in done.stderr
    assert done.stderr.count("\n") == 1


def _errors(done):
    return [line for line in done.stderr.splitlines() if line.startswith(("error:", "rank "))]


def _by_rank(folder, arguments, before=""):
    """The launcher with a command line in which $RANK is the rank's number."""
    line = f"{before} exec {sys.executable} -m posttrain.cli.app {arguments}"
    launcher = command(2)[: -len(["-m", "posttrain.cli.app"])]
    return subprocess.run(
        [*launcher, "--no-python", "bash", "-c", line], check=False, capture_output=True, text=True, timeout=300,
        env=environment(), cwd=folder,
    )  # fmt: skip


def test_an_error_that_all_ranks_have_is_said_once(refused, write_yaml):
    done = refused(2, "sft", write_yaml("sft", learning_rte=1))
    assert len(_errors(done)) == 1
    assert "learning_rte: unknown key; did you mean learning_rate?" in _errors(done)[0]
    assert "exitcode  : 64" in done.stderr


def test_ranks_with_other_keys_are_named_with_what_differs(write_yaml, tmp_path):
    for rank, rate in enumerate((1e-3, 1e-2)):
        (tmp_path / str(rank)).mkdir()
        write_yaml("sft", name=f"{rank}/stage.yaml", learning_rate=rate)
    done = _by_rank(tmp_path, "sft $RANK/stage.yaml -q")
    assert _errors(done) == [
        "error: rank 1 was started otherwise than rank 0: stages.1.sft.learning_rate is 0.01, on rank 0 0.001; give every "
        "rank the same YAML, files and packages"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_with_other_data_are_named(write_yaml, data_dir, tmp_path):
    write_yaml("sft", datasets=[{"path": "data.jsonl"}])
    lines = (data_dir / "sft.jsonl").read_text().splitlines(keepends=True)
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "data.jsonl").write_text("".join(lines[: 12 - rank]))
        os.link(tmp_path / "stage.yaml", tmp_path / str(rank) / "stage.yaml")
    done = _by_rank(tmp_path, "sft $RANK/stage.yaml -q")
    (said,) = _errors(done)
    assert "rank 1 was started otherwise than rank 0: digest of stages.1.sft.data.data.jsonl is " in said


@pytest.mark.slow
def test_ranks_with_other_code_are_named(write_yaml, tmp_path):
    write_yaml("sft")
    for rank in range(2):
        shutil.copytree(Path(posttrain.__file__).parent, tmp_path / str(rank) / "posttrain")
    code = tmp_path / "1/posttrain/pipeline/run.py"
    without = code.read_text().replace(
        "    check_cards(keys, ranks)\n", ""
    )  # and so it says something else at that time
    assert without != code.read_text()
    code.write_text(without)
    done = _by_rank(tmp_path, "sft stage.yaml -q", before="export PYTHONPATH=$RANK;")
    (said,) = _errors(done)
    assert "rank 1 was started otherwise than rank 0: code of posttrain is " in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ranks_with_other_numbers_of_threads_learn_what_one_process_learns(write_yaml, torchrun, runner, tmp_path):
    write_yaml("sft", max_steps=3)
    done = _by_rank(tmp_path, "sft stage.yaml -q", before="export OMP_NUM_THREADS=$((RANK + 1));")
    assert done.returncode == 0, done.stderr[-3000:]
    torchrun(1, "sft", write_yaml("sft", max_steps=3, num_processes=2, output_dir=str(tmp_path / "alone")), "-q")
    mine, theirs = (runner.losses(tmp_path / name / "stages/01-sft") for name in ("run", "alone"))
    assert mine == pytest.approx(theirs, rel=1e-6)


@pytest.mark.slow
def test_a_late_rank_is_waited_for_by_name_and_the_run_goes_on(write_yaml, tmp_path):
    path = write_yaml("sft", max_steps=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}

    def started(rank):
        return subprocess.Popen(
            command(1, "sft", path, "-q"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **place),
        )  # fmt: skip

    first = started(0)
    said = first.stderr.readline()
    assert said == "waiting for rank 1 of 2\n"
    second = started(1)
    assert all("waiting" not in one.communicate(timeout=600)[1] for one in (first, second))
    assert (first.returncode, second.returncode) == (0, 0)
    assert _steps(tmp_path / "run") == 1


@pytest.mark.slow
def test_an_error_of_one_rank_is_said_by_it_and_ends_the_others(write_yaml, tmp_path):
    write_yaml("sft", name="0.yaml")
    done = _by_rank(tmp_path, "sft $RANK.yaml -q")
    (said,) = _errors(done)
    assert said.startswith("rank 1: error: ")
    assert "1.yaml" in said
    assert "posttrain/cli" not in done.stderr, "no traceback of ours"


PAYS_NOTHING = """
def pays(completions, answer, **columns):
    return [] if "8" in answer else [float(len(c[0]["content"]) % 3) for c in completions]
"""


@pytest.mark.slow
def test_an_error_of_one_rank_within_a_step_is_said_by_it_and_ends_the_others(write_yaml, refused, tmp_path):
    (tmp_path / "rewards.py").write_text(PAYS_NOTHING)
    keys = {"reward_funcs": ["rewards.py:pays"], "num_prompts_per_step": 2, "num_generations": 2}
    done = refused(2, "grpo", write_yaml("grpo", **keys), "-q")
    (said,) = _errors(done)
    assert "reward 'pays' returned 0 values for 2 completions" in said
    assert "exitcode  : 64" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1, "the launcher's own"


def _started(*arguments):
    return subprocess.Popen(
        command(2, *arguments), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment()
    )


def _until(launcher, condition):
    until = time.monotonic() + 120
    while launcher.poll() is None and not condition() and time.monotonic() < until:
        time.sleep(0.01)
    assert launcher.poll() is None, launcher.stderr.read()[-3000:]


def _steps(folder):
    metrics = folder / "stages/01-sft/metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


@pytest.mark.slow
def test_a_rank_that_is_killed_is_told_of_by_the_launcher(write_yaml, tmp_path):
    launcher = _started("sft", write_yaml("sft", max_steps=400, save_steps=0), "-q")
    _until(launcher, lambda: _steps(tmp_path / "run") >= 2)
    os.kill(ranks_of(launcher)[-1], signal.SIGKILL)
    said = launcher.communicate(timeout=120)[1]
    assert "Signal 9 (SIGKILL)" in said
    assert said.count("Traceback (most recent call last)") == 1, "the launcher's own"


@pytest.mark.slow
def test_a_wish_to_stop_is_answered_once(write_yaml, torchrun, tmp_path):
    path = write_yaml("sft", max_steps=400, save_steps=0)
    launcher = _started("sft", path, "-q")
    _until(launcher, lambda: _steps(tmp_path / "run") >= 2)
    launcher.send_signal(signal.SIGTERM)
    said = launcher.communicate(timeout=120)[1]
    assert said.count("saved; start again to go on") == 1


@pytest.mark.slow
def test_a_second_start_in_the_same_folder_is_refused_once_and_the_first_goes_on(write_yaml, refused, tmp_path):
    path = write_yaml("sft", max_steps=20_000, save_steps=0)
    first = _started("sft", path, "-q")
    _until(first, lambda: _steps(tmp_path / "run") >= 1)
    done = refused(2, "sft", path, "-q")
    (said,) = _errors(done)
    assert "is in use by process" in said
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=120)
    assert list((tmp_path / "run/stages/01-sft/checkpoints").iterdir())


@pytest.mark.slow
def test_ranks_with_file_systems_of_their_own_are_refused(write_yaml, tmp_path):
    """One path, and behind it a file system of each."""
    (tmp_path / "run").mkdir()
    own = f"mount -t tmpfs tmpfs {tmp_path}/run"
    if subprocess.run(["unshare", "-m", "bash", "-c", own], check=False, capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    line = f"{own} && exec {sys.executable} -m posttrain.cli.app sft {write_yaml('sft')} -q"
    launcher = command(2)[: -len(["-m", "posttrain.cli.app"])]
    done = subprocess.run(
        [*launcher, "--no-python", "unshare", "-m", "bash", "-c", line], check=False, capture_output=True, text=True,
        timeout=300, env=environment(),
    )  # fmt: skip
    (said,) = _errors(done)
    assert f"rank 1 does not see what rank 0 writes to {tmp_path}/run" in said
    assert "exitcode  : 64" in done.stderr


SHARED = """
import sys
from pathlib import Path

from posttrain.distributed.ranks import join_ranks
from posttrain.errors import ConfigError
from posttrain.pipeline.processes import check_folder_is_shared

with join_ranks() as ranks:
    check_folder_is_shared(ranks, Path(sys.argv[1]))
    try:
        check_folder_is_shared(ranks, Path(sys.argv[1 + ranks.rank]))
    except ConfigError as error:
        sys.stdout.write(f"{ranks.rank} {error}\\n")  # one write: both share the pipe
"""


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_run_folder_is_named_on_every_rank(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "script.py").write_text(SHARED)
    launcher = command(2)[: -len(["-m", "posttrain.cli.app"])]
    done = subprocess.run(
        [*launcher, tmp_path / "script.py", tmp_path / "one", tmp_path / "two"], check=True, capture_output=True, text=True,
        timeout=120, env=environment(),
    )  # fmt: skip
    for rank in (0, 1):
        assert f"{rank} rank 1 does not see what rank 0 writes to " in done.stdout
    assert not list((tmp_path / "one").iterdir())
