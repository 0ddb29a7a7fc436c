"""The rule of admission, over all orders in which groups may arrive."""

from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.rollout.admission import Admission, Arrived, Batched, Dropped, Issued


def fill(state, weights=None):
    """Admit all that these weights have room for: by default those of the batch that is made next."""
    weights = state.version if weights is None else weights
    while state.has_room(weights):
        state.apply(Issued(state.next_number, weights))


def test_the_capacity_is_that_of_the_bound():
    state = Admission(batch=2, staleness=1)
    fill(state)
    assert list(state.issued_at) == [0, 1, 2, 3]
    for number in (2, 0):
        state.apply(Arrived(number))
    state.apply(state.next_batch())
    assert state.version == 1 and not state.arrived
    fill(state)
    assert list(state.issued_at) == [1, 3, 4, 5]


def test_a_batch_waits_for_groups_whose_last_chance_it_is():
    state = Admission(batch=2, staleness=1)
    fill(state)
    for number in (0, 2):
        state.apply(Arrived(number))
    assert state.apply(state.next_batch()).numbers == (0, 2)
    fill(state)
    for number in (4, 5, 3):
        state.apply(Arrived(number))
    assert state.next_batch() is None
    state.apply(Arrived(1))
    assert state.next_batch() == Batched(1, (1, 3))


def test_without_staleness_the_batches_are_those_of_taking_turns():
    state = Admission(batch=3, staleness=0)
    for generation in range(4):
        fill(state)
        assert not state.has_room(state.version)
        for number in reversed(state.pending):
            state.apply(Arrived(number))
        record = state.apply(state.next_batch())
        assert record.numbers == tuple(range(3 * generation, 3 * generation + 3))


def test_what_is_dropped_is_refilled_exactly():
    state = Admission(batch=2, staleness=0)
    fill(state)
    state.apply(Arrived(1))
    assert not state.has_room(0)
    state.apply(Dropped(1))
    fill(state)
    assert list(state.issued_at) == [0, 2]
    for number in (0, 2):
        state.apply(Arrived(number))
    record = state.apply(state.next_batch())
    assert (record.numbers, record.issued, record.dropped) == ((0, 2), (0, 1, 2), (1,))


def test_until_the_next_weights_arrive_there_is_room_for_what_was_dropped_alone():
    """What the last ones sample meanwhile is as old as all that they sampled, and due with it."""
    state = Admission(batch=2, staleness=1)
    fill(state)
    for number in (0, 1, 2):
        state.apply(Arrived(number))
    assert state.apply(state.next_batch()).numbers == (0, 1)
    assert not state.has_room(weights=0)
    state.apply(Dropped(2))
    fill(state, weights=0)
    assert state.issued_at == {3: 0, 4: 0}
    fill(state, weights=1)
    for number in (5, 6, 4):
        state.apply(Arrived(number))
    assert state.next_batch() is None
    state.apply(Arrived(3))
    assert state.next_batch() == Batched(1, (3, 4))


@settings(max_examples=300)
@given(st.integers(1, 4), st.integers(0, 4), st.data())
def test_no_group_is_older_than_the_bound_lost_or_trained_twice(batch, staleness, data):
    """Whatever arrives when, whatever is dropped, passed over, or issued late, of weights that come after their batch was made.

    All of it is accounted for, and nothing waits for ever.
    """
    state, began, weights = Admission(batch, staleness), {}, 0
    trained, dropped, skipped = [], [], []
    for _ in range(data.draw(st.integers(1, 60))):
        moves = ["issue"] * state.has_room(weights) + ["arrive"] * bool(state.pending) + ["drop"] * bool(state.arrived)
        # A batch is made by a trainer whose weights the engine has.
        made = state.next_batch() if weights == state.version else None
        moves += ["batch"] * (made is not None) + ["sync"] * (weights < state.version)
        assert moves, "nothing can move"
        move = data.draw(st.sampled_from(moves))
        if move == "issue":
            number = state.next_number + data.draw(st.integers(0, 1))
            skipped += range(state.next_number, number)
            state.apply(Issued(number, weights))
            began[number] = weights
            assert state.accepted + state.running <= (staleness + weights + 1) * batch
        elif move == "arrive":
            state.apply(Arrived(data.draw(st.sampled_from(state.pending))))
        elif move == "drop":
            number = data.draw(st.sampled_from(state.arrived))
            state.apply(Dropped(number))
            dropped.append(number)
        elif move == "sync":
            weights = state.version
        else:
            record = state.apply(made)
            assert len(record.numbers) == batch
            assert all(record.generation - began[number] <= staleness for number in record.numbers)
            trained += record.numbers
        # With all that is under way there, a batch can always be made.
        if len(state.issued_at) >= batch:
            settled = Admission(**{n: getattr(state, n) for n in ("batch", "staleness", "version", "next_number")})
            settled.issued_at, settled.arrived = dict(state.issued_at), list(state.issued_at)
            assert settled.next_batch() is not None
    everything = [*trained, *dropped, *skipped, *state.issued_at]
    assert sorted(everything) == list(range(state.next_number))
