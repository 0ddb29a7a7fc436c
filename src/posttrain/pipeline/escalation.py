"""Verdicts that wait for people: `pending.json` beside the run's state, and `decisions.jsonl`, which is only added to."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.checkpoint.lock import run_lock
from posttrain.config.pipeline import GateKeys
from posttrain.errors import GateError
from posttrain.evidence import Decision, Verdict, approvers
from posttrain.files import named_if_damaged, read_json_lines, read_record, write_atomic, write_json
from posttrain.gate.folder import load_verdict
from posttrain.pipeline.state import GateEntry
from posttrain.registry.rows import now

PENDING_FILE = "pending.json"
DECISIONS_FILE = "decisions.jsonl"
_OF_A_DECISION = tuple(field.name for field in fields(Decision))
_PATIENCE_S = 10.0
"""Who decides waits so long for another who does; a run that works holds its folder for longer."""


class AfterPeople(NamedTuple):
    """A verdict with what people decided on it; it `waits` while some have not."""

    verdict: Verdict
    reason: str
    waits: bool = False


@dataclass(frozen=True, slots=True)
class Decided:
    """A decision that was added, and what it came to: who accepted the verdict so far, of how many."""

    decision: Decision
    approvers: list[str]
    needed: int

    @property
    def waits(self) -> bool:
        return self.decision.accepted and len(self.approvers) < self.needed


def after_people(run: Path, gate: GateKeys, entry: GateEntry, reason: str, say: Callable[[str], None]) -> AfterPeople:
    """The verdict as people decided it. Where some are still asked, rank 0 leaves that in a file."""
    (run / PENDING_FILE).unlink(missing_ok=True)
    verdict = Verdict(entry.verdict)
    needed = _num_asked(gate, verdict)
    if not needed:
        return AfterPeople(verdict, reason)
    said = decisions_on(run, entry)
    given = approvers(said, load_verdict(run / entry.folder).digest)
    rejected = [decision for decision in said if not decision.accepted]
    if not rejected and len(given) < needed:
        _wait_for_people(run, entry, needed, given)
        whom = "a person" if needed == 1 else f"{needed} people"
        have = f" ({', '.join(given)} accepted)" if given else ""
        return AfterPeople(verdict, f"{reason}: waits for {whom}{have}: {_command(run)}", waits=True)
    told = "; ".join(f"{decision.by}: {decision.reason}" for decision in rejected or said)
    became = f"{'rejected' if rejected else 'accepted'} by {told}"
    say(f"gate: {verdict.value}, {became}")
    return AfterPeople(Verdict.FAIL if rejected else Verdict.PASS, became)


def _num_asked(gate: GateKeys, verdict: Verdict) -> int:
    """How many people must accept a verdict before its model goes on."""
    if verdict is Verdict.PASS:
        return gate.approve
    return max(1, gate.approve) if verdict is Verdict.INCONCLUSIVE and gate.on_inconclusive == "escalate" else 0


def _wait_for_people(run: Path, gate: GateEntry, needed: int, given: list[str]) -> None:
    """Say in `pending.json` which verdict waits and how it is decided."""
    verdict = load_verdict(run / gate.folder)
    record = {
        "gate": gate.folder,
        "verdict": verdict.verdict.value,
        "verdict_digest": verdict.digest,
        "reason": verdict.reason,
        "candidate": gate.candidate,
        "baseline": gate.baseline,
        "approve": needed,
        "accepted_by": given,
    }
    write_json(run / PENDING_FILE, record | {"decide": f'{_command(run)} --reason "…" --by NAME'})


def _command(run: Path) -> str:
    return f"posttrain gate decide {run} --accept|--reject"


def _pending(record: dict[str, Any]) -> dict[str, Any]:
    return _with_all(record, ("gate", "verdict_digest", "candidate", "baseline", "approve"))


def decide_pending(run: Path, *, accepted: bool, by: str, reason: str) -> Decided:
    """Add the decision on the verdict that waits.

    Raises: GateError if none does, name or reason is missing, or this person has accepted it already.
    """
    if not by.strip() or not reason.strip():
        raise GateError('a decision needs a name and a reason: add --by NAME and --reason "…"')
    if not run.is_dir():
        raise _nothing_waits(run)
    with run_lock(run, _PATIENCE_S):
        if not (run / PENDING_FILE).exists():
            raise _nothing_waits(run)
        pending = read_record(run / PENDING_FILE, _pending, "start the run again, which writes it anew")
        digest = load_verdict(run / pending["gate"]).digest
        if digest != pending["verdict_digest"]:
            raise GateError(
                f"{run}: {pending['gate']} holds {digest}, but {pending['verdict_digest']} waits: run it again"
            )
        decision = Decision(digest, accepted, by.strip(), reason.strip(), now())
        return _added(run, pending, decision)


def _nothing_waits(run: Path) -> GateError:
    return GateError(
        f"{run}: no verdict waits for a decision here; `approve: N` leaves {PENDING_FILE} after a PASS, `on_inconclusive: "
        "escalate` after an inconclusive verdict"
    )


def _added(run: Path, pending: dict[str, Any], decision: Decision) -> Decided:
    before = [one for _, one in decisions(run) if one.verdict_digest == decision.verdict_digest]
    had = approvers(before, decision.verdict_digest)
    if len(had) >= pending["approve"] or not all(one.accepted for one in before):
        (run / PENDING_FILE).unlink()  # a decision that was killed before it could
        raise _nothing_waits(run)
    given = approvers([*before, decision], decision.verdict_digest)
    if decision.accepted and len(given) == len(had):
        raise GateError(
            f"{run}: {decision.by} has accepted this verdict already ({len(given)} of {pending['approve']} have: "
            f"{', '.join(given)}); another person must"
        )
    about = {name: pending[name] for name in ("gate", "candidate", "baseline")}
    lines = [*_lines(run), about | decision.to_json()]
    write_atomic(run / DECISIONS_FILE, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    decided = Decided(decision, given, pending["approve"])
    # Killed before this, the next start finds in the decisions whether somebody is still asked.
    if decided.waits:
        write_json(run / PENDING_FILE, pending | {"accepted_by": given})
    else:
        (run / PENDING_FILE).unlink()
    return decided


def decisions_on(run: Path, gate: GateEntry) -> list[Decision]:
    """What people decided on exactly this verdict, oldest first."""
    digest = load_verdict(run / gate.folder).digest
    return [decision for _, decision in decisions(run) if decision.verdict_digest == digest]


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
