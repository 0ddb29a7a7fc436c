"""`posttrain forecast`: the table and the JSON of a run, the decision, what is refused, the live view and the report."""

import io
import json

import numpy as np
import pytest
from rich.console import Console

from posttrain.cli.app import main
from posttrain.report.build import build_report
from posttrain.tracking.live import LiveView

LEVELS = {"grown": (0.2, 0.8, 20, 2.0), "early": (0.2, 0.9, 400, 3.0)}


def _rewards(kind, num):
    start, top, mid, exponent = LEVELS[kind]
    curve = [start + (top - start) / (1 + (mid / step) ** exponent) for step in range(1, num + 1)]
    return (np.array(curve) + 0.02 * np.random.default_rng(5).normal(size=num)).tolist()


@pytest.fixture
def run_of(tmp_path):
    def make(rewards, total, metric="reward", step_s=36.0):
        stage = tmp_path / "run" / "stages" / "01-grpo"
        stage.mkdir(parents=True)
        rows = [{"step": s, "time": 1e9 + step_s * s, metric: r} for s, r in enumerate(rewards, 1)]
        (stage / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (stage / "summary.json").write_text(json.dumps({"datasets": [], "examples": [], "total_steps": total}))
        return tmp_path / "run"

    return make


def _asked(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["forecast", *map(str, arguments)])
    return ended.value.code, capsys.readouterr()


def test_a_run_that_has_levelled_off_is_to_be_stopped(run_of, capsys):
    """200 of 400 steps at 36 s: 2 hours are left, and the curve gains 0.6 / (1 + 0.05²) − 0.6 / (1 + 0.1²) = 0.0044 in them."""
    run = run_of(_rewards("grown", 200), 400)
    code, said = _asked(capsys, run, "--worth", "0.05")
    assert code == 0
    head, row = said.out.splitlines()
    assert head.split("  ")[0] == "stage"
    assert row.startswith("01-grpo  200/400  ")
    assert row.endswith("stop: what is left is not worth it even at the high end")
    code, said = _asked(capsys, run, "--worth", "0.05", "--json")
    (made,) = json.loads(said.out)["stages"]
    assert made["decision"] == "stop"
    assert made["hours_left"] == pytest.approx(2.0)
    assert made["per_hour"]["high"] == pytest.approx(made["left"]["high"] / 2)
    assert made["end"]["low"] <= 0.2 + 0.6 / (1 + 0.05**2) <= made["end"]["high"]


def test_a_run_that_still_rises_goes_on_and_one_that_is_over_says_so(run_of, capsys):
    run = run_of(_rewards("grown", 60), 600)
    made = {}
    for options in ((), ("--steps", "60")):
        code, said = _asked(capsys, run, "--json", "--worth", "0.005", *options)
        assert code == 0
        made[options] = json.loads(said.out)["stages"][0]
    assert made[()]["decision"] == "go on"
    assert made["--steps", "60"]["decision"] == "ended"
    assert made["--steps", "60"]["per_hour"] is None


def test_before_the_mid_point_the_reason_stands_in_the_table_and_the_code_is_2(run_of, capsys):
    code, said = _asked(capsys, run_of(_rewards("early", 200), 2000))
    assert code == 2
    assert "no forecast: the mid-point of the rise is not passed for sure" in said.out


def test_a_run_without_a_reward_is_told_what_it_logged(run_of, capsys):
    run = run_of(_rewards("grown", 60), 60, metric="accuracy")
    code, said = _asked(capsys, run)
    assert code == 64
    assert "got no stage that logged 'reward'" in said.err
    assert "accuracy" in said.err
    assert _asked(capsys, run, "--metric", "accuracy")[0] == 0


def test_damaged_metrics_are_named_and_nothing_is_forecast(run_of, capsys):
    run = run_of(_rewards("grown", 60), 60)
    with (run / "stages/01-grpo/metrics.jsonl").open("a") as file:
        file.write("{]\n" + json.dumps({"step": 61}) + "\n")
    code, said = _asked(capsys, run)
    assert code == 64
    assert "metrics.jsonl" in said.err


@pytest.mark.parametrize("metric", ["reward", "accuracy"])
def test_the_report_shows_the_table_and_none_where_no_reward_was_logged(run_of, metric):
    html = build_report(run_of(_rewards("grown", 200), 400, metric)).read_text()
    assert ('id="forecast"' in html) == ("200/400" in html) == (metric == "reward")


def test_the_live_view_says_where_the_reward_ends_once_that_can_be_said():
    stream = io.StringIO()
    view = LiveView("grpo", 400, Console(file=stream, width=300), lambda: 0.0)
    for step, reward in enumerate(_rewards("grown", 200), 1):
        view.log(step, {"reward": reward})
    view.close()
    lines = stream.getvalue().splitlines()
    assert "ends at" not in lines[10]
    assert "ends at 0." in lines[-1]
