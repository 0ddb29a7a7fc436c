"""A/A check: the same model evaluated twice must agree with itself, or a gate measures noise."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.errors import GateError
from posttrain.gate.distributions import binomial_upper
from posttrain.types import EvalReport

MAX_FLIP_RATE = 0.02


@dataclass(frozen=True, slots=True)
class AAResult:
    """Items whose score changed between two evaluations of one model; `upper` is the exact 95 % upper bound."""

    num_items: int
    flips: int
    upper: float
    max_flip_rate: float

    @property
    def rate(self) -> float:
        return self.flips / self.num_items

    @property
    def passed(self) -> bool:
        """The observed rate is within the limit."""
        return self.rate <= self.max_flip_rate


def aa_check(first: EvalReport, second: EvalReport, max_flip_rate: float = MAX_FLIP_RATE) -> AAResult:
    """Compare two evaluations of one model, for example with another batch order. Raises: GateError if they are not."""
    for what in ("model_digest", "suite", "split"):
        left, right = getattr(first, what), getattr(second, what)
        if left != right:
            raise GateError(f"an A/A check compares a model with itself: {what} is {left} and {right}")
    before = {item.id: item for item in first.items}
    after = {item.id: item for item in second.items}
    if not before or before.keys() != after.keys():
        raise GateError(f"an A/A check needs the same items twice: got {len(before)} and {len(after)}")
    flips = sum(before[name].score != after[name].score for name in before)
    return AAResult(len(before), flips, binomial_upper(flips, len(before), 0.05), max_flip_rate)
