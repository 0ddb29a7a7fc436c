"""Ranks on a real cluster of Ray: two nodes on this machine, each with a raylet of its own."""

import json
import os
import time
from contextlib import closing, suppress
from importlib.util import find_spec

import pytest
from tests.distributed.test_rank_group import (  # noqa: F401 - one is a fixture
    await_steps,
    check_killed,
    check_like_straight,
    done,
    kill_rank,
    workers,
)
from tests.processes import all_gone, command_of, processes

from posttrain.distributed.engine_roles import EngineRoles, engine_name
from posttrain.distributed.on_ray import RayCluster
from posttrain.distributed.roles import Role, RoleLateError, RoleLostError, RoleProgram, RoleResources

pytestmark = [
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: make setup-ray"),
    pytest.mark.xdist_group("ray"),
]
STORE_BYTES = 100 << 20


def _started(num_cpus):
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=num_cpus, object_store_memory=STORE_BYTES)
    return cluster


def started(num_cpus=2):
    """A head of two CPUs and a node. A cluster that does not start within Ray's own limit is started once more."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "120"}
    try:
        return _started(num_cpus)
    except Exception as error:  # noqa: BLE001 - Ray raises a bare one
        assert "timed out during startup" in str(error), error
        return _started(num_cpus)


@pytest.fixture(scope="module")
def cluster():
    found = started()
    yield found
    found.shutdown()


def events(folder):
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_two_nodes_take_the_steps_of_torchrun_to_the_bit(cluster, workers, torchrun, write_yaml, runner, tmp_path):  # noqa: F811
    how = ("--workers", 2, "--worker", "placement=strict_spread")
    out, _ = done(workers(cluster.address, "sft", write_yaml("sft", max_steps=3), *how))
    assert "model   " in out
    torchrun(2, "sft", write_yaml("sft", name="other.yaml", max_steps=3, output_dir=str(tmp_path / "other")))
    mine, theirs = tmp_path / "run/stages/01-sft", tmp_path / "other/stages/01-sft"
    assert [row["loss"] for row in runner.rows(mine)] == [row["loss"] for row in runner.rows(theirs)]
    digests = [json.loads((stage / "result.json").read_text())["model_digest"] for stage in (mine, theirs)]
    assert digests[0] == digests[1]
    told = [(event["role"], event["to"]) for event in events(tmp_path / "run") if event["kind"] == "role"]
    assert [to for role, to in told if role == "rank-1"] == ["restarting", "stale", "healthy", "dead"]


def test_more_workers_than_the_cluster_holds_is_one_line_at_once(cluster, workers, write_yaml, tmp_path):  # noqa: F811
    _, err = done(workers(cluster.address, "sft", write_yaml("sft"), "--workers", 9), code=64)
    assert err.count("\n") == 1
    assert (
        "9 processes were asked for (9 of 1 CPU; pack), and the cluster has room for 4: 2 node(s) with 2 CPU; 2 CPU"
        in err
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("127.0.0.1:9", ":9 ([Errno 111] Connection refused); start a cluster with: ray start --head"),
        ("ray://127.0.0.1:10001", "expected auto, local, or HOST:PORT of a cluster's head"),
    ],
)
def test_an_address_without_a_cluster_is_one_line(address, said, workers, write_yaml):  # noqa: F811
    _, err = done(workers(address, "sft", write_yaml("sft")), code=64)
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_a_restart_and_nothing_twice(cluster, workers, write_yaml, runner, tmp_path):  # noqa: F811
    check_killed(workers(cluster.address, "sft", write_yaml("sft"), "--workers", 2), tmp_path / "run", kill_rank)
    check_like_straight(workers, write_yaml, runner, tmp_path)


@pytest.mark.slow
def test_a_node_that_is_lost_is_replaced_by_another_with_room(cluster, workers, write_yaml, runner, tmp_path):  # noqa: F811
    """SIGKILL of a raylet: the rank there goes on for seconds without one, and writes nothing once another has its place."""
    extra = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
    how = ("--workers", 3, "--worker", "placement=strict_spread")
    process = workers(cluster.address, "sft", write_yaml("sft", max_steps=40), *how)
    spare = None
    try:
        await_steps(tmp_path / "run", 2, process)
        for one in extra.all_processes["raylet"]:
            one.process.kill()
        spare = cluster.add_node(num_cpus=2, object_store_memory=STORE_BYTES)
        _, err = done(process)
    finally:
        for node in filter(None, (spare, extra)):
            cluster.remove_node(node, allow_graceful=False)
    assert "is lost" in err
    steps = [row["step"] for row in runner.rows(tmp_path / "run/stages/01-sft")]
    assert steps == list(range(1, 41))


@pytest.mark.slow
def test_what_a_lost_node_kept_ends_and_another_node_keeps_an_engine_under_its_name(cluster, tmp_path):
    """SIGKILL of the raylet under the keeper of an engine: what it served goes, and who looks for it by its name finds the next one."""
    extra = [cluster.add_node(num_cpus=3, object_store_memory=STORE_BYTES) for _ in range(2)]
    joined, told = RayCluster(cluster.address, "kept"), []
    program = RoleProgram(
        ("{python}", "-c", "import time; time.sleep(600)", str(tmp_path)), str(tmp_path), {}, token="t"
    )
    place = RoleResources(cpus=3)
    try:
        joined.reserve([place], "pack")
        make = lambda number: joined.keeper(0, engine_name(number), place, 120.0)  # noqa: E731
        with closing(EngineRoles([Role(engine_name(0), told.append)], make, 10.0, max_restarts=3)) as roles:
            kept = joined.named(engine_name(0))
            kept.node  # noqa: B018 - it has its place
            kept.call("serve", program)
            kept.call("synced", 1)
            looked_until(roles, lambda: states(told) == ["restarting", "stale", "healthy"])
            lost = next(node for node in extra if node.node_id == kept.node.name)
            served = looked_until(roles, lambda: [pid for pid in processes() if is_served(command_of(pid), tmp_path)])
            raylet = lost.all_processes["raylet"][0].process
            raylet.kill()
            raylet.wait()  # its workers take one that nobody waited for to be alive
            began = time.monotonic()
            looked_until(roles, lambda: states(told)[-1] == "dead")
            print(f"the node's end was seen after {time.monotonic() - began:.1f} s")
            assert all_gone(served)
            again = looked_until(roles, lambda: found_again(joined, kept.node.name))
            again.call("serve", program)
            again.call("synced", 1)
            looked_until(roles, lambda: states(told)[-1] == "healthy")
            print(f"another node served after {time.monotonic() - began:.1f} s")
        assert states(told) == ["restarting", "stale", "healthy", "dead", "restarting", "stale", "healthy"]
    finally:
        joined.close()
        for node in extra:
            cluster.remove_node(node, allow_graceful=False)


def states(told):
    """What became of a role, without the deadlines that it missed while the machine was busy."""
    found = [details["to"] for details in told if details.get("to", "suspect") != "suspect"]
    return [state for state, before in zip(found, ["", *found], strict=False) if state != before]


def looked_until(roles, seen):
    until = time.monotonic() + 300
    while not (found := seen()):
        assert time.monotonic() < until
        roles.look()
        time.sleep(0.1)
    return found


def found_again(joined, lost):
    """The keeper on another node than the lost one."""
    with suppress(RoleLateError, RoleLostError):
        kept = joined.named(engine_name(0))
        return kept if kept.take(kept.ask("node"), 1.0).name != lost else None


def is_served(command, folder):
    return b"time.sleep(600)" in command and str(folder).encode() in command and b"posttrain.supervised" not in command
