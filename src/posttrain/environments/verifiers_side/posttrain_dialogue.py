"""What an environment of verifiers asks of its model, at an endpoint in the shape of OpenAI's chat completions; it is answered from outside, turn by turn.

Runs in the environment's Python: it imports the standard library alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
MODEL = "policy"
_MAX_BODY_BYTES = 1 << 26
_OVER = {
    "error": {
        "message": "the episode is over: its maximum context length is reached",
        "type": "invalid_request_error",
        "code": "context_length_exceeded",
    }
}
"""What programs of verifiers read as the end of the budget, so that what there is will be scored."""


class LostError(Exception):
    """The episode cannot go on."""


@dataclass
class Dialogue:
    """One conversation: each request of the environment must continue it. `ask` has what stands new in it, `turn` what is said next."""

    said: list[Json] = field(default_factory=list)
    tools: list[Json] = field(default_factory=list)
    session: str | None = None
    is_over: bool = False
    was_cut: bool = False
    lost: str | None = None
    asks: asyncio.Queue[list[Json]] = field(default_factory=asyncio.Queue)
    turns: asyncio.Queue[Json | None] = field(default_factory=asyncio.Queue)

    async def answer(self, session: str, body: Json) -> tuple[int, Json]:
        """Status and body of a response to one request."""
        if self.is_over:
            self.was_cut = True
            return 400, _OVER
        try:
            self._continue(session, [plain(message) for message in body["messages"]], body.get("tools") or [])
        except LostError as error:
            self.lost, self.is_over = str(error), True
            return 400, {"error": {"message": self.lost}}
        turn = await self.turns.get()
        if turn is None:
            self.is_over = self.was_cut = True
            return 400, _OVER
        calls = [
            {"id": one["id"], "type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}}
            for one in turn["calls"]
        ]
        message: Json = {"role": "assistant", "content": turn["text"], **({"tool_calls": calls} if calls else {})}
        self.said.append(plain(message))
        self.is_over = turn["is_last"]
        finish = "length" if turn["is_cut"] else "tool_calls" if calls else "stop"
        return 200, {
            "id": f"turn{len(self.said)}", "object": "chat.completion", "created": 0, "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": None}],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }  # fmt: skip

    def _continue(self, session: str, messages: list[Json], tools: list[Json]) -> None:
        """Raises: LostError where ids that were sampled would have to be written again."""
        if self.session not in (None, session):
            raise LostError(
                "two agents ask for the policy; give the other one a model: --env.AGENT.client.base-url URL, …model NAME"
            )
        before = len(self.said)
        if before and (messages[:before] != self.said or len(messages) == before):
            raise LostError(
                f"it asks with another conversation than the one so far ({before} messages), so the sampled ids would not be those trained on"
            )
        new = messages[before:]
        if before and any(message["role"] not in ("tool", "user") for message in new):
            raise LostError(
                f"it adds messages of {', '.join(message['role'] for message in new)}; expected tool or user"
            )
        if before and tools != self.tools:
            raise LostError(
                "it offers other tools than at the begin, which would have to be written into the prompt again"
            )
        self.session, self.tools = session, tools
        self.said += new
        self.asks.put_nowait(new)


def plain(message: Mapping[str, Any]) -> Json:
    """Role, text, calls and whose answer it is. Raises: LostError for pictures."""
    content = message.get("content")
    if isinstance(content, list):
        if other := [part for part in content if part.get("type") != "text"]:
            raise LostError(f"it shows a {other[0].get('type')}; expected text")
        content = "\n".join(part["text"] for part in content)
    plain: Json = {"role": message["role"], "content": content or ""}
    if message["role"] == "tool":
        plain["tool_call_id"] = message["tool_call_id"]
    if message.get("tool_calls"):
        plain["tool_calls"] = [
            {"id": one["id"], "name": one["function"]["name"], "arguments": one["function"]["arguments"]}
            for one in message["tool_calls"]
        ]
    return plain


class Endpoint:
    """OpenAI's chat completions on a port of 127.0.0.1 for the policy of the episode that is played."""

    def __init__(self) -> None:
        self.dialogue = Dialogue()
        self.url = ""

    async def open(self) -> None:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=_MAX_BODY_BYTES)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        dialogue = self.dialogue
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
            body = json.loads(await reader.readexactly(int(headers.get("content-length", 0))) or "{}")
            if not head[0].split()[1].endswith("/chat/completions"):
                status, answer = 404, {"error": {"message": f"{head[0]}: the policy speaks chat completions alone"}}
            else:
                status, answer = await dialogue.answer(headers.get("x-session-id", ""), body)
            is_stream = body.get("stream", False) and status == 200
            kind, data = (
                ("text/event-stream", _events(answer))
                if is_stream
                else ("application/json", json.dumps(answer).encode())
            )
            writer.write(
                f"HTTP/1.1 {status} -\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode()
                + data
            )
            await writer.drain()
        writer.close()


def _events(answer: Json) -> bytes:
    """A completion as the stream that carries it whole."""
    (choice,) = answer["choices"]
    message = choice["message"]
    calls = [{**call, "index": place} for place, call in enumerate(message.get("tool_calls", []))]
    delta = {**message, **({"tool_calls": calls} if calls else {})}
    first = {
        **answer,
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": delta, "finish_reason": None}],
        "usage": None,
    }
    last = {**first, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    usage = {**first, "choices": [], "usage": answer["usage"]}
    return b"".join(f"data: {json.dumps(one)}\n\n".encode() for one in (first, last, usage)) + b"data: [DONE]\n\n"
