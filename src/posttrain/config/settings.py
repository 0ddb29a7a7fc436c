"""Values on their way to a key model, each with where it came from; and the problems found on that way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.yaml_lines import KeyPath, parse_value, read_yaml
from posttrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class KeyOrigin:
    """Where a value came from: `where` for messages (`runs/train.yaml:7`), `short` for provenance (`train.yaml:7`)."""

    where: str
    short: str
    line: int = 0


@dataclass(slots=True)
class Problems:
    """Everything that is wrong, so that one run names it all."""

    found: dict[str, int] = field(default_factory=dict)

    def add(self, origin: KeyOrigin, name: str, text: str) -> None:
        says_it_itself = re.match(rf"{re.escape(name)}(?![\w.])", text)
        subject = "" if not name or says_it_itself else f"{name}: "
        line = f"{origin.where}: {subject}{text}"
        # A key handed down to several stages is one problem, though its example may differ by stage.
        if not any(line.partition("; e.g. ")[0] == other.partition("; e.g. ")[0] for other in self.found):
            self.found[line] = origin.line

    def raise_if_any(self) -> None:
        """Raises: ConfigError with one line a problem, in the order of the file."""
        if self.found:
            raise ConfigError("\n".join(sorted(self.found, key=lambda text: self.found[text])))


@dataclass(slots=True)
class Settings:
    """A mapping of keys with the origin of each.

    `home` is where the mapping itself stands, `prefix` what its keys are called from outside (`stages.2.`), `shared`
    the keys that were handed down to it and are known by their plain name.
    """

    values: dict[str, Any]
    origins: dict[KeyPath, KeyOrigin]
    home: KeyOrigin
    prefix: str = ""
    shared: set[str] = field(default_factory=set)

    def origin(self, path: KeyPath) -> KeyOrigin:
        """Origin of the value at `path`, else of what holds it."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.origins:
                return self.origins[path[:length]]
        return self.home

    def name(self, path: KeyPath) -> str:
        """`stages.2.datasets.1.path`; places are counted from 1, as in `--set`."""
        return dotted(path) if path and path[0] in self.shared else self.prefix + dotted(path)

    def has(self, path: KeyPath) -> bool:
        value: Any = self.values
        for step in path:
            if not holds(value, step):
                return False
            value = value[step]
        return True

    def put(self, path: KeyPath, value: Any, origin: KeyOrigin) -> None:
        """Set the value at `path`, whose holder exists; None removes it."""
        holder: Any = self.values
        for step in path[:-1]:
            holder = holder[step]
        for known in [known for known in self.origins if known[: len(path)] == path]:
            del self.origins[known]
        if value is None and isinstance(holder, dict):
            holder.pop(path[-1], None)
            return
        last: Any = path[-1]
        if isinstance(holder, list) and last == len(holder):
            holder.append(value)
        else:
            holder[last] = value
        self.origins[path] = origin

    def fill(self, path: KeyPath, value: Any) -> None:
        """Set a default that depends on the file, such as its name; an existing value stays."""
        if not self.has(path):
            self.put(path, value, KeyOrigin(self.home.where, "default", self.home.line))

    def rename(self, old: str, new: str, value: Any) -> None:
        """Read the top-level key `old` as `new: value`."""
        del self.values[old]
        self.values[new] = value
        for path in [path for path in self.origins if path[0] == old]:
            self.origins[(new, *path[1:])] = self.origins.pop(path)

    def below(self, path: KeyPath) -> Settings:
        """The mapping at `path`, as settings of its own (values copied)."""
        value: Any = self.values
        for step in path:
            value = value[step]
        origins = {
            known[len(path) :]: o for known, o in self.origins.items() if known[: len(path)] == path and known != path
        }
        return Settings(dict(value), origins, self.origin(path), self.name(path) + ".")

    def take(self, other: Settings, keys: Sequence[str], *, shared: bool = False) -> None:
        """Take over `keys` of `other` with their origins."""
        for key in keys:
            self.put((key,), _copied(other.values[key]), other.origin((key,)))
            self.origins.update({path: origin for path, origin in other.origins.items() if path[0] == key})
            if shared:
                self.shared.add(key)


def dotted(path: KeyPath) -> str:
    return ".".join(str(step + 1 if isinstance(step, int) else step) for step in path)


def read_settings(path: Path) -> tuple[Settings, frozenset[KeyPath]]:
    """The YAML at `path`, and the paths of its null keys. Raises: ConfigError."""
    document = read_yaml(path)
    origins = {key: KeyOrigin(f"{path}:{line}", f"{path.name}:{line}", line) for key, line in document.lines.items()}
    home = KeyOrigin(f"{path}:1", f"{path.name}:1", 1)
    return Settings(document.data, origins, home), document.nulls


PROJECT_KEY = "project"
"""Of a stored configuration: the folder that its relative paths start from, itself relative to the YAML."""


def take_project(settings: Settings, path: Path, problems: Problems, named: Path | None = None) -> Path:
    """The folder that relative paths start from: that of the YAML, unless the YAML, or `named`, says another."""
    origin, value = settings.origin((PROJECT_KEY,)), settings.values.pop(PROJECT_KEY, None)
    if named is None and value is not None and not isinstance(value, str):
        problems.add(origin, PROJECT_KEY, f"got {value!r}, expected a folder")
        value = None
    folder = named if named is not None else path.parent / (value or "")
    if not folder.is_dir():
        problems.add(origin, PROJECT_KEY, f"{folder} is not there; name the project's new place with --project DIR")
        problems.raise_if_any()  # no path in it could be found
    return folder


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def holds(value: Any, step: str | int) -> bool:
    """Whether `value[step]` exists."""
    if isinstance(value, dict):
        return step in value
    return isinstance(value, list) and isinstance(step, int) and 0 <= step < len(value)


# --- overrides -----------------------------------------------------------------------------------------------------

_AFTER_THE_FILE = 10**9


@dataclass(frozen=True, slots=True)
class Override:
    """One `--set KEY=VALUE`; `steps` are the parts of KEY."""

    steps: tuple[str, ...]
    value: Any
    origin: KeyOrigin


def parse_overrides(overrides: Sequence[str], problems: Problems) -> list[Override]:
    parsed: list[Override] = []
    for text in overrides:
        origin = KeyOrigin(f"--set {text}", "--set", _AFTER_THE_FILE)
        key, equals, value = text.partition("=")
        steps = tuple(step.strip() for step in key.split("."))
        if not equals or not all(steps):
            problems.add(origin, "", "expected KEY=VALUE, e.g. --set learning_rate=1e-6")
            continue
        try:
            parsed.append(Override(steps, parse_value(value), origin))
        except ConfigError as error:
            problems.add(origin, "", str(error))
    return parsed


def apply_override(settings: Settings, steps: Sequence[str], override: Override, problems: Problems) -> None:
    """Set the value that `steps` name, making the mappings and lists on the way."""
    holder: Any = settings.values
    path: KeyPath = ()
    for place, text in enumerate(steps):
        step = _step(holder, text)
        if step is None:
            problems.add(override.origin, settings.name(path), _cannot_descend(holder, text))
            return
        path = (*path, step)
        if place == len(steps) - 1:
            settings.put(path, _copied(override.value), override.origin)
            return
        if not settings.has(path):
            settings.put(path, [] if steps[place + 1].isdigit() else {}, override.origin)
        holder = holder[step]


def _step(holder: Any, text: str) -> str | int | None:
    if isinstance(holder, dict):
        return text
    if isinstance(holder, list) and text.isdigit() and 1 <= int(text) <= len(holder) + 1:
        return int(text) - 1
    return None


def _cannot_descend(holder: Any, text: str) -> str:
    if isinstance(holder, list):
        return f"got place {text}, expected 1 to {len(holder) + 1}"
    return f"is {holder!r}, which has no key {text}"
