"""The record of a run: metrics.jsonl, events.jsonl and samples.jsonl, readable while they are written.

Knows nothing of what the numbers mean.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from posttrain.files import read_json_lines, write_atomic

METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
SAMPLES = "samples.jsonl"
_FILE_OF_EVENT = {"sample": SAMPLES}

_log = logging.getLogger(__name__)


class JsonlSink:
    """Appends one line per logged step, event or sample. A NaN becomes null and its name goes to `nonfinite`.

    An event of kind `sample` goes to samples.jsonl, every other kind to events.jsonl. A write that fails (full disk)
    is taken back whole, counted in `num_lost` and reported once; it never reaches the training loop.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._descriptors: dict[str, int] = {}
        self.num_lost = 0
        for name in (METRICS, EVENTS, SAMPLES):
            cut_torn_line(self._folder / name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._append(METRICS, {**metrics, "step": step, "time": time.time()})

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        self._append(_FILE_OF_EVENT.get(kind, EVENTS), {**details, "kind": kind, "step": step, "time": time.time()})

    def truncate_to(self, step: int) -> None:
        """Forget everything after `step`: what a run does that continues from a checkpoint."""
        self.close()
        for name in (METRICS, EVENTS, SAMPLES):
            path = self._folder / name
            if not path.exists():
                continue
            # Line by line: a long run's records are many times its file.
            if any(record.get("step", 0) > step for _, record in read_json_lines(path, growing=True)):
                lines = read_json_lines(path, growing=True)
                write_atomic(path, b"".join(encode_line(one) for _, one in lines if one.get("step", 0) <= step))

    def close(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _append(self, name: str, record: dict[str, Any]) -> None:
        line = encode_line(record)
        try:
            if name not in self._descriptors:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._descriptors[name] = os.open(self._folder / name, flags, 0o644)
            write_whole(self._descriptors[name], line)
        except OSError as error:
            self.num_lost += 1
            if self.num_lost == 1:
                _log.warning(
                    "%s: a line could not be written (%s); training goes on without it", self._folder / name, error
                )


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One JSON line: `step` and `time` first, non-finite numbers as null with their names in `nonfinite`."""
    nonfinite: list[str] = []
    head = {name: record[name] for name in ("kind", "step", "time") if name in record}
    body = {name: _plain(value, name, nonfinite) for name, value in record.items() if name not in head}
    full = {**head, **body} | ({"nonfinite": nonfinite} if nonfinite else {})
    return (json.dumps(full, ensure_ascii=True, allow_nan=False) + "\n").encode("ascii")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a file that may still be written to; a missing file is empty. Raises: DataError for damage."""
    return [record for _, record in read_json_lines(path, growing=True)] if Path(path).exists() else []


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, f"{name}.{key}", nonfinite) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{name}.{index}", nonfinite) for index, inner in enumerate(value)]
    try:
        number = float(value)  # a float, or a numpy or torch scalar
    except (TypeError, ValueError):
        return str(value)
    if math.isfinite(number):
        return number
    nonfinite.append(name)
    return None


def write_whole(descriptor: int, line: bytes) -> None:
    """Write all of `line` or nothing of it."""
    start = os.fstat(descriptor).st_size
    written = 0
    try:
        while written < len(line):
            written += os.write(descriptor, line[written:])
    except OSError:
        os.ftruncate(descriptor, start)
        raise


def cut_torn_line(path: Path) -> None:
    """A crash can leave half a line at the end; a line appended to it would be lost too."""
    if not path.exists():
        return
    with path.open("r+b") as handle:
        end = handle.seek(0, os.SEEK_END)
        position = end
        while position > 0:
            start = max(0, position - 65536)
            handle.seek(start)
            newline = handle.read(position - start).rfind(b"\n")
            if newline >= 0:
                position = start + newline + 1
                break
            position = start
        if position < end:
            handle.truncate(position)
