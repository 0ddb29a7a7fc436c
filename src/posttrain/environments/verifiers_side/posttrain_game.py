"""An environment of verifiers with its tasks, and the loop in which its model is asked. Source: verifiers 0.4 (`verifiers.v1`)."""
# pyright: reportMissingImports=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import json
import os
import sys
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain_dialogue import MODEL, Endpoint, Json, LostError, plain

_OPTION = "--env."
_CHAT = "posttrain_chat"
"""The harness beside this file, by the name of its module."""


class Game:
    """The environment with its tasks. Raises what verifiers raises for an unknown ID or option."""

    def __init__(self, ident: str, options: list[str]) -> None:
        import verifiers.v1 as vf

        if ident.endswith(".py"):
            folder = str(Path(ident).resolve().parent)
            sys.path.insert(0, folder)
            os.environ["PYTHONPATH"] = os.pathsep.join(
                filter(None, [folder, os.environ.get("PYTHONPATH")])
            )  # of its tool servers
            ident = Path(ident).stem
        given = _nested(options)
        given.setdefault("taskset", {})["id"] = ident
        seats = vf.env_config_type(ident, given.get("id", "")).model_fields
        for name, seat in seats.items():
            if isinstance(seat.default, vf.AgentConfig):
                mine = given.setdefault(name, {})
                mine.setdefault("runtime", {"type": "subprocess"})
                if seat.default.harness is None and vf.default_harness_id(ident) == "bash":
                    mine.setdefault("harness", {"id": _CHAT})
        self._env = vf.load_environment(vf.resolve_env_config(given))
        self._tasks = iter(self._env.taskset)
        self._known: list[Any] = []

    def task(self, number: int) -> Any:
        """Raises: LostError where there is none."""
        self._known += islice(self._tasks, max(0, number + 1 - len(self._known)))
        if not 0 <= number < len(self._known):
            raise LostError(f"it has {len(self._known)} tasks and the row names task {number}; make the rows again")
        return self._known[number]

    def serving(self) -> contextlib.AbstractAsyncContextManager[Any]:
        return self._env.serving()

    async def play(self, number: int, endpoint: Endpoint) -> Json:
        """An episode to its end: what it paid, and what was measured. Raises: LostError."""
        import verifiers.v1 as vf

        dialogue = endpoint.dialogue
        client = vf.EvalClientConfig(base_url=endpoint.url, api_key_var="POSTTRAIN_NO_KEY")
        episode = await self._env.run_episode(self.task(number), vf.ModelContext(MODEL, client))
        errors = [*episode.errors, *(error for trace in episode.traces if not trace.ok for error in trace.errors)]
        if dialogue.lost or errors:
            raise LostError(dialogue.lost or f"{errors[0].type}: {errors[0].message}")
        (trace,) = [trace for trace in episode.traces if trace.id == dialogue.session] or [None]
        if trace is None:
            raise LostError("it ended without a turn of the policy")
        measured = {name: one.score for name, one in trace.rewards.items() if one is not None}
        measured |= {name: one for name, one in trace.metrics.items() if one is not None}
        return {"reward": trace.reward, "metrics": measured}

    def prompt(self, number: int) -> list[Json] | None:
        """What a task's first request holds where the environment adds nothing; None where the task says no prompt."""
        data = self.task(number).data
        if data.prompt is None:
            return None
        system = [] if data.system_prompt is None else [{"role": "system", "content": data.system_prompt}]
        one = isinstance(data.prompt, str)
        asked = [{"role": "user", "content": data.prompt}] if one else [part.model_dump() for part in data.prompt]
        return [plain(message) for message in (*system, *asked)]


def _nested(options: list[str]) -> Json:
    """`--env.agent.max-turns 3` as verifiers' own command line takes it. Raises: ValueError."""
    given: Json = {}
    words = iter(options)
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith(_OPTION) or (not equals and (value := next(words, None)) is None):
            raise ValueError(f"got {word!r}, expected {_OPTION}KEY VALUE, e.g. {_OPTION}taskset.split train")
        *above, last = name.removeprefix(_OPTION).replace("-", "_").split(".")
        place = given
        for part in above:
            place = place.setdefault(part, {})
        try:
            place[last] = json.loads(value)
        except ValueError:
            place[last] = value
    return given
