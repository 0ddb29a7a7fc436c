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

from posttrain.report.charts import MEMORY, THROUGHPUT, metrics_named

_CHUNK_BYTES = 1 << 16
_BLOCK = 256
"""Rows whose lowest, highest and mean value are kept, so that a long curve is not read whole each time."""
Points = tuple[tuple[int, float, float, float], ...]
"""(step, lowest, highest, mean) of each bucket, the step being its last."""
_STEPS = np.iinfo(np.int64)
_LARGEST = 1e300
"""What lies beyond counts as no number: sums and differences of the others do."""
_NOT_DRAWN = frozenset({"step", "time", "nonfinite"})
MOST_METRICS = 2000
"""Of one file; more names than these come from a step or a sample in the name, and each costs a column."""
MOST_NUMBERS = 30_000_000
"""That `SeriesCache` keeps, 8 bytes each."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the steps asked for; `num_nonfinite` values of the file were no numbers."""

    points: Points
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
        self._summaries = dict[str, np.ndarray]()
        self._is_sorted = True
        self._problems = list[str]()
        self._has_all, self._has_more_names = True, False
        self._inode, self._offset, self._size, self._lines = -1, 0, 0, 0
        self._last = b""

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
                if found.st_ino != self._inode or not self._goes_on(handle):
                    self._forget()
                    self._inode = found.st_ino
                self._size = found.st_size
                handle.seek(self._offset)
                while (more := self._read_lines(handle)) and time.monotonic() < deadline_s:
                    pass
                self._has_all = not more

    def _goes_on(self, handle: Any) -> bool:
        """Whether the line that was read last stands where it stood: a new file may have the inode of one that was removed."""
        handle.seek(self._offset - len(self._last))
        return handle.read(len(self._last)) == self._last

    def _read_lines(self, handle: Any) -> bool:
        """The whole lines of the next chunk; whether there were any."""
        lines = handle.readlines(_CHUNK_BYTES)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        for line in lines:
            self._offset += len(line)
            self._lines += 1
            self._last = line
            self._take(line)
        return bool(lines)

    def _take(self, line: bytes) -> None:
        try:
            step, values = _read_row(line)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            if line.strip():
                self._problems.append(f"{self.path.name}:{self._lines} is no logged step and is left out")
            return
        place = len(self._steps)
        self._is_sorted = self._is_sorted and (place == 0 or step >= self._steps[-1])
        self._steps.append(step)
        for name, value in values.items():
            if name not in self._columns and len(self._columns) >= MOST_METRICS:
                self._has_more_names = True
                continue
            self._put(name, place, value)
            if math.isnan(value):
                self._nonfinite.setdefault(name, []).append(place)

    def _put(self, name: str, place: int, value: float) -> None:
        column = self._columns.get(name)
        if column is None:
            column = self._columns[name] = array("d")
        missing = place - len(column)
        if missing > 0:
            column.extend([math.nan] * missing)
        column.append(value)

    def window(self, names: Sequence[str], low: int | None, high: int | None, num_points: int) -> SeriesWindow:
        """The curves of `names`, as panels name them (all that were logged, if none is named), between two steps."""
        with self._lock:
            steps = np.frombuffer(self._steps, dtype=np.int64) if self._steps else np.zeros(0, np.int64)
            known = self._names()
            wanted = [name for name in metrics_named(names, known) if name in known] or ([] if names else list(known))
            span = _span(steps, low, high) if self._is_sorted else None
            curves = {
                name: Curve(
                    self._points(name, steps, span, num_points)
                    if span is not None
                    else _buckets(*_finite_between(steps, self._column(name, 0, len(steps)), low, high), num_points),
                    len(self._nonfinite.get(name, ())),
                )
                for name in wanted
            }
            ends = (int(steps.min()), int(steps.max())) if len(steps) else None
            share = 1.0 if self._has_all else self._offset / self._size
            more = f"{self.path.name} has more than {MOST_METRICS:,} metrics; the others are not drawn"
            problems = (*self._problems[:20], *[more] * self._has_more_names)
            return SeriesWindow(curves, known, ends, len(steps), share, problems)

    def _names(self) -> tuple[str, ...]:
        derived = [THROUGHPUT] * (THROUGHPUT not in self._columns and {"num_tokens", "time"} <= self._columns.keys())
        derived += [MEMORY] * ("memory_peak_bytes" in self._columns)
        return (*(name for name in self._columns if name not in _NOT_DRAWN), *derived)

    def _column(self, name: str, begin: int, end: int) -> np.ndarray:
        """Of the rows between; NaN for those that lack it."""
        if (column := self._columns.get(name)) is not None:
            values = np.full(end - begin, np.nan)
            there = np.frombuffer(column, dtype=np.float64)[begin:end]
            values[: len(there)] = there
            return values
        if name == MEMORY:
            return self._column("memory_peak_bytes", begin, end) / 2**20
        assert name == THROUGHPUT
        before = max(0, begin - 1)
        tokens, seconds = (np.diff(self._column(part, before, end)) for part in ("num_tokens", "time"))
        with np.errstate(divide="ignore", invalid="ignore"):
            speeds = np.where((tokens > 0) & (seconds > 0), tokens / seconds, np.nan)
        return speeds if begin else np.append(np.nan, speeds)

    def _points(self, name: str, steps: np.ndarray, span: tuple[int, int], num_points: int) -> Points:
        """Of few rows their values; of many what is kept of each block of them."""
        begin, end = span
        if end - begin > num_points * _BLOCK:
            first, last = -(-begin // _BLOCK), end // _BLOCK
            head = self._summary(name, steps, begin, first * _BLOCK)
            tail = self._summary(name, steps, last * _BLOCK, end)
            blocks = np.hstack([head, self._blocks(name, steps)[:, first:last], tail])
            blocks = blocks[:, blocks[4] > 0]
            if blocks[4].sum() > num_points and blocks.shape[1] > num_points:
                return _merged_blocks(blocks, num_points)
        return _buckets(*_finite_between(steps[begin:end], self._column(name, begin, end), None, None), num_points)

    def _blocks(self, name: str, steps: np.ndarray) -> np.ndarray:
        """The summaries of every `_BLOCK` rows that are complete, each computed once."""
        done = self._summaries.get(name, np.zeros((5, 0)))
        begin, end = done.shape[1] * _BLOCK, len(steps) // _BLOCK * _BLOCK
        if end > begin:
            done = self._summaries[name] = np.hstack([done, self._summary(name, steps, begin, end, _BLOCK)])
        return done

    def _summary(self, name: str, steps: np.ndarray, begin: int, end: int, size: int = 0) -> np.ndarray:
        """Last step with a number, lowest, highest, sum and count of every `size` rows; without it of all together."""
        if end == begin:
            return np.zeros((5, 0))
        values = self._column(name, begin, end).reshape(-1, size or end - begin)
        finite = np.isfinite(values)
        last = np.where(finite, steps[begin:end].reshape(values.shape), np.iinfo(np.int64).min).max(axis=1)
        lows, highs = (np.where(finite, values, fill) for fill in (np.inf, -np.inf))
        sums = np.where(finite, values, 0.0).sum(axis=1)
        return np.stack([last, lows.min(axis=1), highs.max(axis=1), sums, finite.sum(axis=1)])


def _read_row(line: bytes) -> tuple[int, dict[str, float]]:
    """The step and its numbers; NaN for those that the row names as no numbers. Raises: many, for what is no row."""
    row = json.loads(line)
    step = int(row["step"])
    if not _STEPS.min <= step <= _STEPS.max:
        raise OverflowError
    values = {name: float(one) for name, one in row.items() if type(one) in (int, float) and name != "step"}
    absent = row.get("nonfinite")
    return step, {
        **{name: one if abs(one) <= _LARGEST else math.nan for name, one in values.items()},
        **dict.fromkeys(map(str, absent if isinstance(absent, list) else ()), math.nan),
    }


def _span(steps: np.ndarray, low: int | None, high: int | None) -> tuple[int, int]:
    """The rows between two steps, of steps that only grow."""
    begin = 0 if low is None else int(np.searchsorted(steps, low, "left"))
    return begin, max(begin, len(steps) if high is None else int(np.searchsorted(steps, high, "right")))


def _finite_between(
    steps: np.ndarray, values: np.ndarray, low: int | None, high: int | None
) -> tuple[np.ndarray, np.ndarray]:
    kept = np.isfinite(values)
    if low is not None:
        kept &= steps >= low
    if high is not None:
        kept &= steps <= high
    return steps[kept], values[kept]


def _buckets(steps: np.ndarray, values: np.ndarray, num_points: int) -> Points:
    """As many as were asked for, of equally many values each; what is fewer stays as it is."""
    if len(steps) <= num_points:
        ones = values.tolist()
        return tuple(zip(steps.tolist(), ones, ones, ones, strict=True))
    starts = np.linspace(0, len(steps), num_points, endpoint=False).astype(np.int64)
    last, sizes = np.append(starts[1:], len(steps)) - 1, np.diff(np.append(starts, len(steps)))
    means = np.add.reduceat(values, starts) / sizes
    columns = (np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts), means)
    return tuple(zip(steps[last].tolist(), *(column.tolist() for column in columns), strict=True))


def _merged_blocks(blocks: np.ndarray, num_points: int) -> Points:
    last, lows, highs, sums, counts = blocks
    starts = np.linspace(0, len(last), num_points, endpoint=False).astype(np.int64)
    steps = np.maximum.reduceat(last, starts).astype(np.int64)
    means = np.add.reduceat(sums, starts) / np.add.reduceat(counts, starts)
    columns = (np.minimum.reduceat(lows, starts), np.maximum.reduceat(highs, starts), means)
    return tuple(zip(steps.tolist(), *(column.tolist() for column in columns), strict=True))


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
