"""The live view: plain lines, the panel on a terminal, speed and time left, hostile text."""

import io
import re

import pytest
from rich.console import Console

from posttrain.tracking.live import LiveView, human_count, human_time, memory_bytes, one_line


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def _view(kind, total, terminal=False):
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=terminal, width=200)
    return LiveView(kind, total, console, clock), stream, clock


def test_plain_lines_when_not_a_terminal():
    """10 s and 32,000 tokens per 10 steps: 3.2k tokens/s, 280 steps left take 280 s."""
    view, stream, clock = _view("sft", 400)
    view.log(110, {"loss": 0.5, "learning_rate": 1e-4, "num_tokens": 100_000})
    clock.now += 10
    view.log(120, {"loss": 0.412, "learning_rate": 9.1e-5, "num_tokens": 132_000})
    view.close()
    lines = stream.getvalue().splitlines()
    assert lines == ["sft 110/400 loss 0.500 lr 1.0e-04", "sft 120/400 loss 0.412 lr 9.1e-05 3.2k tok/s eta 4:40"]


def test_each_kind_shows_its_own_metrics():
    view, stream, _ = _view("grpo", 10)
    view.log(1, {"loss": 0.0, "reward": 0.25, "entropy": 1.5, "kl": 0.001, "completions/clipped_ratio": 0.5})
    assert stream.getvalue() == "grpo 1/10 reward 0.250 entropy 1.50 kl 0.0010 truncated 0.50\n"


def test_a_step_without_an_update_does_not_show_the_one_before_it():
    view, stream, _ = _view("grpo", 10)
    view.log(1, {"loss": 0.1, "learning_rate": 1e-4, "grad_norm": 0.5, "reward": 0.25})
    view.log(2, {"empty_step": 1.0})
    assert stream.getvalue().splitlines() == [
        "grpo 1/10 reward 0.250 lr 1.0e-04 grad 0.50",
        "grpo 2/10 reward 0.250 eta 0:00",
    ]


def test_findings_are_shown_and_a_sample_is_not_printed_on_every_step():
    view, stream, _ = _view("grpo", 10)
    view.event("sample", 1, {"prompt": "1+1", "completion": "2"})
    view.event("finding", 2, {"rule": "kl_drift", "message": "KL is high"})
    assert stream.getvalue() == "grpo step 2 finding: KL is high\n"


def test_the_panel_shows_progress_memory_and_the_sample():
    view, stream, clock = _view("grpo", 50, terminal=True)
    view.log(1, {"reward": 0.1, "num_tokens": 1000})
    clock.now += 2
    view.log(2, {"reward": 0.2, "num_tokens": 3000})
    view.event("sample", 2, {"prompt": "6*7=", "completion": "[bold]42[/bold]\x1b[2J", "reward": 1.0})
    view.close()
    shown = stream.getvalue()
    for expected in (
        "2/50",
        "1.0k tok/s",
        "1:36 left",
        "memory",
        "0.200",
        "6*7= → [bold]42[/bold]�[2J",
        "(reward 1.00)",
    ):
        assert expected in shown, expected
    assert "\x1b[2J" not in shown


def test_a_nan_is_shown_not_raised():
    view, stream, _ = _view("dpo", 3)
    view.log(1, {"loss": float("nan")})
    assert stream.getvalue() == "dpo 1/3 loss nan\n"


def test_numbers_for_people():
    assert [human_count(v) for v in (7, 999, 3200, 4_500_000)] == ["7", "999", "3.2k", "4.5M"]
    assert [human_time(v) for v in (41, 725, 12000, -1)] == ["0:41", "12:05", "3:20:00", "0:00"]
    assert one_line("a\nb\x1bc") == "a⏎b�c"


def test_memory_is_that_of_this_process():
    before = memory_bytes()
    block = b"x" * (256 << 20)  # written to, so that it is resident
    assert memory_bytes() - before > 128 << 20
    del block


FINDING = {
    "rule": "kl_drift",
    "severity": "soft",
    "message": "KL is 0.7. Raise beta.",
    "action": "evaluate",
    "evidence": {},
}


def _shown(terminal, width, **more):
    """What a console of this width was sent by a step and its events."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, **more)
    view = LiveView("grpo", 10, console=console)
    view.log(3, {"reward": 0.5, "kl": 0.7, "learning_rate": 1e-5})
    view.event("finding", 3, FINDING)
    view.event("action", 3, {"rule": "kl_drift", "message": "kl_drift: beta 0.1", "beta": 0.1})
    view.event("rollback", 3, {"message": "back to step 1", "severity": "hard", "action": "rollback", "number": 1})
    view.close()
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_findings_and_what_was_done_are_said_and_stay(terminal, width):
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", _shown(terminal, width))
    assert text.count("grpo step 3 finding: kl_drift (soft): KL is 0.7. Raise beta. → evaluate\n") == 1
    assert text.count("grpo step 3 action: kl_drift: beta 0.1\n") == 1
    assert text.count("grpo step 3 rollback: back to step 1 → rollback\n") == 1


def test_no_colour_where_none_is_wanted():
    assert "\x1b[33m" in _shown(True, 80, color_system="standard")
    assert "\x1b[33m" not in _shown(True, 80, color_system="standard", no_color=True)
    assert "\x1b" not in _shown(False, 80)


def test_steps_that_trained_on_nothing_show_no_speed():
    view, stream, clock = _view("grpo", 10)
    for step in (1, 2, 3):
        clock.now += 1
        view.log(step, {"empty_step": 1.0, "num_tokens": 0.0})
    assert "tok/s" not in stream.getvalue()
