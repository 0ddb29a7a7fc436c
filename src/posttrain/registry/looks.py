"""The look ledger: how often verdicts were made on the same items. It outlives run folders."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable

from posttrain.registry.rows import Rows, now
from posttrain.registry.schema import writing


def record_look(db: sqlite3.Connection, suite_digests: Iterable[str], candidate: str, baseline: str) -> int:
    """Number of this look, from 1: the largest over the suites. Judging the same pair again is not another look."""
    numbers: list[int] = []
    fresh: dict[str, int] = {}
    with writing(db):
        for suite in sorted(set(suite_digests)):
            known = db.execute(
                "SELECT look FROM looks WHERE suite_digest = ? AND candidate = ? AND baseline = ?",
                (suite, candidate, baseline),
            ).fetchone()
            if known is not None:
                numbers.append(known["look"])
                continue
            number = count_looks(db, suite) + 1
            db.execute("INSERT INTO looks VALUES (?, ?, ?, ?, ?)", (suite, number, candidate, baseline, now()))
            numbers.append(number)
            fresh[suite] = number
        if fresh:
            details = {"suites": fresh, "candidate": candidate, "baseline": baseline}
            Rows(db).event("look", "", 0, details, None)
    return max(numbers, default=1)


def count_looks(db: sqlite3.Connection, suite_digest: str) -> int:
    """Looks taken so far at these items."""
    return int(db.execute("SELECT count(*) FROM looks WHERE suite_digest = ?", (suite_digest,)).fetchone()[0])
