"""Tools of a server of the Model Context Protocol, which is a child of the tools' process and speaks over stdio."""
# pyright: reportMissingImports=false

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, NoReturn

from posttrain.errors import ConfigError, MissingExtraError

START_TIMEOUT_S = 60.0
CallTool = Callable[[str, dict[str, Any]], Awaitable[str]]


class ToolFailedError(Exception):
    """The server says that a call failed; the model reads why."""


def connect_mcp(words: Sequence[str], loop: asyncio.AbstractEventLoop) -> tuple[list[dict[str, Any]], CallTool]:
    """Start the server and ask for its tools: their schemas, and how one is called. Raises: ConfigError, MissingExtraError."""
    try:
        from mcp.client.session import ClientSession
        from mcp.shared.exceptions import MCPError
        from mcp_types import CONNECTION_CLOSED
    except ImportError as error:
        raise MissingExtraError(
            f"tools: mcp: needs {error.name}; install it with: pip install 'posttrain[mcp]'"
        ) from error
    ready: Future[tuple[ClientSession, list[dict[str, Any]]]] = Future()
    asyncio.run_coroutine_threadsafe(_live(words, ready), loop)
    try:
        session, schemas = ready.result(START_TIMEOUT_S)
    except TimeoutError:
        raise ConfigError(
            f"tools: {' '.join(words)!r} did not answer as an MCP server within {START_TIMEOUT_S:.0f} s"
        ) from None
    except Exception as error:  # noqa: BLE001 - whatever the foreign program or the protocol's client says
        raise ConfigError(f"tools: {' '.join(words)!r} did not start as an MCP server: {_reason(error)}") from None

    async def call(name: str, arguments: dict[str, Any]) -> str:
        try:
            result = await session.call_tool(name, arguments)
        except MCPError as error:
            if error.code == CONNECTION_CLOSED:
                _end_with_server(words)
            raise
        text = "\n".join(getattr(part, "text", f"[{part.type}]") for part in result.content)
        if result.is_error:
            raise ToolFailedError(text)
        return text

    return schemas, call


async def _live(words: Sequence[str], ready: Future[Any]) -> None:
    """Hold the connection until the process ends."""
    from mcp.client.session import ClientSession
    from mcp.client.stdio import StdioServerParameters, stdio_client

    server = StdioServerParameters(command=words[0], args=list(words[1:]), env=dict(os.environ))
    try:
        async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            listed = await session.list_tools()
            ready.set_result((session, [_schema(tool) for tool in listed.tools]))
            await asyncio.Event().wait()
    except BaseException as error:
        if ready.done():
            raise
        ready.set_exception(error)


def _end_with_server(words: Sequence[str]) -> NoReturn:
    """A server that is gone answers no later episode either: the pool takes a process with a new one for this one."""
    sys.stderr.write(f"the MCP server {' '.join(words)} ended\n")
    sys.stderr.flush()
    os._exit(1)


def _schema(tool: Any) -> dict[str, Any]:
    parameters = {key: value for key, value in tool.input_schema.items() if key != "title"}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description or tool.name, "parameters": parameters},
    }


def _reason(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return f"{type(error).__name__}: {error}"
