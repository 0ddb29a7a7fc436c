"""What copies a run to a tracker: a process that reads the run's own files as they grow.

`metrics.jsonl` is the outbox, a step's samples go with its row, and the tracker says itself how far its copy goes: a step is sent once,
whoever was killed between sending and hearing of it. What a tracker that is away did not get stays in the files for the next start, or for
`posttrain mirror`. All text passes `clean_text`.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.errors import EXIT_AGAIN
from posttrain.files import read_json, write_json
from posttrain.tracking.jsonl import EVENTS, METRICS, SAMPLES
from posttrain.tracking.trackers import TRACKERS, TrackedRun, Tracker, tracked_run
from posttrain.uris import clean_text, clean_value

_log = logging.getLogger(__name__)

_ROWS_PER_CALL = 100
_LOOK_S, _RETRY_AFTER_S = 1.0, 5.0
PATIENCE_S = 30.0
"""How long a copy is waited for when its run has ended."""
_LAST_CALL_S = 5.0
_NOTED = "finding"


@dataclass(frozen=True)
class MirrorState:
    """`recorded` is the last step that is there; `waiting` rows are not; `error` is why, in one line."""

    recorded: int = -1
    waiting: int = 0
    error: str = ""

    @classmethod
    def of(cls, run: TrackedRun, name: str) -> MirrorState:
        """What the mirror's process last said of itself."""
        path = run.mirrors / f"{name}.json"
        return cls(**read_json(path)) if path.exists() else cls(error="it has not begun")


def keep_copy(run: TrackedRun, name: str, ended: threading.Event, patience_s: float = PATIENCE_S) -> MirrorState:
    """Copy what is recorded, and what is added until `ended`; then at most `patience_s` more. One process a tracker at a time."""
    rows, remarks, samples = (_GrowingFile(run.folder / name) for name in (METRICS, EVENTS, SAMPLES))
    unsent = _Unsent(run, name)
    with _alone(run, name):
        retry_at, give_up_at = 0.0, None
        while True:
            over = ended.is_set()  # asked before the files are read: then they are whole
            unsent.take(rows, remarks, samples)
            if time.monotonic() >= retry_at:
                retry_at = 0.0 if unsent.send(with_report=over) else time.monotonic() + _RETRY_AFTER_S
            if over:
                give_up_at = give_up_at or time.monotonic() + patience_s
                if unsent.is_whole or time.monotonic() > give_up_at:
                    break
            ended.wait(_LOOK_S) if not over else time.sleep(min(_LOOK_S, patience_s))
        unsent.close()
    return unsent.state


class _Unsent:
    """What is to be sent, and the tracker it goes to, opened again after each failure."""

    def __init__(self, run: TrackedRun, name: str) -> None:
        self._run, self._name = run, name
        self._rows: list[dict[str, Any]] = []
        self._remarks: list[dict[str, Any]] = []
        self._samples: list[dict[str, Any]] = []
        self._tracker: Tracker | None = None
        self._recorded, self._error = -1, ""
        self._has_report = False
        self._said: MirrorState | None = None

    @property
    def is_whole(self) -> bool:
        return self._tracker is not None and not self._rows and not self._remarks

    @property
    def state(self) -> MirrorState:
        return MirrorState(self._recorded, len(self._rows), self._error)

    def take(self, rows: _GrowingFile, remarks: _GrowingFile, samples: _GrowingFile) -> None:
        """Rows first: what goes with a row was written before it."""
        # A run that went on from a checkpoint writes steps again that are there already; the first copy stays.
        self._rows = [row for row in rows.behind(self._rows) if row["step"] > self._recorded]
        self._remarks = [remark for remark in remarks.behind(self._remarks) if remark["kind"] == _NOTED]
        if self._run.log_completions:
            self._samples = [sample for sample in samples.behind(self._samples) if sample["step"] > self._recorded]

    def send(self, with_report: bool = True) -> bool:
        """Whether the tracker took everything; the report, if there is one, comes last and once."""
        try:
            self._send()
            if with_report:
                self._send_report()
            self._error = ""
        except Exception as error:  # noqa: BLE001 - the border to another system: whatever it raises is tried again later
            self._tracker, self._error = None, clean_text(_first_line(error))
            if self._said is None or self._said.error != self._error:
                _log.warning("%s does not answer: %s", self._name, self._error)
        self._say()
        return not self._error

    def _send(self) -> None:
        if self._tracker is None:
            self._tracker = TRACKERS[self._name].open(replace(self._run, params=clean_value(self._run.params)))
            self._recorded = self._tracker.recorded()
            self._rows = [row for row in self._rows if row["step"] > self._recorded]
            self._samples = [sample for sample in self._samples if sample["step"] > self._recorded]
            self._remarks = [remark for remark in self._remarks if remark["step"] >= self._recorded]
        while self._rows:
            some = self._rows[:_ROWS_PER_CALL]
            last = some[-1]["step"]
            self._note(self._tracker, last)  # first: where a step is, what was found up to it is too
            samples = self._with(some)
            self._tracker.rows(some, samples)
            self._recorded = last
            del self._samples[: sum(map(len, samples.values()))]
            del self._rows[: len(some)]
        self._note(self._tracker)

    def _send_report(self) -> None:
        page = self._run.folder / self._run.report
        if not self._run.log_completions:  # it shows them
            return
        if self._tracker is not None and not self._has_report and page.is_file():
            self._tracker.report(clean_text(page.read_text("utf-8")))
            self._has_report = True

    def _with(self, rows: Sequence[Mapping[str, Any]]) -> dict[int, list[dict[str, Any]]]:
        """The samples that go with these rows: those up to a row's step. One without a row waits for the row behind it."""
        found: dict[int, list[dict[str, Any]]] = {}
        steps = [row["step"] for row in rows]
        for sample in self._samples:
            at = bisect_left(steps, sample["step"])
            if at == len(steps):
                break
            found.setdefault(steps[at], []).append(clean_value(sample))
        return found

    def _note(self, tracker: Tracker, last: float = math.inf) -> None:
        """Send the remarks up to step `last`."""
        while self._remarks and self._remarks[0]["step"] <= last:
            remark = self._remarks[0]
            name = ".".join(str(remark[part]) for part in ("kind", "rule", "step") if part in remark)
            tracker.note(name, remark["step"], clean_text(remark["message"]))
            del self._remarks[0]

    def close(self) -> None:
        """Raises: what the tracker raises where it cannot keep what it took."""
        if self._tracker is not None:
            self._tracker.close()

    def _say(self) -> None:
        if self.state != self._said:
            self._said = self.state
            write_json(self._run.mirrors / f"{self._name}.json", self._said.__dict__)


class _GrowingFile:
    """The whole lines that are added to a file."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._at = path, 0, 0

    def behind(self, waiting: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """`waiting` and the lines that were added since the last look; of a file that was written anew, its lines alone."""
        if not self._path.exists():
            return waiting
        with self._path.open("rb") as handle:
            inode = os.fstat(handle.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._at, waiting = inode, 0, []
            handle.seek(self._at)
            data = handle.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [*waiting, *(json.loads(line) for line in whole.split(b"\n") if line)]


@contextmanager
def _alone(run: TrackedRun, name: str) -> Iterator[None]:
    """An earlier mirror of this run may still be sending what it has; it is waited for."""
    run.mirrors.mkdir(exist_ok=True)
    with (run.mirrors / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def main(folder: str, name: str, patience_s: float = PATIENCE_S) -> None:
    """Until standard input ends, which it does when the run ends, however it ends; a tracker that hangs is left then."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.buffer.read()
        ended.set()
        time.sleep(patience_s + _LAST_CALL_S)
        os._exit(EXIT_AGAIN)

    threading.Thread(target=wait, daemon=True).start()
    keep_copy(tracked_run(Path(folder)), name, ended, patience_s)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
