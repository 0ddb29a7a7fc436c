"""The registry's tables, and connections to them."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from posttrain.errors import RegistryError
from posttrain.registry.audit import seal_all

_TABLES = """
CREATE TABLE IF NOT EXISTS versions (
    name TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, manifest TEXT NOT NULL, verdict TEXT,
    created TEXT NOT NULL, PRIMARY KEY (name, version), UNIQUE (name, digest, manifest)
) STRICT;
CREATE TABLE IF NOT EXISTS objects (
    name TEXT NOT NULL, version INTEGER NOT NULL, role TEXT NOT NULL, kind TEXT NOT NULL CHECK (kind IN ('file', 'tree')),
    digest TEXT NOT NULL, PRIMARY KEY (name, version, role, digest), FOREIGN KEY (name, version) REFERENCES versions
) STRICT;
CREATE TABLE IF NOT EXISTS aliases (
    name TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, previous INTEGER, epoch INTEGER NOT NULL,
    verdict TEXT, PRIMARY KEY (name, alias), FOREIGN KEY (name, version) REFERENCES versions
) STRICT;
CREATE TABLE IF NOT EXISTS tags (
    name TEXT NOT NULL, version INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (name, version, key), FOREIGN KEY (name, version) REFERENCES versions
) STRICT;
CREATE TABLE IF NOT EXISTS looks (
    suite_digest TEXT NOT NULL, look INTEGER NOT NULL, candidate TEXT NOT NULL, baseline TEXT NOT NULL,
    at TEXT NOT NULL, PRIMARY KEY (suite_digest, look), UNIQUE (suite_digest, candidate, baseline)
) STRICT;
CREATE TABLE IF NOT EXISTS events (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL, actor TEXT NOT NULL, action TEXT NOT NULL,
    name TEXT NOT NULL, version INTEGER NOT NULL, details TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS mirrors (mirror TEXT PRIMARY KEY, delivered INTEGER NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS events_stay BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE TRIGGER IF NOT EXISTS events_keep BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'events are append-only'); END;
CREATE INDEX IF NOT EXISTS events_of ON events (name, action, version);
CREATE INDEX IF NOT EXISTS manifests_of ON objects (digest) WHERE role = 'manifest';
CREATE TABLE IF NOT EXISTS seals (event INTEGER PRIMARY KEY, digest TEXT NOT NULL) STRICT;
CREATE TRIGGER IF NOT EXISTS seals_stay BEFORE UPDATE ON seals BEGIN SELECT RAISE(ABORT, 'seals are append-only'); END;
CREATE TRIGGER IF NOT EXISTS seals_keep BEFORE DELETE ON seals BEGIN SELECT RAISE(ABORT, 'seals are append-only'); END;
CREATE TABLE IF NOT EXISTS look_items (
    suite_digest TEXT NOT NULL, name TEXT NOT NULL, item TEXT NOT NULL, renews TEXT, PRIMARY KEY (suite_digest, item)
) STRICT;
CREATE INDEX IF NOT EXISTS looks_by_item ON look_items (item);
"""
_ADDED = ("seals_keep", "looks_by_item")
"""What a registry lacks that an older version made."""
_BUSY_S = 30.0


def connect(path: Path, *, new: bool, writable: bool = True) -> sqlite3.Connection:
    """Open, creating the tables where the registry is `new`. Every commit is on disk before it returns.

    What is not `writable` is opened as it is. Raises: RegistryError if the file is not what SQLite wrote, or is gone from a registry that is not new.
    """
    go_on = (
        f"put a copy of {path} back; the objects beside it are as they were. Without a copy move {path.parent} away and start the "
        "runs again: each registers its model anew"
    )
    if not new and not (path.exists() and path.stat().st_size):
        raise RegistryError(
            f"{path} is {'empty' if path.exists() else 'gone'}, and there are objects beside it; {go_on}"
        )
    target = path.resolve().as_uri() + ("" if writable else _as_it_is(path))
    db = sqlite3.connect(target, uri=True, timeout=_BUSY_S, isolation_level=None)
    try:
        found = str(db.execute("PRAGMA quick_check(1)").fetchone()[0])  # before anything is written
        if found == "ok":
            db.row_factory = sqlite3.Row
            if writable:
                _prepare(db)
            return db
    except sqlite3.OperationalError as error:
        db.close()
        raise RegistryError(
            f"{path} cannot be opened: {error}; make its folder writable, or wait for who holds it"
        ) from error
    except sqlite3.DatabaseError as error:
        found = str(error)
    db.close()
    raise RegistryError(f"{path} is damaged: {found.splitlines()[-1]}; {go_on}")


def _as_it_is(path: Path) -> str:
    """How SQLite opens a file beside which it can put nothing: without a log of writes there is nothing to wait for."""
    log = path.with_name(f"{path.name}-wal")
    return "?mode=ro" if log.exists() and log.stat().st_size else "?mode=ro&immutable=1"


def _prepare(db: sqlite3.Connection) -> None:
    _use_wal(db)
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    present = {row["name"] for row in db.execute("SELECT name FROM sqlite_master")}
    if not present.issuperset(_ADDED):
        db.executescript(f"BEGIN IMMEDIATE; {_TABLES}")
        seal_all(db)
        db.execute("COMMIT")


def _use_wal(db: sqlite3.Connection) -> None:
    """Switching a new file needs it alone for a moment, and SQLite's busy timeout does not cover that."""
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


@contextmanager
def writing(db: sqlite3.Connection) -> Generator[sqlite3.Connection, None, None]:
    """One transaction that no other writer can slip into; wholly done or wholly undone."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
    except BaseException:
        db.execute("ROLLBACK")
        raise
    db.execute("COMMIT")
