"""Kill a process at each step, race two: never half-promoted, never twice."""

import os
import signal
import time

import pytest

from posttrain.errors import RegistryError
from posttrain.registry import JudgedSuite, Registry


def in_child(work) -> int:
    """Exit status of `work()` in a forked child: 0, 1 for a refusal, or -9 if it was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except RegistryError:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(registry: Registry, step: int) -> None:
    """SIGKILL this process at the `step`-th statement that changes or commits something."""
    seen = 0

    def trace(sql: str) -> None:
        nonlocal seen
        if sql.split()[0] in ("BEGIN", "INSERT", "UPDATE", "COMMIT", "DELETE"):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    registry._db.set_trace_callback(trace)


@pytest.fixture
def folder(tmp_path, model, lineage):
    """A registry with two versions of `words`, closed."""
    registry = Registry(tmp_path / "registry")
    for weights in "ab":
        registry.register("words", model(weights), lineage(model(weights)))
    registry.close()
    return tmp_path / "registry"


def state(folder):
    registry = Registry(folder)
    try:
        holder = registry.holder("words", "champion")
        moves = [event for event in registry.rows.events() if event.action in ("promote", "rollback")]
        held = [entry.version for entry in registry.entries() if "hold" in entry.tags]
        return (
            None if holder is None else holder.version,
            registry.alias_epoch("words", "champion"),
            [event.action for event in moves],
            held,
        )
    finally:
        registry.close()


def killed_at_every_step(folder, work, before, after) -> int:
    """Run `work` in children killed at statement 1, 2, … until one finishes; returns how many were killed."""
    for step in range(1, 40):

        def attempt(step=step):
            registry = Registry(folder)
            die_at(registry, step)
            work(registry)

        status = in_child(attempt)
        assert state(folder) in (before, after)
        if status == 0:
            assert state(folder) == after
            return step - 1
        assert status == -signal.SIGKILL
    raise AssertionError("the work never finished")


def test_a_promotion_killed_anywhere_is_whole_or_not_there(folder, passing, base):
    registry = Registry(folder)
    verdict = passing(registry.show("words", 1).digest, base)
    registry.close()
    killed = killed_at_every_step(
        folder,
        lambda registry: registry.promote("words", 1, "champion", verdict),
        before=(None, 0, [], []),
        after=(1, 1, ["promote"], []),
    )
    assert killed >= 4


def test_a_rollback_killed_anywhere_is_whole_or_not_there(folder, passing, base):
    registry = Registry(folder)
    one, two = registry.show("words", 1).digest, registry.show("words", 2).digest
    registry.promote("words", 1, "champion", passing(one, base))
    registry.promote("words", 2, "champion", passing(two, one))
    registry.close()
    killed = killed_at_every_step(
        folder,
        lambda registry: registry.rollback("words", "champion", "bad"),
        before=(2, 2, ["promote", "promote"], []),
        after=(1, 3, ["promote", "promote", "rollback"], [2]),
    )
    assert killed >= 4


def test_a_registration_killed_anywhere_is_whole_or_not_there(folder, model, lineage):
    source = model("c")
    chain = lineage(source)
    for step in range(1, 40):

        def attempt(step=step):
            registry = Registry(folder)
            die_at(registry, step)
            registry.register("words", source, chain)

        status = in_child(attempt)
        registry = Registry(folder)
        versions = [entry.version for entry in registry.entries()]
        assert versions in ([1, 2], [1, 2, 3])
        if versions[-1] == 3:
            registry.verify("words", 3)
        registry.close()
        if status == 0:
            return
    raise AssertionError("the registration never finished")


def test_two_candidates_against_one_champion_have_one_winner(folder, model, lineage, passing, base):
    """Eight processes, each with a PASS against the base, wait for one moment and promote."""
    registry = Registry(folder)
    for weights in "cdefgh":
        registry.register("words", model(weights), lineage(model(weights)))
    verdicts = {entry.version: passing(entry.digest, base) for entry in registry.entries()}
    registry.close()
    start = time.monotonic() + 0.3
    children = []
    for version, verdict in verdicts.items():
        child = os.fork()
        if child == 0:
            mine = Registry(folder)
            time.sleep(max(0.0, start - time.monotonic()))
            try:
                mine.promote("words", version, "champion", verdict)
            except RegistryError as error:
                os._exit(1 if "stale" in str(error) else 2)
            os._exit(0)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert sorted(statuses) == [0] + [1] * 7
    winner = list(verdicts)[statuses.index(0)]
    assert state(folder) == (winner, 1, ["promote"], [])


def test_processes_that_open_a_new_registry_together_all_can(tmp_path):
    start = time.monotonic() + 0.2
    children = []
    for number in range(6):
        child = os.fork()
        if child == 0:
            time.sleep(max(0.0, start - time.monotonic()))
            Registry(tmp_path / "new").record_look([JudgedSuite("s", "s", ["item"])], f"c{number}", "b")
            os._exit(0)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    registry = Registry(tmp_path / "new")
    assert registry.count_looks(JudgedSuite("s", "s", ["item"])) == 6
    registry.close()
