"""Forecasts of a reward: curves whose end is known, noise that neighbours share, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from posttrain.planner.reward_curve import MIN_ROWS, forecast_reward

RECORDED = json.loads((Path(__file__).parent / "recorded_rewards.json").read_text())


def _sigmoid(last, start=0.2, top=0.8, mid=40.0, exponent=2.0):
    return [start + (top - start) / (1 + (mid / step) ** exponent) for step in range(1, last + 1)]


def _noisy(curve, noise=0.03):
    return np.array(curve) + noise * np.random.default_rng(1).normal(size=len(curve))


def test_a_curve_almost_without_noise_is_found_as_it_was_made():
    """R(200) = 0.2 + 0.6 / (1 + 0.2²) = 0.7769, and 0.6 / (1 + 0.4²) = 0.5172 of it are there at step 100."""
    made = forecast_reward(range(1, 101), _noisy(_sigmoid(100), 1e-3), 200)
    assert made.refused == ""
    assert made.asymptote.value == pytest.approx(0.8, abs=0.01)
    assert made.end.value == pytest.approx(0.7769, abs=0.004)
    assert made.left.value == pytest.approx(0.7769 - 0.7172, abs=0.004)
    assert made.mid_step.value == pytest.approx(40, rel=0.05)
    assert made.exponent == pytest.approx(2.0, rel=0.05)
    for one in (made.now, made.end, made.asymptote, made.left, made.mid_step):
        assert one.low <= one.value <= one.high


def test_nothing_depends_on_the_unit_of_the_reward():
    noise = np.random.default_rng(0).normal(size=120) * 0.03
    rewards = np.array(_sigmoid(120, mid=20)) + noise
    small, large = (forecast_reward(range(1, 121), scale * rewards + shift, 240) for scale, shift in ((1, 0), (50, -7)))
    assert large.end.value == pytest.approx(50 * small.end.value - 7)
    assert large.left.high == pytest.approx(50 * small.left.high)


@pytest.mark.parametrize("power", [1020, 600, -600, -1000])
def test_rewards_whose_squares_are_no_numbers_have_the_same_forecast(power):
    rewards = _noisy(_sigmoid(100))
    made, far = (forecast_reward(range(1, 101), rewards * unit, 200) for unit in (1.0, 2.0**power))
    assert (far.refused, far.end) == ("", made.end.times(2.0**power))


def test_the_interval_is_wider_where_neighbours_are_alike():
    """The same spread of rewards says less of the curve when it drifts."""
    widths = []
    for alike in (0.0, 0.8):
        draw, noise = np.random.default_rng(3), []
        for _ in range(900):
            noise.append(alike * (noise[-1] if noise else 0) + np.sqrt(1 - alike**2) * draw.normal())
        made = forecast_reward(range(1, 901), np.array(_sigmoid(900, mid=150)) + 0.03 * np.array(noise), 1200)
        widths.append(made.end.high - made.end.low)
    assert widths[1] > 1.5 * widths[0]


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        (_sigmoid(MIN_ROWS - 1), f"{MIN_ROWS} are needed"),
        ([0.5] * 100, "does not rise"),
        (_noisy([0.5] * 100), "does not rise"),
        (_noisy(_sigmoid(100, top=0.22, mid=15)), "cannot be told from the noise"),
        (_noisy(_sigmoid(100, mid=15)[::-1]), "does not rise"),
        (_noisy(_sigmoid(100, mid=300, exponent=3), 0.01), "mid-point of the rise is not passed"),
        (_noisy([*_sigmoid(100, mid=20), *np.linspace(0.75, 0.1, 60)]), "no sigmoid"),
    ],
    ids=["few", "constant", "noise", "small rise", "falling", "before the mid-point", "rise and fall"],
)
def test_where_steps_cannot_say_it_the_forecast_is_refused(rewards, said):
    made = forecast_reward(range(1, len(rewards) + 1), rewards, 400)
    assert said in made.refused
    assert made.end is made.asymptote is made.left is None


def test_of_a_step_that_was_made_again_the_later_reward_counts_and_what_is_no_number_is_left_out():
    steps, rewards = list(range(1, 101)), _noisy(_sigmoid(100)).tolist()
    again = forecast_reward([*steps, 50, 0, 101], [*[r if s != 50 else 9.0 for s, r in zip(steps, rewards, strict=True)], rewards[49], 3.0, float("nan")], 200)  # fmt: skip
    assert again == forecast_reward(steps, rewards, 200)


def test_recorded_curves_of_a_small_model_are_refused_rather_than_guessed():
    """Runs of the examples, most with 64 answers a step: at half of the run one may be forecast, and that holds."""
    held = []
    for rewards in RECORDED.values():
        half, tail = len(rewards) // 2, np.array(rewards[-len(rewards) // 8 :])
        made = forecast_reward(range(1, half + 1), rewards[:half], len(rewards))
        if not made.refused:
            error = 1.645 * tail.std() / len(tail) ** 0.5
            held.append(made.end.low - error <= tail.mean() <= made.end.high + error)
    assert len(RECORDED) == 19
    assert held == [True]
