"""The record of groups made ahead: what was noted before a crash, wherever it strikes, is what a start goes on from."""

import shutil
import subprocess
import sys
from copy import deepcopy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from posttrain.errors import CheckpointError
from posttrain.recipes.experience.ledger import Beginning, Ledger, staleness
from posttrain.rollout.admission import Arrived, Dropped, Issued
from posttrain.types import Completion, RewardBreakdown, Rollout


def rollouts(number, version=0):
    completion = Completion((number, 7), (-0.1, -1 / 3), "stop", version, number, (version, version + 1))
    return (Rollout(completion, f"é{number}", RewardBreakdown(0.1 * number, {"right": 0.1 * number, "form": None})),)


def moves(ledger, weights=None):
    """What may come next; the engine has the weights of the next batch where they are not said."""
    state, weights = ledger.admission, ledger.admission.version if weights is None else weights
    made = state.next_batch() if weights == state.version else None
    found = [("issue", state.next_number)] * state.has_room(weights) + [("arrive", n) for n in state.pending]
    return found + [("drop", n) for n in state.arrived[:1]] + ([("batch", made)] if made else [])


def move(ledger, what, of, weights=None):
    weights = ledger.admission.version if weights is None else weights
    if what == "issue":
        ledger.write(Issued(of, weights))
    elif what == "arrive":
        ledger.write(Arrived(of), rollouts(of, weights))
    elif what == "drop":
        ledger.write(Dropped(of))
    else:
        ledger.write(of)


def seen(ledger):
    return deepcopy((ledger.admission, ledger.rollouts, ledger.batches))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_crash_at_any_byte_leaves_the_record_up_to_an_event(tmp_path, data):
    folder, beginning = tmp_path / "ledger", Beginning(data.draw(st.integers(1, 3)), data.draw(st.integers(0, 2)))
    shutil.rmtree(folder, ignore_errors=True)
    ledger = Ledger(folder, beginning)
    states = [seen(ledger)]
    for _ in range(data.draw(st.integers(0, 30))):
        move(ledger, *data.draw(st.sampled_from(moves(ledger))))
        states.append(seen(ledger))
    ledger.close()
    last = sorted(folder.glob("*.jsonl"))[-1]
    raw = last.read_bytes()
    # The first line was put in place whole.
    cut = data.draw(st.integers(raw.index(b"\n") + 1, len(raw)))
    last.write_bytes(raw[:cut])
    opened = Ledger(folder, beginning)
    assert seen(opened) in states
    if cut == len(raw):
        assert seen(opened) == states[-1]
    # It goes on, and what it adds is read again.
    move(opened, *moves(opened)[0])
    after = seen(opened)
    opened.close()
    assert seen(Ledger(folder, beginning)) == after


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3), st.integers(0, 2), st.data())
def test_no_start_trains_on_what_is_older_than_the_bound_or_newer_than_its_weights(tmp_path, bound, batch, data):
    """A trainer that dies at any moment and goes on from a checkpoint older than the newest weights and batches.

    `weights` are the engine's. What it samples while a batch is trained on is of the weights that batch was made with.
    """
    folder, beginning = tmp_path / "ledger", Beginning(batch + 1, bound)
    shutil.rmtree(folder, ignore_errors=True)
    ledger, weights, checkpoint, trained = Ledger(folder, beginning), 0, 0, {}
    for _ in range(data.draw(st.integers(1, 60))):
        state = ledger.admission
        found = moves(ledger, weights)
        found += [("save", state.version)] * (checkpoint < state.version)
        found += [("sync", state.version)] * (weights < state.version) + [("crash", None)]
        what, of = data.draw(st.sampled_from(found))
        if what == "save":
            checkpoint = of
            ledger.forget(checkpoint)
        elif what == "sync":
            weights = of
        elif what == "crash":
            ledger.close()
            last = sorted(folder.glob("*.jsonl"))[-1]
            raw = last.read_bytes()
            last.write_bytes(raw[: data.draw(st.integers(raw.index(b"\n") + 1, len(raw)))])
            ledger = Ledger(folder, beginning)
            # What is on record is trained on again before anything is asked.
            for weights in range(checkpoint, ledger.admission.version):
                check_ages(*ledger.take(weights), bound, trained)
            weights = ledger.admission.version
        else:
            move(ledger, what, of, weights)
            if what == "batch":
                check_ages(*ledger.take(of.generation), bound, trained)


def check_ages(record, groups, bound, trained):
    """Of a batch that is trained on, perhaps again: by weights that there are, none too old, and the same groups each time."""
    for number in record.numbers:
        [rollout] = groups[number]
        assert 0 <= record.generation - rollout.completion.policy_version <= bound
        assert trained.setdefault(number, (record.generation, groups[number])) == (record.generation, groups[number])


def test_a_batch_is_taken_with_what_was_dropped_for_it(tmp_path):
    ledger = Ledger(tmp_path, Beginning(2, 0))
    for what, of in (
        ("issue", 0),
        ("issue", 1),
        ("arrive", 1),
        ("drop", 1),
        ("issue", 2),
        ("arrive", 2),
        ("arrive", 0),
    ):
        move(ledger, what, of)
    ledger.write(ledger.admission.next_batch())
    ledger.close()
    opened = Ledger(tmp_path, Beginning(2, 0))
    record, found = opened.take(0)
    assert (record.numbers, record.issued, record.dropped) == ((0, 2), (0, 1, 2), (1,))
    assert found == {number: rollouts(number) for number in (0, 1, 2)}
    assert not opened.rollouts


def batches(ledger, count):
    for _ in range(count):
        while ledger.admission.has_room(ledger.admission.version):
            move(ledger, "issue", ledger.admission.next_number)
        for number in list(ledger.admission.pending)[: ledger.admission.batch]:
            move(ledger, "arrive", number)
        ledger.write(ledger.admission.next_batch())


def test_what_no_start_needs_is_forgotten_and_the_rest_goes_on(tmp_path):
    ledger = Ledger(tmp_path, Beginning(2, 1))
    batches(ledger, 6)
    ledger.forget(4)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"000-{n:08d}.jsonl" for n in (3, 4, 5, 6)]
    ledger.close()
    opened = Ledger(tmp_path, Beginning(2, 1))
    assert opened.admission == ledger.admission
    assert opened.take(4)[1] and opened.take(5)[1]
    batches(opened, 2)


def test_a_rollback_begins_anew_after_all_that_was_asked(tmp_path):
    ledger = Ledger(tmp_path, Beginning(2, 1))
    batches(ledger, 3)
    asked = ledger.admission.next_number
    ledger.close()
    again = Ledger(tmp_path, Beginning(2, 1, origin=1, version=1, next_number=4))
    assert (again.admission.version, again.admission.next_number, again.admission.issued_at) == (1, asked, {})
    assert [path.name for path in tmp_path.iterdir()] == ["001-00000001.jsonl"]


def test_a_damaged_record_is_named(tmp_path):
    ledger = Ledger(tmp_path, Beginning(2, 0))
    batches(ledger, 2)
    ledger.close()
    first, second, _ = sorted(tmp_path.iterdir())
    whole = second.read_bytes()
    second.write_bytes(whole.replace(b'"arrived": [3]', b'"arrived": [9]'))
    with pytest.raises(CheckpointError, match=r"000-00000001.jsonl:\d+: got an event that cannot follow"):
        Ledger(tmp_path, Beginning(2, 0))
    second.write_bytes(whole[:-20])
    with pytest.raises(CheckpointError, match=r"part of a line"):
        Ledger(tmp_path, Beginning(2, 0))
    second.unlink()
    with pytest.raises(CheckpointError, match=r"does not go on from the file before it"):
        Ledger(tmp_path, Beginning(2, 0))
    second.write_bytes(whole)
    with pytest.raises(CheckpointError, match=r"num_prompts_per_step: 2"):
        Ledger(tmp_path, Beginning(3, 0))
    first.unlink()
    assert Ledger(tmp_path, Beginning(2, 0)).admission.version == 2


_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from posttrain.errors import CheckpointError
from posttrain.recipes.experience.ledger import Beginning, Ledger
from posttrain.rollout.admission import Issued
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
ledger = Ledger(Path(sys.argv[1]), Beginning(2, 1))
[path] = Path(sys.argv[1]).iterdir()
ledger.write(Issued(0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, resource.RLIM_INFINITY))
try:
    ledger.write(Issued(1, 0))
except CheckpointError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ledger.write(Issued(1, 0))
    print("refused once")
"""


def test_an_event_that_a_full_disk_cuts_short_leaves_nothing_that_the_next_is_appended_to(tmp_path):
    """A file-size limit stands for the full disk: the kernel takes five bytes of the line, then refuses."""
    done = subprocess.run([sys.executable, "-c", _FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused once"
    assert list(Ledger(tmp_path, Beginning(2, 1)).admission.issued_at.items()) == [(0, 0), (1, 0)]


def test_staleness_is_said_of_each_token_in_batches():
    assert staleness(rollouts(1, version=4), generation=3, steps_per_batch=2) == [1.0, 0.5]


@pytest.mark.parametrize("made", [0, 2])
def test_groups_of_a_wider_bound_are_refused_and_not_waited_for_without_end(made, tmp_path):
    wide = Ledger(tmp_path, Beginning(1, 3))
    for number in range(4):
        move(wide, "issue", number)
        move(wide, "arrive", number)
    for _ in range(made):
        wide.write(wide.admission.next_batch())
    wide.close()
    with pytest.raises(
        CheckpointError, match=r"max_staleness: 1 lets in 2 at batch .* Set rollout\.max_staleness as it was"
    ):
        Ledger(tmp_path, Beginning(1, 1))
    assert Ledger(tmp_path, Beginning(1, 3)).admission.next_batch() is not None
