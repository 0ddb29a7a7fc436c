"""Conversations as files hold them → OpenAI messages.

Knows the spellings of OpenAI, ShareGPT and LLaMA-Factory; knows no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from posttrain.errors import DataError
from posttrain.types import Message, Origin

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "tool_response": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
    "function_call": "function_call",
    "tool_call": "function_call",
}
"""Role as written → OpenAI's; `function_call` becomes an assistant turn with `tool_calls`."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""What files call an assistant's thinking where it is a field of its own; the first name is ours."""
FLAGS = ("weight", "train", "trainable", "loss")
"""What files call the flag that a turn is trained; the first name is ours."""


def parse_messages(value: Any, origin: Origin, column: str) -> tuple[Message, ...]:
    """A list of messages (or one, or its JSON text). Raises: DataError."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        value = parse_json_column(value, origin, column)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, (list, tuple)) or not value:
        raise DataError(
            f"{origin}: `{column}` is {describe_value(value)}; expected a non-empty list of {{role, content}}"
        )
    return tuple(_message(item, origin, f"{column}[{i}]") for i, item in enumerate(value))


def parse_tools(value: Any, origin: Origin) -> tuple[Mapping[str, Any], ...]:
    """JSON schemas of the tools: a list, or its JSON text. Raises: DataError."""
    if isinstance(value, str) and value.strip():
        value = parse_json_column(value, origin, "tools")
    if value in (None, "", []):
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in value):
        raise DataError(
            f"{origin}: `tools` is {describe_value(value)}; expected a list of JSON schemas, or that list as JSON text"
        )
    return tuple(value)


def parse_json_column(text: str, origin: Origin, column: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{origin}: `{column}` holds text that is not JSON ({error}); expected valid JSON") from None


def describe_value(value: Any) -> str:
    """A value as error messages show it."""
    if value is None:
        return "missing"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    return f"{type(value).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def _message(item: Any, origin: Origin, where: str) -> Message:
    if not isinstance(item, Mapping):
        raise DataError(f"{origin}: `{where}` is {describe_value(item)}; expected an object with role and content")
    fields = {name: value for name, value in item.items() if value is not None}
    written = fields.pop("from", None) if "role" not in fields else fields.pop("role")
    role = ROLES.get(written) if isinstance(written, str) else None
    if role is None:
        known = ", ".join(sorted(ROLES))
        raise DataError(f"{origin}: `{where}` has role {describe_value(written)}; expected one of {known}")
    content = fields.pop("value", None) if "content" not in fields else fields.pop("content")
    if role == "function_call":
        called = parse_json_column(_content(content, origin, where), origin, where)
        role, content, fields["tool_calls"] = "assistant", None, called
    fields |= _flag(fields, origin, where) | _reasoning(fields, origin, where)
    if "tool_calls" in fields:
        fields["tool_calls"] = _calls(fields["tool_calls"], origin, where)
    fields = {name: value for name, value in fields.items() if name != "tool_calls" or value}
    if content is None and role == "assistant" and ("tool_calls" in fields or REASONING[0] in fields):
        content = ""
    if content is None:
        raise DataError(
            f'{origin}: `{where}` ({role}) has no content; expected text (an empty turn is written as ""), '
            "or, in an assistant turn, tool_calls"
        )
    return {"role": role, "content": _content(content, origin, where), **fields}


def _flag(fields: dict[str, Any], origin: Origin, where: str) -> dict[str, Any]:
    """`weight`, whatever the file calls it: 0 leaves the turn out of the loss. Takes the other names out of `fields`."""
    given = {name: fields.pop(name) for name in FLAGS if name in fields}
    for name, value in given.items():
        if not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(
                f"{origin}: `{where}` has {name} {describe_value(value)}; expected true or 1 (trained), or false or 0"
            )
    if len(set(map(int, given.values()))) > 1:
        raise DataError(
            f"{origin}: `{where}` is both trained and not ({', '.join(f'{n}: {v}' for n, v in given.items())}); keep one flag"
        )
    return {FLAGS[0]: int(next(iter(given.values())))} if given else {}


def _reasoning(fields: dict[str, Any], origin: Origin, where: str) -> dict[str, Any]:
    """`reasoning_content`, whatever the file calls it. Takes the other names out of `fields`."""
    given = {name: fields.pop(name) for name in REASONING if name in fields}
    for name, value in given.items():
        if not isinstance(value, str):
            raise DataError(f"{origin}: `{where}` has {name} {describe_value(value)}; expected text")
    texts = {value for value in given.values() if value}
    if len(texts) > 1:
        raise DataError(f"{origin}: `{where}` has different texts in {' and '.join(given)}; expected one of them")
    return {REASONING[0]: texts.pop()} if texts else {}


def _content(value: Any, origin: Origin, where: str) -> str:
    """Text; parts of type text are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        parts = [
            part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
            for part in value
        ]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)  # type: ignore[arg-type]
    raise DataError(
        f"{origin}: `{where}` has content {describe_value(value)}; expected text (images and audio are not supported)"
    )


def _calls(value: Any, origin: Origin, where: str) -> list[Mapping[str, Any]]:
    """OpenAI tool calls with `arguments` as an object: templates write it as JSON, so text would be escaped twice."""
    calls = [value] if isinstance(value, Mapping) else value
    if not isinstance(calls, (list, tuple)):
        raise DataError(f"{origin}: `{where}` has tool_calls {describe_value(value)}; expected a list of calls")
    return [_call(call, origin, where) for call in calls]


def _call(call: Any, origin: Origin, where: str) -> Mapping[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{origin}: `{where}` has the tool call {describe_value(call)}; expected {{name, arguments}}")
    arguments = function.get("arguments")
    if arguments is None:
        arguments = {}
    if isinstance(arguments, str):
        arguments = parse_json_column(arguments, origin, f"{where}.tool_calls.arguments") if arguments.strip() else {}
    rest = {key: call[key] for key in ("id",) if call.get(key) is not None}
    return {"type": "function", "function": {"name": function["name"], "arguments": arguments}, **rest}
