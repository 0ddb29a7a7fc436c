"""Runs the rules over a run's step reports; all it remembers is bounded and can be saved."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from posttrain.health.history import History, eval_losses, get, mean, values
from posttrain.health.rules import GUARDS, Rule, rules_for
from posttrain.types import Finding, StepReport

WINDOW_STEPS = 64
START_STEPS = 8
KEPT_EVALS = 32
QUIET_STEPS = 25
_EVAL_SCORE = "eval_score"
_REWARD_STEPS = 10
_COUNTS = ("steps", "batches")
"""Thresholds that say how many of the latest values a rule looks at."""


class Monitor:
    """Give it every step report; a rule that fired stays quiet for `QUIET_STEPS` steps.

    What is known of samples is logged once in `steps_per_batch` steps; as many as a rule asks for are remembered.
    """

    def __init__(self, kind: str, rules: Sequence[Rule] | None = None, steps_per_batch: int = 1) -> None:
        self._rules = tuple(rules if rules is not None else rules_for(kind))
        asked = max((rule.thresholds.get(name, 0) for rule in self._rules for name in _COUNTS), default=0)
        window = max(WINDOW_STEPS, int(asked) * steps_per_batch)
        self._first: list[StepReport] = []
        self._recent: deque[StepReport] = deque(maxlen=window)
        self._evaluated: deque[StepReport] = deque(maxlen=KEPT_EVALS)
        self._fired: dict[str, int] = {}

    def before_update(self, report: StepReport) -> list[Finding]:
        """What the early rules find in a step whose update is not made yet; its report is not remembered."""
        first = [*self._first, report] if len(self._first) < START_STEPS else self._first
        history = History(tuple(first), (*self._recent, report), tuple(self._evaluated))
        return [finding for rule in self._rules if rule.early and (finding := self._apply(rule, history)) is not None]

    def observe(self, report: StepReport) -> list[Finding]:
        """What the rules find now that `report` is the newest."""
        if len(self._first) < START_STEPS:
            self._first.append(report)
        self._recent.append(report)
        if any(math.isfinite(get(report, name)) for name in (*eval_losses(report), _EVAL_SCORE)):
            reward = mean(values(list(self._recent)[-_REWARD_STEPS:], "reward"))
            self._evaluated.append(StepReport(report.step, {**report.metrics, "reward": reward}))
        history = History(tuple(self._first), tuple(self._recent), tuple(self._evaluated))
        # What was found before the update of this very step is not found again.
        rules = [rule for rule in self._rules if self._fired.get(rule.name) != report.step]
        return [finding for rule in rules if (finding := self._apply(rule, history)) is not None]

    def _apply(self, rule: Rule, history: History) -> Finding | None:
        step = history.newest.step
        guards = rule.early and rule.action in GUARDS
        if not guards and step - self._fired.get(rule.name, -QUIET_STEPS) < QUIET_STEPS:
            return None
        finding = apply(rule, history)
        if finding is not None:
            self._fired[rule.name] = step
        return finding

    def state(self) -> dict[str, Any]:
        """Everything it remembers, as JSON values, for an exact resume."""
        reports = {"first": self._first, "recent": self._recent, "evaluated": self._evaluated}
        return {name: [_to_json(report) for report in kept] for name, kept in reports.items()} | {
            "fired": dict(self._fired)
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._first = [_from_json(row) for row in state["first"]]
        self._recent = deque((_from_json(row) for row in state["recent"]), maxlen=self._recent.maxlen)
        self._evaluated = deque((_from_json(row) for row in state["evaluated"]), maxlen=KEPT_EVALS)
        self._fired = {str(name): int(step) for name, step in state["fired"].items()}


def apply(rule: Rule, history: History) -> Finding | None:
    """One rule on one history: pure."""
    evidence = rule.check(history, **rule.thresholds)
    if evidence is None:
        return None
    text = rule.message.format(**{name.replace("/", "_"): value for name, value in evidence.items()})
    step, message = history.newest.step, f"{text}. {rule.advice}"
    return Finding(rule.name, rule.severity, step, evidence, rule.action, message, _since(rule, history))


def _since(rule: Rule, history: History) -> int:
    """The first step of what the rule looked at: a checkpoint from before it is healthy."""
    evals = history.evaluated[-int(rule.thresholds.get("evals", 0)) :] if "evals" in rule.thresholds else ()
    return evals[0].step if evals else history.newest.step - int(rule.thresholds.get("steps", 1)) + 1


def _to_json(report: StepReport) -> list[Any]:
    # Non-finite numbers as text: strict JSON has no NaN.
    numbers = {name: float(value) for name, value in report.metrics.items()}
    return [report.step, {name: value if math.isfinite(value) else str(value) for name, value in numbers.items()}]


def _from_json(row: Sequence[Any]) -> StepReport:
    return StepReport(int(row[0]), {name: float(value) for name, value in row[1].items()})
