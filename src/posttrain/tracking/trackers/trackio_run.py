"""A run in trackio: its folder on this machine, or the Space or server that its own variables name."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
from collections.abc import Sequence

import trackio

from posttrain.tracking.trackers.table import MetricRow, TrackedRun, numbers


class TrackioRun:
    """The same run again by its key; trackio's own file says which step was its last."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", run.project), name=run.key, resume="allow",
            config=dict(run.params), embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def recorded(self) -> int:
        return self._run._next_step - 1

    def rows(self, rows: Sequence[MetricRow]) -> None:
        for row in rows:
            self._run.log(numbers(row), step=row["step"])

    def note(self, name: str, step: int, text: str) -> None:
        self._run.alert(title=name, text=text)

    def close(self) -> None:
        self._run.finish()
