"""Verdicts that wait for a person: `pending.json` beside the run's state, and the decision beside the verdict."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from posttrain.checkpoint.lock import run_lock
from posttrain.errors import GateError
from posttrain.evidence import Decision
from posttrain.files import read_json, write_json
from posttrain.gate.folder import load_verdict
from posttrain.pipeline.state import GateEntry

PENDING_FILE = "pending.json"
DECISION_FILE = "decision.json"


def wait_for_person(run: Path, gate: GateEntry) -> None:
    """Say in `pending.json` which verdict waits and how it is decided."""
    verdict = load_verdict(run / gate.folder)
    record = {
        "gate": gate.folder,
        "verdict_digest": verdict.digest,
        "reason": verdict.reason,
        "candidate": gate.candidate,
    }
    command = f'posttrain gate decide {run} --accept|--reject --reason "…" --by NAME'
    write_json(run / PENDING_FILE, record | {"decide": command})


def decide_pending(run: Path, *, accepted: bool, by: str, reason: str) -> Decision:
    """Write the decision on the verdict that waits. Raises: GateError if none does, or name or reason is missing."""
    if not by.strip() or not reason.strip():
        raise GateError('a decision needs a name and a reason: add --by NAME and --reason "…"')
    if not (run / PENDING_FILE).exists():
        raise GateError(
            f"{run}: no verdict waits for a decision here; `on_inconclusive: escalate` leaves {PENDING_FILE} after an "
            "inconclusive one"
        )
    with run_lock(run):
        pending = read_json(run / PENDING_FILE)
        digest = load_verdict(run / pending["gate"]).digest
        if digest != pending["verdict_digest"]:
            raise GateError(
                f"{run}: {pending['gate']} holds {digest}, but {pending['verdict_digest']} waits: run it again"
            )
        decision = Decision(
            digest, accepted, by.strip(), reason.strip(), datetime.now(UTC).isoformat(timespec="seconds")
        )
        write_json(run / pending["gate"] / DECISION_FILE, decision.to_json())
        (run / PENDING_FILE).unlink()
    return decision


def decision_on(run: Path, gate: GateEntry) -> Decision | None:
    """What a person decided on this verdict. Raises: GateError if the decision is on another one."""
    path = run / gate.folder / DECISION_FILE
    if not path.exists():
        return None
    decision = Decision(**read_json(path))
    digest = load_verdict(run / gate.folder).digest
    if decision.verdict_digest != digest:
        raise GateError(f"{path}: decides on {decision.verdict_digest}, the verdict here is {digest}; delete the file")
    return decision
