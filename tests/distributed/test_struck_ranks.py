"""One of two ranks killed, or stopped for good, while it samples, syncs or checks a sync: the others end, all start again, nothing differs."""

import json
import math
import os
import signal
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tests.distributed import struck_runner
from tests.distributed.conftest import environment
from tests.processes import all_gone
from tests.recovery.harness import is_exactly_once, ledger, leftovers, start

from posttrain.distributed.keeper import LocalKeeper
from posttrain.distributed.rank_group import RankGroup, RankProgram
from posttrain.distributed.ranks import join_ranks
from posttrain.distributed.roles import Role

ROOT = Path(__file__).parents[2]
LONGEST_S = 400.0
PATIENCE_S = 10.0
"""Of a rank with another one that says nothing."""


@dataclass
class Struck:
    """`signal` for the process that holds still at a point; when, who, and what all ranks wrote. `recovered_s`: until the next step is logged."""

    marker: Path
    metrics: Path
    signal: int
    at: float = 0.0
    pid: int = 0
    written: dict[str, bytes] = field(default_factory=lambda: {"out": b"", "err": b""})
    states: list[str] = field(default_factory=list)
    recovered_s: float = 0.0

    def look(self) -> None:
        if not self.pid and self.marker.exists():
            self.pid, self.at = int(self.marker.read_text()), time.monotonic()
            os.kill(self.pid, self.signal)
        if self.pid and not self.recovered_s and self.metrics.read_bytes().count(b"\n") > struck_runner.VERSION:
            self.recovered_s = time.monotonic() - self.at

    def write(self, stream: str, data: bytes) -> None:
        self.written[stream] += data

    def tell(self, details) -> None:
        if details["role"] == "rank-0":
            self.states.append(details["to"])


def run_ranks(yaml, point="", rank=0, number=0):
    """GRPO on two ranks of this machine as `--ray local` runs them."""
    struck = Struck(yaml.with_suffix(".held"), yaml.with_suffix("") / "stages/01-grpo/metrics.jsonl", number)
    command = ("{python}", "-m", struck_runner.__name__, point, str(rank), str(struck.marker), "grpo", str(yaml))
    roles = [Role(f"rank-{n}", struck.tell) for n in range(2)]
    until = time.monotonic() + LONGEST_S
    code = RankGroup(
        RankProgram(command, str(ROOT), environment()), roles, lambda rank: LocalKeeper(), struck.write,
        lambda: time.monotonic() > until, struck.look, math.inf, 5.0,
    ).run()  # fmt: skip
    assert code == 0, struck.written["err"][-6000:].decode()
    return struck


@pytest.fixture
def stage_yaml(write_yaml, tmp_path):
    def write(name, transfer):
        return write_yaml(
            "grpo", name=f"{name}.yaml", output_dir=str(tmp_path / name), max_steps=4, num_prompts_per_step=3, ddp_timeout=20,
            rollout={"transfer": transfer},
        )  # fmt: skip

    return write


def end_of(stage, runner):
    """What must be the same, whatever happened on the way."""
    prompts = ledger(stage)
    assert is_exactly_once(prompts)
    return {
        "digest": json.loads((stage / "result.json").read_text())["model_digest"],
        "metrics": runner.rows(stage),
        "ledger": prompts,
        "leftovers": leftovers(stage),
    }


@pytest.fixture(scope="module")
def ends():
    """Of runs that nothing happened to, by transfer."""
    return {}


@pytest.fixture
def straight(ends, stage_yaml, runner, tmp_path):
    def end(transfer):
        if transfer not in ends:
            run_ranks(stage_yaml("straight", transfer))
            ends[transfer] = end_of(tmp_path / "straight/stages/01-grpo", runner)
        return ends[transfer]

    return end


SUPERVISED = [
    ("copy", "generating", signal.SIGKILL, 0), ("copy", "generating", signal.SIGSTOP, 1),
    ("shared", "generating", signal.SIGKILL, 1), ("shared", "generating", signal.SIGSTOP, 0),
    ("copy", "saving", signal.SIGSTOP, 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("transfer", "point", "number", "rank"), SUPERVISED)
def test_a_rank_that_is_struck_costs_a_restart_and_nothing_else(
    transfer, point, number, rank, stage_yaml, straight, runner, tmp_path
):
    struck = run_ranks(stage_yaml("struck", transfer), point, rank, number)
    assert struck.pid, "the rank never came to its point"
    assert struck.states == ["restarting", "stale", "healthy", "dead"] * 2
    said = f"rank {rank} on 127.0.0.1 " + ("was killed by SIGKILL" if number == signal.SIGKILL else "stands still")
    assert said in struck.written["err"].decode()
    assert all_gone([struck.pid])
    print(f"{transfer} {point} {signal.Signals(number).name}: recovered after {struck.recovered_s:.1f} s")
    assert end_of(tmp_path / "struck/stages/01-grpo", runner) == straight(transfer)


# --- without a supervisor ------------------------------------------------------------------------------------------

STRIKES = {
    "shared generating SIGKILL": ("shared", "generating", signal.SIGKILL, 1),
    "shared generating SIGSTOP": ("shared", "generating", signal.SIGSTOP, 0),
    "shared checking SIGKILL": ("shared", "checking", signal.SIGKILL, 0),
    "shared checking SIGSTOP": ("shared", "checking", signal.SIGSTOP, 1),
    "copy generating SIGKILL": ("copy", "generating", signal.SIGKILL, 0),
    "copy generating SIGSTOP": ("copy", "generating", signal.SIGSTOP, 1),
    "copy syncing SIGKILL": ("copy", "syncing", signal.SIGKILL, 1),
    "copy syncing SIGSTOP": ("copy", "syncing", signal.SIGSTOP, 0),
    "copy saving SIGKILL": ("copy", "saving", signal.SIGKILL, 1),
    "copy saving SIGSTOP": ("copy", "saving", signal.SIGSTOP, 0),
    "copy checking SIGKILL": ("copy", "checking", signal.SIGKILL, 0),
    "copy checking SIGSTOP": ("copy", "checking", signal.SIGSTOP, 1),
}
"""How weights reach the engine, what the rank is at, by what it is struck, and which it is."""


@dataclass(frozen=True)
class Strike:
    point: str
    number: int
    rank: int


def forked_ranks(runner, keys, folder, strike=None):
    """Both ranks as children of this process, which need not import anything. Their exit codes."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    marker, children = folder.with_suffix(".held"), []
    for rank in range(2):

        def run(rank=rank):
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            if strike:
                struck_runner.arm(strike.point, strike.rank, marker)
            with join_ranks(timeout_s=PATIENCE_S) as ranks:
                assert runner.run_stage("grpo", folder, keys, ranks=ranks)

        children.append(start(run, folder.with_suffix(f".{rank}.err")))
    if strike:
        strike_at(marker, strike.number)
        survivor = 1 - strike.rank
        codes = {survivor: code_of_child(children[survivor])}
        os.kill(children[strike.rank], signal.SIGKILL)
        return codes | {strike.rank: code_of_child(children[strike.rank])}
    return {rank: code_of_child(child) for rank, child in enumerate(children)}


def strike_at(marker, number):
    until = time.monotonic() + 60
    while not marker.exists():
        assert time.monotonic() < until, "the rank never came to its point"
        time.sleep(0.01)
    os.kill(int(marker.read_text()), number)


def code_of_child(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture(scope="module")
def straight_ends():
    """Of runs that nothing happened to, by transfer."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("name", STRIKES)
def test_ranks_that_are_started_again_after_a_strike_end_the_same(
    name, straight_ends, runner, model_dir, data_dir, tmp_path
):
    transfer, *strike = STRIKES[name]
    strike = Strike(*strike)
    keys = runner.keys_of(
        "grpo", model_dir("llama"), data_dir, max_steps=3, num_prompts_per_step=3, save_steps=1,
        rollout={"transfer": transfer},
    )  # fmt: skip
    assert forked_ranks(runner, keys, tmp_path / "struck", strike) == {1 - strike.rank: 1, strike.rank: -signal.SIGKILL}
    assert not (tmp_path / "struck/result.json").exists()
    assert forked_ranks(runner, keys, tmp_path / "struck") == {0: 0, 1: 0}
    if transfer not in straight_ends:
        assert forked_ranks(runner, keys, tmp_path / "straight") == {0: 0, 1: 0}
        straight_ends[transfer] = end_of(tmp_path / "straight", runner)
    assert end_of(tmp_path / "struck", runner) == straight_ends[transfer]
