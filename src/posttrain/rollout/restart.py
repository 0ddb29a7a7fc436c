"""An engine that is started anew when it is gone: brought to the weights it had, and asked again for what it had not answered."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from posttrain.errors import EngineGoneError
from posttrain.protocols import Engine, Weights
from posttrain.types import Completion, EngineInfo, Moved, Request, SamplingParams

log = logging.getLogger(__name__)


class RestartedEngine:
    """The engine that `start` makes; another one when that is gone, at most `max_restarts` times.

    A request is asked again with its seed, and only where no completion of it was given out. The weights that are pushed
    again are those of the last update, so they must not move before the next one; `check` (the canary) compares with them.
    Raises: EngineGoneError, of the last one, when there are no restarts left.
    """

    def __init__(
        self, start: Callable[[], Engine], check: Callable[[Engine, Weights], object], max_restarts: int
    ) -> None:
        self._start, self._check, self._left = start, check, max_restarts
        self._engine = start()
        self._pushed: tuple[Weights, int] | None = None
        self.restarts = 0

    @property
    def policy_version(self) -> int:
        return self._engine.policy_version

    def describe(self) -> EngineInfo:
        return self._engine.describe()

    def generate(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[Completion]:
        return self._completions(requests, params, self._engine.generate(requests, params))

    def _completions(
        self, requests: Sequence[Request], params: SamplingParams, found: Iterator[Completion]
    ) -> Iterator[Completion]:
        places = list(range(len(requests)))
        left = set(places)
        while True:
            try:
                for completion in found:
                    place = places[completion.request]
                    left.discard(place)
                    yield replace(completion, request=place)
                return
            except EngineGoneError as error:
                self._again(error)
                places = sorted(left)
                found = self._engine.generate([requests[place] for place in places], params)

    def score(self, sequences: Sequence[tuple[Sequence[int], int]], temperature: float = 1.0) -> list[list[float]]:
        while True:
            try:
                return self._engine.score(sequences, temperature)
            except EngineGoneError as error:
                self._again(error)

    def update(self, weights: Weights, version: int) -> Moved:
        self._pushed = weights, version
        try:
            return self._engine.update(weights, version)
        except EngineGoneError as error:
            return self._again(error)

    def close(self) -> None:
        self._engine.close()

    def _again(self, error: EngineGoneError) -> Moved:
        """A new engine with the weights of the last update."""
        while True:
            self._engine.close()
            if not self._left:
                raise error
            self._left -= 1
            self.restarts += 1
            log.warning("%s; it is started again (%d more times at most)", error, self._left)
            try:
                self._engine = self._start()
                if self._pushed is None:
                    return Moved(0, 0)
                moved = self._engine.update(*self._pushed)
                self._check(self._engine, self._pushed[0])
                return moved
            except EngineGoneError as gone:
                error = gone
