"""Configurations of an older posttrain: what was renamed, changed or removed since is read as what it is now, and said.

A run's `config.yaml` says in `schema` which version of the keys it was written with. A YAML written by hand says nothing;
there old names are read too, but values only where their key was renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from posttrain.config.kinds import STAGE_KINDS
from posttrain.config.knob import Keys
from posttrain.config.pipeline import OnFailKeys, PipelineKeys, in_pipeline, kinds_in_pipeline
from posttrain.config.resolved import SCHEMA, SCHEMA_KEY, project_data, to_data
from posttrain.config.schema import annotation_below, group_in, show_value
from posttrain.config.settings import PROJECT_KEY, Problems, Settings, dotted, read_settings
from posttrain.config.stages import TrainKeys
from posttrain.config.yaml_lines import KeyPath


def _as_it_was(value: Any) -> Any:
    return value


@dataclass(frozen=True, slots=True)
class Migration:
    """One change of the keys of `group` and of the groups derived from it.

    `since` is the schema that made it; `new` is None where the key is gone; `reading` turns the old value into the new
    one and raises KeyError, TypeError or ValueError for what has no counterpart; `why` is for the reader.
    """

    since: int
    group: type[Keys]
    old: str
    new: str | None
    why: str
    reading: Callable[[Any], Any] = _as_it_was

    def __str__(self) -> str:
        change = "is gone" if self.new is None else "is read anew" if self.new == self.old else f"is now {self.new}"
        return f"{self.old} {change} since schema {self.since}: {self.why}"


MIGRATIONS: tuple[Migration, ...] = ()
"""Oldest first. A row is added, and `SCHEMA` raised, with every key that is renamed, removed or read otherwise."""


@dataclass(slots=True)
class _Walk:
    """One pass over a configuration; `written` is its schema, None where it does not say."""

    settings: Settings
    problems: Problems
    table: Sequence[Migration]
    written: int | None
    notes: list[str] = field(default_factory=list)

    def group(self, values: Any, groups: Sequence[type[Keys]], path: KeyPath) -> None:
        """The keys at `path`, which any of `groups` may own, and all below them."""
        if not isinstance(values, dict):
            return
        for row in self.table:
            if any(issubclass(group, row.group) for group in groups) and self._applies(row, values):
                self._apply(row, values, path)
        for key in list(values):
            below = [annotation_below(group, key) for group in groups]
            if OnFailKeys in groups and key == "with":
                self.group(values[key], kinds_in_pipeline(), (*path, key))
            elif PipelineKeys in groups and key == "stages":
                self._stages(values[key], (*path, key))
            else:
                self._value(values[key], next((kind for kind in below if kind is not None), None), (*path, key))

    def _stages(self, entries: Any, path: KeyPath) -> None:
        for place, entry in enumerate(entries if isinstance(entries, list) else ()):
            bodies: Any = entry.items() if isinstance(entry, dict) else ()
            for kind, body in bodies:
                if kind in STAGE_KINDS:
                    self.group(body, [in_pipeline(kind)], (*path, place, kind))

    def _value(self, value: Any, annotation: Any, path: KeyPath) -> None:
        group = group_in(annotation)
        if group is not None:
            self.group(value, [group], path)
            return
        items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for step, item in items:
            self._value(item, annotation_below(annotation, step), (*path, step))

    def _applies(self, row: Migration, values: Mapping[str, Any]) -> bool:
        if row.old not in values:
            return False
        return row.old != row.new if self.written is None else row.since > self.written

    def _apply(self, row: Migration, values: dict[str, Any], path: KeyPath) -> None:
        old = (*path, row.old)
        origin, name = self.settings.origin(old), self.settings.name(old)
        if row.new is not None and row.new != row.old and row.new in values:
            self.problems.add(origin, name, f"{row}; {row.new} is set too; keep {row.new}")
            return
        value = values.pop(row.old)
        known = {at: o for at, o in self.settings.origins.items() if at[: len(old)] == old}
        for at in known:
            del self.settings.origins[at]
        if row.new is None:
            self.notes.append(f"{name}: {show_value(value)} is left out; {row}")
            return
        try:
            values[row.new] = row.reading(value)
        except (KeyError, TypeError, ValueError):
            self.problems.add(
                origin, name, f"{row}; its value {show_value(value)} has no counterpart; set {row.new} yourself"
            )
            return
        self.settings.origins.update({(*path, row.new, *at[len(old) :]): o for at, o in known.items()})
        if (row.new, values[row.new]) == (row.old, value):
            return
        self.notes.append(f"{name}: {show_value(value)} is read as {row.new}: {show_value(values[row.new])}; {row}")


def migrate(
    settings: Settings, groups: Sequence[type[Keys]], problems: Problems, table: Sequence[Migration] = MIGRATIONS
) -> list[str]:
    """Read old keys as present ones, in place; returns a note for each. `groups` are what the top may hold."""
    walk = _Walk(settings, problems, table, _written_with(settings, problems))
    walk.group(settings.values, groups, ())
    return walk.notes


def _written_with(settings: Settings, problems: Problems) -> int | None:
    """The schema that a configuration names, which is taken out of it."""
    if SCHEMA_KEY not in settings.values:
        return None
    origin, written = settings.origin((SCHEMA_KEY,)), settings.values[SCHEMA_KEY]
    settings.put((SCHEMA_KEY,), None, origin)
    if isinstance(written, bool) or not isinstance(written, int) or written < 0:
        problems.add(
            origin, SCHEMA_KEY, f"got {show_value(written)}, expected a whole number up to {SCHEMA}; or leave it out"
        )
        return None
    if written > SCHEMA:
        text = f"{written} is of a newer posttrain, this one reads up to {SCHEMA}; upgrade posttrain"
        problems.add(origin, SCHEMA_KEY, f"{text}, or remove the line to try it all the same")
    return written


def renamed(key: str, groups: Sequence[type[Keys]], table: Sequence[Migration] = MIGRATIONS) -> str:
    """What became of a key that one of `groups` had once, or nothing."""
    rows = [row for row in table if row.old == key and any(issubclass(group, row.group) for group in groups)]
    return str(rows[-1]) if rows else ""


# --- what moved since a run was started ----------------------------------------------------------------------------


def drift(path: Path, keys: Keys, table: Sequence[Migration] = MIGRATIONS, *, project: Path | None = None) -> list[str]:
    """What differs between the configuration written at `path` and `keys`, one line a key; old names are read as now.

    Paths below `project` are compared relative to it, as they are stored.

    Raises: ConfigError if the file cannot be read.
    """
    settings, nulls = read_settings(path)
    settings.values.pop(PROJECT_KEY, None)
    problems = Problems()
    notes = migrate(
        settings, [PipelineKeys, TrainKeys] if isinstance(keys, PipelineKeys) else [type(keys)], problems, table
    )
    before = dict(_leaves(settings.values, ())) | dict.fromkeys(nulls)
    now = dict(_leaves(to_data(keys) if project is None else project_data(keys, project.resolve()), ()))
    lines = [f"{dotted(at)}: {change}" for at, change in _changed(before, now)]
    return [*notes, *lines]


def _changed(before: Mapping[KeyPath, Any], now: Mapping[KeyPath, Any]) -> Iterator[tuple[KeyPath, str]]:
    for at in dict.fromkeys([*now, *before]):
        if at not in before:
            if now[at] is not None:
                yield at, f"not there then, now {show_value(now[at])}"
        elif at not in now:
            if before[at] is not None:
                yield at, f"{show_value(before[at])} then, not there now"
        elif before[at] != now[at]:
            yield at, f"{show_value(before[at])} → {show_value(now[at])}"


def _leaves(value: Any, path: KeyPath) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, (*path, key))
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for place, item in enumerate(value):
            yield from _leaves(item, (*path, place))
    else:
        yield path, value
