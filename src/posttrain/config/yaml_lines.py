"""YAML as plain data with the line of every key.

Scalars follow YAML 1.2, where YAML 1.1 surprises: `1e-4` is a number, `off`, `yes` and `2024-01-01` are text.
Knows nothing of what the keys mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import ConfigError
from posttrain.files import neighbours

KeyPath = tuple[str | int, ...]
"""Where a value stands: `("datasets", 0, "path")`. Places in lists count from 0 here."""

_MAX_VALUES = 100_000
_MAX_DEPTH = 50
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9][0-9_]*)?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*\.?(?:[eE][-+]?[0-9]+)|[0-9][0-9_]*\.)"
)
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_HEX = re.compile(r"0x[0-9a-fA-F_]+")
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_TAG = "tag:yaml.org,2002:"
_TAGS_READ = {_TAG + name for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "map", "seq")}


@dataclass(frozen=True, slots=True)
class Document:
    """A YAML mapping. A key whose value is null is in `nulls` and `lines` but not in `data`: null means unset."""

    data: dict[str, Any]
    lines: dict[KeyPath, int]
    nulls: frozenset[KeyPath] = frozenset()


def read_yaml(path: Path) -> Document:
    """Raises: ConfigError naming file, line and column where the file is not a YAML mapping with unique keys."""
    text = _read_text(path)
    root = _compose(text, str(path))
    if root is None:
        raise ConfigError(f"{path}: the file is empty; expected a mapping of keys, e.g. `base_model: ./base`")
    if not isinstance(root, yaml.MappingNode):
        line = root.start_mark.line + 1
        kind = "a list" if isinstance(root, yaml.SequenceNode) else "a single value"
        raise ConfigError(f"{path}:{line}: got {kind}, expected a mapping of keys, e.g. `base_model: ./base`")
    reader = _Reader(str(path))
    data = reader.value(root, ())
    return Document(data, reader.lines, frozenset(reader.nulls))


def parse_value(text: str) -> Any:
    """A value from the command line: a YAML scalar, or `[…]`, `{…}` or a quoted string. Raises: ConfigError."""
    stripped = text.strip()
    if not stripped.startswith(("[", "{", '"', "'")):
        return plain_scalar(stripped)
    root = _compose(stripped, "value")
    return _Reader("value").value(root, ()) if root is not None else None


def plain_scalar(text: str) -> Any:
    """The value of an unquoted scalar."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _HEX.fullmatch(text):
        return int(text, 16)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes text that either YAML 1.1 or 1.2 would read as something else; aliases are written out."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    # PyYAML writes the line separators of Unicode as they are, and reads them back as spaces.
    style = '"' if any(mark in text for mark in "\x85\u2028\u2029") else None
    return dumper.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _text)
_Dumper.add_implicit_resolver(_TAG + "float", re.compile(f"^(?:{_FLOAT.pattern})$"), list("-+0123456789."))
_Dumper.add_implicit_resolver(_TAG + "int", re.compile(f"^(?:{_INT.pattern})$"), list("-+0123456789"))


def dump_yaml(value: Mapping[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to an equal mapping; keys keep their order."""
    return yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise ConfigError(f"{path}: got a folder, expected a YAML file")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file{neighbours(path, '.yaml', '.yml')}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _compose(text: str, name: str) -> yaml.Node | None:
    _refuse_control_characters(text, name)
    loader = yaml.SafeLoader(text)
    try:
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}:{mark.column + 1}" if mark else name
        hint = _hint(str(error.problem), text, mark.line if mark else 0)
        context = f" ({error.context})" if error.context else ""
        raise ConfigError(f"{where}: broken YAML: {error.problem}{context}{hint}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply to be a configuration") from None
    finally:
        loader.dispose()


def _hint(problem: str, text: str, line: int) -> str:
    """What was probably done, where the parser's words do not say it. `line` counts from 0."""
    if "'\\t'" in problem:
        return "; indent with spaces, not tabs"
    above = [n for n, content in enumerate(text.splitlines()[:line]) if content.split("#")[0].strip()]
    if problem == "mapping values are not allowed here" and above:
        here, before = (text.splitlines()[n] for n in (line, above[-1]))
        if len(here) - len(here.lstrip()) > len(before) - len(before.lstrip()):
            return f"; line {line + 1} is indented deeper than line {above[-1] + 1}, which has its value: indent both alike"
    if problem == "could not find expected ':'":
        return "; write `key: value`, with a space behind the colon"
    return ""


def _refuse_control_characters(text: str, name: str) -> None:
    found = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if found:
        before = text[: found.start()]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        raise ConfigError(
            f"{name}:{line}:{column}: broken YAML: control character U+{ord(found.group()):04X}; remove it"
        )


@dataclass(slots=True)
class _Reader:
    """Turns composed nodes into plain data; notes lines and nulls on the way."""

    file: str
    lines: dict[KeyPath, int] = field(default_factory=dict)
    nulls: set[KeyPath] = field(default_factory=set)
    open_nodes: list[yaml.Node] = field(default_factory=list)
    count: int = 0

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        self.count += 1
        if self.count > _MAX_VALUES:
            raise self._error(node, f"more than {_MAX_VALUES} values (anchors that multiply?)")
        if any(node is other for other in self.open_nodes):
            raise self._error(node, "an anchor that contains itself")
        if len(self.open_nodes) >= _MAX_DEPTH:
            raise self._error(node, f"nested more than {_MAX_DEPTH} deep")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if node.tag not in _TAGS_READ:
            raise self._error(node, f"tag {node.tag} is not read; write plain YAML")
        self.open_nodes.append(node)
        result = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self.open_nodes.pop()
        return result

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        items: list[Any] = []
        for place, item in enumerate(node.value):
            self.lines[(*path, place)] = item.start_mark.line + 1
            items.append(self.value(item, (*path, place)))
        return items

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, (key_node, value_node) in self._entries(node).items():
            here = (*path, key)
            self.lines[here] = key_node.start_mark.line + 1
            value = self.value(value_node, here)
            if value is None:
                self.nulls.add(here)
            else:
                result[key] = value
        return result

    def _entries(self, node: yaml.MappingNode) -> dict[str, tuple[yaml.Node, yaml.Node]]:
        """Key and value nodes by key; what `<<` merges in comes first and gives way to the mapping's own keys."""
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _TAG + "merge":
                for key, entry in self._merged(value_node, node):
                    merged.setdefault(key, entry)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise self._error(key_node, "a key must be text")
            key = key_node.value
            if key in own:
                first = own[key][0].start_mark.line + 1
                raise self._error(key_node, f"{key}: the key stands twice, first on line {first}; keep one")
            own[key] = (key_node, value_node)
        return merged | own

    def _merged(self, node: yaml.Node, owner: yaml.Node) -> Iterator[tuple[str, tuple[yaml.Node, yaml.Node]]]:
        for source in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(source, yaml.MappingNode):
                raise self._error(node, "`<<` merges a mapping or a list of mappings")
            if source is owner or any(source is other for other in self.open_nodes):
                raise self._error(node, "an anchor that contains itself")
            self.open_nodes.append(source)
            yield from self._entries(source).items()
            self.open_nodes.pop()

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag not in _TAGS_READ:
            if node.tag != _TAG + "merge":
                raise self._error(node, f"tag {node.tag} is not read; write plain YAML")
            return node.value
        quoted = node.style is not None
        return node.value if quoted else plain_scalar(node.value)

    def _error(self, node: yaml.Node, reason: str) -> ConfigError:
        mark = node.start_mark
        return ConfigError(f"{self.file}:{mark.line + 1}:{mark.column + 1}: {reason}")
