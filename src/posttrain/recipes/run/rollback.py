"""Back to the last healthy checkpoint, and on from there with something changed.

The decision is a line in `rollbacks.json` before anything else happens, so that whoever starts next, this process or one
after a crash, carries out the same one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from posttrain.checkpoint.store import CheckpointStore
from posttrain.errors import TrainingError
from posttrain.files import read_json, write_json
from posttrain.health.controls import Controls
from posttrain.types import Finding

RECORD = "rollbacks.json"


class RolledBack(Exception):
    """The run was abandoned at a finding; started again, it goes on from the last healthy checkpoint."""


@dataclass(frozen=True, slots=True)
class Rollback:
    """One decision: why, from where to where, and how the run goes on. `number` counts from 1."""

    number: int
    rule: str
    message: str
    evidence: Mapping[str, Any]
    from_step: int
    to_step: int
    controls: Controls

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Rollback:
        return cls(**{**record, "controls": Controls.from_json(record["controls"])})

    def __str__(self) -> str:
        place = f"step {self.to_step}" if self.to_step else "the start"
        return (
            f"{self.rule} at step {self.from_step}: back to {place}, with learning rate ×{self.controls.lr_scale:g}, "
            f"{_count(self.from_step - self.to_step, 'step')} of data passed over, another seed"
        )


def read_rollbacks(folder: Path) -> tuple[Rollback, ...]:
    path = folder / RECORD
    return tuple(Rollback.from_json(record) for record in read_json(path)) if path.exists() else ()


def begin_rollback(folder: Path, store: CheckpointStore, finding: Finding, controls: Controls, most: int) -> Rollback:
    """Write down where to go back to. Raises: TrainingError if there were `most` rollbacks before, or `stop` is asked."""
    before = read_rollbacks(folder)
    healthy = store.newest_valid(before=finding.since)
    while healthy is not None and healthy.step in {rollback.to_step for rollback in before}:
        # It was gone back to already and led here again: what is wrong may have begun before it.
        healthy = store.newest_valid(before=healthy.step)
    place = healthy.step if healthy is not None else 0
    if finding.action == "stop" or len(before) >= most:
        raise TrainingError(_diagnosis(finding, before, place))
    decision = Rollback(
        len(before) + 1, finding.rule, finding.message, _plain(finding.evidence),
        finding.step, place, controls.rolled_back(finding.step, place),
    )  # fmt: skip
    write_json(folder / RECORD, [rollback.to_json() for rollback in (*before, decision)])
    return decision


def discard_abandoned(store: CheckpointStore, rollbacks: tuple[Rollback, ...]) -> None:
    """Forget every checkpoint that was taken after the place a later rollback went back to."""

    def abandoned(step: int, path: Path) -> bool:
        try:
            made_after = Controls.from_json(read_json(path / "state.json")["guard"]["controls"]).rollbacks
        except (OSError, ValueError, KeyError):
            made_after = 0  # broken: of no use, and it would count as one that is kept
        return any(step > rollback.to_step for rollback in rollbacks[made_after:])

    store.discard(abandoned)


def restore_best(store: CheckpointStore, best: tuple[int, float] | None) -> None:
    """The best checkpoint is again what it was at the place gone back to, where that one is still there."""
    store.unmark_best()
    if best is not None and store.has(best[0]):
        store.mark_best(*best)


def _diagnosis(finding: Finding, before: tuple[Rollback, ...], place: int) -> str:
    evidence = ", ".join(f"{name} {value:.4g}" for name, value in finding.evidence.items())
    text = f"step {finding.step}: {finding.rule}: {finding.message} (seen: {evidence}). Training stops here"
    if before:
        tried = "; ".join(str(rollback) for rollback in before)
        text += f", after {_count(len(before), 'rollback')} that did not help ({tried})"
    kept = f"the checkpoint of step {place} is the last healthy one" if place else "no healthy checkpoint was saved"
    return f"{text}; {kept}. No model was written"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)


def _plain(evidence: Mapping[str, float]) -> dict[str, Any]:
    """Non-finite numbers as text: strict JSON has no NaN."""
    return {name: value if math.isfinite(value) else str(value) for name, value in evidence.items()}
