"""The runs of the folder served, a line each: what their `pipeline.json` says, read again only where it changed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from posttrain.cli.agent_folder import ServedFolder
from posttrain.errors import PosttrainError
from posttrain.files import read_json
from posttrain.report.records import as_mapping

_WALK_S = 2.0
"""For so long the folder is not walked through again."""


@dataclass(frozen=True, slots=True)
class RunLine:
    """A run in the list; `changed` is when its state was last written, in seconds since 1970."""

    path: str
    name: str
    status: str
    stages: tuple[tuple[str, str], ...]
    verdicts: tuple[str, ...]
    registered: str
    changed: float
    waits: bool = False

    def matches(self, words: Sequence[str]) -> bool:
        text = f"{self.path} {self.name} {self.status} {' '.join(self.verdicts)} {self.registered} {'waits' if self.waits else ''}".lower()
        return all(word in text for word in words)


class RunIndex:
    """The lines, those that changed last first."""

    def __init__(self, place: ServedFolder) -> None:
        self._place = place
        self._lock = threading.Lock()
        self._folders: tuple[Path, ...] = ()
        self._walked_s = -_WALK_S
        self._known: dict[Path, tuple[tuple[int, int], RunLine]] = {}

    def lines(self) -> list[RunLine]:
        with self._lock:
            if time.monotonic() - self._walked_s >= _WALK_S:
                self._folders = tuple(self._place.runs())
                self._walked_s = time.monotonic()
                self._known = {folder: self._known[folder] for folder in self._folders if folder in self._known}
            lines = [line for folder in self._folders if (line := self._line(folder)) is not None]
        return sorted(lines, key=lambda line: (-line.changed, line.path))

    def _line(self, folder: Path) -> RunLine | None:
        state = folder / "pipeline.json"
        try:
            found = state.stat()
        except FileNotFoundError:
            return None  # removed since the walk
        except OSError as error:
            return RunLine(self._place.shown(folder), folder.name, f"unreadable: {error.strerror}", (), (), "", 0.0)
        stamp = (found.st_mtime_ns, found.st_size)
        known = self._known.get(folder)
        if known is None or known[0] != stamp:
            known = self._known[folder] = (stamp, self._read(folder, state, found.st_mtime))
        return replace(known[1], waits=(folder / "pending.json").exists())

    def _read(self, folder: Path, state: Path, changed: float) -> RunLine:
        shown = self._place.shown(folder)
        try:
            self._place.inside(state)
            record = as_mapping(read_json(state))
        except (PosttrainError, OSError, ValueError, RecursionError) as error:
            return RunLine(shown, folder.name, f"unreadable: {str(error).splitlines()[0]}", (), (), "", changed)
        stages = tuple(
            (Path(str(one.get("folder"))).name, str(one.get("status"))) for one in _entries(record, "stages")
        )
        verdicts = tuple(str(one.get("verdict")) for one in _entries(record, "gates"))
        registered = as_mapping(record.get("registered"))
        version = f"{registered.get('name')}@{registered.get('version')}" if registered else ""
        name, status = str(record.get("name") or folder.name), str(record.get("status") or "unknown")
        return RunLine(shown, name, status, stages, verdicts, version, changed)


def _entries(record: Any, name: str) -> list[Any]:
    found = record.get(name)
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
