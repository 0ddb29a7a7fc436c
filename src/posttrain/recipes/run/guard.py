"""Watches a run's numbers and does what the health rules ask for: change controls, hold, skip a step, roll back, stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from posttrain.checkpoint.store import CheckpointStore
from posttrain.config.rl import RLKeys
from posttrain.config.stages import TrainKeys
from posttrain.errors import TrainingError
from posttrain.health.checks import CRITIC_GRAD_NORM, SKIPPED
from posttrain.health.controls import Controls, after
from posttrain.health.monitor import Monitor
from posttrain.health.rules import GUARDS, HOLDING, rules_for
from posttrain.protocols import Ranks
from posttrain.recipes.run.rollback import Rollback, RolledBack, begin_rollback, discard_abandoned, read_rollbacks
from posttrain.recipes.run.run_folder import RunFolder
from posttrain.recipes.run.steering import first_controls, moved
from posttrain.types import Finding, Severity, StepReport

_OF_THE_UPDATE = frozenset({"loss", "grad_norm", "update_norm"})


class TrainingGuard:
    """`allows` before each update, `observe` after each step. `controls` is what was changed in the run so far.

    `settle` waits for the checkpoint under way: a rollback goes back to what is on disk.
    """

    def __init__(
        self, kind: str, keys: TrainKeys, run: RunFolder, store: CheckpointStore, ranks: Ranks,
        settle: Callable[[], None],
    ) -> None:  # fmt: skip
        self._keys, self._run, self._store, self._ranks, self._settle = keys, run, store, ranks, settle
        steps_per_batch = keys.steps_per_batch if isinstance(keys, RLKeys) else 1
        self._monitor = Monitor(kind, rules_for(kind, keys.health), steps_per_batch)
        self.held: list[str] = []
        self.rollbacks: tuple[Rollback, ...] = ranks.broadcast(read_rollbacks(run.path) if ranks.is_main else ())
        self.controls: Controls = self.rollbacks[-1].controls if self.rollbacks else first_controls(keys)

    def allows(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether the update of a step with this loss and gradient is to be made. All ranks call it.

        Raises: RolledBack where the run goes on from an earlier checkpoint, TrainingError where it must not go on.
        """
        findings = self._findings(lambda: self._monitor.before_update(StepReport(step, metrics)))
        self._act(findings)
        # Whatever the rules were changed to: what is not a number never reaches the weights.
        finite = all(
            math.isfinite(metrics[name]) for name in ("loss", "grad_norm", CRITIC_GRAD_NORM) if name in metrics
        )
        return finite and not any(finding.action == "skip_step" for finding in findings)

    def observe(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the controllers and judge a finished step. All ranks call it. Raises: as `allows`."""
        self.controls = moved(self.controls, self._keys, metrics)
        skipped = SKIPPED in metrics
        report = StepReport(step, {n: v for n, v in metrics.items() if not (skipped and n in _OF_THE_UPDATE)})
        self._act(self._findings(lambda: self._monitor.observe(report)))

    # --- checkpoints and rollbacks -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        return {"controls": self.controls.to_json(), "held": list(self.held), "health": self._monitor.state()}

    def restore(self, record: Mapping[str, Any]) -> None:
        self.controls, self.held = Controls.from_json(record["controls"]), list(record["held"])
        self._monitor.load_state(record["health"])

    def discard_abandoned(self) -> None:
        discard_abandoned(self._store, self.rollbacks)

    @property
    def is_going_back(self) -> bool:
        """Whether a rollback was decided on that the restored state does not know of."""
        return self.controls.rollbacks < len(self.rollbacks)

    def go_back(self) -> None:
        """The controls that the last rollback decided on hold from here."""
        self.controls = self.rollbacks[-1].controls

    def tell_rollbacks(self, step: int) -> None:
        """Each rollback is one event, however often the records were cut back since."""
        told = {event["number"] for event in self._run.events("rollback")}
        for rollback in self.rollbacks:
            if rollback.number not in told:
                self._run.event("rollback", min(step, rollback.to_step), _told(rollback))

    # --- what is found -----------------------------------------------------------------------------------------

    def _findings(self, judge: Callable[[], list[Finding]]) -> list[Finding]:
        """Judged once, by rank 0: ranks that act differently would wait for each other for ever."""
        return self._ranks.broadcast(judge() if self._ranks.is_main else [])

    def _act(self, findings: Sequence[Finding]) -> None:
        """Findings become events, and what they ask for is done."""
        for finding in findings:
            record = {"rule": finding.rule, "severity": finding.severity.value, "action": finding.action}
            evidence = dict(finding.evidence)
            self._run.event("finding", finding.step, record | {"message": finding.message, "evidence": evidence})
            if finding.action in ("rollback", "stop"):
                self._abandon(finding)
            if finding.action in HOLDING and finding.rule not in self.held:
                self.held.append(finding.rule)
            before, self.controls = self.controls, after(self.controls, finding)
            changed = {n: v for n, v in asdict(self.controls).items() if v != getattr(before, n)}
            if changed or finding.action in GUARDS:
                what = ", ".join(f"{name} {value}" for name, value in changed.items()) or finding.action
                self._run.event(
                    "action", finding.step, {"message": f"{finding.rule}: {what}", "rule": finding.rule, **changed}
                )

    def _abandon(self, finding: Finding) -> None:
        """Raises: RolledBack, with the decision on disk; TrainingError if there is nothing left to try."""
        self._settle()
        decision: Any = None
        if self._ranks.is_main:
            try:
                decision = begin_rollback(
                    self._run.path, self._store, finding, self.controls, self._keys.health_rollbacks
                )
            except TrainingError as error:
                decision = error
        decision = self._ranks.broadcast(decision)
        raise decision if isinstance(decision, TrainingError) else RolledBack(str(decision))


def _told(rollback: Rollback) -> dict[str, Any]:
    """A rollback as an event: the finding it was made for is cut from the records with what was abandoned."""
    return rollback.to_json() | {"message": str(rollback), "severity": Severity.HARD.value, "action": "rollback"}
