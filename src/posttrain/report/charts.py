"""Charts as SVG inside data URIs: the paired-difference plot of a verdict and the learning curves of a stage."""

from __future__ import annotations

import base64
import fnmatch
import io
import math
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from posttrain.config.kinds import STAGE_KINDS, LearnsFrom
from posttrain.report import words

_BLUE, _ORANGE, _RED, _GREY = "#1f5fa8", "#c75b12", "#b3261e", "#767676"
_GRID = "#e4e4e4"
_VERDICT_COLOR = {"PASS": "#1b6e3c", "FAIL": _RED}
_MAX_POINTS = 1000
_FONTS = re.compile(r"font-family: [^;\"]+")
_TAG = re.compile(r"<[^>]+>")
THROUGHPUT = "tokens_per_second"
MEMORY = "memory_peak_mib"
GAP = "reward_ahead_of_score"
_STYLES = ("-", "--", ":")
_LONG_NUMBER = re.compile(r"(?<![\w#.])-?\d+\.\d{2,}(?![\w.])")
_DARK = {
    _BLUE: "#7fb2ee", _ORANGE: "#f0a06a", _RED: "#ff8a80", _GREY: "#a6a6ad", "#1b6e3c": "#6cc48f", _GRID: "#34343a",
    "#000000": "#e8e8ea",
}  # fmt: skip
"""Every colour of a chart, and what stands for it where the reader's screen is dark."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One small chart: a title, what it means, and the metrics drawn in it (TRL's names; `*` stands for any reward)."""

    title: str
    meaning: str
    metrics: tuple[str, ...]


_LOSS = Panel(
    "Loss", "How surprised the model is by the training answers; lower is better.", ("loss", "eval_loss", "eval_*_loss")
)
_GRAD = Panel("Gradient norm", "Size of each update before clipping; spikes are a warning.", ("grad_norm",))
_PREFERENCE_LOSS = Panel(
    "Loss",
    "How far the model is from preferring the chosen answers; ln 2 = 0.69 is no preference, lower is better.",
    ("loss", "eval_loss", "eval_*_loss"),
)
_RUNNING = (
    Panel("Learning rate", "Size of a step: warm-up, then decay.", ("learning_rate",)),
    Panel("Throughput", "Tokens per second, with evaluation and saving.", (THROUGHPUT,)),
    Panel("Memory", "The most that the process has held so far, in MiB.", (MEMORY,)),
)
"""What every stage shows."""
# fmt: off
_ENTROPY = Panel("Entropy", "How varied the sampling is; near zero the model has stopped exploring.", ("entropy",))
_TEACHER_GAP = Panel("Distance to the teacher", "Nats per token by which the policy finds its answers likelier than its teacher does.", ("teacher/gap", "eval_teacher/gap"))
_LENGTH = Panel("Answer length", "Tokens per answer.", ("completions/mean_length", "completions/max_length"))
_CUT_OFF = Panel("Cut off", "Share of answers that hit the length limit.", ("completions/clipped_ratio",))
# fmt: on
PANELS: dict[LearnsFrom, tuple[Panel, ...]] = {
    "examples": (
        _LOSS,
        Panel(
            "Token accuracy",
            "Share of trained tokens the model would have chosen itself.",
            ("mean_token_accuracy", "eval_mean_token_accuracy", "eval_*_mean_token_accuracy"),
        ),
        _GRAD,
    ),
    "pairs": (
        _PREFERENCE_LOSS,
        Panel(
            "Preference accuracy",
            "Share of pairs whose chosen answer gained more than the rejected one.",
            ("rewards/accuracies", "eval_rewards/accuracies", "eval_*_rewards/accuracies"),
        ),
        Panel(
            "Implicit rewards",
            "Gain over the starting model; chosen should rise, rejected should fall.",
            ("rewards/chosen", "rewards/rejected", "rewards/margins"),
        ),
        Panel(
            "Log-probabilities",
            "If that of chosen answers falls far, the model is unlearning them.",
            ("logps/chosen", "logps/rejected"),
        ),
    ),
    "rated pairs": (
        _PREFERENCE_LOSS,
        Panel(
            "Preference accuracy",
            "Share of pairs whose chosen answer has the higher reward.",
            ("rewards/accuracies", "eval_rewards/accuracies", "eval_*_rewards/accuracies"),
        ),
        Panel(
            "Rewards",
            "Mean reward of the chosen and of the rejected answers; they should part.",
            ("rewards/chosen", "rewards/rejected", "rewards/margins"),
        ),
    ),
    "rated steps": (
        Panel(
            "Loss",
            "How surprised the model is by whether a step is right; lower is better.",
            ("loss", "eval_loss", "eval_*_loss"),
        ),
        Panel(
            "Step accuracy",
            "Share of the steps that it rates as they are labelled.",
            ("accuracy", "eval_accuracy", "eval_*_accuracy"),
        ),
        Panel(
            "Accuracy by label",
            "Of the right steps and of the wrong ones; where one label is rare, look here.",
            ("accuracy/right", "accuracy/wrong", "eval_accuracy/right", "eval_accuracy/wrong"),
        ),
    ),
    "samples": (
        Panel("Reward", "Mean score of the sampled answers; higher is better.", ("reward", "reward_std")),
        Panel(
            "Who decides",
            "What each reward adds to the spread of their sum; near 0 it is not heard.",
            ("rewards/*/share",),
        ),
        Panel(
            "Paid for length",
            "Nats that a reward says of an answer's length; log 4 = 1.39 is all there is.",
            ("reward_length_information", "rewards/*/length_information"),
        ),
        Panel(
            "Reward ahead of the score",
            "How much more the reward has risen since the first validation than the held-out score; what grows is being gamed.",
            (GAP,),
        ),
        _ENTROPY,
        Panel("Distance to the start", "KL divergence from the reference model.", ("kl",)),
        _TEACHER_GAP,
        Panel(
            "What the critic explains",
            "Share of the variance of the returns that its values explain: 1 is all of it, 0 no more than a constant would.",
            ("critic/vf_explained_var",),
        ),
        _LENGTH,
        _CUT_OFF,
        Panel(
            "Groups without signal",
            "Share of prompts whose answers all scored the same; they teach nothing.",
            ("frac_reward_zero_std",),
        ),
    ),
    "teachers": (
        _LOSS,
        _TEACHER_GAP,
        Panel(
            "Agreement with the teacher",
            "Share of tokens at which both find the same one likeliest.",
            ("teacher/agreement", "eval_teacher/agreement"),
        ),
        _ENTROPY,
        _LENGTH,
        _CUT_OFF,
        _GRAD,
    ),
}  # fmt: skip
"""What is drawn, by what a stage learns from; a panel none of whose metrics was logged is left out."""
_UNKNOWN = (_LOSS, _GRAD)
"""Of a stage whose kind this version does not know."""


@dataclass(frozen=True, slots=True)
class Chart:
    """An image as a data URI, with its content in words for those who do not see it."""

    uri: str
    alt: str
    title: str = ""
    meaning: str = ""


def panels_of(kind: str) -> tuple[Panel, ...]:
    """What is drawn of a stage, where it was logged."""
    return (*(PANELS[STAGE_KINDS[kind].learns_from] if kind in STAGE_KINDS else _UNKNOWN), *_RUNNING)


def learning_curves(kind: str, metrics: Sequence[Mapping[str, Any]], finding_steps: Sequence[int] = ()) -> list[Chart]:
    panels = panels_of(kind)
    drawn = _drawn(metrics, [name for panel in panels for name in panel.metrics])
    return [chart for panel in panels if (chart := _curve(panel, drawn, finding_steps)) is not None]


def _drawn(metrics: Sequence[Mapping[str, Any]], wanted: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every metric that a panel names, thinned, in the order in which they were first logged. Long runs are gone through once,
    and of their values only the numbers are held."""
    found: dict[str, tuple[array[int], array[float]] | None] = {}
    for place, row in enumerate(_with_gap(_with_memory(_with_throughput(metrics)))):
        for name, value in row.items():
            if name not in found:
                found[name] = (array("l"), array("d")) if name in metrics_named(wanted, [name]) else None
            if (columns := found[name]) is not None and isinstance(value, (int, float)):
                columns[0].append(place)
                columns[1].append(value)
    thinned = {name: (_thinned(both[0]), _thinned(both[1])) for name, both in found.items() if both is not None}
    return {
        name: [(int(metrics[place]["step"]), value) for place, value in zip(places, values, strict=True)]
        for name, (places, values) in thinned.items()
    }


def _with_throughput(metrics: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Tokens per second since the row before, from the running count of tokens and the clock."""
    before: Mapping[str, Any] = {}
    for row in metrics:
        tokens, seconds = (_difference(before, row, name) for name in ("num_tokens", "time"))
        yield {**row, THROUGHPUT: tokens / seconds} if tokens > 0 and seconds > 0 else row
        before = row


def _with_memory(metrics: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for row in metrics:
        yield {**row, MEMORY: row["memory_peak_bytes"] / 2**20} if "memory_peak_bytes" in row else row


def _with_gap(metrics: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """At each validation, how much more the mean reward of the steps up to it has risen than the held-out score, both since the first."""
    rewards: list[float] = []
    first: tuple[float, float] | None = None
    for row in metrics:
        if isinstance(reward := row.get("reward"), int | float):
            rewards.append(reward)
        score = row.get("eval_score", row.get("eval_reward"))
        if isinstance(score, int | float) and rewards:
            now = sum(rewards) / len(rewards), float(score)
            first, rewards = first or now, []
            row = {**row, GAP: (now[0] - first[0]) - (now[1] - first[1])}
        yield row


def metrics_named(wanted: Sequence[str], logged: Iterable[str]) -> list[str]:
    """The metrics of a panel, those with `*` as they were logged."""
    return [name for one in wanted for name in (fnmatch.filter(logged, one) if "*" in one else [one])]


def _difference(before: Mapping[str, Any], row: Mapping[str, Any], name: str) -> float:
    """NaN where either row lacks it."""
    return float(row.get(name, math.nan)) - float(before.get(name, math.nan))


def forests(tests: Sequence[Mapping[str, Any]], shares: Mapping[str, bool]) -> list[Chart]:
    """One row per test: the paired difference, its 95 % interval, and the line that its bound must clear. A chart per unit."""
    rows = [test for test in tests if all(test.get(name) is not None for name in ("estimate", "low", "high"))]
    units = [[test for test in rows if shares.get(test["suite"], True) is share] for share in (True, False)]
    return [_forest(rows, share) for rows, share in zip(units, (True, False), strict=True) if rows]


def _forest(rows: Sequence[Mapping[str, Any]], share: bool) -> Chart:
    height = 0.9 + 0.55 * len(rows)
    axes = _axes(7.2, height, left=0.2)
    axes.axvline(0, color=_GREY, linewidth=1)
    for place, test in enumerate(rows):
        color = _VERDICT_COLOR.get(str(test.get("verdict")), _GREY)
        factor = 100 if share else 1
        low, high, estimate = factor * test["low"], factor * test["high"], factor * test["estimate"]
        axes.plot([low, high], [place, place], color=color, linewidth=2.5, solid_capstyle="butt")
        axes.plot([estimate], [place], marker="o", color=color, markersize=7)
        if test.get("line") is not None:
            axes.plot(
                [factor * test["line"]] * 2,
                [place - 0.32, place + 0.32],
                color=_ORANGE,
                linewidth=2,
                linestyle=(0, (3, 1.5)),
            )
    axes.set_yticks(range(len(rows)), [f"{test['suite']} ({test['role']})" for test in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    unit = "percentage points" if share else "score units"
    axes.set_xlabel(f"change, candidate minus baseline, {unit}")
    _tidy(axes)
    alt = "; ".join(_row_in_words(test, share) for test in rows)
    return Chart(_data_uri(axes.figure), f"Paired differences with 95 % intervals: {alt}")


def _row_in_words(test: Mapping[str, Any], share: bool) -> str:
    line = words.points(test.get("line"), share)
    return f"{test['suite']} {words.points(test['estimate'], share)} ({words.points(test['low'], share)} to {words.points(test['high'], share)}), line {line}"


def _curve(
    panel: Panel, drawn: Mapping[str, Sequence[tuple[int, float]]], finding_steps: Sequence[int]
) -> Chart | None:
    series = {name: points for name in metrics_named(panel.metrics, drawn) if (points := drawn.get(name))}
    if not series:
        return None
    legend = 0.2 * len(series) if len(series) > 1 else 0.0  # above the curves, where it hides none
    axes = _axes(4.2, 2.5 + legend, left=0.17, above=0.12 + legend)
    looks = [(color, style) for style in _STYLES for color in (_BLUE, _ORANGE, _GREY)]
    for (name, points), (color, style) in zip(series.items(), cycle(looks), strict=False):
        steps, values = [p[0] for p in points], [p[1] for p in points]
        axes.plot(
            steps,
            values,
            color=color,
            linestyle=style,
            linewidth=1.4,
            label=name,
            marker="o" if len(points) < 15 else "",
            markersize=3,
        )
    if len({value for points in series.values() for _, value in points}) == 1:
        # A flat line says nothing by itself: its distance from 0 and 1 does.
        axes.set_ylim(*_around(next(iter(series.values()))[0][1]))
    for step in finding_steps:
        axes.axvline(step, color=_RED, linewidth=0.8, linestyle=":")
    if len(series) > 1:
        axes.legend(
            frameon=False, fontsize=10, loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0, labelspacing=0.2
        )
    axes.set_xlabel("step", fontsize=10)
    _tidy(axes)
    alt = "; ".join(
        f"{name}: {points[0][1]:.4g} at step {points[0][0]}, {points[-1][1]:.4g} at step {points[-1][0]}"
        for name, points in series.items()
    )
    return Chart(_data_uri(axes.figure), f"{panel.title}: {alt}", panel.title, panel.meaning)


def _around(value: float) -> tuple[float, float]:
    low, high = min(0.0, value), max(1.0, value)
    return low - 0.05 * (high - low), high + 0.05 * (high - low)


def _thinned(column: array[Any]) -> array[Any]:
    stride = -(-len(column) // _MAX_POINTS) or 1
    return column if stride == 1 else column[::stride] + column[-1:]


def _axes(width: float, height: float, left: float, above: float = 0.12) -> Any:
    """One pair of axes with fixed margins: an automatic layout draws everything several times."""
    figure = Figure(figsize=(width, height), facecolor="none")
    bottom, top = 0.5 / height, 1 - above / height
    return figure.add_axes((left, bottom, 0.97 - left, top - bottom), facecolor="none")


def _tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=10)


def _data_uri(figure: Figure) -> str:
    buffer = io.BytesIO()
    # A fixed salt and no date: the same run gives the same bytes. Text stays text, in the reader's own font.
    with matplotlib.rc_context({"svg.hashsalt": "posttrain", "svg.fonttype": "none", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    small = _FONTS.sub("font-family: sans-serif", buffer.getvalue().decode("utf-8"))
    # A tenth of a point is finer than a screen shows, and six digits are most of the bytes. Only in tags: text is tick labels.
    small = _TAG.sub(lambda tag: _LONG_NUMBER.sub(lambda match: f"{float(match[0]):.1f}", tag[0]), small)
    small = _with_dark_mode(small)
    return "data:image/svg+xml;base64," + base64.b64encode(small.encode("utf-8")).decode("ascii")


def _with_dark_mode(svg: str) -> str:
    """Colours as variables that the reader's colour scheme sets: an image knows nothing of the page's style."""
    names = {color: f"--c{place}" for place, color in enumerate(_DARK)}
    for color, name in names.items():
        svg = svg.replace(color, f"var({name})")
    light, dark = (
        "".join(f"{name}:{color};" for name, color in zip(names.values(), colors, strict=True))
        for colors in (_DARK, _DARK.values())
    )
    style = f"svg{{{light}}}text{{fill:var({names['#000000']})}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}"
    return svg.replace("</defs>", f"<style>{style}</style></defs>", 1)
