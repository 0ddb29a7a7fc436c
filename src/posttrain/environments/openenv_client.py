"""Environments of an OpenEnv server (`env: openenv:URL`), whose packages are its own: each episode is a session over a WebSocket.

How the policy acts follows from the server's action. Its one field that must be given, if that is text, is what the policy says in
a turn; an environment that lists tools is called by these; and any other action is a tool, `act`, with its fields for arguments.
Source: openenv-core 0.3 (`/schema`, and `reset` and `step` at `/ws`).
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.request import urlopen

from posttrain.environments.hosted import EpisodeLostError, HostedEnvironment, Reaction
from posttrain.errors import ConfigError, MissingExtraError

_TIMEOUT_S = 20.0
_MAX_MESSAGE_BYTES = 16 << 20
_ACT = "act"
_REJECTED = "VALIDATION_ERROR"


class ActionRejectedError(Exception):
    """The server takes no such action; the model reads why."""


class OpenEnvSession:
    """One environment on the server at `url`, from its connection to its end. Raises: EpisodeLostError from every method."""

    def __init__(self, url: str, text_field: str | None) -> None:
        from websockets.exceptions import WebSocketException
        from websockets.sync.client import connect

        self._text_field, self._broken = text_field, (OSError, WebSocketException)
        address = url.replace("http", "ws", 1) + "/ws"
        try:
            self._socket = connect(address, open_timeout=_TIMEOUT_S, max_size=_MAX_MESSAGE_BYTES)
        except self._broken as error:
            raise EpisodeLostError(f"no session at {address}: {error}") from None

    def reset(self, prompt: Any, seed: int, **columns: Any) -> None:
        """Begin the episode. What the server shows then must stand in the prompt, which comes from the data."""
        began = self._ask("reset", {**columns, "seed": seed})
        shown = observed(began["observation"])
        if shown not in (prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt)):
            raise EpisodeLostError(
                f"reset(seed={seed}) shows {shown[:200]!r}, which the row's prompt does not hold; make the rows from what the "
                "server shows for a seed, and keep it in their column `seed`"
            )
        if began["done"]:
            raise EpisodeLostError(f"reset(seed={seed}) began an episode that was over")

    def step(self, answer: str) -> Reaction:
        """The policy's turn as an action; one that is rejected is answered with the reason."""
        assert self._text_field is not None
        try:
            return self.act({self._text_field: answer})
        except ActionRejectedError as error:
            return Reaction(f"error: {error}", failed=True)

    def act(self, action: Mapping[str, Any]) -> Reaction:
        """Raises: ActionRejectedError."""
        said = self._ask("step", action)
        observation = said["observation"]
        failed = isinstance(observation.get("error"), dict) and "tool_name" in observation
        return Reaction(observed(observation), said["reward"], bool(said["done"]), failed)

    def list_tools(self) -> list[dict[str, Any]]:
        return self._ask("step", {"type": "list_tools"})["observation"]["tools"]

    def close(self) -> None:
        self._socket.close()

    def _ask(self, what: str, data: Mapping[str, Any]) -> dict[str, Any]:
        try:
            # A server that refuses a session says why and closes: then nothing can be sent, and its words are still there.
            with suppress(*self._broken):
                self._socket.send(json.dumps({"type": what, "data": data}))
            said = json.loads(self._socket.recv())
        except self._broken as error:
            raise EpisodeLostError(f"the server closed the session at {what}: {error}") from None
        if said["type"] == "error":
            reason = f"{said['data'].get('message')} ({said['data'].get('code')})"
            if said["data"].get("code") == _REJECTED and what == "step":
                wrong = [f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in said["data"].get("errors", [])]
                raise ActionRejectedError("; ".join(wrong) or reason)
            raise EpisodeLostError(f"the server says at {what}: {reason}")
        return said["data"]


def connect_openenv(url: str) -> HostedEnvironment:
    """Ask the server how it is acted in. Raises: ConfigError, MissingExtraError."""
    try:
        import websockets.sync.client  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"env: openenv: needs {error.name}; install it with: pip install 'posttrain[openenv]'"
        ) from None
    try:
        with urlopen(f"{url}/schema", timeout=_TIMEOUT_S) as response:
            action = json.load(response)["action"]
        properties = {name: field for name, field in action["properties"].items() if name != "metadata"}
    except (OSError, HTTPException, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"env: openenv:{url} did not tell its actions at {url}/schema: {error}; expected a running server of OpenEnv"
        ) from None
    if {"tool_name", "arguments"} <= set(properties):
        return _by_tools(url)
    required = [name for name in action.get("required", []) if name in properties]
    if len(required) == 1 and properties[required[0]].get("type") == "string" and "enum" not in properties[required[0]]:
        return HostedEnvironment(
            lambda: OpenEnvSession(url, required[0]), (), True, False, _no_tools, OpenEnvSession.close
        )
    parameters = {"type": "object", "properties": properties, "required": required}
    if "$defs" in action:
        parameters["$defs"] = action["$defs"]
    schema = _schema(_ACT, action.get("description", ""), parameters)
    return _with_tools(url, [schema], lambda session, _, arguments: session.act(arguments))


def observed(observation: Mapping[str, Any]) -> str:
    """An observation as the policy reads it: its one field if that is text, what a tool returned, and else all as JSON."""
    if {"tool_name", "result"} <= set(observation):
        return _returned(observation)
    said = {key: value for key, value in observation.items() if key not in ("done", "reward", "metadata")}
    if not said:
        return ""
    first = next(iter(said.values()))
    return first if len(said) == 1 and isinstance(first, str) else json.dumps(said, ensure_ascii=False)


def _returned(observation: Mapping[str, Any]) -> str:
    if error := observation.get("error"):
        return f"error: {error['message']}"
    result = observation["result"]
    if isinstance(result, Mapping) and isinstance(result.get("content"), list):
        return "\n".join(part.get("text", f"[{part.get('type')}]") for part in result["content"])
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def _by_tools(url: str) -> HostedEnvironment:
    try:
        session = OpenEnvSession(url, None)
        tools = session.list_tools()
        session.close()
    except (EpisodeLostError, ActionRejectedError) as error:
        raise ConfigError(f"env: openenv:{url} did not list its tools: {error}") from None
    schemas = [_schema(tool["name"], tool["description"], tool["input_schema"]) for tool in tools]

    def call(session: OpenEnvSession, name: str, arguments: Mapping[str, Any]) -> Reaction:
        return session.act({"type": "call_tool", "tool_name": name, "arguments": dict(arguments)})

    return _with_tools(url, schemas, call)


def _with_tools(url: str, schemas: list[dict[str, Any]], call: Any) -> HostedEnvironment:
    return HostedEnvironment(lambda: OpenEnvSession(url, None), tuple(schemas), False, True, call, OpenEnvSession.close)


def _no_tools(session: OpenEnvSession, name: str, arguments: Mapping[str, Any]) -> Reaction:
    raise AssertionError(f"{name} was called, and there are no tools")


def _schema(name: str, description: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in parameters.items() if key != "title"}
    return {
        "type": "function",
        "function": {"name": name, "description": description.strip() or name, "parameters": shown},
    }
