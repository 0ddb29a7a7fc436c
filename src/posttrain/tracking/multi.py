"""Several sinks behind one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.protocols import MetricSink


class MultiSink:
    """Hands everything to each of `sinks`, in order."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = tuple(sinks)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for sink in self._sinks:
            sink.log(step, metrics)

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        for sink in self._sinks:
            sink.event(kind, step, details)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()
