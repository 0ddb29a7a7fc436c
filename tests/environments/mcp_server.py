"""A small MCP server over stdio: it adds, and it fails in the ways that its tools are called by. `mcp_server.py calc` has a calculator alone."""

import os
import sys
import time

import anyio
import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server

SUM = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
NOTHING = {"type": "object", "properties": {}}
EXPRESSION = {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}
TOOLS = [
    types.Tool(name="add", description="Add two numbers.", input_schema=SUM),
    types.Tool(name="fail", description="Fails.", input_schema=NOTHING),
    types.Tool(name="hang", description="Never answers.", input_schema=NOTHING),
    types.Tool(name="crash", description="Ends the server.", input_schema=NOTHING),
    types.Tool(name="flood", description="Says too much.", input_schema=NOTHING),
]
CALC = [types.Tool(name="calc", description="Multiply (*) or add (+).", input_schema=EXPRESSION)]


def multiplied(given):
    a, _, b = given["expression"].partition("*")
    return str(int(a) * int(b))


ANSWERS = {
    "add": lambda given: str(given["a"] + given["b"]),
    "hang": lambda given: time.sleep(60),
    "crash": lambda given: os._exit(3),
    "flood": lambda given: "x" * 2_000_000,
    "calc": multiplied,
}


async def list_tools(_, __):
    return types.ListToolsResult(tools=CALC if sys.argv[1:] == ["calc"] else TOOLS)


async def call_tool(_, asked):
    if asked.name == "fail":
        return types.CallToolResult(content=[types.TextContent(type="text", text="no luck")], is_error=True)
    text = ANSWERS[asked.name](asked.arguments or {})
    return types.CallToolResult(content=[types.TextContent(type="text", text=text)], is_error=False)


async def main():
    server = Server("adder", on_list_tools=list_tools, on_call_tool=call_tool)
    async with stdio_server() as (read, write):
        await server.run(read, write, server.create_initialization_options())


anyio.run(main)
