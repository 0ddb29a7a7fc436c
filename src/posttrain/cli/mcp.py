"""`posttrain mcp`: the verbs as tools of the Model Context Protocol, over standard input and output."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from posttrain.errors import MissingExtraError, PosttrainError


def mcp(
    folder: Annotated[Path, typer.Option(help="Folder whose runs, registry and YAMLs are served; no path leads out of it.")] = Path(),
    allow_run: Annotated[
        bool, typer.Option("--allow-run", help="Serve run, gate_decide, promote and rollback too.")
    ] = False,
) -> None:  # fmt: skip
    """Let an agent read runs, metrics, verdicts, the registry, plans and keys, over stdio. Acts only with --allow-run."""
    try:
        import anyio
        from mcp.server.stdio import stdio_server
    except ImportError as error:
        raise MissingExtraError(f"mcp needs {error.name}; install it with: pip install 'posttrain[mcp]'") from error
    import os

    from posttrain.cli.agent_acts import ActTools
    from posttrain.cli.agent_folder import ServedFolder
    from posttrain.cli.agent_tools import ReadTools

    place = ServedFolder(folder)
    os.chdir(place.root)  # a relative path means what it means to a command typed there
    acts = ActTools(place)
    server = make_mcp_server(ReadTools(place).table, acts.table if allow_run else ())

    async def serve_stdio() -> None:
        async with stdio_server() as (incoming, outgoing):
            await server.run(incoming, outgoing, server.create_initialization_options())

    typer.echo(f"serving {place.root} over stdio, {'acting verbs too' if allow_run else 'read-only'}", err=True)
    try:
        anyio.run(serve_stdio)
    finally:
        acts.stop()


def make_mcp_server(reading: Sequence[Callable[..., Any]], acting: Sequence[Callable[..., Any]]) -> Any:
    """A server whose tools are these functions of keyword arguments, under their names."""
    import anyio
    import mcp_types as types
    from mcp.server.lowlevel import Server
    from pydantic import TypeAdapter

    import posttrain

    adapters = {one.__name__: TypeAdapter[Any](cast(Any, one)) for one in (*reading, *acting)}
    tools = [
        types.Tool(
            name=one.__name__, description=one.__doc__, input_schema=adapters[one.__name__].json_schema(),
            annotations=types.ToolAnnotations(read_only_hint=one in reading),
        )
        for one in (*reading, *acting)
    ]  # fmt: skip

    async def list_tools(_: Any, __: Any) -> types.ListToolsResult:
        return types.ListToolsResult(tools=tools)

    async def call_tool(_: Any, asked: types.CallToolRequestParams) -> types.CallToolResult:
        texts, is_error = await anyio.to_thread.run_sync(tool_answer, adapters, asked.name, asked.arguments or {})
        return types.CallToolResult(
            content=[types.TextContent(type="text", text=text) for text in texts], is_error=is_error
        )

    return Server(
        "posttrain", version=posttrain.__version__, on_list_tools=list_tools, on_call_tool=call_tool,
        instructions="Post-training of open-weight language models. Paths are relative to the folder served. SKILL.md says the order of the work.",
    )  # fmt: skip


def tool_answer(adapters: dict[str, Any], name: str, arguments: dict[str, Any]) -> tuple[list[str], bool]:
    """The texts of a tool's answer, without secrets, and whether it is an error: the line that the command would print."""
    from pydantic import ValidationError
    from pydantic_core import ArgsKwargs

    from posttrain.cli.agent_acts import Act
    from posttrain.cli.app import no_place
    from posttrain.cli.terminal import error_message, printable
    from posttrain.uris import clean_text, clean_value

    if name not in adapters:
        return [f"error: got no tool {name!r}; expected one of {', '.join(adapters)}"], True
    try:
        said = adapters[name].validate_python(ArgsKwargs((), arguments))
    except PosttrainError as error:
        return [clean_text(error_message(error))], True
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg'].lower()}" for one in error.errors())
        return [clean_text(f"error: {name}: {wrong}; expected what the tool's schema says")], True
    except OSError as error:
        if line := no_place(error):
            return [clean_text(line)], True
        traceback.print_exc()
        return [f"error: {name} failed on this machine: {type(error).__name__}; the server's stderr says where"], True
    except Exception:  # noqa: BLE001 - a process boundary, as the command's: the server outlives a defect and says so
        traceback.print_exc()
        return [f"error: {name} failed by a defect of posttrain; the server's stderr says where"], True
    if isinstance(said, Act):
        texts = [said.command, printable(said.output), said.ending]
        return [clean_text(text) for text in texts if text], said.is_refused
    return [json.dumps(clean_value(said), ensure_ascii=False)], False
