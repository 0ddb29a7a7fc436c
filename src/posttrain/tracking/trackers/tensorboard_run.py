"""A run as TensorBoard's event files, in the stage's folder: `tensorboard --logdir runs/NAME/stages`."""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from textwrap import indent
from typing import Any

from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from posttrain.tracking.trackers.table import SAMPLES_NAME, MetricRow, Samples, TrackedRun, as_table, numbers


class TensorBoardRun:
    """A row is one event, so that half a row is never there."""

    def __init__(self, run: TrackedRun) -> None:
        self._folder = run.folder / "tensorboard"
        self._recorded = max((step for file in self._folder.glob("events.*") for step in _steps(str(file))), default=-1)
        self._writer = EventFileWriter(str(self._folder))
        if self._recorded < 0:
            table = "\n".join(f"    {name}: {value}" for name, value in run.params.items())
            self.note("config", 0, table)

    def recorded(self) -> int:
        return self._recorded

    def rows(self, rows: Sequence[MetricRow], samples: Samples) -> None:
        for row in rows:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers(row).items()]
            if one := samples.get(row["step"]):
                values += text_pb(SAMPLES_NAME, _as_text(one)).value
            self._writer.add_event(Event(wall_time=row["time"], step=row["step"], summary=Summary(value=values)))
        self._writer.flush()

    def note(self, name: str, step: int, text: str) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=text_pb(name, text)))

    def report(self, html: str) -> None:
        """TensorBoard keeps no files of others."""

    def close(self) -> None:
        self._writer.close()


def _as_text(samples: Sequence[Mapping[str, Any]]) -> str:
    """Indented, which Markdown shows as it is."""
    columns, data = as_table(samples)
    blocks = ["\n".join(f"{name}: {cell}" for name, cell in zip(columns, row, strict=True)) for row in data]
    return indent("\n\n".join(blocks), "    ")


def _steps(file: str) -> list[int]:
    """Of the rows in it, not of remarks."""
    events = LegacyEventFileLoader(file).Load()
    return [event.step for event in events if any(value.HasField("simple_value") for value in event.summary.value)]
