"""The registry's log: every act with its time and who did it, each entry sealed with the one before.

An entry's seal is the digest of the seal before it and of its own fields, so an entry that was changed, taken out or put in
between breaks the chain there. Who rewrites all of it makes another last seal: note that one elsewhere and name it again.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from posttrain.errors import RegistryError
from posttrain.files import digest_json
from posttrain.registry.promotion import HOLD

LogAction = Literal["add", "decide", "look", "promote", "register", "remove", "rollback", "tag", "untag"]
"""What an entry may say was done."""


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a version; never changed, never removed. A look at a suite has no name and version 0."""

    id: int
    at: str
    actor: str
    action: str
    name: str
    version: int
    details: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class LogFilter:
    """Which entries are asked for; empty is all. `since` and `until` are the start of an ISO date, both included."""

    name: str = ""
    version: int = 0
    actor: str = ""
    action: str = ""
    since: str = ""
    until: str = ""

    def __post_init__(self) -> None:
        """Raises: RegistryError for a kind of entry that no log has: that there are none would be no answer."""
        kinds = get_args(LogAction)
        if self.action and self.action not in kinds:
            raise RegistryError(f"got kind {self.action!r}, expected one of {', '.join(kinds)}")

    def where(self) -> tuple[str, list[Any]]:
        """SQL conditions and their values."""
        terms: dict[str, Any] = {
            "name = ?": self.name,
            "version = ?": self.version,
            "actor = ?": self.actor,
            "action = ?": self.action,
            "at >= ?": self.since,
        }
        stated = {term: value for term, value in terms.items() if value}
        conditions, values = list(stated), list(stated.values())
        if self.until:
            conditions.append("substr(at, 1, ?) <= ?")
            values += [len(self.until), self.until]
        return " AND ".join(["1", *conditions]), values


@dataclass(frozen=True, slots=True)
class AuditResult:
    """How many entries the log has, and the seal of the last: note it elsewhere to notice that all was rewritten."""

    num_entries: int
    head: str


def seal(db: sqlite3.Connection, event: int) -> None:
    """Chain an entry to the one before it, in the transaction that wrote it."""
    before = db.execute("SELECT digest FROM seals ORDER BY event DESC LIMIT 1").fetchone()
    row = db.execute("SELECT * FROM events WHERE id = ?", (event,)).fetchone()
    db.execute("INSERT INTO seals VALUES (?, ?)", (event, _seal_of("" if before is None else before["digest"], row)))


def seal_all(db: sqlite3.Connection) -> None:
    """Chain the entries that were written before there were seals."""
    for row in db.execute("SELECT id FROM events WHERE id NOT IN (SELECT event FROM seals) ORDER BY id").fetchall():
        seal(db, row["id"])


def _seal_of(before: str, row: sqlite3.Row) -> str:
    return digest_json([before, *tuple(row)])


def select_events(db: sqlite3.Connection, asked: LogFilter, after: int = 0) -> list[Event]:
    """What happened, oldest first, past the event `after`."""
    where, values = asked.where()
    rows = db.execute(f"SELECT * FROM events WHERE id > ? AND {where} ORDER BY id", (after, *values))
    return [Event(**{**dict(row), "details": json.loads(row["details"])}) for row in rows.fetchall()]


def check_log(db: sqlite3.Connection, head: str = "") -> AuditResult:
    """Walk the whole log, and compare what it says with what stands now. `head` is a seal noted earlier.

    Raises: RegistryError naming the first entry that is not as it was written, or what stands without an entry.
    """
    rows = db.execute("SELECT * FROM events LEFT JOIN seals ON event = id ORDER BY id").fetchall()
    seen = ""
    known: set[str] = set()
    for place, row in enumerate(rows, start=1):
        written = tuple(row)[:7]
        expected = digest_json([seen, *written])
        if row["id"] != place or row["digest"] != expected:
            what = "is missing" if row["id"] != place else "has no seal" if row["digest"] is None else "was changed"
            raise RegistryError(_tampered(f"entry {place} {what}"))
        seen = expected
        known.add(expected)
    last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'events'").fetchone()
    orphans = db.execute("SELECT count(*) FROM seals WHERE event > ?", (len(rows),)).fetchone()[0]
    if orphans or (last is not None and last["seq"] != len(rows)):
        raise RegistryError(_tampered(f"entries after {len(rows)} are missing"))
    if head and head not in known:
        raise RegistryError(_tampered(f"no entry has the seal {head}"))
    _check_state(db, select_events(db, LogFilter()))
    return AuditResult(len(rows), seen)


def _tampered(what: str) -> str:
    return (
        f"the log is not as it was written: {what}, expected an unbroken chain; compare with a copy of registry.sqlite "
        "from before, and trust no alias until it is known who wrote to this one"
    )


def _check_state(db: sqlite3.Connection, events: list[Event]) -> None:
    """What the log adds up to must be what stands. Raises: RegistryError naming what does not."""
    replayed = _Replayed()
    for event in events:
        replayed.take(event)
    found = _Replayed(
        {(r["name"], r["version"]): (r["digest"], r["manifest"]) for r in db.execute("SELECT * FROM versions")},
        {(r["name"], r["alias"]): (r["version"], r["epoch"]) for r in db.execute("SELECT * FROM aliases")},
        {(r["name"], r["version"], r["key"]): r["value"] for r in db.execute("SELECT * FROM tags")},
    )
    for what in (part.name for part in fields(_Replayed)):
        log, table = getattr(replayed, what), getattr(found, what)
        for key in sorted(log.keys() | table.keys(), key=str):
            said, is_now = log.get(key), table.get(key)
            if said != is_now:
                raise RegistryError(_tampered(f"{what} {key}: the log says {said}, the registry has {is_now}"))


@dataclass(slots=True)
class _Replayed:
    versions: dict[Any, Any] = field(default_factory=dict[Any, Any])
    aliases: dict[Any, Any] = field(default_factory=dict[Any, Any])
    tags: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def take(self, event: Event) -> None:
        name, version, said = event.name, event.version, event.details
        match event.action:
            case "register":
                self.versions[name, version] = (said["digest"], said["manifest"])
            case "remove":
                del self.versions[name, version]
                self.tags = {key: value for key, value in self.tags.items() if key[:2] != (name, version)}
            case "promote" | "rollback":
                self.aliases[name, said["alias"]] = (version, said["epoch"])
                if event.action == "rollback":
                    self.tags[name, int(said["from"]), HOLD] = said["reason"]
            case "tag":
                self.tags[name, version, said["key"]] = said["value"]
            case "untag":
                self.tags.pop((name, version, said["key"]), None)
            case _:
                pass
