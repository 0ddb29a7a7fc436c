"""A file of another tool: which tool's it is, and its keys, from a YAML or a command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.importers.axolotl import AXOLOTL
from posttrain.config.importers.commands import YAML_SUFFIXES, find_command
from posttrain.config.importers.fates import ImportDraft, Kind, Tool, convert
from posttrain.config.importers.llamafactory import LLAMAFACTORY
from posttrain.config.importers.nested import by_path, resolved
from posttrain.config.importers.openrlhf import OPENRLHF
from posttrain.config.importers.torchtune import TORCHTUNE
from posttrain.config.importers.trl import TRL
from posttrain.config.importers.verl import VERL
from posttrain.config.yaml_lines import KeyPath, read_yaml
from posttrain.errors import ConfigError

TOOLS: dict[str, Tool] = {
    "axolotl": AXOLOTL,
    "llamafactory": LLAMAFACTORY,
    "trl": TRL,
    "torchtune": TORCHTUNE,
    "openrlhf": OPENRLHF,
    "verl": VERL,
}
"""Name on the command line → tool."""


@dataclass(frozen=True, slots=True)
class Foreign:
    """A file of `tool`, with the lines of its keys and the keys that are null."""

    tool: Tool
    path: Path
    values: Mapping[str, Any]
    lines: Mapping[KeyPath, int]
    nulls: tuple[str, ...]
    has_arguments: bool = False
    """Whether the command goes on with the arguments that its script is called with."""

    def convert(self, kind: Kind | None = None) -> ImportDraft:
        draft = self._converted(kind)
        if self.has_arguments:
            draft.change(
                '"$@"', "what the script is called with is not in the file; write into the command what matters of it"
            )
        return draft

    def _converted(self, kind: Kind | None) -> ImportDraft:
        home = tuple(dict.fromkeys((self.path.resolve().parent, Path.cwd())))
        if not self.tool.nested:
            return convert(self.tool, self.values, self.nulls, home, kind)
        known = resolved({**dict.fromkeys(self.nulls), **dict(by_path(self.values))})
        values = {key: value for key, value in known.items() if value is not None}
        return convert(self.tool, values, tuple(key for key in known if key not in values), home, kind)


def read_foreign(path: Path, tool: str | None = None) -> Foreign:
    """The file at `path`, of the tool that is named or found. Raises: ConfigError."""
    if tool is not None and tool not in TOOLS:
        raise ConfigError(f"--tool {tool}: expected one of {', '.join(TOOLS)}")
    if path.suffix.lower() not in YAML_SUFFIXES:
        found = find_command(path, tool)
        values = {key: value for key, value in found.keys.items() if value is not None}
        unset = tuple(key for key in found.keys if key not in values)
        lines: dict[KeyPath, int] = dict.fromkeys(((key,) for key in values), found.line.number)
        return Foreign(TOOLS[found.tool], path, values, lines, unset, found.line.has_arguments)
    document = read_yaml(path)
    nulls = tuple(str(key[0]) for key in document.nulls if len(key) == 1)
    known = TOOLS[tool] if tool else tool_of({**document.data, **dict.fromkeys(nulls)})
    if known is not None and known.nested:
        nulls = tuple(".".join(str(step) for step in key) for key in document.nulls)
    if known is None:
        raise ConfigError(
            f"{path}: no key says which tool it is for; expected a configuration of {', '.join(t.name for t in TOOLS.values())}; "
            f"name the tool with --tool {'|'.join(TOOLS)}"
        )
    return Foreign(known, path, document.data, document.lines, nulls)


def tool_of(values: Mapping[str, Any]) -> Tool | None:
    """The tool with the most of its own marks among the keys; of equals, the one that knows more of them."""

    inner = dict(by_path(values))

    def likeness(tool: Tool) -> tuple[int, int]:
        keys = inner.keys() if tool.nested else values.keys()
        return len(tool.marks & keys), len(tool.rows.keys() & keys)

    best = max(TOOLS.values(), key=likeness)
    return best if likeness(best)[0] else None
