"""What copies a run to a tracker: a process that reads the run's own files as they grow.

`metrics.jsonl` is the outbox, and the tracker says itself how far its copy goes: a step is sent once, whoever was killed between sending
and hearing of it. What a tracker that is away did not get stays in the files for the next start, or for `posttrain mirror`.
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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import EXIT_AGAIN
from posttrain.files import read_json, write_json
from posttrain.tracking.jsonl import EVENTS, METRICS
from posttrain.tracking.trackers import TRACKERS, TrackedRun, Tracker, tracked_run
from posttrain.uris import without_secrets

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
    rows, remarks = _GrowingFile(run.folder / METRICS), _GrowingFile(run.folder / EVENTS)
    unsent = _Unsent(run, name)
    with _alone(run, name):
        retry_at, give_up_at = 0.0, None
        while True:
            over = ended.is_set()  # asked before the files are read: then they are whole
            unsent.take(rows.new(), remarks.new())
            if time.monotonic() >= retry_at:
                retry_at = 0.0 if unsent.send() else time.monotonic() + _RETRY_AFTER_S
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
        self._tracker: Tracker | None = None
        self._recorded, self._error = -1, ""
        self._said: MirrorState | None = None

    @property
    def is_whole(self) -> bool:
        return self._tracker is not None and not self._rows and not self._remarks

    @property
    def state(self) -> MirrorState:
        return MirrorState(self._recorded, len(self._rows), self._error)

    def take(self, rows: list[dict[str, Any]], remarks: list[dict[str, Any]]) -> None:
        # A run that went on from a checkpoint writes steps again that are there already; the first copy stays.
        self._rows += [row for row in rows if row["step"] > self._recorded]
        self._remarks += [remark for remark in remarks if remark["kind"] == _NOTED]

    def send(self) -> bool:
        """Whether the tracker took everything."""
        try:
            self._send()
            self._error = ""
        except Exception as error:  # noqa: BLE001 - the border to another system: whatever it raises is tried again later
            self._tracker, self._error = None, without_secrets(_first_line(error))
            if self._said is None or self._said.error != self._error:
                _log.warning("%s does not answer: %s", self._name, self._error)
        self._say()
        return not self._error

    def _send(self) -> None:
        if self._tracker is None:
            self._tracker = TRACKERS[self._name].open(self._run)
            self._recorded = self._tracker.recorded()
            self._rows = [row for row in self._rows if row["step"] > self._recorded]
            self._remarks = [remark for remark in self._remarks if remark["step"] >= self._recorded]
        while self._rows:
            some = self._rows[:_ROWS_PER_CALL]
            last = some[-1]["step"]
            self._note(self._tracker, last)  # first: where a step is, what was found up to it is too
            self._tracker.rows(some)
            self._recorded = last
            del self._rows[: len(some)]
        self._note(self._tracker)

    def _note(self, tracker: Tracker, last: float = math.inf) -> None:
        """Send the remarks up to step `last`."""
        while self._remarks and self._remarks[0]["step"] <= last:
            remark = self._remarks[0]
            name = ".".join(str(remark[part]) for part in ("kind", "rule", "step") if part in remark)
            tracker.note(name, remark["step"], remark["message"])
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
    """The whole lines that were added to a file since the last look. A file that was written anew is read anew."""

    def __init__(self, path: Path) -> None:
        self._path, self._inode, self._at = path, 0, 0

    def new(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as handle:
            inode = os.fstat(handle.fileno()).st_ino
            if inode != self._inode:
                self._inode, self._at = inode, 0
            handle.seek(self._at)
            data = handle.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._at += len(whole)
        return [json.loads(line) for line in whole.split(b"\n") if line]


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
