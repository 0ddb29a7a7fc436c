"""One run of the reward check: scores texts in the shape training gives them, and collects what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from posttrain.rewards.cases import AnswerForm, Case, PolicySample
from posttrain.rewards.library import REWARDS
from posttrain.rewards.workers import RewardPool
from posttrain.types import RewardBreakdown

TINY = 1e-9


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a reward must reach. `slack` and `advantage` are in units of the gap between right and wrong answers.

    The last five are for a model's opinion, which no attack finds right every time: `fooled` is the share of texts that may be paid more
    than `advantage`, `accuracy` that of better answers above worse ones from which on it is known to tell them apart, `prefers` that
    below which it is refused, `order` that of comparisons which the order may decide.
    """

    recall: float = 0.98
    auc: float = 0.99
    slack: float = 0.02
    mutation_cases: int = 12
    repeats: int = 10
    fooled: float = 0.1
    advantage: float = 0.25
    accuracy: float = 0.9
    prefers: float = 0.4
    order: float = 0.3


@dataclass(frozen=True, slots=True)
class MutationResult:
    """How one mutation fared: `violations` of `num` texts; `example` is the first."""

    name: str
    kind: Literal["E", "Z", "N", "A"]
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
        self.form: AnswerForm | None = None
        self.asks_models = True
        # Pure penalties (length, repetition) say nothing of right and wrong, and favour short texts by design.
        self.deciding: tuple[str, ...] = ()
        self.judged = {
            name: weight
            for name, weight in zip(pool.names, pool.weights, strict=True)
            if not _is_penalty(name) and name not in pool.learned
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
        return self.pool.score(prompts, completions, table, ask_models=self.asks_models)

    @property
    def rounding(self) -> float:
        """How far two totals of one completion may lie apart."""
        weights = dict(zip(self.pool.names, self.pool.weights, strict=True))
        return sum(abs(weights[name]) * apart for name, apart in self.pool.rounding.items())

    def same(self, one: RewardBreakdown, other: RewardBreakdown) -> bool:
        """Whether two scores of one completion agree; what they cost may differ."""
        if (one.error is None) != (other.error is None) or one.parts.keys() != other.parts.keys():
            return False
        apart = self.pool.rounding
        return all(
            a == b or (a is not None and b is not None and abs(a - b) <= apart.get(name, 0.0))
            for (name, a), b in zip(one.parts.items(), other.parts.values(), strict=True)
        )

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
