"""Reads and writes of the registry's rows. Writes that belong together stand in one `schema.writing` transaction."""

from __future__ import annotations

import getpass
import json
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from posttrain.names import PREVIOUS
from posttrain.registry.promotion import CHAMPION, HOLD
from posttrain.registry.schema import writing


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a version; never changed, never removed."""

    id: int
    at: str
    actor: str
    action: str
    name: str
    version: int
    details: Mapping[str, Any]


class Rows:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def alias_row(self, name: str, alias: str) -> sqlite3.Row | None:
        return self._db.execute("SELECT * FROM aliases WHERE (name, alias) = (?, ?)", (name, alias)).fetchone()

    def aliases(self, name: str, version: int) -> tuple[str, ...]:
        found: list[str] = []
        for row in self._db.execute("SELECT * FROM aliases WHERE name = ? ORDER BY alias", (name,)).fetchall():
            if row["version"] == version:
                found.append(row["alias"])
            if row["previous"] == version:
                found.append(PREVIOUS if row["alias"] == CHAMPION else f"{row['alias']}.{PREVIOUS}")
        return tuple(found)

    def set_alias(
        self, name: str, alias: str, version: int, previous: int | None, epoch: int, verdict: str | None
    ) -> None:
        values = (name, alias, version, previous, epoch, verdict)
        self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, ?)", values)

    def holder_before(self, name: str, alias: str, version: int) -> int | None:
        """The latest holder below `version` in the alias's history that is not on hold."""
        history: list[int] = []
        for event in self.events(name):
            if event.details.get("alias") != alias:
                continue
            if event.action == "promote":
                history.append(event.version)
            elif event.action == "rollback":
                while history and history[-1] != event.version:
                    history.pop()
        while history and history[-1] != version:
            history.pop()
        free = [holder for holder in history[:-1] if holder != version and HOLD not in self.tags(name, holder)]
        return free[-1] if free else None

    def tags(self, name: str, version: int) -> dict[str, str]:
        rows = self._db.execute("SELECT key, value FROM tags WHERE (name, version) = (?, ?)", (name, version))
        return {row["key"]: row["value"] for row in rows.fetchall()}

    def set_tag(self, name: str, version: int, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)", (name, version, key, value))

    def keep(self, name: str, version: int, role: str, digest: str) -> None:
        values = (name, version, role, "file", digest)
        self._db.execute("INSERT OR IGNORE INTO objects VALUES (?, ?, ?, ?, ?)", values)

    def event(self, action: str, name: str, version: int, details: Mapping[str, Any], actor: str | None) -> None:
        values = (now(), actor or user(), action, name, version, json.dumps(details, sort_keys=True))
        self._db.execute("INSERT INTO events VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)

    def events(self, name: str | None = None, after: int = 0) -> list[Event]:
        """What happened, oldest first, past the event `after`."""
        query = "SELECT * FROM events WHERE id > ? AND ? IN (name, '') ORDER BY id"
        rows = self._db.execute(query, (after, name or "")).fetchall()
        return [Event(**{**dict(row), "details": json.loads(row["details"])}) for row in rows]

    def delivered(self, mirror: str) -> int:
        """Id of the last event that reached `mirror`."""
        row = self._db.execute("SELECT delivered FROM mirrors WHERE mirror = ?", (mirror,)).fetchone()
        return 0 if row is None else int(row["delivered"])

    def mark_delivered(self, mirror: str, event_id: int) -> None:
        with writing(self._db) as db:
            db.execute("INSERT OR REPLACE INTO mirrors VALUES (?, ?)", (mirror, event_id))


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """The user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose uid has no name
        return f"uid {os.getuid()}"
