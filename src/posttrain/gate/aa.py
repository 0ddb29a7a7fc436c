"""A/A check: the same model evaluated twice must agree with itself, or a gate measures noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from posttrain.errors import GateError
from posttrain.evidence import EvalReport
from posttrain.gate.distributions import binomial_upper
from posttrain.gate.measure import choose, measure
from posttrain.gate.pairing import pair

MAX_FLIP_RATE = 0.02
FALSE_ALARM = 0.01
"""Chance that a sound sampled suite is blocked, over all the comparisons of one check."""


@dataclass(frozen=True, slots=True)
class AAResult:
    """Two evaluations of one model. `upper` is the exact 95 % upper bound of the share of items whose score changed.

    Greedy answers follow from the prompt, so they must not change; sampled ones do, but their mean must not: `differs`
    says that it did, beyond the chance of `FALSE_ALARM`.
    """

    suite: str
    num_items: int
    flips: int
    upper: float
    max_flip_rate: float
    greedy: bool
    difference: float
    differs: bool

    @property
    def rate(self) -> float:
        return self.flips / self.num_items

    @property
    def passed(self) -> bool:
        return not self.differs and (not self.greedy or self.rate <= self.max_flip_rate)

    @property
    def words(self) -> str:
        """What was seen, and where it did not pass, why that is no ground to judge on."""
        seen = (
            f"A/A {self.suite}: {self.flips} of {self.num_items} items changed their score ({self.rate:.2%}, at most "
            f"{self.upper:.2%} with 95 % confidence), mean {self.difference:+.4f}"
        )
        if self.passed:
            return f"{seen}: no difference"
        if self.differs:
            return f"{seen}: the model differs from itself, so the gate would ship or block on chance: use more samples"
        return (
            f"{seen}: greedy answers depend on what they are batched with (at most {self.max_flip_rate:.0%} may change), so "
            "the gate would measure the batch order: evaluate in float32 (bf16: false)"
        )


def aa_check(
    first: EvalReport, second: EvalReport, max_flip_rate: float = MAX_FLIP_RATE, *, comparisons: int = 1
) -> AAResult:
    """Compare two evaluations of one model, with another batch order or seed. Raises: GateError if they are not.

    `comparisons` is the number of such checks made together, over which the chance of a false alarm is divided.
    """
    for what in ("model_digest", "suite", "split"):
        left, right = getattr(first, what), getattr(second, what)
        if left != right:
            raise GateError(f"an A/A check compares a model with itself: {what} is {left} and {right}")
    before = {item.id: item for item in first.items}
    after = {item.id: item for item in second.items}
    if not before or before.keys() != after.keys():
        raise GateError(f"an A/A check needs the same items twice: got {len(before)} and {len(after)}")
    flips = sum(before[name].score != after[name].score for name in before)
    difference, differs = _difference(first, second, FALSE_ALARM / comparisons)
    greedy = not first.decoding.get("temperature")
    upper = binomial_upper(flips, len(before), 0.05)
    return AAResult(first.suite, len(before), flips, upper, max_flip_rate, greedy, difference, differs)


def _difference(first: EvalReport, second: EvalReport, alpha: float) -> tuple[float, bool]:
    """Mean difference of the scores, and whether the gate's own test finds one, in either direction."""
    other = replace(second, model_digest=f"{second.model_digest} again", suite_digest=first.suite_digest)
    found = False
    for candidate, baseline in ((first, other), (other, first)):
        pairs = pair(candidate, baseline, first.split)
        bound = measure(choose(pairs), pairs, 0.0, alpha / 2).bound
        constant = math.isnan(bound) and float(pairs.differences.mean()) > 0.0
        found = found or bound > 0.0 or constant
    return float(pair(other, first, first.split).differences.mean()), found
