"""The wish to stop, by signal: the first one is a wish, the second an end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class StoppedPolitely(Exception):
    """SIGTERM or Ctrl-C: the step in hand was finished and saved."""


class StopFlag:
    """Set by the first SIGTERM or Ctrl-C; the second one ends the process at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._ending: StoppedPolitely | None = None

    @property
    def is_set(self) -> bool:
        return self._event.is_set()

    @contextmanager
    def ending(self, what: str) -> Iterator[None]:
        """Inside, the wish ends the work in hand at once: for what is done again whole. Raises: StoppedPolitely."""
        self._ending = StoppedPolitely(f"stopped during {what}; start again to go on")
        try:
            if self.is_set:
                raise self._ending
            yield
        finally:
            self._ending = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Only the main thread can listen for signals; elsewhere this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise SystemExit(128 + number)
        self._event.set()
        if self._ending is not None:
            raise self._ending
