"""How long answers are: a log-normal law, cut where an answer may not go on."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lengths:
    """Answers of `mean` tokens, none above `longest`; `spread` is the standard deviation of the logarithm before the cut."""

    mean: float
    longest: float
    spread: float

    @property
    def location(self) -> float:
        """The logarithm's mean before the cut, so that the mean after it is `mean`."""
        low, high = 0.0, math.log(self.longest) + 8 * self.spread + 1
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._cut_mean(middle) < self.mean else (low, middle)
        return low

    def _cut_mean(self, location: float) -> float:
        z = (math.log(self.longest) - location) / self.spread
        return math.exp(location + self.spread**2 / 2) * _phi(z - self.spread) + self.longest * (1 - _phi(z))

    @property
    def is_even(self) -> bool:
        """Whether all answers are equally long."""
        return self.spread == 0 or self.mean >= 0.999 * self.longest

    def surviving(self, places: int) -> list[tuple[float, float]]:
        """(token, share of the answers that are longer), at the middles of `places` equal stretches up to the longest."""
        if self.is_even:
            return [((i + 0.5) * self.mean / places, 1.0) for i in range(places)]
        location, stretch = self.location, self.longest / places
        tokens = [(i + 0.5) * stretch for i in range(places)]
        return [(token, 1 - _phi((math.log(token) - location) / self.spread)) for token in tokens]

    def draw(self, count: int, seed: int = 0) -> list[int]:
        if self.is_even:
            return [max(1, round(self.mean))] * count
        rng, location = random.Random(seed), self.location
        longest = int(self.longest)
        return [max(1, min(longest, round(rng.lognormvariate(location, self.spread)))) for _ in range(count)]


def _phi(z: float) -> float:
    return (1 + math.erf(z / math.sqrt(2))) / 2
