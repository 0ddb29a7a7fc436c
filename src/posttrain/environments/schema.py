"""A Python function as the JSON schema by which a model knows it: from its signature and its docstring."""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from posttrain.errors import ConfigError

_SECTION = re.compile(r"^\s*(Args|Arguments|Parameters|Returns?|Raises|Yields|Examples?|Notes?)\s*:\s*$")
_PARAMETER = re.compile(r"^\s*(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")


def tool_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """OpenAI's form: name, description, parameters. Raises: ConfigError for what a model could not know how to call."""
    from pydantic import PydanticSchemaGenerationError, TypeAdapter

    name, where = function.__name__, _where(function)
    text, described = _documented(inspect.getdoc(function) or "")
    if not text:
        raise ConfigError(f"{where}: tool {name!r} has no docstring; the model reads there what the tool is for")
    properties: dict[str, Any] = {}
    required: list[str] = []
    hints = typing.get_type_hints(function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ConfigError(
                f"{where}: tool {name!r}: parameter {parameter.name!r} has no name that a call could give"
            )
        if parameter.name not in hints:
            raise ConfigError(
                f"{where}: tool {name!r}: parameter {parameter.name!r} has no type, expected e.g. {parameter.name}: str"
            )
        try:
            schema = TypeAdapter(hints[parameter.name]).json_schema()
        except PydanticSchemaGenerationError:
            raise ConfigError(
                f"{where}: tool {name!r}: parameter {parameter.name!r} is a {hints[parameter.name]}, which JSON cannot hold; "
                "expected str, int, float, bool, list, dict or Literal"
            ) from None
        if (
            parameter.default is not parameter.empty
            and schema.get("default", ...) is ...
            and parameter.default is not None
        ):
            schema["default"] = parameter.default
        said = described.get(parameter.name)
        properties[parameter.name] = _without_titles(schema) | ({"description": said} if said else {})
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {"type": "function", "function": {"name": name, "description": text, "parameters": parameters}}


def _where(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _documented(doc: str) -> tuple[str, Mapping[str, str]]:
    """What stands before the first section, and what `Args` says of each parameter (Google's style)."""
    lines = doc.splitlines()
    first = next((n for n, line in enumerate(lines) if _SECTION.match(line)), len(lines))
    described: dict[str, str] = {}
    section, name = "", ""
    for line in lines[first:]:
        if found := _SECTION.match(line):
            section = found[1]
        elif section in ("Args", "Arguments", "Parameters") and line.strip():
            if found := _PARAMETER.match(line):
                name = found[1]
                described[name] = found[2].strip()
            elif name:
                described[name] = f"{described[name]} {line.strip()}".strip()
    return " ".join("\n".join(lines[:first]).split()), described


def _without_titles(schema: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in schema.items() if key != "title"}
