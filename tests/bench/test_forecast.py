"""How often the intervals of a forecast hold the truth, on simulated curves and recorded ones."""

import json

import numpy as np
import pytest

from forecast import SCENES, coverage, logged_rewards, recorded, show_recorded


def _held(scenes, num):
    total, kept = 0, 0
    for scene in scenes:
        given, held, _ = coverage(scene, num)
        total, kept = total + given, kept + held.get("asymptote", 0)
        if given >= 25:
            assert min(held.values()) / given >= 0.8, (scene, given, held)
    return total, kept / total


def test_nine_of_ten_intervals_hold_the_asymptote_in_short():
    given, share = _held((SCENES[0], SCENES[3], SCENES[5]), 40)
    assert given >= 30
    assert share >= 0.85


@pytest.mark.slow
def test_nine_of_ten_intervals_hold_the_asymptote_also_where_noise_is_shared_by_neighbours():
    given, share = _held(SCENES, 300)
    assert given >= 600
    assert share >= 0.88


def test_of_recorded_rewards_an_end_is_held_or_missed_and_what_is_refused_is_neither(tmp_path, capsys):
    """A curve that goes on as it began, one that rises a second time behind what was seen, and one of noise alone."""
    steps = range(1, 201)
    noise = 0.02 * np.random.default_rng(1).normal(size=200)
    steady = [0.2 + 0.6 / (1 + (20 / step) ** 2) + noise[step - 1] for step in steps]
    again = [reward + (0.3 if step > 160 else 0.0) for step, reward in zip(steps, steady, strict=True)]
    flat = [0.5 + value for value in noise]
    for name, rewards in {"steady": steady, "again": again, "flat": flat, "short": steady[:20]}.items():
        (tmp_path / name).mkdir()
        rows = [{"step": step, "reward": reward} for step, reward in enumerate(rewards, 1)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = logged_rewards(tmp_path)
    assert list(curves) == ["again", "flat", "steady"]
    held = {name: [one.held for one in recorded(name, rewards)] for name, rewards in curves.items()}
    assert held == {"again": [False, False], "flat": [None, None], "steady": [True, True]}
    show_recorded(curves)
    assert "at 50%: 2 of 3 curves forecast, 1 of them hold" in capsys.readouterr().out
