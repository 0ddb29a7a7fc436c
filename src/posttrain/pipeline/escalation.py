"""Verdicts that wait for a person: `pending.json` beside the run's state, and `decisions.jsonl`, which is only added to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from posttrain.checkpoint.lock import run_lock
from posttrain.errors import GateError
from posttrain.evidence import Decision
from posttrain.files import named_if_damaged, read_json_lines, read_record, write_atomic, write_json
from posttrain.gate.folder import load_verdict
from posttrain.pipeline.state import GateEntry
from posttrain.registry.rows import now

PENDING_FILE = "pending.json"
DECISIONS_FILE = "decisions.jsonl"
_OF_A_DECISION = tuple(field.name for field in fields(Decision))


def wait_for_person(run: Path, gate: GateEntry) -> None:
    """Say in `pending.json` which verdict waits and how it is decided."""
    verdict = load_verdict(run / gate.folder)
    record = {
        "gate": gate.folder,
        "verdict_digest": verdict.digest,
        "reason": verdict.reason,
        "candidate": gate.candidate,
        "baseline": gate.baseline,
    }
    command = f'posttrain gate decide {run} --accept|--reject --reason "…" --by NAME'
    write_json(run / PENDING_FILE, record | {"decide": command})


def _pending(record: dict[str, Any]) -> dict[str, Any]:
    return _with_all(record, ("gate", "verdict_digest", "candidate", "baseline"))


def decide_pending(run: Path, *, accepted: bool, by: str, reason: str) -> Decision:
    """Add the decision on the verdict that waits. Raises: GateError if none does, or name or reason is missing."""
    if not by.strip() or not reason.strip():
        raise GateError('a decision needs a name and a reason: add --by NAME and --reason "…"')
    if not (run / PENDING_FILE).exists():
        raise GateError(
            f"{run}: no verdict waits for a decision here; `on_inconclusive: escalate` leaves {PENDING_FILE} after an "
            "inconclusive one"
        )
    with run_lock(run):
        pending = read_record(run / PENDING_FILE, _pending, "start the run again, which writes it anew")
        digest = load_verdict(run / pending["gate"]).digest
        if digest != pending["verdict_digest"]:
            raise GateError(
                f"{run}: {pending['gate']} holds {digest}, but {pending['verdict_digest']} waits: run it again"
            )
        decision = Decision(digest, accepted, by.strip(), reason.strip(), now())
        about = {name: pending[name] for name in ("gate", "candidate", "baseline")}
        lines = [*_lines(run), about | decision.to_json()]
        write_atomic(run / DECISIONS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        (run / PENDING_FILE).unlink()
    return decision


def decision_on(run: Path, gate: GateEntry) -> Decision | None:
    """What a person decided on exactly this verdict."""
    digest = load_verdict(run / gate.folder).digest
    found = [decision for _, decision in decisions(run) if decision.verdict_digest == digest]
    return found[-1] if found else None


def rejection_of(run: Path, candidate: str) -> Decision | None:
    """The rejection of this very model, whatever it was compared with; nothing takes it back."""
    found = [decision for model, decision in decisions(run) if model == candidate and not decision.accepted]
    return found[-1] if found else None


def decisions(run: Path) -> list[tuple[str, Decision]]:
    """The digest of the candidate and what was decided on it, oldest first. Raises: DamagedFileError."""
    return [(line["candidate"], Decision(**{name: line[name] for name in _OF_A_DECISION})) for line in _lines(run)]


def _lines(run: Path) -> list[dict[str, Any]]:
    path = run / DECISIONS_FILE
    if not path.exists():
        return []
    with named_if_damaged(path, "put a copy of it back: it says who accepted and rejected what"):
        return [_with_all(record, ("candidate", *_OF_A_DECISION)) for _, record in read_json_lines(path)]


def _with_all(record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The record. Raises: KeyError for a name that is missing."""
    for name in names:
        record[name]
    return record
