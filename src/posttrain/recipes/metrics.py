"""Metrics of one optimizer step: ratios that add over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from posttrain.protocols import Ranks
from posttrain.types import Ratio


class StepMetrics:
    """Collects a step's ratios and reads them out once. A name that ends in `/max` is combined by its maximum."""

    def __init__(self) -> None:
        self._sums: dict[str, Ratio] = {}
        self._shares: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Ratio]) -> None:
        for name, ratio in metrics.items():
            self._sums[name] = _combined(name, self._sums.get(name), ratio)

    def add_share(self, name: str, value: float) -> None:
        """A share of something that micro-batches and ranks add up to, such as a loss already divided."""
        self._shares[name] = self._shares.get(name, 0.0) + value

    def reduced(self, ranks: Ranks) -> dict[str, float]:
        """Values over all ranks; a mean that nothing counted towards is left out."""
        total: dict[str, Ratio] = {}
        shares: dict[str, float] = {}
        for rank in ranks.gather(self):
            for name, ratio in rank._sums.items():
                total[name] = _combined(name, total.get(name), ratio)
            for name, value in rank._shares.items():
                shares[name] = shares.get(name, 0.0) + value
        return {name: ratio.value for name, ratio in total.items() if ratio.den} | shares


def length_metrics(lengths: Sequence[int], num_cut: int) -> dict[str, float]:
    """Of all completions of a batch, under TRL's names; nothing of none. `num_cut` of them had no room to end."""
    if not lengths:
        return {}
    return {
        "completions/mean_length": sum(lengths) / len(lengths),
        "completions/min_length": float(min(lengths)),
        "completions/max_length": float(max(lengths)),
        "completions/clipped_ratio": num_cut / len(lengths),
    }


def _combined(name: str, one: Ratio | None, other: Ratio) -> Ratio:
    if one is None:
        return other
    return max(one, other, key=lambda ratio: ratio.value) if name.endswith("/max") else one + other
