"""The bounded history that health rules look at, and the few questions they ask of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from posttrain.types import StepReport


@dataclass(frozen=True, slots=True)
class History:
    """`first`: the run's first reports; `recent`: the latest, the newest last; `evaluated`: those with an evaluation.

    An evaluated report carries `reward` as a mean over the steps before it, because one step's reward is noise.
    """

    first: tuple[StepReport, ...]
    recent: tuple[StepReport, ...]
    evaluated: tuple[StepReport, ...] = ()

    @property
    def newest(self) -> StepReport:
        return self.recent[-1]

    @property
    def is_young(self) -> bool:
        """Whether the run is still in its first steps, which everything later is compared with."""
        return self.newest.step <= self.first[-1].step

    def start(self, name: str) -> float:
        """Mean over the first steps; NaN where the metric was not logged."""
        return mean(values(self.first, name))

    def now(self, name: str, count: int) -> float:
        """Mean of the last `count` values; NaN if fewer were logged (some metrics are not logged every step)."""
        known = values(self.recent, name)[-count:]
        return mean(known) if len(known) == count else math.nan

    def lasts(self, steps: int, holds: Callable[[StepReport], bool]) -> bool:
        """Whether `holds` for each of the last `steps` reports."""
        latest = self.recent[-int(steps) :]
        return len(latest) == int(steps) and all(holds(report) for report in latest)


def get(report: StepReport, name: str) -> float:
    """The metric, NaN where it was not logged, so that every comparison with it is false."""
    return float(report.metrics.get(name, math.nan))


def eval_losses(report: StepReport) -> list[str]:
    """The losses of its validation sets: `eval_loss`, or `eval_NAME_loss` where a set has a name."""
    # A part of the loss that is logged in training too (aux_loss, nll_loss) is no validation set.
    parts = tuple(f"_{name}" for name in report.metrics if name.endswith("_loss") and not name.startswith("eval_"))
    return [n for n in report.metrics if n.startswith("eval_") and n.endswith("_loss") and not n.endswith(parts)]


def values(reports: Sequence[StepReport], name: str) -> list[float]:
    """Finite values in order of time."""
    return [value for report in reports if math.isfinite(value := get(report, name))]


def mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan
