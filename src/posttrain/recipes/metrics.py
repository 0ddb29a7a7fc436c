"""Metrics of one optimizer step: ratios that add over micro-batches and ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping

from posttrain.errors import TrainingError
from posttrain.protocols import Topology
from posttrain.types import Ratio


class StepMetrics:
    """Collects a step's ratios and reads them out once."""

    def __init__(self) -> None:
        self._sums: dict[str, Ratio] = {}
        self._shares: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Ratio]) -> None:
        for name, ratio in metrics.items():
            self._sums[name] = self._sums.get(name, Ratio(0.0, 0.0)) + ratio

    def add_share(self, name: str, value: float) -> None:
        """A share of something that micro-batches and ranks add up to, such as a loss already divided."""
        self._shares[name] = self._shares.get(name, 0.0) + value

    def reduced(self, topology: Topology) -> dict[str, float]:
        """Values over all ranks; a mean that nothing counted towards is left out."""
        total: dict[str, Ratio] = {}
        shares: dict[str, float] = {}
        for rank in topology.gather(self):
            for name, ratio in rank._sums.items():
                total[name] = total.get(name, Ratio(0.0, 0.0)) + ratio
            for name, value in rank._shares.items():
                shares[name] = shares.get(name, 0.0) + value
        return {name: ratio.value for name, ratio in total.items() if ratio.den} | shares


def check_finite(loss: float, step: int) -> None:
    """Raises: TrainingError for a loss that is NaN or infinite."""
    if not math.isfinite(loss):
        raise TrainingError(
            f"step {step}: the loss is {loss}; training stops here and nothing was saved over the last good checkpoint. "
            "Lower learning_rate, or look at the data of this step"
        )
