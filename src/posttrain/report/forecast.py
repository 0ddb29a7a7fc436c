"""Where each stage's reward will end: the forecast of `planner/reward_curve.py` on what a run recorded, by stage, with what an hour still brings."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Literal

from posttrain.errors import DataError
from posttrain.planner.reward_curve import Bounded, RewardForecast, forecast_reward
from posttrain.report.records import RunRecord, StageRecord

REWARD = "reward"
WORTH = 0.01
Outlook = Literal["go on", "stop", "open", "ended", "refused"]
OUTLOOKS: Mapping[Outlook, str] = {
    "go on": "go on: what is left is worth it even at the low end",
    "stop": "stop: what is left is not worth it even at the high end",
    "open": "open: the interval of what is left holds both; look again later",
    "ended": "the run has ended",
    "refused": "no forecast",
}


@dataclass(frozen=True, slots=True)
class StageForecast:
    """`per_hour`: what is left, by the hours that it takes; None where nothing is left or times were not recorded."""

    stage: str
    made: RewardForecast
    hours_left: float | None
    per_hour: Bounded | None
    decision: Outlook

    def record(self) -> dict[str, Any]:
        """As JSON data."""
        return {"stage": self.stage, **asdict(self.made), "hours_left": self.hours_left, "per_hour": self.per_hour and asdict(self.per_hour), "decision": self.decision}  # fmt: skip

    def cells(self) -> list[str]:
        """Stage, steps, reward now, at the end, asymptote, gain per hour, and what to do or why there is no forecast."""
        made = self.made
        if made.refused:
            return [self.stage, f"{made.step}/{made.end_step}", "–", "–", "–", "–", f"no forecast: {made.refused}"]
        shown = [bounded_text(one) for one in (made.now, made.end, made.asymptote, self.per_hour)]
        return [self.stage, f"{made.step}/{made.end_step}", *shown, OUTLOOKS[self.decision]]


COLUMNS = ("stage", "step", "now", "at the end", "asymptote", "gain per hour", "")


def bounded_text(bounded: Bounded | None) -> str:
    """`0.812 (0.790–0.841)`"""
    return "–" if bounded is None else f"{bounded.value:.3f} ({bounded.low:.3f}–{bounded.high:.3f})"


def forecast_stages(
    run: RunRecord, metric: str = REWARD, end_step: int | None = None, worth: float = WORTH
) -> list[StageForecast]:
    """Of every stage that logged `metric`. `end_step` instead of the configured one; a gain below `worth` is none."""
    return [
        _forecast(stage, metric, end_step or _end_step(stage), worth)
        for stage in run.stages
        if metric in stage.metrics.names()
    ]


def require_forecasts(run: RunRecord, metric: str, end_step: int | None, worth: float) -> list[StageForecast]:
    """Raises: DataError where no stage logged `metric`."""
    if found := forecast_stages(run, metric, end_step, worth):
        return found
    logged = sorted({name for stage in run.stages for name in stage.metrics.names()} - {"step", "time"})
    raise DataError(
        f"{run.folder}: got no stage that logged {metric!r}; RL logs a reward; name another rising metric by --metric, of: {', '.join(logged) or 'none: no step was logged'}"
    )


def _end_step(stage: StageRecord) -> int:
    """As the stage was started; of a record without it, the last step that there is."""
    total = stage.data.get("total_steps")
    return total if isinstance(total, int) else max(int(row["step"]) for row in stage.metrics)


def _forecast(stage: StageRecord, metric: str, end_step: int, worth: float) -> StageForecast:
    values = [
        (int(row["step"]), float(row[metric])) for row in stage.metrics if isinstance(row.get(metric), (int, float))
    ]
    made = forecast_reward([step for step, _ in values], [value for _, value in values], end_step)
    seconds = _step_s(stage.metrics)
    steps = end_step - made.step
    hours = steps * seconds / 3600 if seconds and steps > 0 else None
    left, per_hour = made.left, None
    if left is not None and hours:
        per_hour = Bounded(left.value / hours, left.low / hours, left.high / hours)
    return StageForecast(stage.name, made, hours, per_hour, _decision(made, steps, worth))


def _decision(made: RewardForecast, steps: int, worth: float) -> Outlook:
    if made.left is None:
        return "refused"
    if steps <= 0:
        return "ended"
    return "go on" if made.left.low >= worth else "stop" if made.left.high < worth else "open"


def _step_s(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Seconds a step, at the median: a pause of the run is no step."""
    timed = ((int(row["step"]), float(row["time"])) for row in metrics if isinstance(row.get("time"), (int, float)))
    each = [(late - early) / (last - first) for (first, early), (last, late) in pairwise(timed) if last > first]
    return statistics.median(each) if each else None
