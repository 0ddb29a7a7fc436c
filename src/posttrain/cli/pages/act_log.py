"""Acts that a page started: command lines in processes of their own, the last output of each, and how it ended."""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from posttrain.cli.agent_acts import Act, ActTools
from posttrain.cli.agent_folder import ServedFolder
from posttrain.errors import EXIT_USAGE, ConfigError

_WAIT_S = 1.0
_MOST_KEPT = 200
_LISTS = frozenset({"overrides"})
"""Arguments that are written a line each."""


@dataclass(slots=True)
class Started:
    """An act since `since`, as it last was."""

    number: int
    act: Act
    since: float = field(default_factory=time.time)


class ActLog:
    """The acts of one server, the last first. The same command line is not started twice while it runs."""

    def __init__(self, place: ServedFolder) -> None:
        self._shown, self._tools = ActTools(place, only_show=True), ActTools(place)
        self._lock = threading.Lock()
        self._started: list[Started] = []

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.__name__ for one in self._tools.table)

    def entries(self) -> list[Started]:
        with self._lock:
            return self._started[::-1]

    def show(self, name: str, given: Mapping[str, str]) -> Act:
        """The command line, not run. Raises: ConfigError for what the command would not take."""
        if name not in self.names:
            raise ConfigError(f"got no act {name!r}; expected one of {', '.join(self.names)}")
        arguments = {key: _argument(key, value) for key, value in given.items() if value != ""}
        adapter = TypeAdapter[Any](getattr(self._shown, name))
        try:
            return adapter.validate_python(ArgsKwargs((), arguments))
        except ValidationError as error:
            wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors())
            raise ConfigError(f"{name}: {wrong}; expected each field of the form filled in") from error

    def start(self, name: str, given: Mapping[str, str], shown: str) -> None:
        """Run the command line that was `shown`. Raises: ConfigError as `show`, where it became another, or runs already."""
        act = self.show(name, given)
        if act.command != shown:
            raise ConfigError(f"{act.command}: this is not the command that was shown, {shown}; look at it again")
        with self._lock:
            if any(one.act.command == act.command and one.act.code is None for one in self._started):
                raise ConfigError(f"{act.command}: runs already; the page of acts shows how far")
            number = self._started[-1].number + 1 if self._started else 1
            entry = Started(number, act)
            self._started = [*self._started, entry][-_MOST_KEPT:]
        threading.Thread(target=self._follow, args=(entry,), daemon=True).start()

    def stop(self) -> None:
        self._tools.stop()

    def _follow(self, entry: Started) -> None:
        _, *arguments = shlex.split(entry.act.command)
        while entry.act.code is None:
            try:
                entry.act = self._tools.act(arguments, _WAIT_S)
            except ConfigError as error:
                entry.act = replace(entry.act, code=EXIT_USAGE, output=f"error: {error}")


def _argument(key: str, value: str) -> str | Sequence[str]:
    return [line.strip() for line in value.splitlines() if line.strip()] if key in _LISTS else value
