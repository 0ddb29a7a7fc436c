"""A harness of verifiers, by the name of this module: the loop of its `null` program, in the process of the environment."""
# pyright: reportMissingImports=false, reportUnknownVariableType=false

from __future__ import annotations

import contextlib
import json
from typing import Any

import openai
import verifiers.v1 as vf
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp

__all__ = ["ChatHarness"]


class ChatHarness(vf.Harness[vf.HarnessConfig]):
    """Asks the model, and calls the tools that it names, until it names none."""

    APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
    EXECUTES_CODE = NEEDS_CONTAINER = False

    async def launch(
        self, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: dict[str, str], data: Any
    ) -> Any:
        system, prompt = self.resolve_prompt(data)
        messages: list[Any] = [{"role": "system", "content": system}] if system else []
        messages += (
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else map(message_to_wire, prompt or [])
        )
        servers = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
        async with contextlib.AsyncExitStack() as stack:
            client = openai.AsyncOpenAI(base_url=endpoint, api_key=secret, max_retries=0, timeout=None)
            await stack.enter_async_context(client)
            tools, dispatch, connected = await connect_mcp({"mcpServers": servers}, stack)
            with contextlib.suppress(openai.BadRequestError):  # the budget's end: what there is will be scored
                while True:
                    said = await client.chat.completions.create(
                        model=ctx.model, messages=messages, tools=tools or openai.omit
                    )
                    message = said.choices[0].message
                    messages.append(message.model_dump(exclude_none=True))
                    for call in message.tool_calls or []:
                        messages.append(await _called(call, dispatch, connected))
                    if not message.tool_calls:
                        break
        return vf.ProgramResult(exit_code=0, stdout="", stderr="")


async def _called(call: Any, dispatch: dict[str, Any], connected: dict[str, Any]) -> dict[str, Any]:
    name = call.function.name
    if name in dispatch:
        content = await call_mcp(connected, dispatch, name, json.loads(call.function.arguments or "{}"))
    else:
        content = f"error: unknown tool {name!r}"
    return {"role": "tool", "tool_call_id": call.id, "name": name, "content": content}
