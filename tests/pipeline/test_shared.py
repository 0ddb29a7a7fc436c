"""Two pipelines on one registry and one cache: killed meanwhile, or both at the promotion at once."""

import json
import multiprocessing
import os
import random
import signal
import time
from functools import wraps
from pathlib import Path

import pytest

from posttrain.files import digest_bytes
from posttrain.registry.registry import Registry

FORK = multiprocessing.get_context("fork")
SFT = {"datasets": [{"path": "sft.jsonl"}], "learning_rate": 1e-2, "max_steps": 4, "per_device_train_batch_size": 8,
       "lr_scheduler_type": "constant", "save_steps": 1}  # fmt: skip
DPO = {"datasets": [{"path": "pairs.jsonl"}], "learning_rate": 1e-4, "max_steps": 4, "per_device_train_batch_size": 4,
       "save_steps": 1}  # fmt: skip
NOT_WORSE = {"baseline": "alias:champion", "guards": [{"suite": "yes", "margin": 0.4}]}


@pytest.fixture
def two(make_project, tmp_path, monkeypatch):
    """`two(stages)`: two projects of other seeds that promote to one alias of one registry, and share an empty cache."""
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    register = {"name": "yes", "registry": str(tmp_path / "registry")}

    def make(stages):
        return [
            make_project(tmp_path / name, stages, gate=NOT_WORSE, register=register, seed=seed)
            for name, seed in (("one", 1), ("two", 2))
        ]

    return make


def start(project, at_promotion=None):
    """A forked process that runs the project and exits with its code; before it promotes, `at_promotion()`."""

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        if at_promotion is not None:
            real = Registry.promote
            Registry.promote = wraps(real)(lambda *args, **kwargs: (at_promotion(), real(*args, **kwargs))[1])
        os._exit(project.run().exit_code)

    process = FORK.Process(target=work)
    process.start()
    return process


def ended(process) -> int:
    process.join(240)
    assert process.exitcode in (0, 5), process.exitcode
    return process.exitcode


def alone(project, folder: Path):
    """What the same project makes with a registry of its own: digests of its stages."""
    copy = project.copy_to(folder)
    copy.values["register"] = {"name": "yes"}
    assert copy.run().status == "passed"
    return [entry.output_digest for entry in copy.state.stages]


def check_together(projects, models, tmp_path):
    """Each run made what it makes alone, each model is registered once and whole, and the alias went from one to the other."""
    assert [[entry.output_digest for entry in project.state.stages] for project in projects] == models
    book = Registry(tmp_path / "registry")
    try:
        entries = book.entries()
        assert sorted(entry.digest for entry in entries) == sorted(digests[-1] for digests in models)
        for entry in entries:
            book.verify(entry.name, entry.version)
        events = [(event.action, event.version) for event in book.rows.events()]
        assert sorted(version for action, version in events if action == "register") == [1, 2]
        promoted = [event for event in book.rows.events() if event.action == "promote"]
        first, second = (event.version for event in promoted)
        assert [event.details["from"] for event in promoted] == [None, first]
        assert {first, second} == {1, 2}
        assert (book.holder("yes", "champion").version, book.alias_epoch("yes", "champion")) == (second, 2)
    finally:
        book.close()
    metas = [path for path in (tmp_path / "cache").glob("*/*/meta.json") if not path.parent.name.startswith(".")]
    assert metas
    for path in metas:
        for name, digest in json.loads(path.read_text())["checksums"].items():
            assert digest_bytes((path.parent / name).read_bytes()) == digest


def kill_until_done(projects, kills: int, longest_s: float, chance: random.Random) -> int:
    """Both run at once; each is killed at instants drawn anew, then goes to its end. Returns how many kills struck."""
    left, struck = dict.fromkeys(range(len(projects)), kills), 0
    running = {place: start(project) for place, project in enumerate(projects)}
    due = {place: time.monotonic() + chance.uniform(0, longest_s) for place in running}
    while running:
        time.sleep(0.005)
        for place, process in list(running.items()):
            if left[place] and time.monotonic() > due[place] and process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            if process.is_alive():
                continue
            process.join()
            if process.exitcode == -signal.SIGKILL:
                left[place], struck = left[place] - 1, struck + 1
                due[place] = time.monotonic() + chance.uniform(0, longest_s)
            elif ended(process) == 0:
                del running[place]
                continue
            # Killed, or refused since the other one took the alias meanwhile: the next start judges against that one.
            running[place] = start(projects[place])
    return struck


def test_two_pipelines_killed_on_one_registry_and_one_cache_end_as_alone(two, tmp_path):
    projects = two([{"sft": SFT}])
    began = time.monotonic()
    models = [alone(project, tmp_path / f"alone-{place}") for place, project in enumerate(projects)]
    longest_s = time.monotonic() - began
    assert kill_until_done(projects, 3, longest_s / 2, random.Random(1)) >= 2
    check_together(projects, models, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_two_longer_pipelines_killed_many_times_end_as_alone(two, tmp_path, seed):
    projects = two([{"sft": SFT}, {"dpo": DPO}])
    began = time.monotonic()
    models = [alone(project, tmp_path / f"alone-{place}") for place, project in enumerate(projects)]
    longest_s = time.monotonic() - began
    # A start has less left to do than the one before, so instants over a whole run would mostly come too late; how many of
    # the 20 strike depends on what else the machine does.
    struck = kill_until_done(projects, 10, longest_s / 6, random.Random(seed))
    check_together(projects, models, tmp_path)
    assert struck >= 6


def test_of_two_pipelines_at_one_promotion_one_wins_and_the_other_is_judged_anew(two, tmp_path):
    projects = two([{"sft": SFT}])
    barrier = FORK.Barrier(2)
    racing = [start(project, barrier.wait) for project in projects]
    codes = [ended(process) for process in racing]
    assert sorted(codes) == [0, 5]
    winner, loser = projects if codes[0] == 0 else projects[::-1]
    assert "the verdict is stale, gate against the present holder" in loser.state.registered["refused"]
    again = loser.run()
    assert (again.exit_code, again.promoted) == (0, True)
    assert loser.state.gates[-1].baseline == winner.state.stages[-1].output_digest
    check_together(projects, [[e.output_digest for e in project.state.stages] for project in projects], tmp_path)
