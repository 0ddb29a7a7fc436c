"""A run in trackio: its folder on this machine, or the Space or server that its own variables name."""
# pyright: reportMissingImports=false

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trackio

from posttrain.tracking.trackers.table import (
    REPORT_NAME,
    SAMPLES_NAME,
    MetricRow,
    Samples,
    TrackedRun,
    as_table,
    numbers,
    report_name,
)


class TrackioRun:
    """The same run again by its key; trackio's own file says which step was its last."""

    def __init__(self, run: TrackedRun) -> None:
        self._report_name = report_name(run)
        self._run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", run.project), name=run.key, resume="allow",
            config=dict(run.params), embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip

    def recorded(self) -> int:
        return self._run._next_step - 1

    def rows(self, rows: Sequence[MetricRow], samples: Samples) -> None:
        for row in rows:
            said = {SAMPLES_NAME: _table(one)} if (one := samples.get(row["step"])) else {}
            self._run.log({**numbers(row), **said}, step=row["step"])

    def note(self, name: str, step: int, text: str) -> None:
        self._run.alert(title=name, text=text)

    def report(self, html: str) -> None:
        """The same content is the same version there."""
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / REPORT_NAME
            page.write_text(html, "utf-8")
            self._run.log_artifact(page, name=self._report_name, type="report")

    def close(self) -> None:
        self._run.finish()


def _table(samples: Sequence[Mapping[str, Any]]) -> trackio.Table:
    columns, data = as_table(samples)
    return trackio.Table(columns=columns, data=data)
