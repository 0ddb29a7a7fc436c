"""The simulation: by hand where it fits in a line, and the facts about who waits."""

import pytest

from posttrain.planner.simulate import Setup, lognormal_lengths, simulate


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
    lengths = lognormal_lengths(300, 1.0, 2048, 500)
    timeline = simulate(Setup(16, 60.0, 2_000.0, 32, max_staleness=limit), lengths, 60)
    assert max(timeline.staleness) <= limit
    assert limit == 0 or max(timeline.staleness) >= 1


def test_a_heavy_tail_wastes_slots_and_staleness_wins_some_back():
    even, tail = [500] * 512, lognormal_lengths(500, 1.2, 8192, 512)
    setup = {"num_slots": 32, "tokens_per_slot_s": 50.0, "train_tokens_s": 10_000.0, "completions_per_step": 32}
    assert simulate(Setup(**setup), tail, 16).rollout_idle > simulate(Setup(**setup), even, 16).rollout_idle + 0.2
    assert (
        simulate(Setup(**setup, max_staleness=2), tail, 16).total_s < 0.8 * simulate(Setup(**setup), tail, 16).total_s
    )


def test_lengths_have_the_mean_asked_for_and_a_limit():
    lengths = lognormal_lengths(400, 0.6, 100_000, 20_000, seed=3)
    assert sum(lengths) / len(lengths) == pytest.approx(400, rel=0.03)
    assert max(lognormal_lengths(400, 2.0, 1000, 1000)) == 1000
    assert lognormal_lengths(400, 0.6, 999, 10, seed=1) == lognormal_lengths(400, 0.6, 999, 10, seed=1)
