"""Environments and tools behind processes with deadlines: one that hangs, crashes or floods costs the episode that it is played in."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.asked import AskedProcess, ScribbledError, wait_for
from posttrain.environments.spec import VERIFIERS, EnvironmentSpec, program
from posttrain.environments.verifiers_client import VerifiersServer

_ENTRY = "posttrain.environments.worker:main"
_MAX_SENDS = 2

PlacedCall = tuple[int, Mapping[str, Any]]
"""The place of an episode in its batch, and what its environment or tools are asked."""


@dataclass(slots=True)
class _Player:
    """A process with the calls that wait for it, as places in the batch of calls."""

    process: AskedProcess
    waiting: deque[int] = field(default_factory=deque)
    running: int | None = None
    began: float = 0.0
    num_sends: int = 0


class EnvironmentPool:
    """An environment has a process for each episode that is played at once; plain tools share `num_workers`.

    `with` or `open()` starts the first. `timeout_s` is the deadline of a call, in which time that a process waits for a CPU does
    not count. Processes are kept from batch to batch. Raises: ConfigError.
    """

    def __init__(self, spec: EnvironmentSpec, timeout_s: float, num_workers: int) -> None:
        spec.check()
        self.spec, self._timeout_s, self._num_workers = spec, timeout_s, num_workers
        self._slots: dict[int, _Player] = {}
        self.tools: tuple[Mapping[str, Any], ...] = ()
        self.steps = self.calls_pay = self.takes_turns = False
        self._server: VerifiersServer | None = None
        self._served: dict[str, Any] | None = None

    @property
    def has_state(self) -> bool:
        """Whether an episode has an environment of its own."""
        return self.spec.env is not None

    def open(self) -> EnvironmentPool:
        """Start a process, and learn from it which tools there are."""
        try:
            if self.spec.env is not None and self.spec.env.startswith(VERIFIERS):
                self._server = VerifiersServer(program(self.spec.env))
                self._served = {"path": self._server.path, "tools": self._server.tools()}
            self._await_ready(self._slot(0))
        except BaseException:
            self.close()
            raise
        return self

    def __enter__(self) -> EnvironmentPool:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all processes; one that is asked again is started again."""
        self._end_players()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _end_players(self) -> None:
        for place in list(self._slots):
            self._end(place)

    def ask(self, asked: Sequence[PlacedCall]) -> list[dict[str, Any]]:
        """An answer to each, in order, with the seconds that it took (`env_s`). `failed` says why the episode cannot go on."""
        answers: list[dict[str, Any]] = [{} for _ in asked]
        for number, (place, _) in enumerate(asked):
            self._slot(place if self.has_state else number % self._num_workers).waiting.append(number)
        try:
            while busy := [place for place, slot in self._slots.items() if slot.waiting or slot.running is not None]:
                for place in busy:
                    self._hand_out(place, asked, answers)
                self._collect(busy, answers)
        except BaseException:
            # A process that is still at work would answer into the next call.
            self._end_players()
            raise
        return answers

    # --- processes -------------------------------------------------------------------------------------------------

    def _slot(self, place: int) -> _Player:
        if place not in self._slots:
            setup = {"env": self.spec.env, "tools": list(self.spec.tools), "served": self._served}
            self._slots[place] = _Player(AskedProcess(_ENTRY, "the environment's process", "posttrain-env-", setup))
        return self._slots[place]

    def _end(self, place: int) -> None:
        self._slots.pop(place).process.kill()

    def _await_ready(self, slot: _Player) -> None:
        while not slot.process.ready:
            wait_for([slot.process])
            self._look_at_start(slot.process)

    def _look_at_start(self, process: AskedProcess) -> None:
        """Raises: ConfigError."""
        answer = process.look_at_start("env or tools", "move slow work into reset")
        if answer is not None:
            self.tools, self.takes_turns = tuple(answer["tools"]), answer["takes_turns"]
            self.steps, self.calls_pay = answer["steps"], answer["calls_pay"]

    def _hand_out(self, place: int, asked: Sequence[PlacedCall], answers: list[dict[str, Any]]) -> None:
        slot = self._slots[place]
        if not slot.process.ready or slot.running is not None or not slot.waiting:
            return
        number = slot.waiting.popleft()
        slot.process.start_clock(self._timeout_s)
        slot.began = time.monotonic()
        if slot.process.is_idle() and slot.process.ask(asked[number][1]):
            slot.running = number
            return
        gone = (
            slot.process.ended()
            if slot.process.has_ended()
            else "the environment's process wrote what nobody asked for"
        )
        if (self.has_state and asked[number][1]["do"] != "reset") or slot.num_sends >= _MAX_SENDS:
            self._lost(place, number, gone, answers)
        else:
            slot.waiting.appendleft(number)
            self._replace(place, slot.num_sends + 1)

    def _collect(self, busy: Sequence[int], answers: list[dict[str, Any]]) -> None:
        waited = [self._slots[place] for place in busy if place in self._slots]
        wait_for([slot.process for slot in waited if slot.running is not None or not slot.process.ready])
        for place in busy:
            slot = self._slots.get(place)
            if slot is None:
                continue
            if not slot.process.ready:
                self._look_at_start(slot.process)
            elif slot.running is not None:
                self._look_at(place, slot, answers)

    def _look_at(self, place: int, slot: _Player, answers: list[dict[str, Any]]) -> None:
        number = slot.running
        assert number is not None
        slot.process.trim_log()
        late = slot.process.is_late()
        try:
            answer = slot.process.receive()  # after the look at the clock: what was given in time counts
        except EOFError:
            return self._lost(place, number, slot.process.ended(), answers)
        except ScribbledError:
            reason = "wrote into the pipe that carries its answers; it was killed"
            return self._lost(place, number, reason, answers)
        if answer is not None:
            answers[number] = answer | {"env_s": time.monotonic() - slot.began}
            slot.running, slot.num_sends = None, 0
        elif late:
            self._lost(place, number, f"took longer than {self._timeout_s:g} s and was killed", answers)

    def _lost(self, place: int, number: int, reason: str, answers: list[dict[str, Any]]) -> None:
        """The call failed with its process. With an environment the rest of what this episode asked has nobody to answer it."""
        slot = self._slots[place]
        answers[number] = {"failed": reason, "env_s": time.monotonic() - slot.began}
        if self.has_state:
            for other in slot.waiting:
                answers[other] = {"failed": reason, "env_s": 0.0}
            slot.waiting.clear()
            self._end(place)
        else:
            self._replace(place, 0)

    def _replace(self, place: int, num_sends: int) -> None:
        """By one that gets what waits when it has loaded the tools; the others work on meanwhile."""
        waiting = self._slots[place].waiting
        self._end(place)
        fresh = self._slot(place)
        fresh.waiting, fresh.num_sends = waiting, num_sends
