"""Killed anywhere and started again: the same weights, metrics and registration as without a kill."""

import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import time
from functools import wraps
from pathlib import Path

import pytest

from posttrain.checkpoint.store import CheckpointStore
from posttrain.cli.app import main
from posttrain.evals.run import Evaluator
from posttrain.evidence import EvalReport
from posttrain.pipeline import judge, train
from posttrain.pipeline.state import RunState
from posttrain.recipes.run.stop import StoppedPolitely
from posttrain.registry.registry import Registry
from posttrain.report.build import build_report
from posttrain.report.records import read_run

TIMES = {"step_time", "time", "time/rollout_s", "time/train_s", "tokens_per_s", "memory_peak_bytes", "sync/wall_s"}
"""What a metric line says of the clock and the machine."""


def trace_of(project):
    """All that must be the same however often a run was interrupted."""
    record = read_run(project.out)
    assert record.problems == ()
    state = project.state
    book = project.registry()
    try:
        entries = [(entry.version, entry.digest, tuple(entry.aliases)) for entry in book.entries()]
        events = [(event.action, event.version) for event in book.rows.events()]
    finally:
        book.close()
    return {
        "status": state.status,
        "models": [(entry.index, entry.attempt, entry.status, entry.output_digest) for entry in state.stages],
        "verdicts": [(entry.after, entry.verdict, entry.candidate, entry.baseline) for entry in state.gates],
        "metrics": {
            stage.name: [{k: v for k, v in line.items() if k not in TIMES} for line in stage.metrics]
            for stage in record.stages
        },
        "items": {
            name: {key: report.digest for key, report in reports.items()} for name, reports in record.evals.items()
        },
        "registered": entries,
        "events": events,
    }


# --- every transition, in forked children --------------------------------------------------------------------------


def die_once_at_each_point(journal: Path) -> None:
    """SIGKILL this process before and after every commit point that no earlier child died at."""
    seen = set(journal.read_text().splitlines()) if journal.exists() else set()

    def reach(point: str) -> None:
        if point not in seen:
            with open(journal, "a") as file:
                file.write(point + "\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def around(owner, name, label):
        real = getattr(owner, name)

        @wraps(real)
        def wrapped(*args, **kwargs):
            point = label(*args)
            reach(f"before {point}")
            result = real(*args, **kwargs)
            reach(f"after {point}")
            return result

        setattr(owner, name, wrapped)

    def of_state(state, folder):
        newest = state.stages[-1] if state.stages else None
        what = f"{newest.kind}-{newest.attempt} {newest.status}" if newest else "nothing"
        return f"state {state.status}, {what}, {len(state.gates)} gates, {state.retries}, {bool(state.registered)}"

    around(RunState, "save", of_state)
    around(EvalReport, "save", lambda report, folder: f"eval {folder.parent.name}")
    around(judge, "save_verdict", lambda folder, *rest: f"verdict {folder.name}")
    around(Registry, "register", lambda *rest: "register")
    around(Registry, "promote", lambda *rest: "promote")
    around(train, "apply_changes", lambda keys, changes: f"start of {type(keys).__name__} {dict(changes)}")


def child(project, journal: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    die_once_at_each_point(journal)
    project.run()
    os._exit(0)


def test_killed_at_every_transition_the_run_ends_the_same(make_project, tmp_path):
    """A loop-back, two stages, a gate, a registration and a promotion; each child dies at the next point."""
    slow = {
        "datasets": [{"path": "sft.jsonl"}],
        "max_steps": 1,
        "learning_rate": 1e-6,
        "per_device_train_batch_size": 8,
    }
    pairs = {"datasets": [{"path": "pairs.jsonl"}], "max_steps": 1, "learning_rate": 1e-5}
    rule = {
        "retry": "sft",
        "times": 1,
        "with": {"max_steps": 8, "learning_rate": 1e-2, "lr_scheduler_type": "constant"},
    }
    gate = {"primary": [{"suite": "yes", "min_delta": 0.35}], "on_fail": rule}
    keys = {"gate": gate, "register": {"name": "yes"}}
    whole = make_project(tmp_path / "whole", [{"sft": slow}, {"dpo": pairs}], **keys)
    assert whole.run().status == "passed"

    killed = make_project(tmp_path / "killed", [{"sft": slow}, {"dpo": pairs}], **keys)
    journal = tmp_path / "journal"
    fork = multiprocessing.get_context("fork")
    codes = []
    while not codes or codes[-1] != 0:
        process = fork.Process(target=child, args=(killed, journal))
        process.start()
        process.join(120)
        codes.append(process.exitcode)
        assert codes[-1] in (0, -signal.SIGKILL)
        assert len(codes) < 100
    points = journal.read_text().splitlines()
    assert len(codes) == len(points) + 1
    assert len(points) > 30
    assert trace_of(killed) == trace_of(whole)
    assert [event for event, _ in trace_of(killed)["events"]].count("promote") == 1


# --- a real process ------------------------------------------------------------------------------------------------


def wait_for(process: subprocess.Popen, path: Path, seconds: float = 120) -> None:
    """Until `path` is there and the process still runs."""
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def longer(make_project, tmp_path_factory):
    """`longer(name)` is a project whose stages are long enough to be interrupted."""
    sft = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-3, "max_steps": 4, "per_device_train_batch_size": 8,
           "save_steps": 1}  # fmt: skip
    dpo = {"datasets": [{"path": "pairs.jsonl"}], "learning_rate": 1e-4, "max_steps": 16, "per_device_train_batch_size": 4,
           "save_steps": 1}  # fmt: skip
    grpo = {"datasets": [{"path": "prompts.jsonl"}], "reward_funcs": ["rewards.py:spread"], "reward_check": "off",
            "learning_rate": 1e-4, "max_steps": 16, "num_generations": 4, "num_prompts_per_step": 2, "save_steps": 1,
            "max_completion_length": 6, "temperature": 2.0, "steps_per_generation": 2, "num_iterations": 2}  # fmt: skip
    gate = {"guards": [{"suite": "yes", "margin": 0.4}]}

    def make(name):
        rows = [{"sft": sft}, {"dpo": dpo}, {"grpo": grpo}]
        return make_project(tmp_path_factory.mktemp(name), rows, gate=gate, register={"name": "yes"})

    return make


@pytest.fixture(scope="module")
def uninterrupted(longer):
    project = longer("uninterrupted")
    assert project.run().status == "passed"
    return trace_of(project)


def test_a_polite_stop_a_second_process_and_a_kill(longer, uninterrupted, capsys):
    """One run, three processes: SIGTERM within DPO (75), SIGKILL within GRPO, then to the end."""
    project = longer("interrupted")
    first = project.spawn()
    wait_for(first, project.out / "stages/02-dpo/metrics.jsonl")
    with pytest.raises(SystemExit) as refused:
        main(["run", str(project.path), "--quiet"])
    assert refused.value.code == 64
    assert f"{project.out} is in use by process {first.pid}; wait for it, stop it" in capsys.readouterr().err
    first.send_signal(signal.SIGTERM)
    output = first.communicate(timeout=120)[0]
    assert first.returncode == 75, output
    assert "stopped after step" in output
    assert "start again to go on" in output
    state = project.state
    assert (state.status, [entry.status for entry in state.stages]) == ("stopped", ["done", "running"])

    second = project.spawn()
    wait_for(second, project.out / "stages/03-grpo/metrics.jsonl")
    second.kill()
    second.communicate(timeout=120)
    assert second.returncode == -signal.SIGKILL
    third = project.spawn()
    output = third.communicate(timeout=240)[0]
    assert third.returncode == 5, "passed; without a reward certificate it is not promoted"
    assert "not run again" in output
    assert trace_of(project) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_killed_at_random_instants_a_real_process_ends_the_same(longer, uninterrupted, seed):
    """Each run is killed three times, at instants drawn anew; with eight seeds 24 kills."""
    chance = random.Random(seed)
    project = longer(f"random-{seed}")
    kills = 0
    while True:
        process = project.spawn()
        wait_for(process, project.out / "pipeline.json")
        before = (project.out / "pipeline.json").stat().st_mtime_ns
        # The time to import is of no interest: the clock starts when the process has opened the run.
        while kills and (project.out / "pipeline.json").stat().st_mtime_ns == before and process.poll() is None:
            time.sleep(0.005)
        try:
            output = process.communicate(timeout=chance.uniform(0.0, 4.0) if kills < 3 else 240)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 5, output
        break
    assert kills, "the run was over before the first kill"
    assert trace_of(project) == uninterrupted


def test_a_stop_during_an_eval_is_polite_as_well(project, monkeypatch):
    """SIGTERM while the base is scored: nothing was trained yet, and the next start goes on."""
    run = project([{"sft": {"datasets": [{"path": "sft.jsonl"}], "max_steps": 1}}])
    real = Evaluator.run

    def stopped(self, *rest, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *rest, **options)

    monkeypatch.setattr(Evaluator, "run", stopped)
    with pytest.raises(StoppedPolitely, match="start again to go on"):
        run.run()
    assert (run.state.status, run.state.stages) == ("stopped", ())
    monkeypatch.undo()
    assert run.run().status == "done"


def test_a_clock_that_jumps_changes_nothing_but_times(make_project, tmp_path, monkeypatch):
    """Killed after its second checkpoint, all files of another time, and a clock that leaps a day at every look."""
    sft = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8,
           "save_steps": 1}  # fmt: skip
    keys = {"gate": {"guards": [{"suite": "yes", "margin": 0.4}]}, "register": {"name": "yes"}}
    whole, leaping = (make_project(tmp_path / name, [{"sft": sft}], **keys) for name in ("whole", "leaping"))
    assert whole.run().status == "passed"

    def dies():
        real, saves = CheckpointStore.save, iter(range(2))

        def save(store, *args):
            saved = real(store, *args)
            if next(saves) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return saved

        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        CheckpointStore.save = save
        leaping.run()

    process = multiprocessing.get_context("fork").Process(target=dies)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    for number, path in enumerate(sorted(leaping.folder.rglob("*"))):
        os.utime(path, (4e9, 4e9) if number % 2 else (1, 1))
    clock = time.time
    leaps = itertools.cycle((86_400.0, -200_000.0, 3e9, -1e9))
    monkeypatch.setattr(time, "time", lambda: clock() + next(leaps))
    assert leaping.run().status == "passed"
    monkeypatch.undo()
    assert trace_of(leaping) == trace_of(whole)
    assert build_report(leaping.out).read_text().rstrip().endswith("</html>")
