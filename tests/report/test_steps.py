"""The rows of a run as they were read, in little memory."""

import json
import tracemalloc

import pytest

from posttrain.report import steps
from posttrain.report.charts import learning_curves
from posttrain.report.steps import LoggedSteps

ROWS = [
    {"step": 1, "time": 1.5, "loss": 0.25, "num_tokens": 10},
    {"step": 2, "time": 2.5, "loss": None, "num_tokens": 20, "nonfinite": ["loss"]},
    {"time": 3.5, "step": 3, "loss": 1, "num_tokens": 30},
    {"step": 4, "time": 4.5, "loss": 2.0, "num_tokens": 2**70},
    {"step": 5, "time": True, "loss": 0.5, "num_tokens": 50.0},
    {},
    {"step": 7, "time": 7.5, "loss": 0.75, "num_tokens": 70},
]


@pytest.mark.parametrize("most", [0, 1, 64])
def test_rows_come_back_as_they_were_read_with_types_and_order(monkeypatch, most):
    monkeypatch.setattr(steps, "_MOST_TABLES", most)
    found = LoggedSteps(map(dict, ROWS))
    assert [list(row.items()) for row in found] == [list(row.items()) for row in ROWS]
    assert [[type(one) for one in row.values()] for row in found] == [[type(v) for v in row.values()] for row in ROWS]
    assert found[-1] == ROWS[-1] and found[1:6:2] == ROWS[1:6:2] and len(found) == 7
    assert set(found.names()) == {"step", "time", "loss", "num_tokens", "nonfinite"}
    assert list(LoggedSteps([ROWS[0], *ROWS[2:5]]).column("num_tokens")) == [10, 30, 2**70, 50.0]
    with pytest.raises(KeyError):
        list(found.column("step"))
    with pytest.raises(IndexError):
        found[7]


def rows(count):
    for step in range(count):
        yield json.loads(json.dumps({"step": step, "time": step + 0.5, "loss": step / 7, "grad_norm": step / 3}))


def peak(act):
    tracemalloc.start()
    try:
        kept = act()
        return tracemalloc.get_traced_memory()[1] / 5_000, kept
    finally:
        tracemalloc.stop()


def test_steps_are_held_in_less_than_their_text_and_drawn_in_as_much_again():
    text = len(json.dumps({"step": 1000, "time": 1000.5, "loss": 1000 / 7, "grad_norm": 1000 / 3}))
    held, found = peak(lambda: LoggedSteps(rows(5_000)))
    assert held < text
    learning_curves("sft", found[:2])
    drawn, _ = peak(lambda: learning_curves("sft", found))
    assert drawn < 4 * text, "with what the figure needs, whatever the length"
