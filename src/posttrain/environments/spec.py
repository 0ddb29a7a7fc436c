"""What an episode is played with, as the keys `env` and `tools` name it: checked without running anything."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from posttrain.errors import ConfigError
from posttrain.grading.source import own_functions, parse_source, split_spec

MCP = "mcp:"
"""Begins the entry of `tools` that is the command line of a server of the Model Context Protocol."""
OPENENV = "openenv:"
"""Begins an `env` that is the address of a server of OpenEnv."""
VERIFIERS = "verifiers:"
"""Begins an `env` that is an environment of the package verifiers, and the Python in which it is installed."""


@dataclass(frozen=True, slots=True)
class EnvironmentSpec:
    """`env` is `file.py:Class`, `openenv:URL`, `verifiers:PYTHON ID` or None; each of `tools` is `file.py:function,function` or `mcp:COMMAND`."""

    env: str | None = None
    tools: tuple[str, ...] = ()

    def check(self) -> None:
        """Find what can be found without running anything. Raises: ConfigError."""
        for key, spec in [("env", self.env)] * bool(self.env) + [("tools", tool) for tool in self.tools]:
            assert spec is not None
            if spec.startswith(MCP):
                command(spec)
                continue
            if key == "env" and spec.startswith(OPENENV):
                address(spec)
                continue
            if key == "env" and spec.startswith(VERIFIERS):
                program(spec)
                continue
            file, names = parts(key, spec)
            known = own_functions(parse_source(file))
            for name in names:
                if name not in known:
                    near = get_close_matches(name, known, 1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    raise ConfigError(
                        f"{key}: {spec}: {file} has no {name!r}{hint} (it defines {', '.join(known) or 'nothing'})"
                    )


def parts(key: str, spec: str) -> tuple[Path, Sequence[str]]:
    """The file of a spec and the names behind the colon. Raises: ConfigError."""
    found = split_spec(spec)
    names = found[1].split(",") if found else []
    if found is None or not all(name.isidentifier() for name in names) or (key == "env" and len(names) != 1):
        wanted = (
            "file.py:Class, openenv:URL or verifiers:PYTHON ID"
            if key == "env"
            else "file.py:function (or several: file.py:search,calc), or mcp:COMMAND"
        )
        raise ConfigError(f"{key}: got {spec!r}, expected {wanted}")
    file = Path(found[0]).expanduser()
    if not file.is_file():
        raise ConfigError(f"{key}: {spec}: no file {file}; paths are relative to the YAML")
    return file.resolve(), names


def command(spec: str) -> list[str]:
    """The words of an `mcp:` entry. Raises: ConfigError."""
    try:
        words = shlex.split(spec.removeprefix(MCP))
    except ValueError as error:
        raise ConfigError(f"tools: {spec!r} is no command line: {error}") from None
    if not words:
        raise ConfigError(f"tools: {spec!r} names no program, expected mcp:COMMAND, e.g. mcp:python server.py")
    return words


def address(spec: str) -> str:
    """The URL of an `openenv:` entry, without the last slash. Raises: ConfigError."""
    url = spec.removeprefix(OPENENV).rstrip("/")
    try:
        found = urlsplit(url)
        is_one = found.scheme in ("http", "https") and bool(found.hostname) and found.port != 0
    except ValueError:  # brackets or a port that are none
        is_one = False
    if not is_one:
        raise ConfigError(f"env: got {spec!r}, expected openenv:URL, e.g. openenv:http://127.0.0.1:8000")
    return url


def program(spec: str) -> list[str]:
    """The words of a `verifiers:` entry: a Python that is there, the environment, and its options. Raises: ConfigError."""
    try:
        words = shlex.split(spec.removeprefix(VERIFIERS))
    except ValueError as error:
        raise ConfigError(f"env: {spec!r} is no command line: {error}") from None
    if len(words) < 2:
        raise ConfigError(
            f"env: got {spec!r}, expected verifiers:PYTHON ID, the Python in which verifiers and the environment are installed and the "
            "environment's name, e.g. verifiers:.venv-verifiers/bin/python gsm8k-v1"
        )
    python, ident, *options = words
    if (found := shutil.which(python)) is None:
        what = "is no program" if os.path.exists(python) else "does not exist"
        raise ConfigError(f"env: {spec}: {python} {what}; expected a Python with the package verifiers")
    if ident.endswith(".py") and not os.path.isfile(ident):
        raise ConfigError(f"env: {spec}: no file {ident}; paths are relative to the YAML")
    return [found, ident, *options]
