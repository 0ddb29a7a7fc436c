"""What a person watches while a stage trains: a live panel on a terminal, one plain line per logged step elsewhere."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from posttrain.config.kinds import LearnsFrom, stage_kind

Column = tuple[str, str, str]
"""Label, metric name (TRL's), format."""

_SHARED: tuple[Column, ...] = (("lr", "learning_rate", ".1e"), ("grad", "grad_norm", ".2f"))
_OF_AN_UPDATE = frozenset({"loss", "learning_rate", "grad_norm"})
COLUMNS: dict[LearnsFrom, tuple[Column, ...]] = {
    "examples": (("loss", "loss", ".3f"), ("entropy", "entropy", ".2f"), ("accuracy", "mean_token_accuracy", ".3f"), ("eval_loss", "eval_loss", ".3f"), *_SHARED),
    "pairs": (("loss", "loss", ".3f"), ("accuracy", "rewards/accuracies", ".2f"), ("margin", "rewards/margins", ".3f"), ("eval_loss", "eval_loss", ".3f"), *_SHARED),
    "rated pairs": (("loss", "loss", ".3f"), ("accuracy", "rewards/accuracies", ".2f"), ("margin", "rewards/margins", ".3f"), ("eval_loss", "eval_loss", ".3f"), *_SHARED),
    "rated steps": (("loss", "loss", ".3f"), ("accuracy", "accuracy", ".3f"), ("of wrong", "accuracy/wrong", ".3f"), ("eval_loss", "eval_loss", ".3f"), ("eval_accuracy", "eval_accuracy", ".3f"), *_SHARED),
    "samples": (
        ("reward", "reward", ".3f"), ("std", "reward_std", ".3f"), ("entropy", "entropy", ".2f"), ("kl", "kl", ".4f"),
        ("explained", "critic/vf_explained_var", ".2f"), ("length", "completions/mean_length", ".0f"), ("truncated", "completions/clipped_ratio", ".2f"), *_SHARED,
    ),
    "teachers": (
        ("loss", "loss", ".3f"), ("gap", "teacher/gap", ".3f"), ("entropy", "entropy", ".2f"), ("eval_loss", "eval_loss", ".3f"),
        ("length", "completions/mean_length", ".0f"), *_SHARED,
    ),
}  # fmt: skip
"""What a stage shows, by what it learns from; a metric that was not logged is left out."""

_EVENTS_SHOWN = {"finding", "notice", "checkpoint", "eval", "action", "rollback"}
_KEPT = {"finding", "action", "rollback"}
"""Events that stay on the screen when the panel goes."""
_STYLES = {"hard": "bold red", "soft": "yellow"}
_RECENT_STEPS = 20
_SAMPLE_CHARS = 400
_FORECASTS = 20
"""How often a run's end is forecast, over the run."""


class LiveView:
    """Progress, time left, tokens/s, the stage's metrics, memory and the last sampled completion, as a metric sink."""

    def __init__(
        self, kind: str, total_steps: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._kind = kind
        self._total_steps = total_steps
        self._console = console or Console(stderr=True)
        self._clock = clock
        self._columns = COLUMNS[stage_kind(kind).learns_from]
        # (step, seconds, tokens): speed is measured over these, so a resumed run starts afresh.
        self._recent: deque[tuple[int, float, float | None]] = deque(maxlen=_RECENT_STEPS)
        self._started = clock()
        self._metrics: dict[str, float] = {}
        self._rewards: dict[int, float] = {}
        self._end = ""
        self._step = 0
        self._sample: Mapping[str, Any] | None = None
        self._notes: deque[str] = deque(maxlen=3)
        self._live = (
            Live(console=self._console, refresh_per_second=4, transient=True) if self._console.is_terminal else None
        )
        if self._live is not None:
            self._live.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._step = step
        # What was sampled stays until the next rollouts; an update that was not made must not show the one before it.
        kept = {name: value for name, value in self._metrics.items() if name not in _OF_AN_UPDATE}
        self._metrics = {**kept, **metrics}
        self._recent.append((step, self._clock(), _as_float(metrics.get("num_tokens"))))
        if "reward" in metrics:
            self._rewards[step] = metrics["reward"]
            if step % max(1, self._total_steps // _FORECASTS) == 0:
                self._end = self._forecast()
        if self._live is not None:
            self._live.update(self._panel())
        else:
            self._print(self.line())

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        if kind == "sample":
            self._sample = details
        elif kind in _EVENTS_SHOWN:
            note = f"{self._kind} step {step} {kind}: {event_text(details)}"
            if kind in _KEPT or self._live is None:
                # Above the panel, if there is one: rich keeps it there.
                self._print(note, _STYLES.get(str(details.get("severity")), ""))
            else:
                self._notes.append(note)
        if self._live is not None:
            self._live.update(self._panel())

    def close(self) -> None:
        if self._live is None:
            return
        self._live.stop()
        self._live = None
        if self._step:
            self._print(self.line())

    def line(self) -> str:
        """`sft 120/400 loss 0.412 lr 9.1e-05 3.2k tok/s eta 0:41`"""
        parts = [f"{self._kind} {self._step}/{self._total_steps}"]
        parts += [f"{label} {value}" for label, value in self._shown()]
        speed, left = self.tokens_per_s(), self.eta_s()
        if speed:  # none in a step that trained on nothing
            parts.append(f"{human_count(speed)} tok/s")
        if left is not None:
            parts.append(f"eta {human_time(left)}")
        if self._end:
            parts.append(f"ends at {self._end}")
        return " ".join(parts)

    def _forecast(self) -> str:
        """Where the reward will end, if that can be said."""
        from posttrain.planner.reward_curve import MIN_ROWS, forecast_reward

        if len(self._rewards) < MIN_ROWS:
            return ""
        end = forecast_reward(list(self._rewards), list(self._rewards.values()), self._total_steps).end
        return "" if end is None else f"{end.value:.2f} ({end.low:.2f}–{end.high:.2f})"

    def tokens_per_s(self) -> float | None:
        if "tokens_per_second" in self._metrics:
            return float(self._metrics["tokens_per_second"])
        known = [(seconds, tokens) for _, seconds, tokens in self._recent if tokens is not None]
        if len(known) < 2 or known[-1][0] <= known[0][0]:
            return None
        return (known[-1][1] - known[0][1]) / (known[-1][0] - known[0][0])

    def eta_s(self) -> float | None:
        if len(self._recent) < 2:
            return None
        (first, since, _), (last, until, _) = self._recent[0], self._recent[-1]
        return (until - since) / (last - first) * (self._total_steps - last) if last > first else None

    def _shown(self) -> list[tuple[str, str]]:
        return [
            (label, format(self._metrics[name], spec)) for label, name, spec in self._columns if name in self._metrics
        ]

    def _panel(self) -> Panel:
        left, speed = self.eta_s(), self.tokens_per_s()
        head = Table.grid(padding=(0, 2))
        elapsed = human_time(self._clock() - self._started)
        head.add_row(
            ProgressBar(total=max(1, self._total_steps), completed=self._step, width=30),
            f"{self._step}/{self._total_steps}",
            f"{elapsed} gone" + (f", {human_time(left)} left" if left is not None else ""),
            f"{human_count(speed)} tok/s" if speed else "",
            f"memory {human_count(memory_bytes())}B",
        )
        body = Table.grid(padding=(0, 3))
        shown = [*self._shown(), *([("reward ends at", self._end)] if self._end else [])]
        if shown:
            body.add_row(*(Text(label, style="dim") for label, _ in shown))
            body.add_row(*(Text(value) for _, value in shown))
        parts: list[Any] = [head, body]
        if self._sample is not None:
            parts.append(Text(sample_text(self._sample), style="italic", overflow="fold"))
        parts += [Text(one_line(note), style="dim") for note in self._notes]
        return Panel(Group(*parts), title=self._kind, title_align="left")

    def _print(self, line: str, style: str = "") -> None:
        # Sampled text may hold markup or escape codes: it is printed as characters, never interpreted.
        self._console.print(Text(one_line(line), style=style), soft_wrap=True)


def event_text(details: Mapping[str, Any]) -> str:
    """An event in words: of a finding its rule, severity, message and what is done; else its message, or its fields."""
    if "message" not in details:
        return ", ".join(f"{name}={value}" for name, value in details.items())
    text = str(details["message"])
    if "severity" in details and "rule" in details:
        text = f"{details['rule']} ({getattr(details['severity'], 'value', details['severity'])}): {text}"
    return f"{text} → {details['action']}" if details.get("action") else text


def sample_text(sample: Mapping[str, Any]) -> str:
    reward = sample.get("reward")
    tail = "" if reward is None else f"   (reward {float(reward):.2f})"
    prompt, completion = (one_line(str(sample.get(name, "")))[:_SAMPLE_CHARS] for name in ("prompt", "completion"))
    return f"{prompt} → {completion}{tail}"


def one_line(text: str) -> str:
    """`text` without control characters, which a terminal would obey."""
    return "".join(char if char.isprintable() or char == " " else "⏎" if char == "\n" else "�" for char in text)


def human_count(value: float) -> str:
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000 or unit == "T":
            return f"{value:.0f}" if unit == "" else f"{value:.1f}{unit}"
        value /= 1000
    raise AssertionError("unreachable")


def human_time(seconds: float) -> str:
    """`0:41`, `12:05`, `3:20:00`"""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def memory_bytes() -> float:
    """Resident memory of this process; where the system does not tell, its peak."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _as_float(value: Any) -> float | None:
    return None if value is None else float(value)
