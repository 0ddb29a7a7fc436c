"""Engines of vLLM on a cluster of Ray, struck while they generate, take weights or are idle; they, or a trainer beside them, lost with their node.

No group is lost or trained on twice, and every token says of which weights it is. Where nothing is made ahead, losses are those of a run that
nothing happened to.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from tests.distributed import struck_engine_runner
from tests.distributed.conftest import environment
from tests.distributed.test_on_ray import STORE_BYTES, events, started, states
from tests.processes import all_gone, command_of, parent_of, processes, writers_of
from tests.recovery.harness import is_exactly_once, ledger, leftovers

pytestmark = [
    pytest.mark.skipif(
        not (find_spec("ray") and find_spec("vllm")), reason="Ray or vLLM is not installed: make setup-ray setup-vllm"
    ),
    pytest.mark.xdist_group("ray"),
    pytest.mark.slow,
]
ROOT = Path(__file__).parents[2]
LONGEST_S = 1500.0
STEPS, BATCH, STALENESS = 8, 2, 1
GRPO = {
    "max_steps": STEPS, "num_generations": 2, "num_prompts_per_step": BATCH, "max_completion_length": 320, "sequence_len": 480,
    "learning_rate": 3e-3, "save_total_limit": 9,
}  # fmt: skip
GENTLE = {"learning_rate": 1e-4}
"""So low that what is rounded otherwise where fewer rows are asked for together moves no token."""
ENGINE = {"engine": "vllm_server", "memory_gib": 0.1, "timeout_s": 90, "start_timeout_s": 1400}
"""Nothing here is to be taken for dead because the machine is busy: the first tokens of a server took more than 30 s there."""
LIVES = ["restarting", "stale", "healthy"]
SLOW_REWARD = """
import pathlib, time

def spread(prompts, completions, answer, **columns):
    with pathlib.Path("{place}").open("a") as scored:
        scored.write(".")
    time.sleep(3)
    return [sum(map(ord, c[0]["content"])) % 17 / 17.0 for c in completions]
"""


@pytest.fixture(scope="module")
def cluster():
    """A node of two CPUs, and two of one, where a second one is lost with what it holds."""
    found = started(num_cpus=1)
    found.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    yield found
    found.shutdown()


class Run:
    """The command on a cluster, and what can be seen of it from outside."""

    def __init__(self, cluster, yaml, plan, how):
        self.folder = yaml.parent / "run"
        self.stage = self.folder / "stages/01-grpo"
        self.marker, self.err = yaml.with_suffix(".marker"), yaml.with_suffix(".err")
        words = ["drive", plan, self.marker, "grpo", yaml, "--ray", cluster.address, *how]
        with self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", struck_engine_runner.__name__, *map(str, words)],
                stdout=subprocess.DEVNULL, stderr=err, env=environment(), cwd=ROOT,
            )  # fmt: skip

    def until(self, seen):
        """What `seen` gives once that is something."""
        until = time.monotonic() + LONGEST_S
        while not (found := seen()):
            assert self.process.poll() is None, self.err.read_text()[-4000:]
            assert time.monotonic() < until
            time.sleep(0.01)
        return found

    def at(self, version, find):
        """What `find` gives, once the point of that version is reached. Found before: a look at all processes takes longer than some answers."""
        self.until(lambda: self.leases(0))
        found = find()
        self.until(Path(f"{self.marker}.{version}").exists)
        return found

    def struck(self, version, strike):
        """Strikes the engine at the point of that version; how long until a later start of it is healthy and a further step is logged."""
        before = self.until(lambda: self.leases(0))[-1]
        strike(self.at(version, self.servers))
        Path(f"{self.marker}.{version}.struck").write_text("")
        return self.recovered(lambda: self.leases(0)[-1] > before)

    def recovered(self, is_back):
        began, steps = time.monotonic(), self.steps()
        self.until(lambda: is_back() and self.steps() > steps)
        return time.monotonic() - began

    def steps(self):
        metrics = self.stage / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def changes(self, engine):
        told = events(self.folder) if (self.folder / "events.jsonl").exists() else []
        return [event for event in told if event.get("role") == f"engine-{engine}" and "to" in event]

    def lives(self, engine):
        return states(self.changes(engine))

    def leases(self, engine):
        """Those of its starts that were healthy."""
        return [change["lease"] for change in self.changes(engine) if change["to"] == "healthy"]

    def servers(self, log="vllm_server.log"):
        """The processes of vLLM that write this log."""
        return writers_of(self.stage / log)

    def ranks(self):
        found = {}
        for pid in processes():
            words = command_of(pid).split(b"\0")
            if (
                str(self.marker).encode() in words
                and b"rank" in words
                and b"posttrain.supervised" not in command_of(pid)
            ):
                with suppress(OSError):
                    variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                    found[int(next(v for v in variables if v.startswith(b"RANK="))[5:])] = pid
        return found

    def done(self):
        self.process.wait(LONGEST_S)
        assert self.process.returncode == 0, self.err.read_text()[-6000:]
        return self.err.read_text()


def strike_all(pids, number):
    assert pids
    for pid in pids:
        os.kill(pid, number)


@pytest.fixture
def run(cluster, write_yaml):
    running = []

    def start(plan, *how, **keys):
        running.append(Run(cluster, write_yaml("grpo", architecture="qwen3", **GRPO | keys), plan, how))
        return running[-1]

    yield start
    for one in running:
        if one.process.poll() is None:
            one.process.terminate()
            one.process.wait(LONGEST_S)


def check_whole(run, runner):
    """Every step once, on an engine that had its weights."""
    rows = runner.rows(run.stage)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["sync/canary_gap"] < 1e-4 for row in rows)
    assert leftovers(run.stage) == []


def check_ahead(run):
    """Of groups made ahead none is lost or in two batches, none is older than allowed, and no token of weights to come."""
    lines = [json.loads(line) for path in sorted((run.stage / "rollouts").glob("*.jsonl")) for line in path.open()]
    arrived = {line["arrived"][0]: line["rollouts"] for line in lines if "arrived" in line}
    assert len(arrived) == sum("arrived" in line for line in lines)
    batches = [tuple(line["batched"]) for line in lines if "batched" in line]
    assert [generation for generation, _ in batches] == list(range(STEPS))
    issued = [line["issued"][0] for line in lines if "issued" in line]
    trained = [number for _, numbers in batches for number in numbers]
    assert sorted(issued) == list(range(len(issued)))
    assert len(trained) == len(set(trained)) == STEPS * BATCH
    assert set(trained) <= set(arrived) <= set(issued)
    for generation, numbers in batches:
        for rollout in (rollout for number in numbers for rollout in arrived[number]):
            completion = rollout["completion"]
            versions = completion["policy_versions"] or [completion["policy_version"]]
            assert versions == sorted(versions)
            assert generation - STALENESS <= versions[0] <= versions[-1] <= generation


@pytest.fixture(scope="module")
def straights():
    """The end of the run that nothing happened to, once it was made."""
    return []


@pytest.fixture
def straight(straights, write_yaml, tmp_path, runner):
    """A call that makes it: in one process, without Ray."""

    def end():
        if not straights:
            path = write_yaml(
                "grpo", name="straight.yaml", architecture="qwen3", output_dir=str(tmp_path / "straight"), rollout=ENGINE,
                **GRPO | GENTLE,
            )  # fmt: skip
            words = [sys.executable, "-m", "posttrain.cli.app", "grpo", str(path)]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=environment(), cwd=ROOT, timeout=LONGEST_S)
            stage = tmp_path / "straight/stages/01-grpo"
            straights.append((runner.rows(stage), ledger(stage)))
        return straights[0]

    return end


def check_like_straight(run, straight, runner, gap=0.0):
    """The prompts of the run that nothing happened to, each once, and its metrics: loss, gradient, reward, lengths. `gap`: of several ranks."""
    expected, prompts = straight()
    assert ledger(run.stage) == prompts and is_exactly_once(prompts)
    found = runner.rows(run.stage)
    print("losses apart by", max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True)))
    assert found == [pytest.approx(row, abs=gap, rel=gap) for row in expected]


KILL, STOP = signal.SIGKILL, signal.SIGSTOP
STRIKES = [("syncing", 1, KILL), ("syncing", 2, STOP), ("generating", 4, STOP), ("generating", 6, KILL)]
"""By the version of the weights. A trainer that holds still for the next strike has logged the step that shows the recovery from this one."""


def test_an_engine_that_is_struck_comes_back_with_the_weights(run, runner):
    """Four times in one run, at weights of these versions: killed, and standing still for good."""
    one = run(plan_of(STRIKES), rollout=ENGINE | {"max_staleness": STALENESS, "pause": "keep", "max_restarts": 4})
    strike_in_turn(one, STRIKES)
    err = one.done()
    # Who samples and who brings weights find out at the same time, and the first one says it.
    assert sum(err.count(f"vLLM's server could not {doing}") for doing in ("generate", "take its weights")) == 4
    assert "it is started again (0 more times at most)" in err
    assert one.lives(0)[:15] == [*LIVES, *["dead", *LIVES] * 4][:15]
    check_whole(one, runner)
    check_ahead(one)


def plan_of(strikes):
    return ",".join(f"{point}:{version}" for point, version, _ in strikes)


def strike_in_turn(one, strikes):
    for point, version, how in strikes:
        took = one.struck(version, lambda pids, how=how: strike_all(pids, how))
        print(f"engine {point} {how.name}: recovered after {took:.0f} s")


STRIKES_OF_ONE_BATCH = [("idle", 2, STOP), ("generating", 4, KILL)]


def test_an_engine_that_is_struck_where_nothing_is_made_ahead_changes_no_loss(run, straight, runner):
    """Standing still while nobody asks it, and killed with a batch on its way."""
    one = run(plan_of(STRIKES_OF_ONE_BATCH), rollout=ENGINE, **GENTLE)
    strike_in_turn(one, STRIKES_OF_ONE_BATCH)
    err = one.done()
    assert err.count("vLLM's server could not take its weights") == 1
    assert err.count("vLLM's server could not generate") == 1
    assert one.lives(0)[:11] == [*LIVES, *["dead", *LIVES] * 2]
    check_whole(one, runner)
    check_like_straight(one, straight, runner)


def test_an_engine_that_is_lost_with_its_node_is_placed_on_another(cluster, run, runner):
    """SIGKILL of the raylet, which what runs there does not see: the server answers on, and is not believed once the cluster has noticed.

    A group is held with one of its completions taken, and the trainer before an update, until the cluster has.
    """
    how = ("--worker", "cpus=2,placement=strict_spread")
    one = run("taking:1,idle:2", *how, rollout=ENGINE | {"max_staleness": STALENESS, "pause": "keep"})
    lost = []
    try:
        servers = one.at(2, one.servers)
        one.until(Path(f"{one.marker}.1").exists)
        began = time.monotonic()
        lost.append(node_lost_with(servers[0], cluster))
        one.until(lambda: one.lives(0)[-1] == "dead")
        print(f"the end of the engine's node was seen after {time.monotonic() - began:.0f} s")
        Path(f"{one.marker}.2.struck").write_text("")
        one.until(lambda: "it is started again" in one.err.read_text())
        Path(f"{one.marker}.1.struck").write_text("")
        one.recovered(lambda: one.leases(0)[-1] > 1)
        took = time.monotonic() - began
        err = one.done()
    finally:
        for node in lost:
            cluster.remove_node(node, allow_graceful=False)
            cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)
    print(f"engine's node generating SIGKILL: recovered after {took:.0f} s")
    assert "engine-0 answered after it was lost: what it said is not taken (1 times so far)" in err
    assert "it is started again (1 more times at most)" in err
    assert one.lives(0)[:7] == [*LIVES, "dead", *LIVES]
    check_whole(one, runner)
    check_ahead(one)


def node_lost_with(pid, cluster):
    """The node whose raylet is above this process, killed. Until somebody waits for that one, its workers take it for alive."""
    raylets = {node.all_processes["raylet"][0].process.pid: node for node in cluster.worker_nodes}
    while pid not in raylets:
        pid = parent_of(pid)
        assert pid > 1, "no raylet of a node that may be lost"
    os.kill(pid, signal.SIGKILL)
    return raylets[pid]


def gone_after(pids):
    began = time.monotonic()
    assert all_gone(pids, within_s=120)
    return time.monotonic() - began


def test_a_trainer_that_is_lost_with_its_node_goes_on_elsewhere_with_its_engine_warm(cluster, run, straight, runner):
    """SIGKILL of the raylet under it while it takes completions; the node that takes its place comes later."""
    lost = [cluster.add_node(num_cpus=3, object_store_memory=STORE_BYTES)]
    one = run("taking:2", "--worker", "cpus=3", rollout=ENGINE, **GENTLE)
    try:
        warm, rank = one.at(2, lambda: (one.servers(), one.ranks()[0]))
        began = time.monotonic()
        assert node_lost_with(rank, cluster) is lost[0]
        lost[0].all_processes["raylet"][0].process.wait()
        print(f"its trainer went on for {gone_after([rank]):.1f} s")
        lost.append(cluster.add_node(num_cpus=3, object_store_memory=STORE_BYTES))
        one.until(lambda: one.steps() > 2)
        print(
            f"trainer's node generating SIGKILL: recovered after {time.monotonic() - began:.0f} s, its engine kept warm"
        )
        assert one.servers() == warm
        err = one.done()
    finally:
        for node in lost:
            cluster.remove_node(node, allow_graceful=False)
    assert "rank 0 on" in err and "the ranks start again from the last checkpoint (2 more times at most)" in err
    assert one.lives(0)[:5] == [*LIVES, "stale", "healthy"]
    check_whole(one, runner)
    check_like_straight(one, straight, runner)


def test_two_ranks_with_two_engines_lose_one_of_each(run, straight, runner, tmp_path):
    """First an engine while it generates, whose groups the other one answers; then a rank, twice: the other engine is kept warm."""
    scored = tmp_path / "scored"
    (tmp_path / "slow.py").write_text(SLOW_REWARD.format(place=scored))
    one = run(
        "generating:1,syncing:5",
        "--workers",
        2,
        rollout=ENGINE | {"replicas": 2},
        **GENTLE,
        reward_funcs=[f"{tmp_path / 'slow.py'}:spread"],
    )
    strike_all(one.at(1, lambda: one.servers("vllm_server-0.log")), KILL)
    print(f"one of two engines of two ranks, generating SIGKILL: recovered after {one.recovered(lambda: True):.0f} s")
    begun = scored.stat().st_size
    one.until(lambda: scored.stat().st_size > begun)  # no update is on its way while completions are scored
    warm = one.servers("vllm_server-1.log")
    os.kill(one.ranks()[1], KILL)
    print(
        f"one of two ranks, scoring SIGKILL: recovered after {one.recovered(lambda: True):.0f} s, an engine kept warm"
    )
    assert one.servers("vllm_server-1.log") == warm
    one.until(Path(f"{one.marker}.5").exists)
    os.kill(one.ranks()[1], KILL)
    print(f"one of two ranks, syncing SIGKILL: recovered after {one.recovered(lambda: True):.0f} s")
    err = one.done()
    assert "it is started again (1 more times at most)" in err
    assert "rank 1 on" in err and err.count("was killed by SIGKILL; the ranks start again") == 2
    assert one.lives(1)[:7] == [*LIVES, *["stale", "healthy"] * 2]
    check_whole(one, runner)
    check_like_straight(one, straight, runner, gap=1e-5)
