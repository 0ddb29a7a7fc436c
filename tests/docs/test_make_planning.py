import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.planner.parts import DEVICES, PUBLISHED

SCRIPT = Path(__file__).parents[2] / "docs" / "make_planning.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_planning", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(script):
    assert script.TARGET.read_text(encoding="utf-8") == script.render(), "run `python docs/make_planning.py`"


def test_every_published_row_is_shown_and_what_is_excluded_has_its_reason(script):
    assert all(row["why"] for row in script.rows("excluded"))
    assert {row["use"] for row in script.DATA["rows"]} == {"fit", "judge", "excluded"}
    page = script.render()
    assert all(script._line(row) in page for row in script.DATA["rows"])


def test_the_constants_are_what_the_rows_marked_fit_give(script):
    rates, reached, speed = script.fit()
    assert rates == replace(PUBLISHED, sync_bytes_s=rates.sync_bytes_s)
    assert DEVICES["b200"].reached == DEVICES["gb200"].reached == pytest.approx(reached, abs=0.006)
    assert PUBLISHED.sync_bytes_s == pytest.approx(speed, rel=0.01)


def test_no_system_that_was_judged_was_fitted_on_in_its_own_kind(script):
    """Of RL steps and their phases nothing at all was fitted on; of training not these models, but for Blackwell's share."""
    assert not [row for row in script.rows("fit") if row["kind"] in ("step", "phase")]
    fitted = {(row["model"], row["card"]) for row in script.rows("fit")}
    assert not [row for row in script.rows("judge") if (row["model"], row["card"]) in fitted and row["kind"] == "train"]


def test_a_prediction_off_by_half_would_be_seen(script):
    judged = script.rows("judge")
    assert script.median_error(judged) < 0.25
    slow = {name: replace(device, reached=device.reached / 2) for name, device in DEVICES.items()}
    halved = sorted(abs(script.predicted(row, slow[row["card"]]) / row["seconds"] - 1) for row in judged)
    assert halved[len(halved) // 2] > 0.4
