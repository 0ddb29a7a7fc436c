"""An environment as its process knows it, whatever it is made of; and what one says to an act of the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


class EpisodeLostError(Exception):
    """The environment cannot go on, so that nothing is left to tell the model."""


@dataclass(frozen=True, slots=True)
class Reaction:
    """What an environment answers to a turn or a call: what the policy reads next, what it is paid, and whether that was the end.

    `failed` says that the call did not do what it is for; `text` then says why. To a whole turn, `messages` are all that stands before the
    next one; `was_cut` says that the end was the budget's, and `metrics` what was measured of the episode.
    """

    text: str
    reward: float | None = None
    done: bool = False
    failed: bool = False
    messages: tuple[Mapping[str, Any], ...] = ()
    was_cut: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True, slots=True)
class HostedEnvironment:
    """How environments are made, one for each episode, and how one is called.

    `schemas` are those of its tools; `steps` says whether it answers a turn without a call, `calls_pay` whether calls are acts that
    may be paid and end the episode. `call` is given the environment, a tool's name and the arguments; it returns a `Reaction`, or
    anything for the model to read. An environment with `turn` is given whole turns instead, calls and all: `text`, `calls`, `is_last` (none
    will follow) and `is_cut` (it was cut short); or `do: cut`, after which there are no more.
    """

    make: Callable[[], Any]
    schemas: tuple[Mapping[str, Any], ...]
    steps: bool
    calls_pay: bool
    call: Callable[[Any, str, Mapping[str, Any]], Any]
    close: Callable[[Any], None] = lambda env: None
    turn: Callable[[Any, Mapping[str, Any]], Reaction] | None = None

    @property
    def tool_names(self) -> list[str]:
        return [schema["function"]["name"] for schema in self.schemas]
