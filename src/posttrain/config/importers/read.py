"""A file of another tool: which tool's it is, and its keys, from a YAML or a command line."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.importers.axolotl import AXOLOTL
from posttrain.config.importers.fates import ImportDraft, Kind, Tool, convert
from posttrain.config.importers.llamafactory import LLAMAFACTORY
from posttrain.config.importers.trl import SCRIPT, TRL
from posttrain.config.yaml_lines import KeyPath, parse_value, read_yaml
from posttrain.errors import ConfigError

TOOLS: dict[str, Tool] = {"axolotl": AXOLOTL, "llamafactory": LLAMAFACTORY, "trl": TRL}
"""Name on the command line → tool."""

_COMMANDS: tuple[tuple[str, str], ...] = (
    (r"(?:^|/)llamafactory-cli$", "llamafactory"),
    (r"(?:^|/)axolotl(?:\.cli\.\w+)?$", "axolotl"),
    (r"(?:^|/)trl$|(?:^|/)(?:sft|dpo|grpo|kto|orpo|cpo)\w*\.py$|^trl\.scripts\.\w+$", "trl"),
)
"""A word of a command line → whose it is."""
YAML_SUFFIXES = (".yaml", ".yml", ".json")


@dataclass(frozen=True, slots=True)
class Foreign:
    """A file of `tool`, with the lines of its keys and the keys that are null."""

    tool: Tool
    path: Path
    values: Mapping[str, Any]
    lines: Mapping[KeyPath, int]
    nulls: tuple[str, ...]

    def convert(self, kind: Kind | None = None) -> ImportDraft:
        home = tuple(dict.fromkeys((self.path.resolve().parent, Path.cwd())))
        return convert(self.tool, self.values, self.nulls, home, kind)


def read_foreign(path: Path, tool: str | None = None) -> Foreign:
    """The file at `path`, of the tool that is named or found. Raises: ConfigError."""
    if tool is not None and tool not in TOOLS:
        raise ConfigError(f"--tool {tool}: expected one of {', '.join(TOOLS)}")
    if path.suffix.lower() not in YAML_SUFFIXES:
        return _command(path, tool)
    document = read_yaml(path)
    nulls = tuple(str(key[0]) for key in document.nulls if len(key) == 1)
    found = TOOLS[tool] if tool else tool_of({**document.data, **dict.fromkeys(nulls)})
    if found is None:
        raise ConfigError(
            f"{path}: no key says which tool it is for; expected a configuration of {', '.join(t.name for t in TOOLS.values())}; "
            f"name the tool with --tool {'|'.join(TOOLS)}"
        )
    return Foreign(found, path, document.data, document.lines, nulls)


def tool_of(values: Mapping[str, Any]) -> Tool | None:
    """The tool with the most of its own marks among the keys; of equals, the one that knows more of them."""

    def likeness(tool: Tool) -> tuple[int, int]:
        return len(tool.marks & values.keys()), len(tool.rows.keys() & values.keys())

    best = max(TOOLS.values(), key=likeness)
    return best if likeness(best)[0] else None


def _command(path: Path, tool: str | None) -> Foreign:
    """The first command of a shell script that is a known tool's."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); expected a YAML or a command line") from None
    for line, words in _commands(text):
        place = next(
            ((n, name) for n, word in enumerate(words) for mark, name in _COMMANDS if re.search(mark, word)), None
        )
        if place is None or (tool and place[1] != tool):
            continue
        return _from_words(path, line, TOOLS[place[1]], words[place[0] :])
    raise ConfigError(
        f"{path}: no command of {', '.join(TOOLS)} in it; expected one such as `trl sft --model_name_or_path …`"
    )


def _commands(text: str) -> list[tuple[int, list[str]]]:
    """The commands of a script with their lines; `\\` at the end of a line goes on."""
    commands: list[tuple[int, list[str]]] = []
    pending, start = "", 0
    for number, line in enumerate(text.splitlines(), start=1):
        start = start if pending else number
        pending += line
        if pending.rstrip().endswith("\\"):
            pending = pending.rstrip()[:-1] + " "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:
            words = []
        if words:
            commands.append((start, words))
        pending = ""
    return commands


def _from_words(path: Path, line: int, tool: Tool, words: list[str]) -> Foreign:
    values: dict[str, Any] = {}
    verb, options = words[0], words[1:]
    if tool is TRL:
        script = re.split(r"[/.]", verb.removesuffix(".py"))[-1] if not verb.endswith("trl") else options.pop(0)
        values[SCRIPT] = script.partition("_")[0]
    lines: dict[KeyPath, int] = {}
    file = next((word for word in options if Path(word).suffix in YAML_SUFFIXES and not word.startswith("-")), None)
    if file is not None:
        document = read_yaml(
            next((home / file for home in (path.parent, Path.cwd()) if (home / file).exists()), Path(file))
        )
        values |= document.data
    values |= _options(options, path, line)
    values.pop("config", None)
    lines = dict.fromkeys(((key,) for key in values), line)
    return Foreign(tool, path, {key: value for key, value in values.items() if value is not None}, lines, ())


def _options(words: list[str], path: Path, line: int) -> dict[str, Any]:
    """`--key value`, `--key=value`, `--flag`, `--list a b c`."""
    values: dict[str, Any] = {}
    key = None
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            key = key.replace("-", "_")
            if key in values:
                raise ConfigError(f"{path}:{line}: --{key} stands twice; keep one")
            values[key] = parse_value(value) if equals else True
            key = None if equals else key
        elif key is not None:
            before = values[key]
            value = parse_value(word)
            values[key] = value if before is True else [*(before if isinstance(before, list) else [before]), value]
    return values
