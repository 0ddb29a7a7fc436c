"""The process in which an environment or tools run, an `AskedProcess`. It is killed from outside; it knows no deadlines and no torch."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from posttrain.asked import read_request, write_answer
from posttrain.environments.hosted import EpisodeLostError, HostedEnvironment, Reaction
from posttrain.environments.schema import tool_schema
from posttrain.environments.spec import MCP, OPENENV, VERIFIERS, address, command, parts
from posttrain.errors import ConfigError, PosttrainError
from posttrain.grading.loading import load_own_file

MAX_CHARS = 1 << 20
"""Characters that one answer of an environment or a tool may have."""
_MAX_MESSAGE_CHARS = 500
_MEMORY_BYTES = 8 << 30

CalledTool = Callable[[Mapping[str, Any]], Any]
"""Arguments in, what the tool answers out; awaitable or not."""


def main(request_fd: str, answer_fd: str) -> None:
    """Serve until the request pipe closes."""
    requests, answers = os.fdopen(int(request_fd), "rb"), os.fdopen(int(answer_fd), "w", encoding="ascii")
    setup = read_request(requests)
    try:
        host = EnvironmentHost(setup["env"], setup["tools"], setup["served"])
    except PosttrainError as error:
        write_answer(answers, {"id": 0, "error": str(error)})
        sys.exit(1)
    if not any(spec.startswith(MCP) for spec in setup["tools"]):  # runtimes of servers reserve more than they use
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    how = {"steps": host.steps, "calls_pay": host.calls_pay, "takes_turns": host.takes_turns}
    write_answer(answers, {"id": 0, "pid": os.getpid(), "tools": host.schemas, **how})
    while (request := read_request(requests)) is not None:
        write_answer(answers, {"id": request["id"], **host.answer(request)})


class EnvironmentHost:
    """An environment for one episode after the other, and tools; async ones run on a loop of their own. Raises: ConfigError."""

    def __init__(self, env: str | None, tools: Sequence[str], served: Mapping[str, Any] | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._hosted = _hosted(env, served) if env else None
        self._env: Any = None
        self._is_over = False
        self._of_env = self._hosted.tool_names if self._hosted else []
        self.schemas: list[Mapping[str, Any]] = list(self._hosted.schemas) if self._hosted else []
        self.steps = self._hosted is not None and self._hosted.steps
        self.calls_pay = self._hosted is not None and self._hosted.calls_pay
        self.takes_turns = self._hosted is not None and self._hosted.turn is not None
        self._tools: dict[str, CalledTool] = {}
        for spec in tools:
            self._add(spec)
        names = [schema["function"]["name"] for schema in self.schemas]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(
                f"tools: two tools are called {twice[0]!r}; the model could not tell them apart; rename one"
            )

    def _add(self, spec: str) -> None:
        if spec.startswith(MCP):
            from posttrain.environments.mcp_client import connect_mcp

            schemas, call = connect_mcp(command(spec), self._loop)
            self.schemas += schemas
            for schema in schemas:
                name = schema["function"]["name"]
                self._tools[name] = lambda arguments, name=name: call(name, dict(arguments))
            return
        file, names = parts("tools", spec)
        module = load_own_file(file, "tools")
        for name in names:
            function = getattr(module, name)
            if not inspect.isroutine(function):
                raise ConfigError(f"tools: {spec}: {name} is a {type(function).__name__}, expected a function")
            self.schemas.append(tool_schema(function))
            self._tools[name] = lambda arguments, function=function: function(**arguments)

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """`failed` where the environment cannot go on; a tool that raises says so to the model (`error`)."""
        if self._hosted is not None and self._env is None and request["do"] != "reset":
            return {"failed": f"{request['do']}: there is no episode: none was begun, or it was lost"}
        try:
            return getattr(self, f"_{request['do']}")(request)
        except EpisodeLostError as error:
            failed = str(error)[:_MAX_MESSAGE_CHARS]
        except BaseException as error:  # noqa: BLE001 - the process boundary; foreign code may raise anything, SystemExit too
            failed = _describe(error)
        self._drop()
        return {"failed": failed}

    def _drop(self) -> None:
        """The episode under way, if there is one: what is asked of it later finds none."""
        env, self._env = self._env, None
        if self._hosted is not None and env is not None:
            self._hosted.close(env)

    def _reset(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._hosted is not None
        self._drop()
        self._env, self._is_over = self._hosted.make(), False
        given = {"prompt": request["prompt"], "seed": request["seed"], **request["columns"]}
        reset = getattr(self._env, "reset", None)
        if reset is not None:
            parameters = inspect.signature(reset).parameters
            takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            self._done(reset(**{name: value for name, value in given.items() if takes_all or name in parameters}))
        return {}

    def _step(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What `step` returns: None ends the episode, text goes on, a mapping says `observation`, `reward` and `done`."""
        said = self._done(self._env.step(request["answer"]))
        if isinstance(said, Reaction):
            return self._answered(said)
        said = said if isinstance(said, Mapping) else {"observation": said}
        if unknown := sorted(set(said) - {"observation", "reward", "done"}):
            raise ValueError(f"step returned {unknown[0]!r}; expected observation, reward and done")
        observation = said.get("observation")
        if observation is not None and not isinstance(observation, str):
            raise TypeError(f"step returned an observation of type {type(observation).__name__}; expected text or None")
        return self._answered(
            Reaction(observation or "", said.get("reward"), bool(said.get("done")) or observation is None)
        )

    def _call(self, request: Mapping[str, Any]) -> dict[str, Any]:
        name, arguments = request["name"], request["arguments"]
        if self._hosted is not None and name in self._of_env:
            if self._is_over:
                return {"text": "error: the episode is over", "error": True}
            call: Callable[[], Any] = partial(self._hosted.call, self._env, name, arguments)
        elif name in self._tools:
            call = lambda: self._tools[name](arguments)  # noqa: E731
        else:
            known = ", ".join([*self._of_env, *self._tools])
            return {"text": f"error: there is no tool {str(name)[:100]!r}; there are {known}", "error": True}
        try:
            said = self._done(call())
            text = said if isinstance(said, str | Reaction) else json.dumps(said, ensure_ascii=False)
        except EpisodeLostError:
            raise
        except Exception as error:  # noqa: BLE001 - a tool is its author's program; the model reads what it raised
            return {"text": _checked(f"error: {type(error).__name__}: {error}"[:_MAX_MESSAGE_CHARS]), "error": True}
        return self._answered(text) if isinstance(text, Reaction) else {"text": _checked(text)}

    def _turn(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._hosted is not None and self._hosted.turn is not None
        said = self._hosted.turn(self._env, request)
        messages = [{**message, "content": _checked(message["content"])} for message in said.messages]
        return {**self._answered(said), "messages": messages, "was_cut": said.was_cut, "metrics": dict(said.metrics)}

    _cut = _turn

    def _answered(self, said: Reaction) -> dict[str, Any]:
        """Raises: ValueError for what is no reward."""
        reward = None if said.reward is None else float(said.reward)
        if reward is not None and not math.isfinite(reward):
            raise ValueError(f"step paid {reward}; expected a finite number")
        self._is_over = said.done
        return {"text": _checked(said.text), "reward": reward, "done": said.done, "error": said.failed}

    def _done(self, value: Any) -> Any:
        if not inspect.isawaitable(value):
            return value
        return asyncio.run_coroutine_threadsafe(_awaited(value), self._loop).result()


async def _awaited(value: Any) -> Any:
    return await value


def _hosted(spec: str, served: Mapping[str, Any] | None) -> HostedEnvironment:
    """`served`: what a server of its pool's says of itself. Raises: ConfigError."""
    if spec.startswith(VERIFIERS):
        from posttrain.environments.verifiers_client import connect_verifiers

        assert served is not None
        return connect_verifiers(served["path"], served["tools"])
    if spec.startswith(OPENENV):
        from posttrain.environments.openenv_client import connect_openenv

        return connect_openenv(address(spec))
    file, (name,) = parts("env", spec)
    found = getattr(load_own_file(file, "environment"), name)
    if not inspect.isclass(found):
        raise ConfigError(
            f"env: {spec}: {name} is a {type(found).__name__}, expected a class with reset, step or tools"
        )
    tools, steps = _tools_of(found), hasattr(found, "step")
    if not steps and not tools:
        raise ConfigError(f"env: {spec}: {name} has neither `step` nor `tools`, so it would have no part in an episode")
    return HostedEnvironment(
        found,
        tuple(tool_schema(method) for method in tools),
        steps,
        False,
        lambda env, name, arguments: getattr(env, name)(**arguments),
    )


def _tools_of(made: type) -> list[Callable[..., Any]]:
    """The methods that `tools` of the class names. Raises: ConfigError."""
    names = getattr(made, "tools", ())
    if missing := [name for name in names if not callable(getattr(made, name, None))]:
        raise ConfigError(f"env: {made.__name__}.tools names {missing[0]!r}, which is no method of it")
    return [getattr(made, name) for name in names]


def _checked(text: str) -> str:
    if len(text) > MAX_CHARS:
        raise ValueError(f"wrote {len(text):,} characters at once; expected at most {MAX_CHARS:,}")
    return text.encode("utf-8", "replace").decode("utf-8")


def _describe(error: BaseException) -> str:
    own = str(Path(__file__).parent)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(own)]
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"raised {type(error).__name__}: {error}"[:_MAX_MESSAGE_CHARS] + place
