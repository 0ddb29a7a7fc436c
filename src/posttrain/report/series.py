"""Curves of a `metrics.jsonl` that is still written to: read as it grows, and cut down to what a screen can show.

Knows nothing of how they are drawn.
"""

from __future__ import annotations

import json
import math
import os
import threading
import time
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.report.charts import MEMORY, THROUGHPUT

_CHUNK_BYTES = 1 << 18
_NOT_DRAWN = frozenset({"step", "time", "nonfinite"})
MOST_NUMBERS = 30_000_000
"""That `SeriesCache` keeps, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the steps asked for, as (step, lowest, highest, mean) of each of its buckets; `num_nonfinite` values were no numbers."""

    points: tuple[tuple[int, float, float, float], ...]
    num_nonfinite: int


@dataclass(frozen=True, slots=True)
class SeriesWindow:
    """Curves by metric, the steps of the file so far, and which share of it was read: 1 when all that is whole was."""

    curves: dict[str, Curve]
    names: tuple[str, ...]
    steps: tuple[int, int] | None
    num_rows: int
    share_read: float
    problems: tuple[str, ...]


class MetricSeries:
    """One `metrics.jsonl`, by columns. `grow` reads what was added, for so long; a last line without its end waits."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._steps = array("q")
        self._columns: dict[str, array[float]] = {}
        self._nonfinite = dict[str, list[int]]()
        self._problems = list[str]()
        self._has_all = True
        self._inode, self._offset, self._size, self._lines = -1, 0, 0, 0

    @property
    def num_numbers(self) -> int:
        return len(self._steps) * (1 + len(self._columns))

    def grow(self, within_s: float) -> None:
        """Read on, at least one chunk. A file that was written anew, as by a run that went back, is read anew."""
        deadline_s = time.monotonic() + within_s
        with self._lock:
            try:
                handle = self.path.open("rb")
            except FileNotFoundError:
                self._forget()
                return
            with handle:
                found = os.fstat(handle.fileno())
                if found.st_ino != self._inode or found.st_size < self._offset:
                    self._forget()
                    self._inode = found.st_ino
                self._size = found.st_size
                handle.seek(self._offset)
                while (more := self._read_lines(handle)) and time.monotonic() < deadline_s:
                    pass
                self._has_all = not more

    def _read_lines(self, handle: Any) -> bool:
        """The whole lines of the next chunk; whether there were any."""
        lines = handle.readlines(_CHUNK_BYTES)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for line in lines:
            self._offset += len(line)
            self._lines += 1
            self._take(line)
        return bool(lines)

    def _take(self, line: bytes) -> None:
        try:
            row = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            if line.strip():
                self._problems.append(f"{self.path.name}:{self._lines} is no logged step and is left out")
            return
        place = len(self._steps)
        self._steps.append(step)
        for name, value in row.items():
            if name in _NOT_DRAWN and name != "time":
                continue
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self._put(name, place, float(value))
        for name in row.get("nonfinite") or ():
            self._put(str(name), place, math.nan)
            self._nonfinite.setdefault(str(name), []).append(place)

    def _put(self, name: str, place: int, value: float) -> None:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = array("d")
        missing = place - len(column)
        if missing > 0:
            column.extend([math.nan] * missing)
        column.append(value)

    def window(self, names: Sequence[str], low: int | None, high: int | None, num_points: int) -> SeriesWindow:
        """The curves of `names` (all that were logged, if none is named) between two steps."""
        with self._lock:
            steps = np.frombuffer(self._steps, dtype=np.int64) if self._steps else np.zeros(0, np.int64)
            known = self._names()
            wanted = [name for name in names if name in known] or ([] if names else list(known))
            inside = _inside(steps, low, high)
            curves = {name: self._curve(name, steps, inside, num_points) for name in wanted}
            ends = (int(steps.min()), int(steps.max())) if len(steps) else None
            share = 1.0 if self._has_all else self._offset / self._size
            return SeriesWindow(curves, known, ends, len(steps), share, tuple(self._problems[:20]))

    def _names(self) -> tuple[str, ...]:
        derived = [THROUGHPUT] * (THROUGHPUT not in self._columns and {"num_tokens", "time"} <= self._columns.keys())
        derived += [MEMORY] * ("memory_peak_bytes" in self._columns)
        return (*(name for name in self._columns if name not in _NOT_DRAWN), *derived)

    def _column(self, name: str) -> np.ndarray:
        """With NaN for rows that lack it."""
        values = np.full(len(self._steps), np.nan)
        if column := self._columns.get(name):
            values[: len(column)] = np.frombuffer(column, dtype=np.float64)
            return values
        if name == MEMORY:
            return self._column("memory_peak_bytes") / 2**20
        assert name == THROUGHPUT
        tokens, seconds = np.diff(self._column("num_tokens")), np.diff(self._column("time"))
        with np.errstate(divide="ignore", invalid="ignore"):
            values[1:] = np.where((tokens > 0) & (seconds > 0), tokens / seconds, np.nan)
        return values

    def _curve(self, name: str, steps: np.ndarray, inside: np.ndarray, num_points: int) -> Curve:
        values, kept = self._column(name)[inside], steps[inside]
        finite = np.isfinite(values)
        bad = len(self._nonfinite.get(name, ()))
        return Curve(_buckets(kept[finite], values[finite], num_points), bad)


def _inside(steps: np.ndarray, low: int | None, high: int | None) -> np.ndarray:
    inside = np.ones(len(steps), dtype=bool)
    if low is not None:
        inside &= steps >= low
    if high is not None:
        inside &= steps <= high
    return inside


def _buckets(steps: np.ndarray, values: np.ndarray, num_points: int) -> tuple[tuple[int, float, float, float], ...]:
    """As many as were asked for, of equally many values each; what is fewer stays as it is."""
    if len(steps) == 0:
        return ()
    if len(steps) <= num_points:
        ones = values.tolist()
        return tuple(zip(steps.tolist(), ones, ones, ones, strict=True))
    starts = np.linspace(0, len(steps), num_points, endpoint=False).astype(np.int64)
    sizes = np.diff(np.append(starts, len(steps)))
    last = np.append(starts[1:], len(steps)) - 1
    columns = (np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), np.add.reduceat(values, starts) / sizes)  # fmt: skip
    return tuple(zip(steps[last].tolist(), *(column.tolist() for column in columns), strict=True))


class SeriesCache:
    """The series that were asked for last, as many as fit into memory."""

    def __init__(self, most: int = MOST_NUMBERS) -> None:
        self._most, self._kept = most, OrderedDict[Path, MetricSeries]()
        self._lock = threading.Lock()

    def of(self, path: Path) -> MetricSeries:
        with self._lock:
            found = self._kept.pop(path, None) or MetricSeries(path)
            self._kept[path] = found
            while len(self._kept) > 1 and sum(one.num_numbers for one in self._kept.values()) > self._most:
                self._kept.popitem(last=False)
            return found


def window_record(window: SeriesWindow, requested: Sequence[str]) -> dict[str, Any]:
    """As JSON data."""
    return {
        "steps": window.steps, "num_rows": window.num_rows, "share_read": window.share_read, "names": list(window.names),
        "problems": list(window.problems), "absent": [name for name in requested if name not in window.curves],
        "curves": {name: {"points": curve.points, "num_nonfinite": curve.num_nonfinite} for name, curve in window.curves.items()},
    }  # fmt: skip
