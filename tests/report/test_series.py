"""Metrics that grow, as curves of so many points."""

import json
import math

import numpy as np
import pytest

from posttrain.report.series import MetricSeries, SeriesCache
from posttrain.tracking.jsonl import JsonlSink


def read(series, names=(), low=None, high=None, points=100):
    series.grow(10.0)
    return series.window(list(names), low, high, points)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


def log(path, rows):
    with path.open("a") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)


def test_what_was_added_is_read_and_nothing_twice(path):
    series = MetricSeries(path)
    assert read(series).steps is None and read(series).share_read == 1.0
    log(path, [{"step": step, "loss": 1.0 / step} for step in range(1, 6)])
    assert [one[0] for one in read(series).curves["loss"].points] == [1, 2, 3, 4, 5]
    log(path, [{"step": 6, "loss": 9.0}])
    window = read(series)
    assert window.num_rows == 6 and window.curves["loss"].points[-1] == (6, 9.0, 9.0, 9.0)


def test_buckets_are_the_lowest_highest_and_mean_of_their_values(path):
    values = np.random.default_rng(0).normal(size=1003)
    log(path, [{"step": step, "loss": value} for step, value in enumerate(values, 1)])
    points = read(MetricSeries(path), points=10).curves["loss"].points
    cuts = [int(1003 * place / 10) for place in range(11)]
    assert len(points) == 10
    for (step, low, high, mean), begin, end in zip(points, cuts, cuts[1:], strict=False):
        part = values[begin:end]
        assert (step, low, high) == (end, part.min(), part.max()) and math.isclose(mean, part.mean(), abs_tol=1e-12)


def test_a_long_curve_is_drawn_from_what_is_kept_of_its_blocks_and_says_the_same(path):
    values = np.random.default_rng(1).normal(size=30_000)
    rows = [
        {"step": 2 * place, "loss": value, **({"eval_loss": value} if place % 1000 == 0 else {})}
        for place, value in enumerate(values)
    ]
    log(path, rows[:20_000])
    series = MetricSeries(path)
    read(series, points=10)
    log(path, rows[20_000:])
    curves = read(series, points=10).curves
    within = read(series, low=2 * 77, points=10).curves["loss"].points
    for points, begin in ((curves["loss"].points, 0), (within, 77)):
        assert len(points) == 10 and points[-1][0] == 2 * 29_999
        for step, low, high, mean in points:
            part = values[begin : step // 2 + 1]
            assert (low, high) == (part.min(), part.max()) and math.isclose(mean, part.mean(), abs_tol=1e-12)
            begin = step // 2 + 1
    assert [one[0] for one in read(series, points=30).curves["eval_loss"].points] == list(range(0, 60_000, 2000))
    zoomed = read(series, low=40_001, high=40_010, points=10).curves["loss"].points
    assert [one[:2] for one in zoomed] == [(2 * place, values[place]) for place in range(20_001, 20_006)]


def test_steps_that_go_back_are_drawn_all_the_same(path):
    log(path, [{"step": step, "loss": float(step)} for step in (1, 2, 3, 2, 3, 4)])
    assert [one[0] for one in read(MetricSeries(path), low=2, high=3).curves["loss"].points] == [2, 3, 2, 3]


def test_a_zoom_shows_its_steps_alone_and_as_they_are_where_they_are_few(path):
    log(path, [{"step": step, "loss": float(step)} for step in range(1, 1001)])
    points = read(MetricSeries(path), low=500, high=510, points=50).curves["loss"].points
    assert points == tuple((step, float(step), float(step), float(step)) for step in range(500, 511))


def test_a_metric_that_is_logged_now_and_then_keeps_its_steps(path):
    log(
        path,
        [{"step": step, "loss": 1.0, **({"eval_loss": step * 1.0} if step % 4 == 0 else {})} for step in range(1, 11)],
    )
    assert [one[:2] for one in read(MetricSeries(path)).curves["eval_loss"].points] == [(4, 4.0), (8, 8.0)]


def test_what_is_no_number_is_counted_and_not_drawn(path):
    sink = JsonlSink(path.parent)
    for step, value in ((1, 1.0), (2, math.nan), (3, math.inf), (4, 2.0)):
        sink.log(step, {"loss": value, "grad_norm": math.nan})
    sink.close()
    curves = read(MetricSeries(path)).curves
    assert [one[0] for one in curves["loss"].points] == [1, 4] and curves["loss"].num_nonfinite == 2
    assert curves["grad_norm"].points == () and curves["grad_norm"].num_nonfinite == 4


def test_a_torn_last_line_waits_for_its_end(path):
    log(path, [{"step": 1, "loss": 1.0}])
    with path.open("a") as handle:
        handle.write('{"step": 2, "lo')
    series = MetricSeries(path)
    window = read(series)
    assert window.num_rows == 1 and window.share_read == 1.0 and window.problems == ()
    with path.open("a") as handle:
        handle.write('ss": 2.0}\n')
    assert [one[0] for one in read(series).curves["loss"].points] == [1, 2]


def test_a_damaged_line_is_named_and_the_others_are_drawn(path):
    log(path, [{"step": 1, "loss": 1.0}])
    with path.open("a") as handle:
        handle.write('{"step": 2, \x00\n["not", "a", "row"]\n')
    log(path, [{"step": 3, "loss": 3.0}])
    window = read(MetricSeries(path))
    assert [one[0] for one in window.curves["loss"].points] == [1, 3]
    assert [problem.split(" ")[0] for problem in window.problems] == ["metrics.jsonl:2", "metrics.jsonl:3"]


@pytest.mark.parametrize("line", ['{"step": Infinity, "loss": 2}', '{"step": 1e400}', '{"step": 1%s}' % ("0" * 30), '{"step": 2, "loss": 1%s}' % ("0" * 400), "[" * 100_000])  # fmt: skip
def test_a_number_that_fits_nowhere_is_a_damaged_line(path, line):
    log(path, [{"step": 1, "loss": 1.0}])
    with path.open("a") as handle:
        handle.write(line + "\n")
    log(path, [{"step": 3, "loss": 3.0}])
    window = read(MetricSeries(path))
    assert [one[0] for one in window.curves["loss"].points] == [1, 3]
    assert window.problems == ("metrics.jsonl:2 is no logged step and is left out",)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e400", "1e308"])
def test_a_value_that_cannot_be_drawn_counts_as_no_number(path, value):
    path.write_text(f'{{"step": 1, "loss": 1.0}}\n{{"step": 2, "loss": {value}}}\n')
    curve = read(MetricSeries(path)).curves["loss"]
    assert curve.points == ((1, 1.0, 1.0, 1.0),) and curve.num_nonfinite == 1


@pytest.mark.parametrize("named", [["loss"], ["loss", "loss"]])
def test_a_metric_that_a_row_names_twice_keeps_its_steps(path, named):
    log(path, [{"step": 1, "loss": 7.0, "nonfinite": named}, {"step": 2, "loss": 8.0}])
    curve = read(MetricSeries(path)).curves["loss"]
    assert curve.points == ((2, 8.0, 8.0, 8.0),) and curve.num_nonfinite == 1


@pytest.mark.parametrize("named", [5, "abc", {"a": 1}, None])
def test_names_that_are_no_list_name_nothing(path, named):
    log(path, [{"step": 1, "loss": 7.0, "nonfinite": named}])
    assert read(MetricSeries(path)).names == ("loss",)


def test_a_name_of_a_panel_stands_for_what_was_logged(path):
    log(path, [{"step": 1, "rewards/a/share": 0.3, "rewards/b/share": 0.7, "rewards/a/mean": 1.0}])
    assert sorted(read(MetricSeries(path), names=["rewards/*/share"]).curves) == ["rewards/a/share", "rewards/b/share"]


def test_names_without_end_are_not_all_kept(path):
    log(path, [{"step": step, "loss": 1.0, f"of_{step}": 1.0} for step in range(1, 2101)])
    window = read(MetricSeries(path), names=["loss"])
    assert len(window.curves["loss"].points) == 100 and len(window.names) == 2000
    assert window.problems == ("metrics.jsonl has more than 2,000 metrics; the others are not drawn",)


def test_another_run_in_the_same_place_is_read_anew(path):
    log(path, [{"step": step, "loss": 1.0} for step in range(1, 6)])
    series = MetricSeries(path)
    assert read(series).num_rows == 5
    with path.open("w") as handle:  # the inode stays, as it may where a folder is removed and made again
        handle.writelines(json.dumps({"step": step, "loss": 2.0}) + "\n" for step in range(1, 9))
    assert [one[1] for one in read(series).curves["loss"].points] == [2.0] * 8


def test_a_run_that_went_back_is_read_anew(tmp_path, path):
    sink = JsonlSink(tmp_path)
    for step in range(1, 11):
        sink.log(step, {"loss": 1.0})
    series = MetricSeries(path)
    assert read(series).num_rows == 10
    sink.truncate_to(4)
    sink.log(5, {"loss": 2.0})
    sink.close()
    assert [one[0] for one in read(series).curves["loss"].points] == [1, 2, 3, 4, 5]


def test_reading_stops_in_time_and_says_how_far_it_is(path):
    log(path, [{"step": step, "loss": 1.0, "note": "x" * 100} for step in range(1, 20_001)])
    series = MetricSeries(path)
    series.grow(0.0)
    first = series.window(["loss"], None, None, 10)
    assert 0 < first.share_read < 1 and 0 < first.num_rows < 20_000
    for _ in range(50):
        series.grow(0.0)
    assert series.window(["loss"], None, None, 10).num_rows == 20_000


def test_throughput_and_memory_are_those_of_the_report(path):
    log(
        path,
        [
            {"step": step, "time": 10.0 * step, "num_tokens": 500 * step, "memory_peak_bytes": 2**21}
            for step in (1, 2, 3)
        ],
    )
    curves = read(MetricSeries(path)).curves
    assert [one[3] for one in curves["tokens_per_second"].points] == [50.0, 50.0]
    assert curves["memory_peak_mib"].points[0][3] == 2.0


def test_the_cache_forgets_what_was_asked_for_longest_ago(tmp_path):
    cache = SeriesCache(most=50)
    paths = [tmp_path / f"{place}.jsonl" for place in range(3)]
    for path in paths:
        log(path, [{"step": step, "loss": 1.0} for step in range(20)])
        read(cache.of(path))
    kept = cache.of(paths[2])
    assert kept.num_numbers == 40 and cache.of(paths[0]).num_numbers == 0
