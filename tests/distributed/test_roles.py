"""What is known of a role: a pure state machine, whatever is learnt in whatever order."""

from hypothesis import given
from hypothesis import strategies as st

from posttrain.distributed.roles import MISSED_LIMIT, Role, RoleHealth, RoleSign, RoleState, next_state

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
        if before.health is RoleHealth.DEAD or after.health is RoleHealth.DEAD:
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
        "STARTING STARTED SYNCED MISSED ANSWERED MISSED MISSED MISSED ANSWERED STARTING STARTED MISSED ANSWERED SYNCED"
    )
    found = [str(state.health) for state in walked(RoleSign[name] for name in signs.split())]
    assert found == [
        "dead", "restarting", "stale", "healthy", "suspect", "healthy", "suspect", "suspect", "dead", "dead", "restarting", "stale",
        "suspect", "stale", "healthy",
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
