"""Reads and writes of the registry's rows. Writes that belong together stand in one `schema.writing` transaction."""

from __future__ import annotations

import getpass
import json
import os
import socket
import sqlite3
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any

from posttrain.names import PREVIOUS
from posttrain.registry.audit import AuditResult, Event, LogAction, LogFilter, check_log, seal, select_events
from posttrain.registry.promotion import CHAMPION, HOLD
from posttrain.registry.schema import writing
from posttrain.registry.store import ContentStore

_SHOWN = 20
"""How many versions a message lists."""


class Rows:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def writing(self) -> AbstractContextManager[sqlite3.Connection]:
        """Around writes that belong together."""
        return writing(self._db)

    def alias_row(self, name: str, alias: str) -> sqlite3.Row | None:
        return self._db.execute("SELECT * FROM aliases WHERE (name, alias) = (?, ?)", (name, alias)).fetchone()

    def all_aliases(self, name: str = "") -> dict[tuple[str, int], list[str]]:
        """Name and version → the aliases that it has, of all models or of one."""
        found: dict[tuple[str, int], list[str]] = {}
        rows = self._db.execute("SELECT * FROM aliases WHERE ? IN (name, '') ORDER BY name, alias", (name,))
        for row in rows.fetchall():
            found.setdefault((row["name"], row["version"]), []).append(row["alias"])
            if row["previous"] is not None:
                found.setdefault((row["name"], row["previous"]), []).append(_previous_of(row["alias"]))
        return found

    def names_with(self, alias: str) -> list[str]:
        """The models of which a version has this alias."""
        return sorted({name for (name, _), aliases in self.all_aliases().items() if alias in aliases})

    def last_version(self, name: str) -> int:
        """The highest number that was ever given: one of a version that was removed is not given again."""
        query = "SELECT max(version) FROM events WHERE (name, action) = (?, 'register')"
        return int(self._db.execute(query, (name,)).fetchone()[0] or 0)

    def instead_of(self, name: str, version: int) -> str:
        """To end the message about a version that is not there."""
        for event in self.events(name, version=version, action="remove"):
            return f": it was removed at {event.at} by {event.actor}: {event.details['reason']}"
        rows = self._db.execute(
            f"SELECT name, version FROM versions ORDER BY name, version LIMIT {_SHOWN + 1}"
        ).fetchall()
        known = [f"{row['name']}@{row['version']}" for row in rows]
        return f"; it has {', '.join(known[:_SHOWN]) or 'no versions'}{' …' * (len(known) > _SHOWN)}"

    def set_alias(
        self, name: str, alias: str, version: int, previous: int | None, epoch: int, verdict: str | None
    ) -> None:
        values = (name, alias, version, previous, epoch, verdict)
        self._db.execute("INSERT OR REPLACE INTO aliases VALUES (?, ?, ?, ?, ?, ?)", values)

    def holder_before(self, name: str, alias: str, version: int) -> int | None:
        """The latest holder below `version` in the alias's history that is not on hold."""
        history: list[int] = []
        moves = [*self.events(name, action="promote"), *self.events(name, action="rollback")]
        for event in sorted(moves, key=lambda move: move.id):
            if event.details["alias"] != alias:
                continue
            if event.action == "promote":
                history.append(event.version)
            elif event.action == "rollback":
                while history and history[-1] != event.version:
                    history.pop()
        while history and history[-1] != version:
            history.pop()
        below = (holder for holder in reversed(history[:-1]) if holder != version)
        return next((holder for holder in below if self._is_free(name, holder)), None)

    def _is_free(self, name: str, version: int) -> bool:
        """Whether it can take an alias: neither on hold nor removed."""
        there = self._db.execute("SELECT 1 FROM versions WHERE (name, version) = (?, ?)", (name, version)).fetchone()
        return there is not None and HOLD not in self.tags(name, version)

    def tags(self, name: str, version: int) -> dict[str, str]:
        rows = self._db.execute("SELECT key, value FROM tags WHERE (name, version) = (?, ?)", (name, version))
        return {row["key"]: row["value"] for row in rows.fetchall()}

    def all_tags(self) -> dict[tuple[str, int], dict[str, str]]:
        found: dict[tuple[str, int], dict[str, str]] = {}
        for row in self._db.execute("SELECT * FROM tags").fetchall():
            found.setdefault((row["name"], row["version"]), {})[row["key"]] = row["value"]
        return found

    def set_tag(self, name: str, version: int, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO tags VALUES (?, ?, ?, ?)", (name, version, key, value))

    def keep(self, name: str, version: int, role: str, digest: str) -> bool:
        """Whether it was not kept before."""
        values = (name, version, role, "file", digest)
        return self._db.execute("INSERT OR IGNORE INTO objects VALUES (?, ?, ?, ?, ?)", values).rowcount > 0

    def all_objects(self) -> list[tuple[str, str, str]]:
        """Role, kind and digest of what any version keeps, in the order in which they came."""
        query = "SELECT role, kind, digest FROM objects GROUP BY role, kind, digest ORDER BY min(rowid)"
        rows = self._db.execute(query).fetchall()
        return [(row["role"], row["kind"], row["digest"]) for row in rows]

    def objects(self, name: str, version: int) -> list[tuple[str, str, str]]:
        """Role, kind and digest of what a version keeps."""
        query = "SELECT role, kind, digest FROM objects WHERE (name, version) = (?, ?) ORDER BY rowid"
        return [
            (row["role"], row["kind"], row["digest"]) for row in self._db.execute(query, (name, version)).fetchall()
        ]

    def verdict(self, name: str, version: int) -> str | None:
        """Digest of the verdict that a version was registered with."""
        query = "SELECT verdict FROM versions WHERE (name, version) = (?, ?)"
        row = self._db.execute(query, (name, version)).fetchone()
        return None if row is None else row["verdict"]

    def set_verdict(self, name: str, version: int, digest: str) -> None:
        self._db.execute("UPDATE versions SET verdict = ? WHERE (name, version) = (?, ?)", (digest, name, version))

    def manifests(self) -> dict[tuple[str, int], list[str]]:
        """Name and version → the digests of the manifests that it keeps, first stage to last."""
        query = "SELECT name, version, digest FROM objects WHERE role = 'manifest' ORDER BY rowid"
        found: dict[tuple[str, int], list[str]] = {}
        for row in self._db.execute(query).fetchall():
            found.setdefault((row["name"], row["version"]), []).append(row["digest"])
        return found

    def that_take(self, made: Collection[str], store: ContentStore, *, but: tuple[str, int]) -> list[str]:
        """The other versions whose lineage takes one of these digests as an input."""
        rows = self._db.execute("SELECT DISTINCT digest FROM objects WHERE role = 'manifest'").fetchall()
        taking = {row["digest"] for row in rows if _takes(store.get_json(row["digest"], "manifest"), made)}
        keepers = self._db.execute("SELECT name, version, digest FROM objects WHERE role = 'manifest'").fetchall()
        found = {(row["name"], row["version"]) for row in keepers if row["digest"] in taking} - {but}
        return [f"{name}@{version}" for name, version in sorted(found)]

    def delete(self, name: str, version: int) -> None:
        """Take out all rows of a version but those of the log."""
        for table in ("objects", "tags", "versions"):
            self._db.execute(f"DELETE FROM {table} WHERE (name, version) = (?, ?)", (name, version))

    def event(self, action: LogAction, name: str, version: int, details: Mapping[str, Any], actor: str | None) -> None:
        """Enter it into the log, inside the transaction that does it."""
        values = (now(), actor or user(), action, name, version, json.dumps(details, sort_keys=True))
        done = self._db.execute("INSERT INTO events VALUES (NULL, ?, ?, ?, ?, ?, ?)", values)
        seal(self._db, int(done.lastrowid or 0))

    def events(self, name: str | None = None, after: int = 0, *, version: int = 0, action: str = "") -> list[Event]:
        """What happened, oldest first, past the event `after`."""
        return select_events(self._db, LogFilter(name or "", version, action=action), after)

    def log(self, asked: LogFilter) -> list[Event]:
        return select_events(self._db, asked)

    def check_log(self, head: str = "") -> AuditResult:
        """Raises: RegistryError if the log is not as it was written, or the registry is not what it adds up to."""
        return check_log(self._db, head)

    def delivered(self, mirror: str) -> int:
        """Id of the last event that reached `mirror`."""
        row = self._db.execute("SELECT delivered FROM mirrors WHERE mirror = ?", (mirror,)).fetchone()
        return 0 if row is None else int(row["delivered"])

    def mark_delivered(self, mirror: str, event_id: int) -> None:
        with writing(self._db) as db:
            db.execute("INSERT OR REPLACE INTO mirrors VALUES (?, ?)", (mirror, event_id))


def _takes(manifest: Mapping[str, Any], made: Collection[str]) -> bool:
    return manifest["parent"] in made or not set(made).isdisjoint(manifest["inputs"].values())


def _previous_of(alias: str) -> str:
    return PREVIOUS if alias == CHAMPION else f"{alias}.{PREVIOUS}"


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def user() -> str:
    """Who acts: `POSTTRAIN_ACTOR`, else the login of this process at this host."""
    if named := os.environ.get("POSTTRAIN_ACTOR", "").strip():
        return named
    try:
        login = getpass.getuser()
    except (KeyError, OSError):  # a container whose uid has no name
        login = f"uid {os.getuid()}"
    return f"{login}@{socket.gethostname()}"
