"""The run's end of a mirror: it starts the process that copies, and sees that it lives. Never delays a step."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.tracking.mirror import MirrorState
from posttrain.tracking.trackers import TrackedRun, require_tracker

_log = logging.getLogger(__name__)

_LOOK_S = 5.0
_STARTS = 3


class MirrorSink:
    """A copy of `run` in the tracker `name`. What it writes goes to `mirrors/NAME.log`.

    `on_failed` is told at the end (tracker, why) where the copy is not whole. Raises: MissingExtraError.
    """

    def __init__(
        self, run: TrackedRun, name: str, on_failed: Callable[[str, str], None] = lambda tracker, why: None
    ) -> None:
        require_tracker(name)
        self._run, self._name, self._on_failed = run, name, on_failed
        run.save()
        self._starts, self._looked_at, self._last_step = 0, 0.0, -1
        self._process = self._start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing to send: the row is in `metrics.jsonl`, which the process reads."""
        self._last_step = step
        if time.monotonic() < self._looked_at + _LOOK_S:
            return
        self._looked_at = time.monotonic()
        if self._process.poll() is not None and self._starts < _STARTS:
            _log.warning("the copy to %s was ended (%s); started again", self._name, self._process.returncode)
            self._process = self._start()

    def event(self, kind: str, step: int, details: Mapping[str, Any]) -> None:
        """As `log`."""

    def close(self, timeout_s: float = 10.0) -> None:
        """Wait at most `timeout_s` for the copy to be whole; the process goes on a little longer by itself."""
        if self._process.stdin is None or self._process.stdin.closed:
            return
        self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _log.info("the copy to %s goes on", self._name)
        state = MirrorState.of(self._run, self._name)
        # A process that hangs says nothing of the rows that it has not read.
        is_short = state.recorded < self._last_step
        if state.error or state.waiting or is_short or self._process.poll():
            waits = f"{state.waiting} rows wait" if state.waiting else f"step {self._last_step} is not confirmed"
            why = state.error or waits
            _log.warning(
                "%s has %s of this run (%s); metrics.jsonl has all of it, and `posttrain mirror %s` sends the rest",
                self._name, f"the steps up to {state.recorded}" if state.recorded >= 0 else "nothing",
                why, self._run.folder,
            )  # fmt: skip
            self._on_failed(self._name, why)

    def _start(self) -> subprocess.Popen[bytes]:
        self._starts += 1
        with (self._run.mirrors / f"{self._name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "posttrain.tracking.mirror", str(self._run.folder.resolve()), self._name],
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
