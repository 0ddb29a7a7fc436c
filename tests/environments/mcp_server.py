"""A small MCP server over stdio: it adds, fails and hangs."""

import time

import anyio
import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

SUM = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
NOTHING = {"type": "object", "properties": {}}


async def list_tools(_, __):
    return types.ListToolsResult(tools=[
        types.Tool(name="add", description="Add two numbers.", input_schema=SUM),
        types.Tool(name="fail", description="Fails.", input_schema=NOTHING),
        types.Tool(name="hang", description="Never answers.", input_schema=NOTHING),
    ])  # fmt: skip


async def call_tool(_, asked):
    given = asked.arguments or {}
    if asked.name == "hang":
        time.sleep(60)
    if asked.name == "fail":
        return types.CallToolResult(content=[types.TextContent(type="text", text="no luck")], is_error=True)
    return types.CallToolResult(
        content=[types.TextContent(type="text", text=str(given["a"] + given["b"]))], is_error=False
    )


async def main():
    server = Server("adder", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


anyio.run(main)
