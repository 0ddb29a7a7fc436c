"""The look ledger: how often verdicts were made on the same items. It outlives run folders.

Looks belong to items. A suite of which an item was judged before, under whatever name, file or decoding, goes on counting; one
whose items are all new has a budget of its own, and is said to renew the suite of its name.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime

from posttrain.evidence import EvalReport
from posttrain.files import digest_start
from posttrain.registry.rows import Rows
from posttrain.registry.schema import writing


@dataclass(frozen=True, slots=True)
class JudgedSuite:
    """The items that a verdict is made on: the suite's name and digest, and the digest of each item."""

    name: str
    digest: str
    items: Collection[str]

    @classmethod
    def of(cls, report: EvalReport) -> JudgedSuite:
        return cls(report.suite, report.suite_digest, frozenset(item.prompt_digest for item in report.items))


@dataclass(frozen=True, slots=True)
class LookCount:
    """A state of a suite that verdicts were made on. `num_looks` counts those on suites that share items; `renews` is the suite before."""

    name: str
    digest: str
    num_looks: int
    since: str
    renews: str | None


def record_look(db: sqlite3.Connection, suites: Iterable[JudgedSuite], candidate: str, baseline: str) -> int:
    """Number of this look, from 1: the largest over the suites. Judging the same pair again is not another look."""
    with writing(db):
        judged = sorted({suite.digest: suite for suite in suites}.values(), key=lambda suite: suite.digest)
        known = {suite.digest: _look_at(db, suite.digest, candidate, baseline) for suite in judged}
        # Counted before any is written: the suites of one gate may ask the same items.
        fresh = {suite.digest: count_looks(db, suite) + 1 for suite in judged if known[suite.digest] is None}
        renewed = {suite.digest: before for suite in judged if suite.digest in fresh and (before := _renews(db, suite))}
        at = datetime.now(UTC).isoformat(timespec="microseconds")  # what one verdict writes has one moment of its own
        for digest, look in fresh.items():
            db.execute("INSERT INTO looks VALUES (?, ?, ?, ?, ?)", (digest, look, candidate, baseline, at))
        for suite in judged:
            rows = [(suite.digest, suite.name, item, renewed.get(suite.digest)) for item in suite.items]
            db.executemany("INSERT OR IGNORE INTO look_items VALUES (?, ?, ?, ?)", rows)
        if fresh:
            details = {"suites": fresh, "candidate": candidate, "baseline": baseline}
            details |= {"renews": renewed} if renewed else {}
            Rows(db).event("look", "", 0, details, None)
    return max([*fresh.values(), *(look for look in known.values() if look is not None)], default=1)


def count_looks(db: sqlite3.Connection, suite: JudgedSuite) -> int:
    """Looks taken so far at any of these items."""
    together = _sharing(db, suite.digest, suite.items)
    query = "SELECT count(DISTINCT candidate || baseline || at) FROM looks WHERE suite_digest IN (SELECT value FROM json_each(?))"
    distinct = int(db.execute(query, (json.dumps(together),)).fetchone()[0])
    own = db.execute("SELECT max(look) FROM looks WHERE suite_digest = ?", (suite.digest,)).fetchone()[0]
    return max(distinct, int(own or 0))


def renewals(db: sqlite3.Connection, suites: Iterable[JudgedSuite]) -> list[str]:
    """A line for each of these suites that renews the one of its name before."""
    query = "SELECT name, renews FROM look_items WHERE suite_digest = ? AND renews IS NOT NULL LIMIT 1"
    found = [db.execute(query, (suite.digest,)).fetchone() for suite in suites]
    return [
        f"suite {row['name']} asks new items since {digest_start(row['renews'])}, so its looks count from 1 again"
        for row in found
        if row is not None
    ]


def all_looks(db: sqlite3.Connection) -> list[LookCount]:
    """Every state of every suite that was looked at, oldest first."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'look_items'").fetchone() is None:
        return []  # of an older version, and nobody here may write to it
    items: dict[str, list[str]] = {}
    for row in db.execute("SELECT suite_digest, item FROM look_items"):
        items.setdefault(row["suite_digest"], []).append(row["item"])
    found: list[LookCount] = []
    query = "SELECT suite_digest, min(at) AS since FROM looks GROUP BY suite_digest ORDER BY min(rowid)"
    for row in db.execute(query).fetchall():
        digest = row["suite_digest"]
        said = db.execute("SELECT name, renews FROM look_items WHERE suite_digest = ? LIMIT 1", (digest,)).fetchone()
        name, renews = ("", None) if said is None else (said["name"], said["renews"])
        taken = count_looks(db, JudgedSuite(name, digest, items.get(digest, ())))
        found.append(LookCount(name, digest, taken, row["since"], renews))
    return found


def _look_at(db: sqlite3.Connection, suite: str, candidate: str, baseline: str) -> int | None:
    query = "SELECT look FROM looks WHERE (suite_digest, candidate, baseline) = (?, ?, ?)"
    row = db.execute(query, (suite, candidate, baseline)).fetchone()
    return None if row is None else int(row["look"])


def _sharing(db: sqlite3.Connection, digest: str, items: Collection[str]) -> list[str]:
    """The suites that ask one of these items, this one too."""
    query = "SELECT DISTINCT suite_digest FROM look_items WHERE item IN (SELECT value FROM json_each(?))"
    return [digest, *(row["suite_digest"] for row in db.execute(query, (json.dumps(list(items)),)).fetchall())]


def _renews(db: sqlite3.Connection, suite: JudgedSuite) -> str | None:
    """The suite of this name before, where this one asks nothing that it or any other asked."""
    if len(set(_sharing(db, suite.digest, suite.items))) > 1:
        return None
    query = (
        "SELECT looks.suite_digest FROM looks JOIN look_items USING (suite_digest) WHERE name = ? AND looks.suite_digest != ? "
        "ORDER BY looks.rowid DESC LIMIT 1"
    )
    row = db.execute(query, (suite.name, suite.digest)).fetchone()
    return None if row is None else str(row["suite_digest"])
