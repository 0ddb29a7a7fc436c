"""The simulation: by hand where it fits in a line, and the facts about who waits."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.planner.lengths import Lengths
from posttrain.planner.simulate import Failures, Setup, even_total_s, simulate


def test_one_slot_by_hand():
    """Two answers of 10 tokens at 10 tokens/s take 2 s; training 20 tokens at 20 tokens/s 1 s; nothing overlaps."""
    timeline = simulate(Setup(1, 10.0, 20.0, 2), [10], num_steps=3)
    assert timeline.total_s == pytest.approx(9.0)
    assert (timeline.step_s, timeline.trainer_idle, timeline.rollout_idle) == (
        pytest.approx(3.0),
        pytest.approx(2 / 3),
        pytest.approx(1 / 3),
    )
    assert timeline.staleness == (0, 0, 0)


def test_a_step_takes_rollout_plus_train_when_they_alternate():
    timeline = simulate(Setup(8, 50.0, 20_000.0, 8, sync_s=0.25), [2048] * 8, num_steps=5)
    assert timeline.step_s == pytest.approx(2048 / 50 + 8 * 2048 / 20_000 + 0.25)
    assert 2048 / 50 > 10 * (8 * 2048 / 20_000)  # rollout dominates at 8 × 2,048 tokens


def test_a_slower_rollout_idles_the_trainer():
    idle = [
        simulate(Setup(8, speed, 5_000.0, 8, max_staleness=1), [2048], 50).trainer_idle
        for speed in (800.0, 400.0, 100.0, 50.0)
    ]
    assert idle == sorted(idle) and idle[0] < 0.1 and idle[-1] > 0.8
    assert "give rollout more" in simulate(Setup(8, 50.0, 5_000.0, 8, max_staleness=1), [2048], 50).advice


def test_a_slower_trainer_idles_rollout():
    timeline = simulate(Setup(8, 800.0, 500.0, 8, max_staleness=1), [2048], 50)
    assert timeline.trainer_idle < 0.1 and "give training more" in timeline.advice


def test_overlap_takes_the_slower_side():
    """Rollout 4 s, training 3 s: alternating 7 s a step, one version late 4 s."""
    rates = {"num_slots": 4, "tokens_per_slot_s": 100.0, "train_tokens_s": 1600 / 3, "completions_per_step": 4}
    assert simulate(Setup(**rates), [400], 200).step_s == pytest.approx(7.0)
    assert simulate(Setup(**rates, max_staleness=1), [400], 200).step_s == pytest.approx(4.0, rel=0.02)


@pytest.mark.parametrize("limit", [0, 1, 2, 4])
def test_no_batch_is_staler_than_allowed(limit):
    lengths = Lengths(300, 2048, 1.0).draw(500)
    timeline = simulate(Setup(16, 60.0, 2_000.0, 32, max_staleness=limit), lengths, 60)
    assert max(timeline.staleness) <= limit
    assert limit == 0 or max(timeline.staleness) >= 1


def test_a_heavy_tail_wastes_slots_and_staleness_wins_some_back():
    even, tail = [500] * 512, Lengths(500, 8192, 1.2).draw(512)
    setup = {"num_slots": 32, "tokens_per_slot_s": 50.0, "train_tokens_s": 10_000.0, "completions_per_step": 32}
    assert simulate(Setup(**setup), tail, 16).rollout_idle > simulate(Setup(**setup), even, 16).rollout_idle + 0.2
    assert (
        simulate(Setup(**setup, max_staleness=2), tail, 16).total_s < 0.8 * simulate(Setup(**setup), tail, 16).total_s
    )


SETUPS = st.builds(
    Setup,
    num_slots=st.integers(1, 12),
    tokens_per_slot_s=st.floats(10, 200),
    train_tokens_s=st.floats(100, 20_000),
    completions_per_step=st.integers(1, 24),
    sync_s=st.floats(0, 3),
)


@settings(max_examples=60)
@given(SETUPS, st.integers(0, 3), st.integers(1, 4), st.integers(1, 400))
def test_equal_answers_without_failures_take_what_the_closed_form_says(setup, staleness, rounds, length):
    setup = replace(setup, max_staleness=staleness, completions_per_step=rounds * setup.num_slots)
    assert simulate(setup, [length], 7).total_s == pytest.approx(even_total_s(setup, length, 7))


@settings(max_examples=60)
@given(SETUPS, st.integers(0, 999))
def test_more_staleness_is_never_slower(setup, seed):
    lengths = Lengths(200, 1500, 1.0).draw(64, seed)
    times = [simulate(replace(setup, max_staleness=n), lengths, 8).total_s for n in (0, 1, 2, 4)]
    assert all(late <= early * (1 + 1e-9) for early, late in pairwise(times))


FAILING = Setup(32, 50.0, 5_000.0, 64, max_staleness=1, num_engines=4, failures=Failures(300.0, 60.0, 2_000.0, 120.0))


def test_failures_cost_time_and_a_seed_repeats_them():
    lengths = Lengths(400, 3000, 0.8).draw(256)
    runs = [simulate(FAILING, lengths, 40, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    healthy = simulate(replace(FAILING, failures=Failures()), lengths, 40)
    assert healthy.failed == 0 and all(run.failed > 5 and run.total_s > healthy.total_s for run in runs)


def test_without_engines_that_fail_only_the_trainer_loses_steps():
    setup = replace(FAILING, failures=Failures(trainer_every_s=200.0, trainer_back_s=50.0))
    timeline = simulate(setup, [400], 40)
    assert timeline.events == 40 * 64 + 40 and timeline.failed > 0


def test_four_thousand_devices_are_a_number_of_events_that_takes_seconds():
    """3,072 engines of 64 slots, 4 steps of 65,536 answers: as many events as answers, and a few that failures add."""
    setup = Setup(3072 * 64, 30.0, 1024 * 8_000.0, 65_536, 4, 5.0, 3072, Failures(50_000 * 3600 / 8, 600.0))
    timeline = simulate(setup, Lengths(2000, 16_000, 0.7).draw(65_536), 4)
    assert 4 * 65_536 <= timeline.events <= 4 * 65_536 * 1.05
