"""What is known of a role: a pure state machine, whatever is learnt in whatever order, and whoever watches it."""

import time

from hypothesis import given
from hypothesis import strategies as st

from posttrain.distributed.engine_roles import EngineRoles
from posttrain.distributed.rank_group import RankGroup, RankProgram
from posttrain.distributed.roles import (
    MISSED_LIMIT,
    Role,
    RoleHealth,
    RoleLateError,
    RoleLostError,
    RoleNode,
    RoleReport,
    RoleSign,
    RoleState,
    next_state,
)  # fmt: skip

SIGNS = st.lists(st.sampled_from(RoleSign), max_size=40)


def walked(signs):
    states = [RoleState()]
    for sign in signs:
        states.append(next_state(states[-1], sign))
    return states


@given(SIGNS)
def test_a_role_is_healthy_only_after_a_sync_of_its_present_start(signs):
    synced = False
    for sign, before, after in zip(signs, walked(signs), walked(signs)[1:], strict=False):
        if before.health is RoleHealth.DEAD or after.health is RoleHealth.DEAD or sign is RoleSign.HANDED_ON:
            synced = False
        synced |= sign is RoleSign.SYNCED and before.health is RoleHealth.STALE
        assert after.health is not RoleHealth.HEALTHY or synced


@given(SIGNS)
def test_only_a_start_brings_a_dead_role_back_and_under_a_new_lease(signs):
    for sign, before, after in zip(signs, walked(signs), walked(signs)[1:], strict=False):
        assert after.lease == before.lease + (before.health is RoleHealth.DEAD and sign is RoleSign.STARTING)
        if before.health is RoleHealth.DEAD and after.health is not RoleHealth.DEAD:
            assert (sign, after.health) == (RoleSign.STARTING, RoleHealth.RESTARTING)


@given(SIGNS)
def test_a_role_that_misses_its_deadlines_is_dead_after_as_many_as_may_be_missed(signs):
    state = walked(signs)[-1]
    for _ in range(MISSED_LIMIT):
        state = next_state(state, RoleSign.MISSED)
    assert state.health is RoleHealth.DEAD


def test_the_life_of_a_role():
    signs = (
        "STARTING STARTED SYNCED MISSED ANSWERED MISSED MISSED MISSED ANSWERED STARTING STARTED MISSED ANSWERED SYNCED HANDED_ON "
        "ANSWERED SYNCED"
    )
    found = [str(state.health) for state in walked(RoleSign[name] for name in signs.split())]
    assert found == [
        "dead", "restarting", "stale", "healthy", "suspect", "healthy", "suspect", "suspect", "dead", "dead", "restarting", "stale",
        "suspect", "stale", "healthy", "stale", "stale", "healthy",
    ]  # fmt: skip


def test_what_an_earlier_start_delivers_is_dropped_counted_and_told():
    events = []
    role = Role("engine 0", events.append)
    for sign in (RoleSign.STARTING, RoleSign.STARTED, RoleSign.ENDED, RoleSign.STARTING):
        role.see(sign)
    assert role.takes(2)
    assert not role.takes(1)
    assert role.dropped == 1
    assert events[-1] == {"role": "engine 0", "dropped": 1, "lease": 1, "present": 2}
    role.see(RoleSign.ENDED)
    assert not role.takes(2)


# --- as it is watched ----------------------------------------------------------------------------------------------

REPORTS = st.builds(
    RoleReport, lease=st.integers(0, 3), code=st.sampled_from([None, None, None, -9]), version=st.integers(-1, 1),
    is_idle=st.sampled_from([False, False, True]), asked=st.integers(0, 3),
)  # fmt: skip
ANSWERS = st.lists(st.one_of(REPORTS, st.sampled_from([RoleLateError("late"), RoleLostError("lost")])), max_size=20)


class Scripted:
    """A keeper that answers what is next, and nothing of its own."""

    node = RoleNode("here", "127.0.0.1", 1)

    def __init__(self):
        self.next = None

    def ask(self, method, *arguments):
        return None

    def take(self, asked, timeout_s=0.0):
        if isinstance(self.next, Exception):
            raise self.next
        return self.next

    def kill(self):
        pass


class Synced:
    """What is told of a role: it is healthy only if, since it was started, it was heard to have the state."""

    def __init__(self):
        self.heard = False

    def tell(self, details):
        if details.get("to") == "healthy":
            assert self.heard
        if details.get("to") in ("dead", "restarting"):
            self.heard = False

    def hear(self, role, answer, sees):
        """`sees` takes the answer; what it says of a version counts for the start that it is of."""
        before = role.state
        if isinstance(answer, RoleReport) and answer.version >= 0:
            self.heard |= answer.lease == before.lease and before.health is not RoleHealth.DEAD
        sees()


@given(ANSWERS)
def test_a_rank_is_healthy_only_once_its_present_start_said_that_it_has_the_state(answers):
    told, keeper = Synced(), Scripted()
    role = Role("rank-0", told.tell)
    group = RankGroup(
        RankProgram(("true",), ".", {}), [role], lambda rank: keeper, lambda *_: None, lambda: False, lambda: None, 0.0, 0.0
    )  # fmt: skip
    group._start()
    for answer in answers:
        keeper.next = answer
        told.hear(role, answer, lambda: group._look(0, None, time.monotonic()))
        if role.state.health is RoleHealth.DEAD:
            group._codes, keeper.next = {}, None
            group._start()
    keeper.next = RoleReport(role.state.lease, version=0)
    told.hear(role, keeper.next, lambda: group._look(0, None, time.monotonic()))
    assert role.state.health is RoleHealth.HEALTHY


class OfEngine(Synced):
    """A trainer starts an engine anew: its first report tells of the start and of the sync at once."""

    def hear(self, role, answer, sees):
        self.said = isinstance(answer, RoleReport) and answer.version >= 0
        self.synced = self.said or role.state.synced
        sees()

    def tell(self, details):
        assert details.get("to") != "healthy" or self.synced


@given(ANSWERS)
def test_an_engine_is_healthy_only_once_a_trainer_said_that_it_has_the_weights(answers):
    told, keeper = OfEngine(), Scripted()
    role = Role("engine-0", told.tell)
    roles = EngineRoles([role], lambda number: keeper, -1.0, max_restarts=100)
    for answer in answers:
        keeper.next = answer
        told.hear(role, answer, roles.look)
    lease = roles._lease[0] + 1
    keeper.next = RoleReport(lease, version=0, asked=1)
    told.hear(role, keeper.next, roles.look)
    assert role.state.health is RoleHealth.HEALTHY
