"""One run of the reward check: scores texts in the shape training gives them, and collects what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.rewards.cases import Case, PolicySample
from posttrain.rewards.library import REWARDS
from posttrain.rewards.workers import RewardPool
from posttrain.types import RewardBreakdown

TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a reward must reach. `slack` is in units of the gap between right and wrong answers."""

    recall: float = 0.98
    auc: float = 0.99
    slack: float = 0.02
    mutation_cases: int = 12
    repeats: int = 10


@dataclass(frozen=True, slots=True)
class MutationResult:
    """How one mutation fared: `violations` of `num` texts; `example` is the first."""

    name: str
    kind: Literal["E", "Z", "N"]
    num: int
    violations: int
    example: str = ""


class RewardCheck:
    """One run of the check: scores texts and collects what is wrong."""

    def __init__(
        self,
        pool: RewardPool,
        cases: Sequence[Case],
        samples: Sequence[PolicySample],
        limits: Thresholds,
        tokenize: Callable[[str], Sequence[int]],
    ) -> None:
        self.pool, self.cases, self.samples, self.limits, self.tokenize = (
            pool,
            tuple(cases),
            tuple(samples),
            limits,
            tokenize,
        )
        self.failures: list[str] = []
        self.warnings: list[str] = []
        self.measures: dict[str, float] = {}
        self.rows: list[MutationResult] = []
        self.gap, self.wrong_mean = 1.0, 0.0
        # Pure penalties (length, repetition) say nothing of right and wrong, and favour short texts by design.
        self.deciding: tuple[str, ...] = ()
        self.judged = {
            name: weight for name, weight in zip(pool.names, pool.weights, strict=True) if not _is_penalty(name)
        }

    def score(
        self, texts: Sequence[tuple[Case, str]], columns: Sequence[Mapping[str, Any]] | None = None
    ) -> list[RewardBreakdown]:
        """Score completions in the shape training gives them: messages for chat prompts, strings for text prompts."""
        rows = [dict(case.columns) for case, _ in texts] if columns is None else [dict(row) for row in columns]
        names = sorted({name for row in rows for name in row})
        completions = [
            text if isinstance(case.prompt, str) else [{"role": "assistant", "content": text}] for case, text in texts
        ]
        prompts = [case.prompt if isinstance(case.prompt, str) else list(case.prompt) for case, _ in texts]
        table = {name: [row.get(name) for row in rows] for name in names}
        table["completion_ids"] = [list(self.tokenize(text)) for _, text in texts]
        return self.pool.score(prompts, completions, table)

    def value(self, breakdown: RewardBreakdown) -> float | None:
        """The weighted sum of what judges right and wrong; None when it could not be scored."""
        if breakdown.error is not None:
            return None
        parts = [w * breakdown.parts[name] for name, w in self.judged.items() if breakdown.parts[name] is not None]  # type: ignore[operator]
        return sum(parts) if parts else None

    def decided(self, breakdown: RewardBreakdown) -> float | None:
        """The weighted sum of the rewards that look at the answer: format rewards may well prefer one way of writing it."""
        values = [breakdown.parts[name] for name in self.deciding]
        if breakdown.error is not None or any(value is None for value in values):
            return None
        return sum(self.judged[name] * (value or 0.0) for name, value in zip(self.deciding, values, strict=True))

    def values(self, texts: Sequence[tuple[Case, str]]) -> list[float | None]:
        return [self.value(breakdown) for breakdown in self.score(texts)]


def _is_penalty(name: str) -> bool:
    return name in REWARDS and REWARDS[name].high <= 0
